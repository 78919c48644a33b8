package sshd

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// newClient returns a session from an address, if the address identifies a client.
func newClient(a netip.Addr, reason string) (host.Session, bool) {
	a = a.Unmap()
	// A link-local address without its zone is not unique.
	if !a.IsGlobalUnicast() {
		return host.Session{}, false
	}
	bits := a.BitLen()
	if a.Is6() && !a.IsPrivate() {
		bits = 64
	}
	return host.Session{Addr: a, Prefix: netip.PrefixFrom(a, bits).Masked(), Reason: reason}, true
}

// maxAncestors limits the walk to PID 1, as processes may start and end during it.
const maxAncestors = 64

// Caller is a process, its ancestors, and the values of SSH_CONNECTION in them, nearest
// first. SSH servers set it in their sessions. sudo drops it, but the ancestors still have
// it. In tmux it may be from a session that ended long ago. Any user can set it to any
// value.
type Caller struct {
	pids        []int
	connections []string
}

// Caller returns the process pid as a caller.
func (p *Processes) Caller(pid int) (c Caller) {
	for range maxAncestors {
		c.pids = append(c.pids, pid)
		if env, err := p.read(pid, "environ", 1<<20); err == nil {
			if value := lookupEnv(env, "SSH_CONNECTION"); value != "" {
				c.connections = append(c.connections, value)
			}
		}
		st, err := p.status(pid)
		if err != nil {
			break
		}
		pid = st.ppid
	}
	return c
}

// Invoker returns the caller's SSH session. A value of SSH_CONNECTION counts only if it
// names both ends of an established connection that an SSH server has open.
func (p *Processes) Invoker(caller Caller, listening, established []system.Socket) (host.Session, bool) {
	for _, value := range caller.connections {
		remote, local, err := parseSSHConnection(value)
		for _, s := range established {
			if err != nil || s.Local != local || s.Remote != remote {
				continue
			}
			began, serves := p.serves(caller, s, listening)
			if c, ok := newClient(remote.Addr(), "the SSH session that ran bootstrap"); ok && serves {
				c.Local, c.Began = local, began
				return c, true
			}
		}
	}
	return host.Session{}, false
}

// serves reports whether an SSH server has a connection open, and when it began. The
// server is OpenSSH, and the peer has authenticated. Or it is another root-owned process
// that serves only this connection: dropbear, or an ancestor of the caller. A process that
// also listens on the port serves other peers too, so the connection may be any user's.
func (p *Processes) serves(caller Caller, s system.Socket, listening []system.Socket) (began time.Duration, ok bool) {
	if p.authenticated(s) {
		return p.ssh[s.Inode].began, true
	}
	for _, proc := range p.list {
		dropbear := strings.HasPrefix(path.Base(proc.exe), "dropbear")
		if isSSHD(proc.exe) || !dropbear && !slices.Contains(caller.pids, proc.pid) {
			continue
		}
		open := p.sockets(proc.pid)
		st, err := p.status(proc.pid)
		if err == nil && st.root && p.rootOwned(proc.pid) && slices.Contains(open, s.Inode) && !slices.ContainsFunc(listening, func(l system.Socket) bool {
			return l.Proto == "tcp" && l.Local.Port() == s.Local.Port() && slices.Contains(open, l.Inode)
		}) {
			return p.began(proc.pid), true
		}
	}
	return 0, false
}

// parseSSHConnection parses SSH_CONNECTION (ssh(1)): the client's address and port, the
// server's address and port.
func parseSSHConnection(value string) (client, server netip.AddrPort, err error) {
	f := strings.Split(value, " ")
	if len(f) != 4 {
		return client, server, fmt.Errorf("%q: want two addresses with ports", value)
	}
	end := func(addr, port string) (netip.AddrPort, error) {
		a, err := netip.ParseAddrPort(net.JoinHostPort(addr, port))
		// The kernel's socket tables have no zones.
		return netip.AddrPortFrom(a.Addr().WithZone("").Unmap(), a.Port()), err
	}
	client, err1 := end(f[0], f[1])
	server, err2 := end(f[2], f[3])
	return client, server, errors.Join(err1, err2)
}

// lookupEnv returns a variable from the content of /proc/PID/environ.
func lookupEnv(environ []byte, name string) string {
	for len(environ) > 0 {
		var entry []byte
		entry, environ, _ = bytes.Cut(environ, []byte{0})
		if value, ok := bytes.CutPrefix(entry, []byte(name+"=")); ok {
			return string(value)
		}
	}
	return ""
}
