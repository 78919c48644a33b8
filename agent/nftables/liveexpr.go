package nftables

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/exposure"
)

// The codes of verdicts (linux/netfilter.h, linux/netfilter/nf_tables.h).
const (
	nfDrop, nfAccept, nfQueue                                              = 0, 1, 3
	verdictContinue, verdictBreak, verdictJump, verdictGoto, verdictReturn = -1, -2, -3, -4, -5
)

// translator converts the rules of a table to those of the model.
type translator struct {
	family string
	sets   *liveSets
	links  *links
	marks  bool // connections have marks
	rule   *rule
	out    []exposure.Rule
	native bool // the rule has expressions that iptables does not print
	err    error
}

// way is a rule as far as it was read: what a packet matched and which changes were made.
// The elements of a map are different ways.
type way struct {
	regs      [20]content // by part, see part
	matches   []exposure.Match
	text      []string
	family    uint64 // unix.NFPROTO_*, 0 if it is not known
	proto     int    // the transport protocol, -1 if it is not known
	mark      *exposure.MarkChange
	marks     bool // with a mark that is not known
	untracked bool
	changed   bool // since the last match
	// The last expression required the value in a register to be at least this one.
	from         []byte
	fromRegister uint64
	earlier      []exposure.Rule // for packets that an earlier statement changed and a later match excludes
}

// chain returns the rules of a chain. saved are the same rules as iptables-save
// printed them, or nil.
func (t *translator) chain(c *liveChain, saved []exposure.Rule) ([]exposure.Rule, error) {
	out := make([]exposure.Rule, 0, len(c.rules))
	for i := range c.rules {
		t.rule, t.out, t.native = &c.rules[i], nil, false
		w := way{proto: -1, family: map[string]uint64{"ip": unix.NFPROTO_IPV4, "ip6": unix.NFPROTO_IPV6}[t.family]}
		t.run(w, t.rule.exprs)
		if t.err != nil {
			return nil, t.err
		}
		if saved != nil && !t.native {
			out = append(out, saved[i])
		} else {
			out = append(out, t.out...)
		}
	}
	return out, nil
}

// run translates the rest of a rule.
func (t *translator) run(w way, exprs []expression) {
	for i, e := range exprs {
		a, err := attributesOf(e.data)
		if err != nil {
			t.err = fmt.Errorf("rule with handle %d: %w", t.rule.handle, err)
		}
		if t.err != nil {
			return
		}
		switch e.name {
		case "immediate":
			data, _ := attributesOf(a[unix.NFTA_IMMEDIATE_DATA])
			if data[unix.NFTA_DATA_VERDICT] != nil {
				t.verdict(w, a[unix.NFTA_IMMEDIATE_DATA])
				return
			}
			v := data[unix.NFTA_DATA_VALUE]
			w.set(a[unix.NFTA_IMMEDIATE_DREG], content{data: v, size: len(v)})
		case "cmp":
			t.compare(&w, a)
			continue
		case "range":
			from, _ := attributesOf(a[unix.NFTA_RANGE_FROM_DATA])
			to, _ := attributesOf(a[unix.NFTA_RANGE_TO_DATA])
			list := elements{{first: from[unix.NFTA_DATA_VALUE], last: to[unix.NFTA_DATA_VALUE]}}
			t.match(&w, w.get(a[unix.NFTA_RANGE_SREG]), list, number(a[unix.NFTA_RANGE_OP]) == unix.NFT_RANGE_NEQ)
		case "lookup":
			if t.lookup(&w, a, exprs[i+1:]) {
				return
			}
		case "bitwise":
			t.bitwise(&w, a)
		case "byteorder":
			c := w.get(a[unix.NFTA_BYTEORDER_SREG])
			c.pieces = slices.Clone(c.pieces)
			for i := range c.pieces {
				c.pieces[i].host = !c.pieces[i].host
			}
			w.set(a[unix.NFTA_BYTEORDER_DREG], c)
		default:
			if !t.load(&w, e.name, a) && !t.condition(&w, e.name, a) && t.statement(&w, e.name, a) {
				return
			}
		}
		w.from = nil
	}
	t.end(w, exposure.Rule{})
}

func register(b []byte) int {
	if at := slot(uint32(number(b))); at >= 0 && at < len(way{}.regs) {
		return at
	}
	return 0 // the verdict register, which holds no value
}

func (w *way) set(reg []byte, c content) {
	at := register(reg)
	for i := at; i < min(at+parts(c.size), len(w.regs)); i++ {
		w.regs[i] = content{}
	}
	w.regs[at] = c
}

func (w *way) get(reg []byte) content { return w.regs[register(reg)] }

// key returns the parts of a key of size bytes that begins in a register.
func (w *way) key(reg []byte, size int) (out []piece) {
	start := register(reg)
	for pos := 0; pos < size; {
		at := start + pos/4
		if at >= len(w.regs) || w.regs[at].size == 0 || w.regs[at].pieces == nil {
			return append(out, piece{subject: subject{name: "a field", size: size - pos}, pos: pos, len: size - pos})
		}
		for _, p := range w.regs[at].pieces {
			p.pos += pos
			if p.len = min(p.len, size-p.pos); p.len > 0 {
				out = append(out, p)
			}
		}
		pos += 4 * parts(w.regs[at].size)
	}
	return out
}

// compare translates a comparison with a constant.
func (t *translator) compare(w *way, a attributes) {
	data, _ := attributesOf(a[unix.NFTA_CMP_DATA])
	v := data[unix.NFTA_DATA_VALUE]
	from := w.from
	w.from = nil
	lowest, highest := make([]byte, len(v)), bytes.Repeat([]byte{0xff}, len(v))
	list, not, ok := elements{{first: v, last: v}}, false, true
	switch number(a[unix.NFTA_CMP_OP]) {
	case unix.NFT_CMP_NEQ:
		not = true
	case unix.NFT_CMP_LT:
		list[0].first = lowest
		list[0].last, ok = less(v)
	case unix.NFT_CMP_LTE:
		list[0].first = lowest
		// nft makes two comparisons of a range.
		if at := number(a[unix.NFTA_CMP_SREG]); from != nil && w.fromRegister == at && len(from) == len(v) && !w.changed {
			list[0].first = from
			w.matches, w.text = w.matches[:len(w.matches)-1], w.text[:len(w.text)-1]
		}
	case unix.NFT_CMP_GT:
		list[0].last = highest
		list[0].first, ok = more(v)
	case unix.NFT_CMP_GTE:
		list[0].last = highest
	}
	if !ok {
		list = nil
	}
	c := w.get(a[unix.NFTA_CMP_SREG])
	t.match(w, c, list, not)
	if number(a[unix.NFTA_CMP_OP]) == unix.NFT_CMP_GTE && len(c.pieces) == 1 && c.pieces[0].domain == nil {
		w.from, w.fromRegister = v, number(a[unix.NFTA_CMP_SREG])
	}
}

// match adds the match of packets for which a content is within one of the elements.
func (t *translator) match(w *way, c content, list elements, not bool) {
	size := 0
	for _, e := range list {
		size = min(len(e.first), len(e.last))
	}
	var fit []piece
	for _, p := range c.pieces { // a comparison may be shorter than the register
		if p.len = min(p.len, size-p.pos); p.len > 0 {
			fit = append(fit, p)
		}
	}
	if len(fit) == 0 {
		w.add(exposure.Match{Field: exposure.Unknown, Text: "a comparison"}, "a comparison")
		return
	}
	if len(fit) > 1 && !bytes.Equal(list[0].first, list[0].last) {
		w.add(exposure.Match{Field: exposure.Unknown, Text: fit[0].name}, fit[0].name)
		return
	}
	for i, p := range fit {
		p.mask, p.xor = p.mask[:min(len(p.mask), p.len)], p.xor[:min(len(p.xor), p.len)]
		if len(p.mask) == 0 {
			p.mask, p.xor = nil, nil
		}
		fit[i] = p
	}
	if len(fit) > 1 && not {
		m := match(fit, list)
		m.Not = true
		w.add(m, fit[0].name+" != ...")
		return
	}
	for _, p := range fit {
		m := p.match(list)
		equal := " "
		switch {
		case not && p.name == "ct state" && m.Names != nil: // a packet has one state
			inverse := slices.DeleteFunc(slices.Clone(p.domain), func(n named) bool { return slices.Contains(m.Names, n.name) })
			m.Names = namesOf(inverse, ^uint32(0))
			w.add(m, "ct state "+strings.ToLower(strings.Join(m.Names, ",")))
			continue
		case not:
			m.Not = !m.Not
			equal = " != "
		}
		if !not && p.field == exposure.Destination && p.domain != nil {
			w.family = map[bool]uint64{true: unix.NFPROTO_IPV4, false: unix.NFPROTO_IPV6}[m.Addrs.Contains(netip.IPv4Unspecified())]
		}
		if !not && p.field == exposure.Protocol && len(m.Numbers) == 1 && m.Numbers[0].First == m.Numbers[0].Last {
			w.proto = int(m.Numbers[0].First)
		}
		w.add(m, p.name+equal+p.show(list))
	}
}

// add adds a match. If the rule changed the packet before, the packets that do not match
// keep the change.
func (w *way) add(m exposure.Match, text string) {
	if w.changed {
		w.changed = false
		w.earlier = append(slices.Clip(w.earlier), w.finished(exposure.Rule{}))
	}
	if n := len(w.matches); n > 0 && (m.Field == exposure.Source || m.Field == exposure.Destination) && !m.Not && isFamily(w.matches[n-1]) {
		w.matches = w.matches[:n-1]
	}
	if text != "" {
		w.say(text)
	}
	if !isAlways(m) {
		w.matches = append(slices.Clip(w.matches), m)
	}
}

// isFamily reports whether a match covers all addresses of a family.
func isFamily(m exposure.Match) bool {
	return m.Field == exposure.Destination && !m.Not && len(m.Addrs) == 1 && m.Addrs[0] == exposure.All(m.Addrs[0].First)[0]
}

// lookup translates a lookup in a set or map. It returns true if it translated the rest
// of the rule too.
func (t *translator) lookup(w *way, a attributes, rest []expression) bool {
	t.native = true
	name := text(a[unix.NFTA_LOOKUP_SET])
	s, err := t.sets.get(name)
	if err != nil {
		t.err = fmt.Errorf("set %s: %w", name, err)
		return true
	}
	key := w.key(a[unix.NFTA_LOOKUP_SREG], int(s.keyLen))
	var names []string
	for _, p := range key {
		names = append(names, p.name)
	}
	subject := strings.Join(names, " . ")
	shown := func(list elements) string {
		if s.isAnonymous() && len(key) == 1 {
			return key[0].show(list)
		}
		return "@" + name
	}
	isMap := a[unix.NFTA_LOOKUP_DREG] != nil
	if s.isDynamic() {
		what := fmt.Sprintf("%s @%s", subject, name)
		w.add(exposure.Match{Field: exposure.Sometimes, Text: what + ", whose elements change"}, what)
		if isMap { // a verdict or value that is not known
			t.end(*w, exposure.Rule{Verdict: exposure.Undecided})
		}
		return isMap
	}
	if !isMap {
		m := s.match(key, s.list)
		equal := " "
		if number(a[unix.NFTA_LOOKUP_FLAGS])&unix.NFT_LOOKUP_F_INV != 0 {
			m.Not = !m.Not
			equal = " != "
		}
		w.add(m, subject+equal+shown(s.list))
		return false
	}
	branch := func(data []byte, m exposure.Match, what string) {
		next := *w
		next.add(m, what)
		value, _ := attributesOf(data)
		if value[unix.NFTA_DATA_VERDICT] != nil {
			t.verdict(next, data)
			return
		}
		v := value[unix.NFTA_DATA_VALUE]
		next.set(a[unix.NFTA_LOOKUP_DREG], content{data: v, size: len(v)})
		t.run(next, rest)
	}
	for _, some := range groups(s.list) {
		branch(some[0].data, match(key, some), subject+" "+shown(some))
	}
	if s.catchall != nil {
		m := s.match(key, s.list)
		m.Not = !m.Not
		branch(s.catchall, m, subject+" *")
	}
	return true
}

// match is the function match, computed once for each key.
func (s *liveSet) match(key []piece, list elements) exposure.Match {
	id := ""
	for _, p := range key {
		id += fmt.Sprintf("%s %d %d %v %x %x;", p.name, p.at, p.len, p.host, p.mask, p.xor)
	}
	m, ok := s.matches[id]
	if !ok {
		m = match(key, list)
		s.matches[id] = m
	}
	return m
}

func (t *translator) bitwise(w *way, a attributes) {
	const operation = 6 // NFTA_BITWISE_OP: 0 is the boolean one, others are shifts
	c := w.get(a[unix.NFTA_BITWISE_SREG])
	mask, _ := attributesOf(a[unix.NFTA_BITWISE_MASK])
	xor, _ := attributesOf(a[unix.NFTA_BITWISE_XOR])
	size := int(number(a[unix.NFTA_BITWISE_LEN]))
	switch {
	case c.pieces == nil || number(a[operation]) != 0:
		c = opaque(exposure.Unknown, "a calculation", size)
	default:
		c = c.masked(mask[unix.NFTA_DATA_VALUE], xor[unix.NFTA_DATA_VALUE])
	}
	w.set(a[unix.NFTA_BITWISE_DREG], c)
}

// verdict ends a rule with a verdict, as attributes of a constant or element.
func (t *translator) verdict(w way, data []byte) {
	outer, _ := attributesOf(data)
	a, _ := attributesOf(outer[unix.NFTA_DATA_VERDICT])
	chain := text(a[unix.NFTA_VERDICT_CHAIN])
	code := int32(number(a[unix.NFTA_VERDICT_CODE]))
	r := exposure.Rule{To: chain}
	say := ""
	switch code & 0xff {
	case nfDrop:
		r.Verdict, say = exposure.Drop, "drop"
	case nfAccept:
		r.Verdict, say = exposure.Accept, "accept"
	case nfQueue:
		r.Verdict, say = exposure.Undecided, "queue"
	}
	switch code {
	case verdictJump:
		r.Verdict, say = exposure.Jump, "jump "+chain
	case verdictGoto:
		r.Verdict, say = exposure.Goto, "goto "+chain
	case verdictReturn:
		r.Verdict, say = exposure.Return, "return"
	case verdictContinue, verdictBreak:
		r.Verdict, say = exposure.Next, "continue"
	}
	w.say(say)
	t.end(w, r)
}

func (w *way) say(text string) { w.text = append(slices.Clip(w.text), text) }

// finished returns a rule with the matches and changes of the way.
func (w *way) finished(r exposure.Rule) exposure.Rule {
	r.Matches, r.Mark, r.Marks, r.Untracked = w.matches, w.mark, w.marks, w.untracked
	return r
}

// withoutImplied omits families and protocols that another match implies.
func withoutImplied(words []string) []string {
	implied := map[string][]string{"meta nfproto ipv4": {"ip", "icmp"}, "meta nfproto ipv6": {"ip6", "icmpv6"}, "meta protocol ipv4": {"ip"}, "meta protocol ipv6": {"ip6"},
		"meta l4proto icmp": {"icmp"}, "meta l4proto ipv6-icmp": {"icmpv6"}, "meta l4proto tcp": {"tcp"}, "meta l4proto udp": {"udp"}, "meta l4proto sctp": {"sctp"}}
	return slices.DeleteFunc(slices.Clone(words), func(w string) bool {
		by := implied[w]
		return by != nil && slices.ContainsFunc(words, func(o string) bool {
			return slices.ContainsFunc(strings.Split(o, " . "), func(o string) bool { return slices.Contains(by, o[:strings.Index(o+" ", " ")]) })
		})
	})
}

// end adds the rule, and those for packets that an earlier statement changed.
func (t *translator) end(w way, r exposure.Rule) {
	words := withoutImplied(w.text)
	if comment, ok := userdata.GetString(t.rule.userdata, userdata.TypeComment); ok {
		words = append(slices.Clip(words), "comment "+strconv.Quote(comment))
	}
	all := strings.Join(words, " ")
	if all == "" {
		all = fmt.Sprintf("rule with handle %d", t.rule.handle)
	}
	last := len(t.out)
	for _, e := range w.earlier {
		e.Text = all
		t.out = append(t.out, e)
	}
	if r.Verdict != exposure.Next || w.changed || len(w.earlier) == 0 {
		r = w.finished(r)
		r.Text = all
		// An earlier change must not affect an earlier match.
		if len(w.earlier) == 0 || !slices.ContainsFunc(w.earlier[0].Matches, func(m exposure.Match) bool { return m.Field == exposure.Mark || m.Field == exposure.State }) {
			last = len(t.out)
		}
		t.out = slices.Insert(t.out, last, r)
	}
}

// slot returns the index of the first 4-byte part of a register. Register 1 is the
// first register of 16 bytes; its first part is also register 8. The result is -1 if
// no register has the number.
func slot(reg uint32) int {
	switch {
	case reg <= unix.NFT_REG_4:
		return int(4 * reg)
	case reg < unix.NFT_REG32_00 || reg > unix.NFT_REG32_15:
		return -1
	}
	return int(reg) - unix.NFT_REG32_00 + 4
}

// parts returns how many 4-byte parts of a register a value of size bytes occupies.
func parts(size int) int { return max(1, (size+3)/4) }

// port returns the port in a register of a constant.
func (w *way) port(reg []byte) (uint16, bool) {
	if reg == nil {
		return 0, true
	}
	c := w.get(reg)
	if len(c.data) < 2 {
		return 0, false
	}
	return binary.BigEndian.Uint16(c.data), true
}

// translate ends a rule that gives a connection another destination.
func (t *translator) translate(w way, name string, addrMin, addrMax, portMin, portMax []byte, flags uint64) {
	const netmap = 1 << 6 // NF_NAT_RANGE_NETMAP
	to := exposure.Translation{Known: flags&netmap == 0}
	words := name
	if addrMin != nil {
		data := w.get(addrMin).data
		a, ok := netip.AddrFromSlice(data)
		if len(data) > 4 && w.family == unix.NFPROTO_IPV4 { // with the port after it
			a, ok = netip.AddrFromSlice(data[:4])
			if portMin != nil && len(w.get(portMin).data) == 0 && len(data) >= 6 {
				to.Port = binary.BigEndian.Uint16(data[4:])
			}
		} else if len(data) > 16 {
			a, ok = netip.AddrFromSlice(data[:16])
			if portMin != nil && len(w.get(portMin).data) == 0 && len(data) >= 18 {
				to.Port = binary.BigEndian.Uint16(data[16:])
			}
		}
		to.To = a
		to.Known = to.Known && ok && (addrMax == nil || bytes.Equal(w.get(addrMax).data, data))
		words += " to " + cmp.Or(map[bool]string{true: a.String()}[ok], "?")
	}
	if to.Port == 0 {
		p, ok := w.port(portMin)
		last, okLast := w.port(portMax)
		to.Port = p
		to.Known = to.Known && ok && okLast && (portMax == nil || last == p)
	}
	if to.Port != 0 {
		words += ":" + strconv.Itoa(int(to.Port))
	}
	w.say(words)
	t.end(w, exposure.Rule{Verdict: exposure.Accept, Translate: &to})
}
