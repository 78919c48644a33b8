package firewall

import (
	"net/netip"
	"testing"
	"time"
)

// TestForward checks the verdicts for forwarded packets: new connections from an unknown
// address through eth0 to port 8000 of a container behind docker0, which dialled a published
// port or the container itself.
func TestForward(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	d := base()
	d.LogDrops, d.Published = true, PublishedProfile
	d.Interfaces = []Interface{{Name: "eth0", Zone: PublicZone}, {Name: "eth1", Zone: PrivateZone}, {Name: "eth2", Zone: PublicZone}, {Name: "docker0", Zone: VirtualZone}}
	d.Direct = []ContainerPort{{Out: "docker0", Proto: TCP, Ports: Port(8000)}}
	known := netip.MustParsePrefix("203.0.113.0/24")
	d.Open = []Service{
		{Name: "db", Proto: TCP, Ports: Port(5432), On: "private"},
		{Name: "web", Proto: TCP, Ports: PortRange{8080, 8089}, On: "public", From: []netip.Prefix{known, netip.MustParsePrefix("2001:db8::/32")}},
		{Name: "six", Proto: TCP, Ports: Port(8090), From: []netip.Prefix{netip.MustParsePrefix("2001:db8::/32")}},
		{Name: "one", Proto: UDP, Ports: Port(53), On: "eth2"},
		{Name: "soon", Proto: TCP, Ports: Port(9000), Until: now},
	}
	rules := func(change func(*Desired)) Ruleset {
		d := d
		change(&d)
		r, err := Compile(d)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	profile := rules(func(*Desired) {})
	published := func(port uint16, changes ...func(*Packet)) Packet {
		p := Packet{In: "eth0", Out: "docker0", Src: netip.MustParseAddr("198.51.100.7"), Dst: netip.MustParseAddr("172.17.0.2"), Proto: TCP,
			SrcPort: 1024, DstPort: 8000, Flags: uint8(SYN), State: TrackedNew, DNAT: port > 0, Dialled: port}
		for _, c := range changes {
			c(&p)
		}
		return p
	}
	from := func(a string) func(*Packet) { return func(p *Packet) { p.Src = netip.MustParseAddr(a) } }
	in := func(name string) func(*Packet) { return func(p *Packet) { p.In = name } }
	udp := func(p *Packet) { p.Proto = UDP }
	state := func(s Tracked) func(*Packet) { return func(p *Packet) { p.State = s } }
	to := func(port uint16) func(*Packet) { return func(p *Packet) { p.DstPort = port } }

	port := published
	const other, drop = "", "basicfw-published"
	for _, tt := range []struct {
		name  string
		rules Ruleset
		p     Packet
		by    string // the rule that drops
	}{
		{"a port of the profile", profile, published(80), other},
		{"another port", profile, published(8000), drop},
		{"the container's port is one of the profile", profile, published(8000, to(80)), drop},
		{"UDP", profile, published(80, udp), drop},
		{"an established connection", profile, published(8000, state(TrackedEstablished)), other},
		{"related to one", profile, published(8000, state(TrackedRelated)), drop},
		{"open on private interfaces", profile, published(5432), drop},
		{"arriving on one", profile, published(5432, in("eth1")), other},
		{"arriving from a container", profile, published(8000, in("docker0")), other},
		{"arriving on an unknown interface", profile, published(8000, in("wg0")), other},
		{"from another source", profile, published(8085), drop},
		{"from an allowed source", profile, published(8085, from("203.0.113.5")), other},
		{"open to sources of IPv6", profile, published(8090, from("203.0.113.5")), drop},
		{"open on one interface", profile, published(53, udp), drop},
		{"arriving on that", profile, published(53, udp, in("eth2")), other},
		{"open until now", profile, published(9000), other},
		{"sshd's port", profile, published(22, from("203.0.113.9")), drop},
		{"a direct route", profile, published(0), "basicfw-direct"},
		{"a direct route, exempt from conntrack", profile, published(0, state(Untracked)), "basicfw-direct"},
		{"to another port", profile, published(0, to(22)), other},
		{"to another interface", profile, published(0, func(p *Packet) { p.Out = "wg0" }), other},
		{"from a container", profile, published(0, in("docker0")), other},
		{"ICMP", profile, published(0, func(p *Packet) { p.Proto, p.ICMPType = ICMP, 8 }), other},
		{"leave", rules(func(d *Desired) { d.Published = PublishedLeave }), published(8000), other},
		{"of an earlier version", rules(func(d *Desired) { d.Published = "" }), published(8000), other},
		{"no public interface", rules(func(d *Desired) { d.Interfaces = d.Interfaces[1:2] }), published(8000), other},
		{"no known interface", rules(func(d *Desired) { d.Interfaces = nil }), published(8000), drop},
		{"unlocked", rules(func(d *Desired) { d.Unlock = &Unlock{All: true, Window: Window{Until: now}} }), published(8000), other},
	} {
		v := tt.rules.Decide(tt.p, now)
		if v.Accepted != (tt.by == other) || !v.Accepted && v.By != tt.by {
			t.Errorf("%s: accepted %v by %q, want %q", tt.name, v.Accepted, v.By, tt.by)
		}
	}
	for _, published := range []string{PublishedProfile, PublishedLeave} {
		blocking := rules(func(d *Desired) {
			d.Published, d.Blocks = published, []Block{{Name: "x", Networks: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")}}}
		})
		for _, tt := range []struct {
			name string
			p    Packet
			by   string
		}{
			{"a blocked source", port(80), "basicfw-block-x"},
			{"its open connection", port(80, state(TrackedEstablished)), "basicfw-block-x"},
			{"its reply to a container", port(80, state(TrackedEstablished), func(p *Packet) { p.Reply = true }), other},
			{"to a container behind a route", port(0, to(22)), other},
			{"arriving on a private interface", port(80, in("eth1")), other},
			{"another source", port(80, from("203.0.113.5")), other},
		} {
			v := blocking.Decide(tt.p, now)
			if v.Accepted != (tt.by == other) || !v.Accepted && v.By != tt.by {
				t.Errorf("%s, %s: accepted %v by %q, want %q", published, tt.name, v.Accepted, v.By, tt.by)
			}
		}
	}
	failsafe, err := Compile(Failsafe([]uint16{22}))
	if err != nil {
		t.Fatal(err)
	}
	if v := failsafe.Decide(published(80), now); v.Accepted {
		t.Error("the failsafe rules leave a published port open")
	}
}
