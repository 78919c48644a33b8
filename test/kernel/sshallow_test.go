package kernel_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// list returns the line of "ssh list" for an address, or "".
func (m *machine) list(t *testing.T, address string) string {
	t.Helper()
	for _, l := range strings.Split(m.must(t, exitOK, "ssh", "list").Stdout, "\n") {
		if slices.Contains(strings.Fields(l), address) {
			return l
		}
	}
	return ""
}

// wantAllowed fails unless "allow" in local.ini has exactly these entries.
func (m *machine) wantAllowed(t *testing.T, want ...string) {
	t.Helper()
	var got []string
	for _, entry := range strings.Split(setting(m.read(t, localINI), "ssh", "allow"), ",") {
		got = append(got, strings.TrimSpace(entry))
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("local.ini allows %q, want %q", got, want)
	}
}

// TestSSHAllow allows and removes further addresses on a machine that knows its client.
func TestSSHAllow(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80)
		m.bootstrap(t)
		before := m.rules(t)
		m.wantOpen(t, map[string]string{"80/tcp": everybody, "22/tcp": "client4 client6"})
		stranger, network := m.Stranger.V4.String(), "2001:db8:0:2::/64"

		says(t, m.must(t, exitOK, "ssh", "allow", stranger).Stdout, stranger)
		m.wantAllowed(t, "client", stranger)
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6 stranger4"})
		m.untouched(t, "ssh", "allow", stranger)
		m.must(t, exitOK, "ssh", "allow", network, "203.0.113.0/24", "--for", "2h")
		m.wantOpen(t, map[string]string{"22/tcp": everybody})

		s := m.status(t, exitOK)
		want := []string{m.Client.V4.String(), m.Client.V6.String(), stranger, network, "203.0.113.0/24"}
		if s.SSH.Mode != "pinned" || !sameSet(s.SSH.Allow, want) {
			t.Errorf("status: SSH %+v, want pinned to %v", s.SSH, want)
		}
		for address, words := range map[string][]string{
			m.Client.V4.String(): {"always"}, m.Client.V6.String(): {"always"}, stranger: {"always", localINI},
			network: {localINI}, "203.0.113.0/24": {localINI},
		} {
			line := m.list(t, address)
			if line == "" {
				t.Errorf("ssh list has no line for %s: %s", address, m.must(t, exitOK, "ssh", "list").Stdout)
			}
			says(t, line, words...)
			if temporary := len(words) == 1 && words[0] == localINI; temporary == strings.Contains(line, "always") {
				t.Errorf("ssh list: wrong end: %s", line)
			}
		}
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "plan", "--exit-code")
		m.restart(t)
		m.wantOpen(t, map[string]string{"22/tcp": everybody})
		m.must(t, exitOK, "verify")

		// The end is changed, and removed.
		m.must(t, exitOK, "ssh", "allow", network, "--for", "3h")
		_, entry, _ := strings.Cut(setting(m.read(t, localINI), "ssh", "allow"), network)
		end := until(t, entry)
		if in := time.Until(end); in < 2*time.Hour || in > 3*time.Hour+time.Second {
			t.Errorf("allowed for 3 hours, and the end is in %v", in)
		}
		m.must(t, exitOK, "ssh", "allow", network)
		says(t, m.list(t, network), "always")
		m.wantOpen(t, map[string]string{"80/tcp": everybody})
		m.untouched(t, "ssh", "remove", "198.51.100.99")
		m.refused(t, exitUsage, []string{"ssh", "remove", m.Stranger.V6.String()}, network)
		m.refused(t, exitUsage, []string{"ssh", "remove", "203.0.113.9"}, "203.0.113.0/24")
		m.must(t, exitOK, "ssh", "remove", stranger, network)
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6"})
		m.must(t, exitOK, "ssh", "remove", "203.0.113.0/24")
		same(t, "rules after all other addresses were removed", before, m.rules(t))
		m.must(t, exitOK, "verify")
	})
}

// sameSet reports whether two lists are equal but for their order.
func sameSet(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// TestSSHAllowFor allows a stranger for a limited time. The kernel ends that without a
// service. Permanent addresses and open sessions stay.
func TestSSHAllowFor(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80)
		m.bootstrap(t)
		before := m.rules(t)
		var inside []*lab.Session
		end := beforeEnd(t, func(length string) time.Time {
			m.must(t, exitOK, "ssh", "allow", m.Stranger.V4.String(), m.Stranger.V6.String(), "--for", length)
			return until(t, setting(m.read(t, localINI), "ssh", "allow"))
		}, func() error {
			look := func(when string) error {
				if got := m.reached("22/tcp", everybody, time.Second); got != everybody {
					return fmt.Errorf("%s: SSH is reached by %q", when, got)
				}
				return nil
			}
			for _, to := range m.Server.Both() {
				s, err := m.Outsider.Dial(m.Stranger.Like(to), to, 22, time.Second)
				if err != nil {
					return err
				}
				t.Cleanup(s.Close)
				inside = append(inside, s)
			}
			if err := look("at once"); err != nil {
				return err
			}
			m.restart(t)
			return look("after a boot")
		})
		if text := m.rules(t); strings.Count(text, m.ends(end)) != 2 {
			t.Errorf("want the end %v in the rules of both families:\n%s", end, text)
		}
		waitFor(t, end)
		for _, when := range []string{"after the end", "after the end and a boot"} {
			m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody})
			s := m.status(t, exitOK)
			if s.State != "protected" || s.SSH.Mode != "pinned" || !sameSet(s.SSH.Allow, []string{m.Client.V4.String(), m.Client.V6.String()}) {
				t.Errorf("%s: state %q, SSH %+v", when, s.State, s.SSH)
			}
			for _, a := range m.Stranger.Both() {
				if line := m.list(t, a.String()); line != "" {
					t.Errorf("%s: ssh list has %q", when, line)
				}
			}
			m.must(t, exitOK, "verify")
			if when == "after the end" {
				for _, s := range inside {
					if err := s.Talk(); err != nil {
						t.Errorf("an open session was cut: %v", err)
					}
				}
				m.restart(t)
			}
		}
		m.must(t, exitOK, "open", "8081/tcp")
		if text := m.read(t, localINI); strings.Contains(text, "until") {
			t.Errorf("the next command does not remove expired entries:\n%s", text)
		}
		m.must(t, exitOK, "close", "8081/tcp")
		same(t, "rules after a command has removed expired entries", before, m.rules(t))
	})
}

// TestSSHAllowPins starts on a machine that knows no client: SSH is open to any address.
func TestSSHAllowPins(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80)
		m.must(t, exitOK, "bootstrap", "--profile", "web-only", "--no-service")
		client, stranger := m.Client.V4.String(), m.Stranger.V4.String()
		first := func() string {
			line, _, _ := strings.Cut(m.must(t, exitOK, "ssh", "list").Stdout, "\n")
			return line
		}
		says(t, first(), "any")
		m.wantOpen(t, map[string]string{"22/tcp": everybody, "80/tcp": everybody})

		// A temporary address does not pin SSH.
		m.must(t, exitOK, "ssh", "allow", stranger, "--for", "1h")
		if s := m.status(t, exitOK); s.SSH.Mode != "limited" {
			t.Errorf("allowed temporarily, and the mode is %q", s.SSH.Mode)
		}
		says(t, first(), "any")
		if line := m.list(t, stranger); line == "" || strings.Contains(line, "always") {
			t.Errorf("ssh list: %q", line)
		}
		m.wantOpen(t, map[string]string{"22/tcp": everybody})

		m.must(t, exitOK, "ssh", "allow", client)
		s := m.status(t, exitOK)
		if s.SSH.Mode != "pinned" || !sameSet(s.SSH.Allow, []string{client, stranger}) {
			t.Errorf("with a client allowed: SSH %+v", s.SSH)
		}
		m.wantOpen(t, map[string]string{"22/tcp": "client4 stranger4"})
		if strings.Contains(first(), "any ") {
			t.Errorf("ssh list begins with %q", first())
		}
		says(t, s.warnings(), "IPv6")
		m.must(t, exitOK, "ssh", "remove", stranger)
		m.wantOpen(t, map[string]string{"22/tcp": "client4"})
		m.must(t, exitOK, "plan", "--exit-code")

		// No address.
		m.refused(t, exitFailed, []string{"ssh", "remove", client}, "--force")
		m.must(t, exitOK, "ssh", "remove", client, "--force")
		m.wantAllowed(t, "none")
		m.wantOpen(t, map[string]string{"22/tcp": nobody, "80/tcp": everybody})
		says(t, m.must(t, exitOK, "status").Stdout, "port 22: blocked")
		says(t, first(), "no address")
		if s := m.status(t, exitOK); s.State != "protected" || len(s.SSH.Allow) != 0 || s.SSH.Mode != "pinned" {
			t.Errorf("with SSH blocked: %+v", s)
		}
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "plan", "--exit-code")
		m.restart(t)
		m.wantOpen(t, map[string]string{"22/tcp": nobody})
		m.must(t, exitOK, "verify")
		m.untouched(t, "ssh", "remove", client)

		// A temporary address is added to `none`, which stays.
		m.must(t, exitOK, "ssh", "allow", stranger, "--for", "1h")
		m.wantOpen(t, map[string]string{"22/tcp": "stranger4"})
		m.must(t, exitOK, "ssh", "allow", client)
		m.must(t, exitOK, "ssh", "remove", stranger)
		m.wantAllowed(t, client)
		m.wantOpen(t, map[string]string{"22/tcp": "client4"})
	})
}

// TestSSHAllowAny sets `allow = any` in the administrator's file.
func TestSSHAllowAny(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22)
		m.write(t, agentINI, "[agent]\nprofile = web-only\n[ssh]\nallow = any\nlimit = 2/minute\n", 0o640)
		owner := m.tree(t, true, "etc/basicfw/agent.ini")
		m.must(t, exitOK, "bootstrap", "--no-service")
		limited := func(from netip.Addr) {
			t.Helper()
			lab.Poll(t, from.String()+" to be over the limit", func() bool {
				return m.Outsider.Reach(from, m.Server.V4, 22, lab.Brief) != nil
			})
		}
		limited(m.Client.V4)
		m.must(t, exitOK, "ssh", "allow", m.Client.V4.String())
		m.wantAllowed(t, "any", m.Client.V4.String())
		for range 20 {
			if err := m.Outsider.Reach(m.Client.V4, m.Server.V4, 22, lab.Patient); err != nil {
				t.Fatalf("an allowed address is limited: %v", err)
			}
		}
		if err := m.Outsider.Reach(m.Stranger.V4, m.Server.V4, 22, lab.Patient); err != nil {
			t.Errorf("SSH is open to any address, but not to a stranger: %v", err)
		}
		limited(m.Stranger.V4)
		if s := m.status(t, exitOK); s.SSH.Mode != "limited" {
			t.Errorf("status: SSH %+v", s.SSH)
		}
		// It may be removed: any address is allowed.
		m.must(t, exitOK, "ssh", "remove", m.Client.V4.String())
		limited(m.Client.V4)
		m.must(t, exitOK, "verify")
		same(t, "the administrator's file", owner, m.tree(t, true, "etc/basicfw/agent.ini"))
	})
}

// TestSSHRemoveNamed removes clients that the settings name.
func TestSSHRemoveNamed(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22)
		m.bootstrap(t)
		client4, client6 := m.Client.V4.String(), m.Client.V6.String()
		m.must(t, exitOK, "ssh", "remove", client4)
		m.wantSetting(t, "ssh", "client_ip", client6)
		m.wantOpen(t, map[string]string{"22/tcp": "client6"})
		if line := m.list(t, client4); line != "" {
			t.Errorf("ssh list has %q", line)
		}
		m.must(t, exitOK, "plan", "--exit-code")
		m.refused(t, exitFailed, []string{"ssh", "remove", client6}, "--force")
		m.must(t, exitOK, "ssh", "remove", client6, "--force")
		if text := m.read(t, localINI); strings.Contains(text, client6) {
			t.Errorf("the client is still named:\n%s", text)
		}
		m.wantOpen(t, map[string]string{"22/tcp": nobody})
		m.must(t, exitOK, "plan", "--exit-code")
		m.must(t, exitOK, "apply")
		m.must(t, exitOK, "bootstrap", "--no-service")
		m.wantOpen(t, map[string]string{"22/tcp": nobody})

		// Named in the administrator's file, which commands do not write.
		m.must(t, exitOK, "uninstall")
		m.write(t, localINI, "", 0o600)
		m.write(t, agentINI, "[ssh]\nclient_ip = "+m.Client.String()+" ; me\n", 0o640)
		owner := m.tree(t, true, "etc/basicfw/agent.ini")
		m.must(t, exitOK, "bootstrap", "--no-service")
		m.must(t, exitOK, "ssh", "remove", client4)
		m.wantOpen(t, map[string]string{"22/tcp": "client6"})
		m.must(t, exitOK, "plan", "--exit-code")
		same(t, "the administrator's file", owner, m.tree(t, true, "etc/basicfw/agent.ini"))
	})
}

// TestSSHRefused passes invalid addresses, addresses that cannot be a client's, and invalid
// durations.
func TestSSHRefused(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	m.bootstrap(t)
	for _, command := range []string{"allow", "remove"} {
		for _, a := range []string{"", "CI_MISSING_JINJA_VAR/x", "office.example.com", "192.0.2.10 -j", "192.0.2.10\n[open]", "192.0.2.10;x"} {
			m.refused(t, exitUsage, []string{"ssh", command, a})
		}
		m.refused(t, exitUsage, []string{"ssh", command})
	}
	m.refused(t, exitFailed, []string{"ssh", "allow", "me"}, "address")
	// Any user can set this variable.
	before := m.everything(t)
	c := m.command("ssh", "allow", "me")
	c.Env = append(c.Env, "SSH_CONNECTION=203.0.113.9 50000 192.0.2.1 22")
	if r := m.Host.Run(t, c); r.Code != exitFailed {
		t.Errorf("ssh allow me, by a variable: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	same(t, "after ssh allow me, by a variable", before, m.everything(t))
	for _, a := range []string{
		"127.0.0.1", "::1", "127.0.0.0/8", "224.0.0.1", "ff02::1", "224.0.0.0/4", "fe80::1", "169.254.1.1",
		"0.0.0.0", "::", "0.0.0.0/0", "::/0", "192.168.1.5", "100.64.3.2", "fd00::5",
	} {
		m.refused(t, exitUsage, []string{"ssh", "allow", a}, a)
	}
	m.refused(t, exitUsage, []string{"ssh", "allow", "198.51.100.7/24"}, "198.51.100.0/24")
	// One wrong address refuses all.
	m.refused(t, exitUsage, []string{"ssh", "allow", "203.0.113.50", "127.0.0.1"}, "127.0.0.1")
	m.refused(t, exitUsage, []string{"ssh", "remove", m.Client.V4.String(), "192.0.2.0/33"}, "192.0.2.0/33")
	m.refused(t, exitFailed, []string{"ssh", "remove", m.Client.V4.String(), m.Client.V6.String()}, "--force")
	for _, d := range []string{"none", "0", "0s", "1y", "400d", "721h", "-1h", "500ms", "8", "soon"} {
		m.refused(t, exitUsage, []string{"ssh", "allow", "203.0.113.50", "--for", d}, "--for")
	}
	m.refused(t, exitUsage, []string{"ssh", "allow", "203.0.113.50", "--for"}, "--for")
	m.refused(t, exitUsage, []string{"ssh", "no-such"}, "no-such")
	m.must(t, exitOK, "verify")
}

// sshServer is a real sshd on a machine, with a key to log in.
type sshServer struct {
	m    *machine
	key  string
	stop func()
}

// sshd starts sshd on the machine.
func (m *machine) sshd(t *testing.T) *sshServer {
	t.Helper()
	return m.sshdOn(t, 22)
}

func (m *machine) sshdOn(t *testing.T, port uint16) *sshServer {
	t.Helper()
	lab.Need(t, "sshd", "ssh", "ssh-keygen")
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	for _, key := range []string{"hostkey", "key"} {
		m.Host.MustRun(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", file(key))
	}
	config := fmt.Sprintf(`Port %d
ListenAddress 0.0.0.0
ListenAddress ::
HostKey %s
AuthorizedKeysFile %s
PidFile none
StrictModes no
UsePAM no
PermitRootLogin yes
LogLevel ERROR
`, port, file("hostkey"), file("key.pub"))
	if err := os.WriteFile(file("config"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	// Root's shell must not read the real home directory.
	m.Host.Bind(t, t.TempDir(), "/root")
	// sshd requires this empty directory.
	if err := os.MkdirAll(filepath.Join(m.root, "run/sshd"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := strings.TrimSpace(m.Host.MustRun(t, "sh", "-c", "command -v sshd"))
	p := m.Host.Start(t, lab.Command{Args: []string{path, "-D", "-e", "-f", file("config")}, Limit: 5 * time.Minute})
	s := &sshServer{m, file("key"), sync.OnceFunc(func() {
		if r := p.Stop(t); t.Failed() {
			t.Logf("sshd printed:\n%s", r.Stderr)
		}
	})}
	t.Cleanup(s.stop)
	lab.Poll(t, "sshd to listen", func() bool {
		return strings.Count(m.Host.MustRun(t, "ss", "-Hltn", fmt.Sprintf("sport = :%d", port)), "LISTEN") == 2
	})
	return s
}

// run logs in from an address and runs commands of the program in one session.
func (s *sshServer) run(t *testing.T, from netip.Addr, commands ...string) lab.Result {
	t.Helper()
	c := s.m.command()
	script := "export " + strings.Join(c.Env, " ") + "; cd " + c.Dir
	for _, command := range commands {
		script += " && " + strings.Join(c.Args, " ") + " " + command
	}
	return s.m.Outsider.Run(t, lab.Command{Args: append([]string{"ssh"}, s.login(from, script)...)})
}

// login returns ssh's arguments for a login from an address: options, then the command in
// args.
func (s *sshServer) login(from netip.Addr, args ...string) []string {
	return append([]string{"-F", "/dev/null", "-i", s.key, "-b", from.String(),
		"-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
		"-o", "LogLevel=ERROR", "root@" + s.m.Server.Like(from).String()}, args...)
}

// must is run for commands that have to exit with the given code.
func (s *sshServer) must(t *testing.T, code int, from netip.Addr, commands ...string) lab.Result {
	t.Helper()
	r := s.run(t, from, commands...)
	if r.Code != code {
		t.Fatalf("%q, run from %v: exit code %d, want %d\nstdout: %s\nstderr: %s", commands, from, r.Code, code, r.Stdout, r.Stderr)
	}
	return r
}

// refused is machine.refused for a command in a session.
func (s *sshServer) refused(t *testing.T, from netip.Addr, command string, words ...string) {
	t.Helper()
	before := s.m.everything(t)
	r := s.must(t, exitFailed, from, command)
	oneLine(t, r.Stderr, words...)
	same(t, "after the refused "+command, before, s.m.everything(t))
}

// you returns the line of status about the caller's own session.
func you(t *testing.T, text string) string {
	t.Helper()
	for _, l := range strings.Split(text, "\n") {
		if strings.HasPrefix(l, "your session ") {
			return l
		}
	}
	t.Errorf("status does not show the caller's session:\n%s", text)
	return ""
}

// TestSSHInSession runs commands in sessions of a real sshd, on a machine that knows no
// client at first.
func TestSSHInSession(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		sshd := m.sshd(t)
		m.must(t, exitOK, "bootstrap", "--profile", "web-only", "--no-service")
		client4, client6, network := m.Client.V4, m.Client.V6, "2001:db8:0:1::/64"
		m.wantOpen(t, map[string]string{"22/tcp": everybody})
		says(t, you(t, sshd.must(t, exitOK, client4, "status").Stdout), client4.String())

		// It would pin SSH to another address.
		sshd.refused(t, client4, "ssh allow 203.0.113.50", client4.String(), "--force")
		m.wantOpen(t, map[string]string{"22/tcp": everybody})

		says(t, sshd.must(t, exitOK, client6, "ssh allow me").Stdout, network)
		m.wantAllowed(t, "client", network)
		m.wantOpen(t, map[string]string{"22/tcp": "client6"})
		says(t, sshd.must(t, exitOK, client6, "ssh allow me").Stdout, "nothing changed")
		sshd.must(t, exitOK, client6, "ssh allow "+client4.String()+" 203.0.113.50")
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6"})
		for _, from := range m.Client.Both() {
			line := you(t, sshd.must(t, exitOK, from, "status").Stdout)
			says(t, line, from.String())
			if strings.Contains(line, "NOT allowed") {
				t.Errorf("status for an allowed caller: %s", line)
			}
			var s status
			if err := json.Unmarshal([]byte(sshd.must(t, exitOK, from, "status --json").Stdout), &s); err != nil || s.SSH.Caller.Address != from.String() {
				t.Errorf("status --json: %v, the caller is %q, want %v", err, s.SSH.Caller.Address, from)
			}
		}
		wantScreen(t, sshd.must(t, exitOK, client6, "status").Stdout)

		// The caller's own address.
		sshd.refused(t, client4, "ssh remove "+client4.String(), client4.String(), "--force")
		sshd.refused(t, client6, "ssh remove "+network, "--force")
		sshd.must(t, exitOK, client6, "ssh remove 203.0.113.50")
		r := sshd.must(t, exitOK, client4, "ssh remove "+client4.String()+" --force", "status")
		line := you(t, r.Stdout)
		says(t, line, client4.String(), "NOT allowed")
		m.wantOpen(t, map[string]string{"22/tcp": "client6"})
		// The last address.
		sshd.refused(t, client6, "ssh remove "+network, "--force")
		r = sshd.must(t, exitOK, client6, "ssh remove "+network+" --force", "status")
		says(t, you(t, r.Stdout), "NOT allowed")
		m.wantOpen(t, map[string]string{"22/tcp": nobody})
		m.wantAllowed(t, "none")
		m.must(t, exitOK, "verify")
	})
}

// TestSSHForced locks the caller out with --force.
func TestSSHForced(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "legacy")
	sshd := m.sshd(t)
	m.must(t, exitOK, "bootstrap", "--profile", "web-only", "--no-service")
	// A temporary address does not pin SSH, so it locks no caller out.
	sshd.must(t, exitOK, m.Client.V4, "ssh allow 203.0.113.50 --for 1h")
	sshd.refused(t, m.Client.V4, "ssh allow "+m.Stranger.V4.String(), "--force")
	r := sshd.must(t, exitOK, m.Client.V4, "ssh allow "+m.Stranger.V4.String()+" --force", "status")
	says(t, you(t, r.Stdout), m.Client.V4.String(), "NOT allowed")
	m.wantOpen(t, map[string]string{"22/tcp": "stranger4"})
	// The locked-out client is allowed temporarily from another address.
	sshd.must(t, exitOK, m.Stranger.V4, "ssh allow "+m.Client.V4.String()+" --for 1h")
	r = sshd.must(t, exitOK, m.Client.V4, "ssh allow me", "status")
	if line := you(t, r.Stdout); strings.Contains(line, "NOT allowed") {
		t.Error(line)
	}
	says(t, m.list(t, m.Client.V4.String()), "always")
	m.wantOpen(t, map[string]string{"22/tcp": "client4 stranger4"})
}

// TestSSHDetected names no client: it is detected by its session.
func TestSSHDetected(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	sshd := m.sshd(t)
	client, stranger := m.Client.V4, m.Stranger.V4
	sshd.must(t, exitOK, client, "bootstrap --profile web-only --no-service")
	m.wantOpen(t, map[string]string{"22/tcp": "client4"})
	// Until confirmed, the detected client may be the wrong one.
	says(t, sshd.must(t, exitOK, client, "ssh allow me").Stdout, client.String()+" may log in")
	m.wantAllowed(t, "client", client.String())
	says(t, sshd.must(t, exitOK, client, "ssh allow me").Stdout, "nothing changed")
	if s := m.status(t, exitOK); s.SSH.Mode != "pinned" {
		t.Errorf("SSH is %s, with a client named", s.SSH.Mode)
	}
	sshd.must(t, exitOK, client, "ssh allow "+stranger.String())
	m.wantOpen(t, map[string]string{"22/tcp": "client4 stranger4"})
	sshd.refused(t, client, "ssh remove "+client.String(), client.String(), "--force")
	says(t, m.list(t, client.String()), "always")

	// By another allowed address.
	sshd.must(t, exitOK, stranger, "ssh remove "+client.String())
	m.wantOpen(t, map[string]string{"22/tcp": "stranger4"})
	for _, command := range []string{"plan --exit-code", "apply", "bootstrap --no-service"} {
		m.must(t, exitOK, strings.Fields(command)...)
	}
	m.wantOpen(t, map[string]string{"22/tcp": "stranger4"})
	if line := m.list(t, client.String()); line != "" {
		t.Errorf("ssh list has %q", line)
	}
}

// TestBootstrapInSession bootstraps from a session whose address is not allowed: the named
// address counts, with a warning before and after.
func TestBootstrapInSession(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		sshd := m.sshd(t)
		client := m.Client.V4
		const words = "bootstrap --profile web-only --client-ip 203.0.113.50 --no-service"
		for _, dry := range []string{" --dry-run", ""} {
			says(t, sshd.must(t, exitOK, client, words+dry).Stdout, "warning: your address "+client.String()+" is not allowed to log in again", "ssh allow me")
		}
		m.wantOpen(t, map[string]string{"22/tcp": nobody})
		m.must(t, exitOK, "ssh", "allow", client.String())
		// Later commands refuse that, but not if nothing would change.
		says(t, sshd.must(t, exitOK, client, words).Stdout, "nothing changed")
		m.must(t, exitOK, "ssh", "allow", "203.0.113.51")
		r := sshd.run(t, client, "unlock --from "+client.String(), "ssh remove "+client.String()+" --force", "lock")
		if r.Code != exitOK || !strings.Contains(r.Stdout, "warning: your address "+client.String()) {
			t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
	})
}
