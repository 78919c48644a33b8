package firewall

import (
	"errors"
	"net/netip"
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
		{"no port of sshd's", "no port for SSH", func(d *Desired) { d.SSH.Ports = nil }},
		{"no mode", "SSH mode", func(d *Desired) { d.SSH.Mode = "" }},
		{"pinned to nobody", "pinned to nobody", func(d *Desired) { d.SSH.Allow = nil }},
		{"a reserved name", "baseline's own", func(d *Desired) { d.Profile.Services[0].Name = "ssh" }},
		{"a bad name", "1 to 20", func(d *Desired) { d.Profile.Services[0].Name = "a b" }},
		{"a name twice", "there twice", func(d *Desired) { d.Profile.Services = append(d.Profile.Services, d.Profile.Services[0]) }},
		{"a limit without a unit", "the limit of SSH: unknown unit", func(d *Desired) { d.SSH.Limit = Rate{N: 30} }},
		{"probation where anybody may", "probation where SSH is limited", func(d *Desired) { d.SSH.Mode, d.SSH.Probation = SSHLimited, &Probation{} }},
		{"a bad interface", "interface name", func(d *Desired) { d.Trusted = []string{"eth0 -j ACCEPT"} }},
	} {
		d := base()
		tt.change(&d)
		if _, err := Compile(d); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	d := base()
	d.SSH.Ports = []uint16{22, 2222}
	d.Open = []Service{{Name: "wide", Proto: TCP, Ports: PortRange{2000, 3000}, On: "any", Source: "agent.ini:4"}}
	var overlap *SSHPortError
	if _, err := Compile(d); !errors.As(err, &overlap) || overlap.Port != 2222 || !strings.HasPrefix(err.Error(), "agent.ini:4: wide") {
		t.Errorf("a service on sshd's port: %v", err)
	}
	d.Open[0].Proto = UDP
	if _, err := Compile(d); err != nil {
		t.Errorf("the same of UDP: %v", err)
	}
}

// What Check lets pass is what a restore file may hold. Each of these was
// altered in a state file, say.
func TestCheckRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Ruleset)
	}{
		{"no chain", func(r *Ruleset) { r.IPv6 = nil }},
		{"another first chain", func(r *Ruleset) { r.IPv4[0].Name = "INPUT" }},
		{"a chain's name", func(r *Ruleset) { r.IPv4[1].Name = "BASICFW-X\nCOMMIT" }},
		{"a comment", func(r *Ruleset) { r.IPv4[0].Rules[0].Comment = "x\n-A INPUT -j ACCEPT" }},
		{"no comment", func(r *Ruleset) { r.IPv4[0].Rules[0].Comment = "" }},
		{"a target", func(r *Ruleset) { r.IPv4[0].Rules[0].Target = "ELSEWHERE" }},
		{"an interface", func(r *Ruleset) { r.IPv4[0].Rules[0].In = "lo -j ACCEPT" }},
		{"a family", func(r *Ruleset) { r.IPv6[0].Rules[0].Src = netip.MustParsePrefix("10.0.0.0/8") }},
		{"host bits", func(r *Ruleset) { r.IPv4[0].Rules[0].Src = netip.MustParsePrefix("10.0.0.1/8") }},
		{"ports without a protocol", func(r *Ruleset) { r.IPv4[0].Rules[0].DstPort = Port(1) }},
		{"a log prefix", func(r *Ruleset) { r.IPv4[0].Rules[0].Target, r.IPv4[0].Rules[0].LogPrefix = Log, "x\" -j ACCEPT" }},
		{"a state", func(r *Ruleset) { r.IPv4[0].Rules[1].State = "NEW -j ACCEPT" }},
		{"a beginning", func(r *Ruleset) { r.IPv4[0].Rules[0].Since = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC) }},
		{"a hop limit", func(r *Ruleset) { r.IPv4[0].Rules[0].HopLimit = 1 }},
		{"a limit", func(r *Ruleset) { r.IPv4[0].Rules[0].Limit = &Limit{Rate: Rate{1, "x"}, Burst: 1} }},
	} {
		r, err := Compile(base())
		if err != nil {
			t.Fatal(err)
		}
		tt.change(&r)
		if r.Check() == nil {
			t.Errorf("%s: passed", tt.name)
		}
	}
}

// The order of the rows is the meaning of the firewall.
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
		"basicfw-icmp-error", "basicfw-invalid", "basicfw-ping", "basicfw-dhcp", "basicfw-ssh", "basicfw-http", "basicfw-broadcast", "basicfw-multicast", "basicfw-log"}
	want6 := []string{"basicfw-loopback", "basicfw-established", "basicfw-spoofed-loopback", "basicfw-null", "basicfw-new-not-syn", "basicfw-xmas",
		"basicfw-nd", "basicfw-mld", "basicfw-icmp-error", "basicfw-invalid", "basicfw-ping", "basicfw-dhcp", "basicfw-ssh", "basicfw-http", "basicfw-multicast", "basicfw-log"}
	if diff := cmp.Diff(want4, order(r.IPv4[0].Rules)); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff(want6, order(r.IPv6[0].Rules)); diff != "" {
		t.Error(diff)
	}
	// Nobody of IPv6 is known: there the chain only drops.
	if diff := cmp.Diff([]string{"basicfw-ssh-log", "basicfw-ssh-drop"}, order(r.IPv6[1].Rules)); diff != "" {
		t.Error(diff)
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
