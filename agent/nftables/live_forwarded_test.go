package nftables

import (
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// load returns a namespace with a ruleset in the syntax of nft.
func load(t testing.TB, text string) *lab.Namespace {
	t.Helper()
	lab.Need(t, "ip", "nft")
	n := lab.NewNamespace(t)
	if r := n.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: text}); r.Code != 0 {
		t.Fatalf("nft: %s\n%s", r.Stderr, text)
	}
	return n
}

// machine returns a host with a public interface and bridges of containers.
func machine(tables []exposure.Table) exposure.Situation {
	net := netip.MustParsePrefix
	return exposure.Situation{Rules: exposure.Ruleset{Tables: tables}, Interfaces: []firewall.Interface{
		{Name: "lo", Zone: firewall.LoopbackZone, Addresses: []netip.Prefix{net("127.0.0.1/8"), net("::1/128")}},
		{Name: "eth0", Zone: firewall.PublicZone, Addresses: []netip.Prefix{net("192.0.2.1/24"), net("192.0.2.65/24"), net("2001:db8::1/64")}},
		{Name: "podman1", Zone: firewall.VirtualZone, Addresses: []netip.Prefix{net("10.88.0.1/16"), net("fd00::1/64")}},
		{Name: "docker0", Zone: firewall.VirtualZone, Addresses: []netip.Prefix{net("172.17.0.1/16"), net("fd00:d0c::1/64")}},
	}}
}

// checkForwarded compares the forwarded ports of a machine with those wanted, in any order.
func checkForwarded(t *testing.T, tables []exposure.Table, want []firewall.ForwardedPort) {
	t.Helper()
	s := machine(tables)
	earlier := func(a, b firewall.ForwardedPort) bool { return fmt.Sprint(a) < fmt.Sprint(b) }
	if diff := cmp.Diff(want, s.Forwarded(s.Report()), cmpopts.SortSlices(earlier), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// base returns a table with one nat chain at prerouting.
func base(family, rules string) string {
	return fmt.Sprintf("table %s t {\nchain pre {\ntype nat hook prerouting priority dstnat;\n%s\n}\n}\n", family, rules)
}

// by4 and by6 return the forwarded port of a rule in base.
func by4(proto, port, to string) firewall.ForwardedPort {
	return firewall.ForwardedPort{Family: "ipv4", Proto: proto, Port: port, To: to, By: "t pre"}
}

func by6(proto, port, to string) firewall.ForwardedPort {
	return firewall.ForwardedPort{Family: "ipv6", Proto: proto, Port: port, To: to, By: "t pre"}
}

func on(address string, b firewall.ForwardedPort) firewall.ForwardedPort {
	b.On = address
	return b
}

func local(b firewall.ForwardedPort) firewall.ForwardedPort {
	b.Local = true
	return b
}

// netavark is the ruleset of podman's netavark with its nftables driver.
const netavark = `table inet netavark {
	chain PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local jump NETAVARK-HOSTPORT-DNAT
	}
	chain OUTPUT {
		type nat hook output priority -100; policy accept;
		fib daddr type local jump NETAVARK-HOSTPORT-DNAT
	}
	chain NETAVARK-HOSTPORT-SETMARK { meta mark set meta mark | 0x00002000; }
	chain NETAVARK-HOSTPORT-DNAT {
		ip daddr 10.88.0.1 meta l4proto { tcp, udp } th dport 53 dnat ip to 10.88.0.1:1153
		tcp dport 5432 jump nv_2f259bab_10_88_0_0_nm16_dnat
		ip daddr 192.0.2.1 udp dport 8000-8001 jump nv_2f259bab_10_88_0_0_nm16_dnat
		ip daddr 127.0.0.1 tcp dport 6379 jump nv_2f259bab_10_88_0_0_nm16_dnat
		tcp dport 5432 jump nv_2f259bab_fd00----_nm64_dnat
	}
	chain nv_2f259bab_10_88_0_0_nm16_dnat {
		ip saddr 10.88.0.0/16 tcp dport 5432 jump NETAVARK-HOSTPORT-SETMARK
		ip saddr 127.0.0.1 tcp dport 5432 jump NETAVARK-HOSTPORT-SETMARK
		tcp dport 5432 dnat ip to 10.88.0.2:5432
		ip daddr 192.0.2.1 udp dport 8000 dnat ip to 10.88.0.3:9000
		ip daddr 192.0.2.1 udp dport 8001 dnat ip to 10.88.0.3:9001
		ip daddr 127.0.0.1 tcp dport 6379 dnat ip to 10.88.0.4:6379
	}
	chain nv_2f259bab_fd00----_nm64_dnat {
		ip6 saddr fd00::/64 tcp dport 5432 jump NETAVARK-HOSTPORT-SETMARK
		tcp dport 5432 dnat ip6 to [fd00::2]:5432
	}
}
`

// docker is the ruleset of the nftables backend of Docker.
const docker = `table ip docker-bridges {
	map nat-postrouting-in-jumps {
		type ifname : verdict
		elements = { "docker0" : jump nat-postrouting-in__docker0 }
	}
	chain nat-OUTPUT {
		type nat hook output priority -100; policy accept;
		ip daddr != 127.0.0.0/8 fib daddr type local counter jump nat-prerouting-and-output
	}
	chain nat-POSTROUTING {
		type nat hook postrouting priority srcnat; policy accept;
		oifname vmap @nat-postrouting-in-jumps
	}
	chain nat-PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local counter jump nat-prerouting-and-output
	}
	chain nat-prerouting-and-output {
		iifname != "docker0" tcp dport 5432 counter dnat to 172.17.0.2:5432 comment "DNAT"
		iifname != "docker0" ip daddr 127.0.0.1 tcp dport 6379 counter dnat to 172.17.0.3:6379 comment "DNAT"
		iifname != "docker0" ip daddr 192.0.2.1 udp dport 53 counter dnat to 172.17.0.4:53 comment "DNAT"
	}
	chain nat-postrouting-in__docker0 { }
}
table ip6 docker-bridges {
	chain nat-PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local counter jump nat-prerouting-and-output
	}
	chain nat-prerouting-and-output {
		iifname != "docker0" tcp dport 5432 counter dnat to [fd00:d0c::2]:5432 comment "DNAT"
	}
}
`

// TestForwarded reads rulesets that nft has loaded into the kernel.
func TestForwarded(t *testing.T) {
	for name, tt := range map[string]struct {
		rules string
		want  []firewall.ForwardedPort
	}{
		"nothing": {"", nil},
		"netavark": {netavark, []firewall.ForwardedPort{
			{Family: "ipv4", Proto: "tcp", Port: "5432", To: "10.88.0.2:5432", By: "netavark nv_2f259bab_10_88_0_0_nm16_dnat", Program: "podman"},
			{Family: "ipv4", Proto: "udp", Port: "8000", On: "192.0.2.1", To: "10.88.0.3:9000", By: "netavark nv_2f259bab_10_88_0_0_nm16_dnat", Program: "podman"},
			{Family: "ipv4", Proto: "udp", Port: "8001", On: "192.0.2.1", To: "10.88.0.3:9001", By: "netavark nv_2f259bab_10_88_0_0_nm16_dnat", Program: "podman"},
			{Family: "ipv6", Proto: "tcp", Port: "5432", To: "[fd00::2]:5432", By: "netavark nv_2f259bab_fd00----_nm64_dnat", Program: "podman"},
		}},
		"Docker": {docker, []firewall.ForwardedPort{
			{Family: "ipv4", Proto: "tcp", Port: "5432", To: "172.17.0.2:5432", By: "docker-bridges nat-prerouting-and-output", Program: "Docker"},
			{Family: "ipv4", Proto: "udp", Port: "53", On: "192.0.2.1", To: "172.17.0.4:53", By: "docker-bridges nat-prerouting-and-output", Program: "Docker"},
			{Family: "ipv6", Proto: "tcp", Port: "5432", To: "[fd00:d0c::2]:5432", By: "docker-bridges nat-prerouting-and-output", Program: "Docker"},
		}},
		"LXD": {strings.ReplaceAll(base("inet", "ip daddr 192.0.2.1 tcp dport 80 dnat ip to 10.1.1.2:80"), "table inet t", "table inet lxd"),
			[]firewall.ForwardedPort{{Family: "ipv4", Proto: "tcp", Port: "80", On: "192.0.2.1", To: "10.1.1.2:80", By: "lxd pre", Program: "LXD"}}},

		"range":              {base("ip", "tcp dport 8000-8010 dnat to 10.0.0.2"), []firewall.ForwardedPort{by4("tcp", "8000-8010", "10.0.0.2")}},
		"set":                {base("ip", "tcp dport { 80, 443 } dnat to 10.0.0.2"), []firewall.ForwardedPort{by4("tcp", "80", "10.0.0.2"), by4("tcp", "443", "10.0.0.2")}},
		"set of ranges":      {base("ip", "tcp dport { 80, 8000-8010 } dnat to 10.0.0.2"), []firewall.ForwardedPort{by4("tcp", "80", "10.0.0.2"), by4("tcp", "8000-8010", "10.0.0.2")}},
		"to the last port":   {base("ip", "tcp dport { 60000-65535 } dnat to 10.0.0.2"), []firewall.ForwardedPort{by4("tcp", "60000-65535", "10.0.0.2")}},
		"below":              {base("ip", "tcp dport <= 99 dnat to 10.0.0.2"), []firewall.ForwardedPort{by4("tcp", "1-99", "10.0.0.2")}},
		"all but one":        {base("ip", "tcp dport != 22 dnat to 10.0.0.2"), []firewall.ForwardedPort{by4("tcp", "any", "10.0.0.2")}},
		"all but a set":      {base("ip", "tcp dport != { 22, 80 } dnat to 10.0.0.2"), []firewall.ForwardedPort{by4("tcp", "any", "10.0.0.2")}},
		"any port":           {base("ip", "meta l4proto udp dnat to 10.0.0.2"), []firewall.ForwardedPort{by4("udp", "any", "10.0.0.2")}},
		"anything":           {base("ip", "dnat to 10.0.0.2"), []firewall.ForwardedPort{by4("any", "any", "10.0.0.2")}},
		"one address":        {base("inet", "ip6 daddr 2001:db8::1 tcp dport 80 dnat ip6 to [fd00::2]:80"), []firewall.ForwardedPort{on("2001:db8::1", by6("tcp", "80", "[fd00::2]:80"))}},
		"one network":        {base("ip", "ip daddr 192.0.2.0/24 tcp dport 80 dnat to 10.0.0.2"), []firewall.ForwardedPort{on("192.0.2.0/24", by4("tcp", "80", "10.0.0.2"))}},
		"one narrow network": {base("ip", "ip daddr 192.0.2.64/26 tcp dport 80 dnat to 10.0.0.2"), []firewall.ForwardedPort{on("192.0.2.64/26", by4("tcp", "80", "10.0.0.2"))}},
		"after ct":           {base("ip", "ip daddr 192.0.2.1 ct mark 0 tcp dport 80 ct state new dnat to 10.0.0.2\nct mark 7 tcp dport 81 dnat to 10.0.0.2"), []firewall.ForwardedPort{on("192.0.2.1", by4("tcp", "80", "10.0.0.2"))}},

		"map of addresses": {base("ip", "dnat to tcp dport map { 80 : 10.0.0.2, 8000-8010 : 10.0.0.3 }"), []firewall.ForwardedPort{by4("tcp", "80", "10.0.0.2"), by4("tcp", "8000-8010", "10.0.0.3")}},
		"map of addresses and ports": {base("inet", "dnat ip to meta l4proto . th dport map { tcp . 80 : 10.0.0.2 . 8080, udp . 53 : 10.0.0.3 . 5353 }"),
			[]firewall.ForwardedPort{by4("tcp", "80", "10.0.0.2:8080"), by4("udp", "53", "10.0.0.3:5353")}},
		"map of IPv6 addresses and ports": {base("ip6", "dnat ip6 to ip6 daddr . tcp dport map { 2001:db8::1 . 80 : fd00::2 . 8080 }"), []firewall.ForwardedPort{on("2001:db8::1", by6("tcp", "80", "[fd00::2]:8080"))}},
		"map with an unknown key": {base("ip", "tcp dport 80 dnat to numgen inc mod 2 map { 0 : 10.0.0.2, 1 : 10.0.0.3 }"),
			[]firewall.ForwardedPort{by4("tcp", "80", "10.0.0.2")}}, // one of them
		"map of verdicts": {"table ip t {\nchain a { meta l4proto tcp dnat to 10.0.0.2:80; }\nchain b { meta l4proto tcp dnat to 10.0.0.3:81; }\nchain pre { type nat hook prerouting priority dstnat;\n" +
			"ip daddr . meta l4proto . th dport vmap { 192.0.2.1 . tcp . 8080 : goto a, 127.0.0.1 . tcp . 8081 : jump a, 192.0.2.1 . udp . 8082 : drop }\n" +
			"tcp dport vmap { 9090-9099 : jump b }\n}\n}\n",
			[]firewall.ForwardedPort{
				{Family: "ipv4", Proto: "tcp", Port: "8080", To: "10.0.0.2:80", By: "t a"},
				{Family: "ipv4", Proto: "tcp", Port: "9090-9099", To: "10.0.0.3:81", By: "t b"},
			}},
		"two paths to one chain": {"table ip t {\nchain c { tcp dport 80-81 dnat to 10.0.0.2; }\nchain pre { type nat hook prerouting priority dstnat;\n" +
			"tcp dport 80 jump c\ntcp dport 80-90 jump c\ntcp dport 443 jump c\nudp dport 80 jump c\n}\n}\n",
			[]firewall.ForwardedPort{
				{Family: "ipv4", Proto: "tcp", Port: "80-81", To: "10.0.0.2", By: "t c"},
			}},

		"not from outside": {base("ip", "ip daddr 127.0.0.1 tcp dport 80 dnat to 10.0.0.2\niif lo tcp dport 80 dnat to 10.0.0.2\n"+
			"iifname \"lo\" tcp dport 80 dnat to 10.0.0.2\nip saddr 127.0.0.0/8 tcp dport 80 dnat to 10.0.0.2"), nil},
		"not to this host": {base("ip", "ip daddr 198.51.100.1 tcp dport 80 dnat to 10.0.0.2\niifname podman1 tcp dport 80 dnat to 10.0.0.2"), nil},
		"not through the forward hook": {base("ip", "tcp dport 80-81 dnat to 10.0.0.2") + "table inet f {\nchain f { type filter hook forward priority 0; policy drop; tcp dport 81 accept; }\n}\n",
			[]firewall.ForwardedPort{by4("tcp", "81", "10.0.0.2")}},
		"redirected to INPUT": {base("ip", "tcp dport 80 redirect to :8080\ntcp dport 81 dnat to :8080\ntcp dport 82 redirect to :8082") + rulesIn("ip", "tcp dport 8080 accept"),
			[]firewall.ForwardedPort{local(by4("tcp", "80", "port 8080")), local(by4("tcp", "81", "port 8080"))}},
		"no DNAT": {base("ip", "tcp dport 80 accept\ntcp dport 81 drop\nip protocol icmp dnat to 10.0.0.2"), nil},
		"another hook": {"table ip t {\nchain nothing_leads_to { tcp dport 80 dnat to 10.0.0.2; }\n" +
			"chain out { type nat hook output priority -100; tcp dport 80 dnat to 10.0.0.2; }\n}\n", nil},
		"dormant table": {strings.Replace(base("ip", "tcp dport 80 dnat to 10.0.0.2"), "{", "{\nflags dormant;", 1), nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			checkForwarded(t, readLive(t, load(t, tt.rules)), tt.want)
		})
	}
}

// TestForwardedByIptables checks rules of iptables-nft, and one that another program added
// to a chain of them.
func TestForwardedByIptables(t *testing.T) {
	n, saved := iptablesIn(t, "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n"+
		"-A DOCKER ! -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2:8080\n"+
		"-A PREROUTING -p udp -m udp --dport 53 -m comment --comment x -j DNAT --to-destination 172.17.0.2\n"+
		"-A PREROUTING -p tcp -m multiport --dports 81,82 -m statistic --mode random --probability 0.5 -j DNAT --to-destination 172.17.0.3\nCOMMIT\n",
		"add rule ip nat DOCKER udp dport 99 dnat to 10.0.0.9\n")
	checkForwarded(t, readLive(t, n, saved...), []firewall.ForwardedPort{
		{Family: "ipv4", Proto: "tcp", Port: "80", To: "172.17.0.2:8080", By: "nat DOCKER", Program: "Docker"},
		{Family: "ipv4", Proto: "udp", Port: "99", To: "10.0.0.9", By: "nat DOCKER", Program: "Docker"},
		{Family: "ipv4", Proto: "udp", Port: "53", To: "172.17.0.2", By: "nat PREROUTING"},
		{Family: "ipv4", Proto: "tcp", Port: "81", To: "172.17.0.3", By: "nat PREROUTING"},
		{Family: "ipv4", Proto: "tcp", Port: "82", To: "172.17.0.3", By: "nat PREROUTING"},
	})
}

func TestAbsent(t *testing.T) {
	for err, want := range map[error]bool{nil: false, syscall.EINVAL: true, syscall.EPROTONOSUPPORT: true, syscall.EPERM: false,
		fmt.Errorf("receive: %w", syscall.EOPNOTSUPP): true} {
		if got := absent(err); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
}

// huge returns rules with a set of 30000 addresses, like a blocklist's, and a jump.
func huge() string {
	var b strings.Builder
	for i := range 30000 {
		fmt.Fprintf(&b, "10.%d.%d.%d,", i>>12&255, i>>4&255, i<<4&255)
	}
	return "table inet block {\nset v4 { type ipv4_addr; elements = {" + b.String() + "} }\n" +
		"chain drops { drop; }\nchain pre { type nat hook prerouting priority dstnat - 5;\nip saddr @v4 jump drops\nip daddr @v4 tcp dport 81 dnat ip to 10.0.0.8\n}\n}\n"
}

func TestForwardedHuge(t *testing.T) {
	s := machine(readLive(t, load(t, huge())))
	s.Interfaces[1].Addresses = append(s.Interfaces[1].Addresses, netip.MustParsePrefix("10.0.1.0/24"))
	want := []firewall.ForwardedPort{{Family: "ipv4", Proto: "tcp", Port: "81", To: "10.0.0.8", By: "block pre"}}
	if diff := cmp.Diff(want, s.Forwarded(s.Report())); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func BenchmarkForwarded(b *testing.B) {
	for _, bb := range []struct{ name, rules string }{
		{"nothing", ""}, {"netavark", netavark}, {"Docker", docker}, {"huge", huge()},
	} {
		b.Run(bb.name, func(b *testing.B) {
			n := load(b, bb.rules)
			for range b.N {
				s := machine(readLive(b, n))
				s.Forwarded(s.Report())
			}
		})
	}
}
