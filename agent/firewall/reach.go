package firewall

import (
	"cmp"
	"net/netip"
	"slices"
	"time"
)

// Reachable returns a function that reports whether r accepts a new connection to a
// port at a time. The connection may arrive on any of the interfaces except loopback
// and trusted ones, in any of the families. Its source is arbitrary or one that a
// rule names. Rate limits count as not exceeded.
func (r Ruleset) Reachable(interfaces []Interface, families []Family, now time.Time) func(Proto, uint16) bool {
	known := map[string]bool{} // by the key of the rules for a port
	return func(proto Proto, port uint16) bool {
		return slices.ContainsFunc(families, func(f Family) bool {
			probe := newProbe(f, proto, port)
			rules, key := r.about(probe, now)
			reachable, ok := known[key]
			if !ok {
				reachable = rules.accepts(probe, interfaces, now)
				known[key] = reachable
			}
			return reachable
		})
	}
}

// newProbe returns the first packet of a connection to a port, from an arbitrary source.
func newProbe(f Family, proto Proto, port uint16) Packet {
	p := Packet{Src: netip.MustParseAddr("192.0.2.1"), Dst: netip.MustParseAddr("192.0.2.2"),
		Proto: proto, SrcPort: 49152, DstPort: port, State: TrackedNew, HopLimit: 64}
	if f == IPv6 {
		p.Src, p.Dst = netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("2001:db8::2")
	}
	if proto == TCP {
		p.Flags = uint8(SYN)
	}
	return p
}

// about returns the rules that may match packets like p from any peer and interface.
// Two ports with the same key have the same rules.
func (r Ruleset) about(p Packet, now time.Time) (rules Ruleset, key string) {
	var chains []Chain
	id := []byte(p.Proto)
	var visit func(name string)
	visit = func(name string) {
		at := slices.IndexFunc(r.Chains(p.Family()), func(c Chain) bool { return c.Name == name })
		if at < 0 || slices.ContainsFunc(chains, func(c Chain) bool { return c.Name == name }) {
			return
		}
		n := len(chains)
		chains = append(chains, Chain{Name: name})
		list := r.Chains(p.Family())[at].Rules
		for i := range list {
			if list[i].isBlock() {
				continue // it closes no port
			}
			if ports := list[i].DstPort; !ports.IsZero() && !ports.Contains(p.DstPort) {
				continue // the most frequent case
			}
			like := list[i]
			like.Src, like.Dst, like.In, like.SrcPort = netip.Prefix{}, netip.Prefix{}, "", PortRange{}
			if like.matches(p, now) {
				chains[n].Rules = append(chains[n].Rules, list[i])
				id = append(id, byte(p.Family()), byte(at), byte(at>>8), byte(i), byte(i>>8))
				visit(list[i].Target)
			}
		}
	}
	visit(InputChain)
	if p.Family() == IPv4 {
		return Ruleset{IPv4: chains}, string(id)
	}
	return Ruleset{IPv6: chains}, string(id)
}

// accepts reports whether Decide accepts p on an interface, from its own source or
// from one that a rule names.
func (r Ruleset) accepts(p Packet, interfaces []Interface, now time.Time) bool {
	packets := []Packet{p}
	for _, c := range r.Chains(p.Family()) {
		for _, rule := range c.Rules {
			named := p
			if rule.Src.IsValid() {
				named.Src = rule.Src.Addr()
			}
			if rule.Dst.IsValid() {
				named.Dst = rule.Dst.Addr()
			}
			if named.SrcPort = cmp.Or(rule.SrcPort.First, p.SrcPort); named != p {
				packets = append(packets, named)
			}
		}
	}
	for _, p := range packets {
		for _, i := range interfaces {
			if p.In = i.Name; i.Zone != LoopbackZone && i.Zone != TrustedZone && r.Decide(p, now).Accepted {
				return true
			}
		}
	}
	return false
}
