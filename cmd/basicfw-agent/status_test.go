//go:build linux

package main

import (
	"flag"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/service"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/verify"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// TestPrintStatus checks that every state fits a screen of 80 by 24, with the verdict first
// and the next command last.
func TestPrintStatus(t *testing.T) {
	now := time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC)
	verified := now.Add(-7 * time.Minute)
	yes, no := true, false
	protected := func() report.Status {
		return report.Status{
			State:   report.Protected,
			Profile: store.Choice{Name: "web+mail", Source: "detected", Reason: "postfix listened on the mail port 25 at bootstrap"},
			Backend: report.BackendStatus{Name: "iptables", Reason: "iptables 1.8.9 (nf_tables), detected"},
			SSH: report.SSHStatus{Ports: []uint16{22}, Mode: "pinned", Allow: []string{"203.0.113.9", "2001:db8:1::/64"}, Source: "named",
				Reason: "client_ip in /etc/basicfw/local.ini", Caller: &report.CallerStatus{Address: "203.0.113.9", Allowed: true, Reason: "client_ip in /etc/basicfw/local.ini"}},
			Interfaces: []firewall.Interface{{Name: "lo", Zone: "loopback"}, {Name: "eth0", Zone: "public"}, {Name: "eth1", Zone: "private"}, {Name: "docker0", Zone: "virtual"}},
			Open: []report.OpenStatus{{Name: "http", Ports: "80", Proto: "tcp", Zone: "any"}, {Name: "https", Ports: "443", Proto: "tcp", Zone: "any"},
				{Name: "db", Ports: "5432", Proto: "tcp", Zone: "private", From: []string{"10.0.0.0/8"}}},
			Listening: []report.ListeningStatus{{Proto: "tcp", Port: 80, Process: "nginx", Reachable: &yes}, {Proto: "tcp", Port: 443, Process: "nginx", Reachable: &yes},
				{Proto: "tcp", Port: 3306, Process: "mariadbd", Reachable: &no, OpenCommand: "basicfw-agent open 3306/tcp"}},
			Families:     report.FamiliesStatus{IPv4: report.Protected, IPv6: report.Protected},
			Persisted:    []verify.PersistedFile{{Path: "/etc/sysconfig/iptables", OK: true}, {Path: "/etc/sysconfig/ip6tables", OK: true}},
			Service:      service.Status{Registered: true, Enabled: true, Active: true},
			Conntrack:    host.Conntrack{Count: 12, Max: 65536},
			LastVerified: &verified,
		}
	}
	warn := func(texts ...string) (out []report.Warning) {
		for _, t := range texts {
			out = append(out, report.Warning{Text: t})
		}
		return out
	}
	for name, change := range map[string]func(*report.Status){
		"protected": func(*report.Status) {},
		"no-ipv6":   func(s *report.Status) { s.Families.IPv6 = "disabled" },
		"forwarded": func(s *report.Status) {
			s.Forwarded = []firewall.ForwardedPort{{Family: "ipv4", Proto: "tcp", Port: "5432", To: "172.17.0.2:5432", By: "nat DOCKER", Program: "Docker"},
				{Family: "ipv6", Proto: "tcp", Port: "5432", To: "[fd00:d0c::242:ac11:2]:5432", By: "nat DOCKER", Program: "Docker"}}
		},
		"forwarded-held": func(s *report.Status) {
			s.Forwarded = []firewall.ForwardedPort{
				{Family: "ipv4", Proto: "tcp", Port: "5432", To: "172.17.0.2:5432", By: "nat DOCKER", Program: "Docker", Held: true, Closed: true},
				{Family: "ipv6", Proto: "tcp", Port: "5432", To: "[fd00::2]:5432", By: "nat DOCKER", Program: "Docker", Held: true, Closed: true},
				{Family: "ipv4", Proto: "tcp", Port: "8080", To: "172.17.0.2:80", By: "nat DOCKER", Program: "Docker", Held: true}}
		},
		"forwarded-here": func(s *report.Status) {
			s.Forwarded = []firewall.ForwardedPort{{Family: "ipv4", Proto: "tcp", Port: "8080", To: "port 80", By: "nat PREROUTING", Local: true}}
		},
		"forwarded-many": func(s *report.Status) {
			s.Forwarded = []firewall.ForwardedPort{{Family: "ipv4", Proto: "tcp", Port: "80", On: "203.0.113.1", To: "10.88.0.2:8080", By: "nat NETAVARK-DN-1D8721804F16F", Program: "podman"},
				{Family: "ipv4", Proto: "udp", Port: "8000-8010", To: "10.88.0.3", By: "t pre"}, {Family: "ipv4", Proto: "udp", Port: "8005", To: "10.88.0.4", By: "t pre"},
				{Family: "ipv4", Proto: "tcp", Port: "8080", To: "port 80", By: "nat PREROUTING", Local: true}}
		},
		"limited": func(s *report.Status) {
			s.SSH = report.SSHStatus{Ports: []uint16{22, 2222}, Mode: "limited", Limit: "30/min", Source: "none", Reason: "no client was named, and no user who may become root was logged in over SSH"}
			s.Warnings = warn("SSH is open to any address: no client was named, and no user who may become root was logged in over SSH")
			s.Next = []string{"basicfw-agent ssh allow YOUR-ADDRESS"}
		},
		"probation": func(s *report.Status) {
			by := now.Add(30 * time.Minute)
			s.SSH = report.SSHStatus{Ports: []uint16{22}, Mode: report.Probation, ConfirmBy: &by, Limit: "30/min", Allow: []string{"203.0.113.9"}, Source: "session",
				Reason: "the SSH session that ran bootstrap", Caller: &report.CallerStatus{Address: "203.0.113.9", Allowed: true, Reason: "the SSH session that ran bootstrap"}}
			s.Warnings = warn("SSH opens to any address at 2026-11-23T10:30:00Z unless the detected client logs in with a new session")
			s.Next = []string{"basicfw-agent confirm"}
		},
		"unconfirmed": func(s *report.Status) {
			s.SSH = report.SSHStatus{Ports: []uint16{22}, Mode: "limited", Limit: "30/min", Allow: []string{"203.0.113.9"}, Source: "unconfirmed",
				Reason: "the SSH session that ran bootstrap, but no new login from there came in time"}
			s.Warnings = warn("SSH is open to any address: the SSH session that ran bootstrap, but no new login from there came in time")
			s.Next = []string{"basicfw-agent ssh allow YOUR-ADDRESS"}
		},
		"temporary": func(s *report.Status) {
			s.SSH.Allow = append(s.SSH.Allow, "198.51.100.7")
			s.SSH.Temporary = []report.TemporarySource{{From: "198.51.100.7", Until: now.Add(8 * time.Hour)}}
			s.SSH.Caller = &report.CallerStatus{Address: "198.51.100.7", Allowed: true, Reason: "until 2026-11-23T18:00:00Z, allow in /etc/basicfw/local.ini"}
			end := now.Add(time.Hour)
			s.Open = append(s.Open, report.OpenStatus{Name: "udp-9000", Ports: "9000", Proto: "udp", Zone: "any", Until: &end})
		},
		"locked-out": func(s *report.Status) {
			s.SSH.Caller = &report.CallerStatus{Address: "198.51.100.7", Reason: "only 203.0.113.9, 2001:db8:1::/64"}
			s.Warnings = warn("your address 198.51.100.7 is not allowed to log in again")
			s.Next = []string{"basicfw-agent ssh allow me"}
		},
		"unlocked": func(s *report.Status) {
			s.State, s.SSH.Mode, s.Unlock = report.Unlocked, "unlocked", &report.UnlockStatus{Until: now.Add(15 * time.Minute)}
			s.SSH.Caller = &report.CallerStatus{Address: "198.51.100.7", Reason: "only 203.0.113.9, 2001:db8:1::/64"}
			s.Warnings = warn("your address 198.51.100.7 is not allowed to log in again")
			s.Next = []string{"basicfw-agent ssh allow me", "basicfw-agent lock"}
		},
		"pending": func(s *report.Status) {
			s.State, s.Pending = report.Pending, &report.PendingStatus{Until: now.Add(5 * time.Minute)}
			s.Next = []string{"basicfw-agent confirm"}
		},
		"rolled-back": func(s *report.Status) {
			s.Warnings = warn("the change of 2026-11-23 09:50:00 UTC was rolled back: not confirmed within 5m")
			s.Next = []string{"basicfw-agent plan"}
		},
		"unlocked-all": func(s *report.Status) {
			s.State, s.SSH.Mode, s.Unlock = report.Unlocked, "unlocked", &report.UnlockStatus{Until: now.Add(15 * time.Minute), All: true}
			s.SSH.Caller = nil
			s.Next = []string{"basicfw-agent lock"}
		},
		"blocked": func(s *report.Status) {
			s.SSH = report.SSHStatus{Ports: []uint16{22}, Mode: "pinned", Source: "settings", Reason: "allow in /etc/basicfw/local.ini"}
			s.Warnings = warn("SSH is blocked for every address: only console login is possible")
			s.Next = []string{"basicfw-agent ssh allow YOUR-ADDRESS"}
		},
		"mail-closed": func(s *report.Status) {
			s.Listening = append(s.Listening, report.ListeningStatus{Proto: "tcp", Port: 25, Process: "master", Reachable: &no, OpenCommand: "basicfw-agent bootstrap --profile web+mail"},
				report.ListeningStatus{Proto: "udp", Port: 5353, Process: "avahi-daemon", Reachable: &no, OpenCommand: "basicfw-agent open 5353/udp"})
		},
		"not-there": func(s *report.Status) {
			s.Listening[2] = report.ListeningStatus{Proto: "tcp", Port: 5432, Process: "postgres", Reachable: &no}
			s.Warnings = []report.Warning{{Text: "no private interface exists; 5432/tcp will open when one appears"},
				{Text: "firewalld is not active, but starts at the next boot", Fix: "basicfw-agent apply"}}
			s.Next = []string{"basicfw-agent confirm", "basicfw-agent apply"}
		},
		"many-listeners": func(s *report.Status) {
			for i := range 5000 {
				s.Listening = append(s.Listening, report.ListeningStatus{Proto: "tcp", Port: uint16(10000 + i), Process: "python3", Reachable: &no, OpenCommand: fmt.Sprintf("basicfw-agent open %d/tcp", 10000+i)},
					report.ListeningStatus{Proto: "udp", Port: uint16(10000 + i), Process: "python3", Reachable: &yes})
			}
		},
		"no-service": func(s *report.Status) { s.Service = service.Status{} },
		"failsafe": func(s *report.Status) {
			s.State, s.Open = report.Failsafe, nil
			s.Why = "your settings could not be loaded: /etc/basicfw/agent.ini:3: agent.profil: unknown key"
			s.Next = []string{"basicfw-agent bootstrap"}
		},
		"drifted": func(s *report.Status) {
			s.State, s.Why = report.Drifted, "ipv4: our rules are missing and INPUT drops everything: no port answers, not even SSH"
			for i := range 40 {
				s.Drift = append(s.Drift, firewall.Drift{Family: "ipv4", Chain: firewall.InputChain, Kind: firewall.Missing,
					Want: fmt.Sprintf("-p tcp -m tcp --dport %d -m conntrack --ctstate NEW -m comment --comment basicfw-s -j ACCEPT", i)})
				s.Foreign = append(s.Foreign, firewall.Foreign{Family: "ipv4", Chain: "INPUT", Rule: fmt.Sprintf("-s 10.0.0.%d/32 -j ACCEPT", i), Effect: "accepts matching packets, regardless of the profile"})
			}
			s.Warnings = warn(slices.Repeat([]string{"something is odd"}, 30)...)
			s.Listening = nil
			for i := range 60 {
				s.Listening = append(s.Listening, report.ListeningStatus{Proto: "tcp", Port: uint16(3000 + i), Process: "java\x1b[31m", Reachable: &no, OpenCommand: fmt.Sprintf("basicfw-agent open %d/tcp", 3000+i)})
				s.Interfaces = append(s.Interfaces, firewall.Interface{Name: fmt.Sprintf("veth%d", i), Zone: "virtual"})
				s.Open = append(s.Open, report.OpenStatus{Name: fmt.Sprintf("s%d", i), Ports: "80", Proto: "tcp", Zone: "any"})
				s.SSH.Allow = append(s.SSH.Allow, fmt.Sprintf("203.0.113.%d", i))
				s.Forwarded = append(s.Forwarded, firewall.ForwardedPort{Family: "ipv4", Proto: "tcp", Port: "5432", To: "172.17.0.2", By: "nat DOCKER"})
			}
			s.Next = []string{"basicfw-agent verify --repair"}
		},
		"unprotected": func(s *report.Status) {
			s.State, s.Why = report.Unprotected, `ipv4: "-j ACCEPT" in INPUT accepts new connections to every port`
			s.Foreign = []firewall.Foreign{{Family: "ipv4", Chain: "INPUT", Rule: "-j ACCEPT", Effect: "accepts new connections to every port"}}
			s.Next = []string{"iptables -D INPUT -j ACCEPT"}
		},
		"exposed": func(s *report.Status) {
			s.State, s.Why = report.Exposed, "22/tcp and 8080/tcp are open to any address on eth0: iptables filter OTHER -p tcp -m multiport --dports 22,8080 -j ACCEPT"
			s.Listening = append(s.Listening, report.ListeningStatus{Proto: "tcp", Port: 8080, Process: "java", Reachable: &yes})
			s.Warnings = []report.Warning{{Code: report.Exposed, Text: s.Why, Fix: "remove this rule, or open the port in the settings"},
				{Code: "open-sometimes", Text: "9090/tcp is perhaps open to any address on eth0: nft inet t in tcp dport 9090 limit rate 3/minute accept, within a limit of rate or time"}}
		},
		"blocked-by-others": func(s *report.Status) {
			s.State, s.Why = report.Blocked, "80/tcp and 443/tcp are blocked for any address on eth0: nft inet filter input policy DROP"
			s.Listening[0].Reachable, s.Listening[1].Reachable = &no, &no
			s.Warnings = []report.Warning{{Code: report.Blocked, Text: s.Why, Fix: "remove this rule, or close the port in the settings"}}
		},
		"foreign": func(s *report.Status) {
			s.Foreign = []firewall.Foreign{{Family: "ipv4", Chain: "INPUT", Rule: "-p tcp -m tcp --dport 8080 -j ACCEPT", Effect: "accepts matching packets, regardless of the profile"}}
		},
		"state-lost": func(s *report.Status) {
			*s = report.Status{State: report.Drifted, Why: "reading /var/lib/basicfw/state.json: unexpected EOF", Next: []string{"basicfw-agent bootstrap"},
				Listening: []report.ListeningStatus{{Proto: "tcp", Port: 22, Process: "sshd"}, {Proto: "tcp", Port: 80, Process: "nginx"}}}
		},
		"not-saved": func(s *report.Status) {
			*s = report.Status{State: report.NotBootstrapped, Why: "rules of basicfw-agent are loaded, but the desired state is lost or could not be saved",
				Next: []string{"basicfw-agent bootstrap"}, Backend: s.Backend, Warnings: []report.Warning{{Code: "state-missing", Severity: report.Critical,
					Text: "rules of basicfw-agent are loaded, but /var/lib/basicfw/state.json does not exist"}}}
		},
		"not-bootstrapped": func(s *report.Status) {
			*s = report.Status{State: report.NotBootstrapped, Why: "no desired state exists on this machine", Next: []string{"basicfw-agent bootstrap"}, Backend: s.Backend}
		},
	} {
		t.Run(name, func(t *testing.T) {
			st := protected()
			change(&st)
			var b strings.Builder
			printStatus(&b, st, now, false)
			got := b.String()
			golden := filepath.Join("testdata/status", name+".txt")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
			if len(lines) > screenLines {
				t.Errorf("%d lines", len(lines))
			}
			for _, l := range lines {
				if utf8.RuneCountInString(l) > screenWidth {
					t.Errorf("%d columns: %s", utf8.RuneCountInString(l), l)
				}
			}
			if len(st.Next) > 0 && !strings.Contains(lines[len(lines)-1], st.Next[0]) {
				t.Errorf("the last line is %q", lines[len(lines)-1])
			}
			if strings.Contains(got, "\x1b") {
				t.Error("the name of a process reached the terminal unfiltered")
			}
		})
	}
}

// TestPrintStatusIsLinear checks that twice as many listeners take about twice the work.
func TestPrintStatusIsLinear(t *testing.T) {
	work := func(n int) float64 {
		var st report.Status
		yes, no := true, false
		var sockets []system.Socket
		for i := range n {
			st.Listening = append(st.Listening, report.ListeningStatus{Proto: "tcp", Port: uint16(i), Reachable: &yes},
				report.ListeningStatus{Proto: "udp", Port: uint16(i), Reachable: &no, OpenCommand: "basicfw-agent open"})
			st.Warnings = append(st.Warnings, report.Warning{Text: "something is odd"})
			sockets = append(sockets, system.Socket{Proto: "tcp", Local: netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(i))})
		}
		if got := len(host.Listeners(append(sockets, sockets...), nil)); got != n {
			t.Errorf("%d listeners of %d", got, n)
		}
		return testing.AllocsPerRun(1, func() { printStatus(io.Discard, st, time.Time{}, false) })
	}
	if one, two := work(2500), work(5000); two > 3*one {
		t.Errorf("%.0f allocations for 2500 listeners, %.0f for 5000", one, two)
	}
}
