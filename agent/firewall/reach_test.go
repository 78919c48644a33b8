package firewall

import (
	"fmt"
	"net/netip"
	"testing"
	"time"
)

func TestReachable(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	eth0 := Interface{Name: "eth0", Zone: PublicZone}
	eth1 := Interface{Name: "eth1", Zone: PrivateZone}
	lo := Interface{Name: "lo", Zone: LoopbackZone}
	both := Families[:]
	service := func(name string, proto Proto, ports PortRange, on string, from ...string) Service {
		s := Service{Name: name, Proto: proto, Ports: ports, On: on}
		for _, f := range from {
			s.From = append(s.From, netip.MustParsePrefix(f))
		}
		return s
	}
	for _, tt := range []struct {
		name       string
		interfaces []Interface // for the rules and for the query
		families   []Family
		change     func(*Desired)
		proto      Proto
		port       uint16
		want       bool
	}{
		{"the profile's port", []Interface{lo, eth0}, both, nil, TCP, 80, true},
		{"another port", []Interface{lo, eth0}, both, nil, TCP, 81, false},
		{"another protocol", []Interface{lo, eth0}, both, nil, UDP, 80, false},
		{"loopback alone", []Interface{lo}, both, nil, TCP, 80, false},
		{"no family", []Interface{lo, eth0}, nil, nil, TCP, 80, false},
		{"on an absent zone", []Interface{lo, eth0}, both, func(d *Desired) {
			d.Open = []Service{service("db", TCP, Port(5432), "private")}
		}, TCP, 5432, false},
		{"on a zone", []Interface{lo, eth0, eth1}, both, func(d *Desired) {
			d.Open = []Service{service("db", TCP, Port(5432), "private")}
		}, TCP, 5432, true},
		{"on an absent interface", []Interface{lo, eth0}, both, func(d *Desired) {
			d.Open = []Service{service("db", TCP, Port(5432), "tun*")}
		}, TCP, 5432, false},
		{"from one network", []Interface{lo, eth0}, both, func(d *Desired) {
			d.Open = []Service{service("db", TCP, Port(5432), "any", "10.0.0.0/8")}
		}, TCP, 5432, true},
		{"from networks of the other family", []Interface{lo, eth0}, []Family{IPv4}, func(d *Desired) {
			d.Open = []Service{service("db", TCP, Port(5432), "any", "2001:db8:1::/48")}
		}, TCP, 5432, false},
		{"from several networks", []Interface{lo, eth0}, both, func(d *Desired) {
			d.Open = []Service{service("media", UDP, PortRange{40000, 40100}, "any", "198.51.100.0/24", "203.0.113.0/24")}
		}, UDP, 40100, true},
		{"above a range", []Interface{lo, eth0}, both, func(d *Desired) {
			d.Open = []Service{service("media", UDP, PortRange{40000, 40100}, "any")}
		}, UDP, 40101, false},
		{"the last port", []Interface{lo, eth0}, both, func(d *Desired) {
			d.Open = []Service{service("last", TCP, Port(65535), "any")}
		}, TCP, 65535, true},
		{"expired", []Interface{lo, eth0}, both, func(d *Desired) {
			s := service("soon", TCP, Port(8080), "any")
			s.Until = now.Add(-time.Second)
			d.Open = []Service{s}
		}, TCP, 8080, false},
		{"SSH from one address", []Interface{lo, eth0}, both, nil, TCP, 22, true},
		{"SSH without a source", []Interface{lo, eth0}, both, func(d *Desired) {
			d.SSH = SSH{Ports: []uint16{22}, Mode: SSHPinned, Nobody: true}
		}, TCP, 22, false},
		{"a trusted interface", []Interface{lo, eth0, {Name: "wg0", Zone: TrustedZone}}, both, func(d *Desired) {
			d.Trusted = []string{"wg*"}
		}, TCP, 8080, false},
		{"the DHCP client", []Interface{lo, eth0}, both, nil, UDP, 68, true},
		{"unlocked", []Interface{lo, eth0}, both, func(d *Desired) {
			d.Unlock = &Unlock{All: true, Window: Window{Until: now}}
		}, TCP, 8080, true},
	} {
		d := base()
		d.Interfaces = tt.interfaces
		if tt.change != nil {
			tt.change(&d)
		}
		r, err := Compile(d)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if got := r.Reachable(tt.interfaces, tt.families, now)(tt.proto, tt.port); got != tt.want {
			t.Errorf("%s: %d/%s is reachable: %v, want %v", tt.name, tt.port, tt.proto, got, tt.want)
		}
	}
}

// TestReachableAgain checks that earlier queries change no answer.
func TestReachableAgain(t *testing.T) {
	d := base()
	d.Interfaces = []Interface{{Name: "eth0", Zone: PublicZone}}
	d.Open = []Service{{Name: "a", Proto: TCP, Ports: PortRange{1000, 1010}, On: "any"}, {Name: "b", Proto: TCP, Ports: PortRange{1012, 1020}, On: "any"}}
	r, err := Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	reachable := r.Reachable(d.Interfaces, Families[:], time.Time{})
	for _, proto := range []Proto{TCP, UDP} {
		for port := uint16(990); port < 1030; port++ {
			want := proto == TCP && port >= 1000 && port <= 1020 && port != 1011
			if got := reachable(proto, port); got != want {
				t.Errorf("%d/%s is reachable: %v, want %v", port, proto, got, want)
			}
		}
	}
}

// BenchmarkReachable queries many ports with many interfaces, services and sources.
func BenchmarkReachable(b *testing.B) {
	d := base()
	for i := range 100 {
		d.Interfaces = append(d.Interfaces, Interface{Name: fmt.Sprintf("eth%d", i), Zone: PrivateZone})
		d.Open = append(d.Open, Service{Name: fmt.Sprintf("s%d", i), Proto: TCP, Ports: Port(uint16(2000 + 10*i)), On: "any"})
		d.SSH.Allow = append(d.SSH.Allow, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(i)}), 32))
	}
	d.Open = append(d.Open, Service{Name: "db", Proto: TCP, Ports: Port(5432), On: "private"})
	r, err := Compile(d)
	if err != nil {
		b.Fatal(err)
	}
	for range b.N {
		reachable := r.Reachable(d.Interfaces, Families[:], time.Time{})
		for p := range uint16(5000) {
			reachable(TCP, 1+p)
		}
	}
}
