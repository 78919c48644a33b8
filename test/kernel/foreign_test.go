package kernel_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// foreign returns the rules of Docker, fail2ban and tailscale as iptables-save prints them.
func foreign(family string) string {
	if family == ipv4 {
		return `*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:ts-postrouting - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -j ts-postrouting
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8088 -j DNAT --to-destination 172.17.0.2:80
-A ts-postrouting -m mark --mark 0x40000/0xff0000 -j MASQUERADE
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
:f2b-sshd - [0:0]
:ts-forward - [0:0]
:ts-input - [0:0]
-A INPUT -p tcp -m multiport --dports 22 -j f2b-sshd
-A INPUT -j ts-input
-A FORWARD -j ts-forward
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
-A f2b-sshd -s 203.0.113.9/32 -j REJECT --reject-with icmp-port-unreachable
-A f2b-sshd -j RETURN
-A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
-A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
-A ts-forward -s 100.64.0.0/10 -o tailscale0 -j DROP
-A ts-forward -o tailscale0 -j ACCEPT
-A ts-input -s 100.101.102.103/32 -i lo -j ACCEPT
-A ts-input -s 100.115.92.0/23 ! -i tailscale0 -j RETURN
-A ts-input -s 100.64.0.0/10 ! -i tailscale0 -j DROP
-A ts-input -i tailscale0 -j ACCEPT
-A ts-input -p udp -m udp --dport 41641 -j ACCEPT
COMMIT
`
	}
	return `*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:f2b-sshd - [0:0]
:ts-forward - [0:0]
:ts-input - [0:0]
-A INPUT -p tcp -m multiport --dports 22 -j f2b-sshd
-A INPUT -j ts-input
-A FORWARD -j ts-forward
-A f2b-sshd -s 2001:db8:bad::9/128 -j REJECT --reject-with icmp6-port-unreachable
-A f2b-sshd -j RETURN
-A ts-forward -i tailscale0 -j MARK --set-xmark 0x40000/0xff0000
-A ts-forward -m mark --mark 0x40000/0xff0000 -j ACCEPT
-A ts-forward -o tailscale0 -j ACCEPT
-A ts-input -s fd7a:115c:a1e0::3/128 -i lo -j ACCEPT
-A ts-input -i tailscale0 -j ACCEPT
-A ts-input -p udp -m udp --dport 41641 -j ACCEPT
COMMIT
`
}

// withoutOurs removes the program's own parts from what rules returns: its chains, the
// jump, the policies of INPUT and OUTPUT, and its table, which comes last.
func withoutOurs(rules string) string {
	rules, _, _ = strings.Cut(rules, "table inet basicfw {")
	// A table that has no other rules.
	rules = regexp.MustCompile(`(?m)^\*mangle\n(:[A-Z]+ ACCEPT\n|.*BASICFW-.*\n)+COMMIT\n?`).ReplaceAllString(rules, "")
	return strings.Join(slices.DeleteFunc(strings.Split(rules, "\n"), func(l string) bool {
		return strings.Contains(l, "BASICFW-") || strings.HasPrefix(l, ":INPUT ") || strings.HasPrefix(l, ":OUTPUT ")
	}), "\n")
}

// TestOthersRules bootstraps a machine that has rules of Docker, fail2ban and tailscale.
func TestOthersRules(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		for _, family := range families() {
			m.load(t, family, foreign(family))
		}
		before := m.rules(t)
		files := m.tree(t, false, "etc", "var")
		intact := func(when string) {
			t.Helper()
			same(t, "other programs' rules "+when, withoutOurs(before), withoutOurs(m.rules(t)))
			for _, family := range families() {
				var input []string
				for _, l := range m.filter(t, family) {
					if strings.HasPrefix(l, "-A INPUT ") {
						input = append(input, l)
					}
				}
				want := []string{"-A INPUT -p tcp -m multiport --dports 22 -j f2b-sshd", "-A INPUT -j ts-input", "-A INPUT -j BASICFW-INPUT"}
				if m.netlink { // none of our rules are in iptables
					want = want[:2]
				}
				if !slices.Equal(input, want) {
					t.Errorf("%s %s: INPUT is %q", family, when, input)
				}
			}
			m.inNoFile(t, "f2b-", "DOCKER", "docker0", "ts-", "tailscale", "203.0.113.9", "2001:db8:bad::9")
		}
		m.bootstrap(t)
		intact("after bootstrap")
		m.wantReach(t, m.Server.V4, 22, true, false)
		m.wantReach(t, m.Server.V6, 80, true, true)
		m.must(t, exitOK, "verify")
		if m.netlink {
			m.must(t, exitOK, "status")
		} else if s := m.status(t, exitDrift); !slices.Equal(s.Conditions, []string{"exposed"}) {
			t.Errorf("conditions %q", s.Conditions)
		} else { // tailscale opens its port, and accepts everything on its own interface
			says(t, s.Why, "41641/udp is open", "ts-input")
		}

		m.by(t, hand{"-D INPUT -j BASICFW-INPUT; -F BASICFW-INPUT; -P INPUT ACCEPT", byTakeAway.nft}, families()...)
		m.must(t, exitOK, "verify", "--repair")
		intact("after a repair")

		// A later ban and a later jump are no drift.
		m.iptables(t, ipv4, "-I", "f2b-sshd", "1", "-s", "203.0.113.10/32", "-j", "DROP")
		m.iptables(t, ipv6, "-N", "f2b-web")
		m.iptables(t, ipv6, "-I", "INPUT", "1", "-p", "tcp", "-j", "f2b-web")
		m.must(t, exitOK, "verify")
		m.iptables(t, ipv4, "-D", "f2b-sshd", "1")
		m.iptables(t, ipv6, "-D", "INPUT", "1")
		m.iptables(t, ipv6, "-X", "f2b-web")

		m.must(t, exitOK, "uninstall")
		same(t, "rules after uninstall", before, m.rules(t))
		same(t, "files after uninstall", files, m.tree(t, false, "etc", "var"))
	})
}

// inNoFile fails if a file that the program wrote contains one of the words.
func (m *machine) inNoFile(t *testing.T, words ...string) {
	t.Helper()
	err := filepath.WalkDir(m.root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if strings.HasSuffix(path, "/etc/motd.d/basicfw") {
			return err // it may name a chain for rules
		}
		for _, w := range words {
			if strings.Contains(string(data), w) {
				t.Errorf("%s has %q in it", strings.TrimPrefix(path, m.root), w)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestOwnersFile starts with a rules file that the administrator maintains, into which our
// rules are merged. The nf_tables file is ours alone.
func TestOwnersFile(t *testing.T) {
	const owners = `# kept by hand, do not touch
*nat
:PREROUTING ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
# the office's printer
-A PREROUTING -i eth1 -p tcp --dport 9100 -j DNAT --to-destination 10.0.0.9
-A POSTROUTING -s 10.0.0.0/24 -o eth0 -j MASQUERADE
COMMIT
*mangle
:FORWARD ACCEPT [0:0]
-A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:OFFICE - [0:0]
-A INPUT -m state --state ESTABLISHED,RELATED -j ACCEPT
-A INPUT -p tcp --dport 22 -j ACCEPT
-A INPUT -j REJECT
-A FORWARD -i eth1 -o eth0 -j OFFICE
-A FORWARD -m state --state ESTABLISHED,RELATED -j ACCEPT
-A OFFICE -p tcp --dport 443 -m comment --comment "the web, no more" -j ACCEPT
COMMIT
# end
`
	onBoth(t, func(t *testing.T, m *machine) {
		m.write(t, rulesFile(ipv4), owners, 0o640)
		m.load(t, ipv4, owners)
		before := m.everything(t)
		m.bootstrap(t)
		text := "\n" + m.read(t, rulesFile(ipv4))
		for _, part := range []string{
			owners[:strings.Index(owners, "*mangle")], // *nat, with its comments
			"-A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu\n", "-A FORWARD -j BASICFW-FORWARD\n",
			":FORWARD DROP [0:0]\n", ":OFFICE - [0:0]\n", "# end\n",
			"-A FORWARD -i eth1 -o eth0 -j OFFICE\n-A FORWARD -m state --state ESTABLISHED,RELATED -j ACCEPT\n" +
				"-A OFFICE -p tcp --dport 443 -m comment --comment \"the web, no more\" -j ACCEPT\n",
			":INPUT DROP [0:0]\n", "-A INPUT -j BASICFW-INPUT\n",
		} {
			if !strings.Contains(text, "\n"+part) {
				t.Errorf("changed or missing in the file:\n%s", part)
			}
		}
		for _, part := range []string{"--dport 22 -j ACCEPT", "-A INPUT -j REJECT"} {
			if strings.Contains(text, part) {
				t.Errorf("still in the file: %s", part)
			}
		}
		m.must(t, exitOK, "verify")

		other := newMachine(t, strings.Split(m.multi, "-")[1])
		other.load(t, ipv4, text)
		if live := m.filter(t, ipv4); !slices.Equal(live, other.filter(t, ipv4)) {
			t.Errorf("the file loads other rules:%s", difference(strings.Join(live, "\n"), strings.Join(other.filter(t, ipv4), "\n")))
		}

		m.must(t, exitOK, "uninstall")
		same(t, "after uninstall", before, m.everything(t))
	})
}

// TestUninstall uninstalls after other programs have changed iptables.
func TestUninstall(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.write(t, "/etc/basicfw/agent.ini", "[agent]\nprofile = web-only\n", 0o640)
		m.load(t, ipv4, "*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n:OUTPUT DROP [0:0]\n"+
			"-A INPUT -i lo -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n-A OUTPUT -j ACCEPT\nCOMMIT\n")
		before := m.everything(t)
		v4 := m.filter(t, ipv4)
		m.must(t, exitOK, "bootstrap", "--client-ip", m.Client.String(), "--no-service")
		m.wantReach(t, m.Server.V4, 8080, false, false)

		t.Log("nothing else changed")
		m.must(t, exitOK, "uninstall")
		same(t, "after uninstall", before, m.everything(t))
		m.must(t, exitNotBootstrapped, "status")

		t.Log("another program added a jump, a rule, a chain and a table")
		m.must(t, exitOK, "bootstrap", "--client-ip", m.Client.String(), "--no-service")
		m.iptables(t, ipv4, "-N", "f2b-sshd")
		m.iptables(t, ipv4, "-I", "INPUT", "1", "-p", "tcp", "-j", "f2b-sshd")
		m.iptables(t, ipv4, "-A", "FORWARD", "-i", "docker0", "-j", "ACCEPT")
		m.iptables(t, ipv4, "-t", "nat", "-A", "POSTROUTING", "-s", "172.17.0.0/16", "-j", "MASQUERADE")
		m.must(t, exitOK, "uninstall")
		want := slices.Clone(v4)
		want = slices.Insert(want, slices.Index(want, ":OUTPUT DROP")+1, ":f2b-sshd -")
		want = slices.Insert(want, slices.Index(want, "-A INPUT -i lo -j ACCEPT"), "-A INPUT -p tcp -j f2b-sshd")
		want = slices.Insert(want, slices.Index(want, "-A OUTPUT -j ACCEPT"), "-A FORWARD -i docker0 -j ACCEPT")
		if got := m.filter(t, ipv4); !slices.Equal(got, want) {
			t.Errorf("rules after uninstall:%s", difference(strings.Join(want, "\n"), strings.Join(got, "\n")))
		}
		if !strings.Contains(m.rules(t), "-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE") {
			t.Error("a rule of another table is gone")
		}

		t.Log("a second uninstall has nothing to restore")
		r := m.agent(t, "uninstall")
		if r.Code != exitOK && r.Code != exitNotBootstrapped {
			t.Errorf("uninstall of nothing: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
	})
}

// TestInputOfAllKinds starts with an INPUT in which terminal and other rules alternate.
// Legacy iptables cannot delete some of them by what it prints.
//
// Terminal rules are removed with iptables' programs. TestBesideStock covers this over
// netlink, with working iptables programs.
func TestInputOfAllKinds(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.iptables(t, ipv4, "-N", "GUARD")
		for _, rule := range []string{
			"-i lo -j ACCEPT",
			"-m limit --limit 5/min -j LOG",
			"-p tcp --dport 22 -m recent --name SSH --set",
			"-p tcp --dport 22 -m recent --name SSH --update --seconds 60 --hitcount 4 -j DROP",
			"-p tcp -j GUARD",
			"-p tcp --dport 22 -m hashlimit --hashlimit-upto 3/min --hashlimit-mode srcip --hashlimit-name q -j ACCEPT",
			`-p tcp --dport 22 -m comment --comment it's"quoted" -j ACCEPT`,
			"-j REJECT",
		} {
			m.iptables(t, ipv4, append([]string{"-A", "INPUT"}, strings.Fields(rule)...)...)
		}
		before := m.everything(t)
		m.bootstrap(t)
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "uninstall")
		same(t, "after uninstall", before, m.everything(t))
	})
}
