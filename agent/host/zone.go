package host

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// link is the properties of an interface that determine its zone.
type link struct {
	name         string
	kind         string // the library's name; "device" is hardware, real or emulated
	mac          string
	index        int
	master       int // index of the bridge, bond or VRF that it is a port of, or 0
	loopback     bool
	addresses    []netip.Prefix
	ipv4         string // firewall.Interface.IPv4, or "" for none
	defaultRoute bool   // in the main table
	otherTable   int    // another table that has a default route by this link, or 0
}

// interfaces returns the links with the zones that their properties suggest.
func interfaces(links []*link) []firewall.Interface {
	var list []firewall.Interface
	for _, l := range links {
		zone, reason := zoneOf(l, links)
		i := firewall.Interface{
			Name:         l.name,
			Zone:         zone,
			Reason:       reason,
			Addresses:    l.addresses,
			MAC:          l.mac,
			Kind:         l.kind,
			DefaultRoute: l.defaultRoute,
			IPv4:         cmp.Or(l.ipv4, firewall.NoIPv4),
			ServesGuests: zone == firewall.VirtualZone && servesGuests(l, links),
		}
		if m := masterOf(l, links); m != nil {
			i.Master = m.name
		}
		list = append(list, i)
	}
	return list
}

// noAddress is the reason for the zone of a link that has shown no evidence yet.
const noAddress = "has no address yet"

// inVRF is the reason for the zone of a member of a VRF.
func inVRF(name string) string { return "is in the VRF " + name }

// zoneOf returns a link's zone and the reason.
//
// A link without an address or other evidence is public. It is usually the uplink
// before DHCP, and services for private networks must not be open on it meanwhile.
// Link-local addresses do not count: every IPv6 link that is up has one.
func zoneOf(l *link, links []*link) (firewall.Zone, string) {
	if l.loopback {
		return firewall.LoopbackZone, "loopback"
	}
	if m := masterOf(l, links); m != nil && m.kind == "vrf" && l.kind != "vrf" {
		// The input hook sees the VRF as the interface of its members' packets.
		zone, _ := zoneOf(m, links)
		return zone, inVRF(m.name)
	}
	if l.kind == "vrf" {
		return zoneOfVRF(l, links)
	}
	if l.defaultRoute {
		return firewall.PublicZone, "has the default route"
	}
	// Policy routing: cloud providers have their second interfaces' routes in tables of
	// their own. A VPN often has a default route there that only some programs use.
	if l.otherTable != 0 && (leadsOutside(l.kind) || l.kind == "veth" || hasHardware(l, links)) {
		return firewall.PublicZone, fmt.Sprintf("has a default route in table %d", l.otherTable)
	}
	for _, p := range l.addresses {
		if isPublic(p.Addr()) {
			return firewall.PublicZone, fmt.Sprintf("has the public address %s", p.Addr())
		}
	}
	if !leadsOutside(l.kind) {
		return firewall.VirtualZone, fmt.Sprintf("is a %s", l.kind)
	}
	if a, ok := global(l.addresses); ok {
		return firewall.PrivateZone, fmt.Sprintf("has the private address %s", a)
	}
	return firewall.PublicZone, noAddress
}

// zoneOfVRF returns the zone of a VRF: that of its most exposed member.
func zoneOfVRF(vrf *link, links []*link) (firewall.Zone, string) {
	found := map[firewall.Zone]string{}
	for _, member := range links {
		if member.master == vrf.index && member.kind != "vrf" {
			alone := *member
			alone.master = 0
			zone, reason := zoneOf(&alone, links)
			found[zone] = fmt.Sprintf("is the VRF of %s, which %s", member.name, reason)
		}
	}
	for _, zone := range []firewall.Zone{firewall.PublicZone, firewall.PrivateZone} {
		if reason, ok := found[zone]; ok {
			return zone, reason
		}
	}
	return firewall.VirtualZone, "is a vrf"
}

func masterOf(l *link, links []*link) *link {
	for _, m := range links {
		if l.master != 0 && m.index == l.master && m.master != l.index {
			return m
		}
	}
	return nil
}

// leadsOutside reports whether a link of this kind leads to a network outside this
// machine without encapsulation: hardware, and links directly on it. Bridges, veth,
// tunnels and the rest are virtual.
func leadsOutside(kind string) bool {
	return slices.Contains([]string{"device", "bond", "team", "vlan", "macvlan", "macvtap", "ipvlan", "ipvtap", "ipoib",
		"hsr", "macsec", "rmnet", "wwan"}, kind)
}

// servesGuests reports whether l is a host-only bridge, as created by Docker, libvirt, LXD and
// podman. It has an address at which it serves its guests, but no port that leads outside.
func servesGuests(l *link, links []*link) bool {
	_, hasAddress := global(l.addresses)
	return l.kind == "bridge" && hasAddress && !hasHardware(l, links)
}

// hasHardware reports whether a bridge has a port that leads outside.
func hasHardware(l *link, links []*link) bool {
	return l.kind == "bridge" && slices.ContainsFunc(links, func(port *link) bool { return port.master == l.index && leadsOutside(port.kind) })
}

// global returns the first address that is not link-local, if any.
func global(addresses []netip.Prefix) (a netip.Addr, ok bool) {
	i := slices.IndexFunc(addresses, func(p netip.Prefix) bool { return !p.Addr().IsLinkLocalUnicast() })
	if i < 0 {
		return a, false
	}
	return addresses[i].Addr(), true
}
