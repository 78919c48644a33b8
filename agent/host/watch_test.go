package host

import (
	"context"
	"net"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// Changes of interfaces, addresses and default routes are reported, of other routes not.
func TestWatch(t *testing.T) {
	ns := newNamespace(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	news := lab.NewNews()
	ns.must(t, func() error { return Watch(ctx, news.Tell) })
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "d0"}, PeerName: "d1"}
	route := func(cidr string) error {
		_, dst, err := net.ParseCIDR(cidr)
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: veth.Index, Dst: dst, Gw: net.IPv4(192, 0, 2, 2)})
	}
	for _, tt := range []struct {
		name string
		do   func() error
		news bool
	}{
		{"a link", func() error { return netlink.LinkAdd(veth) }, true},
		{"up", func() error { return netlink.LinkSetUp(veth) }, true},
		{"an address", func() error {
			a, err := netlink.ParseAddr("192.0.2.1/24")
			if err != nil {
				return err
			}
			return netlink.AddrAdd(veth, a)
		}, true},
		{"a route", func() error { return route("198.51.100.0/24") }, false},
		{"a default route", func() error { return route("0.0.0.0/0") }, true},
		{"link removed", func() error { return netlink.LinkDel(veth) }, true},
	} {
		ns.must(t, tt.do)
		news.Want(t, tt.name, tt.news)
	}
}
