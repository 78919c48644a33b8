package system

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// BeginAnew makes this process the same program with other arguments, in the
// network of another process. It returns only where that fails.
func BeginAnew(pid int, args ...string) error {
	// The namespace is a thread's, and exec keeps that of the one that calls it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Kernels before 3.0 have namespaces of the network, and no way into one.
	if _, err := os.Stat("/proc/self/ns/net"); !errors.Is(err, fs.ErrNotExist) {
		if err := enterNetwork(pid); err != nil {
			return fmt.Errorf("entering the network of process %d: %w", pid, err)
		}
	}
	return fmt.Errorf("beginning anew: %w", unix.Exec("/proc/self/exe", append(os.Args[:1:1], args...), os.Environ()))
}

func enterNetwork(pid int) error {
	theirs, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return err
	}
	defer theirs.Close()
	own, err := os.Open("/proc/self/ns/net")
	if err != nil {
		return err
	}
	defer own.Close()
	a, err := theirs.Stat()
	if err != nil {
		return err
	}
	if b, err := own.Stat(); err != nil || os.SameFile(a, b) {
		return err // to enter the same takes a privilege
	}
	return unix.Setns(int(theirs.Fd()), unix.CLONE_NEWNET)
}
