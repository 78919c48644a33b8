package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Links makes interfaces in one network namespace: the one that the thread was in
// which opened it. It is for namespaces of our own, not for this host's.
type Links struct{ h *netlink.Handle }

// OpenLinks opens the namespace of this thread.
func OpenLinks() (*Links, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	return &Links{h}, nil
}

// Close ends the conversation with the kernel.
func (l *Links) Close() { l.h.Close() }

// Used names an interface that is up, but for lo: somebody uses the namespace. It is
// "" where there is none. There may be some that are down, which the kernel makes
// in each (sit0, tunl0).
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

// with does something with an interface. The error has its name.
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

// AskNobody has an interface send what it sends without asking who has the address:
// to its own hardware's address, which nobody at the other end takes. It hears no
// solicited-node multicast any more.
func (l *Links) AskNobody(name string) error {
	return l.with(name, "switching off neighbour discovery on", l.h.LinkSetARPOff)
}

// Rename renames an interface; where there is none of the name it does nothing.
func (l *Links) Rename(name, to string) error {
	if _, err := l.h.LinkByName(name); err != nil {
		return nil
	}
	return l.with(name, "renaming", func(link netlink.Link) error { return l.h.LinkSetName(link, to) })
}

// AddWire makes an interface of a number, and its other end, peer, in the namespace
// that a thread is in.
func (l *Links) AddWire(name string, index int, peer string, thread int) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.Index = name, index
	if err := l.h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsPid(thread)}); err != nil {
		return fmt.Errorf("making interface %s: %w", name, err)
	}
	return nil
}

// Identity gives an interface's number and its hardware's address.
func (l *Links) Identity(name string) (index int, mac net.HardwareAddr, err error) {
	err = l.with(name, "looking for", func(link netlink.Link) error {
		index, mac = link.Attrs().Index, link.Attrs().HardwareAddr
		return nil
	})
	return index, mac, err
}

// AddAddresses gives an interface addresses of a family, which are good at once, and
// none of the kernel's own. One that it has already is no error.
func (l *Links) AddAddresses(name string, f firewall.Family, list []netip.Prefix) error {
	return l.with(name, "giving addresses to", func(link netlink.Link) error {
		if f == firewall.IPv6 {
			// Before Linux 3.17 it still gives one.
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

// AddDefaultRoute has everybody of a family be on an interface; of several, the
// lowest metric wins.
func (l *Links) AddDefaultRoute(name string, f firewall.Family, metric int) error {
	any := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if f == firewall.IPv6 {
		any = &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return l.with(name, "adding a default route to", func(link netlink.Link) error {
		return l.h.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: any, Scope: netlink.SCOPE_LINK, Priority: metric})
	})
}
