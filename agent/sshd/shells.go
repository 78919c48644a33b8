package sshd

import (
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Shells returns the SSH sessions in which root, or a user who may become root, has a
// login shell on a terminal. Its name has the prefix "-" if the client requested no
// command (sshd(8)). A terminal alone is no evidence: provisioning programs also request
// one for their commands.
func (p *Processes) Shells(sys *system.System, established []system.Socket) []host.Session {
	established = slices.DeleteFunc(slices.Clone(established), func(s system.Socket) bool {
		return s.Local.Addr() == s.Remote.Addr() // from this host itself, which proves nothing
	})
	servers := p.dropbears(established)
	for _, s := range established {
		if p.authenticated(s) {
			for _, pid := range p.ssh[s.Inode].pids {
				servers[pid] = server{s.Remote.Addr(), p.ssh[s.Inode].began}
			}
		}
	}
	if len(servers) == 0 {
		return nil
	}
	admins := readAdmins(sys)
	var clients []host.Session
	for _, proc := range p.list {
		st, err := p.status(proc.pid)
		if err != nil {
			continue
		}
		s, ok := servers[st.ppid]
		if !ok || !st.same || !strings.HasPrefix(p.title(proc.pid), "-") || p.stat(proc.pid, 7) == 0 {
			continue
		}
		name, may := admins.find(login{uid: st.uid})
		if !may {
			continue
		}
		if c, ok := newClient(s.remote, name+" has a shell in an SSH session from this address"); ok {
			c.Began = s.began
			clients = append(clients, c)
		}
	}
	slices.SortStableFunc(clients, func(a, b host.Session) int { return a.Addr.Compare(b.Addr) })
	return clients
}

// server is the connection of a process of an SSH server.
type server struct {
	remote netip.Addr
	began  time.Duration
}

// dropbears returns the connections of root-owned dropbear processes, by PID. dropbear has
// no titles, but starts a shell only once the peer has authenticated.
func (p *Processes) dropbears(established []system.Socket) map[int]server {
	servers := map[int]server{}
	for _, proc := range p.list {
		if !strings.HasPrefix(path.Base(proc.exe), "dropbear") || p.contained(proc.pid) {
			continue
		}
		st, err := p.status(proc.pid)
		if err != nil || !st.root || !p.rootOwned(proc.pid) {
			continue
		}
		open := p.sockets(proc.pid)
		for _, s := range established {
			if s.Proto == "tcp" && slices.Contains(open, s.Inode) {
				servers[proc.pid] = server{s.Remote.Addr(), p.began(proc.pid)}
			}
		}
	}
	return servers
}
