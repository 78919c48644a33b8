package nftables

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/exposure"
)

// subject is a field of a packet, or of what the kernel knows about it.
type subject struct {
	name  string // as nft prints it
	field exposure.Field
	size  int  // in bytes
	host  bool // in the byte order of the host
	// For a field with few possible values: these values, each with its meaning in
	// the model. That is one of the names of a match or, if the field is Destination,
	// a network. A value with an empty name has no such meaning.
	domain []named
}

type named struct {
	value uint32
	name  string
}

// piece is a field, or some bytes of it, in a register or key.
type piece struct {
	subject
	at, len   int    // the bytes of the field
	pos       int    // where they are in the register or key
	mask, xor []byte // the register holds (field & mask) ^ xor; if nil, the field
}

// content is what a register holds.
type content struct {
	pieces []piece
	size   int
	data   []byte // of a constant
}

func whole(s subject) content {
	return content{pieces: []piece{{subject: s, len: s.size}}, size: s.size}
}

// opaque is a content that is not modelled.
func opaque(field exposure.Field, name string, size int) content {
	return whole(subject{name: name, field: field, size: size})
}

// masked returns the result of a bitwise operation on a content.
func (c content) masked(mask, xor []byte) content {
	out := content{size: c.size}
	for _, p := range c.pieces {
		if p.pos+p.len > len(mask) || p.pos+p.len > len(xor) {
			return opaque(exposure.Unknown, p.name, c.size)
		}
		m, x := slices.Clone(mask[p.pos:p.pos+p.len]), slices.Clone(xor[p.pos:p.pos+p.len])
		for i := range m {
			if p.mask != nil {
				x[i] ^= p.xor[i] & m[i]
				m[i] &= p.mask[i]
			}
		}
		p.mask, p.xor = m, x
		out.pieces = append(out.pieces, p)
	}
	return out
}

// never and always are matches of no packet and of every one.
var never, always = exposure.Match{Field: exposure.Any}, exposure.Match{Field: exposure.Any, Of: [][]exposure.Match{{}}}

// match returns the match of packets for which a key of some parts is within one of the
// elements.
func match(pieces []piece, list elements) exposure.Match {
	if len(pieces) == 1 {
		return pieces[0].match(list)
	}
	// Elements that differ in the source only are one alternative.
	source := slices.IndexFunc(pieces, func(p piece) bool { return p.field == exposure.Source })
	var alternatives []elements
	if source < 0 {
		for i := range list {
			alternatives = append(alternatives, list[i:i+1])
		}
	} else {
		at := map[string]int{}
		var key []byte
		for _, e := range list {
			key = key[:0]
			for i, p := range pieces {
				if i != source {
					key = append(append(key, e.first[p.pos:p.pos+p.len]...), e.last[p.pos:p.pos+p.len]...)
				}
			}
			i, ok := at[string(key)]
			if !ok {
				i = len(alternatives)
				at[string(key)] = i
				alternatives = append(alternatives, nil)
			}
			alternatives[i] = append(alternatives[i], e)
		}
	}
	out := exposure.Match{Field: exposure.Any}
	for _, some := range alternatives {
		var all []exposure.Match
		for i, p := range pieces {
			of := some
			if i != source {
				of = some[:1]
			}
			if m := p.match(of); !isAlways(m) {
				all = append(all, m)
			}
		}
		out.Of = append(out.Of, all)
	}
	return out
}

func isAlways(m exposure.Match) bool {
	return m.Field == exposure.Any && !m.Not && slices.ContainsFunc(m.Of, func(list []exposure.Match) bool { return len(list) == 0 })
}

func (p piece) match(list elements) exposure.Match {
	m := exposure.Match{Field: p.field}
	ok := true
	switch {
	case p.domain != nil:
		return p.enumerate(list)
	case p.field == exposure.Source || p.field == exposure.Destination || p.field == exposure.OriginalDestination:
		m.Addrs, ok = p.addresses(list)
	case p.field == exposure.Interface || p.field == exposure.OutInterface:
		m.Names, ok = p.names(list)
	case p.field == exposure.Mark:
		m.Mask, m.Numbers, ok = p.marks(list)
	case p.field != exposure.Unknown && p.field != exposure.Sometimes:
		m.Numbers, ok = p.numbers(list)
		m.Mask = 0xff // of TCP flags
	default:
		m.Text = p.name + " " + p.show(list)
	}
	if !ok {
		return exposure.Match{Field: exposure.Unknown, Text: p.name + " " + p.show(list)}
	}
	return m
}

// within reports whether the bytes of a field's value are within an element.
func (p piece) within(value []byte, list elements) bool {
	b := slices.Clone(value[p.at : p.at+p.len])
	for i := range b {
		if p.mask != nil {
			b[i] = b[i]&p.mask[i] ^ p.xor[i]
		}
	}
	return slices.ContainsFunc(list, func(e element) bool {
		return bytes.Compare(e.first[p.pos:p.pos+p.len], b) <= 0 && bytes.Compare(b, e.last[p.pos:p.pos+p.len]) <= 0
	})
}

func (p piece) encode(n uint32) []byte {
	b := make([]byte, 4)
	switch {
	case !p.host:
		binary.BigEndian.PutUint32(b, n)
		return b[4-p.size:]
	case p.size == 2:
		binary.NativeEndian.PutUint16(b, uint16(n))
	case p.size == 1:
		b[0] = byte(n)
	default:
		binary.NativeEndian.PutUint32(b, n)
	}
	return b[:p.size]
}

func (p piece) enumerate(list elements) exposure.Match {
	var in, out []string
	for _, v := range p.domain {
		if p.within(p.encode(v.value), list) {
			in = append(in, v.name)
		} else {
			out = append(out, v.name)
		}
	}
	m := exposure.Match{Field: p.field, Names: in}
	switch {
	case len(in) == 0:
		return never
	case len(out) == 0 && p.field != exposure.Interface && p.field != exposure.OutInterface:
		return always
	case p.field == exposure.Destination: // the family
		m.Addrs, m.Names = exposure.Of(netip.MustParsePrefix(in[0])), nil
	case slices.Contains(in, ""):
		m.Names, m.Not = out, true
		if slices.Contains(out, "") {
			return exposure.Match{Field: exposure.Unknown, Text: p.name}
		}
	}
	return m
}

// bounds returns the first and last value of the field for an element, or false if a
// mask is not a prefix.
func (p piece) bounds(e element) (first, last [16]byte, ok bool) {
	if p.at != 0 || p.size > len(last) {
		return first, last, false
	}
	for i := range p.size {
		last[i] = 0xff
	}
	copy(first[:], e.first[p.pos:p.pos+p.len])
	copy(last[:], e.last[p.pos:p.pos+p.len])
	if p.mask == nil {
		return first, last, true
	}
	open := false
	for i, m := range p.mask {
		if p.xor[i] != 0 || e.first[p.pos+i] != e.last[p.pos+i] || open && m != 0 || ^m&(^m+1) != 0 {
			return first, last, false
		}
		open = open || m != 0xff
		first[i] &= m
		last[i] |= ^m
	}
	return first, last, true
}

func (p piece) addresses(list elements) (exposure.Sources, bool) {
	out := make(exposure.Sources, 0, len(list))
	ordered := true // the elements of a set are, which saves sorting
	for _, e := range list {
		first, last, ok := p.bounds(e)
		if !ok {
			return nil, false
		}
		r := exposure.Range{First: netip.AddrFrom16(first), Last: netip.AddrFrom16(last)}
		if p.size == 4 {
			r = exposure.Range{First: netip.AddrFrom4([4]byte(first[:4])), Last: netip.AddrFrom4([4]byte(last[:4]))}
		}
		if n := len(out); n > 0 && out[n-1].Last.Next() == r.First {
			out[n-1].Last = r.Last
			continue
		} else if n > 0 && r.First.Compare(out[n-1].Last) <= 0 {
			ordered = false
		}
		out = append(out, r)
	}
	if ordered {
		return out, true
	}
	return exposure.Union(out), true
}

// mostEnumerated limits the number of elements that are compared with every value of
// a masked 16-bit field.
const mostEnumerated = 16

func (p piece) numbers(list elements) ([]exposure.Span, bool) {
	var out []exposure.Span
	add := func(first, last uint32) {
		if n := len(out); n > 0 && out[n-1].Last+1 == first {
			out[n-1].Last = last
			return
		}
		out = append(out, exposure.Span{First: first, Last: last})
	}
	if p.at == 0 && p.mask == nil {
		for _, e := range list {
			first, last, _ := p.bounds(e)
			if p.size == 1 {
				add(uint32(first[0]), uint32(last[0]))
			} else {
				add(uint32(binary.BigEndian.Uint16(first[:])), uint32(binary.BigEndian.Uint16(last[:])))
			}
		}
		return out, true
	}
	if p.size > 1 && len(list) > mostEnumerated {
		return nil, false
	}
	for n := range uint32(1) << (8 * p.size) {
		if p.within(p.encode(n), list) {
			add(n, n)
		}
	}
	return out, true
}

func (p piece) marks(list elements) (mask uint32, out []exposure.Span, ok bool) {
	decode := func(b []byte) uint32 {
		if p.host {
			return binary.NativeEndian.Uint32(b)
		}
		return binary.BigEndian.Uint32(b)
	}
	mask, xor := ^uint32(0), uint32(0)
	if p.at != 0 || p.len != p.size {
		return 0, nil, false
	}
	if p.mask != nil {
		mask, xor = decode(p.mask), decode(p.xor)
	}
	for _, e := range list {
		first, last := decode(e.first[p.pos:]), decode(e.last[p.pos:])
		if first != last && (p.host || xor != 0) {
			return 0, nil, false
		}
		out = append(out, exposure.Span{First: first ^ xor, Last: last ^ xor})
	}
	return mask, out, true
}

// names returns the names of interfaces; a prefix ends in "*".
func (p piece) names(list elements) (out []string, ok bool) {
	for _, e := range list {
		first, last := e.first[p.pos:p.pos+p.len], e.last[p.pos:p.pos+p.len]
		n := 0
		for n < len(first) && first[n] == last[n] && first[n] != 0 {
			n++
		}
		name := string(first[:n])
		switch {
		case p.mask != nil:
			return nil, false
		case bytes.Equal(first, last):
			if n == len(first) && n < unix.IFNAMSIZ {
				name += "*"
			}
		case slices.ContainsFunc(first[n:], func(b byte) bool { return b != 0 }),
			slices.ContainsFunc(last[n:], func(b byte) bool { return b != 0xff }):
			return nil, false
		default:
			name += "*"
		}
		out = append(out, name)
	}
	return out, true
}

// mostShown limits the values of an anonymous set in the text of a rule.
const mostShown = 8

// show returns the values of a field as text.
func (p piece) show(list elements) string {
	if len(list) == 1 {
		return p.showOne(list[0])
	}
	var out []string
	for i, e := range list {
		if i == mostShown {
			out = append(out, "...")
			break
		}
		out = append(out, p.showOne(e))
	}
	return "{ " + strings.Join(out, ", ") + " }"
}

func (p piece) showOne(e element) string {
	first, last, ok := p.bounds(e)
	single := bytes.Equal(e.first[p.pos:p.pos+p.len], e.last[p.pos:p.pos+p.len])
	switch {
	case p.domain != nil && p.field != exposure.Destination:
		if m := p.enumerate(elements{e}); len(m.Names) > 0 && !m.Not {
			return strings.ToLower(strings.Join(m.Names, ","))
		}
	case p.domain != nil:
		return map[bool]string{true: "ipv4", false: "ipv6"}[p.within(p.encode(p.domain[0].value), elements{e})]
	case p.field == exposure.Interface, p.field == exposure.OutInterface:
		if names, ok := p.names(elements{e}); ok {
			return strconv.Quote(names[0])
		}
	case ok && (p.size == 4 || p.size == 16) && (p.field == exposure.Source || p.field == exposure.Destination || p.field == exposure.OriginalDestination):
		return addressRange(first[:p.size], last[:p.size])
	case p.field == exposure.Protocol && single:
		if name := protocolNames()[e.first[p.pos]]; name != "" {
			return name
		}
		fallthrough
	case ok && p.size <= 2 && p.mask == nil:
		number := func(b []byte) uint64 {
			var n uint64
			for _, c := range b {
				n = n<<8 | uint64(c)
			}
			return n
		}
		out := strconv.FormatUint(number(e.first[p.pos:p.pos+p.len]), 10)
		if !single {
			out += "-" + strconv.FormatUint(number(e.last[p.pos:p.pos+p.len]), 10)
		}
		return out
	case p.field == exposure.Mark && single:
		if mask, n, ok := p.marks(elements{e}); ok {
			return fmt.Sprintf("%#x/%#x", n[0].First, mask)
		}
	}
	out := fmt.Sprintf("0x%x", e.first[p.pos:p.pos+p.len])
	if p.mask != nil {
		out = fmt.Sprintf("& 0x%x == %s", p.mask, out)
	}
	if !single {
		out += fmt.Sprintf("-0x%x", e.last[p.pos:p.pos+p.len])
	}
	return out
}

var protocolNames = sync.OnceValue(func() map[byte]string {
	return map[byte]string{1: "icmp", 2: "igmp", 6: "tcp", 17: "udp", 33: "dccp", 47: "gre", 50: "esp", 51: "ah", 58: "ipv6-icmp", 132: "sctp", 136: "udplite"}
})

func addressRange(first, last []byte) string {
	a, _ := netip.AddrFromSlice(first)
	b, _ := netip.AddrFromSlice(last)
	if a == b {
		return a.String()
	}
	bits := 0
	for bits < 8*len(first) && (first[bits/8]^last[bits/8])&(0x80>>(bits%8)) == 0 {
		bits++
	}
	p := netip.PrefixFrom(a, bits)
	if r := exposure.Of(p); r[0].First == a && r[0].Last == b {
		return p.String()
	}
	return a.String() + "-" + b.String()
}
