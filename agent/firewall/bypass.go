package firewall

import (
	"net/netip"
	"strconv"
	"strings"
)

// AnyPort stands in a Bypass for every port, or every protocol.
const AnyPort = "any"

// Bypass is a port that is forwarded past INPUT, to a container for example.
type Bypass struct {
	Family string `json:"family"`
	Proto  string `json:"proto"` // "tcp", or "any"
	Port   string `json:"port"`  // "80", "8000-8010", or "any"
	// On is the address of this host that is forwarded, or a network; empty
	// where all are.
	On string `json:"on"`
	To string `json:"to"` // as a rule says it: "172.17.0.2:80", "[fd00::2]:8000-8010"
	By string `json:"by"` // the table and the chain that do it
	// Program is whose rule it is, as far as names tell; else empty.
	Program string `json:"program"`
}

// Span gives the ports. A Bypass of any port has all.
func (b Bypass) Span() PortRange {
	first, last, isRange := strings.Cut(b.Port, "-")
	if !isRange {
		last = first
	}
	f, errF := strconv.ParseUint(first, 10, 16)
	l, errL := strconv.ParseUint(last, 10, 16)
	if errF != nil || errL != nil {
		return PortRange{1, 65535}
	}
	return PortRange{uint16(f), uint16(l)}
}

// Covers tells whether a port of this host is forwarded.
func (b Bypass) Covers(proto Proto, port uint16) bool {
	return (b.Proto == AnyPort || b.Proto == string(proto)) && b.Span().Contains(port)
}

// Target is the address that it is forwarded to; invalid where that is not one.
func (b Bypass) Target() netip.Addr {
	host := b.To
	switch {
	case strings.HasPrefix(host, "["):
		host, _, _ = strings.Cut(host[1:], "]")
	case strings.Count(host, ":") == 1:
		host, _, _ = strings.Cut(host, ":")
	}
	to, _ := netip.ParseAddr(host)
	return to
}

// Destination is the address of this host that is forwarded, or the network;
// false where all are.
func (b Bypass) Destination() (netip.Prefix, bool) {
	if a, err := netip.ParseAddr(b.On); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), true
	}
	p, err := netip.ParsePrefix(b.On)
	return p, err == nil
}

// Passage is what a packet has to be like to come along the rules that lead to
// a place. The zero value is any packet.
type Passage struct {
	Proto string       // empty for any
	Ports []PortRange  // of the destination; nil for any
	On    netip.Prefix // the destination; invalid for any
}

// Narrow is the passage of packets that fit both. It gives false where there
// are none.
func (p Passage) Narrow(q Passage) (Passage, bool) {
	switch {
	case p.Proto == "":
		p.Proto = q.Proto
	case q.Proto != "" && q.Proto != p.Proto:
		return Passage{}, false
	}
	switch {
	case p.Ports == nil:
		p.Ports = q.Ports
	case q.Ports != nil:
		var both []PortRange
		for _, a := range p.Ports {
			for _, b := range q.Ports {
				if a.Overlaps(b) {
					both = append(both, PortRange{max(a.First, b.First), min(a.Last, b.Last)})
				}
			}
		}
		if both == nil {
			return Passage{}, false
		}
		p.Ports = both
	}
	switch {
	case !p.On.IsValid():
		p.On = q.On
	case q.On.IsValid() && !p.On.Overlaps(q.On):
		return Passage{}, false
	case q.On.IsValid() && q.On.Bits() > p.On.Bits():
		p.On = q.On
	}
	// Nothing from outside has a destination of loopback (it is dropped as
	// martian, and by us).
	return p, !p.On.Addr().IsLoopback()
}

// Bypasses are the ports of packets that come along p and are then sent to
// another address, one for each range. by are the names of the table, the
// chains and the comments that led there, the deciding one last.
func (p Passage) Bypasses(family Family, to, by string, names ...string) []Bypass {
	b := Bypass{Family: family.String(), Proto: p.Proto, Port: AnyPort, To: to, By: by, Program: programOf(names)}
	switch p.Proto {
	case "":
		b.Proto = AnyPort
	case string(ICMP), string(ICMPv6): // no port of this host's is reached by it
		return nil
	}
	if p.On.IsValid() && p.On.Bits() > 0 {
		b.On = p.On.String()
		if p.On.IsSingleIP() {
			b.On = p.On.Addr().String()
		}
	}
	if p.Ports == nil {
		return []Bypass{b}
	}
	var out []Bypass
	for _, r := range p.Ports {
		b.Port = r.String()
		out = append(out, b)
	}
	return out
}

// programs are those that write rules of DNAT, by how the names of their
// tables and chains begin.
var programs = []struct{ prefix, name string }{
	{"DOCKER", "Docker"}, {"docker-bridges", "Docker"}, // the iptables and the nftables backend
	{"NETAVARK", "podman"}, {"netavark", "podman"},
	{"CNI-", "CNI"},
	{"KUBE-", "kube-proxy"}, {"kube-proxy", "kube-proxy"},
	{"LIBVIRT_", "libvirt"}, {"libvirt_", "libvirt"},
	{"lxd", "LXD"}, {"generated for LXD", "LXD"}, // a table, and the comments beside iptables
	{"incus", "Incus"}, {"generated for Incus", "Incus"},
}

func programOf(names []string) string {
	for i := len(names) - 1; i >= 0; i-- {
		for _, p := range programs {
			if strings.HasPrefix(names[i], p.prefix) {
				return p.name
			}
		}
	}
	return ""
}

// ProtoName is a protocol's name by its number, where it has ports or is one
// of ours; else the number.
func ProtoName(number uint8) string {
	switch number {
	case 1:
		return string(ICMP)
	case 6:
		return string(TCP)
	case 17:
		return string(UDP)
	case 58:
		return string(ICMPv6)
	case 132:
		return "sctp"
	}
	return strconv.Itoa(int(number))
}
