package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

// google/nftables knows expressions, and this file speaks netlink for them: the
// library drops what it does not know of a rule that it reads, and then a rule
// that somebody narrowed would look like ours; nor can it send back what was
// read, or name the message that the kernel refused.

// attribute is one of netlink's, without the flag that says whether others are
// nested in it: kernels before 5.2 do not set that.
type attribute struct {
	kind uint16
	data []byte
}

const kindMask = ^uint16(unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)

// attributes takes a list of attributes apart. What does not end where it should
// is an error.
func attributes(b []byte) ([]attribute, error) { return appendAttributes(nil, b) }

func appendAttributes(to []attribute, b []byte) ([]attribute, error) {
	for len(b) > 0 {
		if len(b) < unix.SizeofNlAttr {
			return nil, errors.New("a netlink attribute is cut off")
		}
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			return nil, errors.New("a netlink attribute has an impossible length")
		}
		to = append(to, attribute{binary.NativeEndian.Uint16(b[2:]) & kindMask, b[unix.SizeofNlAttr:size:size]})
		b = b[min(len(b), aligned(size)):]
	}
	return to, nil
}

// few is how many attributes most lists have at most: room for them is taken
// where it costs nothing.
const few = 12

// each does something with each of a list of attributes.
func each(b []byte, do func(attribute)) error {
	var room [few]attribute
	list, err := appendAttributes(room[:0], b)
	for _, a := range list {
		do(a)
	}
	return err
}

func aligned(size int) int { return (size + 3) &^ 3 }

// put appends an attribute.
func put(b []byte, kind uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofNlAttr+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = append(b, data...)
	return append(b, make([]byte, aligned(len(data))-len(data))...)
}

func putNested(b []byte, kind uint16, data []byte) []byte {
	return put(b, kind|unix.NLA_F_NESTED, data)
}

func putString(b []byte, kind uint16, s string) []byte { return put(b, kind, append([]byte(s), 0)) }

func put32(b []byte, kind uint16, v uint32) []byte {
	return put(b, kind, binary.BigEndian.AppendUint32(nil, v))
}

func put64(b []byte, kind uint16, v uint64) []byte {
	return put(b, kind, binary.BigEndian.AppendUint64(nil, v))
}

// number reads a big-endian number of 4 or 8 bytes; what is neither is 0.
func number(b []byte) uint64 {
	switch len(b) {
	case 4:
		return uint64(binary.BigEndian.Uint32(b))
	case 8:
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

// text reads a string.
func text(b []byte) string {
	for i, c := range b {
		if c == 0 {
			return string(b[:i])
		}
	}
	return string(b)
}

// request is a message of nf_tables' to the kernel.
type request struct {
	kind  uint16 // NFT_MSG_*
	flags uint16
	data  []byte
	about string // for people, where it is refused
}

// append appends a message (netlink(7)) that begins with a struct nfgenmsg.
func (r request) append(b []byte, family byte, sequence uint32, flags uint16) []byte {
	return message(b, unix.NFNL_SUBSYS_NFTABLES<<8|r.kind, unix.NLM_F_REQUEST|r.flags|flags, sequence,
		append([]byte{family, unix.NFNETLINK_V0, 0, 0}, r.data...))
}

func message(b []byte, kind, flags uint16, sequence uint32, data []byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(unix.SizeofNlMsghdr+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, sequence)
	b = binary.NativeEndian.AppendUint32(b, 0)
	b = append(b, data...)
	return append(b, make([]byte, aligned(len(data))-len(data))...)
}

// socket is a conversation with the kernel.
type socket struct {
	fd       int
	family   byte // whose tables are asked about
	sequence uint32
	buffer   []byte
}

// answerSize is more than the kernel puts into one answer (linux/net/netlink:
// 32 KB for a listing).
const answerSize = 64 << 10

// answerTime bounds how long the kernel may take for an answer.
const answerTime = 30 // seconds

func dial() (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	s := &socket{fd: fd, family: unix.NFPROTO_INET, buffer: make([]byte, answerSize)}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	if err == nil {
		err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerTime})
	}
	if err != nil {
		s.close()
		return nil, err
	}
	// Else each answer holds the request, which may be large.
	if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1); err != nil && err != unix.ENOPROTOOPT {
		s.close()
		return nil, err
	}
	return s, nil
}

// close does not wait for its end, nor has the process wait that ends meanwhile. The
// kernel keeps whoever lets go of such a socket until what was deleted before is
// freed, some ten milliseconds (linux/net/netfilter/nf_tables_api.c,
// nft_rcv_nl_event). So it is sent off within a pair of sockets that then nobody
// holds but itself; such the kernel closes in the background (unix(7), SCM_RIGHTS;
// linux/net/unix/garbage.c). Where that is not allowed, or an older kernel does it
// on the spot, the process waits at its end.
func (s *socket) close() {
	last := s.fd
	if pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
		if unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(s.fd, pair[1]), nil, 0) == nil {
			unix.Close(s.fd)
			last = pair[0] // at its end the kernel looks for such
		} else {
			unix.Close(pair[0])
		}
		unix.Close(pair[1])
	}
	go unix.Close(last)
}

func (s *socket) send(b []byte) error {
	return unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
}

// receive gives the next messages of the kernel's; they hold until the next call.
func (s *socket) receive() ([]syscall.NetlinkMessage, error) {
	for {
		n, _, flags, from, err := unix.Recvmsg(s.fd, s.buffer, nil, 0)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN {
			return nil, fmt.Errorf("the kernel gives no answer within %d s", answerTime)
		}
		if err != nil {
			return nil, err
		}
		if flags&unix.MSG_TRUNC != 0 {
			return nil, errors.New("an answer of the kernel is cut off")
		}
		if kernel, ok := from.(*unix.SockaddrNetlink); ok && kernel.Pid == 0 {
			return syscall.ParseNetlinkMessage(s.buffer[:n])
		}
	}
}

// failure gives what the kernel said in a message about an error; nil is that all
// went well.
func failure(m syscall.NetlinkMessage) error {
	if len(m.Data) < 4 {
		return errors.New("an answer of the kernel is cut off")
	}
	if n := int32(binary.NativeEndian.Uint32(m.Data)); n != 0 {
		return unix.Errno(-n)
	}
	return nil
}

// refusedError says which part of a change the kernel refused.
type refusedError struct {
	about string
	err   error
}

func (e *refusedError) Error() string {
	return fmt.Sprintf("the kernel refuses %s: %v", e.about, e.err)
}

func (e *refusedError) Unwrap() error { return e.err }

// commit has the kernel make all of some requests true, at one moment, or none.
func commit(requests []request) error {
	s, err := dial()
	if err != nil {
		return err
	}
	defer s.close()
	// The number of the subsystem is in network order (linux/netfilter/nfnetlink.h).
	bracket := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	batch := message(nil, unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, 0, bracket)
	for i, r := range requests {
		batch = r.append(batch, unix.NFPROTO_INET, uint32(i+1), unix.NLM_F_ACK)
	}
	batch = message(batch, unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, 0, bracket)
	for _, option := range []int{unix.SO_SNDBUFFORCE, unix.SO_RCVBUFFORCE} {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, option, 2*len(batch)+256<<10); err != nil {
			return err
		}
	}
	if err := s.send(batch); err != nil {
		return err
	}
	// An answer for each request, in their order; the first that is refused takes
	// all others with it. One for none of them is of the batch as a whole.
	for answered := 0; answered < len(requests); {
		answers, err := s.receive()
		if err != nil {
			return err
		}
		for _, m := range answers {
			if m.Header.Type != unix.NLMSG_ERROR {
				continue
			}
			if err := failure(m); err != nil {
				about := "the change as a whole"
				if n := int(m.Header.Seq); n > 0 && n <= len(requests) {
					about = requests[n-1].about
				}
				return &refusedError{about, err}
			}
			answered++
		}
	}
	return nil
}

// ask has the kernel tell one thing, or with NLM_F_DUMP list some, to each: what
// comes behind the struct nfgenmsg.
func (s *socket) ask(kind, flags uint16, data []byte, each func([]byte) error) error {
	s.sequence++
	if flags&unix.NLM_F_DUMP == 0 {
		flags |= unix.NLM_F_ACK
	}
	if err := s.send(request{kind: kind, data: data}.append(nil, s.family, s.sequence, flags)); err != nil {
		return err
	}
	var failed error
	for {
		answers, err := s.receive()
		if err != nil {
			return err
		}
		for _, m := range answers {
			if m.Header.Flags&unix.NLM_F_DUMP_INTR != 0 {
				failed = unix.EINTR
			}
			switch m.Header.Type {
			case unix.NLMSG_DONE:
				return failed
			case unix.NLMSG_ERROR:
				return errors.Join(failed, failure(m))
			}
			if len(m.Data) < 4 {
				return errors.New("a message of nf_tables is cut off")
			}
			if failed == nil {
				failed = each(m.Data[4:])
			}
		}
	}
}
