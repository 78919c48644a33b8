package exposure

import (
	"cmp"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// option adds the match of an option, and reports whether that is modelled.
func (p *ruleReader) option(o xoption) bool {
	value := strings.Join(o.args, " ")
	m, ok := Match{Not: o.not}, true
	switch o.name {
	case "-s", "-d", "--src-range", "--dst-range":
		if m.Field = Destination; o.name == "-s" || o.name == "--src-range" {
			m.Field = Source
		}
		if len(o.name) == 2 {
			m.Addrs, ok = p.networks(value)
		} else {
			m.Addrs, ok = p.span(value)
		}
	case "-i", "-o":
		m, ok = device(o, value, m)
	case "-f": // the first packet is not a later fragment
		m.Field, ok = Any, len(o.args) == 0
	case "-p":
		m.Field = Protocol
		m.Numbers, ok = protocol(strings.ToLower(value))
	case "--sport", "--source-port", "--sports", "--source-ports":
		m.Field = SourcePort
		m.Numbers, ok = ports(value)
	case "--dport", "--destination-port", "--dports", "--destination-ports":
		m.Field = DestinationPort
		m.Numbers, ok = ports(value)
	case "--ports", "--port":
		n, known := ports(value)
		m.Field, m.Of, ok = Any, [][]Match{{{Field: DestinationPort, Numbers: n}}, {{Field: SourcePort, Numbers: n}}}, known
	default:
		return p.moduleOption(o, value, m)
	}
	p.checked(o, m, ok)
	return true
}

// checked adds a match, or an unknown one if its value is not known. It omits a match
// of all protocols or of all source ports, which would only seem to depend on the
// client's choice of port.
func (p *ruleReader) checked(o xoption, m Match, ok bool) {
	all := !m.Not && len(m.Numbers) == 1 && (m.Field == SourcePort && m.Numbers[0] == Span{0, 65535} || m.Field == Protocol && m.Numbers[0] == Span{0, 255})
	switch {
	case !ok:
		p.unknown(o.text)
	case !all:
		p.add(m)
	}
}

// device returns the match of an interface.
func device(o xoption, value string, m Match) (Match, bool) {
	prefix, any := strings.CutSuffix(value, "+")
	m.Field, m.Names = Interface, []string{value}
	if any {
		m.Names[0] = prefix + "*"
	}
	if o.name == "-o" {
		m.Field = OutInterface
	}
	return m, value != "" && !strings.HasSuffix(prefix, "*")
}

// moduleOption is [ruleReader.option] for options that only one match has.
func (p *ruleReader) moduleOption(o xoption, value string, m Match) bool {
	ok := true
	switch o.name {
	case "--comment":
		return true
	case "--syn":
		m.Field, m.Mask, m.Numbers, ok = TCPFlags, 1|2|4|16, []Span{{2, 2}}, len(o.args) == 0
	case "--tcp-flags":
		if ok = len(o.args) == 2; ok {
			mask, ok1 := flags(o.args[0])
			set, ok2 := flags(o.args[1])
			m.Field, m.Mask, m.Numbers, ok = TCPFlags, mask, []Span{{set, set}}, ok1 && ok2
		}
	case "--icmp-type", "--icmpv6-type":
		m.Field = ICMPType
		m.Numbers, ok = icmpTypes(strings.ToLower(value), p.family == "ip6")
	case "--state", "--ctstate":
		m.Field, m.Names = State, p.states(value)
		p.tracked.state = p.tracked.state || o.name == "--ctstate"
	case "--mark":
		if p.module != "mark" {
			return false
		}
		v, mask, known := masked(value)
		m.Field, m.Mask, m.Numbers, ok = Mark, mask, []Span{{v, v}}, known
	case "--pkt-type":
		m.Field = DestinationType
		m.Names, ok = packetTypes()[strings.ToLower(value)]
	case "--dst-type", "--src-type":
		m, ok = p.addressType(o, value, m)
		ok = ok && !p.limited()
	default:
		if p.module != "conntrack" || !strings.HasPrefix(o.name, "--ct") {
			return false
		}
		if m, ok = p.connection(o.name, value, m); ok {
			p.tracked.rest = append(p.tracked.rest, m)
			return true
		}
	}
	p.checked(o, m, ok)
	return true
}

// packetTypes lists the destination types for each packet type.
var packetTypes = sync.OnceValue(func() map[string][]string {
	return map[string][]string{"unicast": {"LOCAL", "UNICAST"}, "host": {"LOCAL", "UNICAST"}, "broadcast": {"BROADCAST"}, "multicast": {"MULTICAST"}}
})

// limited reports whether an option of addrtype follows that limits it to an interface.
func (p *ruleReader) limited() bool {
	for _, w := range p.words {
		if w.text == "-m" || w.text == "-j" {
			return false
		}
		if strings.HasPrefix(w.text, "--limit-iface-") {
			return true
		}
	}
	return false
}

// addressType returns the match of an option of addrtype. An outside source is never
// a local address.
func (p *ruleReader) addressType(o xoption, value string, m Match) (Match, bool) {
	types := strings.Split(strings.ToUpper(value), ",")
	if o.name == "--dst-type" {
		m.Field, m.Names = DestinationType, types
		for _, t := range types {
			if !slices.Contains([]string{"LOCAL", "BROADCAST", "MULTICAST", "UNICAST", "ANYCAST"}, t) {
				return m, false // depends on routes
			}
		}
		return m, true
	}
	m.Field = Source
	multicast := Of(netip.MustParsePrefix("ff00::/8"))
	var broadcast Sources
	if p.family == "ip" {
		multicast = Of(netip.MustParsePrefix("224.0.0.0/4"))
		broadcast = Of(netip.MustParsePrefix("0.0.0.0/8"), netip.MustParsePrefix("255.255.255.255/32"))
	}
	for _, t := range types {
		switch t {
		case "LOCAL", "ANYCAST":
		case "MULTICAST":
			m.Addrs = Union(m.Addrs, multicast)
		case "BROADCAST":
			m.Addrs = Union(m.Addrs, broadcast)
		case "UNICAST":
			m.Addrs = Union(m.Addrs, All(multicast[0].First).Without(Union(multicast, broadcast)))
		default:
			return m, false
		}
	}
	return m, true
}

// states returns the states of an option. The table raw comes before conntrack, where each
// packet counts as invalid.
func (p *ruleReader) states(value string) []string {
	names := strings.Split(strings.ToUpper(value), ",")
	if p.table.Name != "raw" {
		return names
	}
	var out []string
	for _, n := range names {
		switch n {
		case "INVALID":
			out = append(out, "NEW", "ESTABLISHED", "RELATED", "INVALID")
		case "UNTRACKED":
			out = append(out, n)
		}
	}
	return out
}

// connection returns the match of an option of conntrack.
func (p *ruleReader) connection(name, value string, m Match) (Match, bool) {
	ok := true
	switch name {
	case "--ctproto":
		m.Field = Protocol
		m.Numbers, ok = protocol(strings.ToLower(value))
	case "--ctstatus": // the connection is not yet confirmed
		m.Field = Any
		for _, s := range strings.Split(strings.ToUpper(value), ",") {
			if s == "DNAT" || s == "SNAT" {
				m.Field, m.Names = State, append(m.Names, s)
			}
		}
	case "--ctdir":
		m.Field, m.Not = Any, m.Not != (strings.ToUpper(value) == "ORIGINAL")
		ok = slices.Contains([]string{"ORIGINAL", "REPLY"}, strings.ToUpper(value))
	case "--ctorigsrc", "--ctrepldst":
		m.Field = Source
		m.Addrs, ok = p.networks(value)
	case "--ctorigdst":
		m.Field = OriginalDestination
		m.Addrs, ok = p.networks(value)
	case "--ctreplsrc": // the source of replies is the destination after DNAT
		m.Field = Destination
		m.Addrs, ok = p.networks(value)
	case "--ctorigsrcport", "--ctrepldstport":
		m.Field = SourcePort
		m.Numbers, ok = ports(value)
	case "--ctorigdstport":
		m.Field = OriginalPort
		m.Numbers, ok = ports(value)
	case "--ctreplsrcport":
		m.Field = DestinationPort
		m.Numbers, ok = ports(value)
	default:
		ok = false
	}
	return m, ok
}

// networks returns the addresses of a list: "10.0.0.0/8,192.0.2.1".
func (p *ruleReader) networks(list string) (Sources, bool) {
	var out Sources
	for _, part := range strings.Split(list, ",") {
		n, ok := network(part)
		if !ok || n.Addr().Is4() != (p.family == "ip") {
			return nil, false
		}
		out = append(out, Range{n.Addr(), last(n)})
	}
	if len(out) > 1 {
		out = Union(out)
	}
	return out, true
}

// network returns a network, as "10.0.0.0/8", "10.0.0.0/255.0.0.0" or "10.1.2.3".
func network(text string) (netip.Prefix, bool) {
	if text == "0/0" {
		text = "0.0.0.0/0"
	}
	addr, mask, found := strings.Cut(text, "/")
	a, err := netip.ParseAddr(addr)
	if err != nil || a.Zone() != "" {
		return netip.Prefix{}, false
	}
	bits := a.BitLen()
	if found {
		if bits, err = strconv.Atoi(mask); err != nil {
			m, err := netip.ParseAddr(mask)
			if err != nil || m.BitLen() != a.BitLen() {
				return netip.Prefix{}, false
			}
			ones, size := net.IPMask(m.AsSlice()).Size()
			if size == 0 {
				return netip.Prefix{}, false
			}
			bits = ones
		}
	}
	n, err := a.Prefix(bits)
	return n, err == nil
}

// span returns the addresses of a range: "10.0.0.1-10.0.0.9".
func (p *ruleReader) span(text string) (Sources, bool) {
	first, end, found := strings.Cut(text, "-")
	if !found {
		end = first
	}
	a, err1 := netip.ParseAddr(first)
	b, err2 := netip.ParseAddr(end)
	if err1 != nil || err2 != nil || a.Is4() != (p.family == "ip") || b.Is4() != a.Is4() || a.Zone()+b.Zone() != "" {
		return nil, false
	}
	if a.Compare(b) > 0 {
		return nil, true
	}
	return Sources{{a, b}}, true
}

// destination returns the new destination of DNAT: "10.0.0.1-10.0.0.9:80-90".
func destination(text string) (Translation, bool) {
	t := Translation{Known: true}
	addrs, port := text, ""
	if inside, after, ok := strings.Cut(strings.TrimPrefix(text, "["), "]"); ok {
		addrs, port = inside, strings.TrimPrefix(after, ":")
	} else if strings.Count(text, ":") == 1 {
		addrs, port, _ = strings.Cut(text, ":")
	}
	if addrs != "" {
		first, end, found := strings.Cut(addrs, "-")
		a, err := netip.ParseAddr(strings.Trim(first, "[]"))
		if err != nil {
			return Translation{}, false
		}
		t.To, t.Known = a, !found || end == first
	}
	if port != "" {
		first, end, found := strings.Cut(port, "-")
		n, ok := ports(first)
		if !ok || len(n) != 1 {
			return Translation{}, false
		}
		t.Port, t.Known = uint16(n[0].First), t.Known && (!found || end == first)
	}
	return t, true
}

// ports returns the ports of a list: "22,80:90".
func ports(list string) ([]Span, bool) {
	var out []Span
	number := func(s string, empty uint32) (uint32, bool) {
		if s == "" {
			return empty, true
		}
		if n, ok := services()[s]; ok {
			return n, true
		}
		n, err := strconv.ParseUint(s, 0, 16)
		return uint32(n), err == nil
	}
	for _, part := range strings.Split(list, ",") {
		first, end, found := strings.Cut(part, ":")
		if part == "" {
			return nil, false
		}
		a, ok1 := number(first, 0)
		b, ok2 := number(cmp.Or(end, map[bool]string{false: first}[found]), 65535)
		if !ok1 || !ok2 {
			return nil, false
		}
		out = append(out, Span{a, b})
	}
	return out, true
}

// services lists ports by the names that files use. iptables-save prints numbers.
var services = sync.OnceValue(func() map[string]uint32 {
	return map[string]uint32{"ftp-data": 20, "ftp": 21, "ssh": 22, "telnet": 23, "smtp": 25, "domain": 53, "bootps": 67, "bootpc": 68, "tftp": 69,
		"http": 80, "www": 80, "pop3": 110, "sunrpc": 111, "ntp": 123, "imap": 143, "imap2": 143, "snmp": 161, "ldap": 389, "https": 443, "microsoft-ds": 445,
		"submission": 587, "imaps": 993, "pop3s": 995, "mysql": 3306, "postgresql": 5432}
})

// ProtocolNumber returns the number of a protocol that iptables prints by number or
// name. It returns 0 for an unknown name.
func ProtocolNumber(printed string) uint8 {
	n, ok := protocol(printed)
	if !ok || len(n) != 1 || n[0].First != n[0].Last {
		return 0
	}
	return uint8(n[0].First)
}

// protocol returns the number of a protocol.
func protocol(name string) ([]Span, bool) {
	n, ok := protocols()[name]
	if name == "all" || name == "0" || name == "ip" {
		return []Span{{0, 255}}, true
	}
	if !ok {
		number, err := strconv.ParseUint(name, 0, 8)
		n, ok = uint32(number), err == nil
	}
	return []Span{{n, n}}, ok
}

// protocols lists the names of protocols, and their aliases.
var protocols = sync.OnceValue(func() map[string]uint32 {
	return map[string]uint32{"icmp": 1, "igmp": 2, "ggp": 3, "ipencap": 4, "ipv4": 4, "ipip": 4, "tcp": 6, "egp": 8, "udp": 17, "dccp": 33, "ipv6": 41,
		"ipv6-route": 43, "ipv6-frag": 44, "rsvp": 46, "gre": 47, "esp": 50, "ipsec-esp": 50, "ah": 51, "ipsec-ah": 51, "ipv6-icmp": 58, "icmpv6": 58,
		"icmp6": 58, "ipv6-nonxt": 59, "ipv6-opts": 60, "eigrp": 88, "ospf": 89, "ospfigp": 89, "pim": 103, "ipcomp": 108, "vrrp": 112, "l2tp": 115,
		"sctp": 132, "mh": 135, "ipv6-mh": 135, "mobility-header": 135, "udplite": 136, "mpls-in-ip": 137}
})

// flags returns the bits of a list of TCP flags.
func flags(list string) (uint32, bool) {
	var out uint32
	for _, part := range strings.Split(strings.ToUpper(list), ",") {
		bit, ok := flagBits()[part]
		if !ok {
			return 0, false
		}
		out |= bit
	}
	return out, true
}

var flagBits = sync.OnceValue(func() map[string]uint32 {
	return map[string]uint32{"FIN": 1, "SYN": 2, "RST": 4, "PSH": 8, "ACK": 16, "URG": 32, "ALL": 63, "NONE": 0}
})

// icmpTypes returns the numbers of an ICMP type: 256 * type + code.
func icmpTypes(name string, v6 bool) ([]Span, bool) {
	if name == "any" || !v6 && name == "255" {
		return []Span{{0, 65535}}, true
	}
	names := icmpNames()
	if v6 {
		names = icmpv6Names()
	}
	if n, ok := names[name]; ok {
		name = n
	}
	kind, code, found := strings.Cut(name, "/")
	t, err := strconv.ParseUint(kind, 0, 8)
	if err != nil {
		return nil, false
	}
	if !found {
		return []Span{{256 * uint32(t), 256*uint32(t) + 255}}, true
	}
	c, err := strconv.ParseUint(code, 0, 8)
	n := 256*uint32(t) + uint32(c)
	return []Span{{n, n}}, err == nil
}

var icmpNames = sync.OnceValue(func() map[string]string {
	return map[string]string{"echo-reply": "0", "pong": "0", "destination-unreachable": "3", "network-unreachable": "3/0", "host-unreachable": "3/1",
		"protocol-unreachable": "3/2", "port-unreachable": "3/3", "fragmentation-needed": "3/4", "source-route-failed": "3/5", "network-unknown": "3/6",
		"host-unknown": "3/7", "network-prohibited": "3/9", "host-prohibited": "3/10", "tos-network-unreachable": "3/11", "tos-host-unreachable": "3/12",
		"communication-prohibited": "3/13", "host-precedence-violation": "3/14", "precedence-cutoff": "3/15", "source-quench": "4", "redirect": "5",
		"network-redirect": "5/0", "host-redirect": "5/1", "tos-network-redirect": "5/2", "tos-host-redirect": "5/3", "echo-request": "8", "ping": "8",
		"router-advertisement": "9", "router-solicitation": "10", "time-exceeded": "11", "ttl-exceeded": "11", "ttl-zero-during-transit": "11/0",
		"ttl-zero-during-reassembly": "11/1", "parameter-problem": "12", "ip-header-bad": "12/0", "required-option-missing": "12/1", "timestamp-request": "13",
		"timestamp-reply": "14", "address-mask-request": "17", "address-mask-reply": "18"}
})

var icmpv6Names = sync.OnceValue(func() map[string]string {
	return map[string]string{"destination-unreachable": "1", "no-route": "1/0", "communication-prohibited": "1/1", "beyond-scope": "1/2",
		"address-unreachable": "1/3", "port-unreachable": "1/4", "failed-policy": "1/5", "reject-route": "1/6", "packet-too-big": "2", "time-exceeded": "3",
		"ttl-exceeded": "3", "ttl-zero-during-transit": "3/0", "ttl-zero-during-reassembly": "3/1", "parameter-problem": "4", "bad-header": "4/0",
		"unknown-header-type": "4/1", "unknown-option": "4/2", "echo-request": "128", "ping": "128", "echo-reply": "129", "pong": "129",
		"mld-listener-query": "130", "mld-listener-report": "131", "mld-listener-done": "132", "mld-listener-reduction": "132", "router-solicitation": "133",
		"router-advertisement": "134", "neighbour-solicitation": "135", "neighbor-solicitation": "135", "neighbour-advertisement": "136",
		"neighbor-advertisement": "136", "redirect": "137"}
})
