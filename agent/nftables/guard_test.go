package nftables

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/test/lab"
)

func compiledRules(t testing.TB, d firewall.Desired) firewall.Ruleset {
	t.Helper()
	r, err := firewall.Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// all returns a desired state with every kind of rule.
func all(client lab.Addrs) firewall.Desired {
	return firewall.Desired{
		Profile: firewall.Profile{Name: "p", Ping: true, Services: []firewall.Service{
			{Name: "http", Proto: firewall.TCP, Ports: firewall.Port(80), On: "any"},
			{Name: "media", Proto: firewall.UDP, Ports: firewall.PortRange{First: 40000, Last: 40100}, On: "eth*"},
			{Name: "db", Proto: firewall.TCP, Ports: firewall.Port(5432), On: "any",
				From: []netip.Prefix{netip.MustParsePrefix("192.0.2.0/25"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("2001:db8:0:1::/64")}},
		}},
		Trusted: []string{"wg0"},
		SSH: firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHPinned,
			Allow: []netip.Prefix{netip.PrefixFrom(client.V4, 32), netip.PrefixFrom(client.V6, 128)},
			// A rule that has not begun opens nothing.
			Probation: &firewall.Probation{Window: firewall.Window{Until: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}}},
		LogDrops: true,
	}
}

// nft's output for the guard, with the position of the baseline rules.
func TestGuardText(t *testing.T) {
	n := load(t, "")
	rules := compiledRules(t, all(lab.Addrs{V4: netip.MustParseAddr("192.0.2.10"), V6: netip.MustParseAddr("2001:db8::10")}))
	if err := n.Do(func() error { return Guard{}.Raise(rules, firewall.Families[:]) }); err != nil {
		t.Fatal(err)
	}
	got := n.MustRun(t, "nft", "--numeric", "list", "ruleset")
	got = regexp.MustCompile(`(?m)^\t+|[ \t]+$`).ReplaceAllString(got, "")
	if diff := cmp.Diff(guardText, got); diff != "" {
		t.Errorf("(-want +got):\n%s\n%s", diff, got)
	}
}

// The guard alone closes the machine as our rules do, and is removed completely.
func TestGuardCloses(t *testing.T) {
	lab.Need(t, "ip", "nft")
	l := lab.New(t)
	l.Host.Listen(t, 22, 80, 5432, 8080)
	rules := compiledRules(t, all(l.Client))
	in := func(f func() error) {
		t.Helper()
		if err := l.Host.Do(f); err != nil {
			t.Fatal(err)
		}
	}
	g := Guard{}
	reach := func(guarded bool) {
		t.Helper()
		for _, to := range l.Server.Both() {
			for _, port := range []uint16{22, 80, 5432, 8080} {
				for _, who := range []lab.Addrs{l.Client, l.Stranger} {
					want := !guarded || port == 80 || who == l.Client && port != 8080
					wait := lab.Brief
					if want {
						wait = lab.Patient
					}
					if err := l.Outsider.Reach(who.Like(to), to, port, wait); (err == nil) != want {
						t.Errorf("guarded %v: from %v to %v port %d: %v", guarded, who.Like(to), to, port, err)
					}
				}
			}
		}
	}
	session, err := l.Outsider.Dial(l.Stranger.V4, l.Server.V4, 8080, lab.Patient)
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	in(func() error { return g.Lower() }) // there is none
	for range 2 {                         // the second replaces the first
		in(func() error { return g.Raise(rules, firewall.Families[:]) })
	}
	reach(true)
	in(func() error {
		if up, err := HasTable(GuardTable); !up || err != nil || !g.Up() {
			return fmt.Errorf("the guard is not detected: %v", err)
		}
		return g.Lower()
	})
	in(func() error {
		if g.Up() {
			return errors.New("the guard is still detected")
		}
		return nil
	})
	reach(false)
	if left := l.Host.MustRun(t, "nft", "list", "ruleset"); left != "" {
		t.Errorf("the guard leaves %s", left)
	}
	in(func() error { return g.Raise(rules, firewall.Families[:1]) })
	if tables := l.Host.MustRun(t, "nft", "list", "tables"); tables != "table inet "+GuardTable+"\n" {
		t.Errorf("without IPv6 the tables are %s", tables)
	}
}

// The guard includes temporary rules until they expire.
func TestGuardChecks(t *testing.T) {
	n := load(t, "")
	d := all(lab.Addrs{V4: netip.MustParseAddr("192.0.2.10"), V6: netip.MustParseAddr("2001:db8::10")})
	d.Open = []firewall.Service{{Name: "x", Proto: firewall.TCP, Ports: firewall.Port(8443), On: "any", Until: time.Date(2037, 1, 1, 0, 0, 0, 0, time.UTC)}}
	rules := compiledRules(t, d)
	if err := n.Do(func() error { return Guard{}.Raise(rules, firewall.Families[:]) }); err != nil {
		t.Fatal(err)
	}
	if text := n.MustRun(t, "nft", "list", "ruleset"); strings.Count(text, "8443") != 2 {
		t.Errorf("port 8443: %s", text)
	}
	if err := (Guard{}).Raise(firewall.Ruleset{}, firewall.Families[:]); err == nil {
		t.Error("an empty ruleset is accepted")
	}
}

const guardText = `table inet basicfw-guard {
set ipv4-db {
type ipv4_addr
flags interval
elements = { 10.0.0.0/8, 192.0.2.0/25 }
}

chain input {
type filter hook input priority 0; policy drop;
meta nfproto vmap { 2 : jump ipv4-input, 10 : jump ipv6-input }
counter packets 0 bytes 0 drop comment "basicfw-drop"
}

chain ipv4-input {
iifname "lo" counter packets 0 bytes 0 accept comment "basicfw-loopback"
ct state 0x2 counter packets 0 bytes 0 accept comment "basicfw-established"
iifname "wg0" counter packets 0 bytes 0 accept comment "basicfw-trusted"
ip saddr 127.0.0.0/8 counter packets 0 bytes 0 drop comment "basicfw-spoofed-loopback"
ip daddr 127.0.0.0/8 ct state 0x1,0x40 counter packets 0 bytes 0 drop comment "basicfw-spoofed-loopback"
ip daddr 127.0.0.0/8 ct status ! 0x20 counter packets 0 bytes 0 drop comment "basicfw-spoofed-loopback"
tcp flags ! 0x1,0x2,0x4,0x8,0x10,0x20 counter packets 0 bytes 0 drop comment "basicfw-null"
tcp flags != 0x2 / 0x1,0x2,0x4,0x10 ct state 0x8 counter packets 0 bytes 0 drop comment "basicfw-new-not-syn"
tcp flags 0x1,0x2,0x4,0x8,0x10,0x20 / 0x1,0x2,0x4,0x8,0x10,0x20 counter packets 0 bytes 0 drop comment "basicfw-xmas"
ip daddr 224.0.0.0/4 meta l4proto 2 counter packets 0 bytes 0 accept comment "basicfw-igmp"
icmp type { 3, 11, 12 } counter packets 0 bytes 0 accept comment "basicfw-icmp-error"
ct state 0x1 counter packets 0 bytes 0 drop comment "basicfw-invalid"
icmp type 8 counter packets 0 bytes 0 accept comment "basicfw-ping"
udp sport 67 udp dport 68 counter packets 0 bytes 0 accept comment "basicfw-dhcp"
tcp dport 22 counter packets 0 bytes 0 jump ipv4-ssh comment "basicfw-ssh"
tcp dport 80 ct state 0x8,0x40 counter packets 0 bytes 0 accept comment "basicfw-http"
iifname "eth*" udp dport 40000-40100 ct state 0x8,0x40 counter packets 0 bytes 0 accept comment "basicfw-media"
tcp dport 5432 ct state 0x8,0x40 counter packets 0 bytes 0 jump ipv4-db comment "basicfw-db"
}

chain ipv4-ssh {
ip saddr 192.0.2.10 ct state 0x8,0x40 counter packets 0 bytes 0 accept comment "basicfw-ssh"
counter packets 0 bytes 0 drop comment "basicfw-ssh-drop"
}

chain ipv4-db {
ip saddr @ipv4-db counter packets 0 bytes 0 accept comment "basicfw-db"
}

chain ipv6-input {
iifname "lo" counter packets 0 bytes 0 accept comment "basicfw-loopback"
ct state 0x2 counter packets 0 bytes 0 accept comment "basicfw-established"
iifname "wg0" counter packets 0 bytes 0 accept comment "basicfw-trusted"
ip6 saddr ::1 counter packets 0 bytes 0 drop comment "basicfw-spoofed-loopback"
ip6 daddr ::1 ct state 0x1,0x40 counter packets 0 bytes 0 drop comment "basicfw-spoofed-loopback"
ip6 daddr ::1 ct status ! 0x20 counter packets 0 bytes 0 drop comment "basicfw-spoofed-loopback"
tcp flags ! 0x1,0x2,0x4,0x8,0x10,0x20 counter packets 0 bytes 0 drop comment "basicfw-null"
tcp flags != 0x2 / 0x1,0x2,0x4,0x10 ct state 0x8 counter packets 0 bytes 0 drop comment "basicfw-new-not-syn"
tcp flags 0x1,0x2,0x4,0x8,0x10,0x20 / 0x1,0x2,0x4,0x8,0x10,0x20 counter packets 0 bytes 0 drop comment "basicfw-xmas"
ip6 hoplimit 255 icmpv6 type { 133, 134, 135, 136 } counter packets 0 bytes 0 accept comment "basicfw-nd"
ip6 saddr fe80::/10 icmpv6 type { 130, 131, 132, 143 } counter packets 0 bytes 0 accept comment "basicfw-mld"
icmpv6 type { 1, 2, 3, 4 } counter packets 0 bytes 0 accept comment "basicfw-icmp-error"
ct state 0x1 counter packets 0 bytes 0 drop comment "basicfw-invalid"
icmpv6 type 128 counter packets 0 bytes 0 accept comment "basicfw-ping"
ip6 daddr fe80::/10 udp dport 546 counter packets 0 bytes 0 accept comment "basicfw-dhcp"
tcp dport 22 counter packets 0 bytes 0 jump ipv6-ssh comment "basicfw-ssh"
tcp dport 80 ct state 0x8,0x40 counter packets 0 bytes 0 accept comment "basicfw-http"
iifname "eth*" udp dport 40000-40100 ct state 0x8,0x40 counter packets 0 bytes 0 accept comment "basicfw-media"
ip6 saddr 2001:db8:0:1::/64 tcp dport 5432 ct state 0x8,0x40 counter packets 0 bytes 0 accept comment "basicfw-db"
ip6 daddr ff00::/8 counter packets 0 bytes 0 drop comment "basicfw-multicast"
}

chain ipv6-ssh {
ip6 saddr 2001:db8::10 ct state 0x8,0x40 counter packets 0 bytes 0 accept comment "basicfw-ssh"
counter packets 0 bytes 0 drop comment "basicfw-ssh-drop"
}
}
`
