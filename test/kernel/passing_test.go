package kernel_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestLockHeldAtBoot boots a machine while another program holds the lock of iptables for
// longer than the service waits. Until the lock is free, the machine is closed. The desired
// state stays on the disk, and is loaded when it can be.
func TestLockHeldAtBoot(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "legacy")
	m.Host.Listen(t, 22, 80, 8080)
	m.bootstrap(t)
	rules, files := m.rules(t), m.tree(t, false, "etc", "var")
	open := map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody}
	m.reboot(t)
	lock, err := os.Create(filepath.Join(m.root, "run/xtables.lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	s := m.serve(t)
	m.wantOpen(t, open)
	if !strings.Contains(m.Host.MustRun(t, "nft", "list", "tables"), "basicfw-guard") {
		t.Error("no guard closes the machine")
	}
	if m.exists(t, stateFile+".broken") {
		t.Error("the state was set aside")
	}
	lock.Close()
	lab.Poll(t, "the rules", func() bool { return m.rules(t) == rules })
	lab.Poll(t, "the guard to be removed", func() bool {
		return !strings.Contains(m.Host.MustRun(t, "nft", "list", "tables"), "basicfw-guard")
	})
	m.wantOpen(t, open)
	lab.Poll(t, "the status to follow", func() bool { return m.public(t).State == "protected" })
	s.Stop(t)
	m.must(t, exitOK, "status")
	same(t, "files", withoutTime(t, files), withoutTime(t, m.tree(t, false, "etc", "var")))
}

// withoutTime returns a tree without the time of the last verification.
func withoutTime(t *testing.T, tree string) string {
	t.Helper()
	var out []string
	for _, l := range strings.Split(tree, "\n") {
		head, rest, ok := strings.Cut(l, `\"last_verified\":`)
		if _, rest, more := strings.Cut(rest, `\n`); ok && more {
			l = head + rest
		}
		out = append(out, l)
	}
	return strings.Join(out, "\n")
}

// TestIptablesFailsOnceAtBoot makes the first load of a boot fail. The state keeps its
// backend.
func TestIptablesFailsOnceAtBoot(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		rules := m.rules(t)
		m.reboot(t)
		once := filepath.Join(t.TempDir(), "once")
		m.wrap(t, "iptables-restore", fmt.Sprintf("mkdir %s 2>/dev/null && exit 1\nexec $real \"$@\"", once))
		m.serve(t).Stop(t)
		if _, err := os.Stat(once); err != nil {
			t.Error("no load failed")
		}
		same(t, "rules", rules, m.rules(t))
		if s := m.status(t, exitOK); s.Backend.Name != "iptables" {
			t.Errorf("the backend is %+v", s.Backend)
		}
	})
}

// broken makes the state and its copy unreadable and returns what restores them.
func (m *machine) unreadable(t *testing.T) (restore func()) {
	t.Helper()
	was := map[string]string{}
	for _, path := range []string{stateFile, copyFile} {
		was[path] = m.read(t, path)
		m.write(t, path, "{", 0o600)
	}
	return func() {
		t.Helper()
		for path, text := range was {
			m.write(t, path, text, 0o600)
		}
	}
}

// TestFailsafeEndsWithAReadableState boots a machine without a readable state, and restores
// the state while the service runs.
func TestFailsafeEndsWithAReadableState(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		rules := m.rules(t)
		m.reboot(t)
		restore := m.unreadable(t)
		s := m.serve(t)
		if got := m.status(t, exitDrift); got.State != "failsafe" {
			t.Errorf("the state is %s", got.State)
		}
		if m.read(t, stateFile) != "{" || m.read(t, copyFile) != "{" || strings.Contains(m.kept(t), "failsafe") {
			t.Error("the failsafe rules are saved")
		}
		restore()
		lab.Poll(t, "the rules", func() bool { return m.rules(t) == rules })
		// A service that is stopped before that rolls back to the failsafe rules.
		lab.Poll(t, "the status to follow", func() bool { return m.public(t).State == "protected" })
		s.Stop(t)
		m.must(t, exitOK, "status")
	})
}

// TestUnlockWithoutAState unlocks machines with damaged states, from the console and at boot.
func TestUnlockWithoutAState(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 8080)
		m.bootstrap(t)
		rules := m.rules(t)
		unlocked := func(how string, want bool) {
			t.Helper()
			if text := m.agent(t, "status", "--json").Stdout; strings.Contains(text, `"unlock": {`) != want {
				t.Errorf("%s: the status is %s", how, text)
			}
			m.wantReach(t, m.Server.V4, 22, true, want)
			m.wantReach(t, m.Server.V4, 8080, false, false)
		}
		// The copy is readable: it restores the state.
		m.write(t, stateFile, "{", 0o600)
		m.must(t, exitOK, "unlock")
		unlocked("unlock", true)
		m.wantCopy(t)
		m.must(t, exitOK, "lock")
		same(t, "rules after lock", rules, m.rules(t))
		// Something else is in its place.
		text := m.read(t, stateFile)
		path := filepath.Join(m.root, stateFile)
		if err := errors.Join(os.Remove(path), os.MkdirAll(path+"/x", 0o700)); err != nil {
			t.Fatal(err)
		}
		m.must(t, exitOK, "unlock")
		unlocked("unlock with a directory", true)
		m.must(t, exitOK, "lock")
		m.write(t, "/etc/basicfw/unlock", "1h", 0o600)
		m.reboot(t)
		s := m.serve(t)
		unlocked("a boot with a directory", true)
		s.Stop(t)
		m.must(t, exitOK, "lock")
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
		m.write(t, stateFile, text, 0o600)
		m.must(t, exitOK, "verify", "--repair")
		same(t, "rules", rules, m.rules(t))
		// Neither is readable.
		restore := m.unreadable(t)
		says(t, m.must(t, exitOK, "unlock").Stderr, "failsafe")
		unlocked("unlock without a state", true)
		m.write(t, "/etc/basicfw/unlock", "1h", 0o600)
		m.reboot(t)
		s = m.serve(t)
		unlocked("a boot without a state", true)
		s.Stop(t)
		restore()
		m.must(t, exitOK, "verify", "--repair")
		same(t, "rules in the end", rules, m.rules(t))
	})
}

// TestPendingWithoutAState damages the state while a change is pending. It is rolled back in
// time, without the service and with it, and flushed rules are repaired.
func TestPendingWithoutAState(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8081)
		m.bootstrap(t)
		rules := m.rules(t)
		try := func() {
			t.Helper()
			m.write(t, "/etc/basicfw/agent.ini", "[open]\nx = 8081/tcp\n", 0o640)
			m.must(t, exitOK, "apply", "--confirm", "3s")
		}
		try()
		m.write(t, stateFile, "{", 0o600)
		lab.Poll(t, "the rollback to the copy", func() bool { return m.rules(t) == rules })
		lab.Poll(t, "the end of the pending change", func() bool { return !m.exists(t, pendingFile) })
		m.must(t, exitOK, "verify", "--repair")
		s := m.serve(t)
		try()
		m.killWaiting(t)
		restore := m.unreadable(t)
		lab.Poll(t, "the rollback to the failsafe rules", func() bool { return !m.exists(t, pendingFile) })
		m.wantOpen(t, map[string]string{"22/tcp": everybody, "80/tcp": nobody, "8081/tcp": nobody})
		m.by(t, byFlushOurs, families()...)
		lab.Poll(t, "the repair", func() bool { return m.status(t, exitDrift).State == "failsafe" })
		restore()
		lab.Poll(t, "the rules", func() bool { return m.rules(t) == rules })
		s.Stop(t)
	})
}

// TestKilledTry kills "apply --confirm" when its rules are loaded, and hangs up its terminal
// before that. The change is rolled back without the service.
func TestKilledTry(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		rules := m.rules(t)
		m.wrap(t, "ip6tables-restore", "$real \"$@\"; code=$?; kill -KILL $PPID; exit $code")
		m.write(t, "/etc/basicfw/agent.ini", "[open]\nx = 8081/tcp\n", 0o640)
		m.start(t, "apply", "--no-rehearsal", "--confirm", "3s").End(t)
		if m.rules(t) == rules {
			t.Error("the change was not loaded")
		}
		m.heal(t)
		lab.Poll(t, "the rollback", func() bool { return m.rules(t) == rules })
	})
}

// setClock moves what was written by the clock by -step, which is the same as setting the
// clock by step.
func (m *machine) setClock(t *testing.T, step time.Duration) {
	t.Helper()
	times := regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z`)
	for _, path := range []string{stateFile, copyFile, "/etc/basicfw/local.ini"} {
		m.write(t, path, times.ReplaceAllStringFunc(m.read(t, path), func(text string) string {
			when, err := time.Parse(time.RFC3339, text)
			if err != nil {
				t.Fatal(err)
			}
			return when.Add(-step).Format(time.RFC3339)
		}), 0o600)
	}
}

// TestStepOfTheClock sets the clock. Within a boot, an unlock and temporary services end by
// the uptime. The rules follow the clock, and the settings keep what has not expired.
func TestStepOfTheClock(t *testing.T) {
	for name, step := range map[string]time.Duration{"back": -time.Minute, "forward": 2 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			onEach(t, func(t *testing.T, m *machine) {
				m.Host.Listen(t, 22, 8081)
				m.bootstrap(t)
				m.must(t, exitOK, "open", "8081/tcp", "--for", "1h")
				m.must(t, exitOK, "unlock", "--for", "15m")
				end := time.Now().Add(15 * time.Minute)
				m.setClock(t, step)
				s := m.serve(t)
				lab.Poll(t, "the rules to follow the clock", func() bool {
					return m.agent(t, "verify").Code == exitOK && strings.Contains(m.read(t, stateFile), end.UTC().Format("2006-01-02T15:04"))
				})
				if state, until := m.unlocked(t); state != "unlocked" || until.Sub(end).Abs() > time.Minute {
					t.Errorf("the state is %s, until %v, want %v", state, until, end)
				}
				m.wantOpen(t, map[string]string{"22/tcp": everybody, "8081/tcp": everybody})
				s.Stop(t)
				if !strings.Contains(m.read(t, "/etc/basicfw/local.ini"), "8081/tcp") {
					t.Error("the setting is gone")
				}
			})
		})
	}
}
