package firewall

import (
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Tracked is what conntrack makes of one packet. The State of a rule is a list
// of these.
type Tracked string

// What a packet can be to conntrack. Untracked are, of what comes from outside,
// neighbour discovery and MLD (nf_conntrack_icmpv6_error): no State has them.
const (
	TrackedNew         Tracked = "NEW"
	TrackedEstablished Tracked = "ESTABLISHED"
	TrackedRelated     Tracked = "RELATED"
	TrackedInvalid     Tracked = "INVALID"
	Untracked          Tracked = "UNTRACKED"
)

// DstTypes of rules, and of packets, where "" is unicast.
const (
	Broadcast = "BROADCAST"
	Multicast = "MULTICAST"
)

// Packet is what of a packet that comes to INPUT a rule can ask for.
type Packet struct {
	In       string // interface
	Src      netip.Addr
	Dst      netip.Addr // of the same family
	Proto    Proto      // or the name, or number, of one that no rule knows
	SrcPort  uint16
	DstPort  uint16
	Flags    uint8 // all eight of TCP: rules see the low six
	ICMPType uint8
	State    Tracked
	HopLimit uint8  // TTL in IPv4
	DstType  string // Broadcast, Multicast, or "" for unicast
}

// Family is the IP version of the packet.
func (p Packet) Family() Family {
	if p.Src.Is4() {
		return IPv4
	}
	return IPv6
}

// Verdict is what becomes of a packet.
type Verdict struct {
	Accepted bool
	// By is the comment of the rule that decided; empty is the policy of INPUT.
	By string
}

// Decide tells what becomes of a packet at a time, where no limit is reached.
func (r Ruleset) Decide(p Packet, now time.Time) Verdict {
	chains := map[string][]Rule{}
	for _, c := range r.Chains(p.Family()) {
		chains[c.Name] = c.Rules
	}
	v, _ := decide(chains, InputChain, p, now)
	return v
}

// decide goes through a chain; false is that the packet returned from it. No
// chain is entered twice: the kernel refuses a loop.
func decide(chains map[string][]Rule, name string, p Packet, now time.Time) (Verdict, bool) {
	rules := chains[name]
	delete(chains, name)
	defer func() { chains[name] = rules }()
	for _, rule := range rules {
		if !rule.matches(p, now) {
			continue
		}
		switch rule.Target {
		case Accept, Drop:
			return Verdict{rule.Target == Accept, rule.Comment}, true
		case Log:
		default:
			if v, decided := decide(chains, rule.Target, p, now); decided {
				return v, true
			}
		}
	}
	return Verdict{}, false
}

// matches tells whether a rule is about a packet at a time.
func (r Rule) matches(p Packet, now time.Time) bool {
	ports := r.Proto == TCP || r.Proto == UDP
	switch {
	case r.Src.IsValid() && !r.Src.Contains(p.Src),
		r.Dst.IsValid() && !r.Dst.Contains(p.Dst),
		r.In != "" && !MatchInterface(r.In, p.In),
		r.Proto != "" && r.Proto != p.Proto,
		ports && !r.SrcPort.IsZero() && !r.SrcPort.Contains(p.SrcPort),
		ports && !r.DstPort.IsZero() && !r.DstPort.Contains(p.DstPort),
		r.Flags != nil && !r.Flags.matches(p.Flags),
		r.ICMPType != nil && *r.ICMPType != p.ICMPType,
		r.State != "" && !slices.Contains(strings.Split(string(r.State), ","), string(p.State)),
		r.DstType != "" && r.DstType != p.DstType,
		r.HopLimit != 0 && r.HopLimit != p.HopLimit,
		// Both ends are included (xt_time.c).
		!r.Since.IsZero() && now.Unix() < r.Since.Unix(),
		over(r.Until, now):
		return false
	}
	return true
}

func (f FlagMatch) matches(flags uint8) bool {
	return (TCPFlags(flags)&f.Mask == f.Set) != f.Invert
}
