package selftest

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/twin"
)

// Kinds of cases.
const (
	openPorts   = "open ports"
	closedPorts = "closed ports"
	ssh         = "SSH"
	scans       = "scans"
	spoofed     = "spoofed loopback"
	pings       = "ping"
	icmpErrors  = "ICMP errors"
	otherICMP   = "other ICMP"
	replies     = "replies"
	neighbours  = "neighbours"
	leases      = "DHCP"
	everybody   = "broadcast, multicast"
	others      = "other protocols"
	loopback    = "loopback"
)

// probe is a packet, and what is wanted of it.
type probe struct {
	kind, what string
	packet     firewall.Packet
	passes     bool
}

// Ports that are tried though nothing may be said of them: those that scanners
// try first, and both ends.
var (
	tcpSamples = []uint16{1, 21, 23, 111, 135, 139, 445, 1433, 2375, 3306, 3389, 5432, 5900, 6379, 8080, 9200, 11211, 27017, 65535}
	udpSamples = []uint16{1, 19, 53, 69, 111, 123, 137, 161, 389, 1900, 5353, 11211, 51820, 65535}
)

// odd are combinations of TCP's flags that begin no connection.
var odd = []struct {
	name  string
	flags firewall.TCPFlags
}{
	{"null", 0},
	{"XMAS", firewall.AllFlags},
	{"FIN,PSH,URG", firewall.FIN | firewall.PSH | firewall.URG},
	{"FIN", firewall.FIN},
	{"FIN,ACK", firewall.FIN | firewall.ACK},
	{"ACK", firewall.ACK},
	{"PSH,ACK", firewall.PSH | firewall.ACK},
	{"SYN,ACK", firewall.SYN | firewall.ACK},
	{"RST", firewall.RST},
	{"RST,ACK", firewall.RST | firewall.ACK},
	{"SYN,FIN", firewall.SYN | firewall.FIN},
	{"SYN,RST", firewall.SYN | firewall.RST},
	{"PSH", firewall.PSH},
	{"URG", firewall.URG},
}

const (
	syn = uint8(firewall.SYN)
	ecn = 0xc0 // ECE and CWR, which ask for ECN (RFC 3168, 6.1.1)
	// sampled is how many of a long list of networks are tried, and how many
	// addresses are looked through for one that is in none.
	sampled, strangersTried = 16, 5000
)

// cases says what is wanted of packets of all kinds, as a person would, from
// what is desired and not from the rules.
func cases(d firewall.Desired, interfaces []firewall.Interface, families []firewall.Family, now time.Time) []probe {
	c := &caser{d: d, now: now, offered: d.Services(), counted: map[netip.Prefix]bool{}}
	c.logins = slices.Clone(d.SSH.Allow)
	for _, t := range d.SSH.Timed {
		c.logins = append(c.logins, t.From)
	}
	if u := d.Unlock; u != nil {
		c.logins = append(c.logins, u.From...)
	}
	c.known = slices.Clone(c.logins)
	for _, s := range c.offered {
		c.known = append(c.known, s.From...)
	}
	for _, i := range interfaces {
		for _, p := range i.Addresses {
			c.known = append(c.known, netip.PrefixFrom(p.Addr(), p.Addr().BitLen()))
		}
	}
	for _, f := range families {
		for _, i := range interfaces {
			c.family, c.on = f, i
			c.to = addressOf(i, f)
			c.services()
			c.samples()
			c.ssh()
			c.scans()
			c.icmp()
			c.replies()
			c.leases()
			c.rest()
		}
		c.family, c.on = f, firewall.Interface{Name: "lo", Zone: firewall.LoopbackZone}
		if c.to = netip.IPv6Loopback(); f == firewall.IPv4 {
			c.to = netip.MustParseAddr("127.0.0.1")
		}
		for _, p := range []firewall.Packet{{Proto: firewall.TCP, DstPort: 1, Flags: syn}, {Proto: firewall.UDP, DstPort: 1}} {
			p.Src = c.to
			c.add(loopback, fmt.Sprintf("1/%s", p.Proto), p, true)
		}
	}
	return c.list
}

// caser collects cases.
type caser struct {
	d       firewall.Desired
	now     time.Time
	offered []firewall.Service
	// logins are the networks of which it is said that they may log in, and
	// known these, the services' own, and this host.
	logins, known []netip.Prefix

	family firewall.Family
	on     firewall.Interface
	to     netip.Addr

	list []probe
	seen int // strangers
	// counted are sources that a limit of SSH has counted.
	counted map[netip.Prefix]bool
}

// addressOf is an address of an interface that outsiders may send to.
func addressOf(i firewall.Interface, f firewall.Family) netip.Addr {
	for _, p := range i.Addresses {
		if firewall.FamilyOf(p) == f && !p.Addr().IsLinkLocalUnicast() {
			return p.Addr()
		}
	}
	for _, p := range i.Addresses {
		if firewall.FamilyOf(p) == f {
			return p.Addr()
		}
	}
	return twin.LinkLocal
}

// add adds a case; where everything is let in, that is wanted of it too.
func (c *caser) add(kind, what string, p firewall.Packet, passes bool) {
	p.In = c.on.Name
	if !p.Dst.IsValid() {
		p.Dst = c.to
	}
	if p.HopLimit == 0 {
		p.HopLimit = 64
	}
	if p.State == "" {
		p.State = twin.Unprovoked(p)
	}
	c.list = append(c.list, probe{kind, what, p, passes || c.everything()})
}

// begin adds a case of a packet that begins something with a port.
func (c *caser) begin(what string, proto firewall.Proto, port uint16, from netip.Addr) {
	if port == 0 || !usable(from) {
		return
	}
	p := firewall.Packet{Src: from, Proto: proto, DstPort: port}
	if proto == firewall.TCP {
		p.Flags = syn
	}
	passes := c.admits(proto, port, from)
	kind := closedPorts
	switch {
	case proto == firewall.TCP && slices.Contains(c.d.SSH.Ports, port):
		kind = ssh
		if !c.counts(from) {
			return
		}
	case passes:
		kind = openPorts
	}
	name := fmt.Sprintf("%d/%s", port, proto)
	if what != "" {
		name += " (" + what + ")"
	}
	c.add(kind, name, p, passes)
}

// counts tells whether an SSH session from an address is within every limit that
// there may be: it is one of the owner's, or the first of its source.
func (c *caser) counts(from netip.Addr) bool {
	u := c.d.Unlock
	limited := c.d.SSH.Mode == firewall.SSHLimited || c.d.SSH.Probation != nil || u != nil && len(u.From) == 0
	if !limited || contains(c.d.SSH.Allow, from) {
		return true
	}
	bits := 32
	if from.Is6() {
		bits = 64
	}
	source := netip.PrefixFrom(from, bits).Masked()
	again := c.counted[source]
	c.counted[source] = true
	return !again
}

// everything tells whether all is let in on the interface.
func (c *caser) everything() bool {
	u := c.d.Unlock
	return u != nil && u.All && !ended(u.Until, c.now) || c.on.Name == "lo" ||
		slices.ContainsFunc(c.d.Trusted, func(pattern string) bool { return firewall.MatchInterface(pattern, c.on.Name) })
}

// admits tells whether somebody may begin something with a port.
func (c *caser) admits(proto firewall.Proto, port uint16, from netip.Addr) bool {
	dhcp := uint16(67)
	if c.family == firewall.IPv6 {
		dhcp = 547
	}
	switch {
	case c.everything():
		return true
	case c.on.ServesGuests && (port == 53 || proto == firewall.UDP && port == dhcp):
		return true
	case proto == firewall.UDP && port == 546 && from.Is6() && from.IsLinkLocalUnicast():
		return true
	case proto == firewall.TCP && slices.Contains(c.d.SSH.Ports, port):
		return c.mayLogIn(from)
	}
	return slices.ContainsFunc(c.offered, func(s firewall.Service) bool {
		return s.Proto == proto && s.Ports.Contains(port) && !ended(s.Until, c.now) && c.isOn(s.On) &&
			(len(s.From) == 0 || contains(s.From, from))
	})
}

// mayLogIn tells whether somebody may begin an SSH session.
func (c *caser) mayLogIn(from netip.Addr) bool {
	s := c.d.SSH
	if s.Mode == firewall.SSHLimited || contains(s.Allow, from) {
		return true
	}
	if p := s.Probation; p != nil && !p.NoRule && c.now.Unix() >= p.Until.Unix() {
		return true
	}
	if u := c.d.Unlock; u != nil && !ended(u.Until, c.now) && (len(u.From) == 0 || contains(u.From, from)) {
		return true
	}
	return slices.ContainsFunc(s.Timed, func(t firewall.TimedSource) bool { return t.From.Contains(from) && !ended(t.Until, c.now) })
}

// isOn tells whether "on WHERE" means the interface.
func (c *caser) isOn(where string) bool {
	switch zone := firewall.Zone(where); zone {
	case "", firewall.AnyZone:
		return true
	case firewall.PublicZone, firewall.PrivateZone, firewall.VirtualZone:
		return c.on.Zone == zone
	}
	return firewall.MatchInterface(where, c.on.Name)
}

// ended tells whether what lasts until a second, that one included, is over.
func ended(until, now time.Time) bool { return !until.IsZero() && now.Unix() > until.Unix() }

func contains(list []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// services is each service's ports and its sources, and what is next to them.
func (c *caser) services() {
	for _, s := range c.offered {
		other := firewall.UDP
		if s.Proto == firewall.UDP {
			other = firewall.TCP
		}
		middle := s.Ports.First + (s.Ports.Last-s.Ports.First)/2
		sources := append(c.edges(s.From), c.stranger())
		for _, from := range sources {
			c.begin(s.Name, s.Proto, s.Ports.First, from)
		}
		inside := sources[0] // the first network's own, or a stranger
		if s.Ports.First != s.Ports.Last {
			c.begin(s.Name, s.Proto, s.Ports.Last, inside)
			c.begin(s.Name, s.Proto, middle, inside)
		}
		c.begin("before "+s.Name, s.Proto, s.Ports.First-1, inside)
		c.begin("behind "+s.Name, s.Proto, s.Ports.Last+1, inside) // 0 is none
		c.begin("", other, s.Ports.First, inside)
		if s.Proto == firewall.TCP && !slices.Contains(c.d.SSH.Ports, s.Ports.First) {
			p := firewall.Packet{Src: inside, Proto: firewall.TCP, DstPort: s.Ports.First, Flags: syn | ecn}
			if c.admits(s.Proto, s.Ports.First, inside) {
				c.add(openPorts, fmt.Sprintf("%d/tcp with ECN (%s)", s.Ports.First, s.Name), p, true)
			}
		}
	}
}

// samples is ports that nothing is said of.
func (c *caser) samples() {
	for _, port := range tcpSamples {
		c.begin("", firewall.TCP, port, c.stranger())
	}
	for _, port := range udpSamples {
		c.begin("", firewall.UDP, port, c.stranger())
	}
}

// ssh is who may log in, and who is next to them. Where there is a limit for each
// source, each case has one of its own.
func (c *caser) ssh() {
	edges := c.edges(c.logins)
	for _, port := range c.d.SSH.Ports {
		for _, from := range edges {
			c.begin("", firewall.TCP, port, from)
		}
		c.begin("", firewall.TCP, port, c.stranger())
		inside := c.stranger()
		if len(edges) > 0 {
			inside = edges[0]
		}
		c.begin("before SSH", firewall.TCP, port-1, inside)
		c.begin("behind SSH", firewall.TCP, port+1, inside)
		c.begin("", firewall.UDP, port, inside)
	}
}

// scans is TCP that begins no connection, to a port that is open, to SSH and to
// one that is closed.
func (c *caser) scans() {
	targets := map[uint16]bool{}
	for _, port := range c.d.SSH.Ports {
		targets[port] = true
		break
	}
	from := c.stranger()
	for _, s := range c.offered {
		if s.Proto == firewall.TCP && c.admits(firewall.TCP, s.Ports.First, from) {
			targets[s.Ports.First] = true
			break
		}
	}
	for _, port := range tcpSamples {
		if !c.admits(firewall.TCP, port, from) {
			targets[port] = true
			break
		}
	}
	var ports []uint16
	for port := range targets {
		ports = append(ports, port)
	}
	slices.Sort(ports)
	for _, port := range ports {
		who := from
		if edges := c.edges(c.d.SSH.Allow); slices.Contains(c.d.SSH.Ports, port) && len(edges) > 0 {
			who = edges[0] // the owner's, so that nothing but the flags tells
		}
		for _, x := range odd {
			c.add(scans, fmt.Sprintf("%s to %d/tcp", x.name, port), firewall.Packet{Src: who, Proto: firewall.TCP, DstPort: port, Flags: uint8(x.flags)}, false)
		}
		p := firewall.Packet{Src: netip.MustParseAddr("127.0.0.1"), Proto: firewall.TCP, DstPort: port, Flags: syn}
		if c.family == firewall.IPv6 {
			p.Src = netip.IPv6Loopback()
		}
		if c.family == firewall.IPv4 || !c.everything() { // the kernel drops ::1 itself
			c.add(spoofed, fmt.Sprintf("%d/tcp", port), p, false)
		}
	}
}

func (c *caser) icmp() {
	ping := c.d.Profile.Ping
	if c.family == firewall.IPv4 {
		c.add(pings, "echo request", firewall.Packet{Src: c.stranger(), Proto: firewall.ICMP, ICMPType: 8}, ping)
		for _, x := range []struct {
			name string
			kind uint8
		}{{"echo reply, unasked", 0}, {"redirect", 5}, {"timestamp request", 13}, {"address mask request", 17}} {
			c.add(otherICMP, x.name, firewall.Packet{Src: c.stranger(), Proto: firewall.ICMP, ICMPType: x.kind}, false)
		}
		c.errors(firewall.ICMP, 3, 11, 12)
		return
	}
	c.add(pings, "echo request", firewall.Packet{Src: c.stranger(), Proto: firewall.ICMPv6, ICMPType: 128}, ping)
	for _, x := range []struct {
		name string
		kind uint8
	}{{"echo reply, unasked", 129}, {"redirect", 137}, {"node information query", 139}} {
		c.add(otherICMP, x.name, firewall.Packet{Src: c.stranger(), Proto: firewall.ICMPv6, ICMPType: x.kind}, false)
	}
	c.errors(firewall.ICMPv6, 1, 2, 3, 4)
	next := netip.MustParseAddr("fe80::99")
	for i, name := range []string{"router solicitation", "router advertisement", "neighbour solicitation", "neighbour advertisement"} {
		p := firewall.Packet{Src: next, Proto: firewall.ICMPv6, ICMPType: 133 + uint8(i), HopLimit: 255}
		c.add(neighbours, name, p, true)
		p.HopLimit = 254
		c.add(neighbours, name+" from behind a router", p, false)
	}
	for i, name := range []string{"MLD query", "MLD report", "MLD done"} {
		p := firewall.Packet{Src: next, Proto: firewall.ICMPv6, ICMPType: 130 + uint8(i), HopLimit: 1}
		c.add(neighbours, name, p, true)
		p.Src = c.stranger()
		c.add(neighbours, name+" from afar", p, false)
	}
	c.add(neighbours, "MLDv2 report", firewall.Packet{Src: next, Proto: firewall.ICMPv6, ICMPType: 143, HopLimit: 1}, true)
}

// errors is what is said of the way to somebody: path MTU among it. They pass
// also where conntrack does not know what they are about.
func (c *caser) errors(proto firewall.Proto, kinds ...uint8) {
	names := map[firewall.Proto][]string{
		firewall.ICMP:   {3: "packet too big", 11: "time exceeded", 12: "parameter problem"},
		firewall.ICMPv6: {1: "unreachable", 2: "packet too big", 3: "time exceeded", 4: "parameter problem"},
	}
	for _, kind := range kinds {
		p := firewall.Packet{Src: c.stranger(), Proto: proto, ICMPType: kind, State: firewall.TrackedRelated}
		c.add(icmpErrors, names[proto][kind]+", about a connection of ours", p, true)
		p.State = firewall.TrackedInvalid
		c.add(icmpErrors, names[proto][kind]+", about none", p, true)
	}
}

// replies is answers to what this host begins, and the same where it did not.
func (c *caser) replies() {
	reply := firewall.Packet{Src: c.stranger(), Proto: firewall.ICMP, ICMPType: 0, State: firewall.TrackedEstablished}
	if c.family == firewall.IPv6 {
		reply.Proto, reply.ICMPType = firewall.ICMPv6, 129
	}
	c.add(replies, "echo reply", reply, true)
	for _, x := range []struct {
		name  string
		proto firewall.Proto
		port  uint16
		flags firewall.TCPFlags
	}{{"of 443/tcp", firewall.TCP, 443, firewall.SYN | firewall.ACK}, {"of 53/udp", firewall.UDP, 53, 0}} {
		p := firewall.Packet{Src: c.stranger(), Proto: x.proto, SrcPort: x.port, DstPort: 50000, Flags: uint8(x.flags), State: firewall.TrackedEstablished}
		c.add(replies, x.name, p, true)
		p.State, p.DstPort = "", 50001
		c.add(replies, x.name+", unasked", p, x.proto == firewall.UDP && c.admits(x.proto, p.DstPort, p.Src))
	}
}

// leases is DHCP, for this host and for its guests.
func (c *caser) leases() {
	p := firewall.Packet{Src: c.stranger(), Proto: firewall.UDP, SrcPort: 67, DstPort: 68}
	if c.family == firewall.IPv4 {
		c.add(leases, "answer", p, true)
		p.Dst, p.DstType = netip.MustParseAddr("255.255.255.255"), firewall.Broadcast
		c.add(leases, "answer to all", p, true)
		p.Dst, p.DstType, p.SrcPort = netip.Addr{}, "", 1067
		c.add(leases, "answer of another program", p, c.admits(firewall.UDP, 68, p.Src))
		c.begin("DHCP of guests", firewall.UDP, 67, c.stranger())
		return
	}
	p.Src, p.SrcPort, p.DstPort, p.Dst = netip.MustParseAddr("fe80::99"), 547, 546, twin.LinkLocal
	c.add(leases, "answer", p, true)
	p.Src, p.Dst = c.stranger(), netip.Addr{}
	c.add(leases, "answer from afar", p, c.admits(firewall.UDP, 546, p.Src))
	c.begin("DHCP of guests", firewall.UDP, 547, netip.MustParseAddr("fe80::99"))
}

// rest is DNS of guests, what is for everybody, and what has no ports.
func (c *caser) rest() {
	c.begin("DNS of guests", firewall.UDP, 53, c.stranger())
	c.begin("DNS of guests", firewall.TCP, 53, c.stranger())
	p := firewall.Packet{Src: c.stranger(), Proto: firewall.UDP, DstPort: 5353, Dst: netip.MustParseAddr("ff02::1"), DstType: firewall.Multicast}
	if c.family == firewall.IPv4 {
		p.Dst = netip.MustParseAddr("224.0.0.1")
	}
	c.add(everybody, "multicast to 5353/udp", p, c.admits(firewall.UDP, 5353, p.Src))
	if c.family == firewall.IPv4 {
		p.Dst, p.DstType, p.DstPort = netip.MustParseAddr("255.255.255.255"), firewall.Broadcast, 137
		c.add(everybody, "broadcast to 137/udp", p, c.admits(firewall.UDP, 137, p.Src))
	}
	c.add(others, "protocol "+string(twin.OtherProto), firewall.Packet{Src: c.stranger(), Proto: twin.OtherProto}, false)
}

// edges are the first and the last address of each network of the family, and
// those before and behind it. Of many networks, they are of some.
func (c *caser) edges(networks []netip.Prefix) []netip.Addr {
	var list []netip.Addr
	count := 0
	for _, p := range networks {
		if firewall.FamilyOf(p) != c.family {
			continue
		}
		if count++; count > sampled {
			break
		}
		first, last := p.Masked().Addr(), lastOf(p)
		for _, a := range []netip.Addr{first, last, first.Next(), first.Prev(), last.Next()} {
			if usable(a) && !slices.Contains(list, a) {
				list = append(list, a)
			}
		}
	}
	return list
}

// lastOf is the last address of a network.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// usable tells whether the kernel takes a packet from an address.
func usable(a netip.Addr) bool {
	switch {
	case !a.IsValid() || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.Is4In6():
		return false
	case a.Is4():
		b := a.As4()
		return b[0] != 0 && b != [4]byte{255, 255, 255, 255}
	}
	return true
}

// stranger is somebody of whom nothing is said, if there is anybody, and whom no
// other case has: of another IPv6 /64 too, which is what limits count.
func (c *caser) stranger() netip.Addr {
	var a netip.Addr
	for range strangersTried {
		c.seen++
		a = strangerOf(c.family, c.seen)
		if !contains(c.known, a) {
			break
		}
	}
	return a
}

// strangerOf gives addresses of the ranges for documentation and for
// benchmarks (RFC 5737, RFC 3849, RFC 2544), and then of those of others.
func strangerOf(f firewall.Family, n int) netip.Addr {
	if f == firewall.IPv6 {
		if n%2 == 0 {
			return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0xbf, 0xff, byte(n >> 8), byte(n), 15: 7})
		}
		return netip.AddrFrom16([16]byte{0x2a, 0x01, 0x0b, 0xf0, byte(n >> 16), 0xff, byte(n >> 8), byte(n), 15: 7})
	}
	switch n % 4 {
	case 0:
		return netip.AddrFrom4([4]byte{198, 18 + byte(n>>16)&1, byte(n >> 8), byte(n)})
	case 1:
		return netip.AddrFrom4([4]byte{100, 64 + byte(n>>16)&63, byte(n >> 8), byte(n)})
	case 2:
		return netip.AddrFrom4([4]byte{45, 150 + byte(n>>16)&63, byte(n >> 8), byte(n)})
	}
	return netip.AddrFrom4([4]byte{212, 20 + byte(n>>16)&63, byte(n >> 8), byte(n)})
}
