package host

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink/nl"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Bits of a connection's status and of one direction's flags, from the
// kernel's uapi nf_conntrack_common.h and nf_conntrack_tcp.h.
const (
	statusSeenReply = 1 << 1
	statusAssured   = 1 << 2
	statusConfirmed = 1 << 3
	flagSackPerm    = 0x02
	flagBeLiberal   = 0x08
)

// Adopt adds a conntrack entry for every open TCP connection of this network
// namespace that has none, and returns how many it added. It is called before a
// policy of DROP is loaded.
//
// Conntrack sees packets only once the first stateful rule is loaded. It does not
// know older connections: if the client sends first, its packet looks like a new
// connection without a SYN. In the added entry this host is the originator, even if
// the peer connected: the peer's packets are then replies, and ESTABLISHED.
//
// Existing entries do not change. The error reports how many connections could not
// be adopted, and the first cause; the others are adopted.
func (ConntrackTable) Adopt() (n int, err error) {
	all, err := dumpSockets("/proc", "tcp")
	if err != nil {
		return 0, err
	}
	conn, err := nl.Subscribe(syscall.NETLINK_NETFILTER)
	if err != nil {
		return 0, fmt.Errorf("opening conntrack: %w", err)
	}
	defer conn.Close()
	if err := conn.SetReceiveTimeout(&nl.SocketTimeoutTv); err != nil {
		return 0, fmt.Errorf("opening conntrack: %w", err)
	}
	sockets := map[int]*nl.SocketHandle{syscall.NETLINK_NETFILTER: {Socket: conn}}

	var failed []error
	for _, s := range all {
		state, timeout := trackedAs(s.state)
		if timeout == 0 {
			continue
		}
		req := newEntry(s.Socket, state, timeout)
		req.Sockets = sockets
		_, err := req.Execute(syscall.NETLINK_NETFILTER, 0)
		switch {
		case err == nil:
			n++
		case errors.Is(err, syscall.EEXIST):
		default:
			failed = append(failed, err)
		}
	}
	if len(failed) > 0 {
		return n, fmt.Errorf("tracking open connections (%d failed): %w", len(failed), failed[0])
	}
	return n, nil
}

// trackedAs returns the conntrack state that matches a socket's state, and the kernel's default
// timeout for it, in seconds. The timeout is zero if the socket is not an open connection.
func trackedAs(socketState uint8) (state uint8, timeout uint32) {
	switch socketState {
	case stateEstablished:
		return nl.TCP_CONNTRACK_ESTABLISHED, 5 * 24 * 60 * 60
	case stateFinWait1:
		return nl.TCP_CONNTRACK_FIN_WAIT, 120
	case stateFinWait2, stateCloseWait:
		return nl.TCP_CONNTRACK_CLOSE_WAIT, 60
	}
	return 0, 0
}

// newEntry returns the request that creates an entry for a connection. The library's
// ConntrackCreate changes existing entries and cannot set the flags.
//
// Without the flag "be liberal" the kernel checks windows without their scale, which
// only the handshake contains, and finds the first larger burst INVALID. Its own
// pickup of connections sets the same two flags (tcp_new in
// nf_conntrack_proto_tcp.c). "Assured" keeps a full table from evicting the entry
// first.
func newEntry(s system.Socket, state uint8, timeout uint32) *nl.NetlinkRequest {
	family := uint8(syscall.AF_INET)
	src, dst := nl.CTA_IP_V4_SRC, nl.CTA_IP_V4_DST
	if s.Local.Addr().Is6() {
		family = syscall.AF_INET6
		src, dst = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	tuple := func(kind int, from, to netip.AddrPort) *nl.RtAttr {
		ip := nested(nl.CTA_TUPLE_IP,
			nl.NewRtAttr(src, from.Addr().AsSlice()),
			nl.NewRtAttr(dst, to.Addr().AsSlice()))
		proto := nested(nl.CTA_TUPLE_PROTO,
			nl.NewRtAttr(nl.CTA_PROTO_NUM, nl.Uint8Attr(syscall.IPPROTO_TCP)),
			nl.NewRtAttr(nl.CTA_PROTO_SRC_PORT, nl.BEUint16Attr(from.Port())),
			nl.NewRtAttr(nl.CTA_PROTO_DST_PORT, nl.BEUint16Attr(to.Port())))
		return nested(kind, ip, proto)
	}
	const flags = flagSackPerm | flagBeLiberal
	tcp := nested(nl.CTA_PROTOINFO_TCP,
		nl.NewRtAttr(nl.CTA_PROTOINFO_TCP_STATE, nl.Uint8Attr(state)),
		// Value and mask (struct nf_ct_tcp_flags).
		nl.NewRtAttr(nl.CTA_PROTOINFO_TCP_FLAGS_ORIGINAL, []byte{flags, flags}),
		nl.NewRtAttr(nl.CTA_PROTOINFO_TCP_FLAGS_REPLY, []byte{flags, flags}))

	const subsystem = 1 // NFNL_SUBSYS_CTNETLINK
	req := nl.NewNetlinkRequest(subsystem<<8|nl.IPCTNL_MSG_CT_NEW,
		syscall.NLM_F_ACK|syscall.NLM_F_CREATE|syscall.NLM_F_EXCL)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: nl.NFNETLINK_V0})
	req.AddData(tuple(nl.CTA_TUPLE_ORIG, s.Local, s.Remote))
	req.AddData(tuple(nl.CTA_TUPLE_REPLY, s.Remote, s.Local))
	req.AddData(nl.NewRtAttr(nl.CTA_STATUS, nl.BEUint32Attr(statusConfirmed|statusSeenReply|statusAssured)))
	req.AddData(nl.NewRtAttr(nl.CTA_TIMEOUT, nl.BEUint32Attr(timeout)))
	req.AddData(nested(nl.CTA_PROTOINFO, tcp))
	return req
}

func nested(kind int, children ...*nl.RtAttr) *nl.RtAttr {
	a := nl.NewRtAttr(int(nl.NLA_F_NESTED)|kind, nil)
	for _, c := range children {
		a.AddChild(c)
	}
	return a
}
