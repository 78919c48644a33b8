package kernel_test

import (
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestBootstrapAgain runs bootstrap on a machine that is already bootstrapped.
func TestBootstrapAgain(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		first := m.bootstrap(t)
		rules, files := m.rules(t), m.tree(t, true, "etc", "var")
		// A rule that is loaded again starts counting from zero.
		m.Host.Listen(t, 80)
		if err := m.Outsider.Reach(m.Stranger.V4, m.Server.V4, 80, lab.Patient); err != nil {
			t.Fatal(err)
		}
		counted := m.count(t, ipv4, "http")
		if counted == "[0:0]" {
			t.Fatal("a visit to port 80 is not counted")
		}

		second := m.bootstrap(t)
		same(t, "rules after the second bootstrap", rules, m.rules(t))
		same(t, "files after the second bootstrap", files, m.tree(t, true, "etc", "var"))
		if got := m.count(t, ipv4, "http"); got != counted {
			t.Errorf("rules were loaded again: the counter of port 80 was %s, now %s", counted, got)
		}
		says(t, second.Stdout, "nothing")
		if first.Stdout == second.Stdout {
			t.Errorf("both print the same: %q", first.Stdout)
		}
	})
}

// count returns the counters of a rule as iptables-save -c prints them.
func (m *machine) count(t *testing.T, family, name string) string {
	t.Helper()
	if m.netlink {
		text := m.Host.MustRun(t, "nft", "list", "chain", "inet", "basicfw", family+"-input")
		counted := regexp.MustCompile(`counter packets (\d+) bytes (\d+) .*` + m.comment(name)).FindStringSubmatch(text)
		if counted == nil {
			t.Fatalf("no rule %s", name)
		}
		return "[" + counted[1] + ":" + counted[2] + "]"
	}
	for _, l := range strings.Split(m.Host.MustRun(t, m.multi, tables(family)+"-save", "-c", "-t", "filter"), "\n") {
		if strings.Contains(l, m.comment(name)) {
			return strings.Fields(l)[0]
		}
	}
	t.Fatalf("no rule %s", name)
	return ""
}

// TestTwoBootstraps runs two at once, as cloud-init and an impatient administrator do.
func TestTwoBootstraps(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		var both []*lab.Process
		for range 2 {
			both = append(both, m.start(t, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service"))
		}
		said := 0
		for _, p := range both {
			r := p.Wait(t)
			if r.Code != exitOK {
				t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
			}
			if strings.Contains(strings.ToLower(r.Stdout), "nothing") {
				said++
			}
		}
		if said != 1 {
			t.Errorf("%d of two say that there was nothing to change, want 1", said)
		}
		m.must(t, exitOK, "verify")
	})
}

// TestPersistedFiles loads the files that bootstrap wrote on a machine where the
// program never ran.
func TestPersistedFiles(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		other := newMachine(t, m.variant())
		other.Host.Listen(t, 22, 80, 8080)
		other.loadKept(t, m)
		same(t, "rules from the files", m.rules(t), other.rules(t))
		for _, to := range other.Server.Both() {
			for _, from := range []lab.Addrs{other.Client, other.Stranger} {
				got := other.Outsider.Nmap(t, from.Like(to), to, "1-10000")
				want := map[uint16]string{0: "filtered", 80: "open", 22: "open"}
				for _, p := range webAndMail() {
					if p != 80 {
						want[p] = "closed"
					}
				}
				if from == other.Stranger {
					delete(want, 22)
				}
				if len(got) != len(want) {
					t.Errorf("from %v to %v: %v, want %v", from, to, got, want)
				}
				for port, p := range got {
					if p.State != want[port] {
						t.Errorf("from %v to %v: port %d is %v, want %s", from, to, port, p, want[port])
					}
				}
			}
		}
	})
}

// TestFiles checks the files that bootstrap writes, and that uninstall leaves
// none.
func TestFiles(t *testing.T) {
	for _, c := range []struct {
		name, dir string
		files     []string
	}{
		{"iptables-services", "/etc/sysconfig", []string{"/etc/sysconfig/iptables", "/etc/sysconfig/ip6tables"}},
		{"netfilter-persistent", "", []string{"/etc/iptables/rules.v4", "/etc/iptables/rules.v6"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			onEach(t, func(t *testing.T, m *machine) {
				if c.dir == "" {
					if err := os.Remove(filepath.Join(m.root, "etc/sysconfig")); err != nil {
						t.Fatal(err)
					}
				}
				before := m.tree(t, false, "etc", "var", "usr", "run")
				m.bootstrap(t)
				kept := c.files
				if m.netlink {
					kept = []string{tableFile, tableFile}
				}
				for path, mode := range map[string]os.FileMode{
					kept[0]: 0o600, kept[1]: 0o600, "/etc/basicfw/local.ini": 0o600,
					"/var/lib/basicfw": 0o700 | os.ModeDir, stateFile: 0o600, copyFile: 0o600,
				} {
					if fi, err := os.Stat(filepath.Join(m.root, path)); err != nil || fi.Mode() != mode {
						t.Errorf("%s: %v, %v; want %v", path, fi, err, mode)
					}
				}
				m.must(t, exitOK, "verify")
				m.must(t, exitOK, "uninstall")
				// iptables leaves its lock file.
				if err := os.RemoveAll(filepath.Join(m.root, "run/xtables.lock")); err != nil {
					t.Fatal(err)
				}
				// TestRulesDirectory covers the directory of the rules.
				if c.dir == "" {
					if err := os.Remove(filepath.Join(m.root, "etc/iptables")); err != nil && !os.IsNotExist(err) {
						t.Fatal(err)
					}
				}
				same(t, "files after uninstall", before, m.tree(t, false, "etc", "var", "usr", "run"))
			})
		})
	}
}

// TestAutoProfile checks that the profile is chosen by what listens.
func TestAutoProfile(t *testing.T) {
	for _, c := range []struct {
		name, address, want string
	}{
		{"nothing", "", "web-only"},
		{"a mail server on all addresses", "0.0.0.0:25", "web+mail"},
		{"a mail server on all IPv6 addresses", "[::]:993", "web+mail"},
		{"a mail server on loopback", "127.0.0.1:25", "web-only"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, "nft")
			if c.address != "" {
				err := m.Host.Do(func() error {
					l, err := net.Listen("tcp", c.address)
					if err == nil {
						t.Cleanup(func() { l.Close() })
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			m.must(t, exitOK, "bootstrap", "--client-ip", m.Client.String(), "--no-service")
			s := m.status(t, exitOK)
			if s.Profile.Name != c.want || s.Profile.Reason == "" {
				t.Errorf("chose %q, reason: %s", s.Profile.Name, s.Profile.Reason)
			}
		})
	}
}
