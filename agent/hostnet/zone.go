package hostnet

import (
	"fmt"
	"net/netip"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// link is what an interface's zone is decided from.
type link struct {
	name         string
	kind         string // as the library calls it; "device" is hardware, or what passes for it
	mac          string
	index        int
	master       int // the bridge or bond that it is a port of, or 0
	loopback     bool
	addresses    []netip.Prefix
	defaultRoute bool
}

// interfaces decides each link's zone.
func interfaces(links []*link, public, private []string) []firewall.Interface {
	var list []firewall.Interface
	for _, l := range links {
		zone, reason := zoneOf(l, links, public, private)
		list = append(list, firewall.Interface{
			Name:         l.name,
			Zone:         zone,
			Reason:       reason,
			Addresses:    l.addresses,
			MAC:          l.mac,
			Kind:         l.kind,
			DefaultRoute: l.defaultRoute,
			ServesGuests: zone == firewall.VirtualZone && servesGuests(l, links),
		})
	}
	return list
}

// zoneOf says what kind of network a link leads to, and why.
//
// A link without any address yet, and with nothing else that tells, is public:
// it is most often the uplink before DHCP, and what is only for private
// networks must not be open on it in the meantime. A link-local address is
// none: every IPv6 link that is up has one.
func zoneOf(l *link, links []*link, public, private []string) (firewall.Zone, string) {
	if l.loopback {
		return firewall.LoopbackZone, "loopback"
	}
	if zone, reason := forcedZone(l.name, public, private); zone != "" {
		return zone, reason
	}
	if l.defaultRoute {
		return firewall.PublicZone, "has the default route"
	}
	for _, p := range l.addresses {
		if isPublic(p.Addr()) {
			return firewall.PublicZone, fmt.Sprintf("has the public address %s", p.Addr())
		}
	}
	if !leadsOutside(l.kind) {
		return firewall.VirtualZone, fmt.Sprintf("is a %s", l.kind)
	}
	for _, p := range l.addresses {
		if !p.Addr().IsLinkLocalUnicast() {
			return firewall.PrivateZone, fmt.Sprintf("has the private address %s", p.Addr())
		}
	}
	if m := masterOf(l, links); m != nil {
		// The packets of a port arrive on its master.
		zone, _ := zoneOf(m, links, public, private)
		return zone, fmt.Sprintf("is a port of %s", m.name)
	}
	return firewall.PublicZone, "has no address yet"
}

// forcedZone is what the settings say of a name: the exact name before one
// with a "*", and then public, where less is open, before private.
func forcedZone(name string, public, private []string) (firewall.Zone, string) {
	for _, exact := range []bool{true, false} {
		for _, z := range []struct {
			zone     firewall.Zone
			patterns []string
		}{{firewall.PublicZone, public}, {firewall.PrivateZone, private}} {
			for _, p := range z.patterns {
				if firewall.MatchInterface(p, name) && (p == name) == exact {
					return z.zone, fmt.Sprintf("the settings say %s = %s", z.zone, p)
				}
			}
		}
	}
	return "", ""
}

func masterOf(l *link, links []*link) *link {
	for _, m := range links {
		if l.master != 0 && m.index == l.master && m.master != l.index {
			return m
		}
	}
	return nil
}

// leadsOutside tells whether a link of this kind leads to a network outside
// this machine without wrapping its packets: hardware, and what is built
// right on it. Bridges, veth, tunnels and the rest are virtual.
func leadsOutside(kind string) bool {
	switch kind {
	case "device", "bond", "team", "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "ipoib", "hsr", "macsec", "rmnet", "wwan":
		return true
	}
	return false
}

// servesGuests tells whether l is a bridge of this host's own, of the kind
// that Docker, libvirt, LXD and podman make: with an address for its guests to
// ask, and without a port that leads outside.
func servesGuests(l *link, links []*link) bool {
	if l.kind != "bridge" {
		return false
	}
	for _, port := range links {
		if port.master == l.index && leadsOutside(port.kind) {
			return false
		}
	}
	for _, p := range l.addresses {
		if !p.Addr().IsLinkLocalUnicast() {
			return true
		}
	}
	return false
}
