package kernel_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestBootstrapAgain runs bootstrap on a machine that has it behind it.
func TestBootstrapAgain(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		first := m.bootstrap(t)
		rules, files := m.rules(t), m.tree(t, true, "etc", "var")
		// A rule that is loaded again begins to count anew.
		m.Host.Listen(t, 80)
		if err := m.Outsider.Reach(m.Stranger.V4, m.Server.V4, 80, lab.Patient); err != nil {
			t.Fatal(err)
		}
		counted := m.count(t, ipv4, "basicfw-http ")
		if counted == "[0:0]" {
			t.Fatal("a visit to port 80 is not counted")
		}

		second := m.bootstrap(t)
		same(t, "rules after the second bootstrap", rules, m.rules(t))
		same(t, "files after the second bootstrap", files, m.tree(t, true, "etc", "var"))
		if got := m.count(t, ipv4, "basicfw-http "); got != counted {
			t.Errorf("rules were loaded again: port 80 has counted %s, and now %s", counted, got)
		}
		says(t, second.Stdout, "nothing")
		if first.Stdout == second.Stdout {
			t.Errorf("both say the same: %q", first.Stdout)
		}
	})
}

// count gives what a rule has counted, as iptables-save -c prints it.
func (m *machine) count(t *testing.T, family, comment string) string {
	t.Helper()
	for _, l := range strings.Split(m.Host.MustRun(t, m.multi, tables(family)+"-save", "-c", "-t", "filter"), "\n") {
		if strings.Contains(l, comment) {
			return strings.Fields(l)[0]
		}
	}
	t.Fatalf("no rule %s", comment)
	return ""
}

// TestTwoBootstraps runs two at once: cloud-init and an impatient person.
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

// TestPersistedFiles loads the files that bootstrap wrote on another machine,
// where the program never ran.
func TestPersistedFiles(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		other := newMachine(t, strings.Split(m.multi, "-")[1])
		other.Host.Listen(t, 22, 80, 8080)
		for _, family := range families() {
			other.load(t, family, m.read(t, rulesFile(family)))
		}
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

// TestFiles looks at what bootstrap leaves on disk, and that uninstall leaves
// nothing.
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
				for path, mode := range map[string]os.FileMode{
					c.files[0]: 0o600, c.files[1]: 0o600, "/etc/basicfw/local.ini": 0o600,
					"/var/lib/basicfw": 0o700 | os.ModeDir, "/var/lib/basicfw/state.json": 0o600,
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
				// The directory for the rules is another test's.
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

// TestAutoProfile has the program choose the profile by what listens.
func TestAutoProfile(t *testing.T) {
	for _, c := range []struct {
		name, address, want string
	}{
		{"nothing", "", "web-only"},
		{"a mail server for all", "0.0.0.0:25", "web+mail"},
		{"a mail server for all over IPv6", "[::]:993", "web+mail"},
		{"a mail server for itself", "127.0.0.1:25", "web-only"},
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
				t.Errorf("chose %q, because: %s", s.Profile.Name, s.Profile.Reason)
			}
		})
	}
}
