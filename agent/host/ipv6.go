package host

import (
	"errors"
	"os"
	"slices"
	"syscall"
)

// HasIPv6 reports whether the kernel has IPv6. It does not with ipv6.disable=1 on its
// command line (af_inet6.c registers no socket family). It does with the kernel
// parameter disable_ipv6=1, which can be reset.
func HasIPv6() bool {
	// Opening a socket loads the module if necessary.
	fd, err := syscall.Socket(syscall.AF_INET6, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err == nil {
		syscall.Close(fd)
		return true
	}
	return hasIPv6("/proc", err)
}

// hasIPv6 decides from the error of opening a socket, or from /proc if that error is
// unspecific: a sandbox may forbid such sockets.
func hasIPv6(proc string, socketErr error) bool {
	if errors.Is(socketErr, syscall.EAFNOSUPPORT) {
		return false
	}
	return slices.ContainsFunc([]string{"/net/if_inet6", "/sys/net/ipv6"}, func(path string) bool {
		_, err := os.Stat(proc + path)
		return err == nil
	})
}
