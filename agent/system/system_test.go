package system

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/test/lab"
)

func TestPath(t *testing.T) {
	s := &System{Root: "/tmp/x"}
	for in, want := range map[string]string{
		"/etc/a": "/tmp/x/etc/a", "/run": "/tmp/x/run", "/usr/../etc/shadow": "/tmp/x/etc/shadow",
		"/etcetera": "/etcetera", "/proc/1": "/proc/1", "/sys/module": "/sys/module",
	} {
		if got := s.path(in); got != want {
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
	// A failed step keeps the old file and leaves no temporary one.
	for _, fail := range []string{"create", "write", "chmod", "label", "flush", "close", "rename"} {
		s.Step = lab.Before(func(op, _ string) error {
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
			t.Errorf("%s: %q and %d entries remain", fail, data, len(entries))
		}
	}
}

// Only directories of PATH that no other user can write to count.
// TestLabels writes files where the kernel labels what is new as SELinux does, by its
// directory. What did not exist has the label of its path afterwards, other files theirs.
func TestLabels(t *testing.T) {
	dir := t.TempDir()
	s := &System{Root: dir, Programs: []string{t.TempDir()}}
	const ofDirectory, ofPath, mine = "system_u:object_r:etc_runtime_t:s0", "system_u:object_r:iptables_conf_t:s0", "system_u:object_r:my_t:s0"
	set := func(path, label string) error { return unix.Lsetxattr(path, selinuxLabel, []byte(label+"\x00"), 0) }
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := set(filepath.Join(dir, "etc"), ofDirectory); err != nil {
		lab.Skip(t, "labels of files: "+err.Error())
	}
	s.Step = func(op, name string, do func() error) error {
		err := do()
		if creates := slices.Contains([]string{"create", "mkdir", "link", "lock"}, op); err != nil || !creates {
			return err
		}
		made, _ := filepath.Glob(filepath.Join(dir, filepath.Dir(name), "*"))
		hidden, _ := filepath.Glob(filepath.Join(dir, filepath.Dir(name), ".*"))
		for _, path := range append(made, hidden...) {
			if _, err := unix.Lgetxattr(path, selinuxLabel, nil); err == unix.ENODATA {
				if err := set(path, ofDirectory); err != nil {
					t.Error(err)
				}
			}
		}
		return nil
	}
	want := func(path, label string) {
		t.Helper()
		buf := make([]byte, 256)
		n, err := unix.Lgetxattr(filepath.Join(dir, path), selinuxLabel, buf)
		if got := strings.TrimRight(string(buf[:max(n, 0)]), "\x00"); err != nil || got != label {
			t.Errorf("%s has the label %q, want %q (%v)", path, got, label, err)
		}
	}
	write := func(path string) {
		t.Helper()
		if err := s.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("/etc/early") // without the program, the kernel's label stays
	want("/etc/early", ofDirectory)

	program := fmt.Sprintf("#!/bin/sh\ncase $2 in */none) echo '<<none>>';; *) echo %s;; esac\n[ $1 = -n ]\n", ofPath)
	if err := os.WriteFile(filepath.Join(s.Programs[0], "matchpathcon"), []byte(program), 0o755); err != nil {
		t.Fatal(err)
	}
	write("/etc/new")
	want("/etc/new", ofPath)
	write("/etc/none")
	want("/etc/none", ofDirectory)
	if err := set(filepath.Join(dir, "etc/new"), mine); err != nil {
		t.Fatal(err)
	}
	write("/etc/new")
	want("/etc/new", mine)
	if err := s.Remove("/etc/new"); err != nil {
		t.Fatal(err)
	}
	write("/etc/new")
	want("/etc/new", ofPath)
	unlock, err := s.Lock(context.Background(), "/etc/lock", "")
	if err := errors.Join(err, s.MkdirAll("/etc/dir", 0o755), s.Symlink("new", "/etc/link")); err != nil {
		t.Fatal(err)
	}
	unlock()
	for _, path := range []string{"/etc/dir", "/etc/link", "/etc/lock"} {
		want(path, ofPath)
	}
}

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
	find := func(dirs ...string) (string, error) { return (&System{Programs: dirs}).LookPath("prog") }
	if p, err := find(bad, good); err != nil || p != filepath.Join(good, "prog") {
		t.Errorf("%s, %v", p, err)
	}
	var missing *NotFoundError
	if _, err := find(bad); !errors.As(err, &missing) {
		t.Errorf("found in a world-writable directory: %v", err)
	}
	if err := os.Chmod(good, 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	if _, err := find(good); !errors.As(err, &missing) {
		t.Errorf("found in a sticky world-writable directory: %v", err)
	}
	for mode, found := range map[os.FileMode]bool{0o755: true, 0o775: false, 0o777 | os.ModeSticky: true} {
		if err := errors.Join(os.Chmod(good, 0o755), os.Chmod(filepath.Dir(good), mode)); err != nil {
			t.Fatal(err)
		}
		if _, err := find(good); errors.As(err, &missing) == found {
			t.Errorf("below a directory with mode %v: %v", mode, err)
		}
	}
	if err := os.Chmod(filepath.Join(good, "prog"), 0o757); err != nil {
		t.Fatal(err)
	}
	if _, err := find(good); !errors.As(err, &missing) {
		t.Errorf("found a world-writable program: %v", err)
	}
}

// TestCallersPath: the caller's PATH excludes directories, and adds none.
func TestCallersPath(t *testing.T) {
	evil := t.TempDir()
	if err := os.WriteFile(filepath.Join(evil, "env"), []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	real, err := (&System{}).LookPath("env")
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"": real, evil + ":" + defaultPath: real, "/usr/bin/:" + evil: "/usr/bin/env", "/bin:/usr/bin": "/usr/bin/env",
		evil: "", ".": "", "usr/bin": "", ":": "", "/nowhere": "", evil + "/../bin": "",
	} {
		t.Setenv("PATH", path)
		got, err := (&System{}).LookPath("env")
		var missing *NotFoundError
		if got != want || errors.As(err, &missing) != (want == "") {
			t.Errorf("PATH %q: found %q, %v, want %q", path, got, err, want)
		}
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

// TestNamespace runs a program in its own network namespace.
func TestNamespace(t *testing.T) {
	lab.Need(t)
	mine, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	for _, own := range []bool{false, true} {
		res, err := (&System{}).Run(context.Background(), Command{Name: "readlink", Args: []string{"/proc/self/ns/net"}, Namespace: own})
		if err != nil || (strings.TrimSpace(string(res.Stdout)) == mine) == own {
			t.Errorf("own namespace %v: it runs in %q, the test in %q, %v", own, res.Stdout, mine, err)
		}
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
	// The holder removes the file and releases the lock; a lock on the removed file
	// excludes no other process.
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
		t.Error("a directory was accepted")
	}
}

func TestPrintable(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "Zürich, 東京 \U0001F512": "Zürich, 東京 \U0001F512",
		"a\x1b[2Jb\n\t": "a?[2Jb??", "\u009b31m": "?31m", "\x7f\x00": "??", "\u202ex\u2066\u200b\u2028\ufeff": "?x????", "\xff\ufffd": "??", "\u00a0": "?",
	} {
		if got := Printable(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// TestPrintableJSON: no information is lost.
func TestPrintableJSON(t *testing.T) {
	want := "a\x1b\u202e\u009b\x7f\U000e0001\u2028 <é>\\\"\n"
	data, err := json.MarshalIndent(map[string]string{"k": want}, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	text := PrintableJSON(data)
	if shown := strings.ReplaceAll(string(text), "\n", ""); Printable(shown) != shown {
		t.Errorf("%q contains invisible characters", text)
	}
	var got map[string]string
	if err := json.Unmarshal(text, &got); err != nil || got["k"] != want {
		t.Errorf("%q, %v, want %q", got["k"], err, want)
	}
}
