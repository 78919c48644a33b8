package host

import (
	"bufio"
	"bytes"
	"net/netip"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Exempt is a network that no list of blocked networks may contain.
type Exempt struct {
	netip.Prefix
	Why string // "is ..."
	// Soft ones can be blocked if the administrator insists.
	Soft bool
}

// Exempt returns the networks that are never blocked: those that are never sources
// from outside, and those that this host's own network needs.
func (h Host) Exempt(sys *system.System) (out []Exempt) {
	add := func(p netip.Prefix, why string, soft bool) { out = append(out, Exempt{p.Masked(), why, soft}) }
	for _, r := range []struct{ network, why string }{
		{"0.0.0.0/32", "is the unspecified address"}, {"::/128", "is the unspecified address"},
		{"127.0.0.0/8", "is loopback"}, {"::1/128", "is loopback"},
		{"169.254.0.0/16", "is link-local"}, {"fe80::/10", "is link-local"},
		{"224.0.0.0/4", "is multicast"}, {"ff00::/8", "is multicast"}, {"255.255.255.255/32", "is the broadcast address"},
	} {
		add(netip.MustParsePrefix(r.network), r.why, false)
	}
	single := func(a netip.Addr, why string) { add(netip.PrefixFrom(a, a.BitLen()), why, false) }
	for _, a := range h.Gateways {
		single(a, "is a gateway of this host")
	}
	for _, a := range Resolvers(sys) {
		single(a, "is a DNS resolver of this host")
	}
	for _, i := range h.Interfaces {
		for _, p := range i.Addresses {
			single(p.Addr().WithZone(""), "is an address of this host")
			add(p, "is a network of this host", true)
		}
	}
	return out
}

// Resolvers returns the DNS servers in resolv.conf, and those that systemd-resolved asks.
func Resolvers(sys *system.System) (out []netip.Addr) {
	for _, path := range []string{"/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"} {
		data, err := sys.ReadLimited(path, 64<<10)
		if err != nil {
			continue
		}
		lines := bufio.NewScanner(bytes.NewReader(data))
		for lines.Scan() {
			words := strings.Fields(lines.Text())
			if len(words) < 2 || words[0] != "nameserver" {
				continue
			}
			if a, err := netip.ParseAddr(words[1]); err == nil {
				out = append(out, a.Unmap().WithZone(""))
			}
		}
	}
	return out
}

// Contradicts returns the first exempt network that contains all of p.
func Contradicts(list []Exempt, p netip.Prefix) (Exempt, bool) {
	for _, e := range list {
		if firewall.FamilyOf(e.Prefix) == firewall.FamilyOf(p) && e.Bits() <= p.Bits() && e.Contains(p.Addr()) {
			return e, true
		}
	}
	return Exempt{}, false
}
