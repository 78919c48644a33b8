// Package hostnet is what the kernel tells about this host's network: links,
// addresses, routes, sockets, and the connections that it tracks; and it makes links
// in namespaces of our own. It is the only importer of vishvananda/netlink.
package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Host is this host's place in its networks.
type Host struct {
	Interfaces []firewall.Interface
	// Routes are the destinations that packets really leave for, default
	// routes not among them. They are of all tables: Tailscale keeps its own
	// in a table of its own.
	Routes []netip.Prefix
}

// Detect asks the kernel for the interfaces and routes of this network
// namespace. public and private are names of interfaces, where a last "*"
// stands for any rest, whose zone the owner has decided.
func Detect(public, private []string) (Host, error) {
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
			// The filter "any table" keeps the library from leaving out
			// all but the main one.
			return netlink.RouteListFiltered(family, &netlink.Route{Table: syscall.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return Host{}, fmt.Errorf("listing routes: %w", err)
		}
		routes = append(routes, r...)
	}
	return assemble(links, addrs, routes, public, private), nil
}

// retry repeats a dump that the kernel says was overtaken by a change: what it
// gave then may lack entries.
func retry[T any](dump func() (T, error)) (v T, err error) {
	for range 10 {
		if v, err = dump(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return v, err
}

// assemble puts the kernel's three lists together.
func assemble(nlLinks []netlink.Link, addrs []netlink.Addr, routes []netlink.Route, public, private []string) Host {
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
			}
		}
	}
	for _, r := range routes {
		// A blackhole or unreachable route leads nowhere, a default one too.
		dst, ok := prefixOf(r.Dst)
		if !ok || r.Type != syscall.RTN_UNICAST {
			continue
		}
		if dst.Bits() > 0 {
			host.Routes = append(host.Routes, dst.Masked())
			continue
		}
		if r.Table != syscall.RT_TABLE_MAIN {
			continue
		}
		hops := []int{r.LinkIndex}
		for _, hop := range r.MultiPath {
			hops = append(hops, hop.LinkIndex)
		}
		for _, index := range hops {
			if l := byIndex[index]; l != nil {
				l.defaultRoute = true
			}
		}
	}
	host.Interfaces = interfaces(links, public, private)
	return host
}

// prefixOf keeps the host bits: an interface has an address in a network.
func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if !ok || bits == 0 {
		return netip.Prefix{}, false
	}
	// net.IPv4zero, which the library takes for a default route's
	// destination, has 16 bytes.
	if bits == 32 {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, ones), addr.BitLen() == bits
}
