package kernel_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The files that the program depends on.
const (
	stateFile    = "/var/lib/basicfw/state.json"
	copyFile     = "/etc/basicfw/state.json"
	originalFile = "/var/lib/basicfw/backup/original.json"
)

// spoils returns the ways in which a file can be damaged. Persisted rules whose
// text is intact are no loss.
func spoils() map[string]func(path string, data []byte) error {
	cut := func(n func(len int) int) func(string, []byte) error {
		return func(path string, data []byte) error { return os.WriteFile(path, data[:n(len(data))], 0o600) }
	}
	text := func(text string) func(string, []byte) error {
		return func(path string, _ []byte) error { return os.WriteFile(path, []byte(text), 0o600) }
	}
	instead := func(put func(path string) error) func(string, []byte) error {
		return func(path string, _ []byte) error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return put(path)
		}
	}
	noise := make([]byte, 5000)
	for i, r := 0, rand.New(rand.NewPCG(1, 2)); i < len(noise); i++ {
		noise[i] = byte(r.Uint32())
	}
	return map[string]func(path string, data []byte) error{
		"half of it":            cut(func(n int) int { return n / 2 }),
		"all but the last line": cut(func(n int) int { return n - 2 }),
		"one byte":              cut(func(int) int { return 1 }),
		"nothing":               text(""),
		"noise":                 text(string(noise)),
		"an empty object":       text("{}\n"),
		"a list":                text("[]\n"),
		"null":                  text("null\n"),
		"twice": func(path string, data []byte) error {
			return os.WriteFile(path, append(bytes.Clone(data), data...), 0o600)
		},
		"owned by another user": func(path string, _ []byte) error { return os.Chown(path, 65534, 65534) },
		"writable by everyone":  func(path string, _ []byte) error { return os.Chmod(path, 0o666) },
		"a directory": instead(func(path string) error {
			if err := os.Mkdir(path, 0o700); err != nil {
				return err
			}
			return os.WriteFile(path+"/x", nil, 0o600)
		}),
		"a link to nowhere": instead(func(path string) error { return os.Symlink("/nowhere", path) }),
		"a FIFO":            instead(func(path string) error { return unix.Mkfifo(path, 0o600) }),
		"of a newer version": func(path string, data []byte) error {
			return os.WriteFile(path, regexp.MustCompile(`"schema": \d+`).ReplaceAll(data, []byte(`"schema": 99`)), 0o600)
		},
	}
}

// stuck reports whether a file's place is taken by something that may be the
// administrator's, so that nothing is written over it.
func stuck(how string) bool { return how == "a directory" || how == "a FIFO" }

// spoil damages files.
func (m *machine) spoil(t *testing.T, how string, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if err := spoils()[how](filepath.Join(m.root, path), []byte(m.read(t, path))); err != nil {
			t.Fatal(err)
		}
	}
}

// eachSpoil runs a test for each way to damage a file except those in but, with
// both kinds of persisted files.
func eachSpoil(t *testing.T, but []string, test func(t *testing.T, m *machine, how string)) {
	t.Parallel()
	skip := strings.Join(but, ",")
	for how := range spoils() {
		if strings.Contains(skip, how) {
			continue
		}
		t.Run(strings.ReplaceAll(how, " ", "-"), func(t *testing.T) {
			on(t, told, func(t *testing.T, m *machine) {
				m.Host.Listen(t, 22, 80, 8080)
				m.bootstrap(t)
				test(t, m, how)
			})
		})
	}
}

// refuses runs a command that has to fail with one line and change nothing.
func (m *machine) refuses(t *testing.T, args ...string) {
	t.Helper()
	before := m.everything(t)
	r := m.agent(t, args...)
	if r.Code != exitFailed {
		t.Errorf("%v: exit code %d, want %d\n%s%s", args, r.Code, exitFailed, r.Stdout, r.Stderr)
	}
	oneLine(t, r.Stderr)
	if strings.Contains(r.Stderr, "\x1b") || len(r.Stderr) > 1000 {
		t.Errorf("%v prints %q", args, r.Stderr)
	}
	same(t, "after "+strings.Join(args, " "), before, m.everything(t))
}

// boots boots the machine and checks which ports are reachable: with the
// profile's rules, or the failsafe rules.
func (m *machine) boots(t *testing.T, profile bool) {
	t.Helper()
	m.reboot(t)
	s := m.serve(t)
	for _, to := range m.Server.Both() {
		m.wantReach(t, to, 22, true, !profile)
		m.wantReach(t, to, 80, profile, profile)
		m.wantReach(t, to, 8080, false, false)
	}
	if r := s.Stop(t); r.Code != exitOK || strings.Contains(r.Stderr, "goroutine ") {
		t.Errorf("the service: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// TestStateSpoiled damages the state. Commands say so and change nothing; a boot
// loads the copy and restores the state from it.
func TestStateSpoiled(t *testing.T) {
	eachSpoil(t, nil, func(t *testing.T, m *machine, how string) {
		rules := m.rules(t)
		m.spoil(t, how, stateFile)
		for _, command := range []string{"apply", "plan", "verify", "confirm", "open 8081/tcp",
			"close 80/tcp", "ssh allow 203.0.113.5", "ssh remove " + m.Client.V4.String()} {
			m.refuses(t, strings.Fields(command)...)
		}
		if s := m.status(t, exitDrift); s.State == "protected" || len(s.Next) == 0 {
			t.Errorf("state %q, next %q, warnings %q", s.State, s.Next, s.Warnings)
		}
		m.boots(t, true)
		same(t, "rules after a boot", rules, m.rules(t))
		if stuck(how) {
			says(t, m.must(t, exitFailed, "verify", "--repair").Stderr, stateFile)
			r := m.must(t, exitFailed, "bootstrap", "--no-service")
			says(t, r.Stderr, stateFile, "move it away")
			same(t, "rules after a refused command", rules, m.rules(t))
			if err := os.RemoveAll(filepath.Join(m.root, stateFile)); err != nil {
				t.Fatal(err)
			}
			m.must(t, exitFailed, "verify")
			m.boots(t, true)
		}
		m.wantCopy(t)
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "status")
	})
}

// TestUnreadableStateIsReportedOnce bootstraps over a state that cannot be read.
func TestUnreadableStateIsReportedOnce(t *testing.T) {
	eachSpoil(t, nil, func(t *testing.T, m *machine, how string) {
		if stuck(how) {
			return // bootstrap refuses it
		}
		m.spoil(t, how, stateFile)
		if r := m.must(t, exitOK, "bootstrap", "--no-service"); strings.Count(r.Stderr, stateFile) > 1 {
			t.Errorf("one state is reported twice:\n%s", r.Stderr)
		}
	})
}

// TestStateAndCopySpoiled leaves no desired state, only the persisted rules: the failsafe
// rules are loaded, and status says so.
func TestStateAndCopySpoiled(t *testing.T) {
	eachSpoil(t, nil, func(t *testing.T, m *machine, how string) {
		m.spoil(t, how, stateFile, copyFile)
		m.boots(t, false)
		if s := m.status(t, exitDrift); s.State != "failsafe" && !stuck(how) || s.State == "protected" {
			t.Errorf("state %q, warnings %q", s.State, s.Warnings)
		}
		if stuck(how) {
			r := m.must(t, exitFailed, "bootstrap", "--no-service")
			says(t, r.Stderr, "move it away")
			for _, path := range []string{stateFile, copyFile} {
				if err := os.RemoveAll(filepath.Join(m.root, path)); err != nil {
					t.Fatal(err)
				}
			}
		}
		m.bootstrap(t)
		m.wantCopy(t)
		m.must(t, exitOK, "status")
	})
}

// TestCopySpoiled damages the copy: the state is loaded, and the copy is written again.
// What may be the administrator's stays, and is named.
func TestCopySpoiled(t *testing.T) {
	eachSpoil(t, nil, func(t *testing.T, m *machine, how string) {
		rules := m.rules(t)
		m.spoil(t, how, copyFile)
		m.boots(t, true)
		same(t, "rules after a boot", rules, m.rules(t))
		if stuck(how) {
			says(t, m.must(t, exitFailed, "open", "8081/tcp").Stderr, copyFile, "move it away")
			same(t, "rules after a refused command", rules, m.rules(t))
			if err := os.RemoveAll(filepath.Join(m.root, copyFile)); err != nil {
				t.Fatal(err)
			}
		}
		m.must(t, exitOK, "open", "8081/tcp")
		m.wantCopy(t)
	})
}

// TestRulesSpoiled damages the persisted files: the desired state is loaded, and they are
// written again.
func TestRulesSpoiled(t *testing.T) {
	eachSpoil(t, []string{"of a newer version"}, func(t *testing.T, m *machine, how string) {
		rules, files := m.rules(t), m.tree(t, false, "etc")
		m.spoil(t, how, m.persisted()...)
		r := m.must(t, exitDrift, "verify")
		for _, path := range m.persisted() {
			if !named(r.Stdout, []string{path}) {
				t.Errorf("verify does not name %s: %s", path, r.Stdout)
			}
		}
		m.boots(t, true)
		same(t, "rules after a boot", rules, m.rules(t))
		if stuck(how) { // it may hold the administrator's files
			m.refuses(t, "verify", "--repair")
			return
		}
		same(t, "files after a boot", files, m.tree(t, false, "etc"))
		m.must(t, exitOK, "verify")
	})
}

// TestPendingSpoiled damages the record of a pending change: the change is rolled back, and
// unlock still works.
func TestPendingSpoiled(t *testing.T) {
	eachSpoil(t, nil, func(t *testing.T, m *machine, how string) {
		rules := m.rules(t)
		try := func() {
			t.Helper()
			m.write(t, "/etc/basicfw/agent.ini", "[open]\nx = 8081/tcp\n", 0o640)
			m.must(t, exitOK, "apply", "--confirm", "1h")
			m.killWaiting(t)
			m.spoil(t, how, pendingFile)
		}
		try()
		m.refuses(t, "confirm")
		m.refuses(t, "apply")
		if s := m.status(t, exitDrift); s.State == "protected" || s.State == "pending" {
			t.Errorf("state %q, warnings %q", s.State, s.Warnings)
		}
		if how == "a directory" { // it may hold the administrator's files and stays
			return
		}
		m.must(t, exitOK, "verify", "--repair")
		same(t, "rules after a repair", rules, m.rules(t))
		m.must(t, exitOK, "verify")
		try()
		m.boots(t, true)
		same(t, "rules after a boot", rules, m.rules(t))
		m.must(t, exitOK, "verify")
		try()
		m.must(t, exitOK, "unlock")
		m.wantSSH(t, true, false)
		m.must(t, exitOK, "lock")
		same(t, "rules in the end", rules, m.rules(t))
		if m.exists(t, pendingFile) {
			t.Error("the pending file is still there")
		}
	})
}

// TestRecordSpoiled damages the backup of what was there before bootstrap. That prevents
// uninstall and nothing else.
func TestRecordSpoiled(t *testing.T) {
	eachSpoil(t, []string{"of a newer version"}, func(t *testing.T, m *machine, how string) {
		rules := m.rules(t)
		m.spoil(t, how, originalFile)
		m.refuses(t, "uninstall")
		m.boots(t, true)
		same(t, "rules after a boot", rules, m.rules(t))
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "unlock")
		m.must(t, exitOK, "lock")
		m.must(t, exitOK, "open", "8081/tcp")
		m.must(t, exitOK, "close", "8081/tcp")
		same(t, "rules in the end", rules, m.rules(t))
		m.refuses(t, "uninstall")
		if err := os.RemoveAll(filepath.Join(m.root, originalFile)); err != nil {
			t.Fatal(err)
		}
		m.must(t, exitOK, "uninstall")
		m.wantReach(t, m.Server.V4, 8080, true, true)
	})
}
