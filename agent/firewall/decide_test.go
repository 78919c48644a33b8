package firewall

import (
	"net/netip"
	"testing"
	"time"
)

// TestDecide checks the verdicts for packets with a profile of 80/tcp and ping, and
// the settings below.
func TestDecide(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	d := base()
	d.LogDrops = true
	d.Trusted = []string{"wg*"}
	d.Interfaces = []Interface{{Name: "eth0", Zone: PublicZone}, {Name: "eth1", Zone: PrivateZone}, {Name: "eth2", Zone: PublicZone, IPv4: Permanent}, {Name: "br0", Zone: VirtualZone, ServesGuests: true},
		{Name: "wg7", Zone: TrustedZone}, {Name: "wg8", Zone: VirtualZone}}
	d.SSH.Timed = []TimedSource{{From: netip.MustParsePrefix("203.0.113.50/32"), Until: now}}
	d.Open = []Service{
		{Name: "db", Proto: TCP, Ports: Port(5432), On: "private", From: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}},
		{Name: "media", Proto: UDP, Ports: PortRange{40000, 40100}, From: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("203.0.113.0/24")}},
		{Name: "soon", Proto: TCP, Ports: Port(8080), Until: now},
	}
	r, err := Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	limited := base()
	limited.SSH = SSH{Ports: []uint16{22}, Mode: SSHLimited, Limit: Rate{30, Minute}}
	limitedRules, err := Compile(limited)
	if err != nil {
		t.Fatal(err)
	}
	probation := base()
	probation.SSH.Probation = &Probation{Window: Window{Until: now}}
	probationRules, err := Compile(probation)
	if err != nil {
		t.Fatal(err)
	}
	unlocked := base()
	unlocked.Unlock = &Unlock{All: true, Window: Window{Until: now}}
	unlockedRules, err := Compile(unlocked)
	if err != nil {
		t.Fatal(err)
	}

	// The first packet of a connection from an unknown address.
	packet := func(change func(*Packet)) Packet {
		p := Packet{In: "eth0", Src: netip.MustParseAddr("198.51.100.7"), Dst: netip.MustParseAddr("192.0.2.1"), SrcPort: 1024, State: TrackedNew, HopLimit: 64}
		change(&p)
		return p
	}
	tcp := func(port uint16, change ...func(*Packet)) Packet {
		return packet(func(p *Packet) {
			p.Proto, p.DstPort, p.Flags = TCP, port, uint8(SYN)
			for _, c := range change {
				c(p)
			}
		})
	}
	udp := func(port uint16, change ...func(*Packet)) Packet {
		return tcp(port, append([]func(*Packet){func(p *Packet) { p.Proto, p.Flags = UDP, 0 }}, change...)...)
	}
	icmp := func(kind uint8, change ...func(*Packet)) Packet {
		return packet(func(p *Packet) {
			p.Proto, p.ICMPType, p.SrcPort = ICMP, kind, 0
			for _, c := range change {
				c(p)
			}
		})
	}
	icmp6 := func(kind uint8, change ...func(*Packet)) Packet {
		return icmp(kind, append([]func(*Packet){func(p *Packet) {
			p.Proto, p.Src, p.Dst = ICMPv6, netip.MustParseAddr("fe80::1"), netip.MustParseAddr("2001:db8::1")
		}}, change...)...)
	}
	to := func(a string) func(*Packet) { return func(p *Packet) { p.Dst = netip.MustParseAddr(a) } }
	from := func(a string) func(*Packet) { return func(p *Packet) { p.Src = netip.MustParseAddr(a) } }
	over6 := func(p *Packet) {
		p.Src, p.Dst = netip.MustParseAddr("2001:db8:1::7"), netip.MustParseAddr("2001:db8::1")
	}
	dhcp6 := func(source, destination string) Packet {
		return udp(546, over6, from(source), to(destination))
	}
	igmp := func(group string) Packet {
		return packet(func(p *Packet) { p.Proto, p.Dst, p.SrcPort = IGMP, netip.MustParseAddr(group), 0 })
	}
	on := func(name string) func(*Packet) { return func(p *Packet) { p.In = name } }
	state := func(s Tracked) func(*Packet) { return func(p *Packet) { p.State = s } }
	flags := func(f TCPFlags) func(*Packet) { return func(p *Packet) { p.Flags = uint8(f) } }
	hops := func(n uint8) func(*Packet) { return func(p *Packet) { p.HopLimit = n } }

	for _, tt := range []struct {
		name   string
		packet Packet
		accept bool
		by     string // after "basicfw-"; "" is the policy
	}{
		{"service", tcp(80), true, "http"},
		{"service over IPv6", tcp(80, over6), true, "http"},
		{"ECN flags", tcp(80, flags(SYN|0xc0)), true, "http"},
		{"wrong protocol", udp(80), false, ""},
		{"no service", tcp(81), false, ""},
		{"loopback", tcp(81, on("lo")), true, "loopback"},
		{"reply", tcp(50000, state(TrackedEstablished), flags(SYN|ACK)), true, "established"},
		{"related ICMP error", icmp(3, state(TrackedRelated)), true, "icmp-error"},
		{"related redirect", icmp(5, state(TrackedRelated)), false, ""},
		{"what a conntrack helper expects", tcp(40000, state(TrackedRelated)), false, ""},
		{"trusted interface", udp(9, on("wg7")), true, "trusted"},
		{"interface that only has such a name", udp(9, on("wg8")), false, ""},
		{"interface that did not exist", udp(9, on("wg9")), false, ""},
		{"prefix of a trusted interface", udp(9, on("w")), false, ""},
		{"spoofed", tcp(80, from("127.0.0.1")), false, "spoofed-loopback"},
		{"to loopback", tcp(80, to("127.0.0.1")), false, "spoofed-loopback"},
		{"to loopback over IPv6", tcp(80, over6, to("::1")), false, "spoofed-loopback"},
		{"to loopback, without state", tcp(80, to("127.0.0.1"), state(Untracked)), false, "spoofed-loopback"},
		{"DNATed to loopback", tcp(80, to("127.0.0.1"), func(p *Packet) { p.DNAT = true }), true, "http"},
		{"DNATed to loopback, no service", tcp(81, to("127.0.0.1"), func(p *Packet) { p.DNAT = true }), false, ""},
		{"null", tcp(80, flags(0), state(TrackedInvalid)), false, "null"},
		{"null except for ECN flags", tcp(80, flags(0xc0), state(TrackedInvalid)), false, "null"},
		{"new, not SYN", tcp(80, flags(ACK)), false, "new-not-syn"},
		{"XMAS", tcp(80, flags(AllFlags), state(TrackedInvalid)), false, "xmas"},
		{"FIN and ACK", tcp(80, flags(FIN|ACK), state(TrackedInvalid)), false, "invalid"},
		{"path MTU", icmp(3, state(TrackedInvalid)), true, "icmp-error"},
		{"redirect", icmp(5), false, ""},
		{"ping", icmp(8), true, "ping"},
		{"echo reply", icmp(0, state(TrackedInvalid)), false, "invalid"},
		{"ND", icmp6(135, hops(255), state(Untracked)), true, "nd"},
		{"ND from another link", icmp6(135, hops(254), state(Untracked)), false, ""},
		{"MLD", icmp6(130, hops(1), state(Untracked)), true, "mld"},
		{"MLD from another link", icmp6(130, from("2001:db8::9"), state(Untracked)), false, ""},
		{"DHCP", udp(68, func(p *Packet) { p.SrcPort = 67 }), true, "dhcp"},
		{"DHCP at a permanent address", udp(68, on("eth2"), func(p *Packet) { p.SrcPort = 67 }), false, "dhcp"},
		{"DHCP by broadcast", udp(68, on("eth2"), to("255.255.255.255"), func(p *Packet) { p.SrcPort, p.DstType = 67, Broadcast }), true, "dhcp"},
		{"not DHCP", udp(68), false, ""},
		{"DHCPv6", dhcp6("fe80::1", "fe80::2"), true, "dhcp"},
		{"DHCPv6 from a global address", dhcp6("2001:db8:1::7", "fe80::2"), true, "dhcp"},
		{"DHCPv6 to a global address", dhcp6("fe80::1", "2001:db8::1"), false, ""},
		{"DNS from a guest", udp(53, on("br0")), true, "guest-dns"},
		{"DHCP from a guest", udp(67, on("br0")), true, "guest-dhcp"},
		{"DNS from outside", udp(53), false, ""},
		{"SSH", tcp(22, from("203.0.113.9")), true, "ssh"},
		{"temporary SSH, in its last second", tcp(22, from("203.0.113.50")), true, "ssh"},
		{"SSH from an unknown address", tcp(22), false, "ssh-drop"},
		{"SSH over IPv6", tcp(22, over6), false, "ssh-drop"},
		{"service on an interface", tcp(5432, on("eth1"), from("10.1.1.1")), true, "db"},
		{"wrong interface", tcp(5432, from("10.1.1.1")), false, ""},
		{"wrong source", tcp(5432, on("eth1")), false, ""},
		{"wrong family", tcp(5432, on("eth1"), over6), false, ""},
		{"range with sources", udp(40100, from("203.0.113.77")), true, "media"},
		{"from none of the sources", udp(40100, from("192.0.2.77")), false, ""},
		{"return from a chain", udp(40100, from("192.0.2.77"), func(p *Packet) { p.DstType = Broadcast }), false, "broadcast"},
		{"above the range", udp(40101, from("203.0.113.77")), false, ""},
		{"expires now", tcp(8080), true, "soon"},
		{"broadcast", udp(137, func(p *Packet) { p.DstType = Broadcast }), false, "broadcast"},
		{"multicast", udp(5353, func(p *Packet) { p.DstType = Multicast }), false, "multicast"},
		{"multicast over IPv6", udp(5353, over6, to("ff02::fb")), false, "multicast"},
		{"another protocol", packet(func(p *Packet) { p.Proto = "47" }), false, ""},
		{"exempt from conntrack", tcp(80, state(Untracked)), true, "http"},
		{"exempt from conntrack, later", tcp(80, state(Untracked), flags(ACK)), true, "http"},
		{"exempt from conntrack, null", tcp(80, state(Untracked), flags(0)), false, "null"},
		{"exempt from conntrack, no service", tcp(81, state(Untracked)), false, ""},
		{"exempt from conntrack, SSH", tcp(22, from("203.0.113.9"), state(Untracked), flags(ACK)), true, "ssh"},
		{"exempt from conntrack, SSH from an unknown address", tcp(22, state(Untracked), flags(ACK)), false, "ssh-drop"},
		{"IGMP", igmp("224.0.0.1"), true, "igmp"},
		{"IGMP to this host only", igmp("192.0.2.1"), false, ""},
	} {
		want := Verdict{tt.accept, tt.by}
		if tt.by != "" {
			want.By = "basicfw-" + tt.by
		}
		if got := r.Decide(tt.packet, now); got != want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, want)
		}
	}
	later := now.Add(time.Second)
	for _, tt := range []struct {
		name   string
		rules  Ruleset
		packet Packet
		at     time.Time
		accept bool
		by     string
	}{
		{"a second after expiry", r, tcp(8080), later, false, ""},
		{"temporary SSH, a second after expiry", r, tcp(22, from("203.0.113.50")), later, false, "basicfw-ssh-drop"},
		{"SSH from any address", limitedRules, tcp(22), now, true, "basicfw-ssh-limit"},
		{"before the end of the probation", probationRules, tcp(22), now.Add(-time.Second), false, "basicfw-ssh-drop"},
		{"after the end of the probation", probationRules, tcp(22), now, true, "basicfw-ssh-limit"},
		{"all unlocked", unlockedRules, tcp(81, flags(0)), now, true, "basicfw-unlock"},
		{"all locked again", unlockedRules, tcp(81, flags(0)), later, false, "basicfw-null"},
	} {
		if got, want := tt.rules.Decide(tt.packet, tt.at), (Verdict{tt.accept, tt.by}); got != want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, want)
		}
	}
}
