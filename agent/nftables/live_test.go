package nftables

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/test/lab"
)

func readLive(t testing.TB, n *lab.Namespace, saved ...exposure.Table) (tables []exposure.Table) {
	t.Helper()
	if err := n.Do(func() (err error) { tables, err = Live(saved, true); return err }); err != nil {
		t.Fatal(err)
	}
	return tables
}

var liveHost = exposure.Host{Type: func(a netip.Addr) string {
	if a == netip.MustParseAddr("192.0.2.1") || a == netip.MustParseAddr("2001:db8::1") {
		return "LOCAL"
	}
	return "UNICAST"
}}

// packet returns a packet such as "22/tcp", "22/tcp eth1", "8/icmp", or with "ip6" at the
// end one of IPv6.
func packet(t testing.TB, text string) exposure.Packet {
	t.Helper()
	words := strings.Fields(text)
	p := exposure.Packet{Family: firewall.IPv4, In: "eth0", Dst: netip.MustParseAddr("192.0.2.1"), DstType: "LOCAL"}
	var n uint16
	var proto string
	if _, err := fmt.Sscanf(words[0], "%d/%s", &n, &proto); err != nil {
		t.Fatal(err)
	}
	switch proto {
	case "tcp":
		p.Proto, p.DstPort, p.TCPFlags = 6, n, 2
	case "udp":
		p.Proto, p.DstPort = 17, n
	case "icmp":
		p.Proto, p.ICMPType = 1, 256*n
	}
	for _, w := range words[1:] {
		if w == "ip6" {
			p.Family, p.Dst = firewall.IPv6, netip.MustParseAddr("2001:db8::1")
		} else {
			p.In = w
		}
	}
	return p
}

// opened returns the sources from which a packet surely arrives, or perhaps does.
func opened(t testing.TB, tables []exposure.Table, what string) string {
	t.Helper()
	p := packet(t, what)
	sure, perhaps := exposure.Ruleset{Tables: tables}.Trace(p, exposure.All(p.Dst), liveHost, true).Open()
	show := func(s exposure.Sources) string {
		var out []string
		for _, r := range s {
			out = append(out, addressRange(r.First.AsSlice(), r.Last.AsSlice()))
		}
		return strings.Join(out, " ")
	}
	text := show(sure)
	switch text {
	case "":
		text = "none"
	case "0.0.0.0/0", "::/0":
		text = "all"
	}
	if len(perhaps) > 0 {
		text += " perhaps " + show(perhaps)
	}
	return text
}

// rulesIn returns a filter chain at input, with policy drop.
func rulesIn(family, rules string) string {
	return fmt.Sprintf("table %s t {\n chain in {\n type filter hook input priority 0; policy drop;\n%s\n }\n}\n", family, rules)
}

func TestLive(t *testing.T) {
	const open, half = "all", "0.0.0.0/1"
	pre := "table inet p {\n chain pre {\n type filter hook prerouting priority -300;\n%s\n }\n}\n"
	for _, tt := range []struct {
		name, rules string
		want        map[string]string
	}{
		{"policy", rulesIn("ip", ""), map[string]string{"22/tcp": "none", "22/tcp ip6": "all"}},
		{"a port", rulesIn("inet", "tcp dport 22 accept"), map[string]string{"22/tcp": open, "22/tcp ip6": open, "22/udp": "none", "23/tcp": "none"}},
		{"ports", rulesIn("inet", "tcp dport { 22, 80-90 } accept\nudp dport != 53 accept\ntcp dport 1000-2000 accept\ntcp dport >= 60000 accept"),
			map[string]string{"22/tcp": open, "85/tcp": open, "91/tcp": "none", "53/udp": "none", "54/udp": open, "1500/tcp": open, "60000/tcp": open, "59999/tcp": "none"}},
		{"protocols", rulesIn("inet", "meta l4proto { tcp, udp } th dport 53 accept\nip protocol icmp accept"), map[string]string{"53/tcp": open, "53/udp": open, "54/udp": "none", "8/icmp": open}},
		{"a source", rulesIn("inet", "ip saddr 10.0.0.0/12 accept\nip saddr 11.0.0.0/8 accept\nip saddr 192.0.2.7 tcp dport 22 accept"),
			map[string]string{"22/tcp": "10.0.0.0/12 11.0.0.0/8 192.0.2.7", "22/tcp ip6": "none"}},
		{"another source", rulesIn("inet", "ip saddr != 128.0.0.0/1 accept\nip6 saddr 2001:db8::/32 accept"), map[string]string{"22/tcp": half, "22/tcp ip6": "2001:db8::/32"}},
		{"a range", rulesIn("ip", "ip saddr 10.0.0.1-10.0.0.5 accept"), map[string]string{"22/tcp": "10.0.0.1-10.0.0.5"}},
		{"a destination", rulesIn("inet", "ip daddr 192.0.2.1 tcp dport 22 accept\nip daddr 192.0.2.2 tcp dport 23 accept\nip saddr 1.2.3.4 ip daddr 192.0.2.1 accept"), map[string]string{"22/tcp": open, "23/tcp": "1.2.3.4"}},
		{"a set", rulesIn("ip", "ip saddr { 1.2.3.4, 5.6.7.8 } accept"), map[string]string{"22/tcp": "1.2.3.4 5.6.7.8"}},
		{"bans", "table inet b {\nset bad {\ntype ipv4_addr; flags interval; elements = { 128.0.0.0/1 }\n}\nset one {\ntype ipv4_addr; elements = { 0.0.0.0 }\n}\nchain in {\ntype filter hook input priority -5\nip saddr @bad counter drop\nip saddr @one drop\nip saddr != @bad tcp dport 23 drop\n}\n}\n",
			map[string]string{"22/tcp": "0.0.0.1-127.255.255.255", "23/tcp": "none"}},
		{"a concatenation", "table inet c {\nset ok {\ntype ipv4_addr . inet_service; elements = { 1.2.3.4 . 22, 1.2.3.5 . 22, 1.2.3.6 . 23 }\n}\nset nets {\ntype ipv4_addr . inet_service; flags interval; elements = { 10.0.0.0/8 . 20-30, 11.0.0.0/8 . 40 }\n}\nchain in {\ntype filter hook input priority 0; policy drop\nip saddr . tcp dport @ok accept\nip saddr . tcp dport @nets accept\n}\n}\n",
			map[string]string{"22/tcp": "1.2.3.4/31 10.0.0.0/8", "23/tcp": "1.2.3.6 10.0.0.0/8", "40/tcp": "11.0.0.0/8", "41/tcp": "none"}},
		{"interfaces", rulesIn("inet", "iifname eth0 tcp dport 22 accept\niifname \"wl*\" tcp dport 22 accept\niifname { lo, \"vpn*\" } accept\niif lo tcp dport 23 accept\niifname != eth0 tcp dport 24 accept\nmeta iiftype loopback tcp dport 25 accept"),
			map[string]string{"22/tcp": open, "22/tcp wlan0": open, "22/tcp wg0": "none", "22/tcp vpn1": open, "80/tcp lo": open, "23/tcp": "none", "24/tcp": "none", "24/tcp wg0": open, "25/tcp": "none"}},
		{"states", rulesIn("inet", "ct state established,related accept\nct state new tcp dport 22 accept\nct state vmap { invalid : drop, new : jump x, established : accept }\n}\nchain x {\ntcp dport 23 accept"),
			map[string]string{"22/tcp": open, "23/tcp": open, "24/tcp": "none"}},
		{"flags", rulesIn("inet", "tcp flags & (fin|syn|rst|ack) == syn tcp dport 22 accept\ntcp flags syn tcp dport 23 accept\ntcp flags & (fin|syn) == (fin|syn) accept"), map[string]string{"22/tcp": open, "23/tcp": open, "24/tcp": "none"}},
		{"types of ICMP", rulesIn("inet", "icmp type { echo-request, time-exceeded } accept\nicmp type 13 icmp code 0 accept"), map[string]string{"8/icmp": open, "11/icmp": open, "13/icmp": open, "14/icmp": "none"}},
		{"types of destinations", rulesIn("inet", "fib daddr type local tcp dport 22 accept\nfib daddr type != local tcp dport 23 accept\nmeta pkttype host tcp dport 24 accept\nmeta pkttype { broadcast, multicast } tcp dport 25 accept"),
			map[string]string{"22/tcp": open, "23/tcp": "none", "24/tcp": open, "25/tcp": "none"}},
		{"fragments", rulesIn("ip", "ip frag-off & 0x1fff != 0 accept"), map[string]string{"22/tcp": "none"}},
		{"a map of ports", rulesIn("inet", "tcp dport vmap { 22 : accept, 23-30 : jump x, 80 : goto x }\n}\nchain x {\nip saddr 0.0.0.0/1 accept"),
			map[string]string{"22/tcp": open, "25/tcp": half, "80/tcp": half, "81/tcp": "none"}},
		{"a map of several fields", rulesIn("inet", "iifname . ip saddr . tcp dport vmap { eth0 . 1.2.3.4 . 22 : accept, eth1 . 1.2.3.5 . 22 : accept }"), map[string]string{"22/tcp": "1.2.3.4", "22/tcp eth1": "1.2.3.5"}},
		{"a map with a default", rulesIn("inet", "ip saddr vmap { 10.0.0.0/8 : drop, * : accept }"), map[string]string{"22/tcp": "0.0.0.0-9.255.255.255 11.0.0.0-255.255.255.255"}},
		{"a mark", fmt.Sprintf(pre, "ip saddr 0.0.0.0/1 meta mark set 0x10\nip saddr 0.0.0.0/2 meta mark set mark | 1") + rulesIn("inet", "meta mark & 0xff == 0x11 tcp dport 22 accept\nmeta mark 0x10 tcp dport 23 accept\nmeta mark != 0 tcp dport 24 accept\nmeta mark 0x10-0x11 tcp dport 25 accept"),
			map[string]string{"22/tcp": "0.0.0.0/2", "23/tcp": "64.0.0.0/2", "24/tcp": half, "25/tcp": half}},
		{"a mark from a map", fmt.Sprintf(pre, "meta mark set ip saddr map { 10.0.0.0/8 : 1, 11.0.0.0/8 : 2 }") + rulesIn("inet", "meta mark 2 accept"), map[string]string{"22/tcp": "11.0.0.0/8"}},
		{"a change before a match", fmt.Sprintf(pre, "meta mark 0 meta mark set 1 tcp dport 22 drop") + rulesIn("inet", "meta mark 1 accept"), map[string]string{"22/tcp": "none", "23/tcp": open}},
		{"a connection's mark", rulesIn("inet", "ct mark 0 tcp dport 22 accept\nct mark 1 accept"), map[string]string{"22/tcp": open, "23/tcp": "none"}},
		{"a connection's mark that is set", fmt.Sprintf(pre, "ct mark set 1") + rulesIn("inet", "ct mark 1 accept"), map[string]string{"23/tcp": "none perhaps 0.0.0.0/0"}},
		{"not tracked", fmt.Sprintf(pre, "tcp dport 22 notrack") + rulesIn("inet", "ct state new accept\nct state untracked ip saddr 0.0.0.0/1 accept"), map[string]string{"22/tcp": half, "23/tcp": open}},
		{"a redirect", base("ip", "tcp dport 80 redirect to :8080\ntcp dport { 81, 82 } redirect to :22") + rulesIn("inet", "tcp dport 8080 accept\nct status dnat tcp dport 22 accept"), map[string]string{"80/tcp": open, "8080/tcp": open, "81/tcp": open, "22/tcp": "none"}},
		{"DNAT", base("inet", "iifname eth0 tcp dport 80 dnat ip to 172.17.0.2:8080\ndnat ip to tcp dport map { 81 : 172.17.0.3, 82 : 172.17.0.4 }\ndnat ip to tcp dport map { 83 : 172.17.0.3 . 8083 }") +
			"table inet f {\nchain through {\ntype filter hook forward priority 0; policy drop\nip daddr 172.17.0.2 tcp dport 8080 ct original proto-dst 80 accept\nip daddr 172.17.0.3 tcp dport 81 accept\nip daddr 172.17.0.3 tcp dport 8083 ct original ip daddr 192.0.2.1 accept\n}\n}\n" + rulesIn("inet", ""),
			map[string]string{"80/tcp": open, "81/tcp": open, "82/tcp": "none", "83/tcp": open, "80/tcp ip6": "none"}},
		{"a dormant table", "table inet t {\nflags dormant\nchain in {\ntype filter hook input priority 0; policy drop\n}\n}\n", map[string]string{"22/tcp": open}},
		{"ingress", "table netdev n {\nchain in {\ntype filter hook ingress device lo priority 0\nip saddr 0.0.0.0/1 tcp dport 22 drop\nip protocol udp drop\n}\n}\n", map[string]string{"22/tcp lo": "128.0.0.0/1", "22/tcp": open, "53/udp lo": "none", "53/udp lo ip6": open}},
		{"two tables", rulesIn("ip", "ip saddr 0.0.0.0/1 accept") + "table inet u {\nchain in {\ntype filter hook input priority 5\nip saddr 0.0.0.0/2 drop\n}\n}\n", map[string]string{"22/tcp": "64.0.0.0/2"}},
		{"a limit", rulesIn("inet", "tcp dport 22 limit rate 3/minute accept\ntcp dport 23 ct count over 3 drop\nmeta hour 10:00-11:00 tcp dport 24 accept"), map[string]string{"22/tcp": "none perhaps 0.0.0.0/0", "24/tcp": "none perhaps 0.0.0.0/0"}},
		{"a set that packets fill", "table inet t {\nset s {\ntype ipv4_addr; flags dynamic, timeout; timeout 1m\n}\nchain in {\ntype filter hook input priority 0\ntcp dport 22 ip saddr @s drop\ntcp dport 23 add @s { ip saddr limit rate over 3/minute } drop\n}\n}\n", map[string]string{"22/tcp": "none perhaps 0.0.0.0/0", "23/tcp": "none perhaps 0.0.0.0/0", "24/tcp": open}},
		{"reject", rulesIn("inet", "tcp dport 22 reject\naccept"), map[string]string{"22/tcp": "none", "24/tcp": open}},
		{"an output interface", "table inet t {\nchain in {\ntype filter hook input priority 0\noifname eth1 drop\niifname eth0 jump x\n}\nchain x {\noifname != eth1 tcp dport 22 drop\n}\n}\n" + base("ip", "tcp dport 80 dnat to 172.17.0.2") + "table inet f {\nchain fw {\ntype filter hook forward priority 0; policy drop\noifname eth1 accept\n}\n}\n", map[string]string{"22/tcp": "none", "23/tcp": open, "80/tcp": "none perhaps 0.0.0.0/0"}},
	} {
		tables := readLive(t, load(t, tt.rules))
		for p, want := range tt.want {
			if got := opened(t, tables, p); got != want {
				t.Errorf("%s: %s is open from %s, want %s\n%s", tt.name, p, got, want, tt.rules)
			}
		}
	}
}

// iptablesIn returns a namespace with rules that iptables-nft loaded, and what
// iptables-save prints of them.
func iptablesIn(t testing.TB, rules, native string) (*lab.Namespace, []exposure.Table) {
	t.Helper()
	lab.Need(t, "ip", "nft", "xtables-nft-multi")
	n := lab.NewNamespace(t)
	if r := n.Run(t, lab.Command{Args: []string{"xtables-nft-multi", "iptables-restore"}, Stdin: rules}); r.Code != 0 {
		t.Fatalf("iptables-restore: %s\n%s", r.Stderr, rules)
	}
	if r := n.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: native}); r.Code != 0 {
		t.Fatalf("nft: %s\n%s", r.Stderr, native)
	}
	r := n.Run(t, lab.Command{Args: []string{"xtables-nft-multi", "iptables-save"}})
	tables, _, err := exposure.ReadSave("iptables", "ip", []byte(r.Stdout))
	if err != nil {
		t.Fatal(err)
	}
	return n, tables
}

func TestLiveIptables(t *testing.T) {
	const rules = "*filter\n:INPUT DROP [0:0]\n:FORWARD ACCEPT [0:0]\n-A INPUT -p tcp -m multiport --dports 22,80 -m conntrack --ctstate NEW -m comment --comment \"web and more\" -j ACCEPT\n" +
		"-A INPUT -p tcp --dport 23 -m addrtype --dst-type LOCAL -j ACCEPT\nCOMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p tcp --dport 81 -j REDIRECT --to-ports 80\nCOMMIT\n"
	for _, tt := range []struct {
		name, native string
		want         map[string]string
		text         string // of the first rule
	}{
		{"alone", "", map[string]string{"22/tcp": "all", "80/tcp": "all", "81/tcp": "all", "23/tcp": "all", "24/tcp": "none"}, "-m conntrack"},
		{"with a set", "add set ip filter bad { type ipv4_addr; flags interval; elements = { 128.0.0.0/1 }; }\ninsert rule ip filter INPUT ip saddr @bad counter drop\n",
			map[string]string{"22/tcp": "0.0.0.0/1", "23/tcp": "0.0.0.0/1"}, "ip saddr @bad counter drop"},
		{"with a table beside", "add table inet t\nadd chain inet t in { type filter hook input priority 0; }\nadd rule inet t in tcp dport 80 drop\n", map[string]string{"22/tcp": "all", "80/tcp": "none"}, "-m conntrack"},
		{"incompatible", "add rule ip filter FORWARD ct state invalid drop\nadd rule ip nat PREROUTING fib daddr type local\n", map[string]string{"22/tcp": "all", "80/tcp": "all", "81/tcp": "all", "23/tcp": "all", "24/tcp": "none"}, ""},
	} {
		n, saved := iptablesIn(t, rules, tt.native)
		tables := readLive(t, n, saved...)
		for p, want := range tt.want {
			if got := opened(t, tables, p); got != want {
				t.Errorf("%s: %s is open from %s, want %s", tt.name, p, got, want)
			}
		}
		for _, table := range tables {
			for _, c := range table.Chains {
				if c.Name == "INPUT" && !strings.Contains(c.Rules[0].Text, tt.text) {
					t.Errorf("%s: the first rule is %q, want %q", tt.name, c.Rules[0].Text, tt.text)
				}
				if c.Name == "INPUT" && tt.text != "" && table.Program != "iptables" {
					t.Errorf("%s: the table is of %q", tt.name, table.Program)
				}
			}
		}
	}
}

// crowd returns a ruleset of some rules and a set of some addresses.
func crowd(rules, elements int, flags string) string {
	var b strings.Builder
	address := func(i int) string { return fmt.Sprintf("%d.%d.%d.%d", 20+i>>16, i>>8&255, i&255, 7) }
	fmt.Fprintf(&b, "table inet t {\nset bad {\ntype ipv4_addr; %s\nelements = { ", flags)
	for i := range elements {
		b.WriteString(address(i) + ", ")
	}
	b.WriteString("}\n}\nchain in {\ntype filter hook input priority 0; policy drop\nip saddr @bad drop\n")
	for i := range rules {
		fmt.Fprintf(&b, "ip saddr %s tcp dport %d counter accept\n", address(i+elements), 1+i%60000)
	}
	b.WriteString("tcp dport 22 accept\n}\n}\n")
	return b.String()
}

func BenchmarkLive(b *testing.B) {
	for name, flags := range map[string]string{"addresses": "", "intervals": "flags interval"} {
		b.Run(name, func(b *testing.B) {
			n := load(b, crowd(10000, 200000, flags))
			var read, traced time.Duration
			b.ResetTimer()
			for range b.N {
				start := time.Now()
				tables := readLive(b, n)
				read += time.Since(start)
				start = time.Now()
				if sure, _ := (exposure.Ruleset{Tables: tables}).Trace(packet(b, "22/tcp"), exposure.All(netip.IPv4Unspecified()), liveHost, false).Open(); len(sure) < 200000 {
					b.Fatal(len(sure))
				}
				traced += time.Since(start)
			}
			b.ReportMetric(float64(read.Milliseconds())/float64(b.N), "ms/read")
			b.ReportMetric(float64(traced.Milliseconds())/float64(b.N), "ms/trace")
		})
	}
}

func TestLiveText(t *testing.T) {
	rules := []string{
		"tcp dport 22 accept",
		"ip saddr . tcp dport @c accept",
		"ct state established,new accept",
		"iifname { \"eth*\", \"lo\" } drop",
		"ip6 saddr fe80::/10 drop",
		"ip saddr 1.2.3.4 ip daddr 10.0.0.0/8 tcp sport 1-5 drop comment \"x y\"",
		"fib daddr type local udp dport { 53, 100-200 } reject",
		"icmp type { 8, 13 } continue",
		"iifname != \"eth0\" tcp dport != 80 return",
		"ip saddr 10.0.0.1-10.0.0.9 meta mark 0x1/0xff jump x",
		"ip frag-off != & 0x4000 == 0x0000 drop",
		"oifname != \"eth0\" drop",
		"meta hour 0x00008ca0-0x0000a8c0 drop",
	}
	source := strings.NewReplacer("meta mark 0x1/0xff", "meta mark & 0xff == 1", "ip frag-off != & 0x4000 == 0x0000", "ip frag-off & 0x4000 != 0", "meta hour 0x00008ca0-0x0000a8c0", "meta hour 10:00-12:00").Replace(strings.Join(rules, "\n"))
	n := load(t, "table inet t {\nset c {\ntype ipv4_addr . inet_service; flags interval; elements = { 10.0.0.0/8 . 20-30 }\n}\nchain x {\n}\nchain in {\ntype filter hook input priority 0\n"+source+"\n}\n}\n")
	for _, c := range readLive(t, n)[0].Chains {
		for i, r := range c.Rules {
			if r.Text != rules[i] {
				t.Errorf("rule %d is %q, want %q", i, r.Text, rules[i])
			}
		}
	}
}
