package system

import "net/netip"

// Socket is a TCP or UDP socket of this network namespace. IPv4 addresses are
// never in their IPv6-mapped form.
type Socket struct {
	Proto string         `json:"proto"` // "tcp" or "udp"
	Local netip.AddrPort `json:"local"`
	// Remote is 0.0.0.0:0 or [::]:0 for a socket that listens.
	Remote netip.AddrPort `json:"remote"`
	// Inode is what links in /proc/PID/fd call the socket; 0 is one that no
	// process has any more.
	Inode uint64 `json:"inode"`
	UID   uint32 `json:"uid"` // who made it
}
