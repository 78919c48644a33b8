package kernel_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
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
		t.Fatalf("the service does not become ready: %v\n%s%s", err, r.Stdout, r.Stderr)
	}
	return s
}

// startService starts a program with NOTIFY_SOCKET set to a socket of the test.
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

// ready waits until the service reports that it is ready.
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

// reboot leaves the machine as a boot finds it: without rules.
func (m *machine) reboot(t *testing.T) {
	t.Helper()
	m.Host.Run(t, lab.Command{Args: []string{"nft", "delete", "table", "inet", "basicfw"}})
	if m.netlink { // otherwise iptables would create tables
		m.Host.MustRun(t, "nft", "flush", "ruleset")
		return
	}
	for _, family := range families() {
		m.load(t, family, "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n*mangle\n:FORWARD ACCEPT [0:0]\nCOMMIT\n")
	}
}

// TestRun starts the service after a boot. Once it reports that it is ready, the rules of
// the best readable source have to be loaded.
func TestRun(t *testing.T) {
	// The persisted files differ between variants.
	const v4, v6 = "the file of IPv4", "the file of IPv6"
	spoil := func(paths ...string) func(t *testing.T, m *machine) {
		return func(t *testing.T, m *machine) {
			t.Helper()
			for _, p := range paths {
				switch p {
				case v4:
					p = m.keptOf(ipv4)
				case v6:
					p = m.keptOf(ipv6)
				}
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
	lose := func(dir string) func(t *testing.T, m *machine) {
		return func(t *testing.T, m *machine) {
			t.Helper()
			if err := os.RemoveAll(filepath.Join(m.root, dir)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, m *machine)
		// profile: the profile's ports are open, and SSH to the client only.
		profile bool
		state   string
		code    int
	}{
		{"nothing is broken", func(*testing.T, *machine) {}, true, "protected", exitOK},
		{"a rules file is broken", spoil(v6), true, "protected", exitOK},
		{"the state is broken", spoil(stateFile), true, "protected", exitOK},
		{"the state is gone", remove(stateFile), true, "protected", exitOK},
		{"the whole state directory is gone", lose("/var/lib/basicfw"), true, "protected", exitOK},
		{"all of /var is gone", lose("/var"), true, "protected", exitOK},
		{"the copy is broken", spoil(copyFile), true, "protected", exitOK},
		{"the copy is gone", remove(copyFile), true, "protected", exitOK},
		{"the state and the rules files are broken", spoil(stateFile, v4, v6), true, "protected", exitOK},
		// Only the state and its copy are ever loaded as desired state.
		{"the state and its copy are broken", spoil(stateFile, copyFile), false, "failsafe", exitDrift},
		{"the state and its copy are gone", remove(stateFile, copyFile), false, "failsafe", exitDrift},
		{"all of them are broken", spoil(stateFile, copyFile, v4, v6), false, "failsafe", exitDrift},
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
						t.Errorf("the client's address is readable by everyone: %s", public)
					}
				}
				before := m.rules(t)
				if r := s.Stop(t); r.Code != exitOK {
					t.Errorf("stopped: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
				}
				same(t, "rules once the service is stopped", before, m.rules(t))
				if c.profile { // the failsafe rules are not saved
					m.wantCopy(t)
				}
			})
		})
	}
}

// TestBootPrograms counts the programs that the service runs before it is ready, as the
// boot waits for each of them.
func TestBootPrograms(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		m.reboot(t)
		if m.variant() == "nft" { // a boot starts without tables
			m.Host.MustRun(t, "nft", "flush", "ruleset")
		}
		started := m.listPrograms(t)
		m.must(t, exitOK, "prepare")
		prepared := started()
		if m.variant() == "nft" && len(prepared) > 0 {
			t.Errorf("prepare ran %q", prepared)
		}
		s := m.serve(t)
		ran := started()[len(prepared):]
		s.Stop(t)
		if len(ran) > 7 {
			t.Errorf("run started %d programs, want at most 7: %q", len(ran), ran)
		}
		for _, name := range []string{"iptables", "ip6tables"} { // loaded, and read back after that
			load, save := slices.Index(ran, name+"-restore"), -1
			for i, r := range ran {
				if r == name+"-save" {
					save = i
				}
			}
			if load < 0 || save < load {
				t.Errorf("%s was not loaded and read back: %q", name, ran)
			}
		}
		m.must(t, exitOK, "verify")
	})
}

// listPrograms records which iptables programs of the machine are run, until the status
// file for monitoring exists: writing it is the last step before the service is ready. The
// function it returns lists their names. The programs still do their work.
func (m *machine) listPrograms(t *testing.T) func() []string {
	t.Helper()
	real, err := exec.LookPath(m.multi)
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(t.TempDir(), "programs")
	script := fmt.Sprintf("#!/bin/sh\nname=${0##*/}\n[ -e %s ] || echo \"$name\" >>%s\nexec %s \"$name\" \"$@\"\n",
		filepath.Join(m.root, "run/basicfw-agent/status.json"), list, real)
	if err := os.WriteFile(filepath.Join(m.bin, m.multi), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(iptablesPrograms) {
		link := filepath.Join(m.bin, name)
		if err := errors.Join(os.Remove(link), os.Symlink(m.multi, link)); err != nil {
			t.Fatal(err)
		}
	}
	return func() []string {
		data, err := os.ReadFile(list)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return strings.Fields(string(data))
	}
}

// TestPrepare runs what comes before the service. It has to end even if the programs it
// runs do not, as the boot waits for it. If they fail, it makes the directory of the
// nf_tables file: the service may fall back to nftables, and its sandbox cannot make one.
// With the rules already in nf_tables it needs no program.
func TestPrepare(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		before := m.everything(t)
		m.must(t, exitOK, "prepare")
		same(t, "after a successful run", before, m.everything(t))
		if m.netlink {
			m.wrap(t, "ip6tables-save", "exec sleep 80")
			m.must(t, exitOK, "prepare")
			same(t, "after the failed runs", before, m.everything(t))
			return
		}
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
		made := filepath.Join(m.root, filepath.Dir(tableFile))
		if fi, err := os.Stat(made); err != nil || fi.Mode() != os.ModeDir|0o755 {
			t.Fatalf("the directory of the file of nf_tables: %v, %v", fi, err)
		}
		if err := os.Remove(made); err != nil {
			t.Fatal(err)
		}
		same(t, "after the failed runs", before, m.everything(t))
	})
}
