package nftables

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// This file implements netlink for the expressions of google/nftables. The library
// drops unknown parts of a rule that it reads, so that a rule that another program
// restricted would look like ours. It also cannot send back what it read, or identify
// the message that the kernel refused.

// absent reports whether an error means that the kernel does not support nf_tables.
func absent(err error) bool {
	for _, e := range []error{syscall.EINVAL, syscall.EOPNOTSUPP, syscall.EPROTONOSUPPORT, syscall.EAFNOSUPPORT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// attribute is a netlink attribute, without the flag for nested attributes, which
// kernels before 5.2 do not set.
type attribute struct {
	kind uint16
	data []byte
}

const kindMask = ^uint16(unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)

// appendAttributes parses a list of attributes. A wrong length is an error.
func appendAttributes(to []attribute, b []byte) ([]attribute, error) {
	for len(b) > 0 {
		if len(b) < unix.SizeofNlAttr {
			return nil, errors.New("truncated netlink attribute")
		}
		size := int(binary.NativeEndian.Uint16(b))
		if size < unix.SizeofNlAttr || size > len(b) {
			return nil, errors.New("netlink attribute with an invalid length")
		}
		to = append(to, attribute{binary.NativeEndian.Uint16(b[2:]) & kindMask, b[unix.SizeofNlAttr:size:size]})
		b = b[min(len(b), aligned(size)):]
	}
	return to, nil
}

// few is a number of attributes that most lists do not exceed: space for them is
// reserved on the stack.
const few = 12

func each(b []byte, do func(attribute)) error {
	var room [few]attribute
	list, err := appendAttributes(room[:0], b)
	for _, a := range list {
		do(a)
	}
	return err
}

func aligned(size int) int { return (size + 3) &^ 3 }

func put(b []byte, kind uint16, data []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(unix.SizeofNlAttr+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	return appendAligned(b, data)
}

func appendAligned(b, data []byte) []byte {
	return append(append(b, data...), make([]byte, aligned(len(data))-len(data))...)
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

// number decodes a big-endian number of 4 or 8 bytes; other lengths are 0.
func number(b []byte) uint64 {
	switch len(b) {
	case 4:
		return uint64(binary.BigEndian.Uint32(b))
	case 8:
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func text(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}

// request is an nf_tables message to the kernel.
type request struct {
	kind  uint16 // NFT_MSG_*
	flags uint16
	data  []byte
	about string // what the request changes, for errors
}

// append appends the request as a message (netlink(7)) with a struct nfgenmsg.
func (r request) append(b []byte, family byte, sequence uint32, flags uint16) []byte {
	return r.appendTo(b, unix.NFNL_SUBSYS_NFTABLES, family, sequence, flags)
}

// appendTo is append for a subsystem of netfilter.
func (r request) appendTo(b []byte, subsystem uint16, family byte, sequence uint32, flags uint16) []byte {
	return message(b, subsystem<<8|r.kind, unix.NLM_F_REQUEST|r.flags|flags, sequence,
		append([]byte{family, unix.NFNETLINK_V0, 0, 0}, r.data...))
}

func message(b []byte, kind, flags uint16, sequence uint32, data []byte) []byte {
	b = binary.NativeEndian.AppendUint32(b, uint32(unix.SizeofNlMsghdr+len(data)))
	b = binary.NativeEndian.AppendUint16(b, kind)
	b = binary.NativeEndian.AppendUint16(b, flags)
	b = binary.NativeEndian.AppendUint32(b, sequence)
	b = binary.NativeEndian.AppendUint32(b, 0)
	return appendAligned(b, data)
}

type socket struct {
	fd       int
	family   byte // of the tables in queries
	sequence uint32
	buffer   []byte
}

// answerSize exceeds the largest answer of the kernel (linux/net/netlink: 32 KB for a
// listing).
const answerSize = 64 << 10

// answerTime is the time limit for an answer of the kernel.
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
	if err == nil {
		// Otherwise each answer contains the request, which may be large.
		if err = unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1); err == unix.ENOPROTOOPT {
			err = nil
		}
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

// close closes the socket in the background, even if the process ends. Closing blocks
// until the kernel has freed previously deleted objects, some ten milliseconds
// (linux/net/netfilter/nf_tables_api.c, nft_rcv_nl_event). So the socket is sent over a
// socket pair that is then referenced only by itself. The kernel closes such a pair in
// the background (unix(7), SCM_RIGHTS; linux/net/unix/garbage.c). If sending fails, or
// an older kernel closes it at once, the process waits at its end.
func (s *socket) close() {
	last := s.fd
	if pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0); err == nil {
		if unix.Sendmsg(pair[0], []byte{0}, unix.UnixRights(s.fd, pair[1]), nil, 0) == nil {
			unix.Close(s.fd)
			last = pair[0] // closing it makes the kernel look for such pairs
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

// receive returns the next messages of the kernel, valid until the next call.
func (s *socket) receive() ([]syscall.NetlinkMessage, error) {
	for {
		n, _, flags, from, err := unix.Recvmsg(s.fd, s.buffer, nil, 0)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN {
			return nil, fmt.Errorf("no answer from the kernel within %d s", answerTime)
		}
		if err != nil {
			return nil, err
		}
		if flags&unix.MSG_TRUNC != 0 {
			return nil, errors.New("truncated answer from the kernel")
		}
		if kernel, ok := from.(*unix.SockaddrNetlink); ok && kernel.Pid == 0 {
			return syscall.ParseNetlinkMessage(s.buffer[:n])
		}
	}
}

// failure returns the error in a message; nil is success.
func failure(m syscall.NetlinkMessage) error {
	if len(m.Data) < 4 {
		return errors.New("truncated answer from the kernel")
	}
	if n := int32(binary.NativeEndian.Uint32(m.Data)); n != 0 {
		return unix.Errno(-n)
	}
	return nil
}

// refusedError is the error for a request that the kernel refused.
type refusedError struct {
	about string
	err   error
}

func (e *refusedError) Error() string {
	return fmt.Sprintf("the kernel refused the %s: %v", e.about, e.err)
}

func (e *refusedError) Unwrap() error { return e.err }

// commit sends requests for the family inet as one transaction.
func commit(requests []request) error { return commitTo(unix.NFPROTO_INET, requests) }

// commitTo sends requests as one transaction: the kernel applies all or none.
func commitTo(family byte, requests []request) error {
	s, err := dial()
	if err != nil {
		return err
	}
	defer s.close()
	// The subsystem number is in network byte order (linux/netfilter/nfnetlink.h).
	bracket := []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}
	batch := message(nil, unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, 0, bracket)
	for i, r := range requests {
		// The kernel reports every refusal. An answer to each of many requests might not fit
		// into the buffer of a socket without privileges.
		ack := uint16(0)
		if i == len(requests)-1 {
			ack = unix.NLM_F_ACK
		}
		batch = r.append(batch, family, uint32(i+1), ack)
	}
	batch = message(batch, unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, 0, bracket)
	size := 2*len(batch) + 256<<10
	err = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, size)
	if errors.Is(err, unix.EPERM) { // in a user namespace; the limit is net.core.wmem_max
		err = unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUF, size)
	}
	if err != nil {
		return fmt.Errorf("setting the size of the netlink buffer: %w", err)
	}
	if err := s.send(batch); errors.Is(err, unix.EMSGSIZE) {
		return hint.Wrap(fmt.Errorf("the change of %d bytes does not fit into the netlink buffer: %w", len(batch), err),
			"on the host of this container, set net.core.wmem_max to %d", size)
	} else if err != nil {
		return err
	}
	// An answer without an error is for the last request. One for no request is for the
	// batch as a whole. The first refusal ends the transaction.
	for done := len(requests) == 0; !done; {
		answers, err := s.receive()
		if err != nil {
			return err
		}
		for _, m := range answers {
			if m.Header.Type != unix.NLMSG_ERROR {
				continue
			}
			if err := failure(m); err != nil {
				about := "change as a whole"
				if n := int(m.Header.Seq); n > 0 && n <= len(requests) {
					about = requests[n-1].about
				}
				return &refusedError{about, err}
			}
			done = true
		}
	}
	return nil
}

// ask sends a query, or a listing with NLM_F_DUMP, and calls each with the data after
// struct nfgenmsg of every answer.
func (s *socket) ask(kind, flags uint16, data []byte, each func([]byte) error) error {
	return s.askOf(unix.NFNL_SUBSYS_NFTABLES, kind, flags, data, each)
}

// askOf is ask for a subsystem of netfilter.
func (s *socket) askOf(subsystem, kind, flags uint16, data []byte, each func([]byte) error) error {
	s.sequence++
	if flags&unix.NLM_F_DUMP == 0 {
		flags |= unix.NLM_F_ACK
	}
	if err := s.send(request{kind: kind, data: data}.appendTo(nil, subsystem, s.family, s.sequence, flags)); err != nil {
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
				return errors.New("truncated nf_tables message")
			}
			if failed == nil {
				failed = each(m.Data[4:])
			}
		}
	}
}

// Watch calls notify on each change of our table, or of the IPv4 and IPv6 tables
// "filter", "mangle" and "nat", which the nft variant of iptables uses, until the
// context ends. The kernel does not report changes of the legacy variant's tables.
func Watch(ctx context.Context, notify func()) error {
	if err := system.Multicast(ctx, unix.NETLINK_NETFILTER, []int{unix.NFNLGRP_NFTABLES}, relevant, notify); err != nil {
		return fmt.Errorf("watching nf_tables: %w", err)
	}
	return nil
}

// relevant reports whether a message is about our table and its contents, or about a
// table of iptables and its chains and rules. Sets there are ignored: they belong to other
// programs, and may change often. The kernel does not report elements that packets add
// to our sets. A message begins with the family (struct nfgenmsg), and the first
// attribute of these kinds is the table's name (linux/netfilter/nf_tables.h).
func relevant(m syscall.NetlinkMessage) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES {
		return false
	}
	sets := false
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_NEWSET, unix.NFT_MSG_DELSET, unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
		sets = true
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE, unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
	default:
		return false
	}
	const nfgenmsg, attr = 4, 4
	if len(m.Data) < nfgenmsg+attr {
		return true
	}
	xtables := []string{"filter", "mangle", "nat"}
	names := map[byte][]string{unix.NFPROTO_INET: {TableName}, unix.NFPROTO_IPV4: xtables, unix.NFPROTO_IPV6: xtables}[m.Data[0]]
	if names == nil || sets && names[0] != TableName {
		return false
	}
	first := m.Data[nfgenmsg:]
	end := int(binary.NativeEndian.Uint16(first))
	if kind := binary.NativeEndian.Uint16(first[2:]); kind != unix.NFTA_TABLE_NAME || end < attr || end > len(first) {
		return true
	}
	return slices.Contains(names, string(bytes.TrimRight(first[attr:end], "\x00")))
}
