//go:build linux

package main

import (
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// The rules of a machine of profile web-only with Docker, an administrator's rules and a
// ban, as iptables-save prints them.
const (
	savedIPv4 = `*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 5432 -j DNAT --to-destination 172.17.0.2:5432
COMMIT
*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:BASICFW-INPUT - [0:0]
:BASICFW-SSH - [0:0]
:f2b - [0:0]
-A INPUT -p tcp -m tcp --dport 22 -j f2b
-A INPUT -i docker0 -p tcp -m tcp --dport 9100 -j ACCEPT
-A INPUT -p tcp -m tcp --dport 8080 -m limit --limit 10/min -j ACCEPT
-A INPUT -p tcp -m tcp --dport 8443 -m u32 --u32 "0x0=0x1" -m comment --comment "the administrator's own rule with a comment" -j ACCEPT
-A INPUT -j BASICFW-INPUT
-A FORWARD -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 5432 -j ACCEPT
-A BASICFW-INPUT -i lo -m comment --comment basicfw-loopback -j ACCEPT
-A BASICFW-INPUT -m conntrack --ctstate ESTABLISHED -m comment --comment basicfw-established -j ACCEPT
-A BASICFW-INPUT -p tcp -m tcp --dport 22 -m comment --comment basicfw-ssh -j BASICFW-SSH
-A BASICFW-INPUT -p tcp -m tcp --dport 80 -m conntrack --ctstate NEW,UNTRACKED -m comment --comment basicfw-http -j ACCEPT
-A BASICFW-SSH -s 203.0.113.0/24 -m conntrack --ctstate NEW,UNTRACKED -m comment --comment basicfw-ssh -j ACCEPT
-A BASICFW-SSH -m comment --comment basicfw-ssh-drop -j DROP
-A f2b -s 203.0.113.77/32 -j REJECT --reject-with icmp-port-unreachable
COMMIT
`
	savedIPv6 = `*filter
:INPUT DROP [0:0]
:BASICFW-INPUT - [0:0]
-A INPUT -j BASICFW-INPUT
-A BASICFW-INPUT -p tcp -m tcp --dport 80 -m conntrack --ctstate NEW,UNTRACKED -m comment --comment basicfw-http -j ACCEPT
COMMIT
`
)

// docker is a machine with these rules.
func docker(t *testing.T) exposure.Situation {
	t.Helper()
	net := netip.MustParsePrefix
	s := exposure.Situation{Interfaces: []firewall.Interface{
		{Name: "lo", Zone: firewall.LoopbackZone, Addresses: []netip.Prefix{net("127.0.0.1/8"), net("::1/128")}},
		{Name: "docker0", Zone: firewall.VirtualZone, Addresses: []netip.Prefix{net("172.17.0.1/16")}},
		{Name: "eth0", Zone: firewall.PublicZone, DefaultRoute: true, Addresses: []netip.Prefix{net("192.0.2.1/24"), net("2001:db8::1/64")}},
		{Name: "eth1", Zone: firewall.PrivateZone, Addresses: []netip.Prefix{net("10.0.0.1/24")}},
	}}
	for family, text := range map[string]string{"ip": savedIPv4, "ip6": savedIPv6} {
		tables, _, err := exposure.ReadSave("iptables", family, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		s.Rules.Tables = append(s.Rules.Tables, tables...)
	}
	s.Origin = func(name string, from netip.Addr) string {
		return map[string]string{"http": "profile web-only", "ssh": "client_ip in /etc/basicfw/local.ini"}[name]
	}
	s.Add(firewall.TCP, "sshd", 22)
	s.Add(firewall.TCP, "nginx", 80)
	s.Add(firewall.TCP, "node\x1b[31m", 9100)
	s.Add(firewall.TCP, "a-server-with-a-long-name", 3306)
	s.Add(firewall.TCP, "", 80, 443)
	return s
}

// golden compares a screen with a golden file, and checks its width.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
	for _, l := range strings.Split(got, "\n") {
		if utf8.RuneCountInString(l) > screenWidth || strings.TrimRight(l, " ") != l {
			t.Errorf("%s: %d columns: %q", name, utf8.RuneCountInString(l), l)
		}
	}
	if strings.Contains(got, "\x1b") {
		t.Errorf("%s: text reached the terminal unfiltered", name)
	}
}

func TestPrintExposure(t *testing.T) {
	for name, change := range map[string]func(*exposure.Situation){
		"docker": func(*exposure.Situation) {},
		"from":   func(s *exposure.Situation) { s.From = netip.MustParseAddr("203.0.113.77") },
		"on":     func(s *exposure.Situation) { s.On = "docker0" },
		"none":   func(s *exposure.Situation) { s.Rules = exposure.Ruleset{} },
		"many-interfaces": func(s *exposure.Situation) {
			for _, n := range []string{"br-0123456789ab", "cni0", "tailscale0", "virbr0", "wg0", "wg1"} {
				zone := firewall.VirtualZone
				if n == "tailscale0" {
					zone = firewall.TrustedZone
				}
				s.Interfaces = append(s.Interfaces, firewall.Interface{Name: n, Zone: zone, Addresses: []netip.Prefix{netip.MustParsePrefix("100.64.0.1/10")}})
			}
			saved := "*filter\n:INPUT ACCEPT\n-A INPUT -i wg+ -p tcp -m tcp --dport 80 -j DROP\n-A INPUT -i cni0 -p tcp -m tcp --dport 22 -j DROP\n" +
				"-A INPUT -i tailscale0 -j ACCEPT\n-A INPUT -i virbr0 -p tcp -j DROP\n-A INPUT -p tcp -m tcp --dport 443 -j DROP\nCOMMIT\n"
			tables, _, err := exposure.ReadSave("iptables-legacy", "ip", []byte(saved))
			if err != nil {
				t.Fatal(err)
			}
			s.Rules.Tables = tables
		},
		"many-listeners": func(s *exposure.Situation) {
			for n := range uint16(500) {
				s.Add(firewall.UDP, "java", 40000+n)
			}
		},
	} {
		s := docker(t)
		change(&s)
		var b strings.Builder
		printExposure(&b, s.Report(), false)
		golden(t, "exposure/"+name+".txt", b.String())
	}
	var b strings.Builder
	printExposure(&b, docker(t).Report(), true)
	if !strings.Contains(b.String(), "\x1b[32;1mopen") {
		t.Errorf("no colours in\n%s", b.String())
	}
}

func TestPrintExplanation(t *testing.T) {
	for name, p := range map[string]exposure.Probe{
		"ssh":         {From: netip.MustParseAddr("203.0.113.9"), Port: 22},
		"banned":      {From: netip.MustParseAddr("203.0.113.77"), Port: 22},
		"published":   {From: netip.MustParseAddr("198.51.100.1"), Port: 5432},
		"perhaps":     {From: netip.MustParseAddr("10.0.0.7"), Port: 8443},
		"ipv6":        {From: netip.MustParseAddr("2001:db8:9::1"), Port: 80},
		"established": {From: netip.MustParseAddr("198.51.100.1"), Port: 3306, State: "ESTABLISHED"},
	} {
		p.Proto = firewall.TCP
		if p.State == "" {
			p.State = "NEW"
		}
		s := docker(t)
		p, err := s.Complete(p)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		printExplanation(&b, s.Explain(p), false)
		golden(t, "explain/"+name+".txt", b.String())
	}
}
