package kernel_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestNoIptables bootstraps with `backend = iptables` on a machine without
// iptables.
func TestNoIptables(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	m.insist(t)
	before := m.everything(t)
	c := m.command("bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
	c.Env = []string{"PATH=" + t.TempDir()}
	r := m.Host.Run(t, c)
	if r.Code != exitFailed {
		t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	oneLine(t, r.Stderr, "install", "iptables")
	same(t, "without iptables", before, m.everything(t))
}

// TestLinkedFile replaces a persisted file by a symbolic link, whose target must
// not be written to.
func TestLinkedFile(t *testing.T) {
	on(t, told, testLinkedFile)
}

func testLinkedFile(t *testing.T, m *machine) {
	m.bootstrap(t)
	files := m.tree(t, false, "etc")
	path := filepath.Join(m.root, m.keptOf(ipv4))
	elsewhere := filepath.Join(m.root, "usr/elsewhere")
	const text = "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
	m.write(t, "/usr/elsewhere", text, 0o600)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, path); err != nil {
		t.Fatal(err)
	}
	if r := m.must(t, exitDrift, "verify"); !named(r.Stdout, []string{m.keptOf(ipv4)}) {
		t.Errorf("verify does not name the file: %s", r.Stdout)
	}
	m.must(t, exitOK, "verify", "--repair")
	same(t, "files after the repair", files, m.tree(t, false, "etc"))
	if got := m.read(t, "/usr/elsewhere"); got != text {
		t.Errorf("the link was followed: %q", got)
	}
}

// TestUninstallFails makes iptables fail during uninstall. What bootstrap removed from
// INPUT must not be restored while our rules stay.
//
// It covers iptables only: over netlink uninstall is one transaction, which TestFaults
// breaks.
func TestUninstallFails(t *testing.T) {
	for name, script := range map[string]string{
		"the second family fails":        "cat >/dev/null; echo 'ip6tables-restore: line 3 failed' >&2; exit 1",
		"the second family does nothing": "cat >/dev/null",
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			onBoth(t, func(t *testing.T, m *machine) {
				m.Host.Listen(t, 22)
				m.iptables(t, ipv4, "-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")
				m.bootstrap(t)
				m.wantReach(t, m.Server.V4, 22, true, false)
				before := m.everything(t)
				m.wrap(t, "ip6tables-restore", script)
				r := m.must(t, exitFailed, "uninstall")
				oneLine(t, r.Stderr, "ipv6")
				same(t, "after the failed uninstall", before, m.everything(t))
				m.wantReach(t, m.Server.V4, 22, true, false)
			})
		})
	}
}

// TestWideOpen checks what status and verify report if every port is open,
// whatever opened them. With nftables another program's rule opens nothing, which
// TestBesideAccept covers.
func TestWideOpen(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 8080)
		m.bootstrap(t)
		// In nf_tables all packets pass one chain, which ends in a rule that
		// drops and also has a policy.
		base := "flush chain inet basicfw input; add rule inet basicfw input meta nfproto vmap { ipv4 : jump ipv4-input, ipv6 : jump ipv6-input }; " + byPolicy.nft
		for _, c := range []struct {
			name string
			do   hand
			undo string // with iptables
		}{
			{"a policy", hand{"-P INPUT ACCEPT", base}, ""},
			{"a policy and our chain empty", hand{"-P INPUT ACCEPT; -F BASICFW-INPUT", base + "; " + byFlushOurs.nft}, ""},
			{"a rule in our chain", hand{"-I BASICFW-INPUT 1 -j ACCEPT", "insert rule inet basicfw FAMILY-input accept"}, ""},
			{"a rule for all TCP in our chain", hand{"-I BASICFW-INPUT 1 -p tcp -j ACCEPT", "insert rule inet basicfw FAMILY-input ip protocol tcp accept"}, ""},
			{"another program's rule", hand{"-I INPUT 1 -j ACCEPT", ""}, "-D INPUT 1"},
			{"another program's rule for all TCP", hand{"-I INPUT 1 -p tcp -j ACCEPT", ""}, "-D INPUT 1"},
		} {
			if m.netlink && c.do.nft == "" {
				continue
			}
			m.by(t, c.do, ipv4)
			m.wantReach(t, m.Server.V4, 8080, true, true)
			other := "protected"
			if strings.HasPrefix(c.do.nft, base) && m.netlink {
				other = "unprotected"
			}
			if s := m.status(t, exitDrift); s.State != "unprotected" || s.Families[ipv4] != "unprotected" || s.Families[ipv6] != other {
				t.Errorf("%s: state %q, families %v", c.name, s.State, s.Families)
			}
			m.must(t, exitDrift, "verify")
			if c.undo != "" { // repair leaves other programs' rules
				m.iptables(t, ipv4, strings.Fields(c.undo)...)
			}
			m.must(t, exitOK, "verify", "--repair")
			m.must(t, exitOK, "verify")
		}
	})
}

// TestRulesDirectory starts without a directory for the rules.
func TestRulesDirectory(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	if err := os.Remove(filepath.Join(m.root, "etc/sysconfig")); err != nil {
		t.Fatal(err)
	}
	before := m.everything(t)
	m.bootstrap(t)
	m.must(t, exitOK, "uninstall")
	same(t, "after uninstall", before, m.everything(t))
}

// TestErased erases the package with an rpm that runs scriptlets in their own network
// namespace, as rpm 6 does. The machine's rules must be removed, not those of the
// namespace.
func TestErased(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		before := m.everything(t)
		m.bootstrap(t)
		erase := m.command("package-erased")
		erase.Args = append([]string{"sh", "-c", `unshare -n "$@" $$; exit $?`, "rpm"}, erase.Args...)
		if r := m.Host.Run(t, erase); r.Code != exitOK || !strings.Contains(r.Stdout, "previous firewall restored") {
			t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		same(t, "after the package was erased", before, m.everything(t))
		m.must(t, exitFailed, "package-erased", "4194305") // no such process
		m.must(t, exitUsage, "package-erased", "rpm")
	})
}

// TestBadInputCorners is TestBadInput for less obvious mistakes.
func TestBadInputCorners(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	for _, in := range []badInput{
		{name: "an option as an interface",
			files: map[string]string{"agent.ini": "[interfaces]\ntrusted = eth0 -j ACCEPT\n"},
			want:  []string{"agent.ini:2"}},
		{name: "an option as the interface of a service",
			files: map[string]string{"agent.ini": "[open]\na = 80/tcp on -j\n"},
			want:  []string{"agent.ini:2"}},
		{name: "sshd's port as a service",
			files: map[string]string{"agent.ini": "[open]\na = 22/tcp\n"},
			want:  []string{"agent.ini:2.*22"}},
	} {
		in.put(t, m)
		before := m.everything(t)
		r := m.agent(t, "bootstrap", "--no-service")
		in.check(t, r.Code, r.Stdout, r.Stderr)
		if after := m.everything(t); after != before {
			t.Errorf("%s: something changed:%s", in.name, short(difference(before, after)))
			m.must(t, exitOK, "uninstall")
		}
	}
}
