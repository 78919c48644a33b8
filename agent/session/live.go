package session

import "github.com/basicfw/basicfw-agent/agent/system"

// SSHDListens tells whether sshd's main process was seen listening on more than
// loopback. Where it was not, as in early boot, only its configuration is known.
func (p *Processes) SSHDListens(listening []system.Socket) bool {
	for _, s := range listening {
		if s.Proto == "tcp" && !s.Local.Addr().IsLoopback() && s.Inode != 0 && p.ssh[s.Inode].listener != 0 {
			return true
		}
	}
	return false
}
