package host

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// TestKeepIPv4: what is known of an interface's addresses is kept, and an interface that an
// earlier version recorded is treated as it was.
func TestKeepIPv4(t *testing.T) {
	for _, tt := range []struct{ recorded, now, want string }{
		{firewall.NoIPv4, firewall.Permanent, firewall.Permanent}, {firewall.NoIPv4, firewall.Leased, firewall.Leased},
		{firewall.Leased, firewall.Permanent, firewall.Leased}, {firewall.Permanent, firewall.NoIPv4, firewall.Permanent}, {"", firewall.Permanent, ""},
	} {
		now := []firewall.Interface{{Name: "eth0", IPv4: tt.now}, {Name: "eth1", IPv4: tt.now}}
		KeepIPv4([]firewall.Interface{{Name: "eth0", IPv4: tt.recorded}}, now)
		if now[0].IPv4 != tt.want || now[1].IPv4 != tt.now {
			t.Errorf("%q, then %q: %+v", tt.recorded, tt.now, now)
		}
	}
}

// TestSettle follows links over time: each step is what was detected, and the zones that
// count then.
func TestSettle(t *testing.T) {
	nic := func(name, mac string, evidence firewall.Zone, cidrs ...string) firewall.Interface {
		i := firewall.Interface{Name: name, MAC: mac, Kind: "device", Zone: evidence, Reason: "evidence", Addresses: addresses(cidrs...)}
		if len(cidrs) == 0 {
			i.Reason = noAddress
		}
		return i
	}
	of := func(kind string, i firewall.Interface) firewall.Interface { i.Kind = kind; return i }
	const public, private, virtual = firewall.PublicZone, firewall.PrivateZone, firewall.VirtualZone
	type step struct {
		links []firewall.Interface
		want  string
	}
	for name, tt := range map[string]struct {
		naming Naming
		steps  []step
	}{
		"a lease without a router opens nothing": {steps: []step{
			{[]firewall.Interface{nic("eth0", "a", public, "10.0.0.5/24")}, "eth0 public"},
			{[]firewall.Interface{nic("eth0", "a", private, "10.0.0.5/24")}, "eth0 public"},
		}},
		"a route makes it public, for good": {steps: []step{
			{[]firewall.Interface{nic("eth1", "a", private, "10.0.0.5/24")}, "eth1 private"},
			{[]firewall.Interface{nic("eth1", "a", public, "10.0.0.5/24")}, "eth1 public"},
			{[]firewall.Interface{nic("eth1", "a", private, "10.0.0.5/24")}, "eth1 public"},
		}},
		"without addresses it keeps its zone": {steps: []step{
			{[]firewall.Interface{nic("eth1", "a", public)}, "eth1 public"},
			{[]firewall.Interface{nic("eth1", "a", private, "10.0.0.5/24")}, "eth1 private"},
			{[]firewall.Interface{nic("eth1", "a", public)}, "eth1 private"},
			{nil, ""},
			{[]firewall.Interface{nic("eth1", "a", private, "10.0.0.5/24")}, "eth1 private"},
		}},
		"renamed": {steps: []step{
			{[]firewall.Interface{nic("eth0", "a", public, "10.0.0.5/24"), nic("eth1", "b", private, "10.1.0.5/24")}, "eth0 public, eth1 private"},
			{[]firewall.Interface{nic("ens3", "a", private, "10.0.0.5/24"), nic("ens4", "b", public)}, "ens3 public, ens4 private"},
		}},
		"names exchanged": {steps: []step{
			{[]firewall.Interface{nic("eth0", "a", public, "10.0.0.5/24"), nic("eth1", "b", private, "10.1.0.5/24")}, "eth0 public, eth1 private"},
			{[]firewall.Interface{nic("eth0", "b", private, "10.1.0.5/24"), nic("eth1", "a", private, "10.0.0.5/24")}, "eth0 private, eth1 public"},
			{[]firewall.Interface{nic("eth0", "b", private, "10.1.0.5/24"), nic("eth1", "a", private, "10.0.0.5/24")}, "eth0 private, eth1 public"},
		}},
		"another card under an old name": {steps: []step{
			{[]firewall.Interface{nic("eth0", "a", public, "10.0.0.5/24"), nic("eth1", "b", private, "10.1.0.5/24")}, "eth0 public, eth1 private"},
			{[]firewall.Interface{nic("eth0", "c", private, "10.0.0.5/24"), nic("eth1", "d", public)}, "eth0 public, eth1 public"},
			{[]firewall.Interface{nic("eth0", "c", private, "10.0.0.5/24"), nic("eth1", "d", private, "10.1.0.5/24")}, "eth0 public, eth1 private"},
		}},
		"a VLAN is not its device renamed": {steps: []step{
			{[]firewall.Interface{nic("eth0", "a", public, "10.0.0.5/24")}, "eth0 public"},
			{[]firewall.Interface{nic("eth0", "a", public, "10.0.0.5/24"), of("vlan", nic("eth0.7", "a", private, "10.7.0.5/24"))}, "eth0 public, eth0.7 private"},
		}},
		"a private name as another kind of link": {steps: []step{
			{[]firewall.Interface{nic("x", "a", private, "10.0.0.5/24")}, "x private"},
			{[]firewall.Interface{of("bridge", nic("x", "b", virtual, "10.0.0.5/24"))}, "x public"},
		}},
		"virtual links come and go": {steps: []step{
			{[]firewall.Interface{of("bridge", nic("docker0", "a", virtual, "172.17.0.1/16"))}, "docker0 virtual"},
			{[]firewall.Interface{of("bridge", nic("docker0", "b", virtual, "172.17.0.1/16"))}, "docker0 virtual"},
		}},
		"named by the administrator": {naming: Naming{Private: []string{"eth1"}, Public: []string{"eth2"}}, steps: []step{
			{[]firewall.Interface{nic("eth1", "a", public, "10.0.0.5/24"), nic("eth2", "b", private, "10.0.0.5/24")}, "eth1 private, eth2 public"},
			{[]firewall.Interface{nic("eth1", "c", public, "203.0.113.5/24"), nic("eth2", "b", private)}, "eth1 private, eth2 public"},
		}},
		"trusted by a pattern": {naming: Naming{Trusted: []string{"wg*"}}, steps: []step{
			{[]firewall.Interface{of("wireguard", nic("wg0", "", virtual, "10.8.0.1/24")), of("veth", nic("wg9", "a", virtual, "10.9.0.1/24"))}, "wg0 trusted, wg9 virtual"},
		}},
		"trusted by its name, as another kind": {naming: Naming{Trusted: []string{"wg0"}}, steps: []step{
			{[]firewall.Interface{of("wireguard", nic("wg0", "", virtual, "10.8.0.1/24"))}, "wg0 trusted"},
			{nil, ""},
			{[]firewall.Interface{of("veth", nic("wg0", "a", virtual, "10.8.0.1/24"))}, "wg0 virtual"},
			{[]firewall.Interface{of("tuntap", nic("wg0", "", virtual, "10.8.0.1/24"))}, "wg0 trusted"},
		}},
		"veths by their name": {naming: Naming{Trusted: []string{"veth*", "lxd7"}}, steps: []step{
			{[]firewall.Interface{of("veth", nic("veth1", "a", virtual)), of("veth", nic("lxd7", "b", virtual))}, "veth1 trusted, lxd7 trusted"},
		}},
		"ports": {naming: Naming{Private: []string{"br0"}}, steps: []step{
			{[]firewall.Interface{
				{Name: "eth1", MAC: "a", Kind: "device", Zone: public, Reason: noAddress, Master: "br0"},
				of("bridge", nic("br0", "a", virtual, "10.0.0.1/24")),
			}, "eth1 private, br0 private"},
		}},
	} {
		t.Run(name, func(t *testing.T) {
			var kept []Kept
			for n, s := range tt.steps {
				var got []firewall.Interface
				var zones []string
				got, kept = Settle(s.links, tt.naming, kept)
				for _, i := range got {
					zones = append(zones, i.Name+" "+string(i.Zone))
				}
				if is := strings.Join(zones, ", "); is != s.want {
					t.Errorf("step %d: %s, want %s\n%v\nkept %v", n+1, is, s.want, got, kept)
				}
				again, same := Settle(s.links, tt.naming, kept)
				if !slices.EqualFunc(again, got, func(a, b firewall.Interface) bool { return a.Zone == b.Zone }) || !reflect.DeepEqual(same, kept) {
					t.Errorf("step %d: the same again gives %v, kept %v\nwant %v, kept %v", n+1, again, same, got, kept)
				}
			}
		})
	}
}

// What is kept does not grow without limit.
func TestSettleForgets(t *testing.T) {
	var kept []Kept
	for n := range 2 * maxAbsent {
		id := fmt.Sprint(n)
		for _, kind := range []string{"device", "veth", "bridge"} {
			_, kept = Settle([]firewall.Interface{{Name: kind + id, MAC: id, Kind: kind, Zone: firewall.PublicZone, Addresses: addresses("203.0.113.5/24")}}, Naming{}, kept)
		}
	}
	if len(kept) < maxAbsent || len(kept) > maxAbsent+3 {
		t.Errorf("%d links are kept", len(kept))
	}
}

func TestAbsent(t *testing.T) {
	n := Naming{Public: []string{"eth0"}, Private: []string{"eth1", "ens*"}, Trusted: []string{"wg0", "tun*"}}
	got := n.Absent([]firewall.Interface{{Name: "eth0"}, {Name: "eth10"}})
	if want := []string{"private = eth1", "trusted = wg0"}; !slices.Equal(got, want) {
		t.Errorf("absent: %q, want %q", got, want)
	}
}
