// Package system provides access to files and programs. The agent reads, writes and runs
// everything through a System. A test can thus use its own file tree, count the operations,
// and make any single one fail.
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
	// Root prefixes every path below /etc, /var, /run and /usr. Empty is the machine
	// itself. Paths below /proc and /sys have no prefix.
	Root string
	// Step, if set, does each step. It is for tests.
	Step Step
	// Programs, if set, are the directories of programs instead of the system's. It is
	// for tests.
	Programs []string
}

// Step runs do, which is an operation on a file or a run of a program. It may also
// end the program before or after that, or return another error.
type Step func(op, name string, do func() error) error

// Do runs a step outside this package, such as one in a library that has no Step.
func (s *System) Do(op, name string, do func() error) error {
	if s.Step == nil {
		return do()
	}
	return s.Step(op, name, do)
}

// look runs a step that returns a value.
func look[T any](s *System, op, path string, do func(path string) (T, error)) (got T, err error) {
	err = s.Do(op, path, func() (err error) {
		got, err = do(s.path(path))
		return err
	})
	return got, err
}

// path returns path with the Root prefix, if one applies.
func (s *System) path(path string) string {
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

// ReadLimited reads a file of at most max bytes; a larger one is an error. It does not
// block on a FIFO.
func (s *System) ReadLimited(path string, max int64) ([]byte, error) {
	return look(s, "read", path, func(p string) ([]byte, error) {
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
func (s *System) Stat(path string) (fs.FileInfo, error) { return look(s, "stat", path, os.Stat) }

// Lstat is os.Lstat below the root.
func (s *System) Lstat(path string) (fs.FileInfo, error) { return look(s, "stat", path, os.Lstat) }

// CheckOwner returns an error unless root can trust a file's content. It must be a regular
// file, owned by root or by the caller, that no other user can write to.
func CheckOwner(fi fs.FileInfo) error {
	st, ok := fi.Sys().(*syscall.Stat_t)
	switch {
	case !fi.Mode().IsRegular():
		return fmt.Errorf("not a regular file (%v)", fi.Mode())
	case ok && st.Uid != 0 && int(st.Uid) != os.Geteuid():
		return fmt.Errorf("owned by user %d, not by root", st.Uid)
	case fi.Mode()&0o022 != 0:
		return fmt.Errorf("writable by users other than root (mode %04o)", fi.Mode().Perm())
	}
	return nil
}

// Exists reports whether path exists, also as a dangling link. It returns true if that
// cannot be determined: settings on a failing disk must not be regarded as missing.
func (s *System) Exists(path string) bool {
	_, err := s.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR)
}

// ReadDir is os.ReadDir below the root.
func (s *System) ReadDir(path string) ([]fs.DirEntry, error) {
	return look(s, "list", path, os.ReadDir)
}

// Readlink is os.Readlink below the root.
func (s *System) Readlink(path string) (string, error) {
	return look(s, "readlink", path, os.Readlink)
}

// Glob is filepath.Glob below the root; the result is without the root.
func (s *System) Glob(pattern string) ([]string, error) {
	found, err := look(s, "list", pattern, filepath.Glob)
	for i, f := range found {
		if strings.HasPrefix(f, filepath.Clean(s.Root)+"/") {
			found[i] = strings.TrimPrefix(f, filepath.Clean(s.Root))
		}
	}
	return found, err
}

// MkdirAll creates a directory and its parents. It sets the last one's mode, and its
// owner to the caller.
func (s *System) MkdirAll(path string, mode fs.FileMode) error {
	p := s.path(path)
	fi, missing := s.Lstat(path)
	if missing == nil && fi.IsDir() && fi.Mode().Perm() == mode && callers(fi) {
		return nil
	}
	err := s.Do("mkdir", path, func() error { return os.MkdirAll(p, mode) })
	if err == nil && missing != nil {
		err = s.Do("label", path, func() error { return s.label(p, path) })
	}
	if err != nil {
		return err
	}
	if fi, err = s.Stat(path); err != nil {
		return err
	}
	if !callers(fi) {
		if err := s.Do("chown", path, func() error { return os.Chown(p, os.Geteuid(), os.Getegid()) }); err != nil {
			return err
		}
	}
	return s.Do("chmod", path, func() error { return os.Chmod(p, mode) })
}

// Rename is os.Rename below the root.
func (s *System) Rename(from, to string) error {
	return s.Do("rename", to, func() error { return os.Rename(s.path(from), s.path(to)) })
}

// Sync flushes a file or a directory's entries to disk.
func (s *System) Sync(path string) error {
	return s.Do("sync", path, func() error {
		f, err := os.Open(s.path(path))
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

// WriteFile replaces a file atomically. It writes a temporary file in the same
// directory, flushes it, renames it, and flushes the directory. Readers see the
// complete old or new file, also after a power failure. A symbolic link at path is
// replaced, never followed. The new file has the SELinux label of the old one or, if there
// was none, that of its path.
func (s *System) WriteFile(path string, data []byte, mode fs.FileMode) (err error) {
	p := s.path(path)
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
		{"label", func() error { return s.label(f.Name(), path) }},
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

// sweep removes temporary files of a file whose writers were killed. Their names
// contain the PID: a running process may still write.
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
		s.Do("remove", left, func() error { return os.Remove(s.path(left)) })
	}
}

const selinuxLabel = "security.selinux" // the attribute that has the label (xattr(7))

// label sets the SELinux label of the file at p, which is path or will replace it.
// The label is that of the old file, otherwise that of path in the policy. The kernel
// does not know the latter: file_contexts(5) is for programs only. Without the
// program or the permission, the kernel's label stays.
func (s *System) label(p, path string) error {
	label := make([]byte, 256)
	n, err := unix.Lgetxattr(p, selinuxLabel, label)
	old := unix.ENOENT
	if err != nil || n == 0 {
		return nil // a system without labels
	}
	if p != s.path(path) {
		n, err = unix.Lgetxattr(s.path(path), selinuxLabel, label)
		old, _ = err.(unix.Errno)
	}
	if label = label[:max(n, 0)]; old == unix.ENOENT {
		res, err := s.Run(context.Background(), Command{Name: "matchpathcon", Args: []string{"-n", path}})
		if label = append(bytes.TrimSpace(res.Stdout), 0); err != nil || !bytes.Contains(label, []byte(":")) { // "<<none>>"
			return nil
		}
	} else if old != 0 {
		return nil
	}
	if err := unix.Lsetxattr(p, selinuxLabel, label, 0); err != nil && !errors.Is(err, fs.ErrPermission) && !errors.Is(err, unix.ENOTSUP) {
		return fmt.Errorf("setting the SELinux label %q: %w", bytes.TrimRight(label, "\x00"), err)
	}
	return nil
}

// Touch sets a file's times to now, if it exists.
func (s *System) Touch(path string) error {
	if !s.Exists(path) {
		return nil
	}
	now := time.Now()
	return s.Do("touch", path, func() error { return os.Chtimes(s.path(path), now, now) })
}

// Remove removes a file; a missing one is no error.
func (s *System) Remove(path string) error {
	s.sweep(path)
	if _, err := s.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	err := s.Do("remove", path, func() error { return os.Remove(s.path(path)) })
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return s.Sync(filepath.Dir(path))
}

// RemoveAll removes a directory and its content.
func (s *System) RemoveAll(path string) error {
	return s.Do("remove", path, func() error { return os.RemoveAll(s.path(path)) })
}

// RemoveDir removes a directory if it is empty. A missing or non-empty one is no error.
func (s *System) RemoveDir(path string) error {
	entries, err := s.ReadDir(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && len(entries) > 0:
		return nil
	case err != nil:
		return err
	}
	return s.Do("remove", path, func() error { return os.Remove(s.path(path)) })
}

// Symlink atomically replaces path with a symbolic link.
func (s *System) Symlink(target, path string) error {
	p := s.path(path)
	temp := filepath.Join(filepath.Dir(p), fmt.Sprintf(".%s.%d.link", filepath.Base(p), os.Getpid()))
	s.sweep(path)
	os.Remove(temp) // of a former process with this PID
	err := s.Do("link", path, func() error { return os.Symlink(target, temp) })
	if err == nil {
		err = s.Do("label", path, func() error { return s.label(temp, path) })
	}
	if err == nil {
		err = s.Do("rename", path, func() error { return os.Rename(temp, p) })
	}
	if err != nil {
		os.Remove(temp)
		return fmt.Errorf("linking %s: %w", path, err)
	}
	return s.Sync(filepath.Dir(path))
}

// WriteKernel writes a value to a file in /proc or /sys.
func (s *System) WriteKernel(path, value string) error {
	return s.Do("kernel", path, func() error { return os.WriteFile(path, []byte(value), 0o644) })
}

// Lock acquires an exclusive lock on a file, which it creates if necessary, and waits
// for it until the context ends. unlock releases it. Until then, the file contains
// note, if it can be written.
func (s *System) Lock(ctx context.Context, path, note string) (unlock func(), err error) {
	for {
		f, err := s.tryLock(path)
		if err != nil {
			return nil, fmt.Errorf("locking %s: %w", path, err)
		}
		if f != nil {
			if note != "" {
				s.Do("write", path, func() error {
					_, err := f.WriteString(note)
					return errors.Join(err, f.Truncate(int64(len(note))))
				})
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

// tryLock tries once. It returns no file if another process holds the lock.
func (s *System) tryLock(path string) (*os.File, error) {
	var f *os.File
	fresh := !s.Exists(path)
	err := s.Do("lock", path, func() (err error) {
		f, err = os.OpenFile(s.path(path), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		return err
	})
	if err == nil && fresh {
		if err = s.Do("label", path, func() error { return s.label(s.path(path), path) }); err != nil {
			f.Close()
		}
	}
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		// The previous holder may have removed the file: then this lock excludes no
		// other process.
		mine, e1 := f.Stat()
		there, e2 := os.Lstat(s.path(path))
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

// defaultPath is the directories of programs, and the PATH of programs that run.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// LookPath returns the path of a program in the system's directories, in fixed order.
// The caller's PATH can exclude some of them but add none. Programs that users other
// than root or the caller could change are skipped, so that none decides what root runs.
func (s *System) LookPath(name string) (string, error) { return look(s, "stat", name, s.lookPath) }

func (s *System) lookPath(name string) (string, error) {
	dirs := s.Programs
	if dirs == nil {
		dirs = searched(os.Getenv("PATH"))
	}
	for _, dir := range dirs {
		p := filepath.Join(dir, name)
		if fi, err := os.Stat(p); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 && trusted(p, false) && trustedDir(dir) {
			return p, nil
		}
	}
	where := strings.Join(dirs, ":")
	if where == "" {
		where = "PATH, which has none of " + defaultPath
	}
	return "", &NotFoundError{Name: name, Path: where}
}

// searched returns the system's directories that a PATH contains, or all if it is empty.
func searched(path string) []string {
	all := filepath.SplitList(defaultPath)
	if path == "" {
		return all
	}
	theirs := filepath.SplitList(path)
	return slices.DeleteFunc(all, func(dir string) bool {
		return !slices.ContainsFunc(theirs, func(d string) bool { return filepath.Clean(d) == dir })
	})
}

// trusted reports whether root or the caller owns a path and no other user can write to
// it. With sticky, a directory with the sticky bit may be writable by all.
func trusted(path string, sticky bool) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && (st.Uid == 0 || int(st.Uid) == os.Geteuid()) &&
		(st.Mode&0o022 == 0 || sticky && st.Mode&unix.S_ISVTX != 0)
}

// trustedDir reports whether a directory and all above it are trusted. Those above may
// have the sticky bit: users can then remove only their own files.
func trustedDir(dir string) bool {
	ok := trusted(dir, false)
	for ok && dir != "/" {
		dir = filepath.Dir(dir)
		ok = trusted(dir, true)
	}
	return ok
}

// NotFoundError reports that a program is in none of the searched directories.
type NotFoundError struct{ Name, Path string }

func (e *NotFoundError) Error() string {
	return fmt.Sprintf("no %s in %s", e.Name, e.Path)
}

// Self is the path of this program.
const Self = "/proc/self/exe"

// Command is one run of a program.
type Command struct {
	Name  string // looked up by LookPath unless it is a path
	Args  []string
	Stdin []byte
	Env   []string // in addition to LC_ALL and PATH
	// Timeout limits the run; zero is 30 seconds.
	Timeout time.Duration
	// Namespace runs the program in a new, empty network namespace, which exists until
	// its last process has ended.
	Namespace bool
}

// Result is a program's output.
type Result struct {
	Stdout, Stderr []byte
}

// ExitError reports that a program ran and failed.
type ExitError struct {
	Command string
	Code    int // -1 if a signal ended it
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

// Run runs a program to its end, without a shell, in the C locale with a minimal
// environment. If it fails, the error is an *ExitError with its standard error.
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
	timeout := cmp.Or(c.Timeout, 30*time.Second)
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, c.Args...)
	cmd.Env = append([]string{"LC_ALL=C", "PATH=" + defaultPath}, c.Env...)
	if path == Self { // with the PATH and the name of this run
		cmd.Env[1] = "PATH=" + os.Getenv("PATH")
		cmd.Env = append(cmd.Env, supervised+"=1") // by this process
		cmd.Args[0] = os.Args[0]
	}
	cmd.WaitDelay = 10 * time.Second // to read the output on a busy machine
	cmd.Stdin = bytes.NewReader(c.Stdin)
	if c.Namespace {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	}
	var out, errOut bytes.Buffer
	out.Grow(16 << 10) // mostly rules; unused space costs nothing
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := s.Do("run", line, cmd.Run)
	res := Result{Stdout: out.Bytes(), Stderr: errOut.Bytes()}
	if err != nil && cmd.ProcessState == nil { // not started
		return res, fmt.Errorf("%s: %w", line, err)
	}
	if err != nil && threadless(errOut.Bytes()) {
		return res, fmt.Errorf("%s: %s: %w", line, outOfProcesses, syscall.EAGAIN)
	}
	if err != nil {
		switch e := ctx.Err(); {
		case errors.Is(e, context.DeadlineExceeded):
			err = fmt.Errorf("not finished after %gs: %w", timeout.Seconds(), e)
		case e != nil:
			err = fmt.Errorf("interrupted: %w", e)
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

// oneLine converts a program's output to one line of a message.
func oneLine(b []byte) string {
	const max = 600
	s := strings.Join(strings.Fields(string(b)), " ")
	if len(s) > max {
		s = s[:max] + "..."
	}
	return Printable(s)
}

// Printable replaces control and invisible characters in text from files, processes
// or the network. A terminal might execute them, or display a different text because
// of them: some reverse the direction of writing.
func Printable(s string) string {
	return strings.Map(func(r rune) rune {
		if shows(r) {
			return r
		}
		return '?'
	}, s)
}

func shows(r rune) bool { return r != utf8.RuneError && unicode.IsPrint(r) }

// PrintableJSON is Printable for JSON text without loss: it replaces invisible
// characters with \u escapes.
func PrintableJSON(data []byte) []byte {
	var out []byte
	for _, r := range string(data) {
		if r == '\n' || shows(r) {
			out = utf8.AppendRune(out, r)
			continue
		}
		for _, u := range utf16.AppendRune(nil, r) {
			out = fmt.Appendf(out, "\\u%04x", u)
		}
	}
	return out
}

// Detach starts a program that continues after this one and its session have ended.
// Its output and exit code are lost.
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

// Populated reports whether the control group of a systemd unit has processes. Its path
// below cgroups depends on systemd's hierarchy: unified, hybrid or legacy.
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

// Again returns the arguments for another run of this program with command and root.
func Again(root, command string) []string {
	if root != "" {
		return []string{"--root", root, command}
	}
	return []string{command}
}
