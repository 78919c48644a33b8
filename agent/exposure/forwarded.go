package exposure

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Forwarded returns the ports at which packets from outside get a new destination and
// reach it. That is on this host or on another one, such as a container; the latter
// bypasses INPUT. Ports that only the settings close are included.
func (s Situation) Forwarded(r Report) (out []firewall.ForwardedPort) {
	type group struct {
		family string
		proto  firewall.Proto
		via    Reference
		to     string
		local  bool
		closed bool
	}
	var groups []group
	ports := map[group][]uint16{}
	for _, e := range r.Exposure {
		closed := e.held()
		if e.Via.Table == "" || e.Verdict == Closed && !closed || !s.outside(e) {
			continue
		}
		rule, _ := s.Rules.rule(e.Via)
		to := e.Container
		if closed { // no packet shows where it leads
			to = cmp.Or(to, "another host")
		}
		g := group{e.Family, e.Proto, e.Via, rule.Translate.text(e.Via.Text, to), e.Container == "" && !closed, closed}
		if ports[g] == nil {
			groups = append(groups, g)
		}
		ports[g] = append(ports[g], e.Port)
	}
	ranges, edges := s.Rules.ranges()
	for _, g := range groups {
		rule, _ := s.Rules.rule(g.via)
		b := firewall.ForwardedPort{Family: g.family, Proto: string(g.proto), On: networkOf(rule.Matches), To: g.to,
			By: g.via.Table + " " + g.via.Chain, Local: g.local, Held: s.Held && !g.local, Closed: g.closed, Program: firewall.ProgramOf(g.via.Table, g.via.Chain, commentOf(g.via.Text))}
		for _, b.Port = range rule.spans(ports[g], ranges, edges) {
			if !slices.Contains(out, b) { // two rules may do the same
				out = append(out, b)
			}
		}
	}
	for i := 0; i < len(out); i++ {
		both := out[i]
		both.Proto = string(firewall.UDP)
		if at := slices.Index(out[i+1:], both); at >= 0 && both.Port == firewall.AnyPort && out[i].Proto != both.Proto {
			out[i].Proto = firewall.AnyPort
			out = slices.Delete(out, i+1+at, i+2+at)
		}
	}
	for i, b := range out {
		out[i].Container = s.Containers[b.Port+"/"+b.Proto]
	}
	return out
}

// text returns the new destination as the rule specifies it. If it is one of several,
// it is taken from the rule's text.
func (t Translation) text(rule, otherwise string) string {
	switch m := targetText().FindStringSubmatch(rule); {
	case t.Known && !t.To.IsValid() && t.Port != 0:
		return fmt.Sprintf("port %d", t.Port)
	case t.Known && !t.To.IsValid(), otherwise == "" && m == nil:
		return "this host"
	case t.Known && t.Port != 0:
		return netip.AddrPortFrom(t.To, t.Port).String()
	case t.Known:
		return t.To.String()
	case m != nil:
		if to, _, ok := strings.Cut(m[1], "/"); ok && strings.Contains(to, "-") { // the base of a range of ports
			return to
		}
		return m[1]
	}
	return otherwise
}

// targetText finds the new destination in the text of a rule.
var targetText = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?:--to-destination|--to|dnat(?: ip6?)? to) (\S+)`)
})

// commentOf returns the comment in the text of a rule.
func commentOf(text string) string {
	_, comment, _ := strings.Cut(text, `comment "`)
	comment, _, _ = strings.Cut(comment, `"`)
	return comment
}

// outside reports whether packets of an entry arrive on a public or private interface.
func (s Situation) outside(e Entry) bool {
	return slices.ContainsFunc(s.Interfaces, func(i firewall.Interface) bool {
		return (i.Zone == firewall.PublicZone || i.Zone == firewall.PrivateZone) && (len(e.On) == 0 || slices.Contains(e.On, i.Name))
	})
}

// networkOf returns the one network whose packets a rule with these matches applies to,
// or "".
func networkOf(list []Match) string {
	for _, m := range list {
		if m.Field == Any && !m.Not && len(m.Of) == 1 {
			return networkOf(m.Of[0])
		}
		if m.Field == Destination && !m.Not {
			if list := m.Addrs.Networks(); len(list) == 1 && list[0].Bits() > 0 {
				return firewall.FormatPrefix(list[0])
			}
		}
	}
	return ""
}

// spans returns ports as text. Ports are combined to a range if both of its ends are
// among them, and the rule matches the range. The range may also be that of another
// rule, such as a jump, if no edge divides it.
func (r Rule) spans(ports []uint16, ranges []Span, edges []uint32) (out []string) {
	if slices.Contains(ports, 0) {
		return []string{firewall.AnyPort}
	}
	own, _ := Ruleset{[]Table{{Chains: []Chain{{Rules: []Rule{r}}}}}}.ranges()
	for i, n := range slices.Concat(own, ranges) {
		// The lowest and the highest port have no entries.
		first, last := slices.Contains(ports, uint16(n.First)), slices.Contains(ports, uint16(n.Last))
		if n.First == n.Last || !first && !last || !first && n.First > 0 || !last && n.Last < 1<<16-1 ||
			i >= len(own) && slices.ContainsFunc(edges, func(e uint32) bool { return n.First < e && e <= n.Last }) {
			continue
		}
		out = append(out, firewall.PortRange{First: uint16(max(n.First, 1)), Last: uint16(n.Last)}.String())
		ports = slices.DeleteFunc(slices.Clone(ports), func(p uint16) bool { return n.First <= uint32(p) && uint32(p) <= n.Last })
	}
	for _, p := range ports {
		out = append(out, firewall.Port(p).String())
	}
	return out
}

// ranges returns the ranges of ports that rules match, and the edges: the ports where
// a rule may begin or cease to match.
func (r Ruleset) ranges() (list []Span, edges []uint32) {
	r.each(func(_ Rule, m Match) {
		if m.Field != DestinationPort && m.Field != OriginalPort {
			return
		}
		for _, n := range m.Numbers {
			edges = append(edges, n.First, n.Last+1)
			if n.First < n.Last && !m.Not {
				list = append(list, n)
			}
		}
	})
	return list, edges
}
