package system

import "net/netip"

// Socket is a TCP or UDP socket of this network namespace. IPv4 addresses are never
// IPv6-mapped.
type Socket struct {
	Proto string         `json:"proto"` // "tcp" or "udp"
	Local netip.AddrPort `json:"local"`
	// Remote is 0.0.0.0:0 or [::]:0 if the socket listens.
	Remote netip.AddrPort `json:"remote"`
	// Inode is the number in the links of /proc/PID/fd, or 0 if no process has the
	// socket open any more.
	Inode uint64 `json:"inode"`
	UID   uint32 `json:"uid"` // the user who created it
}
