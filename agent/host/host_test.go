package host

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// detect calls Detect inside a namespace, and also returns its interfaces by name.
func (ns *namespace) detect(t *testing.T, n Naming) (Host, map[string]firewall.Interface) {
	t.Helper()
	var host Host
	ns.must(t, func() (err error) { host, err = Detect(); return err })
	byName := map[string]firewall.Interface{}
	host.Interfaces, _ = Settle(host.Interfaces, n, nil)
	for _, i := range host.Interfaces {
		byName[i.Name] = i
	}
	return host, byName
}

func (ns *namespace) route(t *testing.T, r netlink.Route) {
	t.Helper()
	ns.must(t, func() error { return netlink.RouteAdd(&r) })
}

func cidr(s string) *net.IPNet {
	_, n, err := net.ParseCIDR(s)
	if err != nil {
		panic(err)
	}
	return n
}

func TestDetect(t *testing.T) {
	host, peer := newNamespace(t), newNamespace(t)
	host.join(t, peer)
	host.add(t, &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "docker0"}})
	host.up(t, "docker0", "172.17.0.1/16")
	host.add(t, &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "veth1", MasterIndex: host.index(t, "docker0")}, PeerName: "veth2"})
	host.up(t, "veth1")
	host.add(t, &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "mac0", ParentIndex: host.index(t, "eth0")}})
	host.up(t, "mac0", "10.7.0.1/24")
	host.add(t, &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tun0"}, Mode: netlink.TUNTAP_MODE_TUN, NonPersist: false})
	host.up(t, "tun0", "100.101.102.103/32")
	tun := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Index: host.index(t, "tun0")}}
	host.must(t, func() error { // as a lease
		a := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(100, 101, 102, 104), Mask: net.CIDRMask(32, 32)}, ValidLft: 3600, PreferedLft: 3600}
		return netlink.AddrAdd(tun, a)
	})
	host.route(t, netlink.Route{Dst: cidr("0.0.0.0/0"), Gw: net.ParseIP("192.0.2.2")})
	host.route(t, netlink.Route{Dst: cidr("::/0"), Gw: net.ParseIP("2001:db8::2")})
	host.route(t, netlink.Route{Dst: cidr("10.99.0.0/16"), Type: syscall.RTN_BLACKHOLE})
	// As Tailscale does: its own table, with a default route if there is an exit node.
	host.route(t, netlink.Route{Dst: cidr("100.77.0.0/16"), LinkIndex: host.index(t, "tun0"), Table: 52})
	host.route(t, netlink.Route{Dst: cidr("0.0.0.0/0"), LinkIndex: host.index(t, "tun0"), Table: 52})

	// As cloud providers do for a second uplink.
	host.add(t, &netlink.Macvlan{LinkAttrs: netlink.LinkAttrs{Name: "mac1", ParentIndex: host.index(t, "eth0")}})
	host.up(t, "mac1", "172.31.16.10/20")
	host.route(t, netlink.Route{Dst: cidr("0.0.0.0/0"), LinkIndex: host.index(t, "mac1"), Table: 10001})

	got, byName := host.detect(t, Naming{})
	want := map[string]firewall.Interface{
		"lo":      {Zone: firewall.LoopbackZone, Kind: "device", IPv4: firewall.Permanent, Addresses: addresses("127.0.0.1/8", "::1/128")},
		"eth0":    {Zone: firewall.PublicZone, Kind: "veth", IPv4: firewall.Permanent, Addresses: addresses("192.0.2.1/24", "2001:db8::1/64"), DefaultRoute: true},
		"docker0": {Zone: firewall.VirtualZone, Kind: "bridge", IPv4: firewall.Permanent, Addresses: addresses("172.17.0.1/16"), ServesGuests: true},
		"veth1":   {Zone: firewall.VirtualZone, Kind: "veth", IPv4: firewall.NoIPv4},
		"veth2":   {Zone: firewall.VirtualZone, Kind: "veth", IPv4: firewall.NoIPv4},
		"mac0":    {Zone: firewall.PrivateZone, Kind: "macvlan", IPv4: firewall.Permanent, Addresses: addresses("10.7.0.1/24")},
		"mac1":    {Zone: firewall.PublicZone, Kind: "macvlan", IPv4: firewall.Permanent, Addresses: addresses("172.31.16.10/20")},
		"tun0":    {Zone: firewall.VirtualZone, Kind: "tuntap", IPv4: firewall.Leased, Addresses: addresses("100.101.102.103/32", "100.101.102.104/32")},
	}
	for name, w := range want {
		g, ok := byName[name]
		if !ok {
			t.Errorf("%s is missing", name)
			continue
		}
		g.Addresses = slices.DeleteFunc(g.Addresses, func(p netip.Prefix) bool { return p.Addr().IsLinkLocalUnicast() })
		if g.Zone != w.Zone || g.Kind != w.Kind || g.DefaultRoute != w.DefaultRoute || g.ServesGuests != w.ServesGuests || !slices.Equal(g.Addresses, w.Addresses) {
			t.Errorf("%s:\n got %+v\nwant %+v", name, g, w)
		}
	}
	if m := byName["eth0"].MAC; len(m) != len("00:00:00:00:00:00") {
		t.Errorf("eth0's MAC is %q", m)
	}
	for client, reached := range map[string]bool{
		"100.77.1.2/32": true,  // in a separate table
		"10.7.0.9/32":   true,  // on the macvlan
		"10.99.0.1/32":  false, // blackhole
		"10.55.0.1/32":  false, // by the default routes only
	} {
		if got.Reaches(netip.MustParsePrefix(client)) != reached {
			t.Errorf("Reaches(%s) is not %t; routes %v", client, reached, got.Routes)
		}
	}
	for _, r := range got.Routes {
		if r.Bits() == 0 {
			t.Errorf("a default route among the routes: %v", got.Routes)
		}
	}

	_, byName = host.detect(t, Naming{Private: []string{"eth0*"}})
	if z := byName["eth0"].Zone; z != firewall.PrivateZone {
		t.Errorf("eth0 is %s, want private as in the settings", z)
	}
}

func TestMultipathDefaultRoute(t *testing.T) {
	ns := newNamespace(t)
	var hops []*netlink.NexthopInfo
	for i, name := range []string{"up0", "up1", "other"} {
		ns.add(t, &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: "far" + name})
		ns.up(t, "far"+name) // gives the near end a carrier
		ns.up(t, name, netip.AddrFrom4([4]byte{10, byte(i), 0, 1}).String()+"/24")
		if name != "other" {
			hops = append(hops, &netlink.NexthopInfo{LinkIndex: ns.index(t, name)})
		}
	}
	ns.route(t, netlink.Route{Dst: cidr("0.0.0.0/0"), MultiPath: hops})
	_, byName := ns.detect(t, Naming{})
	for name, want := range map[string]bool{"up0": true, "up1": true, "other": false} {
		if got := byName[name].DefaultRoute; got != want {
			t.Errorf("%s: default route %t, want %t", name, got, want)
		}
	}
}

func TestBlackholeIsNotDefaultRoute(t *testing.T) {
	ns := newNamespace(t)
	ns.route(t, netlink.Route{Dst: cidr("0.0.0.0/0"), Type: syscall.RTN_BLACKHOLE})
	ns.route(t, netlink.Route{Dst: cidr("::/0"), Type: syscall.RTN_UNREACHABLE})
	host, byName := ns.detect(t, Naming{})
	if byName["lo"].DefaultRoute {
		t.Error("lo has a default route")
	}
	if len(host.Routes) != 0 {
		t.Errorf("routes %v", host.Routes)
	}
}

func TestRetry(t *testing.T) {
	for _, tt := range []struct {
		name        string
		interrupted int
		calls       int
		err         error
	}{
		{"at once", 0, 1, nil},
		{"the third time", 2, 3, nil},
		{"never", 1000, 10, netlink.ErrDumpInterrupted},
	} {
		t.Run(tt.name, func(t *testing.T) {
			calls := 0
			got, err := retry(func() (string, error) {
				calls++
				if calls <= tt.interrupted {
					return "partial", netlink.ErrDumpInterrupted
				}
				return "whole", nil
			})
			if calls != tt.calls || !errors.Is(err, tt.err) || err == nil && got != "whole" {
				t.Errorf("%d calls returned %q, %v", calls, got, err)
			}
		})
	}
	calls := 0
	if _, err := retry(func() (int, error) { calls++; return 0, syscall.EPERM }); !errors.Is(err, syscall.EPERM) || calls != 1 {
		t.Errorf("%d calls returned %v, want EPERM at once", calls, err)
	}
}

func TestHasIPv6(t *testing.T) {
	ns := newNamespace(t)
	ns.do(func() {
		if !HasIPv6() {
			t.Error("no IPv6 on a kernel that has it")
		}
	})
	if hasIPv6("/proc", syscall.EAFNOSUPPORT) {
		t.Error("IPv6 on a kernel without its sockets")
	}
	if hasIPv6(t.TempDir(), syscall.EPERM) {
		t.Error("IPv6 without sockets or files in /proc")
	}
}

func BenchmarkDetect(b *testing.B) {
	for range b.N {
		if _, err := Detect(); err != nil {
			b.Fatal(err)
		}
	}
}
