package session

import (
	"bytes"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Client is where an SSH session comes from.
type Client struct {
	Addr netip.Addr // the very address
	// Prefix stands for the client: an address, or for a global IPv6 address
	// its /64, for privacy addresses (RFC 8981) change in it.
	Prefix netip.Prefix
	Reason string // how that is known
	// Began is how long the machine had been up when sshd's process for the
	// connection began; zero is not known.
	Began time.Duration
}

// newClient refuses addresses that say nothing of where somebody comes from.
func newClient(a netip.Addr, reason string) (Client, bool) {
	a = a.Unmap()
	// A link-local address is one of many hosts', which its zone tells apart.
	if !a.IsGlobalUnicast() {
		return Client{}, false
	}
	bits := a.BitLen()
	if a.Is6() && !a.IsPrivate() {
		bits = 64
	}
	prefix, err := a.Prefix(bits)
	if err != nil {
		return Client{}, false
	}
	return Client{Addr: a, Prefix: prefix, Reason: reason}, true
}

// maxAncestors bounds the walk to PID 1: processes come and go meanwhile.
const maxAncestors = 64

// Connections are what a process and its ancestors, the nearest first, have in the
// variable SSH_CONNECTION, by which sshd tells its sessions who they are. sudo
// drops it, but the ancestors still have it; in tmux it may be of a session that
// ended long ago; and anybody can set it to anything.
func (p *Processes) Connections(pid int) []string {
	var list []string
	for range maxAncestors {
		if pid <= 0 {
			break
		}
		if env, err := p.read(pid, "environ", 1<<20); err == nil {
			if value := lookupEnv(env, "SSH_CONNECTION"); value != "" {
				list = append(list, value)
			}
		}
		st, err := p.status(pid)
		if err != nil {
			break
		}
		pid = st.ppid
	}
	return list
}

// Invoker finds the SSH session that the caller, whose Connections are these,
// belongs to. One counts only where it names both ends of a connection that is
// established now, that a process of root's sshd has open, and whose peer has
// authenticated.
func (p *Processes) Invoker(connections []string, established []system.Socket) (Client, bool) {
	for _, value := range connections {
		if c, ok := p.fromConnection(value, established); ok {
			return c, true
		}
	}
	return Client{}, false
}

func (p *Processes) fromConnection(value string, established []system.Socket) (Client, bool) {
	remote, local, err := parseSSHConnection(value)
	if err != nil {
		return Client{}, false
	}
	for _, s := range established {
		if s.Proto == "tcp" && s.Local == local && s.Remote == remote && p.authenticated(s) {
			c, ok := newClient(remote.Addr(), "the SSH session that bootstrap ran in came from there")
			c.Began = p.ssh[s.Inode].began
			return c, ok
		}
	}
	return Client{}, false
}

// parseSSHConnection reads SSH_CONNECTION (ssh(1)): the client's address and
// port, the server's address and port.
func parseSSHConnection(value string) (client, server netip.AddrPort, err error) {
	f := strings.Split(value, " ")
	if len(f) != 4 {
		return client, server, fmt.Errorf("%q: want two addresses, each with a port", value)
	}
	end := func(addr, port string) (netip.AddrPort, error) {
		a, err := netip.ParseAddr(addr)
		if err != nil {
			return netip.AddrPort{}, err
		}
		n, err := strconv.ParseUint(port, 10, 16)
		// The kernel's tables of sockets know no zones.
		return netip.AddrPortFrom(a.WithZone("").Unmap(), uint16(n)), err
	}
	if client, err = end(f[0], f[1]); err != nil {
		return client, server, err
	}
	server, err = end(f[2], f[3])
	return client, server, err
}

// lookupEnv finds a variable in what /proc/PID/environ holds.
func lookupEnv(environ []byte, name string) string {
	for _, entry := range bytes.Split(environ, []byte{0}) {
		if value, ok := bytes.CutPrefix(entry, []byte(name+"=")); ok {
			return string(value)
		}
	}
	return ""
}
