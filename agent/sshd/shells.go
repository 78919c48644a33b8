package sshd

import (
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Shells returns the SSH sessions in which root, or a user who may become root, has a
// login shell on a terminal. Its name has the prefix "-" if the client requested no
// command (sshd(8)). A terminal alone is no evidence: provisioning programs also request
// one for their commands.
func (p *Processes) Shells(sys *system.System, established []system.Socket) []host.Session {
	servers := map[int]system.Socket{} // connections of sshd processes, by PID
	for _, s := range established {
		if p.authenticated(s) {
			for _, pid := range p.ssh[s.Inode].pids {
				servers[pid] = s
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
		if c, ok := newClient(s.Remote.Addr(), name+" has a shell in an SSH session from this address"); ok {
			c.Began = p.ssh[s.Inode].began
			clients = append(clients, c)
		}
	}
	slices.SortStableFunc(clients, func(a, b host.Session) int { return a.Addr.Compare(b.Addr) })
	return clients
}
