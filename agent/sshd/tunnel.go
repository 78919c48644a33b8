package sshd

import (
	"path"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Tunnel returns the VPN of this host that a session came through, or nil: a WireGuard
// interface of the kernel, or a tun or tap interface of a process that listens. tailscaled
// and zerotier-one do not count: they need no open port, because both ends send first.
func (p *Processes) Tunnel(s host.Session, listening []system.Socket) *host.Tunnel {
	name, kind := host.LinkTo(s.Addr, s.Local.Addr())
	var ports []host.Listener
	switch kind {
	case "wireguard":
		if port := host.WireGuardPort(name); port != 0 {
			ports = []host.Listener{{Proto: firewall.UDP, Port: port}}
		}
	case "tuntap":
		for _, proc := range p.list {
			mesh := slices.Contains([]string{"tailscaled", "zerotier-one"}, path.Base(proc.exe))
			if mesh || !p.servesTun(proc.pid, name) {
				continue
			}
			open := p.sockets(proc.pid)
			ports = append(ports, host.Listeners(slices.DeleteFunc(slices.Clone(listening), func(l system.Socket) bool {
				return !slices.Contains(open, l.Inode)
			}), nil)...)
		}
	}
	if len(ports) == 0 {
		return nil
	}
	return &host.Tunnel{Interface: name, Ports: ports}
}
