package kernel_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// wantCopy fails unless the state and its copy are the same, and accessible to root alone.
func (m *machine) wantCopy(t *testing.T) {
	t.Helper()
	same(t, "the copy of the state", m.read(t, stateFile), m.read(t, copyFile))
	for _, path := range []string{stateFile, copyFile} {
		if fi, err := os.Lstat(filepath.Join(m.root, path)); err != nil || fi.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", path, fi, err)
		}
	}
}

// wipe removes the state's directory.
func (m *machine) wipe(t *testing.T) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(m.root, "var/lib/basicfw")); err != nil {
		t.Fatal(err)
	}
}

// TestCopyFollows checks that every command that changes something writes both
// the state and its copy, or neither.
func TestCopyFollows(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		m.wantCopy(t)
		before := m.read(t, copyFile)
		for _, command := range []string{"open 8081/tcp", "ssh allow 203.0.113.5", "unlock", "lock", "close 8081/tcp", "verify"} {
			m.must(t, exitOK, strings.Fields(command)...)
			m.wantCopy(t)
			now := m.read(t, copyFile)
			if now == before {
				t.Errorf("%s: the copy was not written", command)
			}
			before = now
		}
		for _, dir := range []string{filepath.Dir(copyFile), filepath.Dir(stateFile)} {
			undo := m.Host.ReadOnly(t, filepath.Join(m.root, dir))
			all := m.everything(t)
			says(t, m.must(t, exitFailed, "open", "8082/tcp").Stderr, "read-only", dir)
			same(t, "with "+dir+" read-only", all, m.everything(t))
			// An unlock ends at a reboot, and a lock before that.
			says(t, m.must(t, exitOK, "unlock").Stderr, "read-only", dir, "lost at a reboot")
			if s := m.status(t, exitDrift); s.State != "unlocked" {
				t.Errorf("with %s read-only: the state is %s", dir, s.State)
			}
			m.must(t, exitOK, "lock")
			undo()
			m.must(t, exitOK, "verify", "--repair")
			same(t, "after the unlock", withoutTime(t, all), withoutTime(t, m.everything(t)))
		}
	})
}

// TestVarLate boots before /var is mounted. The rules are loaded from the copy,
// and the state is unchanged once /var is there.
func TestVarLate(t *testing.T) {
	on(t, told, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.bootstrap(t)
		rules, files := m.rules(t), m.tree(t, false, "etc", "var")
		m.reboot(t)
		dir := filepath.Join(m.root, "var")
		m.Host.Bind(t, t.TempDir(), dir)
		undo := m.Host.ReadOnly(t, dir)
		s := m.quiet(t)
		same(t, "rules without /var", rules, m.rules(t))
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
		public := m.read(t, "/run/basicfw-agent/status.json")
		says(t, public, `"state": "protected"`)
		m.by(t, byFlush, families()...)
		m.back(t, repaired, "flushed without /var", rules)
		same(t, "files without /var", files, m.tree(t, false, "etc", "var"))
		undo()
		m.Host.MustRun(t, "umount", dir)
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "open", "8080/tcp")
		m.wantCopy(t)
		if r := s.Stop(t); r.Code != exitOK || !strings.Contains(r.Stderr, "using "+copyFile) {
			t.Errorf("exit code %d, and the log says\n%s", r.Code, r.Stderr)
		}
	})
}

// TestVarWiped removes the state's directory while the service runs, and before
// it starts.
func TestVarWiped(t *testing.T) {
	on(t, told, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		m.must(t, exitOK, "open", "8081/tcp")
		rules := m.rules(t)
		s := m.quiet(t)
		state := m.read(t, copyFile)
		m.wipe(t)
		lab.Poll(t, "the state to be back", func() bool { return m.exists(t, stateFile) })
		same(t, "the state", state, m.read(t, stateFile))
		same(t, "rules", rules, m.rules(t))
		// Changes by commands are still followed.
		m.must(t, exitOK, "unlock")
		lab.Poll(t, "the service to follow", func() bool {
			return strings.Contains(m.read(t, "/run/basicfw-agent/status.json"), `"unlocked"`)
		})
		m.must(t, exitOK, "lock")
		same(t, "rules after lock", rules, m.rules(t))
		s.Stop(t)

		m.wipe(t)
		lost := stateFile + " is lost; its copy is " + copyFile
		says(t, m.must(t, exitDrift, "status", "--json").Stdout, lost, "basicfw-agent verify --repair")
		for _, command := range [][]string{{"verify"}, {"open", "9/tcp"}, {"selftest"}} {
			says(t, m.must(t, exitFailed, command...).Stderr, lost)
		}
		m.reboot(t)
		m.serve(t).Stop(t)
		same(t, "rules after a boot", rules, m.rules(t))
		m.wantCopy(t)
		m.must(t, exitOK, "verify")
		got := m.status(t, exitOK)
		if !strings.Contains(fmt.Sprint(got.Warnings), "not restore what bootstrap removed") {
			t.Errorf("status does not say what is lost: %q", got.Warnings)
		}
	})
}

// TestStateRestoredByCommand repairs a machine without a service whose state is lost or
// unreadable, and whose rules are gone.
func TestStateRestoredByCommand(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		m.must(t, exitOK, "open", "8081/tcp")
		rules, state := m.rules(t), m.read(t, stateFile)
		for _, spoil := range []func() error{
			func() error { return os.Remove(filepath.Join(m.root, stateFile)) },
			func() error { return os.WriteFile(filepath.Join(m.root, stateFile), []byte(state[:100]), 0o600) },
		} {
			if err := spoil(); err != nil {
				t.Fatal(err)
			}
			m.reboot(t)
			says(t, m.must(t, exitFailed, "verify").Stderr, "its copy is "+copyFile, "hint: basicfw-agent verify --repair restores it")
			says(t, m.must(t, exitDrift, "status").Stdout, "basicfw-agent verify --repair")
			m.must(t, exitOK, "verify", "--repair")
			same(t, "rules", rules, m.rules(t))
			m.wantCopy(t)
			m.must(t, exitOK, "verify")
		}
	})
}

// TestRepairReadOnly repairs the rules on a machine on which no file can be written.
func TestRepairReadOnly(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 8080)
		m.bootstrap(t)
		rules := m.rules(t)
		for _, dir := range []string{"etc", "var"} {
			if err := os.Remove(filepath.Join(m.root, m.persisted()[0])); err != nil {
				t.Fatal(err)
			}
			m.reboot(t)
			undo := m.Host.ReadOnly(t, filepath.Join(m.root, dir))
			says(t, m.must(t, exitDrift, "verify", "--repair").Stderr, "only the rules were repaired", "read-only")
			same(t, "rules with a read-only /"+dir, rules, m.rules(t))
			m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "8080/tcp": nobody})
			undo()
			m.must(t, exitDrift, "verify")
			m.must(t, exitOK, "verify", "--repair")
			m.must(t, exitOK, "verify")
			same(t, "rules", rules, m.rules(t))
		}
	})
}

// TestVarWipedUninstall uninstalls on a machine that has lost its backup, before
// and after the service has restored the state.
func TestVarWipedUninstall(t *testing.T) {
	for _, booted := range []bool{true, false} {
		t.Run(map[bool]string{true: "after a boot", false: "at once"}[booted], func(t *testing.T) {
			onEach(t, func(t *testing.T, m *machine) {
				m.Host.Listen(t, 8080)
				m.bootstrap(t)
				m.wipe(t)
				m.reboot(t)
				if booted {
					m.serve(t).Stop(t)
				}
				says(t, m.must(t, exitOK, "uninstall").Stderr, "the backup from before bootstrap is lost")
				for _, path := range append(m.persisted(), stateFile, copyFile, "/var/lib/basicfw", message) {
					if m.exists(t, path) {
						t.Errorf("%s is left", path)
					}
				}
				if text := m.rules(t); strings.Contains(text, "BASICFW") || strings.Contains(text, "table inet basicfw") || strings.Contains(text, "DROP") {
					t.Errorf("rules are left:\n%s", text)
				}
				m.wantReach(t, m.Server.V4, 8080, true, true)
				m.must(t, exitNotBootstrapped, "uninstall")
			})
		})
	}
}

// TestUninstallUnderService uninstalls while a service runs that no service
// manager knows of. It restores nothing.
func TestUninstallUnderService(t *testing.T) {
	on(t, told, func(t *testing.T, m *machine) {
		before := m.everything(t)
		m.bootstrap(t)
		s := m.quiet(t)
		m.must(t, exitOK, "uninstall")
		lab.Poll(t, "the service to notice the uninstall", func() bool {
			data, err := os.ReadFile(filepath.Join(m.root, "run/basicfw-agent/status.json"))
			return err == nil && strings.Contains(string(data), "not-bootstrapped")
		})
		if r := s.Stop(t); r.Code != exitOK {
			t.Errorf("exit code %d\n%s", r.Code, r.Stderr)
		}
		same(t, "after uninstall", before, m.everything(t))
	})
}

// TestUpgradeFromFirstVersion boots with the state of version 0.1, which had no
// copy. Commands that only read create none. Once the rules are verified a copy
// exists, which restores them without /var.
func TestUpgradeFromFirstVersion(t *testing.T) {
	data, err := os.ReadFile("../../agent/store/testdata/state-0.1.json")
	if err != nil {
		t.Fatal(err)
	}
	onBoth(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.bootstrap(t)
		if err := os.Remove(filepath.Join(m.root, copyFile)); err != nil {
			t.Fatal(err)
		}
		m.write(t, stateFile, string(data), 0o600)
		m.reboot(t)
		m.must(t, exitOK, "package-upgraded")
		m.status(t, exitDrift)
		m.must(t, exitDrift, "verify")
		if m.exists(t, copyFile) {
			t.Error("the copy was written before the rules were verified")
		}
		m.boots(t, true)
		m.wantCopy(t)
		rules := m.rules(t)
		m.wipe(t)
		m.boots(t, true)
		m.wantCopy(t)
		same(t, "rules after a boot without /var", rules, m.rules(t))
	})
}
