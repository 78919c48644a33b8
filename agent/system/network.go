package system

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Reexec replaces this process with the same program with other arguments, in the
// network namespace of another process. It returns only on failure.
func Reexec(pid int, args ...string) error {
	// A namespace belongs to a thread, and exec keeps the calling thread's.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Kernels before 3.0 have network namespaces, but no way to enter one.
	if _, err := os.Stat("/proc/self/ns/net"); !errors.Is(err, fs.ErrNotExist) {
		if err := enterNetwork(pid); err != nil {
			return fmt.Errorf("entering the network namespace of process %d: %w", pid, err)
		}
	}
	self := Self
	if _, err := os.Stat(self); err != nil { // no /proc, in a chroot
		self, _ = Executable()
	}
	return fmt.Errorf("restarting this program: %w", unix.Exec(self, append(os.Args[:1:1], args...), os.Environ()))
}

func enterNetwork(pid int) error {
	theirs, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return err
	}
	defer theirs.Close()
	a, errA := theirs.Stat()
	b, errB := os.Stat("/proc/self/ns/net")
	if err := cmp.Or(errA, errB); err != nil || os.SameFile(a, b) {
		return err // entering it would need a privilege
	}
	return unix.Setns(int(theirs.Fd()), unix.CLONE_NEWNET)
}
