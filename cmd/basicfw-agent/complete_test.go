//go:build linux

package main

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// TestClosedIn checks which listeners' ports the shell completes for open: not those that
// are open in one of the families, to some sources, or perhaps.
func TestClosedIn(t *testing.T) {
	s := exposure.Situation{Interfaces: []firewall.Interface{{Name: "eth0", Zone: firewall.PublicZone,
		Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")}}}}
	for family, rules := range map[string]string{
		"ip":  "*filter\n:INPUT DROP\n-A INPUT -p tcp --dport 22 -s 203.0.113.9 -j ACCEPT\n-A INPUT -p tcp --dport 25 -m u32 --u32 1=1 -j ACCEPT\nCOMMIT",
		"ip6": "*filter\n:INPUT DROP\n-A INPUT -p tcp --dport 80 -j ACCEPT\nCOMMIT",
	} {
		tables, _, err := exposure.ReadSave("iptables", family, []byte(rules))
		if err != nil {
			t.Fatal(err)
		}
		s.Rules.Tables = append(s.Rules.Tables, tables...)
	}
	s.Add(firewall.TCP, "sshd", 22)
	s.Add(firewall.TCP, "master", 25)
	s.Add(firewall.TCP, "nginx", 80, 8080)
	s.Add(firewall.UDP, "named", 53)
	s.Add(firewall.TCP, "", 443) // only the settings have it
	if got, want := closedIn(s), []string{"8080/tcp\tnginx", "53/udp\tnamed"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
