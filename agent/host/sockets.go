package host

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// States of a socket, from the kernel's include/net/tcp_states.h. A UDP socket
// without a peer is in stateClose.
const (
	stateEstablished = 1
	stateFinWait1    = 4
	stateFinWait2    = 5
	stateClose       = 7
	stateCloseWait   = 8
	stateListen      = 10
)

type socket struct {
	system.Socket
	state uint8
}

// Sockets returns the TCP and UDP sockets of this network namespace: those that
// listen (for UDP, bound without a peer) and the established TCP connections. A
// socket that listens on [::] may accept IPv4, too.
func Sockets() (listening, established []system.Socket, err error) {
	all, err := dumpSockets("/proc", "tcp", "udp")
	for _, s := range all {
		switch {
		case s.Proto == "tcp" && s.state == stateListen, s.Proto == "udp" && s.state == stateClose && s.Local.Port() != 0:
			listening = append(listening, s.Socket)
		case s.Proto == "tcp" && s.state == stateEstablished:
			established = append(established, s.Socket)
		}
	}
	return listening, established, err
}

// dumpSockets lists sockets by netlink's SOCK_DIAG. If that is missing (before Linux
// 3.3, or without the modules tcp_diag and udp_diag), it reads /proc/net.
func dumpSockets(proc string, protos ...string) ([]socket, error) {
	var all []socket
	for _, proto := range protos {
		dump := netlink.SocketDiagTCP
		if proto == "udp" {
			dump = netlink.SocketDiagUDP
		}
		for _, family := range []struct {
			number uint8
			suffix string
		}{{netlink.FAMILY_V4, ""}, {netlink.FAMILY_V6, "6"}} {
			list, err := retry(func() ([]*netlink.Socket, error) { return dump(family.number) })
			if err == nil {
				for _, s := range list {
					all = append(all, fromNetlink(proto, s))
				}
				continue
			}
			table, err := readProcNet(proc, proto, family.suffix)
			if err != nil {
				return nil, fmt.Errorf("listing %s sockets: %w", proto, err)
			}
			all = append(all, table...)
		}
	}
	return all, nil
}

func fromNetlink(proto string, s *netlink.Socket) socket {
	local, _ := netip.AddrFromSlice(s.ID.Source)
	remote, _ := netip.AddrFromSlice(s.ID.Destination)
	return socket{
		Socket: system.Socket{
			Proto:  proto,
			Local:  netip.AddrPortFrom(local.Unmap(), s.ID.SourcePort),
			Remote: netip.AddrPortFrom(remote.Unmap(), s.ID.DestinationPort),
			Inode:  uint64(s.INode),
			UID:    s.UID,
		},
		state: s.State,
	}
}

// readProcNet reads one of /proc/net/{tcp,udp}{,6}. Without IPv6 in the kernel there
// is no tcp6.
func readProcNet(proc, proto, suffix string) ([]socket, error) {
	path := proc + "/net/" + proto + suffix
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && suffix == "6" {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	list, err := parseProcNet(proto, string(data))
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", path, err)
	}
	return list, nil
}

// parseProcNet parses such a table (proc(5)). Its columns are: slot, local and remote
// address, state, queues, timer, retransmits, uid, timeout, inode, and more.
func parseProcNet(proto, text string) ([]socket, error) {
	var list []socket
	_, rows, _ := strings.Cut(text, "\n")
	for _, row := range strings.Split(rows, "\n") {
		f := strings.Fields(row)
		if len(f) == 0 {
			continue
		}
		if len(f) < 10 {
			return nil, fmt.Errorf("%d columns in %q", len(f), row)
		}
		local, err1 := parseHexAddrPort(f[1])
		remote, err2 := parseHexAddrPort(f[2])
		state, err3 := strconv.ParseUint(f[3], 16, 8)
		uid, err4 := strconv.ParseUint(f[7], 10, 32)
		inode, err5 := strconv.ParseUint(f[9], 10, 64)
		if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
			return nil, err
		}
		list = append(list, socket{
			Socket: system.Socket{Proto: proto, Local: local, Remote: remote, Inode: inode, UID: uint32(uid)},
			state:  uint8(state),
		})
	}
	return list, nil
}

// parseHexAddrPort parses "0100007F:0016": the address in 32-bit words, each in this
// machine's byte order, and the port as a number.
func parseHexAddrPort(s string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(s, ":")
	raw, err := hex.DecodeString(host)
	if err != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, fmt.Errorf("address %q", s)
	}
	for i := 0; i < len(raw); i += 4 {
		binary.NativeEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
	}
	addr, ok := netip.AddrFromSlice(raw)
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil || !ok {
		return netip.AddrPort{}, fmt.Errorf("address %q", s)
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(n)), nil
}
