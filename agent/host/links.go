package host

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Links creates and changes interfaces in the network namespace of the thread that
// opened it. It is for our own namespaces, not for the host's.
type Links struct{ h *netlink.Handle }

// OpenLinks returns the Links of this thread's namespace.
func OpenLinks() (*Links, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	return &Links{h}, nil
}

// Close closes the netlink socket.
func (l *Links) Close() { l.h.Close() }

// Used returns the name of an interface other than lo that is up, as evidence that
// the namespace is in use, or "". Interfaces that are down do not count: the kernel
// creates some in each namespace (sit0, tunl0).
func (l *Links) Used() (string, error) {
	links, err := l.h.LinkList()
	if err != nil {
		return "", fmt.Errorf("listing interfaces: %w", err)
	}
	for _, link := range links {
		if a := link.Attrs(); a.Flags&net.FlagUp != 0 && a.Flags&net.FlagLoopback == 0 {
			return a.Name, nil
		}
	}
	return "", nil
}

// with calls do with an interface. The error contains its name.
func (l *Links) with(name, what string, do func(netlink.Link) error) error {
	link, err := l.h.LinkByName(name)
	if err == nil {
		err = do(link)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", what, name, err)
	}
	return nil
}

// Raise sets an interface up.
func (l *Links) Raise(name string) error { return l.with(name, "raising", l.h.LinkSetUp) }

// DisableARP switches off an interface's address resolution: it sends to its own MAC
// address, which the peer does not accept. It also leaves solicited-node multicast.
func (l *Links) DisableARP(name string) error {
	return l.with(name, "switching off neighbour discovery on", l.h.LinkSetARPOff)
}

// Rename renames an interface, and does nothing if it does not exist.
func (l *Links) Rename(name, to string) error {
	if _, err := l.h.LinkByName(name); err != nil {
		return nil
	}
	return l.with(name, "renaming", func(link netlink.Link) error { return l.h.LinkSetName(link, to) })
}

// AddWire creates a veth interface with this index, and its peer in the namespace of
// a thread.
func (l *Links) AddWire(name string, index int, peer string, thread int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = name, index
	if err := l.h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsPid(thread)}); err != nil {
		return fmt.Errorf("creating interface %s: %w", name, err)
	}
	return nil
}

// Identity returns an interface's index and MAC address.
func (l *Links) Identity(name string) (index int, mac net.HardwareAddr, err error) {
	err = l.with(name, "looking for", func(link netlink.Link) error {
		index, mac = link.Attrs().Index, link.Attrs().HardwareAddr
		return nil
	})
	return index, mac, err
}

// AddAddresses adds a family's addresses of list to an interface, without duplicate
// address detection or automatic addresses. An existing address is no error.
func (l *Links) AddAddresses(name string, f firewall.Family, list []netip.Prefix) error {
	return l.with(name, "adding addresses to", func(link netlink.Link) error {
		if f == firewall.IPv6 {
			// Before Linux 3.17 the kernel adds one nevertheless.
			l.h.LinkSetIP6AddrGenMode(link, 1) // IN6_ADDR_GEN_MODE_NONE
		}
		for _, p := range list {
			if firewall.FamilyOf(p) != f {
				continue
			}
			a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}}
			if f == firewall.IPv6 {
				a.Flags = unix.IFA_F_NODAD
			}
			if err := l.h.AddrAdd(link, a); err != nil && !errors.Is(err, unix.EEXIST) {
				return fmt.Errorf("adding %v: %w", p, err)
			}
		}
		return nil
	})
}

// AddDefaultRoute adds a default route without a gateway to an interface; the lowest
// metric wins.
func (l *Links) AddDefaultRoute(name string, f firewall.Family, metric int) error {
	any := firewall.ByFamily(f, &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)},
		&net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)})
	return l.with(name, "adding a default route to", func(link netlink.Link) error {
		return l.h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: any, Scope: netlink.SCOPE_LINK, Priority: metric})
	})
}
