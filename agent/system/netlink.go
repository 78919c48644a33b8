package system

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// netlinkNap is how long the kernel's messages may pile up once there was one:
// they are read together, however many there are.
const netlinkNap = 50 * time.Millisecond

// netlinkBuffer is how much of them may pile up, in bytes. What does not fit is
// lost, and the kernel says that something was, which is all that is asked.
const netlinkBuffer = 64 << 10

// Multicast calls tell when the kernel sends a message that counts to one of
// some multicast groups of a netlink protocol (netlink(7)), or when messages
// were lost, until the context ends. tell must not wait. The error is of a
// kernel that has no such groups, or of a sandbox that keeps us from them.
func Multicast(ctx context.Context, protocol int, groups []int, counts func(syscall.NetlinkMessage) bool, tell func()) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	// A file of Go's waits without a thread, and Close ends a Read.
	f := os.NewFile(uintptr(fd), "netlink")
	if err := join(fd, groups); err != nil {
		f.Close()
		return err
	}
	conn, err := f.SyscallConn()
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
				nap = time.Minute // none that is known; it must not keep us busy
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

// drain reads the messages that are there, and tells whether any counts. The
// error is EAGAIN where there was none.
func drain(fd int, buf []byte, counts func(syscall.NetlinkMessage) bool) (news bool, err error) {
	const most = 4096 // of those that keep coming, for this once
	for i := range most {
		n, err := unix.Read(fd, buf)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN && i > 0:
			return news, nil
		case err == unix.ENOBUFS:
			news = true // some were lost; the socket goes on
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

// anyCounts takes what is cut off or cannot be read for what counts.
func anyCounts(data []byte, counts func(syscall.NetlinkMessage) bool) bool {
	msgs, err := syscall.ParseNetlinkMessage(data)
	if err != nil {
		return true
	}
	for _, m := range msgs {
		if counts(m) {
			return true
		}
	}
	return false
}
