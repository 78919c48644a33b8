package system

import (
	"context"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// netlinkNap is the pause after the kernel's messages were read, so that the next ones
// are read together.
const netlinkNap = 50 * time.Millisecond

// netlinkBuffer is the size of the socket's buffer in bytes. The kernel drops messages
// that do not fit and reports the loss, which is all that is needed.
const netlinkBuffer = 64 << 10

// Multicast joins multicast groups of a netlink protocol (netlink(7)). It calls tell
// for a relevant message, or if messages were lost, until the context ends. tell must
// not block. It fails if the kernel has no such groups or a sandbox forbids them.
func Multicast(ctx context.Context, protocol int, groups []int, counts func(syscall.NetlinkMessage) bool, tell func()) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	// An os.File waits without a thread, and Close ends a Read.
	f := os.NewFile(uintptr(fd), "netlink")
	conn, err := f.SyscallConn()
	if err == nil {
		err = join(fd, groups)
	}
	if err != nil {
		f.Close()
		return err
	}
	context.AfterFunc(ctx, func() { f.Close() })
	go func() {
		defer f.Close()
		buf := make([]byte, 16<<10)
		for {
			news, failed := false, error(nil)
			err := conn.Read(func(fd uintptr) bool {
				news, failed = drain(int(fd), buf, counts)
				return failed != unix.EAGAIN
			})
			if err != nil {
				return // closed
			}
			if news {
				tell()
			}
			nap := netlinkNap
			if failed != nil {
				nap = time.Minute // an unknown error, which must not cause a busy loop
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(nap):
			}
		}
	}()
	return nil
}

// drain reads the available messages and reports whether any is relevant. The error
// is EAGAIN if there were none.
func drain(fd int, buf []byte, counts func(syscall.NetlinkMessage) bool) (news bool, err error) {
	const most = 4096 // messages per call, as more may keep arriving
	for i := range most {
		n, err := unix.Read(fd, buf)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && i > 0:
			return news, nil
		case err == unix.ENOBUFS:
			news = true // some were lost; the socket still works
		case err != nil:
			return err != unix.EAGAIN, err
		default:
			news = news || anyCounts(buf[:n], counts)
		}
	}
	return news, nil
}

func join(fd int, groups []int) error {
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, netlinkBuffer); err != nil {
		return os.NewSyscallError("setsockopt", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return os.NewSyscallError("bind", err)
	}
	for _, g := range groups {
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, g); err != nil {
			return fmt.Errorf("joining netlink group %d: %w", g, err)
		}
	}
	return nil
}

// anyCounts reports whether any message is relevant. Truncated and invalid ones are.
func anyCounts(data []byte, counts func(syscall.NetlinkMessage) bool) bool {
	msgs, err := syscall.ParseNetlinkMessage(data)
	return err != nil || slices.ContainsFunc(msgs, counts)
}
