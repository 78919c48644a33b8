package firewall

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
)

// AnyPort represents every port or every protocol in a ForwardedPort.
const AnyPort = "any"

// ForwardedPort is a port at which packets get a new destination, for example a container.
type ForwardedPort struct {
	Family string `json:"family"`
	Proto  string `json:"proto"` // "tcp", or "any"
	Port   string `json:"port"`  // "80", "8000-8010", or "any"
	// On is the address of this host that is forwarded, or a network; empty if
	// all addresses are.
	On string `json:"on"`
	To string `json:"to"` // as written in the rule: "172.17.0.2:80", "[fd00::2]:8000-8010"
	By string `json:"by"` // the table and chain of the rule
	// Program is the owner of the rule, if the names reveal it.
	Program string `json:"program"`
	// Container is the name of the container that publishes the port, if it is known.
	Container string `json:"container,omitempty"`
	// Local is set if the new destination is this host: INPUT decides about the packets.
	Local bool `json:"local,omitempty"`
	// Held is set if the settings decide who reaches the port from public interfaces, and
	// Closed if nobody does.
	Held   bool `json:"held,omitempty"`
	Closed bool `json:"closed,omitempty"`
}

// Span returns the port range, which is all ports for AnyPort.
func (b ForwardedPort) Span() PortRange {
	first, last, isRange := strings.Cut(b.Port, "-")
	if !isRange {
		last = first
	}
	f, errF := strconv.ParseUint(first, 10, 16)
	l, errL := strconv.ParseUint(last, 10, 16)
	if errF != nil || errL != nil {
		return PortRange{1, 65535}
	}
	return PortRange{uint16(f), uint16(l)}
}

// programs lists programs that write DNAT rules, by the prefixes of their table and
// chain names.
var programs = []struct{ prefix, name string }{
	{"DOCKER", "Docker"}, {"docker-bridges", "Docker"}, // the iptables and the nftables backend
	{"NETAVARK", "podman"}, {"netavark", "podman"},
	{"CNI-", "CNI"},
	{"KUBE-", "kube-proxy"}, {"kube-proxy", "kube-proxy"},
	{"LIBVIRT_", "libvirt"}, {"libvirt_", "libvirt"},
	{"lxd", "LXD"}, {"generated for LXD", "LXD"}, // a table, and comments in iptables
	{"incus", "Incus"}, {"generated for Incus", "Incus"},
}

// ProgramOf returns the program that wrote a rule, judging by the names of its table
// and chain and by its comment, or "" if it is not known.
func ProgramOf(names ...string) string {
	for _, name := range slices.Backward(names) {
		for _, p := range programs {
			if strings.HasPrefix(name, p.prefix) {
				return p.name
			}
		}
	}
	return ""
}

// ProtoName returns the name of a protocol that has ports or is one of ours;
// otherwise its number.
func ProtoName(number uint8) string {
	names := map[uint8]Proto{1: ICMP, 6: TCP, 17: UDP, 58: ICMPv6, 132: SCTP}
	return cmp.Or(string(names[number]), strconv.Itoa(int(number)))
}
