package store

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

func newStore(t *testing.T) (*Store, string) {
	t.Helper()
	root := t.TempDir()
	for _, d := range []string{"var/lib", "run"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return New(&system.System{Root: root}), root
}

func TestState(t *testing.T) {
	s, root := newStore(t)
	if _, err := s.Load(); !errors.Is(err, ErrNone) {
		t.Fatalf("nothing was saved: %v", err)
	}
	st := State{Desired: firewall.Failsafe([]uint16{22})}
	var err error
	if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
		t.Fatal(err)
	}
	if err := s.Save(st); err != nil {
		t.Fatal(err)
	}
	got, err := s.Load()
	if err != nil || !got.Ruleset.Equal(st.Ruleset) {
		t.Errorf("not the saved state: %v", err)
	}
	path := filepath.Join(root, StateFile)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]string{
		"empty": "", "truncated": string(good[:len(good)/2]), "garbage": "\x00\xff", "another schema": `{"schema": 3}`, "no schema": `{}`,
		"an invalid rule": strings.Replace(string(good), `"in": "lo"`, `"in": "lo -j ACCEPT"`, 1),
	} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Load(); err == nil || errors.Is(err, ErrNone) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if fi, _ := os.Stat(filepath.Join(root, Dir)); fi.Mode().Perm() != 0o700 {
		t.Errorf("%s is %v", Dir, fi.Mode())
	}
}

// The error of a timeout names the holder of the lock.
func TestLockNamesHolder(t *testing.T) {
	s, _ := newStore(t)
	unlock, err := s.Lock(context.Background(), "apply")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if _, err := s.Lock(ctx, "bootstrap"); err == nil || !strings.Contains(err.Error(), "basicfw-agent apply") {
		t.Errorf("%v", err)
	}
}
