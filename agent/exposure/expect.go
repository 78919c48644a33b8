package exposure

import (
	"net/netip"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Expectation is what should happen to new connections from a source to ports.
type Expectation struct {
	Name  string
	Allow bool         // all of them arrive; otherwise none does
	From  netip.Prefix // invalid is any source
	Proto firewall.Proto
	Ports firewall.PortRange
}

// Failures returns an entry for each place where connections surely do not meet an
// expectation, with the sources of these connections.
func (s Situation) Failures(list []Expectation) (out []Entry) {
	r := s.reporter()
	var m merger
	for _, x := range list {
		for _, f := range firewall.Families {
			from := sources(f)
			switch {
			case x.From.IsValid() && firewall.FamilyOf(x.From) != f:
				continue
			case x.From.IsValid():
				from = Of(x.From)
			}
			for _, on := range s.arrival(x.From) {
				if e, failed := r.failure(f, x, from, on); failed {
					m.add(&out, e)
				}
			}
		}
	}
	return out
}

// arrival returns the interfaces on which packets from a source arrive: the one in
// whose network it is, otherwise the public ones.
func (s Situation) arrival(from netip.Prefix) (out []string) {
	for _, i := range s.Interfaces {
		for _, a := range i.Addresses {
			if from.IsValid() && i.Zone != firewall.LoopbackZone && a.Bits() <= from.Bits() && a.Contains(from.Addr()) {
				return []string{i.Name}
			}
		}
		if i.Zone == firewall.PublicZone {
			out = append(out, i.Name)
		}
	}
	return out
}

func (r *reporter) failure(f firewall.Family, x Expectation, from Sources, on string) (Entry, bool) {
	for _, n := range r.within(x.Ports) {
		var res Result
		for _, v := range r.views[f] {
			if v.on == on {
				one, _ := r.trace(f, x.Proto, n, v)
				res = res.and(one)
			}
		}
		sure, _ := res.Open()
		e := Entry{Verdict: Closed, Family: f.String(), Service: x.Name, Via: r.translating(res)}
		wrong := from.Without(res.possible())
		if e.By = r.decisionOfDrop(res, wrong); !x.Allow {
			e.Verdict, wrong = Open, from.Both(sure)
			e.By = r.decision(r.accepting(res, wrong, f), wrong)
		}
		if len(wrong) > 0 && len(res.Ends)+len(res.Dropped) > 0 {
			return e.of(wrong, sources(f)).at(Port{Proto: x.Proto, Number: n}, on), true
		}
	}
	return Entry{}, false
}
