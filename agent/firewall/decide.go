package firewall

import (
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Tracked is the conntrack state of one packet. The State of a rule is a list of
// these.
type Tracked string

// The conntrack states. Of packets from outside, neighbour discovery and MLD are
// untracked (nf_conntrack_icmpv6_error): no State matches them.
const (
	TrackedNew         Tracked = "NEW"
	TrackedEstablished Tracked = "ESTABLISHED"
	TrackedRelated     Tracked = "RELATED"
	TrackedInvalid     Tracked = "INVALID"
	Untracked          Tracked = "UNTRACKED"
)

// Values of DstType. In a packet, "" is unicast.
const (
	Broadcast = "BROADCAST"
	Multicast = "MULTICAST"
)

// Packet is the properties of a packet that a rule can match. The packet is in INPUT
// or, if Out is set, in FORWARD.
type Packet struct {
	In       string // interface
	Out      string // interface by which a forwarded packet leaves
	Src      netip.Addr
	Dst      netip.Addr // of the same family
	Proto    Proto      // or the name or number of a protocol that no rule uses
	SrcPort  uint16
	DstPort  uint16
	Flags    uint8 // all eight TCP flags; rules match the low six
	ICMPType uint8
	State    Tracked
	HopLimit uint8  // TTL in IPv4
	DstType  string // Broadcast, Multicast, or "" for unicast
	DNAT     bool   // Dst is not the original destination
	Dialled  uint16 // with DNAT, the original DstPort
	Reply    bool   // of a connection that this host opened
	IPsec    bool   // it came by IPsec
}

// Family returns the IP version of the packet.
func (p Packet) Family() Family {
	if p.Src.Is4() {
		return IPv4
	}
	return IPv6
}

// Verdict is the result for a packet.
type Verdict struct {
	Accepted bool
	// By is the comment of the deciding rule; empty is the policy of INPUT, or that a
	// forwarded packet is left to other programs' rules.
	By string
}

// Decide returns the verdict for a packet at a time, if no rate limit is exceeded.
func (r Ruleset) Decide(p Packet, now time.Time) Verdict {
	chains := map[string][]Rule{}
	for _, c := range r.Chains(p.Family()) {
		chains[c.Name] = c.Rules
	}
	if p.Out == "" {
		v, _ := decide(chains, InputChain, p, now)
		return v
	}
	v, decided := decide(chains, ForwardChain, p, now)
	v.Accepted = v.Accepted || !decided
	return v
}

// decide evaluates a chain; it returns false if the packet returns from it. No
// chain is entered twice: the kernel refuses loops.
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
		case Return:
			return Verdict{}, false
		default:
			if v, decided := decide(chains, rule.Target, p, now); decided {
				return v, true
			}
		}
	}
	return Verdict{}, false
}

// matches reports whether a rule matches a packet at a time.
func (r Rule) matches(p Packet, now time.Time) bool {
	ports := r.Proto.HasPorts()
	dialled := p.DstPort
	if r.Dialled && p.DNAT {
		dialled = p.Dialled
	}
	switch {
	case r.Src.IsValid() && !r.Src.Contains(p.Src),
		r.Sources != nil && !r.Sources.Contains(p.Src),
		r.Dst.IsValid() && !r.Dst.Contains(p.Dst),
		r.In != "" && !MatchInterface(r.In, p.In),
		r.Out != "" && !MatchInterface(r.Out, p.Out),
		r.Proto != "" && r.Proto != p.Proto,
		ports && !r.SrcPort.IsZero() && !r.SrcPort.Contains(p.SrcPort),
		ports && !r.DstPort.IsZero() && !r.DstPort.Contains(dialled),
		r.Flags != nil && !r.Flags.matches(p.Flags),
		r.ICMPType != nil && *r.ICMPType != p.ICMPType,
		r.State == StateNotDNAT && p.DNAT,
		r.State == StateReply && !p.Reply,
		r.State != "" && r.State != StateNotDNAT && r.State != StateReply && !slices.Contains(strings.Split(string(r.State), ","), string(p.State)),
		r.IPsec && !p.IPsec,
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
