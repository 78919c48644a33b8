package nftables

import (
	"bytes"
	"encoding/binary"
	"math/bits"
	"net/netip"
	"slices"
	"strings"

	nft "github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// outcome is one thing that a rule does with packets that come along a
// passage: it sends them to a chain, or to another address.
type outcome struct {
	firewall.Passage
	chain  string
	to     string
	family firewall.Family
}

// field is what of a packet a register holds.
type field int

const (
	other field = iota
	l4proto
	dport
	source
	destination
	iif
	iifname
	sourceType
	constant
	mapped // what a map gives for a key
)

// value is what a register holds.
type value struct {
	field field
	size  int    // in bytes
	data  []byte // of a constant
	bits  int    // of a destination or source that a mask was laid on
	from  *lookup
}

// lookup is a search for a key in a set or map.
type lookup struct {
	set string
	key []value
}

// elements are those of a set or map.
type elements []element

// element is a range of keys, both ends within, and what a map has for it.
type element struct{ first, last, data []byte }

// decode tells what a rule does, as far as it forwards packets or sends them on
// to other chains. What is not known here counts as no limit: rather a port too
// many than one that nobody hears of. sets gives a set's elements.
//
// nft compiles rules to loads into registers and comparisons with them; see
// "nft --debug=netlink". A register has 16 bytes, and may be named by its parts
// of 4: the first is 1, or 8.
func decode(family nft.TableFamily, exprs []expr.Any, sets func(string) elements) []outcome {
	regs := registers{}
	ways := []firewall.Passage{{}} // alternatives, of elements in a set
	var lookups []*lookup
	narrow := func(p firewall.Passage) bool {
		var out []firewall.Passage
		for _, w := range ways {
			if n, ok := w.Narrow(p); ok {
				out = append(out, n)
			}
		}
		ways = out
		return len(ways) > 0
	}
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Target:
			return nil // iptables' own
		case *expr.Meta:
			if !e.SourceRegister {
				regs.set(e.Register, metaValue(e.Key))
			}
		case *expr.Payload:
			if e.OperationType == expr.PayloadLoad {
				regs.set(e.DestRegister, payloadValue(e))
			}
		case *expr.Fib:
			v := value{field: other, size: 4}
			if e.ResultADDRTYPE && e.FlagSADDR {
				v.field = sourceType
			}
			regs.set(e.Register, v)
		case *expr.Ct:
			if !e.SourceRegister {
				regs.set(e.Register, value{size: 16})
			}
		case *expr.Exthdr:
			regs.set(e.DestRegister, value{size: int(e.Len)})
		case *expr.Hash:
			regs.set(e.DestRegister, value{size: 4})
		case *expr.Numgen:
			regs.set(e.Register, value{size: 4})
		case *expr.Bitwise:
			v := regs.get(e.SourceRegister)
			switch {
			case v.field == source || v.field == destination:
				v.bits = maskBits(e.Mask)
			default:
				v = value{size: int(e.Len)}
			}
			regs.set(e.DestRegister, v)
		case *expr.Immediate:
			regs.set(e.Register, value{field: constant, size: len(e.Data), data: e.Data})
		case *expr.Cmp:
			if p, ok := compare(regs.get(e.Register), e.Op, e.Data); !ok || !narrow(p) {
				return nil
			}
		case *expr.Range:
			if v := regs.get(e.Register); v.field == dport && len(e.FromData) == 2 && len(e.ToData) == 2 {
				r := firewall.PortRange{First: binary.BigEndian.Uint16(e.FromData), Last: binary.BigEndian.Uint16(e.ToData)}
				p := firewall.Passage{Ports: []firewall.PortRange{r}}
				if e.Op == expr.CmpOpNeq {
					p.Ports = allBut(r)
				}
				if !narrow(p) {
					return nil
				}
			}
		case *expr.Lookup:
			l := &lookup{set: e.SetName, key: regs.key(e.SourceRegister)}
			switch {
			case e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT:
				// A map of verdicts ends the rule.
				return verdicts(ways, lookups, l, sets)
			case e.IsDestRegSet:
				regs.set(e.DestRegister, value{field: mapped, size: 16, from: l})
			case !e.Invert && l.narrows():
				lookups = append(lookups, l)
			}
		case *expr.Verdict:
			if e.Kind != expr.VerdictJump && e.Kind != expr.VerdictGoto {
				return nil
			}
			var out []outcome
			for _, w := range alternatives(ways, lookups, sets) {
				out = append(out, outcome{Passage: w, chain: e.Chain})
			}
			return out
		case *expr.NAT:
			// Without an address it is this host's, and so INPUT's.
			if e.Type != expr.NATTypeDestNAT || e.RegAddrMin == 0 {
				return nil
			}
			return targets(family, e, regs, alternatives(ways, lookups, sets), sets)
		}
	}
	return nil
}

// registers are what they hold, by their parts of 4 bytes.
type registers map[int]value

func part(reg uint32) int {
	if reg <= unix.NFT_REG_4 {
		return int(4 * reg)
	}
	return int(reg) - unix.NFT_REG32_00 + 4
}

func parts(size int) int { return max(1, (size+3)/4) }

func (r registers) set(reg uint32, v value) {
	at := part(reg)
	for i, old := range r {
		if i < at+parts(v.size) && at < i+parts(old.size) {
			delete(r, i)
		}
	}
	r[at] = v
}

func (r registers) get(reg uint32) value { return r[part(reg)] }

// key gives the values that stand one behind the other from a register on.
func (r registers) key(reg uint32) []value {
	var out []value
	for at := part(reg); ; {
		v, ok := r[at]
		if !ok {
			return out
		}
		out = append(out, v)
		at += parts(v.size)
	}
}

func metaValue(key expr.MetaKey) value {
	switch key {
	case expr.MetaKeyL4PROTO:
		return value{field: l4proto, size: 1}
	case expr.MetaKeyIIF:
		return value{field: iif, size: 4}
	case expr.MetaKeyIIFNAME:
		return value{field: iifname, size: 16}
	}
	return value{size: 4}
}

// payloadValue knows the places in the headers of IP, IPv6, and what they carry
// (RFC 791, RFC 8200). A network of whole bytes is compared with the first of an
// address.
func payloadValue(e *expr.Payload) value {
	v := value{size: int(e.Len)}
	at, end := e.Offset, e.Offset+e.Len
	switch {
	case e.Base == expr.PayloadBaseTransportHeader && at == 2 && e.Len == 2:
		v.field = dport
	case e.Base != expr.PayloadBaseNetworkHeader:
	case at == 9 && e.Len == 1, at == 6 && e.Len == 1:
		v.field = l4proto
	case at == 12 && end <= 16, at == 8 && end <= 24 && e.Len > 1:
		v.field = source
	case at == 16 && end <= 20, at == 24 && end <= 40:
		v.field = destination
	}
	if v.field == source || v.field == destination {
		v.bits = 8 * v.size
	}
	return v
}

func maskBits(mask []byte) int {
	n := 0
	for _, b := range mask {
		n += bits.OnesCount8(b)
	}
	return n
}

// compare is what packets are like for which a comparison holds; false where
// there are none from outside.
func compare(v value, op expr.CmpOp, data []byte) (firewall.Passage, bool) {
	var p firewall.Passage
	switch v.field {
	case dport:
		if len(data) != 2 {
			break
		}
		n := binary.BigEndian.Uint16(data)
		switch op {
		case expr.CmpOpEq:
			p.Ports = []firewall.PortRange{firewall.Port(n)}
		case expr.CmpOpNeq:
			p.Ports = allBut(firewall.Port(n))
		case expr.CmpOpGte:
			p.Ports = []firewall.PortRange{{First: n, Last: 65535}}
		case expr.CmpOpLte:
			p.Ports = []firewall.PortRange{{First: 1, Last: n}}
		}
	case l4proto:
		if op == expr.CmpOpEq && len(data) == 1 {
			p.Proto = firewall.ProtoName(data[0])
		}
	case destination, source:
		if op != expr.CmpOpEq {
			break
		}
		at := network(data, v.bits)
		if v.field == source {
			return p, !at.Addr().IsLoopback()
		}
		p.On = at
	case iif: // loopback is the first interface of every namespace
		return p, op != expr.CmpOpEq || len(data) != 4 || binary.NativeEndian.Uint32(data) != 1
	case iifname:
		return p, op != expr.CmpOpEq || string(bytes.TrimRight(data, "\x00")) != "lo"
	case sourceType:
		return p, op != expr.CmpOpEq || len(data) != 4 || binary.NativeEndian.Uint32(data) != unix.RTN_LOCAL
	}
	return p, true
}

// network is one of which the first bytes, and the bits that count, are known.
func network(data []byte, bits int) netip.Prefix {
	size := 16
	if len(data) <= 4 {
		size = 4
	}
	full := make([]byte, size)
	copy(full, data)
	a, ok := netip.AddrFromSlice(full)
	if !ok || bits > 8*size {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(a, bits).Masked()
}

// allBut is every port but some.
func allBut(r firewall.PortRange) []firewall.PortRange {
	var out []firewall.PortRange
	if r.First > 1 {
		out = append(out, firewall.PortRange{First: 1, Last: r.First - 1})
	}
	if r.Last < 65535 {
		out = append(out, firewall.PortRange{First: r.Last + 1, Last: 65535})
	}
	return out
}

// narrows tells whether a set's elements say which ports of this host they are
// about. A set of sources, of whatever size, does not.
func (l *lookup) narrows() bool {
	return slices.ContainsFunc(l.key, func(v value) bool { return v.field == dport || v.field == l4proto })
}

// passage is what packets are like whose key is within an element; false where
// there are none from outside.
func (l *lookup) passage(e element) (firewall.Passage, bool) {
	var p firewall.Passage
	at := 0
	for _, v := range l.key {
		if at+v.size > len(e.first) || at+v.size > len(e.last) {
			break // what stands behind the key is of no account
		}
		first, last := e.first[at:at+v.size], e.last[at:at+v.size]
		switch {
		case v.field == dport:
			p.Ports = []firewall.PortRange{{First: binary.BigEndian.Uint16(first), Last: binary.BigEndian.Uint16(last)}}
		case bytes.Equal(first, last):
			q, ok := compare(v, expr.CmpOpEq, first)
			if ok {
				p, ok = p.Narrow(q)
			}
			if !ok {
				return p, false
			}
		}
		at += 4 * parts(v.size)
	}
	return p, true
}

// alternatives are the ways through all sets.
func alternatives(ways []firewall.Passage, lookups []*lookup, sets func(string) elements) []firewall.Passage {
	for _, l := range lookups {
		var out []firewall.Passage
		for _, e := range sets(l.set) {
			q, ok := l.passage(e)
			if !ok {
				continue
			}
			for _, w := range ways {
				if n, ok := w.Narrow(q); ok && len(out) < maxElements {
					out = append(out, n)
				}
			}
		}
		ways = out
	}
	return ways
}

// verdicts are what a map of verdicts does.
func verdicts(ways []firewall.Passage, lookups []*lookup, l *lookup, sets func(string) elements) []outcome {
	var out []outcome
	ways = alternatives(ways, lookups, sets)
	for _, e := range sets(l.set) {
		chain := verdictChain(e.data)
		q, ok := l.passage(e)
		if chain == "" || !ok {
			continue
		}
		for _, w := range ways {
			if n, ok := w.Narrow(q); ok {
				out = append(out, outcome{Passage: n, chain: chain})
			}
		}
	}
	return out
}

// verdictChain is the chain of a verdict, which in a map are netlink's
// attributes: those that have a chain jump or go to it.
func verdictChain(data []byte) string {
	for len(data) >= unix.SizeofNlAttr {
		size, kind := int(binary.NativeEndian.Uint16(data)), binary.NativeEndian.Uint16(data[2:])
		if size < unix.SizeofNlAttr || size > len(data) {
			break
		}
		if kind == unix.NFTA_VERDICT_CHAIN {
			return string(bytes.TrimRight(data[unix.SizeofNlAttr:size], "\x00"))
		}
		data = data[min(len(data), (size+3)&^3):]
	}
	return ""
}

// targets are where a rule of dnat sends packets: to one address, or to what a
// map has for each key.
func targets(table nft.TableFamily, e *expr.NAT, regs registers, ways []firewall.Passage, sets func(string) elements) []outcome {
	family := firewall.IPv4
	if e.Family == unix.NFPROTO_IPV6 || table == nft.TableFamilyIPv6 {
		family = firewall.IPv6
	}
	size := 4
	if family == firewall.IPv6 {
		size = 16
	}
	addr, port := regs.get(e.RegAddrMin), value{}
	if e.RegProtoMin != 0 {
		port = regs.get(e.RegProtoMin)
	}
	var out []outcome
	if addr.field != mapped && port.field != mapped {
		to := address(addr.data, size)
		if e.RegAddrMax != 0 && e.RegAddrMax != e.RegAddrMin {
			if last := address(regs.get(e.RegAddrMax).data, size); last != to {
				to += "-" + last
			}
		}
		p := portText(port.data)
		if e.RegProtoMax != 0 && e.RegProtoMax != e.RegProtoMin {
			if last := portText(regs.get(e.RegProtoMax).data); last != p {
				p += "-" + last
			}
		}
		for _, w := range ways {
			out = append(out, outcome{Passage: w, to: join(to, p, e.RegProtoMin != 0), family: family})
		}
		return out
	}
	from := addr.from
	if from == nil {
		from = port.from
	}
	for _, m := range sets(from.set) {
		q, ok := from.passage(m)
		if !ok {
			continue
		}
		a, p := addr.data, port.data
		if addr.field == mapped {
			a = m.data
			// The port stands behind the address, in a map of both.
			if e.RegProtoMin != 0 && port.field != constant && port.field != mapped && len(a) >= size+2 {
				p = a[size : size+2]
			}
			a = a[:min(len(a), size)]
		}
		if port.field == mapped {
			p = m.data[:min(len(m.data), 2)]
		}
		for _, w := range ways {
			if n, ok := w.Narrow(q); ok {
				out = append(out, outcome{Passage: n, to: join(address(a, size), portText(p), e.RegProtoMin != 0), family: family})
			}
		}
	}
	return out
}

// unknown stands for an address or a port that a rule takes from where it
// cannot be read.
const unknown = "?"

func address(data []byte, size int) string {
	if a, ok := netip.AddrFromSlice(data); ok && len(data) == size {
		return a.String()
	}
	return unknown
}

func portText(data []byte) string {
	if len(data) < 2 {
		return unknown
	}
	return firewall.Port(binary.BigEndian.Uint16(data)).String()
}

// join is an address and a port as iptables writes them.
func join(address, port string, withPort bool) string {
	switch {
	case !withPort:
		return address
	case strings.Contains(address, ":"):
		return "[" + address + "]:" + port
	}
	return address + ":" + port
}

// ranges gives the elements as the kernel lists them: one that is a range in a
// set of one field is two there, the second the first key behind it.
func ranges(list []nft.SetElement) elements {
	var out elements
	interval := slices.ContainsFunc(list, func(e nft.SetElement) bool { return e.IntervalEnd })
	if !interval {
		for _, e := range list {
			last := e.Key
			if e.KeyEnd != nil {
				last = e.KeyEnd
			}
			out = append(out, element{e.Key, last, e.Val})
		}
		return out
	}
	slices.SortStableFunc(list, func(a, b nft.SetElement) int {
		if c := bytes.Compare(a.Key, b.Key); c != 0 {
			return c
		}
		// Where two ranges touch, the one ends before the other begins.
		switch {
		case a.IntervalEnd && !b.IntervalEnd:
			return -1
		case b.IntervalEnd && !a.IntervalEnd:
			return 1
		}
		return 0
	})
	for i, e := range list {
		if e.IntervalEnd {
			continue
		}
		last := bytes.Repeat([]byte{0xff}, len(e.Key))
		if i+1 < len(list) {
			last = slices.Clone(list[i+1].Key)
			for j := len(last) - 1; j >= 0; j-- { // less one
				last[j]--
				if last[j] != 0xff {
					break
				}
			}
		}
		out = append(out, element{e.Key, last, e.Val})
	}
	return out
}
