package system

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Chrooted reports whether this program runs in a chroot, on the kernel of another system:
// in a rescue system, for example, or below "rpm --root". The root directory is then not
// that of process 1, or /proc is not mounted.
func Chrooted() bool {
	if _, err := os.Stat("/proc/self"); errors.Is(err, fs.ErrNotExist) {
		return true
	}
	// A container may see the host's processes. It has its own network, or none.
	return differ("/", "/proc/1/root/") && !differ("/proc/self/ns/net", "/proc/1/ns/net")
}

// differ reports whether two paths are known to lead to different files.
func differ(a, b string) bool {
	one, errOne := os.Stat(a)
	two, errTwo := os.Stat(b)
	return errOne == nil && errTwo == nil && !os.SameFile(one, two)
}

// Executable returns the path of this program, even without /proc.
func Executable() (string, error) {
	path, err := os.Executable()
	if err != nil && filepath.IsAbs(os.Args[0]) {
		return os.Args[0], nil
	}
	return path, err
}
