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
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// System is a machine's files and programs.
type System struct {
	// Root prefixes every path below /etc, /var, /run and /usr. Empty is the
	// machine itself. /proc and /sys are the kernel's own and stay.
	Root string
	// Step, where set, does each step. It is for tests.
	Step Step
	// Programs, where set, are where programs are looked for in place of the
	// system's directories. It is for tests.
	Programs []string
}

// Step does a step in its own way: an operation on a file, or a run of a
// program, which is what do does. It can end the program before that or after
// it, or have another error come of it.
type Step func(op, name string, do func() error) error

// Do is a step of somebody else's: of a library that has no seam.
func (s *System) Do(op, name string, do func() error) error {
	if s.Step == nil {
		return do()
	}
	return s.Step(op, name, do)
}

// The steps that change nothing.
const (
	stepRead     = "read"
	stepStat     = "stat"
	stepList     = "list"
	stepReadlink = "readlink"
)

// Looks tells whether a step only looks.
func Looks(op string) bool {
	return op == stepRead || op == stepStat || op == stepList || op == stepReadlink
}

// Before makes a Step of what is to be called before each step that changes
// something; an error from it is that step's error.
func Before(call func(op, name string) error) Step {
	return func(op, name string, do func() error) error {
		if !Looks(op) {
			if err := call(op, name); err != nil {
				return err
			}
		}
		return do()
	}
}

// look is a step that gives something.
func look[T any](s *System, op, path string, do func(path string) (T, error)) (got T, err error) {
	err = s.Do(op, path, func() (err error) {
		got, err = do(s.Path(path))
		return err
	})
	return got, err
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
func (s *System) ReadFile(path string) ([]byte, error) { return look(s, stepRead, path, os.ReadFile) }

// ReadLimited reads a file of at most max bytes; a larger one is an error. It
// does not wait for a FIFO's other end.
func (s *System) ReadLimited(path string, max int64) ([]byte, error) {
	return look(s, stepRead, path, func(p string) ([]byte, error) {
		f, err := os.OpenFile(p, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		var data bytes.Buffer
		if fi, err := f.Stat(); err == nil && fi.Size() > 0 {
			data.Grow(int(min(fi.Size(), max)) + bytes.MinRead)
		}
		if _, err := data.ReadFrom(io.LimitReader(f, max+1)); err != nil {
			return nil, err
		}
		if int64(data.Len()) > max {
			return nil, fmt.Errorf("%s is larger than %d bytes", path, max)
		}
		return data.Bytes(), nil
	})
}

// Stat is os.Stat below the root.
func (s *System) Stat(path string) (fs.FileInfo, error) { return look(s, stepStat, path, os.Stat) }

// Lstat is os.Lstat below the root.
func (s *System) Lstat(path string) (fs.FileInfo, error) { return look(s, stepStat, path, os.Lstat) }

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

// Exists tells whether there is something at path, be it a dangling link. Where
// that cannot be told, there is: settings on a failing disk must not pass for
// none.
func (s *System) Exists(path string) bool {
	_, err := s.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR)
}

// ReadDir is os.ReadDir below the root.
func (s *System) ReadDir(path string) ([]fs.DirEntry, error) {
	return look(s, stepList, path, os.ReadDir)
}

// Readlink is os.Readlink below the root.
func (s *System) Readlink(path string) (string, error) {
	return look(s, stepReadlink, path, os.Readlink)
}

// Glob is filepath.Glob below the root; so is what it gives.
func (s *System) Glob(pattern string) ([]string, error) {
	found, err := look(s, stepList, pattern, filepath.Glob)
	for i, f := range found {
		if strings.HasPrefix(f, filepath.Clean(s.Root)+"/") {
			found[i] = strings.TrimPrefix(f, filepath.Clean(s.Root))
		}
	}
	return found, err
}

// MkdirAll makes a directory and its parents, and sees that the last one is
// root's (the caller's, when that is not root) and has mode: one that somebody
// else has is mended.
func (s *System) MkdirAll(path string, mode fs.FileMode) error {
	p := s.Path(path)
	if fi, err := s.Lstat(path); err == nil && fi.IsDir() && fi.Mode().Perm() == mode && callers(fi) {
		return nil
	}
	if err := s.Do("mkdir", path, func() error { return os.MkdirAll(p, mode) }); err != nil {
		return err
	}
	fi, err := s.Stat(path)
	if err != nil {
		return err
	}
	if !callers(fi) {
		if err := s.Do("chown", path, func() error { return os.Chown(p, os.Geteuid(), os.Getegid()) }); err != nil {
			return err
		}
	}
	return s.Chmod(path, mode)
}

// Chmod is os.Chmod below the root.
func (s *System) Chmod(path string, mode fs.FileMode) error {
	return s.Do("chmod", path, func() error { return os.Chmod(s.Path(path), mode) })
}

// Rename is os.Rename below the root.
func (s *System) Rename(from, to string) error {
	return s.Do("rename", to, func() error { return os.Rename(s.Path(from), s.Path(to)) })
}

// Sync has a file, or a directory's entries, on disk when it comes back.
func (s *System) Sync(path string) error {
	return s.Do("sync", path, func() error {
		f, err := os.Open(s.Path(path))
		if err != nil {
			return err
		}
		defer f.Close()
		return f.Sync()
	})
}

func callers(fi fs.FileInfo) bool {
	st, ok := fi.Sys().(*syscall.Stat_t)
	return !ok || int(st.Uid) == os.Geteuid()
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
	s.sweep(path)
	var f *os.File
	if err := s.Do("create", path, func() (err error) {
		f, err = os.CreateTemp(filepath.Dir(p), fmt.Sprintf(".%s.%d.*", filepath.Base(p), os.Getpid()))
		return err
	}); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	for _, step := range []struct {
		op string
		do func() error
	}{
		{"write", func() error { _, err := f.Write(data); return err }},
		{"chmod", func() error { return f.Chmod(mode) }},
		{"label", func() error { return copyLabel(p, f) }},
		{"flush", f.Sync},
		{"close", f.Close},
	} {
		if err := s.Do(step.op, path, step.do); err != nil {
			return err
		}
	}
	if err := s.Do("rename", path, func() error { return os.Rename(f.Name(), p) }); err != nil {
		return err
	}
	return s.Sync(filepath.Dir(path))
}

// sweep removes what those left beside a file who were killed while they wrote
// it. Their names have the process in them: one that lives may still write.
func (s *System) sweep(path string) {
	entries, err := s.ReadDir(filepath.Dir(path))
	if err != nil {
		return
	}
	for _, e := range entries {
		rest, ours := strings.CutPrefix(e.Name(), "."+filepath.Base(path)+".")
		pid, _, ok := strings.Cut(rest, ".")
		if n, err := strconv.Atoi(pid); !ours || !ok || err != nil || n <= 0 || !errors.Is(unix.Kill(n, 0), unix.ESRCH) {
			continue
		}
		left := filepath.Join(filepath.Dir(path), e.Name())
		s.Do("remove", left, func() error { return os.Remove(s.Path(left)) })
	}
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

// Touch makes a file one of now; one that is not there stays so.
func (s *System) Touch(path string) error {
	if !s.Exists(path) {
		return nil
	}
	now := time.Now()
	return s.Do("touch", path, func() error { return os.Chtimes(s.Path(path), now, now) })
}

// Remove removes a file; one that is not there is no error.
func (s *System) Remove(path string) error {
	s.sweep(path)
	if _, err := s.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	err := s.Do("remove", path, func() error { return os.Remove(s.Path(path)) })
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.Sync(filepath.Dir(path))
}

// RemoveAll removes a directory and what is in it.
func (s *System) RemoveAll(path string) error {
	return s.Do("remove", path, func() error { return os.RemoveAll(s.Path(path)) })
}

// RemoveDir removes a directory if it is there and empty; else it is no error.
func (s *System) RemoveDir(path string) error {
	entries, err := s.ReadDir(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err != nil || len(entries) > 0 {
		return nil
	}
	return s.Do("remove", path, func() error { return os.Remove(s.Path(path)) })
}

// Symlink puts a symbolic link at path in place of what is there, in one step.
func (s *System) Symlink(target, path string) error {
	p := s.Path(path)
	temp := filepath.Join(filepath.Dir(p), fmt.Sprintf(".%s.%d.link", filepath.Base(p), os.Getpid()))
	s.sweep(path)
	os.Remove(temp) // of another process of this number
	if err := s.Do("link", path, func() error { return os.Symlink(target, temp) }); err != nil {
		return fmt.Errorf("linking %s: %w", path, err)
	}
	if err := s.Do("rename", path, func() error { return os.Rename(temp, p) }); err != nil {
		os.Remove(temp)
		return fmt.Errorf("linking %s: %w", path, err)
	}
	return s.Sync(filepath.Dir(path))
}

// WriteKernel writes a value to a file of /proc or /sys.
func (s *System) WriteKernel(path, value string) error {
	return s.Do("kernel", path, func() error { return os.WriteFile(path, []byte(value), 0o644) })
}

// Lock takes an exclusive lock on a file, which it makes if need be, and waits
// for it until the context ends. The function that it gives back lets go. What
// note says is in the file meanwhile, if it can be written.
func (s *System) Lock(ctx context.Context, path, note string) (unlock func(), err error) {
	for {
		f, err := s.tryLock(path)
		if err != nil {
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		if f != nil {
			if note != "" {
				s.Do("write", path, func() error { return errors.Join(f.Truncate(0), writeString(f, note)) })
			}
			return func() { f.Close() }, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("locking %s: %w", path, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func writeString(w io.Writer, text string) error {
	_, err := io.WriteString(w, text)
	return err
}

// tryLock is one try; it gives no file where another holds the lock.
func (s *System) tryLock(path string) (*os.File, error) {
	var f *os.File
	err := s.Do("lock", path, func() (err error) {
		f, err = os.OpenFile(s.Path(path), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
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

// defaultPath is where programs are looked for, and what those are given that
// are run.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// LookPath finds a program in the system's directories, in an order that is
// fixed. The caller's PATH can take some of these away, and add none. One that
// others than root (or than the caller, when that is not root) could change is
// passed over, so that no other user decides what root runs.
func (s *System) LookPath(name string) (string, error) { return look(s, stepStat, name, s.lookPath) }

func (s *System) lookPath(name string) (string, error) {
	dirs := s.Programs
	if dirs == nil {
		dirs = searched(os.Getenv("PATH"))
	}
	for _, dir := range dirs {
		p := filepath.Join(dir, name)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 && trusted(p) && trustedDir(dir) {
			return p, nil
		}
	}
	where := strings.Join(dirs, ":")
	if where == "" {
		where = "PATH, which has none of " + defaultPath
	}
	return "", &NotFoundError{Name: name, Path: where}
}

// searched gives the system's directories that a PATH has; an empty one has all.
func searched(path string) []string {
	all := filepath.SplitList(defaultPath)
	if path == "" {
		return all
	}
	var theirs []string
	for _, dir := range filepath.SplitList(path) {
		theirs = append(theirs, filepath.Clean(dir))
	}
	return slices.DeleteFunc(all, func(dir string) bool { return !slices.Contains(theirs, dir) })
}

func trusted(path string) bool {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return false
	}
	return (st.Uid == 0 || int(st.Uid) == os.Geteuid()) && st.Mode&0o022 == 0
}

// trustedDir is trusted of a directory and of all above it. Above it may be one
// that all write to, where each can take away only what is his own.
func trustedDir(dir string) bool {
	if !trusted(dir) {
		return false
	}
	for dir != "/" {
		dir = filepath.Dir(dir)
		var st unix.Stat_t
		if unix.Stat(dir, &st) != nil || st.Uid != 0 && int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 && st.Mode&unix.S_ISVTX == 0 {
			return false
		}
	}
	return true
}

// NotFoundError says that a program is in none of the directories where it was
// looked for.
type NotFoundError struct{ Name, Path string }

func (e *NotFoundError) Error() string {
	return fmt.Sprintf("no %s in %s", e.Name, e.Path)
}

// Self is this program.
const Self = "/proc/self/exe"

// Command is one run of a program.
type Command struct {
	Name  string // looked up by LookPath unless it is a path
	Args  []string
	Stdin []byte
	// Timeout bounds the run; zero is 30 seconds.
	Timeout time.Duration
	// Namespace has the program run in a network namespace of its own, which is
	// empty, and gone when the last of its processes has ended.
	Namespace bool
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
	name := path
	if path == Self {
		name = os.Args[0]
	}
	line := strings.Join(append([]string{filepath.Base(name)}, c.Args...), " ")
	timeout := c.Timeout
	if timeout == 0 {
		timeout = 30 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, c.Args...)
	cmd.Env = []string{"LC_ALL=C", "PATH=" + defaultPath}
	if path == Self { // which takes from PATH as this run does, and is called as it is
		cmd.Env[1] = "PATH=" + os.Getenv("PATH")
		cmd.Args[0] = os.Args[0]
	}
	cmd.WaitDelay = 10 * time.Second // for output that a busy machine has not read yet
	cmd.Stdin = bytes.NewReader(c.Stdin)
	if c.Namespace {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := s.Do("run", line, cmd.Run)
	res := Result{Stdout: out.Bytes(), Stderr: errOut.Bytes()}
	if err != nil && cmd.ProcessState == nil { // it was not even started
		return res, fmt.Errorf("%s: %w", line, err)
	}
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

// Printable replaces what a terminal might take for a command, or what would
// make text look like another, in text that comes from files, processes or the
// network: control characters, and all that does not show, such as those that
// turn the direction of writing.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if shows(r) {
			return r
		}
		return '?'
	}, s)
}

func shows(r rune) bool { return r != utf8.RuneError && unicode.IsPrint(r) }

// PrintableJSON is Printable of a JSON text, where nothing gets lost: what does
// not show stands there by its number.
func PrintableJSON(data []byte) []byte {
	var out []byte
	for _, r := range string(data) {
		if r == '\n' || shows(r) {
			out = utf8.AppendRune(out, r)
			continue
		}
		for _, u := range utf16.Encode([]rune{r}) {
			out = fmt.Appendf(out, "\\u%04x", u)
		}
	}
	return out
}

// Detach starts a program that goes on when this one, and the session that it
// was started in, has ended. Nothing is heard of it any more.
func (s *System) Detach(path string, args ...string) error {
	line := strings.Join(append([]string{filepath.Base(path)}, args...), " ")
	err := s.Do("detach", line, func() error {
		cmd := exec.Command(path, args...)
		cmd.Env = []string{"LC_ALL=C", "PATH=" + cmp.Or(os.Getenv("PATH"), defaultPath)}
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			return err
		}
		return cmd.Process.Release()
	})
	if err != nil {
		return fmt.Errorf("starting %s: %w", line, err)
	}
	return nil
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
