package exposure_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/netsim"
)

// rules is what the programs of one machine have loaded. An empty text is not loaded.
type rules struct {
	Save   [2]string // of iptables and ip6tables
	Legacy [2]string
	Nft    string
	IPSets string // for ipset restore
}

func (r rules) String() string {
	var b strings.Builder
	for i, text := range []string{r.IPSets, r.Save[0], r.Save[1], r.Legacy[0], r.Legacy[1], r.Nft} {
		if text != "" {
			fmt.Fprintf(&b, "# %s\n%s", []string{"ipset", "iptables", "ip6tables", "iptables-legacy", "ip6tables-legacy", "nft"}[i], text)
		}
	}
	return b.String()
}

// generator writes rules as administrators and programs do. Each rule has a unique
// comment, and in nftables a counter.
type generator struct {
	*rand.Rand
	family  firewall.Family
	unknown bool // also matches that the model does not know
	rule    int
}

// generate returns the rules of a number. Every fourth has unknown matches.
func generate(number uint64) rules {
	g := &generator{Rand: rand.New(rand.NewPCG(17, number)), unknown: number%4 == 3}
	var r rules
	use := []int{1, 1, 2, 2, 4, 4, 3, 5, 6, 7}[g.IntN(10)] // a set of programs
	if use&3 != 0 {
		r.IPSets = ipsets
	}
	for i, f := range firewall.Families {
		g.family = f
		if use&1 != 0 {
			r.Save[i] = g.save()
		}
		if use&2 != 0 {
			r.Legacy[i] = g.save()
		}
	}
	if use&4 != 0 {
		for i := range 1 + g.IntN(2) {
			r.Nft += g.table(i)
		}
		if g.one(4) {
			r.Nft += g.ingress()
		}
	}
	return r
}

func (g *generator) one(n int) bool              { return g.IntN(n) == 0 }
func (g *generator) pick(list ...string) string  { return list[g.IntN(len(list))] }
func (g *generator) by(ipv4, ipv6 string) string { return firewall.ByFamily(g.family, ipv4, ipv6) }
func (g *generator) not() string                 { return map[bool]string{true: "! "}[g.one(5)] }
func (g *generator) port() string                { return fmt.Sprint(ports[g.IntN(len(ports))]) }
func (g *generator) network() string             { return g.pick(networks[g.family]...) }
func (g *generator) own() string {
	return g.pick(g.by("192.0.2.1", "2001:db8::1"), g.by("10.1.0.1", "fd00:1::1"))
}
func (g *generator) several(sep string) string {
	return g.port() + sep + g.pick("1-21", "8000-8100", "60000-65535")
}
func (g *generator) comment() string { g.rule++; return fmt.Sprintf("r%d", g.rule) }

var (
	ports    = []uint16{21, 22, 53, 80, 443, 3306, 8080, 9000, 60001}
	networks = map[firewall.Family][]string{
		firewall.IPv4: {"198.51.100.7", "198.51.100.0/24", "203.0.113.64/26", "10.0.0.0/8", "172.16.0.0/12", "45.0.0.0/8", "128.0.0.0/1"},
		firewall.IPv6: {"2001:db8:7::7", "2001:db8:7::/48", "2001:db8:9:40::/58", "fd00::/8", "2a01::/16", "2a00::/12", "8000::/1"},
	}
	interfaces = []firewall.Interface{
		{Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")}},
		{Name: "wg0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.1.0.1/16"), netip.MustParsePrefix("fd00:1::1/64")}},
	}
)

// ipsets are the sets that rules look up.
var ipsets = func() string {
	lines := []string{"create ports bitmap:port range 1-65535", "add ports 80", "add ports 8000-8100"}
	for i, f := range firewall.Families {
		n, inet, own := networks[f], []string{"inet", "inet6"}[i], []string{"192.0.2.1", "2001:db8::1"}[i]
		of := func(kind string, elements ...string) {
			name := strings.NewReplacer(":", "", ",", "").Replace(kind) + "-" + inet
			lines = append(lines, "create "+name+" "+kind+" family "+inet)
			for _, e := range elements {
				lines = append(lines, "add "+name+" "+e)
			}
		}
		of("hash:ip", n[0])
		of("hash:net", n[1], n[0]+" nomatch", n[2], n[3], n[6]+" nomatch")
		of("hash:ip,port", n[0]+",tcp:80", n[0]+",udp:53", own+",tcp:22-25")
		of("hash:net,port", n[1]+",tcp:80", n[0]+",tcp:80 nomatch", n[3]+",udp:50-60", n[4]+",tcp:443")
		of("hash:ip,port,net", own+",tcp:80,"+n[1], own+",tcp:22,"+n[3])
		of("hash:ip,port,ip", own+",tcp:443,"+n[0])
		of("hash:net,iface", n[1]+",eth0", n[3]+",wg0")
		lines = append(lines, "create list-"+inet+" list:set", "add list-"+inet+" haship-"+inet, "add list-"+inet+" hashnet-"+inet)
	}
	lines = append(lines, "create haship24 hash:ip netmask 24", "add haship24 198.51.100.9", "create bitmapip bitmap:ip range 198.51.100.0/24 netmask 30", "add bitmapip 198.51.100.4")
	return strings.Join(lines, "\n") + "\n"
}()

// ipset returns a match with a set.
func (g *generator) ipset() string {
	own := g.by("inet", "inet6")
	set := g.pick("ports dst", "haship-O src", "hashnet-O src", "hashnet-O dst", "hashipport-O src,dst", "hashipport-O dst,dst", "hashnetport-O src,dst", "hashnetport-O src",
		"hashipportnet-O dst,dst,src", "hashipportip-O dst,dst,src", "hashnetiface-O src,src", "list-O src", "list-O src,dst")
	if g.family == firewall.IPv4 && g.one(5) {
		set = g.pick("haship24 src", "bitmapip src")
	}
	return "-m set " + g.not() + "--match-set " + strings.ReplaceAll(set, "-O", "-"+own)
}

// save returns iptables-restore's input.
func (g *generator) save() string {
	var b strings.Builder
	for _, t := range []struct {
		name, hooks string
		odds        int
	}{{"raw", "PREROUTING", 4}, {"mangle", "PREROUTING INPUT", 3}, {"nat", "PREROUTING", 3}, {"filter", "INPUT", 1}, {"security", "INPUT", 8}} {
		if !g.one(t.odds) {
			continue
		}
		fmt.Fprintf(&b, "*%s\n", t.name)
		var chains []string
		for _, h := range strings.Fields(t.hooks) {
			policy := "ACCEPT"
			if t.name == "filter" {
				policy = g.pick("ACCEPT", "ACCEPT", "DROP")
			}
			fmt.Fprintf(&b, ":%s %s [0:0]\n", h, policy)
			chains = append(chains, h)
		}
		first := len(chains)
		for i := range g.IntN(4) {
			chains = append(chains, fmt.Sprintf("%s-%d", g.pick("f2b", "ufw", "LOGDROP"), i))
			fmt.Fprintf(&b, ":%s - [0:0]\n", chains[first+i])
		}
		for i, c := range chains {
			if t.name == "filter" && i == 0 && g.one(2) {
				fmt.Fprintf(&b, "-A %s -m conntrack --ctstate RELATED,ESTABLISHED -m comment --comment %s -j ACCEPT\n", c, g.comment())
			}
			for range 1 + g.IntN(6) {
				below := chains[max(i+1, first):]
				fmt.Fprintf(&b, "-A %s%s -m comment --comment %s%s\n", c, g.matches(t.name), g.comment(), g.target(t.name, c, below))
			}
		}
		b.WriteString("COMMIT\n")
	}
	return b.String()
}

// matches returns matches of iptables; a rule of the nat table has tcp or udp.
func (g *generator) matches(table string) string {
	icmp := g.by("icmp", "ipv6-icmp")
	proto := g.pick("", "", "tcp", "tcp", "tcp", "udp", icmp, "! tcp")
	if table == "nat" {
		proto = g.pick("tcp", "udp")
	}
	var list []string
	switch proto {
	case "":
	case "! tcp":
		list = append(list, "! -p tcp")
	case icmp:
		list = append(list, "-p "+icmp)
		if g.one(2) {
			list = append(list, g.by("-m icmp "+g.not()+"--icmp-type "+g.pick("8", "13", "any"), "-m icmp6 "+g.not()+"--icmpv6-type "+g.pick("128", "129")))
		}
	default:
		list = append(list, "-p "+proto)
		several := strings.ReplaceAll(g.several(","), "-", ":")
		list = append(list, g.pick(
			fmt.Sprintf("-m %s %s--dport %s", proto, g.not(), g.port()), fmt.Sprintf("-m %s --dport %s", proto, g.port()),
			fmt.Sprintf("-m %s %s--dport %s", proto, g.not(), g.pick("1:1023", "8000:9000", "60000:")),
			fmt.Sprintf("-m multiport %s--dports %s", g.not(), several), fmt.Sprintf("-m multiport %s--ports %s", g.not(), several),
			fmt.Sprintf("-m %s %s--sport 1024:", proto, g.not()), "-m "+proto))
		if proto == "tcp" && g.one(6) {
			list = append(list, g.pick("-m tcp "+g.not()+"--syn", "-m tcp "+g.not()+"--tcp-flags SYN,ACK SYN,ACK", "-m tcp --tcp-flags ALL NONE"))
		}
	}
	few := []string{
		g.not() + "-s " + g.network(), "-s " + g.network(), "-s " + g.network(), g.not() + "-d " + g.own(), g.not() + "-i " + g.pick("eth0", "wg0", "wg+", "tun0"),
		"-m conntrack " + g.not() + "--ctstate " + g.pick("NEW", "NEW,ESTABLISHED", "INVALID", "DNAT", "UNTRACKED,NEW"), "-m conntrack " + g.not() + "--ctorigdstport " + g.port(),
		"-m state " + g.not() + "--state NEW", "-m mark " + g.not() + "--mark " + g.pick("0x1", "0x0/0x2", "0x3/0xff", "0x2/0x2"),
		"-m conntrack " + g.pick("--ctdir ORIGINAL", "--ctproto tcp", "! --ctproto udp", "--ctorigdst "+g.own(), "--ctorigsrc "+g.network(), "--ctstatus NONE", "! --ctstatus ASSURED", "--ctstate NEW --ctorigdstport "+g.port(), "--ctstate NEW,UNTRACKED --ctorigdst "+g.own()),
		"-m connmark " + g.not() + "--mark 0", "-m pkttype --pkt-type host", "-m addrtype --dst-type LOCAL --limit-iface-in", "-m addrtype --src-type UNICAST",
		g.ipset(), g.ipset(), g.ipset(),
		"-m addrtype " + g.not() + "--dst-type LOCAL", "-m iprange " + g.not() + "--src-range " + g.by("198.51.100.5-198.51.100.200", "2001:db8:7::5-2001:db8:7::ffff"),
	}
	if g.unknown && g.one(3) {
		few = []string{"-m length " + g.not() + "--length 0:50", g.by("-m ttl --ttl-lt 65", "-m hl --hl-lt 65"), "-m u32 --u32 0&0xFF=0x1", "-m statistic --mode random --probability 0.5", "-m limit --limit 6/min"}
	}
	for range g.IntN(3) {
		m := g.pick(few...)
		option := strings.Fields(strings.TrimPrefix(m, "! "))[0] + " " // once in a rule, but for -m
		if !slices.ContainsFunc(list, func(old string) bool {
			return old == m || option != "-m " && strings.HasPrefix(strings.TrimPrefix(old, "! "), option)
		}) {
			list = append(list, m)
		}
	}
	if len(list) == 0 && !g.one(6) {
		list = append(list, g.pick(few...))
	}
	return " " + strings.Join(list, " ")
}

// target returns a target of iptables; below are the chains to call.
func (g *generator) target(table, chain string, below []string) string {
	targets := []string{" -j ACCEPT", " -j ACCEPT", " -j ACCEPT", " -j DROP", " -j RETURN", "", " -j LOG"}
	switch table {
	case "raw":
		targets = []string{" -j CT --notrack", " -j NOTRACK", " -j ACCEPT", " -j RETURN", " -j DROP"}
	case "mangle":
		mark := g.pick("--set-xmark 0x1/0xffffffff", "--set-xmark 0x2/0x2", "--or-mark 0x4", "--and-mark 0xfe", "--xor-mark 0x3", "--set-mark 0x3/0xf")
		targets = []string{" -j MARK " + mark, " -j MARK " + mark, " -j MARK " + mark, " -j ACCEPT", " -j RETURN", " -j DROP", " -j CONNMARK --save-mark", " -j CONNMARK --restore-mark", " -j CONNMARK --set-mark 1"}
	case "nat":
		to := g.by("192.0.2.1:", "[2001:db8::1]:") + g.port()
		targets = []string{" -j REDIRECT --to-ports " + g.port(), " -j DNAT --to-destination " + to, " -j REDIRECT", " -j RETURN", " -j ACCEPT",
			" -j DNAT --to-destination " + g.by("10.9.9.9", "fd00:9::9")}
	case "filter":
		targets = append(targets, " -j REJECT")
	}
	if len(below) > 0 && g.one(3) {
		return g.pick(" -j ", " -j ", " -g ") + g.pick(below...)
	}
	return g.pick(targets...)
}

// table returns a table of nftables. Its hooks have priorities of their own: the order of
// equal ones is not visible across programs.
func (g *generator) table(i int) string {
	family := g.pick("inet", "inet", "ip", "ip6")
	families := map[string][]firewall.Family{"inet": firewall.Families[:], "ip": {firewall.IPv4}, "ip6": {firewall.IPv6}}[family]
	var b strings.Builder
	fmt.Fprintf(&b, "table %s t%d {\n", family, i)
	for _, g.family = range families {
		kind := g.by("ipv4_addr", "ipv6_addr")
		some := networks[g.family][1+g.IntN(2):]
		fmt.Fprintf(&b, "set nets%s {\ntype %s\nflags interval\nelements = { %s }\n}\n", kind[:4], kind, strings.Join(some[:3], ", "))
		fmt.Fprintf(&b, "set pairs%s {\ntype %s . inet_service\nflags interval\nelements = { %s . %s, %s . 8000-9000 }\n}\n", kind[:4], kind, some[0], g.port(), some[2])
	}
	fmt.Fprintf(&b, "set ports {\ntype inet_service\nflags interval\nelements = { %s, 8000-8100 }\n}\n", g.pick("22, 80", "443", "21-53"))
	b.WriteString("map verdicts {\ntype inet_service : verdict\nelements = { 22 : accept, 443 : drop, 9000 : return }\n}\n")
	var leaves []string
	for i := range g.IntN(3) {
		leaves = append(leaves, fmt.Sprint("leaf", i))
	}
	chain := func(name, header string, below []string) {
		fmt.Fprintf(&b, "chain %s {\n%s", name, header)
		for range 1 + g.IntN(6) {
			g.family = families[g.IntN(len(families))]
			fmt.Fprintf(&b, "%s comment \"%s\"\n", g.statement(name, family == "inet", below), g.comment())
		}
		b.WriteString("}\n")
	}
	for i := len(leaves) - 1; i >= 0; i-- { // called chains first
		chain(leaves[i], "", leaves[i+1:])
	}
	for _, c := range []struct {
		name, kind string
		priority   int
		odds       int
	}{{"early", "filter hook prerouting", -310, 4}, {"marks", "filter hook prerouting", -160, 3}, {"natpre", "nat hook prerouting", -110, 3}} {
		if g.one(c.odds) {
			chain(c.name, fmt.Sprintf("type %s priority %d; policy accept;\n", c.kind, c.priority+i), nil)
		}
	}
	at := 4*g.IntN(7) - 10 + i
	chain("input", fmt.Sprintf("type filter hook input priority %d; policy %s;\n", at, g.pick("accept", "accept", "drop")), leaves)
	if g.one(4) {
		chain("late", fmt.Sprintf("type filter hook input priority %d; policy accept;\n", []int{at, 40 + i}[g.IntN(2)]), leaves)
	}
	b.WriteString("}\n")
	return b.String()
}

// ingress returns a table that drops packets as they arrive.
func (g *generator) ingress() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table netdev early {\nchain in {\ntype filter hook ingress device %s priority -500; policy accept;\n", g.pick(`"eth0"`, `"wg0"`))
	for range 1 + g.IntN(4) {
		g.family = firewall.Families[g.IntN(2)]
		fmt.Fprintf(&b, "%s counter %s comment \"%s\"\n", g.pick("tcp dport "+g.port(), g.by("ip", "ip6")+" saddr "+g.network(), g.by("ip", "ip6")+" saddr { "+g.network()+" } udp dport "+g.port(),
			"meta l4proto icmp", "tcp dport { "+g.several(", ")+" }"), g.pick("drop", "drop", "accept", "meta mark set 1"), g.comment())
	}
	return b.String() + "}\n}\n"
}

// statement returns a rule of nftables without its comment.
func (g *generator) statement(chain string, inet bool, below []string) string {
	ip, kind, is := g.by("ip", "ip6"), g.by("ipv4", "ipv6"), g.pick("", "", "", "!= ")
	proto := g.pick("tcp", "tcp", "udp", "meta l4proto { tcp, udp } th")
	if chain == "natpre" {
		proto = g.pick("tcp", "udp")
	}
	list := []string{
		fmt.Sprintf("%s dport %s%s", proto, is, g.port()), fmt.Sprintf("%s dport %s{ %s }", proto, is, g.several(", ")), fmt.Sprintf("%s dport %s@ports", proto, is),
		fmt.Sprintf("%s dport %s8000-9000", proto, is), fmt.Sprintf("%s sport >= 1024", proto),
		fmt.Sprintf("%s saddr %s%s", ip, is, g.network()), fmt.Sprintf("%s saddr %s@nets%s", ip, is, kind), fmt.Sprintf("%s saddr { %s }", ip, g.network()),
		fmt.Sprintf("%s saddr . tcp dport %s@pairs%s", ip, is, kind), fmt.Sprintf("%s saddr . %s dport { %s . %s }", ip, g.pick("tcp", "udp"), g.network(), g.port()),
		fmt.Sprintf("%s daddr %s%s", ip, is, g.own()), "meta l4proto " + is + g.pick("tcp", "{ tcp, udp }"), "iifname " + is + g.pick(`"eth0"`, `"wg*"`, `{ "wg0", "tun1" }`),
		"ct state " + is + g.pick("new", "{ new, established }", "established,related", "invalid", "untracked"), "meta l4proto tcp ct original proto-dst " + g.port(), "ct status dnat",
		"meta mark " + is + g.pick("1", "3", "{ 1, 4-7 }"), "meta mark and 0x2 == 0x2", "fib daddr type local", g.by("icmp type echo-request", "icmpv6 type { echo-request, echo-reply }"),
		g.by("ip protocol ", "ip6 nexthdr ") + is + g.pick("tcp", "udp"), "iif " + is + "wg0", fmt.Sprintf("iifname . %s dport { eth0 . %s, wg0 . 22 }", g.pick("tcp", "udp"), g.port()), "meta pkttype host",
		fmt.Sprintf("%s daddr . tcp dport %s{ %s . %s }", ip, is, g.own(), g.port()), ip + " saddr " + is + g.by("198.51.100.5-198.51.100.200", "2001:db8:7::5-2001:db8:7::ffff"), ip + " saddr & " + g.by("255.0.0.0 == 10.0.0.0", "ffff:: == 2a01::"),
		"tcp flags syn / syn,rst,ack", "tcp flags != syn / syn,rst,ack", "tcp flags { syn, syn | ack }", "ct mark 0", "ct mark != 0", "ct direction original", "ct protocol tcp", "ct status & dnat == 0", "ct status != dnat", fmt.Sprintf("ct original %s saddr %s", ip, g.network()), "meta mark . tcp dport { 1 . 22, 0 . " + g.port() + " }", proto + " dport < 1024",
		"tcp flags & (syn | ack) == syn", "tcp flags " + is + "syn",
	}
	if inet {
		list = append(list, "meta nfproto "+is+kind)
	}
	first := list
	if chain == "natpre" {
		first = list[:4]
	}
	text := g.pick(first...)
	transport := regexp.MustCompile("tcp|udp|th |icmp")
	if m := g.pick(list...); g.one(3) && strings.Fields(m)[0] != strings.Fields(text)[0] && !(transport.MatchString(m) && transport.MatchString(text)) {
		text += " " + m
	}
	if g.unknown && g.one(5) {
		text += " " + g.pick(ip+" "+g.by("length", "length")+" < 60", "meta length 1-50", "limit rate 6/minute", "numgen random mod 2 0", "meta random < 1000000000")
	}
	text += " counter "
	if len(below) > 0 && g.one(4) {
		return text + g.pick("jump ", "jump ", "goto ") + g.pick(below...)
	}
	switch {
	case chain == "early":
		return text + g.pick("notrack", "notrack", "accept", "drop", "return")
	case chain == "marks" || chain != "natpre" && g.one(8):
		return text + g.pick("meta mark set 1", "meta mark set 3", "meta mark set meta mark or 0x2", "meta mark set meta mark and 0xfe", "meta mark set meta mark xor 0x5")
	case chain == "natpre":
		to := []string{"redirect to :" + g.port(), "redirect", "accept", "return"}
		if g.one(4) { // a counter would count what the map lacks
			return fmt.Sprintf("meta l4proto %[1]s redirect to :%[1]s dport map { %[2]s : %[3]s, 8000-8100 : 443 }", g.pick("tcp", "udp"), g.pick("80", "22"), g.port())
		}
		if !inet { // there it would match both families, and translate one
			to = append(to, "dnat to "+g.by("192.0.2.1:", "[2001:db8::1]:")+g.port(), "dnat to "+g.by("10.9.9.9", "fd00:9::9"))
		}
		return text + g.pick(to...)
	case g.one(6):
		verdict := g.pick(append(below, "drop", "return")...)
		if slices.Contains(below, verdict) {
			verdict = "jump " + verdict
		}
		return fmt.Sprintf(g.pick("tcp dport vmap { 22 : accept, 61000-65535 : %[1]s, 80 : drop }", "ct state vmap { established : accept, invalid : drop, new : %[1]s }", "iifname vmap { wg0 : %[1]s, lo : accept }",
			"%[2]s saddr vmap { %[3]s : %[1]s }", "%[2]s saddr . tcp dport vmap { %[3]s . 80 : accept, %[3]s . 8080 : %[1]s }", "iifname . udp dport vmap { eth0 . 53 : %[1]s }", "meta mark vmap { 1 : %[1]s, 3 : accept }", "tcp dport vmap @verdicts%.0[1]s"),
			verdict, ip, g.network())
	}
	return text + g.pick("accept", "accept", "accept", "drop", "reject", "return", "continue")
}

// packets returns first packets of connections, each from its own source port.
func (g *generator) packets(count int) []firewall.Packet {
	var list []firewall.Packet
	for n := range count {
		g.family = firewall.Families[g.IntN(2)]
		i := interfaces[g.IntN(2)]
		p := firewall.Packet{In: i.Name, HopLimit: 64, Src: g.source(), Dst: netip.MustParseAddr(g.own()), SrcPort: uint16(1 + n), DstPort: ports[g.IntN(len(ports))] + uint16(g.IntN(2))}
		if g.one(3) {
			p.SrcPort += 1023
		}
		switch g.IntN(5) {
		case 0:
			p.Proto, p.SrcPort, p.DstPort = firewall.ICMP, 0, 0
			p.ICMPType = firewall.ByFamily[uint8](g.family, 8, 128)
			if g.family == firewall.IPv6 {
				p.Proto = firewall.ICMPv6
			}
		case 1:
			p.Proto = firewall.UDP
		default:
			p.Proto, p.Flags = firewall.TCP, uint8(firewall.SYN)
		}
		p.State = netsim.Unprovoked(p)
		list = append(list, p)
	}
	return list
}

// source returns an address in a network that the rules name, or just outside.
func (g *generator) source() netip.Addr {
	n := g.network()
	a, err := netip.ParseAddr(n)
	if err != nil {
		a = netip.MustParsePrefix(n).Addr()
	}
	if g.one(4) && !a.Prev().IsLoopback() { // the host would answer itself
		return a.Prev()
	}
	for range g.IntN(9) {
		a = a.Next()
	}
	return a
}
