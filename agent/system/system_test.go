package system

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestPath(t *testing.T) {
	s := &System{Root: "/tmp/x"}
	for in, want := range map[string]string{
		"/etc/a": "/tmp/x/etc/a", "/run": "/tmp/x/run", "/usr/../etc/shadow": "/tmp/x/etc/shadow",
		"/etcetera": "/etcetera", "/proc/1": "/proc/1", "/sys/module": "/sys/module",
	} {
		if got := s.Path(in); got != want {
			t.Errorf("%s: %s, want %s", in, got, want)
		}
	}
}

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	s := &System{Root: dir}
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "etc", "f")
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, []byte("theirs"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, path); err != nil {
		t.Fatal(err)
	}
	if err := s.WriteFile("/etc/f", []byte("ours"), 0o640); err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(other); string(data) != "theirs" {
		t.Errorf("the link was followed: %q", data)
	}
	fi, err := os.Lstat(path)
	if err != nil || fi.Mode() != 0o640 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	// A step that fails leaves the old file, and nothing beside it.
	for _, fail := range []string{"create", "write", "chmod", "label", "flush", "close", "rename"} {
		s.Step = Before(func(op, _ string) error {
			if op == fail {
				return errors.New("broken")
			}
			return nil
		})
		if err := s.WriteFile("/etc/f", []byte("new"), 0o640); err == nil || !strings.Contains(err.Error(), "writing /etc/f") {
			t.Errorf("%s: %v", fail, err)
		}
		entries, _ := os.ReadDir(filepath.Dir(path))
		if data, _ := os.ReadFile(path); string(data) != "ours" || len(entries) != 1 {
			t.Errorf("%s: %q and %d entries are left", fail, data, len(entries))
		}
	}
}

// Only directories that nobody else can write to count in PATH.
func TestLookPath(t *testing.T) {
	good, bad := t.TempDir(), t.TempDir()
	for dir, mode := range map[string]os.FileMode{good: 0o755, bad: 0o777} {
		if err := os.WriteFile(filepath.Join(dir, "prog"), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
	}
	s := &System{}
	t.Setenv("PATH", bad+":relative::"+good)
	if p, err := s.LookPath("prog"); err != nil || p != filepath.Join(good, "prog") {
		t.Errorf("%s, %v", p, err)
	}
	t.Setenv("PATH", bad)
	var missing *NotFoundError
	if _, err := s.LookPath("prog"); !errors.As(err, &missing) {
		t.Errorf("found in a directory that all may write to: %v", err)
	}
	if err := os.Chmod(filepath.Join(good, "prog"), 0o757); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", good)
	if _, err := s.LookPath("prog"); !errors.As(err, &missing) {
		t.Errorf("found a program that all may write to: %v", err)
	}
}

func TestRun(t *testing.T) {
	s := &System{}
	t.Setenv("SECRET", "x")
	res, err := s.Run(context.Background(), Command{Name: "/bin/sh", Args: []string{"-c", "cat; env"}, Stdin: []byte("in\n")})
	if err != nil || !strings.HasPrefix(string(res.Stdout), "in\n") || strings.Contains(string(res.Stdout), "SECRET") || !strings.Contains(string(res.Stdout), "LC_ALL=C") {
		t.Errorf("%q, %v", res.Stdout, err)
	}
	_, err = s.Run(context.Background(), Command{Name: "/bin/sh", Args: []string{"-c", "echo 'a\n\033[31mb' >&2; exit 4"}})
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Code != 4 || exit.Stderr != "a ?[31mb" {
		t.Errorf("%v", err)
	}
	start := time.Now()
	_, err = s.Run(context.Background(), Command{Name: "/bin/sleep", Args: []string{"60"}, Timeout: 50 * time.Millisecond})
	if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 20*time.Second {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}

func TestLock(t *testing.T) {
	dir := t.TempDir()
	s := &System{Root: dir}
	if err := os.Mkdir(filepath.Join(dir, "run"), 0o755); err != nil {
		t.Fatal(err)
	}
	unlock, err := s.Lock(context.Background(), "/run/lock", "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if _, err := s.Lock(ctx, "/run/lock", ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second holder: %v", err)
	}
	// Who holds it removes the file and lets go; a lock on what was removed
	// keeps nobody out.
	if err := os.Remove(filepath.Join(dir, "run/lock")); err != nil {
		t.Fatal(err)
	}
	again, err := s.Lock(context.Background(), "/run/lock", "")
	if err != nil {
		t.Fatal(err)
	}
	unlock()
	ctx, cancel = context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if _, err := s.Lock(ctx, "/run/lock", ""); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a second holder of the new file: %v", err)
	}
	again()
}

func TestCheckOwner(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for mode, ok := range map[os.FileMode]bool{0o600: true, 0o644: true, 0o666: false, 0o660: false} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		fi, _ := os.Lstat(path)
		if err := CheckOwner(fi); (err == nil) != ok {
			t.Errorf("%04o: %v", mode, err)
		}
	}
	if fi, _ := os.Lstat(dir); CheckOwner(fi) == nil {
		t.Error("a directory passed")
	}
}
