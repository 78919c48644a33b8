package hostnet

import (
	"errors"
	"os"
	"syscall"
)

// HasIPv6 tells whether the kernel has IPv6. With ipv6.disable=1 on its
// command line it has none (af_inet6.c registers no socket family then); with
// the sysctl disable_ipv6=1 it still has, and that can be taken back.
func HasIPv6() bool {
	// Asking for a socket loads the module where that has not happened yet.
	fd, err := syscall.Socket(syscall.AF_INET6, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err == nil {
		syscall.Close(fd)
		return true
	}
	return hasIPv6("/proc", err)
}

// hasIPv6 judges by what /proc shows, unless the failure to open a socket says
// it all: a sandbox may forbid such sockets.
func hasIPv6(proc string, socketErr error) bool {
	if errors.Is(socketErr, syscall.EAFNOSUPPORT) {
		return false
	}
	for _, path := range []string{proc + "/net/if_inet6", proc + "/sys/net/ipv6"} {
		if _, err := os.Stat(path); err == nil {
			return true
		}
	}
	return false
}
