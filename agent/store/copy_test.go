package store

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// stateOf returns a state that its instance-id identifies.
func stateOf(t *testing.T, instance string) State {
	t.Helper()
	st := State{InstanceID: instance, Desired: firewall.Failsafe([]uint16{22})}
	var err error
	if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
		t.Fatal(err)
	}
	return st
}

// saved saves a state.
func saved(t *testing.T, s *Store, st State) {
	t.Helper()
	if err := s.Save(st); err != nil {
		t.Fatal(err)
	}
}

// booted returns the instance of the state that a boot loads, or "".
func booted(root string) string {
	s := New(&system.System{Root: root})
	s.UseCopy()
	st, err := s.Load()
	if err != nil {
		return ""
	}
	return st.InstanceID
}

func contents(t *testing.T, root, path string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(root, path))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return string(data)
}

func TestSaveWritesCopy(t *testing.T) {
	s, root := newStore(t)
	saved(t, s, stateOf(t, "i-1"))
	if a, b := contents(t, root, StateFile), contents(t, root, CopyFile); a == "" || a != b {
		t.Errorf("the state is %q, the copy %q", a, b)
	}
	for path, mode := range map[string]fs.FileMode{CopyFile: 0o600, filepath.Dir(CopyFile): 0o755, Dir: 0o700} {
		if fi, err := os.Stat(filepath.Join(root, path)); err != nil || fi.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v, want %v", path, fi.Mode(), err, mode)
		}
	}
	if err := os.RemoveAll(filepath.Join(root, "var")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Load(); !errors.Is(err, ErrLost) {
		t.Errorf("a command without the state: %v, want %v", err, ErrLost)
	}
	if got := booted(root); got != "i-1" {
		t.Errorf("a boot without /var loads %q", got)
	}
}

// TestInterruptedSave kills a program at each step of Save, before and after the
// step. A boot then loads either state; once it is the new one, a boot that has
// lost /var loads the new one too.
func TestInterruptedSave(t *testing.T) {
	killed := errors.New("killed")
	for _, after := range []bool{false, true} {
		for n, done := 1, false; !done; n++ {
			s, root := newStore(t)
			saved(t, s, stateOf(t, "old"))
			var steps []string
			s.sys.Step = func(op, name string, do func() error) error {
				if lab.Looks(op) {
					return do()
				}
				steps = append(steps, op+" "+name)
				if len(steps) == n && after {
					do()
				}
				if len(steps) >= n { // nothing is done any more, nor undone
					return killed
				}
				return do()
			}
			err := s.Save(stateOf(t, "new"))
			if done = len(steps) < n; done {
				if err != nil || n < 14 {
					t.Errorf("%d steps, %v", n, err)
				}
				continue
			}
			got := booted(root)
			if got != "old" && got != "new" {
				t.Errorf("%s: a boot loads %q", steps[n-1], got)
			}
			if err := os.RemoveAll(filepath.Join(root, "var")); err != nil {
				t.Fatal(err)
			}
			lost := booted(root)
			if lost != "old" && lost != "new" || got == "new" && lost != "new" {
				t.Errorf("%s: a boot loads %q, and without /var %q", steps[n-1], got, lost)
			}
		}
	}
}

// TestSaveFails makes each step of Save fail once: both files stay unchanged.
func TestSaveFails(t *testing.T) {
	for _, first := range []bool{true, false} {
		for n, done := 1, false; !done; n++ {
			s, root := newStore(t)
			if !first {
				saved(t, s, stateOf(t, "old"))
			}
			state, second := contents(t, root, StateFile), contents(t, root, CopyFile)
			var steps []string
			s.sys.Step = lab.Before(func(op, name string) error {
				if steps = append(steps, op+" "+name); len(steps) == n {
					return fs.ErrPermission
				}
				return nil
			})
			err := s.Save(stateOf(t, "new"))
			if done = len(steps) < n; done {
				if err != nil {
					t.Errorf("no step failed: %v", err)
				}
				continue
			}
			if !errors.Is(err, fs.ErrPermission) {
				t.Errorf("%s: %v", steps[n-1], err)
			}
			// A renamed file has changed, even if its directory was not flushed.
			if strings.HasPrefix(steps[n-1], "sync ") {
				continue
			}
			if contents(t, root, StateFile) != state || contents(t, root, CopyFile) != second {
				t.Errorf("%s: the state or its copy differs", steps[n-1])
			}
		}
	}
}

// TestLoadPrefers loads all combinations of usable and unusable state and copy.
func TestLoadPrefers(t *testing.T) {
	failsafe := func(instance string) func(t *testing.T) []byte {
		return func(t *testing.T) []byte {
			st := stateOf(t, instance)
			st.Schema, st.Failsafe = Schema, "why"
			data, err := encode(st)
			if err != nil {
				t.Fatal(err)
			}
			return data
		}
	}
	good := func(instance string) func(t *testing.T) []byte {
		return func(t *testing.T) []byte {
			return bytes.Replace(failsafe(instance)(t), []byte(`"failsafe": "why"`), []byte(`"failsafe": ""`), 1)
		}
	}
	text := func(text string) func(t *testing.T) []byte { return func(*testing.T) []byte { return []byte(text) } }
	none := func(*testing.T) []byte { return nil }
	for _, tt := range []struct {
		name          string
		state, second func(t *testing.T) []byte
		want          string // the instance, or a part of the error
		restored      bool
	}{
		{"both", good("state"), good("copy"), "state", false},
		{"no copy", good("state"), none, "state", false},
		{"unreadable copy", good("state"), text("{"), "state", false},
		{"lost", none, good("copy"), "copy", true},
		{"truncated", text(`{"schema": 2, "instance_id": "state"`), good("copy"), "copy", true},
		{"of a newer version", text(`{"schema": 99}`), good("copy"), "copy", true},
		{"failsafe", failsafe("state"), good("copy"), "copy", true},
		{"both failsafe", failsafe("state"), failsafe("copy"), "state", false},
		{"failsafe, no copy", failsafe("state"), none, "state", false},
		{"lost, failsafe copy", none, failsafe("copy"), "copy", true},
		{"none", none, none, ErrNone.Error(), false},
		{"lost, copy of a newer version", none, text(`{"schema": 99, "version": "9"}`), "newer version of basicfw-agent, 9", false},
		{"lost, unreadable copy", none, text("{"), StateFile + " is lost, and its copy cannot be used", false},
		{"both unreadable", text("{"), text("["), "reading " + StateFile, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, root := newStore(t)
			for path, data := range map[string][]byte{StateFile: tt.state(t), CopyFile: tt.second(t)} {
				if err := os.MkdirAll(filepath.Join(root, filepath.Dir(path)), 0o755); err != nil {
					t.Fatal(err)
				}
				if data != nil {
					if err := os.WriteFile(filepath.Join(root, path), data, 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			before, second := contents(t, root, StateFile), contents(t, root, CopyFile)
			s.UseCopy()
			st, err := s.Load()
			if err != nil && !strings.Contains(err.Error(), tt.want) || err == nil && st.InstanceID != tt.want {
				t.Errorf("loaded %q, %v; want %q", st.InstanceID, err, tt.want)
			}
			restored, err := s.Restore()
			if err != nil || restored != tt.restored {
				t.Errorf("restored %v, %v", restored, err)
			}
			want := before
			if restored {
				want = second
			}
			if contents(t, root, StateFile) != want || contents(t, root, CopyFile) != second {
				t.Error("the files are not what they should be")
			}
			aside := ""
			if restored && before != "" && !strings.Contains(before, "failsafe") {
				aside = before
			}
			if got := contents(t, root, StateFile+".broken"); got != aside {
				t.Errorf("set aside: %q, want %q", got, aside)
			}
		})
	}
}

// TestForgedCopy: a copy that users other than root may have written is not used.
func TestForgedCopy(t *testing.T) {
	for name, spoil := range map[string]func(path string) error{
		"writable by others": func(path string) error { return os.Chmod(path, 0o622) },
		"a link": func(path string) error {
			return errors.Join(os.Rename(path, path+".real"), os.Symlink(path+".real", path))
		},
		"a FIFO": func(path string) error { return errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)) },
	} {
		s, root := newStore(t)
		saved(t, s, stateOf(t, "i-1"))
		if err := errors.Join(spoil(filepath.Join(root, CopyFile)), s.Forget()); err != nil {
			t.Fatal(err)
		}
		if got := booted(root); got != "" {
			t.Errorf("%s: a boot loads %q", name, got)
		}
		if restored, err := s.Restore(); restored || err != nil {
			t.Errorf("%s: restored %v, %v", name, restored, err)
		}
	}
}

// TestRestoreKeepsOther: what is not a regular file may be another program's.
func TestRestoreKeepsOther(t *testing.T) {
	s, root := newStore(t)
	saved(t, s, stateOf(t, "i-1"))
	path := filepath.Join(root, StateFile)
	if err := errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)); err != nil {
		t.Fatal(err)
	}
	if restored, err := s.Restore(); restored || err == nil || hint.Of(err) != "move it away" {
		t.Errorf("%v, %v", restored, err)
	}
	if got := booted(root); got != "i-1" {
		t.Errorf("a boot loads %q", got)
	}
}

// TestFailsafeKeepsCopy: the failsafe rules do not replace a readable desired state.
func TestFailsafeKeepsCopy(t *testing.T) {
	s, root := newStore(t)
	failsafe := stateOf(t, "failsafe")
	failsafe.Failsafe = "why"
	saved(t, s, failsafe)
	if contents(t, root, CopyFile) != contents(t, root, StateFile) {
		t.Error("without a copy to keep, none was written")
	}
	saved(t, s, stateOf(t, "i-1"))
	kept := contents(t, root, CopyFile)
	saved(t, s, failsafe)
	if err := s.SyncCopy(); err != nil {
		t.Error(err)
	}
	if contents(t, root, CopyFile) != kept {
		t.Error("the copy is the failsafe state")
	}
	if st, err := s.Load(); err != nil || st.InstanceID != "failsafe" {
		t.Errorf("a command reads %q, %v", st.InstanceID, err)
	}
	if got := booted(root); got != "i-1" {
		t.Errorf("a boot loads %q", got)
	}
}

// TestStateOfFirstVersion reads the state that version 0.1 wrote, which had no
// copy. SyncCopy writes one and leaves an existing one unchanged.
func TestStateOfFirstVersion(t *testing.T) {
	s, root := newStore(t)
	data, err := os.ReadFile("testdata/state-0.1.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(filepath.Join(root, Dir), 0o700), os.WriteFile(filepath.Join(root, StateFile), data, 0o600)); err != nil {
		t.Fatal(err)
	}
	st, err := s.Load()
	if err != nil || st.Profile.Name != "web+mail" || st.Version != "0.1.0" {
		t.Fatalf("%+v, %v", st.Profile, err)
	}
	var steps []string
	s.sys.Step = lab.Before(func(op, name string) error { steps = append(steps, op+" "+name); return nil })
	for _, writes := range []bool{true, false} {
		steps = nil
		if err := s.SyncCopy(); err != nil || contents(t, root, CopyFile) != string(data) {
			t.Errorf("the copy differs: %v", err)
		}
		if slices.Contains(steps, "rename "+CopyFile) != writes {
			t.Errorf("writes %v: %q", writes, steps)
		}
	}
	if err := os.Chmod(filepath.Join(root, CopyFile), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := s.SyncCopy(); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat(filepath.Join(root, CopyFile)); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("a copy that others can write stays: %v", err)
	}
}
