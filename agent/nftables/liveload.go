package nftables

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/exposure"
)

var (
	familyNumber     = []named{{unix.NFPROTO_IPV4, "0.0.0.0/0"}, {unix.NFPROTO_IPV6, "::/0"}}
	etherType        = []named{{unix.ETH_P_IP, "0.0.0.0/0"}, {unix.ETH_P_IPV6, "::/0"}}
	stateBits        = []named{{1, "INVALID"}, {2, "ESTABLISHED"}, {4, "RELATED"}, {8, "NEW"}, {64, "UNTRACKED"}}
	statusBits       = []named{{0, ""}, {1 << 8, ""}, {1<<8 | 1<<5, "DNAT"}} // of the first packet; bit 8: nat was done
	packetTypes      = []named{{unix.PACKET_HOST, "LOCAL"}, {unix.PACKET_HOST, "UNICAST"}, {unix.PACKET_BROADCAST, "BROADCAST"}, {unix.PACKET_MULTICAST, "MULTICAST"}}
	destinationTypes = []named{{unix.RTN_LOCAL, "LOCAL"}, {unix.RTN_BROADCAST, "BROADCAST"}, {unix.RTN_MULTICAST, "MULTICAST"}, {unix.RTN_UNICAST, "UNICAST"}}
	zero             = []named{{0, ""}}
	notFragmented    = []named{{0, ""}, {0x4000, ""}} // the first packet; the bit forbids fragments
)

// load translates an expression that loads a field into a register. It returns false for
// other expressions.
func (t *translator) load(w *way, name string, a attributes) bool {
	switch name {
	case "meta":
		if a[unix.NFTA_META_DREG] == nil {
			return false
		}
		w.set(a[unix.NFTA_META_DREG], t.meta(uint32(number(a[unix.NFTA_META_KEY]))))
	case "ct":
		if a[unix.NFTA_CT_DREG] == nil {
			return false
		}
		w.set(a[unix.NFTA_CT_DREG], t.connection(w, a))
	case "payload":
		if a[unix.NFTA_PAYLOAD_DREG] == nil {
			return false
		}
		w.set(a[unix.NFTA_PAYLOAD_DREG], t.payload(w, number(a[unix.NFTA_PAYLOAD_BASE]), int(number(a[unix.NFTA_PAYLOAD_OFFSET])), int(number(a[unix.NFTA_PAYLOAD_LEN]))))
	case "fib":
		t.native = true
		w.set(a[unix.NFTA_FIB_DREG], fib(number(a[unix.NFTA_FIB_FLAGS]), number(a[unix.NFTA_FIB_RESULT])))
	case "numgen", "hash": // NFTA_NG_DREG, NFTA_HASH_DREG
		t.native = true
		dreg := a[1]
		if name == "hash" {
			dreg = a[2]
		}
		w.set(dreg, opaque(exposure.Sometimes, name, 4))
	case "exthdr", "rt", "socket", "osf", "xfrm", "tunnel":
		t.native = true
		if name == "socket" && a[2] == nil || name == "exthdr" && a[1] == nil {
			return false
		}
		dreg, size := a[1], 16 // NFTA_EXTHDR_DREG, NFTA_RT_DREG, NFTA_OSF_DREG, NFTA_XFRM_DREG
		if name == "socket" || name == "tunnel" {
			dreg = a[2]
		}
		w.set(dreg, opaque(exposure.Unknown, name, size))
	default:
		return false
	}
	return true
}

func (t *translator) meta(key uint32) content {
	switch key {
	case unix.NFT_META_L4PROTO:
		return whole(subject{name: "meta l4proto", field: exposure.Protocol, size: 1})
	case unix.NFT_META_IIFNAME:
		return whole(subject{name: "iifname", field: exposure.Interface, size: unix.IFNAMSIZ})
	case unix.NFT_META_MARK:
		return whole(subject{name: "meta mark", field: exposure.Mark, size: 4, host: true})
	case unix.NFT_META_OIFNAME:
		return whole(subject{name: "oifname", field: exposure.OutInterface, size: unix.IFNAMSIZ})
	case unix.NFT_META_OIF:
		return whole(subject{name: "oif", field: exposure.OutInterface, size: 4, host: true, domain: t.interfaces(func(l link) uint32 { return l.index })})
	case unix.NFT_META_IIF:
		return whole(subject{name: "iif", field: exposure.Interface, size: 4, host: true, domain: t.interfaces(func(l link) uint32 { return l.index })})
	}
	t.native = true
	const timeNanoseconds, timeDay, timeHour = 30, 31, 32 // NFT_META_TIME_NS, _DAY, _HOUR
	switch key {
	case unix.NFT_META_NFPROTO:
		return whole(subject{name: "meta nfproto", field: exposure.Destination, size: 1, domain: familyNumber})
	case unix.NFT_META_PROTOCOL:
		return whole(subject{name: "meta protocol", field: exposure.Destination, size: 2, domain: etherType})
	case unix.NFT_META_PKTTYPE:
		return whole(subject{name: "meta pkttype", field: exposure.DestinationType, size: 1, host: true, domain: packetTypes})
	case unix.NFT_META_IIFTYPE:
		return whole(subject{name: "meta iiftype", field: exposure.Interface, size: 2, host: true, domain: t.interfaces(func(l link) uint32 { return l.kind })})
	case timeNanoseconds:
		return opaque(exposure.Sometimes, "meta time", 8)
	case timeDay:
		return opaque(exposure.Sometimes, "meta day", 1)
	case timeHour:
		return opaque(exposure.Sometimes, "meta hour", 4)
	case unix.NFT_META_PRANDOM:
		return opaque(exposure.Sometimes, "meta random", 4)
	}
	return opaque(exposure.Unknown, fmt.Sprintf("meta key %d", key), 16)
}

func (t *translator) interfaces(of func(link) uint32) []named {
	list, err := t.links.values(of)
	if err != nil {
		t.err = err
	}
	return append([]named{}, list...)
}

func (t *translator) connection(w *way, a attributes) content {
	t.native = true
	const srcIP, dstIP, srcIP6, dstIP6 = 19, 20, 21, 22 // NFT_CT_SRC_IP and so on, since Linux 4.17
	key := number(a[unix.NFTA_CT_KEY])
	if key != unix.NFT_CT_STATE { // tracked only
		w.add(exposure.Match{Field: exposure.State, Names: []string{"NEW", "ESTABLISHED", "RELATED"}}, "")
	}
	original := len(a[unix.NFTA_CT_DIRECTION]) > 0 && a[unix.NFTA_CT_DIRECTION][0] == 0
	size := map[bool]int{true: 16, false: 4}[w.family == unix.NFPROTO_IPV6]
	switch key {
	case unix.NFT_CT_STATE:
		return whole(subject{name: "ct state", field: exposure.State, size: 4, host: true, domain: stateBits})
	case unix.NFT_CT_STATUS:
		return whole(subject{name: "ct status", field: exposure.State, size: 4, host: true, domain: statusBits})
	case unix.NFT_CT_DIRECTION:
		return whole(subject{name: "ct direction", field: exposure.State, size: 1, host: true, domain: zero})
	case unix.NFT_CT_MARK:
		if !t.marks {
			return whole(subject{name: "ct mark", field: exposure.State, size: 4, host: true, domain: zero})
		}
		return opaque(exposure.Unknown, "ct mark", 4)
	case unix.NFT_CT_PROTOCOL:
		return whole(subject{name: "ct protocol", field: exposure.Protocol, size: 1})
	}
	if !original {
		return opaque(exposure.Unknown, fmt.Sprintf("ct key %d", key), 16)
	}
	switch key {
	case unix.NFT_CT_SRC, srcIP, srcIP6:
		if key == srcIP6 {
			size = 16
		}
		return whole(subject{name: "ct original saddr", field: exposure.Source, size: size})
	case unix.NFT_CT_DST, dstIP, dstIP6:
		if key == dstIP6 {
			size = 16
		}
		return whole(subject{name: "ct original daddr", field: exposure.OriginalDestination, size: size})
	case unix.NFT_CT_PROTO_DST:
		return whole(subject{name: "ct original proto-dst", field: exposure.OriginalPort, size: 2})
	case unix.NFT_CT_PROTO_SRC:
		return whole(subject{name: "ct original proto-src", field: exposure.SourcePort, size: 2})
	}
	return opaque(exposure.Unknown, fmt.Sprintf("ct original key %d", key), 16)
}

func fib(flags, result uint64) content {
	of := "daddr"
	if flags&unix.NFTA_FIB_F_SADDR != 0 {
		of = "saddr"
	}
	if result == unix.NFT_FIB_RESULT_ADDRTYPE && of == "daddr" {
		return whole(subject{name: "fib daddr type", field: exposure.DestinationType, size: 4, host: true, domain: destinationTypes})
	}
	return opaque(exposure.Unknown, "fib "+of, 16)
}

// header is a field at an offset of a header.
type header struct {
	offset int
	subject
}

var (
	ipv4Header = []header{{6, subject{name: "ip frag-off", field: exposure.State, size: 2, domain: notFragmented}},
		{9, subject{name: "ip protocol", field: exposure.Protocol, size: 1}},
		{12, subject{name: "ip saddr", field: exposure.Source, size: 4}}, {16, subject{name: "ip daddr", field: exposure.Destination, size: 4}}}
	ipv6Header = []header{{6, subject{name: "ip6 nexthdr", field: exposure.Protocol, size: 1}},
		{8, subject{name: "ip6 saddr", field: exposure.Source, size: 16}}, {24, subject{name: "ip6 daddr", field: exposure.Destination, size: 16}}}
	etherHeader = []header{{12, subject{name: "ether type", field: exposure.Destination, size: 2, domain: etherType}}}
	icmpHeader  = []header{{0, subject{name: "icmp type", field: exposure.ICMPType, size: 2}}}
	icmp6Header = []header{{0, subject{name: "icmpv6 type", field: exposure.ICMPType, size: 2}}}
	tcpHeader   = append(portsOf("tcp"), header{13, subject{name: "tcp flags", field: exposure.TCPFlags, size: 1}})
	udpHeader   = portsOf("udp")
	sctpHeader  = portsOf("sctp")
	anyHeader   = portsOf("th")
)

func portsOf(proto string) []header {
	return []header{{0, subject{name: proto + " sport", field: exposure.SourcePort, size: 2}}, {2, subject{name: proto + " dport", field: exposure.DestinationPort, size: 2}}}
}

// payload returns the fields in some bytes of a packet.
func (t *translator) payload(w *way, base uint64, offset, size int) content {
	var fields []header
	switch {
	case base == unix.NFT_PAYLOAD_LL_HEADER:
		fields = etherHeader
	case base == unix.NFT_PAYLOAD_NETWORK_HEADER && w.family == unix.NFPROTO_IPV4:
		fields = ipv4Header
	case base == unix.NFT_PAYLOAD_NETWORK_HEADER && w.family == unix.NFPROTO_IPV6:
		fields = ipv6Header
	case base == unix.NFT_PAYLOAD_TRANSPORT_HEADER:
		fields = anyHeader
		if of, ok := map[int][]header{unix.IPPROTO_ICMP: icmpHeader, unix.IPPROTO_ICMPV6: icmp6Header, unix.IPPROTO_TCP: tcpHeader,
			unix.IPPROTO_UDP: udpHeader, unix.IPPROTO_SCTP: sctpHeader}[w.proto]; ok {
			fields = of
		}
	}
	out := content{size: size}
	at := offset
	end := offset + size
	gap := func(to int) {
		if at < to {
			out.pieces = append(out.pieces, piece{subject: subject{name: fmt.Sprintf("@%d,%d,%d", base, 8*at, 8*(to-at)), size: to - at}, len: to - at, pos: at - offset})
			at = to
			t.native = true
		}
	}
	for _, f := range fields {
		first, last := max(f.offset, at), min(f.offset+f.subject.size, end)
		if first >= last {
			continue
		}
		gap(first)
		out.pieces = append(out.pieces, piece{subject: f.subject, at: first - f.offset, len: last - first, pos: first - offset})
		if f.field == exposure.ICMPType && first == 1 {
			out.pieces[len(out.pieces)-1].name = "icmp code"
		}
		t.native = t.native || f.field == exposure.ICMPType || f.domain != nil
		at = last
	}
	gap(end)
	return out
}

// condition translates expressions that match by themselves. It returns false for others.
func (t *translator) condition(w *way, name string, a attributes) bool {
	sometimes := func(what string) { w.add(exposure.Match{Field: exposure.Sometimes, Text: what}, what) }
	switch name {
	case "limit":
		sometimes("limit rate")
	case "quota", "connlimit":
		t.native = true
		sometimes(map[string]string{"quota": "quota", "connlimit": "ct count"}[name])
	case "dynset":
		t.native = true
		sometimes("update @" + text(a[unix.NFTA_DYNSET_SET_NAME]))
	case "objref":
		t.native = true
		switch kind := number(a[unix.NFTA_OBJREF_IMM_TYPE]); {
		case kind == unix.NFT_OBJECT_LIMIT || kind == unix.NFT_OBJECT_QUOTA || kind == unix.NFT_OBJECT_CONNLIMIT || a[unix.NFTA_OBJREF_SET_NAME] != nil:
			sometimes("a limit or quota named " + text(a[unix.NFTA_OBJREF_IMM_NAME]) + text(a[unix.NFTA_OBJREF_SET_NAME]))
		case kind == unix.NFT_OBJECT_SYNPROXY:
			return false
		}
	case "flow_offload": // never offloads the first packet: the rule ends
		t.native = true
		w.add(never, "flow add")
	case "match":
		what := text(a[unix.NFTA_MATCH_NAME])
		if what == "comment" {
			return true
		}
		w.say("xt " + what)
		for _, m := range t.extension(w, a) {
			w.add(m, "")
		}
	default:
		return false
	}
	return true
}

// statement translates statements. It returns true if the rule ends there.
func (t *translator) statement(w *way, name string, a attributes) bool {
	undecided := func(what string) bool {
		w.say(what)
		t.end(*w, exposure.Rule{Verdict: exposure.Undecided})
		return true
	}
	switch name {
	case "counter", "last", "log":
		w.say(name)
	case "target":
		t.target(w, a)
		return true
	case "meta":
		t.native = true
		if number(a[unix.NFTA_META_KEY]) == unix.NFT_META_MARK {
			t.setMark(w, w.get(a[unix.NFTA_META_SREG]))
		}
	case "reject":
		t.native = true
		w.say("reject")
		t.end(*w, exposure.Rule{Verdict: exposure.Drop})
		return true
	}
	switch name {
	case "counter", "last", "log", "meta":
		return false
	}
	t.native = true
	switch name {
	case "ct", "dup", "secmark", "objref", "exthdr", "masq":
		if name == "objref" && number(a[unix.NFTA_OBJREF_IMM_TYPE]) == unix.NFT_OBJECT_SYNPROXY {
			return undecided("synproxy")
		}
		if name == "objref" && number(a[unix.NFTA_OBJREF_IMM_TYPE]) == unix.NFT_OBJECT_CT_HELPER {
			name = "ct helper set " + text(a[unix.NFTA_OBJREF_IMM_NAME])
		}
		w.say(name)
	case "notrack":
		w.untracked, w.changed = true, true
		w.say("notrack")
	case "nat":
		const destination = 1 // NFT_NAT_DNAT
		if number(a[unix.NFTA_NAT_TYPE]) != destination {
			w.say("snat")
			t.end(*w, exposure.Rule{Verdict: exposure.Accept})
			return true
		}
		if family := number(a[unix.NFTA_NAT_FAMILY]); w.family == 0 && (family == unix.NFPROTO_IPV4 || family == unix.NFPROTO_IPV6) {
			p := piece{subject: subject{field: exposure.Destination, size: 1, domain: familyNumber}, len: 1}
			w.add(p.match(elements{{first: []byte{byte(family)}, last: []byte{byte(family)}}}), "")
			w.family = family
		}
		t.translate(*w, "dnat", a[unix.NFTA_NAT_REG_ADDR_MIN], a[unix.NFTA_NAT_REG_ADDR_MAX], a[unix.NFTA_NAT_REG_PROTO_MIN], a[unix.NFTA_NAT_REG_PROTO_MAX], number(a[unix.NFTA_NAT_FLAGS]))
		return true
	case "redir":
		t.translate(*w, "redirect", nil, nil, a[unix.NFTA_REDIR_REG_PROTO_MIN], a[unix.NFTA_REDIR_REG_PROTO_MAX], number(a[unix.NFTA_REDIR_FLAGS]))
		return true
	case "queue", "fwd", "tproxy", "synproxy", "payload":
		return undecided(name)
	default:
		w.add(exposure.Match{Field: exposure.Unknown, Text: name}, name)
	}
	return false
}

// setMark changes the mark to a content.
func (t *translator) setMark(w *way, c content) {
	change := exposure.MarkChange{Mask: ^uint32(0)}
	switch {
	case len(c.data) == 4:
		change.Value = binary.NativeEndian.Uint32(c.data)
	case len(c.pieces) == 1 && c.pieces[0].field == exposure.Mark && c.pieces[0].host:
		if p := c.pieces[0]; p.mask != nil {
			change = exposure.MarkChange{Mask: ^binary.NativeEndian.Uint32(p.mask), Value: binary.NativeEndian.Uint32(p.xor)}
		} else {
			change.Mask = 0
		}
	case len(c.pieces) == 1 && c.pieces[0].name == "ct mark" && c.pieces[0].domain != nil:
		// No connection has a mark, so that the packet loses its own.
		if p := c.pieces[0]; p.mask != nil {
			change.Value = binary.NativeEndian.Uint32(p.xor)
		}
	default:
		w.marks = true
	}
	w.say(fmt.Sprintf("meta mark set %#x/%#x", change.Value, change.Mask))
	if w.mark != nil { // one change after the other
		change = exposure.MarkChange{Mask: w.mark.Mask | change.Mask, Value: w.mark.Value&^change.Mask ^ change.Value}
	}
	w.mark, w.changed = &change, true
}
