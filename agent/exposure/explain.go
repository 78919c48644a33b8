package exposure

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// The verdicts about a packet.
const (
	Delivered = "delivered"
	Forwarded = "forwarded"
	Dropped   = "dropped"
)

// States are the conntrack states in which a packet can be explained.
var States = []string{"NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED"}

// Probe is a packet to explain.
type Probe struct {
	From, To netip.Addr
	Proto    firewall.Proto
	Port     uint16
	On       string
	State    string // one of States
}

// Explanation is what happens to a packet.
type Explanation struct {
	Schema  int    `json:"schema"`
	Verdict string `json:"verdict"`
	Steps   []Note `json:"steps"`
	Probe   Probe  `json:"-"`
}

// Note is a rule that a packet matches, or perhaps does, and its effect.
type Note struct {
	Hook Hook `json:"hook"`
	Decision
	Effect string   `json:"effect"`
	Why    []string `json:"why,omitempty"` // what the match depends on
}

// Explain returns what happens to a packet, rule by rule.
func (s Situation) Explain(p Probe) Explanation {
	rules := s.Rules.inState(p.State)
	from := Of(netip.PrefixFrom(p.From, p.From.BitLen()))
	packet := first(p.On, p.To, p.Proto, p.Port)
	packet.DstType, packet.Untracked = s.host().Type(p.To), p.State == "UNTRACKED"
	if p.Proto == firewall.TCP && p.State != "NEW" && p.State != "UNTRACKED" {
		packet.TCPFlags = 16 // ACK
	}
	res := rules.Trace(packet, from, s.host(), true)
	out := Explanation{Schema: Schema, Verdict: Dropped, Steps: []Note{}, Probe: p}
	sure, perhaps := res.Open()
	switch {
	case len(sure) > 0:
		out.Verdict = Delivered
		if slices.ContainsFunc(res.Ends, func(e End) bool { return e.Forwarded && len(e.Sure) > 0 }) {
			out.Verdict = Forwarded
		}
	case len(perhaps) > 0:
		out.Verdict = Perhaps
	}
	for _, st := range res.Steps {
		n := Note{Hook: st.Hook, Decision: s.decision(st.By, from), Effect: rules.effect(st)}
		if st.Perhaps {
			n.Effect, n.Why = "perhaps "+n.Effect, st.Why
		}
		out.Steps = append(out.Steps, n)
	}
	return out
}

// effect returns what the rule of a step does.
func (r Ruleset) effect(st Step) string {
	rule, _ := r.rule(st.By)
	text := ""
	switch st.Verdict {
	case Next:
		text = "continue"
	case Accept:
		text = "accept"
	case Drop:
		text = "drop"
	case Return:
		text = "return"
	case Jump:
		text = "jump to " + rule.To
	case Goto:
		text = "go to " + rule.To
	default:
		text = "unknown"
	}
	var changes string
	switch t := rule.Translate; {
	case t == nil:
	case !t.Known:
		changes = "translate the destination"
	case !t.To.IsValid():
		changes = fmt.Sprintf("redirect to port %d", t.Port)
		if t.Port == 0 {
			changes = "redirect to this host"
		}
	case t.Port != 0:
		changes = "translate to " + netip.AddrPortFrom(t.To, t.Port).String()
	default:
		changes = "translate to " + t.To.String()
	}
	switch {
	case changes != "":
		return changes
	case rule.Untracked:
		changes = "do not track"
	case rule.Mark != nil:
		changes = fmt.Sprintf("set mark %#x", rule.Mark.Value)
	default:
		return text
	}
	if st.Verdict == Next {
		return changes
	}
	return changes + ", " + text
}

// inState returns the ruleset as a packet in a conntrack state meets it: matches of
// that state become matches of NEW. Chains of type nat are unchanged: what they do to
// the first packet of a connection, conntrack does to all later ones.
func (r Ruleset) inState(state string) Ruleset {
	if state == "NEW" || state == "UNTRACKED" {
		return r
	}
	var renamed func([]Match) []Match
	renamed = func(list []Match) []Match {
		list = slices.Clone(list)
		for i, m := range list {
			if m.Field == State {
				is := slices.Contains(m.Names, state)
				m.Names = slices.DeleteFunc(slices.Clone(m.Names), func(n string) bool { return n == "NEW" })
				if is {
					m.Names = append(m.Names, "NEW")
				}
			}
			m.Of = slices.Clone(m.Of)
			for j := range m.Of {
				m.Of[j] = renamed(m.Of[j])
			}
			list[i] = m
		}
		return list
	}
	tables := slices.Clone(r.Tables)
	for i := range tables {
		if slices.ContainsFunc(tables[i].Chains, func(c Chain) bool { return c.NAT }) {
			continue
		}
		tables[i].Chains = slices.Clone(tables[i].Chains)
		for j := range tables[i].Chains {
			c := &tables[i].Chains[j]
			c.Rules = slices.Clone(c.Rules)
			for k := range c.Rules {
				c.Rules[k].Matches = renamed(c.Rules[k].Matches)
			}
		}
	}
	return Ruleset{tables}
}

// Complete returns a probe with a missing interface and destination filled in: the interface
// in whose network the source is, otherwise the public one, and the address of that interface.
func (s Situation) Complete(p Probe) (Probe, error) {
	family := firewall.FamilyOf(netip.PrefixFrom(p.From, p.From.BitLen()))
	if p.On == "" {
		var public string
		for _, i := range s.Interfaces {
			for _, n := range i.Addresses {
				if n.Addr() == p.From { // packets from this host to itself pass lo
					n, i.Name = netip.PrefixFrom(p.From, p.From.BitLen()), loopback(s.Interfaces)
				}
				if n.Contains(p.From) && (!n.Addr().IsLinkLocalUnicast() || i.Zone == firewall.PublicZone) {
					p.On = i.Name
				}
			}
			if i.Zone == firewall.PublicZone && (public == "" || i.DefaultRoute) {
				public = i.Name
			}
		}
		if p.On = cmp.Or(p.On, public); p.On == "" {
			return p, fmt.Errorf("%s: no interface leads to this address: specify --on", p.From)
		}
	}
	on, err := s.Interface(p.On)
	if p.To.IsValid() || err != nil {
		if err == nil && p.To.Is4() != p.From.Is4() {
			err = fmt.Errorf("%s and %s are of different families", p.From, p.To)
		}
		return p, err
	}
	list := Addresses(on, family)
	if len(list) == 0 {
		return p, fmt.Errorf("%s has no %v address: specify --to-addr", p.On, family)
	}
	p.To = list[0]
	return p, nil
}

func loopback(list []firewall.Interface) string {
	for _, i := range list {
		if i.Zone == firewall.LoopbackZone {
			return i.Name
		}
	}
	return "lo"
}

// Interface returns an interface by its name.
func (s Situation) Interface(name string) (firewall.Interface, error) {
	var names []string
	for _, i := range s.Interfaces {
		if i.Name == name {
			return i, nil
		}
		names = append(names, i.Name)
	}
	return firewall.Interface{}, fmt.Errorf("--on: no interface %s: want one of %s", firewall.Quote(name), strings.Join(names, ", "))
}
