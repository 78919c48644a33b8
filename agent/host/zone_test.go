package host

import (
	"net/netip"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

func addresses(cidrs ...string) (list []netip.Prefix) {
	for _, c := range cidrs {
		list = append(list, netip.MustParsePrefix(c))
	}
	return list
}

func TestZones(t *testing.T) {
	for _, tt := range []struct {
		name            string
		link            link
		others          []link
		public, private []string
		zone            firewall.Zone
		reason          string
		guests          bool
	}{
		{
			name: "lo", link: link{name: "lo", kind: "device", loopback: true, addresses: addresses("127.0.0.1/8")},
			zone: firewall.LoopbackZone, reason: "loopback",
		},
		{
			name: "lo is never anything else", link: link{name: "lo", kind: "device", loopback: true, addresses: addresses("203.0.113.1/32")},
			private: []string{"*"},
			zone:    firewall.LoopbackZone, reason: "loopback",
		},
		{
			name: "uplink", link: link{kind: "device", addresses: addresses("203.0.113.5/24"), defaultRoute: true},
			zone: firewall.PublicZone, reason: "has the default route",
		},
		{
			name: "uplink behind the provider's NAT", link: link{kind: "device", addresses: addresses("10.0.0.5/24"), defaultRoute: true},
			zone: firewall.PublicZone, reason: "has the default route",
		},
		{
			name: "second uplink, with a routing table of its own", link: link{kind: "device", addresses: addresses("172.31.16.10/20"), otherTable: 10001},
			zone: firewall.PublicZone, reason: "has a default route in table 10001",
		},
		{
			name: "a container's second veth", link: link{kind: "veth", addresses: addresses("172.17.0.2/16"), otherTable: 10},
			zone: firewall.PublicZone, reason: "has a default route in table 10",
		},
		{
			name: "a tunnel with a default route of its own", link: link{kind: "wireguard", addresses: addresses("10.8.0.1/24"), otherTable: 51820},
			zone: firewall.VirtualZone, reason: "is a wireguard",
		},
		{
			name: "a bridge of guests with a default route of its own", link: link{kind: "bridge", index: 3, addresses: addresses("10.0.0.1/24"), otherTable: 10},
			zone: firewall.VirtualZone, reason: "is a bridge", guests: true,
		},
		{
			name: "a bridge onto a second uplink", link: link{kind: "bridge", index: 3, addresses: addresses("10.0.0.1/24"), otherTable: 10},
			others: []link{{name: "eth1", kind: "device", index: 2, master: 3}},
			zone:   firewall.PublicZone, reason: "has a default route in table 10",
		},
		{
			name: "a VRF with an uplink", link: link{name: "blue", kind: "vrf", index: 3},
			others: []link{
				{name: "eth1", kind: "device", index: 2, master: 3, addresses: addresses("10.0.0.1/24")},
				{name: "eth2", kind: "device", index: 4, master: 3, addresses: addresses("10.1.0.1/24"), otherTable: 10},
			},
			zone: firewall.PublicZone, reason: "is the VRF of eth2, which has a default route in table 10",
		},
		{
			name: "a private member of that", link: link{name: "eth1", kind: "device", index: 2, master: 3, addresses: addresses("10.0.0.1/24")},
			others: []link{{name: "blue", kind: "vrf", index: 3}, {name: "eth2", kind: "device", index: 4, master: 3, addresses: addresses("10.1.0.1/24"), otherTable: 10}},
			zone:   firewall.PublicZone, reason: "is in the VRF blue",
		},
		{
			name: "a VRF that is named", link: link{name: "eth1", kind: "device", index: 2, master: 3, addresses: addresses("203.0.113.5/24")},
			others:  []link{{name: "blue", kind: "vrf", index: 3}},
			private: []string{"blue"},
			zone:    firewall.PrivateZone, reason: "is in the VRF blue",
		},
		{
			name: "a private VRF", link: link{name: "blue", kind: "vrf", index: 3},
			others: []link{{name: "eth1", kind: "device", index: 2, master: 3, addresses: addresses("10.0.0.1/24")}, {name: "br0", kind: "bridge", index: 4, master: 3}},
			zone:   firewall.PrivateZone, reason: "is the VRF of eth1, which has the private address 10.0.0.1",
		},
		{
			name: "an empty VRF", link: link{name: "blue", kind: "vrf", index: 3},
			zone: firewall.VirtualZone, reason: "is a vrf",
		},
		{
			name: "VRFs that claim to be each other's master", link: link{name: "a", kind: "vrf", index: 2, master: 3},
			others: []link{{name: "b", kind: "vrf", index: 3, master: 2}},
			zone:   firewall.VirtualZone, reason: "is a vrf",
		},
		{
			name: "second public NIC", link: link{kind: "device", addresses: addresses("10.0.0.5/24", "198.51.100.7/32")},
			zone: firewall.PublicZone, reason: "has the public address 198.51.100.7",
		},
		{
			name: "public by IPv6 alone", link: link{kind: "device", addresses: addresses("10.0.0.5/24", "2001:db8::5/64")},
			zone: firewall.PublicZone, reason: "has the public address 2001:db8::5",
		},
		{
			name: "a container's veth", link: link{kind: "veth", addresses: addresses("172.17.0.2/16"), defaultRoute: true},
			zone: firewall.PublicZone, reason: "has the default route",
		},
		{
			name: "private NIC", link: link{kind: "device", addresses: addresses("fe80::1/64", "10.116.0.2/20")},
			zone: firewall.PrivateZone, reason: "has the private address 10.116.0.2",
		},
		{
			name: "carrier NAT is private", link: link{kind: "device", addresses: addresses("100.64.1.1/24")},
			zone: firewall.PrivateZone, reason: "has the private address 100.64.1.1",
		},
		{
			name: "unique local is private", link: link{kind: "device", addresses: addresses("fd12::1/64")},
			zone: firewall.PrivateZone, reason: "has the private address fd12::1",
		},
		{
			name: "private VLAN", link: link{kind: "vlan", addresses: addresses("192.168.1.1/24")},
			zone: firewall.PrivateZone, reason: "has the private address 192.168.1.1",
		},
		{
			name: "NIC before DHCP", link: link{kind: "device"},
			zone: firewall.PublicZone, reason: "has no address yet",
		},
		{
			name: "NIC that is up, before DHCP", link: link{kind: "device", addresses: addresses("fe80::1/64", "169.254.7.7/16")},
			zone: firewall.PublicZone, reason: "has no address yet",
		},
		{
			name: "tailscale", link: link{kind: "tuntap", addresses: addresses("100.101.102.103/32", "fd7a:115c:a1e0::1/128")},
			zone: firewall.VirtualZone, reason: "is a tuntap",
		},
		{
			name: "wireguard", link: link{kind: "wireguard", addresses: addresses("10.8.0.1/24")},
			zone: firewall.VirtualZone, reason: "is a wireguard",
		},
		{
			name: "wireguard with a public address", link: link{kind: "wireguard", addresses: addresses("2001:db8:8::1/64")},
			zone: firewall.PublicZone, reason: "has the public address 2001:db8:8::1",
		},
		{
			name: "docker0", link: link{kind: "bridge", index: 3, addresses: addresses("172.17.0.1/16")},
			others: []link{{name: "veth1", kind: "veth", index: 4, master: 3}},
			zone:   firewall.VirtualZone, reason: "is a bridge", guests: true,
		},
		{
			name: "bridge without an address", link: link{kind: "bridge", index: 3, addresses: addresses("fe80::1/64")},
			zone: firewall.VirtualZone, reason: "is a bridge",
		},
		{
			name: "bridge onto a private network", link: link{kind: "bridge", index: 3, addresses: addresses("10.0.0.1/24")},
			others: []link{{name: "eth1", kind: "device", index: 2, master: 3}},
			zone:   firewall.VirtualZone, reason: "is a bridge",
		},
		{
			name: "bridge onto the uplink", link: link{kind: "bridge", index: 3, addresses: addresses("10.0.0.1/24"), defaultRoute: true},
			others: []link{{name: "eth0", kind: "device", index: 2, master: 3}},
			zone:   firewall.PublicZone, reason: "has the default route",
		},
		{
			name: "docker0 with public IPv6", link: link{kind: "bridge", addresses: addresses("172.17.0.1/16", "2001:db8:d::1/64")},
			zone: firewall.PublicZone, reason: "has the public address 2001:db8:d::1",
		},
		{
			name: "port of a private bond", link: link{name: "eth1", kind: "device", index: 2, master: 5},
			others: []link{{name: "bond0", kind: "bond", index: 5, addresses: addresses("10.0.0.1/24")}},
			zone:   firewall.PrivateZone, reason: "is a port of bond0",
		},
		{
			name: "port of a container", link: link{name: "veth1", kind: "veth", index: 2, master: 5},
			others: []link{{name: "docker0", kind: "bridge", index: 5, addresses: addresses("172.17.0.1/16")}},
			zone:   firewall.VirtualZone, reason: "is a veth",
		},
		{
			name: "links that claim to be each other's master", link: link{name: "a", kind: "device", index: 2, master: 3},
			others: []link{{name: "b", kind: "device", index: 3, master: 2}},
			zone:   firewall.PublicZone, reason: "has no address yet",
		},
		{
			name: "set to private", link: link{name: "eth0", kind: "device", defaultRoute: true},
			private: []string{"eth*"},
			zone:    firewall.PrivateZone, reason: "set by private = eth*",
		},
		{
			name: "set to both", link: link{name: "eth0", kind: "device", addresses: addresses("10.0.0.1/24")},
			public: []string{"eth*"}, private: []string{"e*"},
			zone: firewall.PublicZone, reason: "set by public = eth*",
		},
		{
			name: "a name has priority over a pattern", link: link{name: "eth1", kind: "device", addresses: addresses("203.0.113.1/24")},
			public: []string{"*"}, private: []string{"eth1"},
			zone: firewall.PrivateZone, reason: "set by private = eth1",
		},
		{
			name: "not in the settings", link: link{name: "eth1", kind: "device", addresses: addresses("10.0.0.1/24")},
			public: []string{"eth0"},
			zone:   firewall.PrivateZone, reason: "has the private address 10.0.0.1",
		},
		{
			name: "a bridge set to public serves no guests", link: link{name: "br0", kind: "bridge", addresses: addresses("10.0.0.1/24")},
			public: []string{"br0"},
			zone:   firewall.PublicZone, reason: "set by public = br0",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			links := []*link{&tt.link}
			for i := range tt.others {
				links = append(links, &tt.others[i])
			}
			settled, _ := Settle(interfaces(links), Naming{Public: tt.public, Private: tt.private}, nil)
			got := settled[0]
			if got.Zone != tt.zone || got.Reason != tt.reason || got.ServesGuests != tt.guests {
				t.Errorf("got %s because %q, serves guests %t\nwant %s because %q, serves guests %t",
					got.Zone, got.Reason, got.ServesGuests, tt.zone, tt.reason, tt.guests)
			}
		})
	}
}

func TestReaches(t *testing.T) {
	host := Host{
		Interfaces: []firewall.Interface{
			{Name: "eth0", Addresses: addresses("10.1.2.3/24", "fe80::1/64")},
			{Name: "wg0", Addresses: addresses("10.8.0.1/32", "fd00:8::1/64")},
		},
		Routes: addresses("10.1.2.0/24", "10.8.0.0/24", "192.168.0.0/16", "0.0.0.0/1", "128.0.0.0/1", "2000::/3"),
	}
	for p, want := range map[string]bool{
		"10.1.2.77/32":    true,  // on a network
		"10.1.0.0/16":     true,  // a part of it is
		"10.8.0.9/32":     true,  // routed
		"192.168.7.7/32":  true,  // routed
		"192.168.0.0/16":  true,  // routed, all of it
		"10.9.0.1/32":     false, // only by a half of the internet
		"172.16.0.1/32":   false,
		"100.64.0.1/32":   false,
		"fd00:8::77/128":  true,
		"fd00:9::77/128":  false,
		"203.0.113.1/32":  true,
		"2001:db8::1/128": true,
	} {
		if got := host.Reaches(netip.MustParsePrefix(p)); got != want {
			t.Errorf("Reaches(%s) = %t, want %t", p, got, want)
		}
	}
}

func TestCheckNamed(t *testing.T) {
	public := Host{Interfaces: []firewall.Interface{{Addresses: addresses("203.0.113.5/24", "10.1.2.3/24")}}}
	translated := Host{Interfaces: []firewall.Interface{{Addresses: addresses("10.1.2.3/24"), DefaultRoute: true}}}
	for _, tt := range []struct {
		name         string
		host         Host
		client       string
		warning, err string
	}{
		{"public", public, "198.51.100.1/32", "", ""},
		{"on the host's own network", public, "10.1.2.9/32", "", ""},
		{"its own public address", public, "203.0.113.5/32", "", "client 203.0.113.5: address of this host: want the address that the client connects from"},
		{"its own private address", translated, "10.1.2.3/32", "", "client 10.1.2.3: address of this host: want the address that the client connects from"},
		{"its own network", public, "203.0.113.0/24", "", ""},
		{"the office's LAN", public, "192.168.1.10/32", "", "client 192.168.1.10: private address to which this host has no network or route: want the public address of the client's network"},
		{"the office's whole LAN", public, "192.168.1.0/24", "", "client 192.168.1.0/24: private address to which this host has no network or route: want the public address of the client's network"},
		{"carrier NAT", public, "100.64.3.4/32", "", "client 100.64.3.4: private address to which this host has no network or route: want the public address of the client's network"},
		{"unique local", public, "fd00::1/128", "", "client fd00::1: private address to which this host has no network or route: want the public address of the client's network"},
		{"no public address here either", translated, "192.168.1.10/32", "client 192.168.1.10: private address to which this host has only a default route; check that this host sees the client with this address", ""},
		{"wider than any private range", public, "0.0.0.0/0", "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			warning, err := tt.host.CheckNamed(netip.MustParsePrefix(tt.client))
			if warning != tt.warning {
				t.Errorf("warning %q, want %q", warning, tt.warning)
			}
			if (err == nil) != (tt.err == "") || err != nil && err.Error() != tt.err {
				t.Errorf("error %v, want %q", err, tt.err)
			}
		})
	}
}
