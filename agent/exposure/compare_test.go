package exposure

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// configured are the rules of the settings, of the table filter.
const configured = `-A INPUT -s 203.0.113.0/24 -p tcp -m tcp --dport 22 -j ACCEPT
-A INPUT -s 198.51.100.7/32 -p tcp -m tcp --dport 22 -j ACCEPT
-A INPUT -p tcp -m multiport --dports 80,443 -j ACCEPT
-A INPUT -p udp -m udp --dport 8000:8010 -j ACCEPT
-A INPUT -j DROP`

// required are the requirements of the settings.
func required() []Requirement {
	const tcp = firewall.TCP
	only := func(networks ...string) [2]Sources { return [2]Sources{from(networks...), {}} }
	return []Requirement{
		{"ssh", tcp, firewall.Port(22), only("203.0.113.0/24")},
		{"ssh", tcp, firewall.Port(22), only("198.51.100.7/32")},
		{"http", tcp, firewall.Port(80), [2]Sources{}},
		{"https", tcp, firewall.Port(443), [2]Sources{}},
		{"calls", firewall.UDP, firewall.PortRange{First: 8000, Last: 8010}, [2]Sources{}},
	}
}

// difference returns an entry of a difference as text.
func difference(e Entry) string {
	from := strings.Join(firewall.FormatPrefixes(e.From.Networks()), " ")
	switch {
	case len(e.Except) > 0:
		from = "all but " + strings.Join(firewall.FormatPrefixes(e.Except.Networks()), " ")
	case from == "":
		from = "all"
	}
	out := fmt.Sprintf("%d/%s %s %s for %s on %s: %s %s %s", e.Port, e.Proto, e.Family, e.Verdict, from, strings.Join(e.On, " "), e.By.Table, e.By.Chain, e.By.Rule)
	if e.Service != "" {
		out = e.Service + " " + out
	}
	if e.Via.Table != "" {
		out += ", via " + e.Via.Table + " " + e.Via.Chain
	}
	if e.Limited {
		out += ", limited"
	}
	return out
}

func TestCompare(t *testing.T) {
	type rules map[string]string // by table, or "ip6" for the table filter of IPv6
	ingress := Table{Program: "nft", Family: "netdev", Name: "n", Chains: []Chain{{Name: "in", Hook: Ingress, Devices: []string{"eth0"}, Rules: []Rule{
		{Text: "tcp dport 80 drop", Verdict: Drop, Matches: []Match{isTCP, port(80)}}}}}}
	native := func(text string, m ...Match) []Table {
		return []Table{{Program: "nft", Family: "inet", Name: "f", Chains: []Chain{{Name: "in", Hook: Input, Priority: 10, Rules: []Rule{{Text: text, Verdict: Drop, Matches: m}}}}}}
	}
	isUDP := Match{Field: Protocol, Numbers: []Span{{17, 17}}}
	dnat := func(port int, to string) rules {
		return rules{"nat": fmt.Sprintf("-A PREROUTING -p tcp -m tcp --dport %d -j DNAT --to-destination %s", port, to)}
	}
	for _, tt := range []struct {
		name             string
		rules            rules // those of filter and ip6 come before the ones of the settings
		more             []Table
		exposed, blocked []string
	}{
		{"no difference", nil, nil, nil, nil},
		{"what the settings allow", rules{"filter": "-A INPUT -p tcp -m tcp --dport 80 -j ACCEPT\n-A INPUT -s 203.0.113.9/32 -p tcp -m tcp --dport 22 -j ACCEPT"}, nil, nil, nil},
		{"two ports", rules{"filter": "-A INPUT -j OTHER\n-A OTHER -p tcp -m multiport --dports 22,8080 -j ACCEPT"}, nil, []string{
			"22/tcp ipv4 open for all but 198.51.100.7 203.0.113.0/24 on eth0 eth2: filter OTHER -p tcp -m multiport --dports 22,8080 -j ACCEPT",
			"8080/tcp ipv4 open for all on eth0 eth2: filter OTHER -p tcp -m multiport --dports 22,8080 -j ACCEPT",
		}, nil},
		{"sshd's port for a wider network", rules{"filter": "-A INPUT -s 203.0.112.0/23 -p tcp -m tcp --dport 22 -j ACCEPT"}, nil,
			[]string{"22/tcp ipv4 open for 203.0.112.0/24 on eth0 eth2: filter INPUT -s 203.0.112.0/23 -p tcp -m tcp --dport 22 -j ACCEPT"}, nil},
		{"every port", rules{"filter": "-A INPUT -p udp -j ACCEPT"}, nil, []string{"0/udp ipv4 open for all on eth0 eth2: filter INPUT -p udp -j ACCEPT"}, nil},
		{"everything", rules{"filter": "-A INPUT -j ACCEPT"}, nil, []string{
			"22/tcp ipv4 open for all but 198.51.100.7 203.0.113.0/24 on eth0 eth2: filter INPUT -j ACCEPT",
			"0/tcp ipv4 open for all on eth0 eth2: filter INPUT -j ACCEPT",
			"0/udp ipv4 open for all on eth0 eth2: filter INPUT -j ACCEPT",
		}, nil},
		{"IPv6", rules{"ip6": "-A INPUT -p tcp -m tcp --dport 8080 -j ACCEPT"}, nil,
			[]string{"8080/tcp ipv6 open for all on eth0: filter INPUT -p tcp -m tcp --dport 8080 -j ACCEPT"}, nil},
		{"one interface", rules{"filter": "-A INPUT -i eth2 -p tcp -m tcp --dport 8080 -j ACCEPT"}, nil,
			[]string{"8080/tcp ipv4 open for all on eth2: filter INPUT -i eth2 -p tcp -m tcp --dport 8080 -j ACCEPT"}, nil},
		{"one address", rules{"filter": "-A INPUT -d 192.0.2.2/32 -p tcp -m tcp --dport 8080 -j ACCEPT"}, nil,
			[]string{"8080/tcp ipv4 open for all on eth0: filter INPUT -d 192.0.2.2/32 -p tcp -m tcp --dport 8080 -j ACCEPT"}, nil},
		{"a port that returns", rules{"filter": "-A INPUT -p tcp -m tcp --dport 8000 -j RETURN"}, nil,
			[]string{"8000/tcp ipv4 open for all on eth0 eth2: filter INPUT policy ACCEPT"}, nil},
		{"a mark", rules{"filter": "-A INPUT -p tcp -m tcp --dport 8000 -j MARK --set-xmark 0x1/0x1\n-A INPUT -m mark --mark 0x1/0x1 -j ACCEPT"}, nil,
			[]string{"8000/tcp ipv4 open for all on eth0 eth2: filter INPUT -m mark --mark 0x1/0x1 -j ACCEPT"}, nil},
		{"all but a range", rules{"filter": "-A INPUT -p tcp -m tcp ! --dport 0:1023 -j ACCEPT"}, nil,
			[]string{"0/tcp ipv4 open for all on eth0 eth2: filter INPUT -p tcp -m tcp ! --dport 0:1023 -j ACCEPT"}, nil},
		{"interfaces that are not public", rules{"filter": "-A INPUT -i lo -j ACCEPT\n-A INPUT -i docker0 -j ACCEPT\n-A INPUT -i eth1 -p tcp -m tcp --dport 8080 -j ACCEPT"}, nil, nil, nil},
		{"replies only", rules{"filter": "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n-A INPUT -p icmp -j ACCEPT"}, nil, nil, nil},
		{"an unknown match", rules{"filter": "-A INPUT -p tcp -m tcp --dport 8080 -m u32 --u32 0x0 -j ACCEPT"}, nil,
			[]string{"8080/tcp ipv4 perhaps for all on eth0 eth2: filter INPUT -p tcp -m tcp --dport 8080 -m u32 --u32 0x0 -j ACCEPT"}, nil},
		{"a limit", rules{"filter": "-A INPUT -p tcp -m tcp --dport 8080 -m limit --limit 3/min -j ACCEPT"}, nil,
			[]string{"8080/tcp ipv4 perhaps for all on eth0 eth2: filter INPUT -p tcp -m tcp --dport 8080 -m limit --limit 3/min -j ACCEPT, limited"}, nil},
		{"an accepted port behind another one", rules{"nat": "-A PREROUTING -p tcp -m tcp --dport 9999 -j REDIRECT --to-ports 443"}, nil,
			[]string{"9999/tcp ipv4 open for all on eth0 eth2: filter INPUT -p tcp -m multiport --dports 80,443 -j ACCEPT, via nat PREROUTING"}, nil},
		{"a port that is dropped behind an accepted one", rules{"nat": "-A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080"}, nil, nil,
			[]string{"http 80/tcp ipv4 closed for all on eth0 eth2: filter INPUT -j DROP, via nat PREROUTING"}},
		{"a container", dnat(8080, "172.17.0.2:80"), nil, nil, nil},
		{"a container at an accepted port", dnat(80, "172.17.0.2:8080"), nil, nil, nil},
		{"a container that is not reached", rules{"nat": dnat(80, "172.17.0.2:8080")["nat"], "filter": "-A FORWARD -j DROP"}, nil, nil,
			[]string{"http 80/tcp ipv4 closed for all on eth0 eth2: filter FORWARD -j DROP, via nat PREROUTING"}},
		{"a drop in ingress", nil, []Table{ingress}, nil, []string{"http 80/tcp ipv4 closed for all on eth0: n in tcp dport 80 drop"}},
		{"a drop in raw", rules{"raw": "-A PREROUTING -p tcp -m tcp --dport 80 -j DROP"}, nil, nil,
			[]string{"http 80/tcp ipv4 closed for all on eth0 eth2: raw PREROUTING -p tcp -m tcp --dport 80 -j DROP"}},
		{"a drop in mangle", rules{"mangle": "-A PREROUTING -p tcp -m multiport --dports 80,443 -j DROP"}, nil, nil, []string{
			"http 80/tcp ipv4 closed for all on eth0 eth2: mangle PREROUTING -p tcp -m multiport --dports 80,443 -j DROP",
			"https 443/tcp ipv4 closed for all on eth0 eth2: mangle PREROUTING -p tcp -m multiport --dports 80,443 -j DROP",
		}},
		{"a drop in security", rules{"security": "-A INPUT -i eth2 -p tcp -m tcp --dport 80 -j REJECT"}, nil, nil,
			[]string{"http 80/tcp ipv4 closed for all on eth2: security INPUT -i eth2 -p tcp -m tcp --dport 80 -j REJECT"}},
		{"a drop of a closed port", rules{"raw": "-A PREROUTING -p tcp -m tcp --dport 8080 -j DROP"}, nil, nil, nil},
		{"a drop of one source", rules{"filter": "-A INPUT -s 203.0.113.9/32 -j DROP\n-A INPUT -s 192.0.2.0/24 -p tcp -m tcp --dport 80 -j DROP"}, nil, nil, nil},
		{"a drop of an allowed source", rules{"filter": "-A INPUT -s 198.51.100.0/24 -j DROP"}, nil, nil,
			[]string{"ssh 22/tcp ipv4 closed for 198.51.100.7 on eth0 eth2: filter INPUT -s 198.51.100.0/24 -j DROP"}},
		{"a drop at one of two addresses", rules{"filter": "-A INPUT -d 192.0.2.2/32 -j DROP"}, nil, nil, nil},
		{"a drop at both addresses", rules{"filter": "-A INPUT -d 192.0.2.2/32 -p tcp -m tcp --dport 80 -j DROP\n-A INPUT -d 192.0.2.1/32 -p tcp -m tcp --dport 80 -j REJECT"}, nil, nil,
			[]string{"http 80/tcp ipv4 closed for all on eth0: filter INPUT -d 192.0.2.1/32 -p tcp -m tcp --dport 80 -j REJECT"}},
		{"a drop of one port of a range", nil, native("udp dport 8005 drop", isUDP, port(8005)), nil, []string{"calls 8005/udp ipv4 closed for all on eth0 eth2: f in udp dport 8005 drop"}},
		{"a drop of the last port of a range", nil, native("udp dport 8010 drop", isUDP, port(8010)), nil, []string{"calls 8010/udp ipv4 closed for all on eth0 eth2: f in udp dport 8010 drop"}},
		{"a drop after one perhaps", rules{"filter": "-A INPUT -p udp -m udp --dport 8001 -m limit --limit 3/min -j DROP\n-A INPUT -p udp -m udp --dport 8005 -j DROP"}, nil, nil,
			[]string{"calls 8005/udp ipv4 closed for all on eth0 eth2: filter INPUT -p udp -m udp --dport 8005 -j DROP"}},
		{"a drop of some before that of most", rules{"filter": "-A INPUT -s 198.18.0.0/15 -j DROP\n-A INPUT -p tcp -m tcp --dport 80 -j DROP"}, nil, nil,
			[]string{"http 80/tcp ipv4 closed for all on eth0 eth2: filter INPUT -p tcp -m tcp --dport 80 -j DROP"}},
		{"a drop of both families", nil, native("tcp dport 443 drop", isTCP, port(443)), nil,
			[]string{"https 443/tcp ipv4 closed for all on eth0 eth2: f in tcp dport 443 drop", "https 443/tcp ipv6 closed for all on eth0: f in tcp dport 443 drop"}},
		{"a drop perhaps", rules{"filter": "-A INPUT -p tcp -m tcp --dport 80 -m limit --limit 3/min -j DROP"}, nil, nil,
			[]string{"http 80/tcp ipv4 perhaps for all on eth0 eth2: filter INPUT -p tcp -m tcp --dport 80 -m limit --limit 3/min -j DROP"}},
		{"a drop of a private interface", rules{"filter": "-A INPUT -i eth1 -j DROP"}, nil, nil, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const web = "-A INPUT -p tcp -m tcp --dport 443 -j ACCEPT\n-A INPUT -j DROP"
			tables := slices.Concat(tt.more, read(t, "ip", "filter", strings.TrimPrefix(tt.rules["filter"]+"\n"+configured, "\n")),
				read(t, "ip6", "filter", strings.TrimPrefix(tt.rules["ip6"]+"\n"+web, "\n")))
			for _, name := range []string{"raw", "mangle", "nat", "security"} {
				if tt.rules[name] != "" {
					tables = append(tables, read(t, "ip", name, tt.rules[name])...)
				}
			}
			s := machine(tables...)
			s.Interfaces[1].Addresses = append(s.Interfaces[1].Addresses, netip.MustParsePrefix("192.0.2.2/24"))
			s.Interfaces = append(s.Interfaces, firewall.Interface{Name: "eth2", Zone: firewall.PublicZone, Addresses: []netip.Prefix{netip.MustParsePrefix("198.51.100.1/24")}})
			d := s.Compare(Ruleset{slices.Concat(read(t, "ip", "filter", configured), read(t, "ip6", "filter", web))}, required())
			for what, of := range map[string]struct {
				want []string
				list []Entry
			}{"exposed": {tt.exposed, d.Exposed}, "blocked": {tt.blocked, slices.Concat(d.Blocked, d.Doubtful)}} {
				var got []string
				for _, e := range of.list {
					got = append(got, difference(e))
				}
				if diff := gocmp.Diff(of.want, got); diff != "" {
					t.Errorf("%s (-want +got):\n%s", what, diff)
				}
			}
		})
	}
}

// TestCompareInterfaces checks a port that the settings open on one of two interfaces,
// which the live rules do not distinguish.
func TestCompareInterfaces(t *testing.T) {
	want := read(t, "ip", "filter", "-A INPUT -i eth2 -p tcp -m tcp --dport 5432 -j ACCEPT\n-A INPUT -j DROP")
	for live, text := range map[string]string{
		"-A INPUT -p tcp -m tcp --dport 5432 -j ACCEPT\n-A INPUT -j DROP": "5432/tcp ipv4 open for all on eth0: filter INPUT -p tcp -m tcp --dport 5432 -j ACCEPT",
		"-A INPUT -j DROP": "db 5432/tcp ipv4 closed for all on eth2: filter INPUT -j DROP",
	} {
		s := machine(read(t, "ip", "filter", live)...)
		s.Interfaces = append(s.Interfaces, firewall.Interface{Name: "eth2", Zone: firewall.PublicZone, Addresses: []netip.Prefix{netip.MustParsePrefix("198.51.100.1/24")}})
		d := s.Compare(Ruleset{want}, []Requirement{{Name: "db", Proto: firewall.TCP, Ports: firewall.Port(5432)}})
		if all := slices.Concat(d.Exposed, d.Blocked); len(all) != 1 || difference(all[0]) != text {
			t.Errorf("%s: %+v, want %s", live, d, text)
		}
	}
}

// TestWorse checks which entries of a difference count as new.
func TestWorse(t *testing.T) {
	exposed := func(port uint16, verdict string, on ...string) Entry {
		return Entry{Proto: firewall.TCP, Port: port, Family: "ipv4", Verdict: verdict, On: on}
	}
	blocked := func(verdict, source string, on ...string) Entry {
		e := exposed(22, verdict, on...)
		e.Service, e.From = "ssh", from(source)
		return e
	}
	const a, b = "203.0.113.0/24", "198.51.100.7/32"
	for _, tt := range []struct {
		name                string
		before, after, want Difference
	}{
		{"nothing", Difference{}, Difference{}, Difference{}},
		{"as before", Difference{Exposed: []Entry{exposed(80, Open, "eth0", "eth1")}, Blocked: []Entry{blocked(Closed, a, "eth0")}},
			Difference{Exposed: []Entry{exposed(80, Open, "eth0")}, Blocked: []Entry{blocked(Closed, a, "eth0")}}, Difference{}},
		{"a port", Difference{Exposed: []Entry{exposed(80, Open, "eth0")}}, Difference{Exposed: []Entry{exposed(81, Open, "eth0"), exposed(82, Perhaps, "eth0")}},
			Difference{Exposed: []Entry{exposed(81, Open, "eth0")}}},
		{"an interface", Difference{Exposed: []Entry{exposed(80, Open, "eth0")}, Blocked: []Entry{blocked(Closed, a, "eth0")}},
			Difference{Exposed: []Entry{exposed(80, Open, "eth0", "eth1")}, Blocked: []Entry{blocked(Closed, a, "eth0", "eth1")}},
			Difference{Exposed: []Entry{exposed(80, Open, "eth1")}, Blocked: []Entry{blocked(Closed, a, "eth1")}}},
		{"a source", Difference{Blocked: []Entry{blocked(Closed, a, "eth0")}}, Difference{Blocked: []Entry{blocked(Closed, a, "eth0"), blocked(Closed, b, "eth0")}},
			Difference{Blocked: []Entry{blocked(Closed, b, "eth0")}}},
		{"a wider source", Difference{Exposed: []Entry{{Proto: firewall.TCP, Port: 80, Family: "ipv4", Verdict: Open, On: []string{"eth0"}, From: from(a)}}},
			Difference{Exposed: []Entry{exposed(80, Open, "eth0")}}, Difference{Exposed: []Entry{exposed(80, Open, "eth0")}}},
		{"what was doubtful", Difference{Doubtful: []Entry{blocked(Perhaps, a, "eth0")}}, Difference{Blocked: []Entry{blocked(Closed, a, "eth0")}}, Difference{}},
		{"what is doubtful", Difference{}, Difference{Doubtful: []Entry{blocked(Perhaps, a, "eth0")}}, Difference{}},
	} {
		if diff := gocmp.Diff(tt.want, tt.after.Worse(tt.before), gocmp.Comparer(func(a, b Entry) bool { return difference(a) == difference(b) })); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}
