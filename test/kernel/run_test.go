package kernel_test

import (
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// service is the program as the service manager runs it.
type service struct {
	*lab.Process
	notices net.PacketConn
}

// serve starts the service and waits until it says that it is ready.
func (m *machine) serve(t *testing.T) *service {
	t.Helper()
	return m.serveWith(t, m.command("run"))
}

// serveWith is serve in an environment of its own.
func (m *machine) serveWith(t *testing.T, c lab.Command) *service {
	t.Helper()
	s := m.startService(t, c)
	if err := s.ready(); err != nil {
		r := s.Stop(t)
		t.Fatalf("the service does not get ready: %v\n%s%s", err, r.Stdout, r.Stderr)
	}
	return s
}

// startService starts a program that tells this test what a service tells its
// manager.
func (m *machine) startService(t *testing.T, c lab.Command) *service {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenPacket("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c.Env = append(c.Env, "NOTIFY_SOCKET="+path)
	return &service{m.Host.Start(t, c), conn}
}

// ready waits until the service says that it is.
func (s *service) ready() error {
	if err := s.notices.SetReadDeadline(time.Now().Add(60 * time.Second)); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	for {
		n, _, err := s.notices.ReadFrom(buf)
		if err != nil {
			return err
		}
		if strings.Contains("\n"+string(buf[:n])+"\n", "\nREADY=1\n") {
			return nil
		}
	}
}

// reboot leaves the machine as a boot finds it: with no rule.
func (m *machine) reboot(t *testing.T) {
	t.Helper()
	for _, family := range families() {
		m.load(t, family, "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n")
	}
}

// TestRun starts the service on a machine that has booted. When it says that
// it is ready, the rules have to stand, from the best source that can be read.
func TestRun(t *testing.T) {
	spoil := func(paths ...string) func(t *testing.T, m *machine) {
		return func(t *testing.T, m *machine) {
			t.Helper()
			for _, p := range paths {
				m.write(t, p, "{ not what it was", 0o600)
			}
		}
	}
	remove := func(paths ...string) func(t *testing.T, m *machine) {
		return func(t *testing.T, m *machine) {
			t.Helper()
			for _, p := range paths {
				if err := os.Remove(filepath.Join(m.root, p)); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	const state = "/var/lib/basicfw/state.json"
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, m *machine)
		// profile: the profile's ports are open, SSH is the client's alone.
		profile bool
		state   string
		code    int
	}{
		{"nothing is broken", func(*testing.T, *machine) {}, true, "protected", exitOK},
		{"a rules file is broken", spoil(rulesFile(ipv6)), true, "protected", exitOK},
		{"the state is broken", spoil(state), true, "drifted", exitDrift},
		{"the state is gone", remove(state), true, "not-bootstrapped", exitNotBootstrapped},
		{"the state and a rules file are broken", spoil(state, rulesFile(ipv4)), false, "failsafe", exitDrift},
		{"the state and the rules files are broken", spoil(state, rulesFile(ipv4), rulesFile(ipv6)), false, "failsafe", exitDrift},
	} {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			onEach(t, func(t *testing.T, m *machine) {
				m.Host.Listen(t, 22, 80, 8080)
				m.bootstrap(t)
				rules := m.rules(t)
				m.reboot(t)
				c.damage(t, m)
				s := m.serve(t)
				if c.profile {
					same(t, "rules once the service is ready", rules, m.rules(t))
				}
				for _, to := range m.Server.Both() {
					m.wantReach(t, to, 22, true, !c.profile)
					m.wantReach(t, to, 80, c.profile, c.profile)
					m.wantReach(t, to, 8080, false, false)
				}
				if got := m.status(t, c.code); got.State != c.state {
					t.Errorf("state %q, want %q; drift %v, warnings %v", got.State, c.state, got.Drift, got.Warnings)
				}
				public, err := os.ReadFile(filepath.Join(m.root, "run/basicfw-agent/status.json"))
				if err != nil {
					t.Error(err)
				}
				for _, a := range m.Client.Both() {
					if strings.Contains(string(public), a.String()) {
						t.Errorf("the client's address is there for all to read: %s", public)
					}
				}
				before := m.rules(t)
				if r := s.Stop(t); r.Code != exitOK {
					t.Errorf("stopped: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
				}
				same(t, "rules once the service is stopped", before, m.rules(t))
			})
		})
	}
}

// TestPrepare does what comes before the service. It has to end, also where the
// programs that it runs do not: the boot waits for it.
func TestPrepare(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		before := m.everything(t)
		m.must(t, exitOK, "prepare")
		for name, words := range map[string]string{"exec cat /never/there": "/never/there", "exec sleep 80": "preparing"} {
			m.wrap(t, "ip6tables-save", name)
			start := time.Now()
			r := m.must(t, exitFailed, "prepare")
			says(t, r.Stderr, "basicfw-agent: ", words)
			if took := time.Since(start); took > 40*time.Second {
				t.Errorf("%s: it took %v", name, took)
			}
			if err := os.Remove(filepath.Join(m.bin, "ip6tables-save")); err != nil {
				t.Fatal(err)
			}
			m.link(t, "ip6tables-save")
		}
		same(t, "after all that", before, m.everything(t))
	})
}
