package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
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
func attributes(b []byte) ([]attribute, error) {
	var out []attribute
	for len(b) > 0 {
		if len(b) < unix.SizeofNlAttr {
			return nil, errors.New("a netlink attribute is cut off")
		}
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			return nil, errors.New("a netlink attribute has an impossible length")
		}
		out = append(out, attribute{binary.NativeEndian.Uint16(b[2:]) & kindMask, b[unix.SizeofNlAttr:size]})
		b = b[min(len(b), aligned(size)):]
	}
	return out, nil
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
	flags netlink.HeaderFlags
	data  []byte
	about string // for people, where it is refused
}

// message is a request as it is sent. It begins with a struct nfgenmsg.
func (r request) message(family byte, flags netlink.HeaderFlags) netlink.Message {
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | r.kind), Flags: netlink.Request | r.flags | flags},
		Data:   append([]byte{family, unix.NFNETLINK_V0, 0, 0}, r.data...),
	}
}

func dial() (*netlink.Conn, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, err
	}
	// Else each answer holds the request, which may be large.
	if err := conn.SetOption(netlink.CapAcknowledge, true); err != nil && !errors.Is(err, unix.ENOPROTOOPT) {
		conn.Close()
		return nil, err
	}
	return conn, nil
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
	conn, err := dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	// The number of the subsystem is in network order (linux/netfilter/nfnetlink.h).
	bracket := func(kind netlink.HeaderType) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: kind, Flags: netlink.Request}, Data: []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}}
	}
	batch := []netlink.Message{bracket(unix.NFNL_MSG_BATCH_BEGIN)}
	size := 0
	for _, r := range requests {
		m := r.message(unix.NFPROTO_INET, netlink.Acknowledge)
		size += unix.SizeofNlMsghdr + aligned(len(m.Data))
		batch = append(batch, m)
	}
	batch = append(batch, bracket(unix.NFNL_MSG_BATCH_END))
	if err := conn.SetWriteBuffer(2*size + 64<<10); err != nil {
		return err
	}
	if _, err := conn.SendMessages(batch); err != nil {
		return err
	}
	// One answer for each request, in their order; the first that is refused
	// takes all others with it.
	for _, r := range requests {
		if _, err := conn.Receive(); err != nil {
			return &refusedError{r.about, errno(err)}
		}
	}
	return nil
}

// errno is the kernel's error without what the library says around it.
func errno(err error) error {
	var number unix.Errno
	if errors.As(err, &number) {
		return number
	}
	return err
}

// ask has the kernel list something.
func ask(conn *netlink.Conn, kind uint16, flags netlink.HeaderFlags, data []byte) ([]netlink.Message, error) {
	answers, err := conn.Execute(request{kind: kind, data: data}.message(unix.NFPROTO_INET, flags))
	for _, m := range answers {
		if m.Header.Flags&netlink.DumpInterrupted != 0 {
			return nil, unix.EINTR
		}
		if len(m.Data) < 4 {
			return nil, errors.New("a message of nf_tables is cut off")
		}
	}
	return answers, err
}
