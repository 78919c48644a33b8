package meaning

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/netsim"
)

// withinLimits is the number of counted packets per source: fewer than any generated limit
// allows at once.
const withinLimits = 4

// Interfaces returns the interfaces on which packets for a generated firewall arrive: the
// host's own, some that settings name, and one that no setting names.
func Interfaces(d firewall.Desired) []firewall.Interface {
	var list []firewall.Interface
	for _, i := range d.Interfaces {
		if i.Zone != firewall.LoopbackZone {
			list = append(list, firewall.Interface{Name: i.Name, Addresses: i.Addresses})
		}
	}
	for _, name := range []string{"eth7", "tun0", "br9", "other0"} {
		list = append(list, firewall.Interface{Name: name})
	}
	for i := range list {
		if !slices.ContainsFunc(list[i].Addresses, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
			address := netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 19, 255, byte(i + 1)}), 32)
			list[i].Addresses = append([]netip.Prefix{address}, list[i].Addresses...)
		}
	}
	return list
}

// Packets returns packets of all kinds that a generated firewall with the rules r may
// distinguish: count random ones, and each combination of TCP flags to some ports. No limit
// of the rules is reached.
func Packets(number uint64, d firewall.Desired, r firewall.Ruleset, now time.Time, count int) []firewall.Packet {
	g := packeter{Rand: rand.New(rand.NewPCG(11, number)), interfaces: Interfaces(d), ports: portsOf(d)}
	g.sources = sourcesOf(d)
	var all []firewall.Packet
	for range count {
		all = append(all, g.packet(firewall.Families[g.IntN(2)]))
	}
	for _, f := range firewall.Families {
		for _, port := range []uint16{22, 80, 9} {
			for flags := range 256 {
				p := g.base(f)
				p.Proto, p.DstPort, p.Flags = firewall.TCP, port, uint8(flags)
				p.State = netsim.Unprovoked(p)
				all = append(all, p)
			}
		}
	}
	limited := map[string]bool{}
	for _, s := range d.Services() {
		limited["basicfw-"+s.Name] = !s.Limit.IsZero()
	}
	counted := map[netip.Prefix]int{}
	return slices.DeleteFunc(all, func(p firewall.Packet) bool {
		by := r.Decide(p, now).By
		switch {
		case by == "basicfw-ping", by == "basicfw-ssh-limit", by == "basicfw-unlock", limited[by]:
			source := Source(p.Src)
			counted[source]++
			return counted[source] > withinLimits
		}
		return false
	})
}

// Source returns what a limit counts as one source.
func Source(a netip.Addr) netip.Prefix {
	bits := 32
	if a.Is6() {
		bits = 64
	}
	return netip.PrefixFrom(a, bits).Masked()
}

// portsOf returns ports that the settings name, their neighbours, and others.
func portsOf(d firewall.Desired) []uint16 {
	list := []uint16{9, 23, 53, 67, 68, 137, 546, 547, 3306, 5353, 65535}
	for _, s := range d.Services() {
		list = append(list, s.Ports.First-1, s.Ports.First, s.Ports.First, s.Ports.First+(s.Ports.Last-s.Ports.First)/2, s.Ports.Last, s.Ports.Last+1)
	}
	for _, p := range d.SSH.Ports {
		list = append(list, p-1, p, p, p, p+1)
	}
	return slices.DeleteFunc(list, func(p uint16) bool { return p == 0 })
}

// sourcesOf returns addresses in networks that the settings name, their neighbours, and
// others.
func sourcesOf(d firewall.Desired) map[firewall.Family][]netip.Addr {
	var networks []netip.Prefix
	for _, s := range d.Services() {
		networks = append(networks, s.From...)
	}
	networks = append(networks, d.SSH.Allow...)
	for _, t := range d.SSH.Timed {
		networks = append(networks, t.From)
	}
	if d.Unlock != nil {
		networks = append(networks, d.Unlock.From...)
	}
	out := map[firewall.Family][]netip.Addr{}
	for _, p := range networks {
		a := p.Addr()
		for range 3 {
			out[firewall.FamilyOf(p)] = append(out[firewall.FamilyOf(p)], a)
			a = a.Next()
		}
		out[firewall.FamilyOf(p)] = append(out[firewall.FamilyOf(p)], p.Addr().Prev())
	}
	for i := range byte(20) {
		out[firewall.IPv4] = append(out[firewall.IPv4], netip.AddrFrom4([4]byte{45 + i, 1, 2, i}))
		out[firewall.IPv6] = append(out[firewall.IPv6], netip.AddrFrom16([16]byte{0x2a, 1, i, 15: i}))
	}
	out[firewall.IPv4] = append(out[firewall.IPv4], netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("203.0.113.77"), netip.MustParseAddr("127.0.0.1"))
	out[firewall.IPv6] = append(out[firewall.IPv6], netip.MustParseAddr("fe80::99"), netip.MustParseAddr("2001:db8:5::77"), netip.IPv6Loopback())
	for f, list := range out {
		out[f] = slices.DeleteFunc(list, func(a netip.Addr) bool { return !a.IsValid() || a.IsUnspecified() || a.IsMulticast() })
	}
	return out
}

// packeter generates random packets.
type packeter struct {
	*rand.Rand
	interfaces []firewall.Interface
	ports      []uint16
	sources    map[firewall.Family][]netip.Addr
	begun      int // connections of the host's own
}

// base returns a packet on a random interface to an address of the host.
func (g *packeter) base(f firewall.Family) firewall.Packet {
	i := g.interfaces[g.IntN(len(g.interfaces))]
	p := firewall.Packet{In: i.Name, Src: g.sources[f][g.IntN(len(g.sources[f]))], Dst: netsim.LinkLocal, HopLimit: 64}
	for _, a := range i.Addresses {
		if firewall.FamilyOf(a) == f {
			p.Dst = a.Addr()
		}
	}
	return p
}

func (g *packeter) packet(f firewall.Family) firewall.Packet {
	p := g.base(f)
	p.DstPort = g.ports[g.IntN(len(g.ports))]
	switch g.IntN(22) {
	case 0, 1, 2, 3, 4, 5, 6:
		p.Proto, p.Flags = firewall.TCP, uint8(firewall.SYN)
	case 7, 8:
		p.Proto, p.Flags = firewall.TCP, uint8(g.IntN(256))
	case 9, 10, 11:
		p.Proto = firewall.UDP
		if g.IntN(3) == 0 {
			p.SrcPort = []uint16{67, 68, 53, 547}[g.IntN(4)]
		}
	case 12:
		p.Proto = firewall.UDP
		g.toMany(&p)
	case 13, 14, 15:
		g.icmp(&p)
	case 16:
		p.Proto = netsim.Others[g.IntN(len(netsim.Others))]
	case 17:
		g.reply(&p)
	case 18: // with a wrong checksum
		p.Proto, p.Flags, p.State = firewall.TCP, uint8(firewall.SYN), firewall.TrackedInvalid
		if g.IntN(2) == 0 {
			p.Proto, p.Flags = firewall.UDP, 0
		}
	case 19: // to itself
		p.In, p.Src, p.Proto, p.Dst = "lo", netip.MustParseAddr("127.0.0.1"), firewall.UDP, netip.MustParseAddr("127.0.0.1")
		if f == firewall.IPv6 {
			p.Src, p.Dst = netip.IPv6Loopback(), netip.IPv6Loopback()
		}
	case 20: // from outside to what listens on loopback; the kernel drops ::1 itself
		p.Proto, p.Flags = firewall.TCP, uint8(firewall.SYN)
		if p.Src.Is4() {
			p.Dst = netip.AddrFrom4([4]byte{127, 0, 0, byte(1 + g.IntN(60))})
		}
		if g.IntN(4) == 0 { // ICMP errors are accepted later
			p.Proto, p.Flags, p.ICMPType, p.State = icmpProto(p), 0, 3, firewall.TrackedInvalid
		}
	case 21:
		p.Proto = firewall.UDP
		p.DstPort = 546
		if p.Src.Is4() {
			p.Proto = firewall.IGMP
			if g.IntN(3) > 0 {
				p.Dst, p.DstType = netip.AddrFrom4([4]byte{224, 0, 0, 1}), firewall.Multicast
			}
		} else if g.IntN(2) == 0 {
			p.Dst = netsim.LinkLocal
		}
	}
	if !p.Proto.HasPorts() {
		p.DstPort = 0
	}
	if p.State == "" {
		p.State = netsim.Unprovoked(p)
	}
	return p
}

func icmpProto(p firewall.Packet) firewall.Proto {
	return firewall.ByFamily(p.Family(), firewall.ICMP, firewall.ICMPv6)
}

// toMany makes it a broadcast or a multicast.
func (g *packeter) toMany(p *firewall.Packet) {
	switch {
	case p.Src.Is6():
		p.Dst, p.DstType = netip.MustParseAddr("ff02::1"), firewall.Multicast
	case g.IntN(2) == 0:
		p.Dst, p.DstType = netip.MustParseAddr("224.0.0.1"), firewall.Multicast
	default:
		p.Dst, p.DstType = netip.MustParseAddr("255.255.255.255"), firewall.Broadcast
	}
}

func (g *packeter) icmp(p *firewall.Packet) {
	p.Proto = firewall.ICMP
	types := []uint8{0, 3, 3, 4, 5, 8, 8, 8, 11, 12, 13, 17}
	problems := []uint8{3, 4, 5, 11, 12}
	if p.Src.Is6() {
		p.Proto = firewall.ICMPv6
		types = []uint8{1, 2, 2, 3, 4, 128, 128, 128, 129, 130, 131, 132, 133, 134, 135, 136, 137, 139, 143}
		problems = []uint8{1, 2, 3, 4}
		p.HopLimit = []uint8{255, 255, 64, 1}[g.IntN(4)]
		if g.IntN(2) == 0 {
			p.Src = netip.MustParseAddr("fe80::99")
		}
	}
	p.ICMPType = types[g.IntN(len(types))]
	if slices.Contains(problems, p.ICMPType) && g.IntN(2) == 0 {
		p.State = firewall.TrackedRelated
	}
}

// reply makes it a reply to a connection of the host.
func (g *packeter) reply(p *firewall.Packet) {
	g.begun++
	p.State = firewall.TrackedEstablished
	if p.Src.IsLoopback() || p.Src.IsLinkLocalUnicast() {
		p.Src = g.sources[firewall.IPv4][0]
		p.Dst = g.interfaces[0].Addresses[0].Addr()
		for _, i := range g.interfaces {
			if i.Name == p.In {
				p.Dst = i.Addresses[slices.IndexFunc(i.Addresses, func(a netip.Prefix) bool { return a.Addr().Is4() })].Addr()
			}
		}
	}
	p.DstPort = uint16(30000 + g.begun)
	switch g.IntN(3) {
	case 0:
		p.Proto, p.Flags = firewall.TCP, uint8(firewall.SYN|firewall.ACK)
	case 1:
		p.Proto = firewall.UDP
	default:
		p.Proto = firewall.ICMP
		if p.Src.Is6() {
			p.Proto, p.ICMPType = firewall.ICMPv6, 129
		}
	}
}
