package host

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// privateBlocks returns the ranges that the internet does not route: RFC 1918,
// carrier NAT (RFC 6598) and unique local addresses (RFC 4193). Documentation ranges
// count as public, because they represent public ones.
func privateBlocks() []netip.Prefix {
	return []netip.Prefix{
		netip.MustParsePrefix("10.0.0.0/8"),
		netip.MustParsePrefix("172.16.0.0/12"),
		netip.MustParsePrefix("192.168.0.0/16"),
		netip.MustParsePrefix("100.64.0.0/10"),
		netip.MustParsePrefix("fc00::/7"),
	}
}

// inPrivateBlock reports whether all of p is in one private range.
func inPrivateBlock(p netip.Prefix) bool {
	return slices.ContainsFunc(privateBlocks(), func(b netip.Prefix) bool { return b.Bits() <= p.Bits() && b.Contains(p.Addr()) })
}

// isPublic reports whether a is a global unicast address outside the private ranges.
func isPublic(a netip.Addr) bool {
	return a.IsGlobalUnicast() && !inPrivateBlock(netip.PrefixFrom(a, a.BitLen()))
}

// Reaches reports whether a network or a route of this host leads to p or a part of
// it. A default route does not count. Neither does a route wider than p's private
// range, such as the two halves of the internet that some VPNs install.
func (h Host) Reaches(p netip.Prefix) bool {
	return h.hasAddress(p.Overlaps) || slices.ContainsFunc(h.Routes, func(r netip.Prefix) bool {
		return r.Overlaps(p) && (inPrivateBlock(r) || !inPrivateBlock(p))
	})
}

func (h Host) hasAddress(is func(netip.Prefix) bool) bool {
	return slices.ContainsFunc(h.Interfaces, func(i firewall.Interface) bool { return slices.ContainsFunc(i.Addresses, is) })
}

// Has reports whether an address is one of this host's.
func (h Host) Has(addr netip.Addr) bool {
	return h.hasAddress(func(a netip.Prefix) bool { return a.Addr() == addr })
}

// CheckNamed checks a client that the administrator has named. An address of this
// host is an error. So is a private address that this host cannot reach, which is
// probably the client's address in its office network. The latter is only a warning
// if this host has no public address: clients may come through a network that it does
// not know. An address that may change is also a warning.
func (h Host) CheckNamed(p netip.Prefix) (warning string, err error) {
	who := firewall.FormatPrefix(p)
	switch {
	case p.IsSingleIP() && h.Has(p.Addr()):
		return "", fmt.Errorf("client %s: address of this host: want the address that the client connects from", who)
	case !inPrivateBlock(p), h.Reaches(p):
		return firewall.TemporaryHint(p), nil
	}
	// On several clouds no interface has a public address: the provider uses NAT.
	if h.hasAddress(func(a netip.Prefix) bool { return isPublic(a.Addr()) }) {
		return "", fmt.Errorf("client %s: private address to which this host has no network or route: "+
			"want the public address of the client's network", who)
	}
	return fmt.Sprintf("client %s: private address to which this host has only a default route; "+
		"check that this host sees the client with this address", who), nil
}

// CheckAllNamed is CheckNamed for several clients. It passes warnings to warn.
func (h Host) CheckAllNamed(list []netip.Prefix, warn func(...any)) error {
	for _, p := range list {
		warning, err := h.CheckNamed(p)
		if err != nil {
			return err
		}
		if warning != "" {
			warn(warning)
		}
	}
	return nil
}
