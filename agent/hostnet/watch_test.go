package hostnet

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// Interfaces, addresses and default routes are told of; other routes are not.
func TestWatch(t *testing.T) {
	ns := newNamespace(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	told := make(chan struct{}, 1)
	ns.must(t, func() error {
		return Watch(ctx, func() {
			select {
			case told <- struct{}{}:
			default:
			}
		})
	})
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
		{"gone", func() error { return netlink.LinkDel(veth) }, true},
	} {
		ns.must(t, tt.do)
		wait := 10 * time.Second
		if !tt.news {
			wait = 200 * time.Millisecond
		}
		select {
		case <-told:
			if !tt.news {
				t.Errorf("%s: told", tt.name)
			}
		case <-time.After(wait):
			if tt.news {
				t.Errorf("%s: nothing was told", tt.name)
			}
		}
		for quiet := false; !quiet; {
			select {
			case <-told:
			case <-time.After(200 * time.Millisecond):
				quiet = true
			}
		}
	}
}
