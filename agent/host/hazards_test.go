package host

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

func TestHazards(t *testing.T) {
	const table = "IP Virtual Server version 1.2.1 (size=4096)\nProt LocalAddress:Port Scheduler Flags\n  -> RemoteAddress:Port Forward Weight ActiveConn InActConn\n"
	const service = "TCP  C0000201:0050 rr\n"
	interfaces := []firewall.Interface{
		{Name: "eth0", Zone: firewall.PublicZone, Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}},
		{Name: "eth1", Zone: firewall.PublicZone, Addresses: []netip.Prefix{netip.MustParsePrefix("2001:db8::1/64"), netip.MustParsePrefix("198.51.100.1/24")}},
		{Name: "eth3", Zone: firewall.PublicZone, Master: "blue", Addresses: []netip.Prefix{netip.MustParsePrefix("203.0.113.1/24")}},
		{Name: "blue", Zone: firewall.PublicZone, Kind: "vrf", Addresses: []netip.Prefix{netip.MustParsePrefix("203.0.113.2/24")}},
		{Name: "eth2", Zone: firewall.PrivateZone, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")}},
	}
	by := func(netip.Addr) string { return "eth0" }
	for name, tt := range map[string]struct {
		files map[string]string
		want  Hazards
	}{
		"nothing":                {nil, Hazards{}},
		"IPVS":                   {map[string]string{"proc/net/ip_vs": table + service, "proc/sys/net/ipv4/vs/conntrack": "0\n"}, Hazards{IPVS: true}},
		"IPVS without a service": {map[string]string{"proc/net/ip_vs": table, "proc/sys/net/ipv4/vs/conntrack": "0\n"}, Hazards{}},
		"IPVS with conntrack":    {map[string]string{"proc/net/ip_vs": table + service, "proc/sys/net/ipv4/vs/conntrack": "1\n"}, Hazards{}},
		"helpers": {map[string]string{"proc/sys/net/netfilter/nf_conntrack_helper": "1\n", "sys/module/nf_conntrack_ftp/refcnt": "0", "sys/module/nf_conntrack_sip/refcnt": "0"},
			Hazards{Helpers: []string{"ftp", "sip"}}},
		"helpers of rules only": {map[string]string{"proc/sys/net/netfilter/nf_conntrack_helper": "0\n", "sys/module/nf_conntrack_ftp/refcnt": "0"}, Hazards{}},
		"strict everywhere": {map[string]string{"proc/sys/net/ipv4/conf/all/rp_filter": "1\n", "proc/sys/net/ipv4/conf/eth1/rp_filter": "0\n"},
			Hazards{Asymmetric: []Asymmetric{{"eth1", "eth0"}}}},
		"strict on one":    {map[string]string{"proc/sys/net/ipv4/conf/all/rp_filter": "0\n", "proc/sys/net/ipv4/conf/eth1/rp_filter": "1\n"}, Hazards{Asymmetric: []Asymmetric{{"eth1", "eth0"}}}},
		"loose on one":     {map[string]string{"proc/sys/net/ipv4/conf/all/rp_filter": "1\n", "proc/sys/net/ipv4/conf/eth1/rp_filter": "2\n"}, Hazards{}},
		"strict on others": {map[string]string{"proc/sys/net/ipv4/conf/eth0/rp_filter": "1\n", "proc/sys/net/ipv4/conf/eth2/rp_filter": "1\n"}, Hazards{}},
	} {
		root := t.TempDir()
		for path, text := range tt.files {
			path = filepath.Join(root, path)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		got := kernelFiles{filepath.Join(root, "proc"), filepath.Join(root, "sys")}.hazards(interfaces, by)
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// TestOutgoing asks a kernel with two uplinks, the second of which has its own table.
func TestOutgoing(t *testing.T) {
	ns, peer := newNamespace(t), newNamespace(t)
	ns.join(t, peer)
	ns.add(t, &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth9"}, PeerName: "peer9"})
	ns.up(t, "peer9")
	ns.up(t, "eth9", "198.51.100.1/24")
	ns.route(t, netlink.Route{Dst: cidr("0.0.0.0/0"), Gw: net.ParseIP("192.0.2.2")})
	from := netip.MustParseAddr("198.51.100.1")
	check := func(want string) {
		t.Helper()
		var got string
		ns.do(func() { got = outgoing(from) })
		if got != want {
			t.Errorf("replies leave by %q, want %q", got, want)
		}
	}
	check("eth0")
	ns.route(t, netlink.Route{Dst: cidr("0.0.0.0/0"), Gw: net.ParseIP("198.51.100.2"), Table: 9})
	ns.must(t, func() error {
		r := netlink.NewRule()
		r.Src, r.Table = cidr("198.51.100.1/32"), 9
		return netlink.RuleAdd(r)
	})
	check("eth9")
}
