package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

var update = flag.Bool("update", false, "write the golden files anew")

// Whatever the state, it fits a screen of 80 by 24, with the verdict first and
// the next command last.
func TestPrintStatus(t *testing.T) {
	now := time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC)
	verified := now.Add(-7 * time.Minute)
	protected := func() agent.Status {
		return agent.Status{
			State:   agent.Protected,
			Profile: store.Choice{Name: "web+mail", Source: "detected", Reason: "postfix listened on the mail port 25 at bootstrap"},
			Backend: agent.BackendStatus{Name: "iptables", Reason: "iptables 1.8.9 (nf_tables); it takes these rules on this machine"},
			SSH: agent.SSHStatus{Ports: []uint16{22}, Mode: "pinned", Allow: []string{"203.0.113.9", "2001:db8:1::/64"}, Source: "named",
				Reason: "named by /etc/basicfw/local.ini", You: "203.0.113.9", YouMay: true, YouWhy: "named by /etc/basicfw/local.ini"},
			Interfaces: []firewall.Interface{{Name: "lo", Zone: "loopback"}, {Name: "eth0", Zone: "public"}, {Name: "eth1", Zone: "private"}, {Name: "docker0", Zone: "virtual"}},
			Open: []agent.OpenStatus{{Name: "http", Ports: "80", Proto: "tcp", Zone: "any"}, {Name: "https", Ports: "443", Proto: "tcp", Zone: "any"},
				{Name: "db", Ports: "5432", Proto: "tcp", Zone: "private", From: []string{"10.0.0.0/8"}}},
			Listening: []agent.ListeningStatus{{Proto: "tcp", Port: 80, Process: "nginx", Reachable: true}, {Proto: "tcp", Port: 443, Process: "nginx", Reachable: true},
				{Proto: "tcp", Port: 3306, Process: "mariadbd", OpenWith: "basicfw-agent open 3306/tcp"}},
			Families:     agent.FamiliesStatus{IPv4: agent.Protected, IPv6: agent.Protected},
			Persisted:    []agent.PersistedFile{{Path: "/etc/sysconfig/iptables", OK: true}, {Path: "/etc/sysconfig/ip6tables", OK: true}},
			Service:      agent.ServiceStatus{Registered: true, Enabled: true, Active: true},
			Conntrack:    agent.ConntrackUse{Count: 12, Max: 65536},
			LastVerified: &verified,
		}
	}
	many := func(n int, line string) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprintf("%s %d", line, i))
		}
		return out
	}
	for name, change := range map[string]func(*agent.Status){
		"protected": func(*agent.Status) {},
		"no-ipv6":   func(s *agent.Status) { s.Families.IPv6 = "disabled" },
		"bypass": func(s *agent.Status) {
			s.Bypass = []firewall.Bypass{{Family: "ipv4", Proto: "tcp", Port: "5432", To: "172.17.0.2:5432", By: "nat DOCKER", Program: "Docker"},
				{Family: "ipv6", Proto: "tcp", Port: "5432", To: "[fd00:d0c::242:ac11:2]:5432", By: "nat DOCKER", Program: "Docker"}}
		},
		"bypass-many": func(s *agent.Status) {
			s.Bypass = []firewall.Bypass{{Family: "ipv4", Proto: "tcp", Port: "80", On: "203.0.113.1", To: "10.88.0.2:8080", By: "nat NETAVARK-DN-1D8721804F16F", Program: "podman"},
				{Family: "ipv4", Proto: "udp", Port: "8000-8010", To: "10.88.0.3", By: "t pre"}, {Family: "ipv4", Proto: "udp", Port: "8005", To: "10.88.0.4", By: "t pre"}}
		},
		"limited": func(s *agent.Status) {
			s.SSH = agent.SSHStatus{Ports: []uint16{22, 2222}, Mode: "limited", Limit: "30/min", Source: "none", Reason: "no client was named, and nobody who may become root was logged in over SSH"}
			s.Warnings = []string{"SSH is open to any address: no client was named, and nobody who may become root was logged in over SSH"}
			s.Next = []string{"basicfw-agent ssh allow YOUR-ADDRESS"}
		},
		"probation": func(s *agent.Status) {
			by := now.Add(30 * time.Minute)
			s.SSH = agent.SSHStatus{Ports: []uint16{22}, Mode: agent.Probation, ConfirmBy: &by, Limit: "30/min", Allow: []string{"203.0.113.9"}, Source: "session",
				Reason: "the SSH session that bootstrap ran in came from there", You: "203.0.113.9", YouMay: true, YouWhy: "the SSH session that bootstrap ran in came from there"}
			s.Warnings = []string{"SSH opens to any address at 2026-11-23T10:30:00Z, unless somebody logs in anew from 203.0.113.9"}
			s.Next = []string{"basicfw-agent confirm"}
		},
		"unconfirmed": func(s *agent.Status) {
			s.SSH = agent.SSHStatus{Ports: []uint16{22}, Mode: "limited", Limit: "30/min", Allow: []string{"203.0.113.9"}, Source: "unconfirmed",
				Reason: "the SSH session that bootstrap ran in came from there, but no new login from there came in time"}
			s.Warnings = []string{"SSH is open to any address: the SSH session that bootstrap ran in came from there, but no new login from there came in time"}
			s.Next = []string{"basicfw-agent ssh allow YOUR-ADDRESS"}
		},
		"for-a-while": func(s *agent.Status) {
			s.SSH.Allow = append(s.SSH.Allow, "198.51.100.7")
			s.SSH.Timed = []agent.TimedSource{{From: "198.51.100.7", Until: now.Add(8 * time.Hour)}}
			s.SSH.You, s.SSH.YouWhy = "198.51.100.7", "until 2026-11-23T18:00:00Z, allowed by /etc/basicfw/local.ini"
			end := now.Add(time.Hour)
			s.Open = append(s.Open, agent.OpenStatus{Name: "udp-9000", Ports: "9000", Proto: "udp", Zone: "any", Until: &end})
		},
		"shut-out": func(s *agent.Status) {
			s.SSH.You, s.SSH.YouMay, s.SSH.YouWhy = "198.51.100.7", false, "only 203.0.113.9, 2001:db8:1::/64 may"
			s.Warnings = []string{"you come from 198.51.100.7, which may not log in again"}
			s.Next = []string{"basicfw-agent ssh allow me"}
		},
		"unlocked": func(s *agent.Status) {
			s.State, s.SSH.Mode, s.Unlock = agent.Unlocked, "unlocked", &agent.UnlockStatus{Until: now.Add(15 * time.Minute)}
			s.SSH.You, s.SSH.YouMay, s.SSH.YouWhy = "198.51.100.7", false, "only 203.0.113.9, 2001:db8:1::/64 may"
			s.Warnings = []string{"you come from 198.51.100.7, which may not log in again"}
			s.Next = []string{"basicfw-agent ssh allow me", "basicfw-agent lock"}
		},
		"pending": func(s *agent.Status) {
			s.State, s.Pending = agent.PendingState, &agent.PendingStatus{Until: now.Add(5 * time.Minute)}
			s.Next = []string{"basicfw-agent confirm"}
		},
		"taken-back": func(s *agent.Status) {
			s.Warnings = []string{"the change of 2026-11-23 09:50:00 UTC was taken back: nobody confirmed it within 5m0s"}
			s.Next = []string{"basicfw-agent plan"}
		},
		"unlocked-all": func(s *agent.Status) {
			s.State, s.SSH.Mode, s.Unlock = agent.Unlocked, "unlocked", &agent.UnlockStatus{Until: now.Add(15 * time.Minute), All: true}
			s.SSH.You = ""
			s.Next = []string{"basicfw-agent lock"}
		},
		"nobody": func(s *agent.Status) {
			s.SSH = agent.SSHStatus{Ports: []uint16{22}, Mode: "pinned", Source: "settings", Reason: "allowed by /etc/basicfw/local.ini"}
			s.Warnings = []string{"SSH is for nobody: only the console is a way in"}
			s.Next = []string{"basicfw-agent ssh allow YOUR-ADDRESS"}
		},
		"mail-closed": func(s *agent.Status) {
			s.Listening = append(s.Listening, agent.ListeningStatus{Proto: "tcp", Port: 25, Process: "master", OpenWith: "basicfw-agent bootstrap --profile web+mail"},
				agent.ListeningStatus{Proto: "udp", Port: 5353, Process: "avahi-daemon", OpenWith: "basicfw-agent open 5353/udp"})
		},
		"no-service": func(s *agent.Status) { s.Service = agent.ServiceStatus{} },
		"failsafe": func(s *agent.Status) {
			s.State, s.Open = agent.FailsafeState, nil
			s.Why = "closed, but not by your settings: /etc/basicfw/agent.ini:3: agent.profil: unknown key"
			s.Next = []string{"basicfw-agent bootstrap"}
		},
		"drifted": func(s *agent.Status) {
			s.State, s.Why = agent.Drifted, "ipv4: our rules are gone and INPUT drops all: no port answers, SSH neither"
			for i := range 40 {
				s.Drift = append(s.Drift, firewall.Drift{Family: "ipv4", Chain: firewall.InputChain, Kind: firewall.Missing,
					Want: fmt.Sprintf("-p tcp -m tcp --dport %d -m conntrack --ctstate NEW -m comment --comment basicfw-s -j ACCEPT", i)})
				s.Foreign = append(s.Foreign, firewall.Foreign{Family: "ipv4", Chain: "INPUT", Rule: fmt.Sprintf("-s 10.0.0.%d/32 -j ACCEPT", i), Effect: "accepts what it matches, whatever the profile says"})
			}
			s.Warnings = many(30, "something is odd")
			s.Listening = nil
			for i := range 60 {
				s.Listening = append(s.Listening, agent.ListeningStatus{Proto: "tcp", Port: uint16(3000 + i), Process: "java\x1b[31m", OpenWith: fmt.Sprintf("basicfw-agent open %d/tcp", 3000+i)})
				s.Interfaces = append(s.Interfaces, firewall.Interface{Name: fmt.Sprintf("veth%d", i), Zone: "virtual"})
				s.Open = append(s.Open, agent.OpenStatus{Name: fmt.Sprintf("s%d", i), Ports: "80", Proto: "tcp", Zone: "any"})
				s.SSH.Allow = append(s.SSH.Allow, fmt.Sprintf("203.0.113.%d", i))
				s.Bypass = append(s.Bypass, firewall.Bypass{Family: "ipv4", Proto: "tcp", Port: "5432", To: "172.17.0.2", By: "nat DOCKER"})
			}
			s.Next = []string{"basicfw-agent verify --repair"}
		},
		"unprotected": func(s *agent.Status) {
			s.State, s.Why = agent.Unprotected, `ipv4: "-j ACCEPT" in INPUT accepts new connections to every port`
			s.Foreign = []firewall.Foreign{{Family: "ipv4", Chain: "INPUT", Rule: "-j ACCEPT", Effect: "accepts new connections to every port", Admits: true}}
			s.Next = []string{"iptables -D INPUT -j ACCEPT"}
		},
		"foreign": func(s *agent.Status) {
			s.Foreign = []firewall.Foreign{{Family: "ipv4", Chain: "INPUT", Rule: "-p tcp -m tcp --dport 8080 -j ACCEPT", Effect: "accepts what it matches, whatever the profile says", Admits: true}}
		},
		"state-lost": func(s *agent.Status) {
			*s = agent.Status{State: agent.Drifted, Why: "what was decided cannot be read: reading /var/lib/basicfw/state.json: unexpected EOF", Next: []string{"basicfw-agent bootstrap"}}
		},
		"not-bootstrapped": func(s *agent.Status) {
			*s = agent.Status{State: agent.NotBootstrapped, Why: "this machine was not closed by basicfw-agent yet", Next: []string{"basicfw-agent bootstrap"}, Backend: s.Backend}
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
					t.Errorf("%d wide: %s", utf8.RuneCountInString(l), l)
				}
			}
			if len(st.Next) > 0 && !strings.Contains(lines[len(lines)-1], st.Next[0]) {
				t.Errorf("the last line is %q", lines[len(lines)-1])
			}
			if strings.Contains(got, "\x1b") {
				t.Error("a process's name reached the terminal as it is")
			}
		})
	}
}
