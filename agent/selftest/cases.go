package selftest

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/netsim"
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
	groups      = "broadcast, multicast"
	others      = "other protocols"
	loopback    = "loopback"
	blocked     = "blocked sources"
)

// probe is a packet and its expected result.
type probe struct {
	kind, what string
	packet     firewall.Packet
	passes     bool
}

// Ports that are always tested: those that scanners try first, and the ends of the range.
var (
	tcpSamples = []uint16{1, 21, 23, 111, 135, 139, 445, 1433, 2375, 3306, 3389, 5432, 5900, 6379, 8080, 9200, 11211, 27017, 65535}
	udpSamples = []uint16{1, 19, 53, 69, 111, 123, 137, 161, 389, 1900, 5353, 11211, 51820, 65535}
)

// odd are combinations of TCP flags that open no connection.
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
	ecn = 0xc0 // ECE and CWR, which request ECN (RFC 3168, 6.1.1)
	// sampled limits the networks of a list that are tested, and strangersTried the
	// search for an address in none of them.
	sampled, strangersTried = 16, 5000
)

// cases returns packets of all kinds with expected results that follow from the desired
// state, independently of the compiled rules.
func cases(d firewall.Desired, interfaces []firewall.Interface, families []firewall.Family, now time.Time) []probe {
	c := &caser{d: d, now: now, offered: d.Services(), counted: map[netip.Prefix]bool{}, connected: map[string]uint32{}}
	for _, t := range d.SSH.Sources() {
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
			c.lists()
		}
		c.family, c.on = f, firewall.Interface{Name: "lo", Zone: firewall.LoopbackZone}
		c.to = loopbackOf(f)
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
	// logins are the networks that may log in. known also contains the services'
	// sources and this host's addresses.
	logins, known []netip.Prefix

	family firewall.Family
	on     firewall.Interface
	to     netip.Addr

	list []probe
	seen int // number of strangers so far
	// counted are sources already counted by SSH's rate limit.
	counted map[netip.Prefix]bool
	// connected is how often, by source and service.
	connected map[string]uint32
}

func loopbackOf(f firewall.Family) netip.Addr {
	return netip.MustParseAddr(firewall.ByFamily(f, "127.0.0.1", "::1"))
}

// addressOf returns an address of an interface to send packets to.
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
	return netsim.LinkLocal
}

// add adds a case. It is expected to pass if passes is set or everything is accepted.
func (c *caser) add(kind, what string, p firewall.Packet, passes bool) {
	p.In = c.on.Name
	if !p.Dst.IsValid() {
		p.Dst = c.to
	}
	if p.HopLimit == 0 {
		p.HopLimit = 64
	}
	if p.State == "" {
		p.State = netsim.Unprovoked(p)
	}
	// Those of all cases are about connections of this host.
	p.Reply = p.State == firewall.TrackedEstablished || p.State == firewall.TrackedRelated
	c.list = append(c.list, probe{kind, what, p, passes && !c.blocks(p) || c.everything()})
}

// blocks reports whether a packet is from a blocked source and not a reply.
func (c *caser) blocks(p firewall.Packet) bool {
	if c.on.Zone != firewall.PublicZone || p.Reply {
		return false
	}
	u := c.d.Unlock
	if u != nil && !ended(u.Until, c.now) && p.Proto == firewall.TCP && slices.Contains(c.d.SSH.Ports, p.DstPort) && (len(u.From) == 0 || contains(u.From, p.Src)) {
		return false
	}
	return slices.ContainsFunc(c.d.Blocks, func(b firewall.Block) bool {
		return !ended(c.d.RuleEnd(b.Until), c.now) && firewall.Networks{List: b.Networks}.Contains(p.Src)
	})
}

// lists adds cases for blocked sources: the ends of the first networks of each list.
func (c *caser) lists() {
	for _, b := range c.d.Blocks {
		for _, p := range b.Networks[:min(len(b.Networks), sampled)] {
			for _, a := range []netip.Addr{p.Addr(), lastOf(p)} {
				if firewall.FamilyOf(p) == c.family && usable(a) && !contains(c.known, a) {
					q := firewall.Packet{Src: a, Proto: firewall.TCP, DstPort: 443, Flags: syn}
					c.add(blocked, "443/tcp from "+b.Name, q, c.admits(firewall.TCP, 443, a))
				}
			}
		}
	}
}

// begin adds a case of a packet that opens a connection to a port.
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
	if passes && !c.within(proto, port, from) {
		return
	}
	name := fmt.Sprintf("%d/%s", port, proto)
	if what != "" {
		name += " (" + what + ")"
	}
	c.add(kind, name, p, passes)
}

// counts reports whether a new SSH session is within every possible rate limit: it is
// from an allowed address, or the first from its source.
func (c *caser) counts(from netip.Addr) bool {
	u := c.d.Unlock
	limited := c.d.SSH.Mode == firewall.SSHLimited || c.d.SSH.Probation != nil || u != nil && len(u.From) == 0
	if !limited || contains(c.d.SSH.Allow, from) {
		return true
	}
	source := netip.PrefixFrom(from, firewall.ByFamily(c.family, 32, 64)).Masked()
	again := c.counted[source]
	c.counted[source] = true
	return !again
}

// within reports whether a connection to a service is within its rate limit, if it has one:
// it is one of the first from its source.
func (c *caser) within(proto firewall.Proto, port uint16, from netip.Addr) bool {
	i := slices.IndexFunc(c.offered, func(s firewall.Service) bool {
		return s.Proto == proto && s.Ports.Contains(port) && !s.Limit.IsZero()
	})
	if i < 0 {
		return true
	}
	source := from.String()
	if from.Is6() {
		source = netip.PrefixFrom(from, 64).Masked().String()
	}
	source += " " + c.offered[i].Name
	c.connected[source]++
	return c.connected[source] <= c.offered[i].Limit.N
}

// everything reports whether the interface accepts all packets.
func (c *caser) everything() bool {
	u := c.d.Unlock
	return u != nil && u.All && !ended(u.Until, c.now) || c.on.Name == "lo" ||
		slices.Contains(c.d.TrustedNames(), c.on.Name)
}

// admits reports whether an address may connect to a port.
func (c *caser) admits(proto firewall.Proto, port uint16, from netip.Addr) bool {
	dhcp := firewall.ByFamily[uint16](c.family, 67, 547)
	switch {
	case c.everything():
		return true
	case c.on.ServesGuests && (port == 53 && proto != firewall.SCTP || proto == firewall.UDP && port == dhcp):
		return true
	case proto == firewall.UDP && port == 546 && c.to.Is6() && c.to.IsLinkLocalUnicast():
		return true
	case proto == firewall.TCP && slices.Contains(c.d.SSH.Ports, port):
		return c.mayLogIn(from)
	}
	return slices.ContainsFunc(c.offered, func(s firewall.Service) bool {
		return s.Proto == proto && !s.IPsec && (s.Ports.Contains(port) || !proto.HasPorts()) && !ended(c.d.RuleEnd(s.Until), c.now) && c.isOn(s.On) &&
			(len(s.From) == 0 || contains(s.From, from))
	})
}

// mayLogIn reports whether an address may open an SSH session.
func (c *caser) mayLogIn(from netip.Addr) bool {
	s := c.d.SSH
	if s.Mode == firewall.SSHLimited {
		return true
	}
	if p := s.Probation; p != nil && !p.NoRule && c.now.Unix() >= p.Until.Unix() {
		return true
	}
	if u := c.d.Unlock; u != nil && !ended(u.Until, c.now) && (len(u.From) == 0 || contains(u.From, from)) {
		return true
	}
	return slices.ContainsFunc(s.Sources(), func(t firewall.TimedSource) bool { return t.From.Contains(from) && !ended(c.d.RuleEnd(t.Until), c.now) })
}

// isOn reports whether "on WHERE" includes the interface.
func (c *caser) isOn(where string) bool {
	switch zone := firewall.Zone(where); zone {
	case "", firewall.AnyZone:
		return true
	case firewall.PublicZone, firewall.PrivateZone, firewall.VirtualZone:
		return c.on.Zone == zone
	}
	return firewall.MatchInterface(where, c.on.Name)
}

// ended reports whether the second until is over; zero never is.
func ended(until, now time.Time) bool { return !until.IsZero() && now.Unix() > until.Unix() }

func contains(list []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
}

// services adds cases for each service's ports and sources, and those next to them.
func (c *caser) services() {
	for _, s := range c.offered {
		if !s.Proto.HasPorts() {
			continue // see rest
		}
		other := firewall.UDP
		if s.Proto == firewall.UDP {
			other = firewall.TCP
		}
		middle := s.Ports.First + (s.Ports.Last-s.Ports.First)/2
		sources := append(c.edges(s.From), c.stranger())
		for _, from := range sources {
			c.begin(s.Name, s.Proto, s.Ports.First, from)
		}
		inside := sources[0] // in the first network, or a stranger
		if s.Ports.First != s.Ports.Last {
			c.begin(s.Name, s.Proto, s.Ports.Last, inside)
			c.begin(s.Name, s.Proto, middle, inside)
		}
		c.begin("before "+s.Name, s.Proto, s.Ports.First-1, inside)
		c.begin("after "+s.Name, s.Proto, s.Ports.Last+1, inside) // port 0 does not exist
		c.begin("", other, s.Ports.First, inside)
		if s.Proto == firewall.TCP && !slices.Contains(c.d.SSH.Ports, s.Ports.First) {
			p := firewall.Packet{Src: inside, Proto: firewall.TCP, DstPort: s.Ports.First, Flags: syn | ecn}
			if c.admits(s.Proto, s.Ports.First, inside) && c.within(s.Proto, s.Ports.First, inside) {
				c.add(openPorts, fmt.Sprintf("%d/tcp with ECN (%s)", s.Ports.First, s.Name), p, true)
			}
		}
	}
}

// samples adds cases for ports that are usually closed.
func (c *caser) samples() {
	for _, port := range tcpSamples {
		c.begin("", firewall.TCP, port, c.stranger())
	}
	for _, port := range udpSamples {
		c.begin("", firewall.UDP, port, c.stranger())
	}
}

// ssh adds cases for the networks that may log in, and the addresses next to them. With a
// limit per source, each case has a different source.
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
		c.begin("after SSH", firewall.TCP, port+1, inside)
		c.begin("", firewall.UDP, port, inside)
	}
}

// scans adds cases for TCP packets that open no connection, to an open port, to SSH and to
// a closed port.
func (c *caser) scans() {
	ports := slices.Clone(c.d.SSH.Ports[:min(1, len(c.d.SSH.Ports))])
	from := c.stranger()
	open := func(s firewall.Service) bool {
		return s.Proto == firewall.TCP && c.admits(firewall.TCP, s.Ports.First, from)
	}
	if i := slices.IndexFunc(c.offered, open); i >= 0 {
		ports = append(ports, c.offered[i].Ports.First)
	}
	closed := func(port uint16) bool { return !c.admits(firewall.TCP, port, from) }
	if i := slices.IndexFunc(tcpSamples, closed); i >= 0 {
		ports = append(ports, tcpSamples[i])
	}
	slices.Sort(ports)
	for _, port := range slices.Compact(ports) {
		who := from
		if edges := c.edges(c.d.SSH.Allow); slices.Contains(c.d.SSH.Ports, port) && len(edges) > 0 {
			who = edges[0] // an allowed address, so that only the flags matter
		}
		for _, x := range odd {
			c.add(scans, fmt.Sprintf("%s to %d/tcp", x.name, port), firewall.Packet{Src: who, Proto: firewall.TCP, DstPort: port, Flags: uint8(x.flags)}, false)
		}
		p := firewall.Packet{Src: loopbackOf(c.family), Proto: firewall.TCP, DstPort: port, Flags: syn}
		if c.family == firewall.IPv4 || !c.everything() { // the kernel drops ::1 itself
			c.add(spoofed, fmt.Sprintf("from it, to %d/tcp", port), p, false)
			p.Src, p.Dst = who, p.Src
			c.add(spoofed, fmt.Sprintf("to it, at %d/tcp", port), p, false)
		}
	}
}

func (c *caser) icmp() {
	message := func(kind uint8) firewall.Packet {
		return firewall.Packet{Src: c.stranger(), Proto: firewall.ByFamily(c.family, firewall.ICMP, firewall.ICMPv6), ICMPType: kind}
	}
	type named struct {
		kind uint8
		name string
	}
	c.add(pings, "echo request", message(firewall.ByFamily[uint8](c.family, 8, 128)), c.d.Profile.Ping)
	for _, x := range firewall.ByFamily(c.family,
		[]named{{0, "echo reply, unsolicited"}, {5, "redirect"}, {13, "timestamp request"}, {17, "address mask request"}},
		[]named{{129, "echo reply, unsolicited"}, {137, "redirect"}, {139, "node information query"}}) {
		c.add(otherICMP, x.name, message(x.kind), false)
	}
	if c.family == firewall.IPv4 {
		p := message(5)
		p.State = firewall.TrackedRelated
		c.add(otherICMP, "redirect, known connection", p, false)
	}
	// ICMP errors, path MTU among them, pass even if they belong to no connection in the
	// conntrack table.
	for _, x := range firewall.ByFamily(c.family,
		[]named{{3, "packet too big"}, {11, "time exceeded"}, {12, "parameter problem"}},
		[]named{{1, "unreachable"}, {2, "packet too big"}, {3, "time exceeded"}, {4, "parameter problem"}}) {
		p := message(x.kind)
		p.State = firewall.TrackedRelated
		c.add(icmpErrors, x.name+", known connection", p, true)
		p.State = firewall.TrackedInvalid
		c.add(icmpErrors, x.name+", unknown connection", p, true)
	}
	if c.family == firewall.IPv4 {
		return
	}
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
		c.add(neighbours, name+" from another network", p, false)
	}
	c.add(neighbours, "MLDv2 report", firewall.Packet{Src: next, Proto: firewall.ICMPv6, ICMPType: 143, HopLimit: 1}, true)
}

// replies adds cases for replies to this host's connections, and for unsolicited ones.
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
	}{{"from 443/tcp", firewall.TCP, 443, firewall.SYN | firewall.ACK}, {"from 53/udp", firewall.UDP, 53, 0}} {
		p := firewall.Packet{Src: c.stranger(), Proto: x.proto, SrcPort: x.port, DstPort: 50000, Flags: uint8(x.flags), State: firewall.TrackedEstablished}
		c.add(replies, x.name, p, true)
		p.State, p.DstPort = "", 50001
		c.add(replies, x.name+", unsolicited", p, x.proto == firewall.UDP && c.admits(x.proto, p.DstPort, p.Src))
	}
}

// leases adds cases for DHCP, of this host and of its guests.
func (c *caser) leases() {
	p := firewall.Packet{Src: c.stranger(), Proto: firewall.UDP, SrcPort: 67, DstPort: 68}
	if c.family == firewall.IPv4 {
		opens := func(s firewall.Service) bool { return s.Proto == firewall.UDP && s.Ports.Contains(68) }
		c.add(leases, "answer", p, c.on.IPv4 != firewall.Permanent || slices.ContainsFunc(c.offered, opens))
		p.Dst, p.DstType = netip.MustParseAddr("255.255.255.255"), firewall.Broadcast
		c.add(leases, "answer by broadcast", p, true)
		p.Dst, p.DstType, p.SrcPort = netip.Addr{}, "", 1067
		c.add(leases, "answer from another port", p, c.admits(firewall.UDP, 68, p.Src))
		c.begin("DHCP of guests", firewall.UDP, 67, c.stranger())
		return
	}
	p.Src, p.SrcPort, p.DstPort, p.Dst = netip.MustParseAddr("fe80::99"), 547, 546, netsim.LinkLocal
	c.add(leases, "answer", p, true)
	p.Src = c.stranger() // servers and relays also have global addresses
	c.add(leases, "answer from another network", p, true)
	p.Src, p.Dst = c.stranger(), netip.Addr{}
	c.add(leases, "to another address", p, c.admits(firewall.UDP, 546, p.Src))
	c.begin("DHCP of guests", firewall.UDP, 547, netip.MustParseAddr("fe80::99"))
}

// rest adds cases for guests' DNS, broadcast, multicast and protocols without ports.
func (c *caser) rest() {
	c.begin("DNS of guests", firewall.UDP, 53, c.stranger())
	c.begin("DNS of guests", firewall.TCP, 53, c.stranger())
	all := netip.MustParseAddr(firewall.ByFamily(c.family, "224.0.0.1", "ff02::1"))
	p := firewall.Packet{Src: c.stranger(), Proto: firewall.UDP, DstPort: 5353, Dst: all, DstType: firewall.Multicast}
	c.add(groups, "multicast to 5353/udp", p, c.admits(firewall.UDP, 5353, p.Src))
	if c.family == firewall.IPv4 {
		p.Dst, p.DstType, p.DstPort = netip.MustParseAddr("255.255.255.255"), firewall.Broadcast, 137
		c.add(groups, "broadcast to 137/udp", p, c.admits(firewall.UDP, 137, p.Src))
		query := firewall.Packet{Src: c.stranger(), Proto: firewall.IGMP, Dst: all, DstType: firewall.Multicast, HopLimit: 1}
		c.add(groups, "IGMP query", query, true)
		query.Dst, query.DstType = netip.Addr{}, ""
		c.add(groups, "IGMP to this host only", query, false)
	}
	for _, proto := range netsim.Others {
		from := c.stranger()
		for _, s := range c.offered {
			if edges := c.edges(s.From); s.Proto == proto && len(edges) > 0 {
				from = edges[0]
			}
		}
		if !proto.HasPorts() {
			c.add(others, "protocol "+string(proto), firewall.Packet{Src: from, Proto: proto}, c.admits(proto, 0, from))
		}
	}
}

// edges returns the first and last address of each network of the family, and those before
// and after it, for a limited number of networks.
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

// lastOf returns the last address of a network.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// usable reports whether the kernel accepts packets from an address.
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

// stranger returns an address that, if possible, is in no known network. No other case uses
// it, nor its IPv6 /64, which rate limits count.
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

// strangerOf returns the nth stranger. It is in the range for documentation (RFC 3849), for
// benchmarks (RFC 2544) or for carrier NAT (RFC 6598), or a public address.
func strangerOf(f firewall.Family, n int) netip.Addr {
	if f == firewall.IPv6 {
		if n%2 == 0 {
			return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 0xbf, 0xff, byte(n >> 8), byte(n), 15: 7})
		}
		return netip.AddrFrom16([16]byte{0x2a, 0x01, 0x0b, 0xf0, byte(n >> 16), 0xff, byte(n >> 8), byte(n), 15: 7})
	}
	x := [4]struct{ first, second, mask byte }{{198, 18, 1}, {100, 64, 63}, {45, 150, 63}, {212, 20, 63}}[n%4]
	return netip.AddrFrom4([4]byte{x.first, x.second + byte(n>>16)&x.mask, byte(n >> 8), byte(n)})
}
