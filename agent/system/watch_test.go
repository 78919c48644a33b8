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
	// told waits for news. A change of the watched file shows that there was none of
	// the other file.
	told := func(what string) {
		t.Helper()
		select {
		case <-changed:
		case <-time.After(10 * time.Second):
			t.Fatalf("%s: not reported", what)
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
		t.Error("another file's change was reported")
	default:
	}
	etc := filepath.Join(root, "etc")
	if err := os.RemoveAll(etc); err != nil {
		t.Fatal(err)
	}
	told("the directory removed") // the receiver may have to create it again
	if err := os.Mkdir(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	told("the directory made again")
	write("/etc/state")
	told("made again")
	if _, err := s.Watch(ctx, "/etc/none/state"); err == nil {
		t.Error("a missing directory was watched")
	}
}

// TestWatchPaths checks that directories and files are watched that are created later or
// are links.
func TestWatchPaths(t *testing.T) {
	root := t.TempDir()
	etc := filepath.Join(root, "etc")
	if err := os.MkdirAll(etc, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	told := make(chan struct{}, 100)
	paths := func() []string { return []string{"/etc/conf.d", "/etc/none", "/etc/a/b/c", "/etc/file"} }
	if err := (&System{Root: root}).WatchPaths(ctx, func() { told <- struct{}{} }, paths); err != nil {
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
		{"file removed", func() error { return os.Remove(file + "y") }},
		{"directory removed", func() error { return os.Remove(filepath.Dir(file)) }},
		{"directory created again", func() error { return os.Mkdir(filepath.Dir(file), 0o755) }},
		{"with a file", func() error { return os.WriteFile(file, []byte("x"), 0o600) }},
		{"directory moved away", func() error { return os.Rename(filepath.Dir(file), filepath.Join(root, "old")) }},
		{"another in its place", func() error { return os.Mkdir(filepath.Dir(file), 0o755) }},
		{"a file in that", func() error { return os.WriteFile(file, []byte("x"), 0o600) }},
		{"the first of three directories", func() error { return os.Mkdir(filepath.Join(etc, "a"), 0o755) }},
		{"the second", func() error { return os.Mkdir(filepath.Join(etc, "a/b"), 0o755) }},
		{"the third", func() error { return os.Mkdir(filepath.Join(etc, "a/b/c"), 0o755) }},
		{"a file in the third", func() error { return os.WriteFile(filepath.Join(etc, "a/b/c/x"), nil, 0o600) }},
		{"a link", func() error { return os.Symlink("../data/link", filepath.Join(etc, "file")) }},
		{"the directory of its target", func() error { return os.Mkdir(filepath.Join(root, "data"), 0o755) }},
		{"its target, a link", func() error { return os.Symlink(filepath.Join(root, "file"), filepath.Join(root, "data/link")) }},
		{"the target of that", func() error { return os.WriteFile(filepath.Join(root, "file"), nil, 0o600) }},
		{"a write to it", func() error { return os.WriteFile(filepath.Join(root, "file"), []byte("x"), 0o600) }},
	} {
		if err := step.do(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-told:
		case <-time.After(10 * time.Second):
			t.Errorf("%s: not reported", step.name)
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
