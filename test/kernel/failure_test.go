package kernel_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// wrap replaces an iptables program by a shell script, which finds the program in "$real"
// and gets its input.
func (m *machine) wrap(t *testing.T, name, script string) {
	t.Helper()
	path := filepath.Join(m.bin, name)
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		t.Fatal(err)
	}
	if m.netlink { // it is no link
		real = "/bin/false"
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("#!/bin/sh\nreal='%s %s'\ncase \" $* \" in *--version*) exec $real \"$@\";; esac\n%s\n", real, name, script)
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
}

// TestFailures makes iptables fail in several ways. bootstrap, and the repair of a damaged
// machine, have to exit with code 1 and one line that names the cause. No family may have
// changed.
func TestFailures(t *testing.T) {
	for _, c := range []struct {
		name   string
		script map[string]string // by program
		words  []string          // in the line on stderr
	}{
		{"the second family fails",
			map[string]string{"ip6tables-restore": "cat >/dev/null; echo 'ip6tables-restore: line 3 failed' >&2; exit 1"},
			[]string{"ipv6"}},
		{"the first family fails",
			map[string]string{"iptables-restore": "cat >/dev/null; echo 'iptables-restore: line 3 failed' >&2; exit 1"},
			[]string{"ipv4"}},
		{"a module is missing",
			map[string]string{"ip6tables-restore": `sed 's/-m hashlimit/-m nosuchmatch/' | $real "$@"`},
			[]string{"ipv6", "nosuchmatch", "basicfw-ping"}},
		{"it reports success and does nothing",
			map[string]string{"iptables-restore": "cat >/dev/null", "ip6tables-restore": "cat >/dev/null"},
			[]string{"ipv4"}},
		{"the second family does nothing",
			map[string]string{"ip6tables-restore": "cat >/dev/null"},
			[]string{"ipv6"}},
		{"it loads something else",
			map[string]string{"ip6tables-restore": `sed '/basicfw-invalid/d' | $real "$@"`},
			[]string{"ipv6", "basicfw-invalid"}},
		{"it cannot be read back",
			map[string]string{"iptables-save": "echo 'iptables-save: permission denied' >&2; exit 1"},
			[]string{"iptables-save", "permission denied"}},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			onBoth(t, func(t *testing.T, m *machine) {
				m.insist(t)
				m.load(t, ipv4, foreign(ipv4))
				m.iptables(t, ipv4, "-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")
				fails := func(args ...string) {
					t.Helper()
					before := m.everything(t)
					r := m.agent(t, args...)
					if r.Code != exitFailed {
						t.Errorf("%v: exit code %d, want %d\n%s%s", args, r.Code, exitFailed, r.Stdout, r.Stderr)
					}
					oneLine(t, r.Stderr, c.words...)
					same(t, "after the failed "+args[0], before, m.everything(t))
				}
				wrap := func() {
					for name, script := range c.script {
						m.wrap(t, name, script)
					}
				}
				unwrap := func() {
					for name := range c.script {
						path := filepath.Join(m.bin, name)
						if err := os.Remove(path); err != nil {
							t.Fatal(err)
						}
						if err := os.Symlink("/usr/sbin/"+m.multi, path); err != nil {
							t.Fatal(err)
						}
					}
				}
				wrap()
				fails("bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
				unwrap()
				m.bootstrap(t)
				for _, family := range families() {
					m.iptables(t, family, "-F", "BASICFW-INPUT")
				}
				wrap()
				fails("verify", "--repair")
				unwrap()
				m.must(t, exitOK, "verify", "--repair")
			})
		})
	}
}

// TestFileFails makes directories read-only, both those written before the rules are loaded
// and those written after.
func TestFileFails(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.load(t, ipv4, foreign(ipv4))
		m.iptables(t, ipv4, "-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")
		if m.netlink {
			m.write(t, m.keptIn()+"/main.nft", "# the administrator's\n", 0o640)
		} else {
			m.write(t, rulesFile(ipv4), "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n", 0o640)
		}
		before := m.everything(t)
		for _, dir := range []string{m.keptIn(), "/etc/basicfw", "/var/lib"} {
			undo := m.Host.ReadOnly(t, filepath.Join(m.root, dir))
			r := m.must(t, exitFailed, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
			oneLine(t, r.Stderr, dir, "read-only")
			same(t, "with "+dir+" read-only", before, m.everything(t))
			undo()
		}
		m.bootstrap(t)
	})
}

// TestLockHeld runs bootstrap while another program holds the xtables lock, which only the
// legacy variant has.
func TestLockHeld(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "legacy")
	before := m.everything(t)
	lock, err := os.Create(filepath.Join(m.root, "run/xtables.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	// Wait enforces that it ends at all.
	r := m.must(t, exitFailed, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
	oneLine(t, r.Stderr, "lock", "/run/xtables.lock")
	lock.Close()
	same(t, "after bootstrap without the lock", before, m.everything(t))
	m.bootstrap(t)
}

// TestNotRoot runs commands as an unprivileged user.
func TestNotRoot(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	before := m.everything(t)
	asNobody := func(args ...string) lab.Result {
		t.Helper()
		c := m.command(args...)
		c.UID = 65534
		return m.Host.Run(t, c)
	}
	for _, command := range []string{"bootstrap", "apply", "verify", "uninstall"} {
		r := asNobody(command)
		if r.Code != exitFailed {
			t.Errorf("%s: exit code %d\n%s%s", command, r.Code, r.Stdout, r.Stderr)
		}
		oneLine(t, r.Stderr, "root")
	}
	for _, args := range [][]string{{"version"}, {"profile", "list"}, {"user-data", "--rpm", "https://example.com/basicfw-agent.rpm"}} {
		if r := asNobody(args...); r.Code != exitOK {
			t.Errorf("%v: exit code %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
		}
	}
	same(t, "after all commands", before, m.everything(t))
}

// TestOtherManagers loads the rules of a firewall manager whose service is not there to be
// stopped: bootstrap refuses.
func TestOtherManagers(t *testing.T) {
	const ufw = `*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:PREFIX-after-input - [0:0]
:PREFIX-before-input - [0:0]
:PREFIX-user-input - [0:0]
-A INPUT -j PREFIX-before-input
-A INPUT -j PREFIX-after-input
-A PREFIX-before-input -i lo -j ACCEPT
-A PREFIX-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A PREFIX-before-input -j PREFIX-user-input
-A PREFIX-user-input -p tcp -m tcp --dport 22 -j ACCEPT
COMMIT
`
	const shorewall = `*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT DROP [0:0]
:dynamic - [0:0]
:net-fw - [0:0]
:shorewall - [0:0]
-A INPUT -i eth0 -j net-fw
-A INPUT -i lo -j ACCEPT
-A OUTPUT -j ACCEPT
-A net-fw -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A net-fw -p tcp -m tcp --dport 22 -j ACCEPT
-A net-fw -j DROP
COMMIT
`
	const firewalld = `table inet firewalld {
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		iifname "lo" accept
		tcp dport 22 accept
		reject with icmpx admin-prohibited
	}
}
`
	for name, set := range map[string]func(t *testing.T, m *machine){
		"ufw": func(t *testing.T, m *machine) {
			m.load(t, ipv4, strings.ReplaceAll(ufw, "PREFIX", "ufw"))
			m.load(t, ipv6, strings.ReplaceAll(ufw, "PREFIX", "ufw6"))
		},
		"shorewall": func(t *testing.T, m *machine) { m.load(t, ipv4, shorewall) },
		"firewalld": func(t *testing.T, m *machine) {
			if r := m.Host.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: firewalld}); r.Code != 0 {
				t.Fatal(r.Stderr)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			run := onEach
			if name != "firewalld" { // it is in iptables, where only iptables' programs can see it
				run = onBoth
			}
			run(t, func(t *testing.T, m *machine) {
				set(t, m)
				look := func() string { return m.everything(t) + m.Host.MustRun(t, "nft", "list", "ruleset") }
				before := look()
				r := m.agent(t, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
				if r.Code != exitFailed {
					t.Errorf("exit code %d, want %d\n%s%s", r.Code, exitFailed, r.Stdout, r.Stderr)
				}
				oneLine(t, r.Stderr, name)
				same(t, "after the refusal", before, look())
			})
		})
	}
}

// TestManagerAtNextBoot enables a firewall manager for the next boot without starting it.
// Below a root its units are files.
func TestManagerAtNextBoot(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		const unit, wants = "/etc/systemd/system/firewalld.service", "/etc/systemd/system/multi-user.target.wants"
		if err := os.MkdirAll(filepath.Join(m.root, wants), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/usr/lib/systemd/system/firewalld.service", filepath.Join(m.root, wants, "firewalld.service")); err != nil {
			t.Fatal(err)
		}
		m.Host.Listen(t, 22, 8080)
		before := m.everything(t)
		says(t, m.must(t, exitNotBootstrapped, "status").Stdout, "firewalld is not active, but starts at the next boot")

		m.write(t, "/etc/basicfw/agent.ini", "[agent]\non_conflict = refuse\n", 0o640)
		says(t, m.must(t, exitOK, "bootstrap", "--dry-run", "--profile", "web+mail").Stdout, "would be refused: the firewall of this machine is also managed by firewalld")
		r := m.must(t, exitFailed, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
		oneLine(t, r.Stderr, "firewalld", "nothing was changed")
		if err := os.Remove(filepath.Join(m.root, "/etc/basicfw/agent.ini")); err != nil {
			t.Fatal(err)
		}
		same(t, "after the refusal", before, m.everything(t))

		m.bootstrap(t)
		if target, err := os.Readlink(filepath.Join(m.root, unit)); target != os.DevNull {
			t.Errorf("firewalld.service links to %q: %v", target, err)
		}
		if _, err := os.Lstat(filepath.Join(m.root, wants, "firewalld.service")); err == nil {
			t.Error("firewalld.service is still started at boot")
		}
		m.wantReach(t, m.Server.V4, 22, true, false)
		m.wantReach(t, m.Server.V6, 8080, false, false)
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "uninstall")
		same(t, "after uninstall", before, m.everything(t))
	})
}

// TestWithoutIPv6 hides IPv6 from the program, which then has no IPv6 tables.
func TestWithoutIPv6(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.noIPv6 = true
		for _, name := range []string{"ip6tables", "ip6tables-save", "ip6tables-restore"} {
			m.wrap(t, name, "echo \"$0: can't initialize: Address family not supported by protocol\" >&2; exit 3")
		}
		m.bootstrap(t)
		m.wantReach(t, m.Server.V4, 22, true, false)
		m.wantReach(t, m.Server.V4, 80, true, true)
		m.wantReach(t, m.Server.V4, 8080, false, false)
		m.must(t, exitOK, "verify")
		s := m.status(t, exitOK)
		if s.Families[ipv4] == "disabled" || s.Families[ipv6] != "disabled" {
			t.Errorf("families: %v", s.Families)
		}
		m.must(t, exitOK, "uninstall")
	})
}
