package host

import (
	"cmp"
	"net/netip"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Facts are what was found on the machine at one moment.
type Facts struct {
	Interfaces []firewall.Interface
	SSHPorts   []uint16
	SSHWhy     []string // for each of SSHPorts, its source
	SSHLive    bool     // sshd itself listens
	// Session is the SSH session that runs this command, if there is evidence for one.
	Session *Session
	// Seen are other authenticated SSH sessions of users who may become root.
	Seen      []netip.Prefix
	Listeners []Listener
	// Containers are the names of running containers, by the ports that they publish.
	Containers map[string]string
	// Instance is cloud-init's instance-id, or empty if there is none.
	Instance      string
	LoginWarnings []string // sentences about logins that may surprise the administrator
	KeptLists     []string // sentences about lists in files that cannot be used now
	Conntrack     Conntrack
	Hazards       Hazards
	// TakeOver is set if other firewalls are to be taken over.
	TakeOver bool
	// Profiles are the available ones.
	Profiles []firewall.Profile
}

// Ports returns sshd's ports.
func (f Facts) Ports() (ports []uint16, why []string, live bool, err error) {
	return f.SSHPorts, f.SSHWhy, f.SSHLive, nil
}

// SessionPort is the source of a port by which an SSH session came in. It remains one of
// sshd's ports until the detection is repeated, because there is no other evidence for it.
const SessionPort = "an SSH session that ran basicfw-agent came in by it"

// NoSSHD is the source of port 22 if no SSH server is known.
const NoSSHD = "sshd's default; there is no /etc/ssh/sshd_config"

// Session is an SSH session.
type Session struct {
	Addr netip.Addr // the peer's exact address
	// Prefix is the client's address, or the /64 of a global IPv6 address, in which
	// privacy addresses (RFC 8981) change.
	Prefix netip.Prefix
	Reason string         // the evidence
	Local  netip.AddrPort // this host's end of the connection, if known
	Tunnel *Tunnel        // the VPN of this host that it came through; nil if none
	// Began is the machine's uptime when sshd's process for the connection started;
	// zero is unknown.
	Began time.Duration
}

// Listener is a listening socket that is not only on loopback.
type Listener struct {
	Proto   firewall.Proto
	Port    uint16
	Process string // its name, or "" if unknown
}

// Listeners returns the ports with listeners that are not only on loopback, sorted
// and without duplicates. names are those of the sockets' processes, by inode.
func Listeners(sockets []system.Socket, names map[uint64]string) []Listener {
	var out []Listener
	for _, s := range sockets {
		if !s.Local.Addr().IsLoopback() {
			out = append(out, Listener{Proto: firewall.Proto(s.Proto), Port: s.Local.Port(), Process: names[s.Inode]})
		}
	}
	slices.SortFunc(out, func(a, b Listener) int {
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port, b.Port), cmp.Compare(a.Process, b.Process))
	})
	return slices.Compact(out)
}
