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

// A directory that is made later is watched as its parent is.
func TestWatchDirs(t *testing.T) {
	root := t.TempDir()
	etc := filepath.Join(root, "etc")
	if err := os.MkdirAll(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	told := make(chan struct{}, 100)
	if err := (&System{Root: root}).WatchDirs(ctx, func() { told <- struct{}{} }, "/etc", "/etc/conf.d", "/etc/none"); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(etc, "conf.d", "x")
	for _, step := range []struct {
		name string
		do   func() error
	}{
		{"a directory", func() error { return os.Mkdir(filepath.Dir(file), 0o755) }},
		{"a file in it", func() error { return os.WriteFile(file, []byte("x"), 0o600) }},
		{"its mode", func() error { return os.Chmod(file, 0o644) }},
		{"another name", func() error { return os.Rename(file, file+"y") }},
		{"gone", func() error { return os.Remove(file + "y") }},
		{"the directory gone", func() error { return os.Remove(filepath.Dir(file)) }},
		{"and there again", func() error { return os.Mkdir(filepath.Dir(file), 0o755) }},
		{"with a file", func() error { return os.WriteFile(file, []byte("x"), 0o600) }},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-told:
		case <-time.After(10 * time.Second):
			t.Errorf("%s: nothing was told", step.name)
		}
		for quiet := false; !quiet; {
			select {
			case <-told:
			case <-time.After(50 * time.Millisecond):
				quiet = true
			}
		}
	}
}
