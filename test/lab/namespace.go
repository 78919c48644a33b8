package lab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Namespace is a network namespace with a mount namespace of its own, in which /sys shows
// that network. It has no name and disappears with the test's process, however that ends.
type Namespace struct {
	net, mnt *os.File
}

// NewNamespace makes a namespace whose loopback is up.
func NewNamespace(t testing.TB) *Namespace {
	t.Helper()
	n := &Namespace{}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS | unix.CLONE_NEWNS | unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unsharing namespaces: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("making mounts private: %w", err)
		}
		if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
			return fmt.Errorf("mounting sysfs: %w", err)
		}
		var err error
		if n.net, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		n.mnt, err = os.Open("/proc/thread-self/ns/mnt")
		return err
	})
	if err != nil {
		t.Fatalf("making a namespace: %v", err)
	}
	t.Cleanup(func() { n.net.Close(); n.mnt.Close() })
	n.MustRun(t, "ip", "link", "set", "lo", "up")
	return n
}

// Do runs f on a thread inside the namespace. Sockets and programs that f starts stay
// there; goroutines that f starts do not.
func (n *Namespace) Do(f func() error) error {
	return onThread(func() error {
		// A thread that shares its working directory may not change mounts.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unsharing the working directory: %w", err)
		}
		if err := unix.Setns(int(n.mnt.Fd()), unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("entering the mount namespace: %w", err)
		}
		if err := unix.Setns(int(n.net.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("entering the network namespace: %w", err)
		}
		return f()
	})
}

// onThread runs f on a thread that ends with it: a goroutine that ends locked ends its
// thread, so no other goroutine ever runs in its namespaces.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

// Result is the result of a program.
type Result struct {
	Stdout, Stderr string
	Code           int
}

// Command is a program to run in a namespace.
type Command struct {
	Args  []string // the program first
	Env   []string // all of it; nil is the test's own
	Dir   string
	Stdin string
	// NoIPv6 hides IPv6 from the program.
	NoIPv6 bool
	// NoNamespaces denies the program a network namespace of its own.
	NoNamespaces bool
	// Linux2632 hides from the program the system calls that are newer than Linux 2.6.32.
	Linux2632 bool
	// UID is the user and group of the program; 0 is root.
	UID uint32
	// Limit bounds how long the program runs; 0 is maxRun.
	Limit time.Duration
}

// Process is a program that runs in a namespace.
type Process struct {
	cmd      *exec.Cmd
	out, err bytes.Buffer
	late     context.Context // done once the program took too long
	cancel   context.CancelFunc
}

// maxRun bounds every program that a test runs, unless it has a Limit.
const maxRun = 90 * time.Second

// Start starts a program in the namespace.
func (n *Namespace) Start(t testing.TB, c Command) *Process {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), cmp.Or(c.Limit, maxRun))
	p := &Process{cmd: exec.CommandContext(ctx, c.Args[0], c.Args[1:]...), late: ctx, cancel: cancel}
	p.cmd.Env, p.cmd.Dir = c.Env, c.Dir
	p.cmd.Stdin = bytes.NewBufferString(c.Stdin)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.err
	p.cmd.WaitDelay = 10 * time.Second
	if c.UID != 0 {
		p.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.UID, Gid: c.UID}}
	}
	// The child inherits the namespaces of the thread that forks it.
	err := n.Do(func() error {
		if c.NoIPv6 {
			if err := forbidIPv6(); err != nil {
				return err
			}
		}
		if c.NoNamespaces {
			if err := forbidNamespaces(); err != nil {
				return err
			}
		}
		if c.Linux2632 {
			if err := forbidNew(); err != nil {
				return err
			}
		}
		return p.cmd.Start()
	})
	if err != nil {
		cancel()
		t.Fatalf("starting %v: %v", c.Args, err)
	}
	return p
}

// Wait waits for the program to end. A program that has to be killed fails the test.
func (p *Process) Wait(t testing.TB) Result {
	t.Helper()
	r := p.End(t)
	if r.Code < 0 {
		t.Fatalf("running %v: %v\n%s%s", p.cmd.Args, p.cmd.ProcessState, r.Stdout, r.Stderr)
	}
	return r
}

// End is Wait for a program that may also kill itself; its code is -1 then.
func (p *Process) End(t testing.TB) Result {
	t.Helper()
	defer p.cancel()
	err := p.cmd.Wait()
	r := Result{Stdout: p.out.String(), Stderr: p.err.String(), Code: p.cmd.ProcessState.ExitCode()}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || p.late.Err() != nil {
		t.Fatalf("running %v: %v\n%s%s", p.cmd.Args, err, r.Stdout, r.Stderr)
	}
	return r
}

// Stop asks the program to end, as a service manager does, and waits for it.
func (p *Process) Stop(t testing.TB) Result {
	t.Helper()
	if err := p.Terminate(); err != nil {
		t.Fatalf("stopping %v: %v", p.cmd.Args, err)
	}
	return p.Wait(t)
}

// Terminate asks the program to end and does not wait.
func (p *Process) Terminate() error { return p.cmd.Process.Signal(unix.SIGTERM) }

// Kill ends the program at once; it does not wait.
func (p *Process) Kill() error { return p.cmd.Process.Kill() }

// Run runs a program to its end.
func (n *Namespace) Run(t testing.TB, c Command) Result {
	t.Helper()
	return n.Start(t, c).Wait(t)
}

// MustRun runs a program that has to succeed, and returns its output.
func (n *Namespace) MustRun(t testing.TB, args ...string) string {
	t.Helper()
	r := n.Run(t, Command{Args: args})
	if r.Code != 0 {
		t.Fatalf("%v: exit code %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// KillAll kills the programs in the namespace, also those that left their parent, and waits
// until they are gone.
func (n *Namespace) KillAll(t testing.TB) {
	t.Helper()
	want, err := n.net.Stat()
	if err != nil {
		t.Fatal(err)
	}
	Poll(t, "the programs to end", func() bool {
		links, err := filepath.Glob("/proc/[0-9]*/ns/net")
		if err != nil {
			t.Fatal(err)
		}
		alive := false
		for _, link := range links {
			pid, err := strconv.Atoi(strings.Split(link, "/")[2])
			net, gone := os.Stat(link) // a zombie has none
			if err != nil || gone != nil || pid == os.Getpid() || !os.SameFile(net, want) {
				continue
			}
			alive = true
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && err != unix.ESRCH {
				t.Fatalf("killing process %d: %v", pid, err)
			}
		}
		return !alive
	})
}

// Bind mounts the directory or file src on dst, in the namespace only.
func (n *Namespace) Bind(t testing.TB, src, dst string) {
	t.Helper()
	if err := n.Do(func() error { return unix.Mount(src, dst, "", unix.MS_BIND, "") }); err != nil {
		t.Fatalf("mounting %s on %s: %v", src, dst, err)
	}
}

// ReadOnly makes a directory read-only in the namespace until undo is called.
func (n *Namespace) ReadOnly(t testing.TB, dir string) (undo func()) {
	t.Helper()
	n.Bind(t, dir, dir)
	if err := n.Do(func() error {
		return unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, "")
	}); err != nil {
		t.Fatalf("making %s read-only: %v", dir, err)
	}
	return func() {
		t.Helper()
		if err := n.Do(func() error { return unix.Unmount(dir, 0) }); err != nil {
			t.Fatalf("making %s writable again: %v", dir, err)
		}
	}
}

// Full puts a directory on a full file system, in the namespace only, until undo is called.
// Its contents stay there.
func (n *Namespace) Full(t testing.TB, dir string) (undo func()) {
	t.Helper()
	err := n.Do(func() error {
		files, err := ReadTree(dir)
		if err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=4m"); err != nil {
			return err
		}
		return errors.Join(WriteTree(dir, files), fill(filepath.Join(dir, ".filler")))
	})
	if err != nil {
		t.Fatalf("filling %s: %v", dir, err)
	}
	return func() {
		t.Helper()
		if err := n.Do(func() error { return unix.Unmount(dir, 0) }); err != nil {
			t.Fatalf("freeing space in %s: %v", dir, err)
		}
	}
}

// Entry is a directory, a regular file, or a symbolic link, whose data is its target.
type Entry struct {
	Path string // below the directory
	Mode os.FileMode
	Data []byte
}

// ReadTree reads everything below a directory.
func ReadTree(dir string) ([]Entry, error) {
	var all []Entry
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		e := Entry{Mode: fi.Mode()}
		if e.Path, err = filepath.Rel(dir, path); err != nil {
			return err
		}
		switch {
		case fi.Mode().IsRegular():
			e.Data, err = os.ReadFile(path)
		case fi.Mode()&os.ModeSymlink != 0:
			var target string
			target, err = os.Readlink(path)
			e.Data = []byte(target)
		}
		all = append(all, e)
		return err
	})
	return all, err
}

// WriteTree writes below a directory what ReadTree has read.
func WriteTree(dir string, all []Entry) error {
	for _, e := range all {
		path := filepath.Join(dir, e.Path)
		var err error
		switch {
		case e.Mode&os.ModeSymlink != 0:
			if err := os.Symlink(string(e.Data), path); err != nil {
				return err
			}
			continue
		case e.Mode.IsDir():
			err = os.MkdirAll(path, 0o700)
		default:
			err = os.WriteFile(path, e.Data, 0o600)
		}
		if err == nil {
			err = os.Chmod(path, e.Mode.Perm())
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fill writes a file until there is no space left.
func fill(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	block := make([]byte, 4096)
	for {
		if _, err := f.Write(block); errors.Is(err, unix.ENOSPC) {
			return nil
		} else if err != nil {
			return err
		}
	}
}
