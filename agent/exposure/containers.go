package exposure

import (
	"cmp"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// ContainerPorts returns the ports of containers behind virtual interfaces of this
// host to which rules translate destinations. It omits those of a cluster: the
// cluster's other hosts reach them directly.
func (s Situation) ContainerPorts() (out []firewall.ContainerPort) {
	route := s.host().Route
	for _, t := range s.Rules.Tables {
		for _, c := range t.Chains {
			for _, r := range c.Rules {
				to := r.Translate
				if to == nil || !to.Known || !to.To.IsValid() || slices.Contains([]string{"kube-proxy", "CNI"}, firewall.ProgramOf(t.Name, c.Name, commentOf(r.Text))) {
					continue
				}
				i := slices.IndexFunc(s.Interfaces, func(i firewall.Interface) bool { return i.Name == route(to.To) && i.Zone == firewall.VirtualZone })
				if i < 0 {
					continue
				}
				for _, p := range r.destinations() {
					if p.Out = s.Interfaces[i].Name; !slices.Contains(out, p) {
						out = append(out, p)
					}
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b firewall.ContainerPort) int {
		return cmp.Or(cmp.Compare(a.Out, b.Out), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Ports.First, b.Ports.First), cmp.Compare(a.Ports.Last, b.Ports.Last))
	})
	return out
}

// destinations returns the ports to which a rule translates, without the interface:
// the new port or, if the rule keeps the port, those that clients connect to.
func (r Rule) destinations() (out []firewall.ContainerPort) {
	for number, proto := range map[uint8]firewall.Proto{6: firewall.TCP, 17: firewall.UDP} {
		if slices.ContainsFunc(r.Matches, func(m Match) bool { return m.Field == Protocol && m.matches(&Packet{Proto: number}) == m.Not }) {
			continue
		}
		if r.Translate.Port != 0 {
			out = append(out, firewall.ContainerPort{Proto: proto, Ports: firewall.Port(r.Translate.Port)})
			continue
		}
		for _, m := range r.Matches {
			for _, n := range m.Numbers {
				if m.Field == DestinationPort && !m.Not && n.First > 0 {
					out = append(out, firewall.ContainerPort{Proto: proto, Ports: firewall.PortRange{First: uint16(n.First), Last: uint16(n.Last)}})
				}
			}
		}
	}
	return out
}
