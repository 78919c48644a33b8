// Package system is the one door to files and programs. Everything that the
// agent reads, writes or runs goes through a System, so that a test can put a
// tree of its own under it, count what happens, and break any single step.
package system

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// System is a machine's files and programs.
type System struct {
	// Root prefixes every path below /etc, /var, /run and /usr. Empty is the
	// machine itself. /proc and /sys are the kernel's own and stay.
	Root string
	// Step, where set, is called before each change to a file and before each
	// run of a program; an error from it is that step's error. It is for tests.
	Step func(op, name string) error
}

func (s *System) step(op, name string) error {
	if s.Step == nil {
		return nil
	}
	return s.Step(op, name)
}

// Path gives where a path of the contract really is.
func (s *System) Path(path string) string {
	if s.Root == "" {
		return path
	}
	for _, top := range []string{"/etc", "/var", "/run", "/usr"} {
		if path == top || strings.HasPrefix(path, top+"/") {
			return filepath.Join(s.Root, path)
		}
	}
	return path
}

// ReadFile is os.ReadFile below the root.
func (s *System) ReadFile(path string) ([]byte, error) { return os.ReadFile(s.Path(path)) }

// ReadLimited reads a file of at most max bytes; a larger one is an error.
func (s *System) ReadLimited(path string, max int64) ([]byte, error) {
	f, err := os.Open(s.Path(path))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, max+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > max {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, max)
	}
	return data, nil
}

// Stat is os.Stat below the root.
func (s *System) Stat(path string) (fs.FileInfo, error) { return os.Stat(s.Path(path)) }

// Lstat is os.Lstat below the root.
func (s *System) Lstat(path string) (fs.FileInfo, error) { return os.Lstat(s.Path(path)) }

// CheckOwner says why a file cannot be trusted with what root does: it is not
// a plain file, not root's (or the caller's own, when that is not root), or
// others may write to it.
func CheckOwner(fi fs.FileInfo) error {
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !fi.Mode().IsRegular():
		return fmt.Errorf("not a plain file, but %v", fi.Mode())
	case ok && st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("belongs to user %d, not to root", st.Uid)
	case fi.Mode()&0o022 != 0:
		return fmt.Errorf("others than root may write to it (mode %04o)", fi.Mode().Perm())
	}
	return nil
}

// Exists tells whether there is something at path, be it a dangling link.
func (s *System) Exists(path string) bool {
	_, err := os.Lstat(s.Path(path))
	return err == nil
}

// ReadDir is os.ReadDir below the root.
func (s *System) ReadDir(path string) ([]fs.DirEntry, error) { return os.ReadDir(s.Path(path)) }

// Readlink is os.Readlink below the root.
func (s *System) Readlink(path string) (string, error) { return os.Readlink(s.Path(path)) }

// MkdirAll makes a directory and its parents, and gives the last one mode.
func (s *System) MkdirAll(path string, mode fs.FileMode) error {
	p := s.Path(path)
	if fi, err := os.Lstat(p); err == nil && fi.IsDir() && fi.Mode().Perm() == mode {
		return nil
	}
	if err := s.step("mkdir", path); err != nil {
		return err
	}
	if err := os.MkdirAll(p, mode); err != nil {
		return err
	}
	return os.Chmod(p, mode)
}

// WriteFile replaces a file in one step: the data goes to a new file beside
// it, is flushed to disk and renamed over it, and then the directory is
// flushed. Whoever reads sees the old file or the new one, whole, also after a
// power cut. A symbolic link at path is replaced, never followed. The new file
// carries the SELinux label that the old one had; one without a predecessor
// gets the label of its place from the kernel.
func (s *System) WriteFile(path string, data []byte, mode fs.FileMode) (err error) {
	p := s.Path(path)
	defer func() {
		if err != nil {
			err = fmt.Errorf("writing %s: %w", path, err)
		}
	}()
	if err := s.step("write", path); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(p), "."+filepath.Base(p)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if _, err := f.Write(data); err != nil {
		return err
	}
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if err := copyLabel(p, f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := s.step("rename", path); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), p); err != nil {
		return err
	}
	return syncDir(filepath.Dir(p))
}

// copyLabel gives the new file the SELinux label of the one it replaces. A
// system without labels, or a file that was not there, is no error.
func copyLabel(old string, f *os.File) error {
	buf := make([]byte, 256)
	n, err := unix.Lgetxattr(old, "security.selinux", buf)
	if err != nil || n == 0 {
		return nil
	}
	if err := unix.Fsetxattr(int(f.Fd()), "security.selinux", buf[:n], 0); err != nil && !errors.Is(err, unix.ENOTSUP) {
		return fmt.Errorf("labelling it %q: %w", bytes.TrimRight(buf[:n], "\x00"), err)
	}
	return nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// Touch makes a file one of now; one that is not there stays so.
func (s *System) Touch(path string) error {
	if !s.Exists(path) {
		return nil
	}
	if err := s.step("touch", path); err != nil {
		return err
	}
	now := time.Now()
	return os.Chtimes(s.Path(path), now, now)
}

// Remove removes a file; one that is not there is no error.
func (s *System) Remove(path string) error {
	p := s.Path(path)
	if _, err := os.Lstat(p); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := s.step("remove", path); err != nil {
		return err
	}
	if err := os.Remove(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return syncDir(filepath.Dir(p))
}

// RemoveAll removes a directory and what is in it.
func (s *System) RemoveAll(path string) error {
	if err := s.step("remove", path); err != nil {
		return err
	}
	return os.RemoveAll(s.Path(path))
}

// RemoveDir removes a directory if it is there and empty; else it is no error.
func (s *System) RemoveDir(path string) error {
	entries, err := os.ReadDir(s.Path(path))
	if err != nil || len(entries) > 0 {
		return nil
	}
	if err := s.step("remove", path); err != nil {
		return err
	}
	return os.Remove(s.Path(path))
}

// Symlink puts a symbolic link at path in place of what is there, in one step.
func (s *System) Symlink(target, path string) error {
	if err := s.step("link", path); err != nil {
		return err
	}
	p := s.Path(path)
	temp := filepath.Join(filepath.Dir(p), "."+filepath.Base(p)+".link")
	os.Remove(temp) // of a run that was cut short
	if err := os.Symlink(target, temp); err != nil {
		return fmt.Errorf("linking %s: %w", path, err)
	}
	if err := os.Rename(temp, p); err != nil {
		os.Remove(temp)
		return fmt.Errorf("linking %s: %w", path, err)
	}
	return syncDir(filepath.Dir(p))
}

// WriteKernel writes a value to a file of /proc or /sys.
func (s *System) WriteKernel(path, value string) error {
	if err := s.step("kernel", path); err != nil {
		return err
	}
	return os.WriteFile(path, []byte(value), 0o644)
}

// Lock takes an exclusive lock on a file, which it makes if need be, and waits
// for it until the context ends. The function that it gives back lets go.
func (s *System) Lock(ctx context.Context, path string) (unlock func(), err error) {
	for {
		f, err := s.tryLock(path)
		if err != nil {
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		if f != nil {
			return func() { f.Close() }, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("locking %s: %w", path, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// tryLock is one try; it gives no file where another holds the lock.
func (s *System) tryLock(path string) (*os.File, error) {
	f, err := os.OpenFile(s.Path(path), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		// The former holder may have removed the file: then this lock keeps
		// nobody out.
		mine, e1 := f.Stat()
		there, e2 := os.Lstat(s.Path(path))
		if e1 == nil && e2 == nil && os.SameFile(mine, there) {
			return f, nil
		}
	}
	f.Close()
	if err != nil && !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
		return nil, err
	}
	return nil, nil
}

// defaultPath is where programs are looked for when the environment has none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// LookPath finds a program. It looks in PATH, but only in directories that are
// root's (or the caller's own, when that is not root) and that nobody else can
// write to, so that no other user's directory decides what root runs.
func (s *System) LookPath(name string) (string, error) {
	path := os.Getenv("PATH")
	if path == "" {
		path = defaultPath
	}
	for _, dir := range filepath.SplitList(path) {
		if !filepath.IsAbs(dir) || !trusted(dir) {
			continue
		}
		p := filepath.Join(dir, name)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 && trusted(p) {
			return p, nil
		}
	}
	return "", &NotFoundError{Name: name, Path: path}
}

func trusted(path string) bool {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return false
	}
	return (st.Uid == 0 || int(st.Uid) == os.Geteuid()) && st.Mode&0o022 == 0
}

// NotFoundError says that a program is on no trusted directory of PATH.
type NotFoundError struct{ Name, Path string }

func (e *NotFoundError) Error() string {
	return fmt.Sprintf("no %s in %s", e.Name, e.Path)
}

// Command is one run of a program.
type Command struct {
	Name  string // looked up by LookPath unless it is a path
	Args  []string
	Stdin []byte
	// Timeout bounds the run; zero is 30 seconds.
	Timeout time.Duration
}

// Result is what a program left behind.
type Result struct {
	Stdout, Stderr []byte
}

// ExitError says that a program ran and failed.
type ExitError struct {
	Command string
	Code    int // -1 where a signal ended it
	Stderr  string
	err     error
}

func (e *ExitError) Error() string {
	msg := e.Command + ": " + e.err.Error()
	if e.Stderr != "" {
		msg += ": " + e.Stderr
	}
	return msg
}

func (e *ExitError) Unwrap() error { return e.err }

// Run runs a program to its end, without a shell, with the C locale and a
// small environment. The error of one that fails is an *ExitError and holds
// what it printed on standard error.
func (s *System) Run(ctx context.Context, c Command) (Result, error) {
	path := c.Name
	if !filepath.IsAbs(path) {
		var err error
		if path, err = s.LookPath(c.Name); err != nil {
			return Result{}, err
		}
	}
	line := strings.Join(append([]string{filepath.Base(path)}, c.Args...), " ")
	if err := s.step("run", line); err != nil {
		return Result{}, fmt.Errorf("%s: %w", line, err)
	}
	timeout := c.Timeout
	if timeout == 0 {
		timeout = 30 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, c.Args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + defaultPath}
	cmd.WaitDelay = 10 * time.Second // for output that a busy machine has not read yet
	cmd.Stdin = bytes.NewReader(c.Stdin)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	res := Result{Stdout: out.Bytes(), Stderr: errOut.Bytes()}
	if err != nil {
		switch e := ctx.Err(); {
		case errors.Is(e, context.DeadlineExceeded):
			err = fmt.Errorf("no end within %v: %w", timeout, e)
		case e != nil:
			err = fmt.Errorf("cut short: %w", e)
		}
		code := -1
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		return res, &ExitError{Command: line, Code: code, Stderr: oneLine(errOut.Bytes()), err: err}
	}
	return res, nil
}

// oneLine makes a program's words fit for one line of a message.
func oneLine(b []byte) string {
	const max = 600
	s := strings.Join(strings.Fields(string(b)), " ")
	if len(s) > max {
		s = s[:max] + "..."
	}
	return Printable(s)
}

// Printable replaces what a terminal might take for a command in text that
// comes from files, processes or the network.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == utf8.RuneError || r < 0x20 || r >= 0x7f && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// Detach starts a program that goes on when this one, and the session that it
// was started in, has ended. Nothing is heard of it any more.
func (s *System) Detach(path string, args ...string) error {
	line := strings.Join(append([]string{filepath.Base(path)}, args...), " ")
	if err := s.step("detach", line); err != nil {
		return fmt.Errorf("%s: %w", line, err)
	}
	cmd := exec.Command(path, args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + cmp.Or(os.Getenv("PATH"), defaultPath)}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", line, err)
	}
	return cmd.Process.Release()
}

// Populated tells whether the control group of a systemd unit has processes.
// Which of the places is there depends on how systemd set up the hierarchies
// below cgroups: unified, hybrid, legacy.
func Populated(cgroups, unit string) bool {
	group := "/system.slice/" + unit
	for _, root := range []string{"", "/unified"} {
		if data, err := os.ReadFile(cgroups + root + group + "/cgroup.events"); err == nil {
			return bytes.Contains(data, []byte("populated 1"))
		}
	}
	data, err := os.ReadFile(cgroups + "/systemd" + group + "/cgroup.procs")
	return err == nil && len(data) > 0
}
