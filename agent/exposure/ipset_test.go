package exposure

import (
	"errors"
	"net/netip"
	"testing"
)

// TestResolveSets traces packets through INPUT with policy DROP and one rule "-j ACCEPT".
func TestResolveSets(t *testing.T) {
	element := func(net string) IPSetElement { return IPSetElement{Net: netip.MustParsePrefix(net)} }
	service := func(net string, proto uint8, port uint16) IPSetElement {
		return IPSetElement{Net: netip.MustParsePrefix(net), Proto: proto, Port: port}
	}
	except := func(e IPSetElement) IPSetElement { e.NoMatch = true; return e }
	second := func(e IPSetElement, net string) IPSetElement { e.Second = netip.MustParsePrefix(net); return e }
	of := func(kind, family string, list ...IPSetElement) IPSet {
		s := IPSet{Type: kind, Family: family}
		for _, e := range list {
			s.Add(e)
		}
		return s
	}
	sets := map[string]IPSet{
		"empty":    {Type: "hash:net", Family: "ip"},
		"nets":     of("hash:net", "ip", element("10.0.0.0/8"), element("11.0.0.0/8"), except(element("10.0.0.0/9")), element("10.0.0.0/10")),
		"v6":       of("hash:net", "ip6", element("2001:db8::/32")),
		"services": of("hash:ip,port", "ip", service("10.0.0.1/32", 6, 80), service("10.0.0.1/32", 6, 81), service("10.0.0.2/32", 17, 80), service("10.0.0.3/32", 1, 8*256)),
		"ports":    of("bitmap:port", "", IPSetElement{Port: 80}, IPSetElement{Port: 81}, IPSetElement{Port: 443}),
		"pairs":    of("hash:net,net", "ip", second(element("10.0.0.0/8"), "192.0.2.0/24"), second(element("11.0.0.0/8"), "192.0.3.0/24")),
		"odd":      of("hash:net,net", "ip", except(second(element("10.0.0.0/8"), "192.0.2.0/24"))),
		"devices":  of("hash:net,iface", "ip", IPSetElement{Net: netip.MustParsePrefix("10.0.0.0/8"), Interface: "eth0"}, IPSetElement{Net: netip.MustParsePrefix("11.0.0.0/8"), Interface: "wg*"}),
		"macs":     of("hash:mac", "", IPSetElement{}),
		"list":     {Type: "list:set", Members: []string{"v6", "pairs", "ports", "services"}},
		"mixed":    {Type: "list:set", Members: []string{"macs", "nets"}},
	}
	get := func(name string) (IPSet, error) {
		s, ok := sets[name]
		if !ok {
			return s, errors.New("no such set")
		}
		return s, nil
	}
	const ten, nets = "10.0.0.0-10.255.255.255", "10.0.0.0-10.63.255.255 10.128.0.0-11.255.255.255"
	const not = "0.0.0.0-9.255.255.255 10.64.0.0-10.127.255.255 12.0.0.0-255.255.255.255"
	for _, tt := range []struct{ match, packet, want string }{
		{"--match-set empty src", "80", "none"},
		{"! --match-set empty src", "80", "all"},
		{"--match-set nets src", "80", nets},
		{"! --match-set nets src", "80", not},
		{"--match-set nets dst", "80", "none"},
		{"--match-set nets src,dst", "80", nets},
		{"! --match-set nets dst", "80", "all"},
		{"--match-set nets src ! --update-counters", "80", nets},
		{"--match-set nets src --return-nomatch", "80", "perhaps all"},
		{"--match-set nets src --packets-gt 3", "80", "perhaps all"},
		{"--match-set v6 src", "80", "none"},
		{"! --match-set v6 src", "80", "all"},
		{"--match-set services src,dst", "80", "10.0.0.1-10.0.0.1"},
		{"--match-set services src,dst", "81", "10.0.0.1-10.0.0.1"},
		{"--match-set services src,dst", "udp 80", "10.0.0.2-10.0.0.2"},
		{"--match-set services src,dst", "82", "none"},
		{"--match-set services src", "80", "none"},
		{"! --match-set services src", "80", "all"},
		{"--match-set services src,src", "80", "perhaps 10.0.0.1-10.0.0.1"},
		{"--match-set ports dst", "81", "all"},
		{"--match-set ports dst", "udp 443", "all"},
		{"--match-set ports dst", "82", "none"},
		{"--match-set pairs src,dst", "80", ten},
		{"--match-set odd src,dst", "80", "perhaps all"},
		{"--match-set devices src,src", "80", ten},
		{"--match-set macs src", "80", "perhaps all"},
		{"--match-set missing src", "80", "perhaps all"},
		{"--match-set list src,dst", "80", ten + ", perhaps 0.0.0.0-9.255.255.255 11.0.0.0-255.255.255.255"}, // by the source port
		{"--match-set list dst", "80", "all"},
		{"--match-set mixed src", "80", nets + ", perhaps 0.0.0.0-9.255.255.255 10.64.0.0-10.127.255.255 12.0.0.0-255.255.255.255"},
	} {
		tables := readTables(t, "ip", "*filter\n:INPUT DROP [0:0]\n-A INPUT -m set "+tt.match+" -j ACCEPT\nCOMMIT\n")
		ResolveSets(tables, get)
		if got := answer(tables, packet(tt.packet)); got != tt.want {
			t.Errorf("%s: %s from %s, want %s", tt.match, tt.packet, got, tt.want)
		}
	}
	// Packets change this set.
	tables := readTables(t, "ip", "*mangle\n-A PREROUTING -p icmp -j SET --add-set nets src\nCOMMIT\n*filter\n:INPUT DROP [0:0]\n-A INPUT -m set --match-set nets src -j ACCEPT\nCOMMIT\n")
	ResolveSets(tables, get)
	if m := tables[1].Chains[0].Rules[0].Matches[0]; m.Field != Sometimes {
		t.Errorf("a set that packets change: %+v", m)
	}
}
