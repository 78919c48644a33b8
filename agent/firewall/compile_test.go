package firewall

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func base() Desired {
	return Desired{
		Profile: Profile{Name: "p", Ping: true, Services: []Service{{Name: "http", Proto: TCP, Ports: Port(80), On: "any"}}},
		SSH:     SSH{Ports: []uint16{22}, Mode: SSHPinned, Allow: []netip.Prefix{netip.MustParsePrefix("203.0.113.9/32")}},
	}
}

func TestCompileRefuses(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		change     func(*Desired)
	}{
		{"no SSH port", "no SSH port", func(d *Desired) { d.SSH.Ports = nil }},
		{"no mode", "SSH mode", func(d *Desired) { d.SSH.Mode = "" }},
		{"pinned without a source", "no source is allowed", func(d *Desired) { d.SSH.Allow = nil }},
		{"reserved name", "baseline rules", func(d *Desired) { d.Profile.Services[0].Name = "ssh" }},
		{"invalid name", "1 to 20", func(d *Desired) { d.Profile.Services[0].Name = "a b" }},
		{"duplicate name", "defined twice", func(d *Desired) { d.Profile.Services = append(d.Profile.Services, d.Profile.Services[0]) }},
		{"limit without a unit", "SSH rate limit: unknown unit", func(d *Desired) { d.SSH.Limit = Rate{N: 30} }},
		{"probation with open SSH", "probation requires SSH mode pinned, got limited", func(d *Desired) { d.SSH.Mode, d.SSH.Probation = SSHLimited, &Probation{} }},
		{"invalid interface", "interface name", func(d *Desired) { d.Trusted = []string{"eth0 -j ACCEPT"} }},
	} {
		d := base()
		tt.change(&d)
		if _, err := Compile(d); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// TestNamesReservedLater compiles a desired state of version 0.1 with names that are
// reserved now. The service has to be able to follow the machine with it.
func TestNamesReservedLater(t *testing.T) {
	for _, name := range reservedLater {
		d := base()
		d.Profile.Services[0].Name = name
		if _, err := Compile(d); err != nil {
			t.Error(err)
		}
		if err := CheckServiceName(name); err == nil {
			t.Errorf("%s is not reserved", name)
		}
	}
}

// TestSSHDKeepsItsPorts checks that a service with a port of sshd opens its other ports
// only, and is reported.
func TestSSHDKeepsItsPorts(t *testing.T) {
	from := []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.0/24")}
	for _, tt := range []struct {
		ports []uint16
		of    Service
		want  string // the remaining services
		loss  []uint16
	}{
		{[]uint16{22}, Service{Proto: TCP, Ports: Port(22)}, "", []uint16{22}},
		{[]uint16{22}, Service{Proto: UDP, Ports: Port(22)}, "22/udp", nil},
		{[]uint16{22}, Service{Proto: TCP, Ports: PortRange{20, 30}}, "20-21/tcp 23-30/tcp", []uint16{22}},
		{[]uint16{20, 25, 30}, Service{Proto: TCP, Ports: PortRange{20, 30}}, "21-24/tcp 26-29/tcp", []uint16{20, 25, 30}},
		{[]uint16{22}, Service{Proto: TCP, Ports: PortRange{20, 30}, From: from}, "20-21/tcp from 10.0.0.0/8, 192.0.2.0/24 23-30/tcp from 10.0.0.0/8, 192.0.2.0/24", []uint16{22}},
		{[]uint16{1, 65535}, Service{Proto: TCP, Ports: PortRange{1, 65535}}, "2-65534/tcp", []uint16{1, 65535}},
		{[]uint16{65535}, Service{Proto: TCP, Ports: Port(65535)}, "", []uint16{65535}},
	} {
		for _, open := range []bool{false, true} {
			d := base()
			d.Profile.Services, d.SSH.Ports = nil, tt.ports
			tt.of.Name = "x"
			if open {
				d.Open = []Service{tt.of}
			} else {
				d.Profile.Services = []Service{tt.of}
			}
			var got []string
			for _, s := range d.Services() {
				got = append(got, s.String())
			}
			if strings.Join(got, " ") != tt.want {
				t.Errorf("%v without %v is %q, want %q", tt.of, tt.ports, got, tt.want)
			}
			var loss []uint16
			for _, o := range d.SSHOverlaps() {
				if loss = append(loss, o.Port); o.Open != open {
					t.Errorf("%v: of [open] %t", tt.of, o.Open)
				}
			}
			if !slices.Equal(loss, tt.loss) {
				t.Errorf("%v and %v overlap in %v, want %v", tt.of, tt.ports, loss, tt.loss)
			}
			if _, err := Compile(d); err != nil {
				t.Errorf("%v: %v", tt.of, err)
			}
		}
	}
}

// A ruleset that passes Check is written to a restore file. These are altered, as in
// a damaged state file.
func TestCheckRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Ruleset)
	}{
		{"no chain", func(r *Ruleset) { r.IPv6 = nil }},
		{"wrong first chain", func(r *Ruleset) { r.IPv4[0].Name = "INPUT" }},
		{"chain name", func(r *Ruleset) { r.IPv4[1].Name = "BASICFW-X\nCOMMIT" }},
		{"comment", func(r *Ruleset) { r.IPv4[0].Rules[0].Comment = "x\n-A INPUT -j ACCEPT" }},
		{"no comment", func(r *Ruleset) { r.IPv4[0].Rules[0].Comment = "" }},
		{"target", func(r *Ruleset) { r.IPv4[0].Rules[0].Target = "ELSEWHERE" }},
		{"interface", func(r *Ruleset) { r.IPv4[0].Rules[0].In = "lo -j ACCEPT" }},
		{"family", func(r *Ruleset) { r.IPv6[0].Rules[0].Src = netip.MustParsePrefix("10.0.0.0/8") }},
		{"host bits", func(r *Ruleset) { r.IPv4[0].Rules[0].Src = netip.MustParsePrefix("10.0.0.1/8") }},
		{"ports without a protocol", func(r *Ruleset) { r.IPv4[0].Rules[0].DstPort = Port(1) }},
		{"log prefix", func(r *Ruleset) { r.IPv4[0].Rules[0].Target, r.IPv4[0].Rules[0].LogPrefix = Log, "x\" -j ACCEPT" }},
		{"state", func(r *Ruleset) { r.IPv4[0].Rules[1].State = "NEW -j ACCEPT" }},
		{"begin time", func(r *Ruleset) { r.IPv4[0].Rules[0].Since = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC) }},
		{"hop limit", func(r *Ruleset) { r.IPv4[0].Rules[0].HopLimit = 1 }},
		{"rate limit", func(r *Ruleset) { r.IPv4[0].Rules[0].Limit = &Limit{Rate: Rate{1, "x"}, Burst: 1} }},
	} {
		r, err := Compile(base())
		if err != nil {
			t.Fatal(err)
		}
		tt.change(&r)
		if r.Check() == nil {
			t.Errorf("%s: accepted", tt.name)
		}
	}
}

// The order of the rows determines the meaning of the firewall.
func TestCompileOrder(t *testing.T) {
	d := base()
	d.LogDrops = true
	r, err := Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	order := func(rules []Rule) []string {
		var out []string
		for _, rule := range rules {
			if len(out) == 0 || out[len(out)-1] != rule.Comment {
				out = append(out, rule.Comment)
			}
		}
		return out
	}
	want4 := []string{"basicfw-loopback", "basicfw-established", "basicfw-spoofed-loopback", "basicfw-null", "basicfw-new-not-syn", "basicfw-xmas",
		"basicfw-igmp", "basicfw-icmp-error", "basicfw-invalid", "basicfw-ping", "basicfw-dhcp", "basicfw-ssh", "basicfw-http", "basicfw-broadcast", "basicfw-multicast", "basicfw-log"}
	want6 := []string{"basicfw-loopback", "basicfw-established", "basicfw-spoofed-loopback", "basicfw-null", "basicfw-new-not-syn", "basicfw-xmas",
		"basicfw-nd", "basicfw-mld", "basicfw-icmp-error", "basicfw-invalid", "basicfw-ping", "basicfw-dhcp", "basicfw-ssh", "basicfw-http", "basicfw-multicast", "basicfw-log"}
	if diff := cmp.Diff(want4, order(r.IPv4[0].Rules)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(want6, order(r.IPv6[0].Rules)); diff != "" {
		t.Error(diff)
	}
	// No IPv6 source is allowed: the chain only drops.
	if diff := cmp.Diff([]string{"basicfw-ssh-log", "basicfw-ssh-drop"}, order(r.IPv6[1].Rules)); diff != "" {
		t.Error(diff)
	}
}

// A limit counts the first packets of connections: the others of a connection that is exempt
// from conntrack match a rule before it, for the same time.
func TestLimitCountsFirstPackets(t *testing.T) {
	when := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	limited, probation, unlocked := Failsafe([]uint16{22}), base(), base()
	probation.SSH.Limit, probation.SSH.Probation = Rate{30, Minute}, &Probation{Window: Window{Until: when}}
	unlocked.Unlock = &Unlock{Window: Window{Until: when}}
	service := base()
	service.Profile.Services[0].Limit = Rate{5, Second}
	for name, d := range map[string]Desired{"limited": limited, "probation": probation, "unlocked": unlocked, "service": service} {
		r, err := Compile(d)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range Families {
			counted := 0
			rules, port := r.Chains(f)[1].Rules, uint16(22)
			if name == "service" {
				rules, port = r.Chains(f)[0].Rules, 80
			}
			for i, rule := range rules {
				if rule.Limit == nil || rule.Target != Accept || rule.Comment == "basicfw-ping" {
					continue
				}
				counted++
				p := Packet{Src: netip.MustParseAddr(ByFamily(f, "198.51.100.7", "2001:db8::7")), Proto: TCP, DstPort: port, Flags: uint8(ACK), State: Untracked}
				before := rules[max(0, i-1)]
				if i == 0 || before.Limit != nil || !before.matches(p, when) || before.Since != rule.Since || before.Until != rule.Until {
					t.Errorf("%s, %v: before %+v is %+v", name, f, rule, before)
				}
				if p.Flags = uint8(SYN); before.matches(p, when) {
					t.Errorf("%s, %v: not counted, by %+v", name, f, before)
				}
			}
			if counted != 1 {
				t.Errorf("%s, %v: %d limits", name, f, counted)
			}
		}
	}
}

// Each service counts in a table of its own, whose name the kernel accepts.
func TestLimitNames(t *testing.T) {
	names := map[string]string{}
	for i := range 1000 {
		s := Service{Name: fmt.Sprintf("service-%d", i), Proto: TCP, Ports: Port(80), Limit: Rate{10000, Second}}
		c := compiler{family: IPv4}
		name := c.limit(s).Name
		if len(name) > maxHashName || names[name] != "" {
			t.Fatalf("%s has the name %q, which is too long or that of %q", s.Name, name, names[name])
		}
		names[name] = s.Name
	}
}

func TestLines(t *testing.T) {
	abc := []string{"a", "b", "c"}
	for _, tt := range []struct {
		name string
		got  []string
		want []string
	}{
		{"same", abc, nil},
		{"missing", []string{"a", "c"}, []string{"f ch: missing: b"}},
		{"extra", []string{"a", "x", "b", "c"}, []string{"f ch: extra: x"}},
		{"altered", []string{"a", "x", "c"}, []string{"f ch: altered: x, want b"}},
		{"moved", []string{"b", "a", "c"}, []string{"f ch: missing: a", "f ch: extra: a"}},
		{"empty", nil, []string{"f ch: missing: a", "f ch: missing: b", "f ch: missing: c"}},
		{"fewer", []string{"x", "c"}, []string{"f ch: altered: x, want a", "f ch: missing: b"}},
		{"more", []string{"a", "x", "y", "c"}, []string{"f ch: altered: x, want b", "f ch: extra: y"}},
		{"doubled", []string{"a", "b", "b", "c"}, []string{"f ch: extra: b"}},
	} {
		var got []string
		for _, d := range Lines("f", "ch", abc, tt.got) {
			got = append(got, d.String())
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

// Interfaces whose names rules cannot have are left out, and keep no rule from being made.
func TestOddInterfaceNames(t *testing.T) {
	d := Failsafe([]uint16{22})
	for _, name := range []string{"br~1", "eth+", "eth*", "eth$(x)", "eth1"} {
		d.Interfaces = append(d.Interfaces, Interface{Name: name, Zone: PrivateZone, ServesGuests: true})
	}
	d.Open = []Service{{Name: "db", Proto: TCP, Ports: Port(5432), On: "private"}}
	r, err := Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range Families {
		for _, c := range r.Chains(f) {
			for _, rule := range c.Rules {
				if rule.In != "" && rule.In != "eth1" && rule.In != "lo" {
					t.Errorf("%v: a rule on %q", f, rule.In)
				}
			}
		}
	}
	if on := d.InterfacesOf("private"); len(on) != 1 || on[0] != "eth1" {
		t.Errorf("private is %q", on)
	}
}
