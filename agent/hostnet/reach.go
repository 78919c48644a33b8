package hostnet

import (
	"fmt"
	"net/netip"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// privateBlocks are the ranges that the internet does not route: RFC 1918,
// carrier NAT (RFC 6598) and unique local addresses (RFC 4193). Ranges for
// documentation count as public: they stand for public ones.
func privateBlocks() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"),
		netip.MustParsePrefix("172.16.0.0/12"),
		netip.MustParsePrefix("192.168.0.0/16"),
		netip.MustParsePrefix("100.64.0.0/10"),
		netip.MustParsePrefix("fc00::/7"),
	}
}

// inPrivateBlock tells whether all of p is in one private range.
func inPrivateBlock(p netip.Prefix) bool {
	for _, b := range privateBlocks() {
		if b.Bits() <= p.Bits() && b.Contains(p.Addr()) {
			return true
		}
	}
	return false
}

// isPublic tells whether a is a global unicast address outside the private
// ranges.
func isPublic(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !inPrivateBlock(netip.PrefixFrom(a, a.BitLen()))
}

// Reaches tells whether p, or a part of it, is on a network of this host or
// routed to by more than the default route. A route wider than the private
// range that p is in, such as the two halves of the internet that some VPNs
// install, says no more of p than a default route does.
func (h Host) Reaches(p netip.Prefix) bool {
	for _, i := range h.Interfaces {
		for _, a := range i.Addresses {
			if a.Overlaps(p) {
				return true
			}
		}
	}
	for _, r := range h.Routes {
		if r.Overlaps(p) && (inPrivateBlock(r) || !inPrivateBlock(p)) {
			return true
		}
	}
	return false
}

// HasPublicAddress tells whether any interface has an address that the
// internet routes. On several clouds none has: the provider translates.
func (h Host) HasPublicAddress() bool {
	for _, i := range h.Interfaces {
		for _, a := range i.Addresses {
			if isPublic(a.Addr()) {
				return true
			}
		}
	}
	return false
}

// CheckNamed judges a client that the owner has named. A private address that
// this host cannot reach is most likely the client's own in its office
// network, not the one that this host will see. Then err says so or, where
// this host has no public address either and may well be reached through a
// network that it does not know, warning does.
func (h Host) CheckNamed(p netip.Prefix) (warning string, err error) {
	if !inPrivateBlock(p) || h.Reaches(p) {
		return "", nil
	}
	who := firewall.FormatPrefix(p)
	if h.HasPublicAddress() {
		return "", fmt.Errorf("client %s is a private address that no network or route of this host leads to: "+
			"name the address that this host sees, the public one of the client's network", who)
	}
	return fmt.Sprintf("client %s is a private address, and only the default route of this host may lead to it: "+
		"make sure that it is the address which this host sees", who), nil
}
