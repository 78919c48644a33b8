package system

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestWatch(t *testing.T) {
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := &System{Root: root}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	changed, err := s.Watch(ctx, "/etc/state")
	if err != nil {
		t.Fatal(err)
	}
	write := func(path string) {
		t.Helper()
		if err := s.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// told waits for news; it is the other file's turn that shows there is none
	// of that.
	told := func(what string) {
		t.Helper()
		select {
		case <-changed:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: nothing was told", what)
		}
	}
	write("/etc/state")
	told("made")
	write("/etc/state")
	told("replaced")
	write("/etc/other")
	if err := s.Remove("/etc/state"); err != nil {
		t.Fatal(err)
	}
	told("removed")
	select {
	case <-changed:
		t.Error("another file's change was told")
	default:
	}
	if _, err := s.Watch(ctx, "/etc/none/state"); err == nil {
		t.Error("a directory that is not there was watched")
	}
}
