package host

import (
	"bytes"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Tunnel is a VPN of this host that a session came through.
type Tunnel struct {
	Interface string
	Ports     []Listener // at which its packets arrive; never empty
}

// LinkTo returns the name and kind of the interface by which this host sends from one
// of its addresses to another host, or "" if there is none.
func LinkTo(to, from netip.Addr) (name, kind string) {
	routes, err := netlink.RouteGetWithOptions(to.AsSlice(), &netlink.RouteGetOptions{SrcAddr: from.AsSlice()})
	if err != nil || len(routes) == 0 {
		return "", ""
	}
	link, err := netlink.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return "", ""
	}
	return link.Attrs().Name, link.Type()
}

// WireGuardPort returns the UDP port of a WireGuard interface of the kernel, or 0. The
// numbers are from the kernel's uapi wireguard.h.
func WireGuardPort(name string) uint16 {
	const getDevice, ifname, listenPort = 0, 2, 6
	family, err := netlink.GenlFamilyGet("wireguard")
	if err != nil {
		return 0
	}
	req := nl.NewNetlinkRequest(int(family.ID), unix.NLM_F_DUMP)
	req.AddData(&nl.Genlmsg{Command: getDevice, Version: 1})
	req.AddData(nl.NewRtAttr(ifname, nl.ZeroTerminated(name)))
	messages, err := req.Execute(unix.NETLINK_GENERIC, 0)
	if err != nil || len(messages) == 0 {
		return 0
	}
	attrs, _ := nl.ParseRouteAttr(bytes.Clone(messages[0][nl.SizeofGenlmsg:]))
	for _, a := range attrs {
		if a.Attr.Type == listenPort && len(a.Value) >= 2 {
			return nl.NativeEndian().Uint16(a.Value)
		}
	}
	return 0
}
