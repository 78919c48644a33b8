package session

import (
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Shells finds the SSH sessions in which root, or somebody who may become root,
// has a shell at a terminal. sshd runs it with a "-" before its name where the
// client asked for no command (sshd(8)). A terminal alone says little: programs
// that set up machines ask for one too, to run their commands in it.
func (p *Processes) Shells(sys *system.System, established []system.Socket) []Client {
	servers := map[int]system.Socket{} // processes of sshd's, by connection
	for _, s := range established {
		if s.Proto != "tcp" || !p.authenticated(s) {
			continue
		}
		for _, pid := range p.ssh[s.Inode].pids {
			servers[pid] = s
		}
	}
	if len(servers) == 0 {
		return nil
	}
	admins := readAdmins(sys)
	var clients []Client
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
		if c, ok := newClient(s.Remote.Addr(), name+" has a shell there"); ok {
			c.Began = p.ssh[s.Inode].began
			clients = append(clients, c)
		}
	}
	slices.SortStableFunc(clients, func(a, b Client) int { return a.Addr.Compare(b.Addr) })
	return clients
}
