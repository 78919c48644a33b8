package selftest

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/netsim"
	"github.com/basicfw/basicfw-agent/test/meaning"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// TestCases: the compiled rules do what the cases expect from the same desired state.
func TestCases(t *testing.T) {
	kinds := map[string]map[bool]int{}
	for n := range uint64(120) {
		d, has := meaning.Generate(n, now)
		r, err := firewall.Compile(d)
		if err != nil {
			t.Fatalf("%d: %v\n%+v", n, err, d)
		}
		for _, p := range cases(d, interfaces(d, r), firewall.Families[:], now) {
			if v := r.Decide(p.packet, now); v.Accepted != p.passes {
				t.Errorf("%d, with %q: %s %s: want %s, the rules decide %+v\n%+v", n, has, p.kind, p.what, word(p.passes), v, p.packet)
			}
			if kinds[p.kind] == nil {
				kinds[p.kind] = map[bool]int{}
			}
			kinds[p.kind][p.passes]++
		}
	}
	for _, kind := range []string{openPorts, closedPorts, ssh, scans, spoofed, pings, icmpErrors, otherICMP, replies, neighbours, leases, groups, others, loopback} {
		if kinds[kind][true] == 0 && kind != closedPorts || kinds[kind][false] == 0 && !slices.Contains([]string{openPorts, icmpErrors, loopback}, kind) {
			t.Errorf("%s: %v", kind, kinds[kind])
		}
	}
}

// TestCasesLimited: no source opens more SSH sessions than the lowest limit allows.
func TestCasesLimited(t *testing.T) {
	for n := range uint64(100) {
		d, _ := meaning.Generate(n, now)
		d.SSH.Mode, d.SSH.Probation, d.SSH.Nobody, d.SSH.Limit = firewall.SSHLimited, nil, false, firewall.Rate{N: 1, Per: firewall.Day}
		r, err := firewall.Compile(d)
		if err != nil {
			t.Fatal(err)
		}
		count := map[netip.Prefix]int{}
		for _, p := range cases(d, interfaces(d, r), firewall.Families[:], now) {
			source := netip.PrefixFrom(p.packet.Src, map[bool]int{true: 32, false: 64}[p.packet.Src.Is4()]).Masked()
			if v := r.Decide(p.packet, now); v.By == "basicfw-ssh-limit" {
				if count[source]++; count[source] > 1 {
					t.Errorf("%d: twice from %v", n, source)
				}
			}
		}
	}
}

// TestInterfaces checks which interfaces are tested.
func TestInterfaces(t *testing.T) {
	d := firewall.Desired{
		SSH:     firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHLimited},
		Trusted: []string{"wg0"},
		Interfaces: []firewall.Interface{
			{Name: "lo", Zone: firewall.LoopbackZone},
			{Name: "eth0", Zone: firewall.PublicZone, Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"),
				netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("192.0.2.3/24")}},
		},
		Open: []firewall.Service{{Name: "later", Proto: firewall.TCP, Ports: firewall.Port(80), On: "eth9"}},
	}
	for range 30 {
		d.Interfaces = append(d.Interfaces, firewall.Interface{Name: fmt.Sprintf("br%d", len(d.Interfaces)), Zone: firewall.VirtualZone, ServesGuests: true})
	}
	r, err := firewall.Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, i := range interfaces(d, r) {
		names = append(names, i.Name)
		if i.Name == "eth0" && len(i.Addresses) != addressesEach || len(i.Addresses) == 0 {
			t.Errorf("%s has %v", i.Name, i.Addresses)
		}
	}
	if want := []string{"eth0", "br2", "br3", "br4", "br5", "eth9", "wg0", unknownName}; !slices.Equal(names, want) {
		t.Errorf("%q, want %q", names, want)
	}
}

// A lost packet proves nothing about the rules, whatever was expected.
func TestArrived(t *testing.T) {
	if err := arrived([]netsim.Fate{netsim.Passed, netsim.Dropped}); err != nil {
		t.Errorf("all arrived: %v", err)
	}
	if err := arrived([]netsim.Fate{netsim.Passed, netsim.Lost, netsim.Dropped}); err == nil {
		t.Error("no error for a lost packet")
	}
}
