package agent

import (
	"net/netip"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Facts are what was found on the machine at one moment.
type Facts struct {
	Interfaces []firewall.Interface
	SSHPorts   []uint16
	SSHWhy     []string // for each of SSHPorts, where it comes from
	SSHLive    bool     // sshd itself was seen listening
	// Session is where the SSH session that runs this command comes from, if
	// one does and there is evidence for it.
	Session *Session
	// Seen are other authenticated SSH sessions of people who may become root.
	Seen      []netip.Prefix
	Listeners []Listener
	// Forwarded are ports that go past INPUT by rules that are not iptables'.
	Forwarded []firewall.Bypass
	// Instance is cloud-init's instance-id; empty where there is none.
	Instance  string
	Surprises []string // sentences about what would surprise the owner
	Conntrack ConntrackUse
	// Closing are chains of nf_tables that close what they do not name.
	Closing []string
	// TakeOver is set where other firewalls are to be taken over.
	TakeOver bool
	// Profiles are those that could be chosen.
	Profiles []firewall.Profile
}

// Ports gives what was found of sshd.
func (f Facts) Ports() (ports []uint16, why []string, live bool, err error) {
	return f.SSHPorts, f.SSHWhy, f.SSHLive, nil
}

// Session is an SSH session.
type Session struct {
	Client netip.Prefix // an IPv4 address, an IPv6 /64, or a private IPv6 address
	From   netip.Addr   // the very address
	Reason string
	// Began is how long the machine had been up when the session began; zero is
	// not known.
	Began time.Duration
}

// Listener is a socket that waits for peers on more than loopback.
type Listener struct {
	Proto   firewall.Proto
	Port    uint16
	Process string // its name, or "" where that cannot be known
}

// ConntrackUse is how full the kernel's table of connections is. Zero is
// unknown.
type ConntrackUse struct {
	Count int `json:"count"`
	Max   int `json:"max"`
}
