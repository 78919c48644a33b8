// Package host reads this host's network from the kernel: links, addresses, routes,
// sockets and the conntrack table. It also creates links in our own namespaces. It is
// the only importer of vishvananda/netlink.
package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Host is this host's interfaces and routes.
type Host struct {
	Interfaces []firewall.Interface
	// Routes are the destinations of unicast routes except default routes, from all
	// tables: Tailscale has its own table.
	Routes []netip.Prefix
	// Gateways are the next hops of all routes.
	Gateways []netip.Addr
}

// Detect returns the interfaces and routes of this network namespace. The zones are
// those that the interfaces' properties suggest: [Settle] returns the zones in effect.
func Detect() (Host, error) {
	links, err := retry(netlink.LinkList)
	if err != nil {
		return Host{}, fmt.Errorf("listing network interfaces: %w", err)
	}
	addrs, err := retry(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return Host{}, fmt.Errorf("listing addresses: %w", err)
	}
	var routes []netlink.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		r, err := retry(func() ([]netlink.Route, error) {
			// Without the filter "any table" the library lists only the main one.
			return netlink.RouteListFiltered(family, &netlink.Route{Table: syscall.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return Host{}, fmt.Errorf("listing routes: %w", err)
		}
		routes = append(routes, r...)
	}
	return assemble(links, addrs, routes), nil
}

// retry repeats a dump that a change has interrupted, because entries may be missing.
func retry[T any](dump func() (T, error)) (v T, err error) {
	for range 10 {
		if v, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return v, err
}

// assemble combines the kernel's three lists.
func assemble(nlLinks []netlink.Link, addrs []netlink.Addr, routes []netlink.Route) Host {
	var host Host
	byIndex := map[int]*link{}
	var links []*link
	for _, nlLink := range nlLinks {
		a := nlLink.Attrs()
		l := &link{
			name:     a.Name,
			kind:     nlLink.Type(),
			mac:      a.HardwareAddr.String(),
			index:    a.Index,
			master:   a.MasterIndex,
			loopback: a.Flags&net.FlagLoopback != 0,
		}
		links = append(links, l)
		byIndex[l.index] = l
	}
	for _, a := range addrs {
		if l := byIndex[a.LinkIndex]; l != nil {
			if p, ok := prefixOf(a.IPNet); ok {
				l.addresses = append(l.addresses, p)
				switch {
				case p.Addr().Is6() || p.Addr().IsLinkLocalUnicast():
				case a.Flags&syscall.IFA_F_PERMANENT == 0:
					l.ipv4 = firewall.Leased
				case l.ipv4 == "":
					l.ipv4 = firewall.Permanent
				}
			}
		}
	}
	for _, r := range routes {
		// A blackhole or unreachable route leads nowhere, even if it is the default.
		dst, ok := prefixOf(r.Dst)
		if !ok || r.Type != syscall.RTN_UNICAST {
			continue
		}
		for _, hop := range append([]*netlink.NexthopInfo{{Gw: r.Gw}}, r.MultiPath...) {
			if gw, ok := netip.AddrFromSlice(hop.Gw); ok && !slices.Contains(host.Gateways, gw.Unmap()) {
				host.Gateways = append(host.Gateways, gw.Unmap())
			}
		}
		if dst.Bits() > 0 {
			host.Routes = append(host.Routes, dst.Masked())
			continue
		}
		hops := []int{r.LinkIndex}
		for _, hop := range r.MultiPath {
			hops = append(hops, hop.LinkIndex)
		}
		for _, index := range hops {
			if l := byIndex[index]; l != nil && r.Table == syscall.RT_TABLE_MAIN {
				l.defaultRoute = true
			} else if l != nil {
				l.otherTable = r.Table
			}
		}
	}
	host.Interfaces = interfaces(links)
	return host
}

// prefixOf keeps the host bits, which are the interface's address.
func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}, false
	}
	// net.IPv4zero, the library's destination of a default route, has 16 bytes.
	if bits == 32 {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, ones), addr.BitLen() == bits
}
