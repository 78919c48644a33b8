package nftables

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	nft "github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// The base chain at the input hook. It sends each family's packets to a separate chain,
// and drops those that return. The policy is not enough: it is not active while a chain
// is created (linux/net/netfilter/nf_tables_api.c, nft_chain_commit_drop_policy), and
// has no counter.
const (
	baseChain   = "input"
	dropComment = "basicfw-drop"
)

// compiled is a ruleset as a table, with the text that nft would print for it.
type compiled struct {
	table
	texts []string                  // per rule
	exprs [][]expr.Any              // per rule, until marshal
	lists map[string][]netip.Prefix // the networks of each set
}

func compile(r firewall.Ruleset, families []firewall.Family) compiled {
	c := write(r, families)
	c.marshal()
	c.setCanon()
	return c
}

// write is compile without the kernel's form of the rules. Rules that differ only in
// their network, port or ICMP type are merged into one with a set: then the cost per
// packet is the same for one network and for ten thousand.
func write(r firewall.Ruleset, families []firewall.Family) compiled {
	c := compiled{table: table{name: TableName}}
	hook := put32(put32(nil, unix.NFTA_HOOK_HOOKNUM, unix.NF_INET_LOCAL_IN), unix.NFTA_HOOK_PRIORITY, 0)
	c.chains = append(c.chains, chain{name: baseChain, hook: hook, policy: 0, kind: "filter"})
	c.dispatch(families)
	if r.Forwards() {
		c.dispatchForward(families)
	}
	for _, f := range families {
		for _, ch := range r.Chains(f) {
			c.chains = append(c.chains, chain{name: chainName(f, ch.Name)})
			for _, rule := range merge(ch.Rules) {
				c.add(f, chainName(f, ch.Name), rule)
			}
		}
	}
	return c
}

// chainName returns the name of a ruleset's chain in this table, which holds the
// chains of both families.
func chainName(f firewall.Family, name string) string {
	name = strings.TrimPrefix(name, firewall.ChainPrefix)
	if name == strings.ToUpper(name) { // service names are in lower case
		name = strings.ToLower(name)
	}
	return f.String() + "-" + name
}

func (c *compiled) dispatch(families []firewall.Family) {
	m := set{name: "__map0", flags: unix.NFT_SET_ANONYMOUS | unix.NFT_SET_CONSTANT | unix.NFT_SET_MAP,
		keyType: nft.TypeNFProto.GetNFTMagic(), keyLen: 1, dataType: unix.NFT_DATA_VERDICT, dataLen: 16}
	var words []string
	for _, f := range families {
		to := chainName(f, firewall.InputChain)
		jump := unix.NFT_JUMP // a variable: the constant does not fit in a uint32
		verdict := putString(put32(nil, unix.NFTA_VERDICT_CODE, uint32(jump)), unix.NFTA_VERDICT_CHAIN, to)
		m.elements = append(m.elements, setElement{key: []byte{protocolFamily(f)}, data: putNested(nil, unix.NFTA_DATA_VERDICT, verdict)})
		words = append(words, fmt.Sprintf("%v : jump %s", f, to))
	}
	c.sets = append(c.sets, m)
	var w writer
	w.add("meta nfproto vmap { "+strings.Join(words, ", ")+" }", &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Lookup{SourceRegister: 1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: m.name})
	c.put(baseChain, w)
	w = writer{comment: dropComment}
	w.add("counter", &expr.Counter{})
	w.add("drop", &expr.Verdict{Kind: expr.VerdictDrop})
	c.put(baseChain, w)
}

// The base chain at the forward hook. It comes before chains of priority filter and
// only drops packets: other tables decide about the rest.
const (
	forwardChain    = "forward"
	forwardPriority = -150 // that of mangle in iptables
)

// forwardHook is the text of its hook.
const forwardHook = "type filter hook forward priority mangle; policy accept;"

func (c *compiled) dispatchForward(families []firewall.Family) {
	priority := forwardPriority // a variable: the constant does not fit in a uint32
	hook := put32(put32(nil, unix.NFTA_HOOK_HOOKNUM, unix.NF_INET_FORWARD), unix.NFTA_HOOK_PRIORITY, uint32(priority))
	c.chains = append(c.chains, chain{name: forwardChain, hook: hook, policy: 1, kind: "filter"})
	for _, f := range families {
		to := chainName(f, firewall.ForwardChain)
		w := writer{family: f}
		w.add("meta nfproto "+f.String(), &expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equal(protocolFamily(f)))
		w.add("jump "+to, &expr.Verdict{Kind: expr.VerdictJump, Chain: to})
		c.put(forwardChain, w)
	}
}

func addressType(f firewall.Family) nft.SetDatatype {
	return firewall.ByFamily(f, nft.TypeIPAddr, nft.TypeIP6Addr)
}

func protocolFamily(f firewall.Family) byte {
	return firewall.ByFamily[byte](f, unix.NFPROTO_IPV4, unix.NFPROTO_IPV6)
}

// mergedRule is one rule, or several that differ only in one of the lists.
type mergedRule struct {
	firewall.Rule
	sources []netip.Prefix
	ports   []uint16
	types   []uint8
}

func single(p firewall.PortRange) bool { return p.First == p.Last && !p.IsZero() }

// merge combines consecutive rules that differ only in a network, a port or an ICMP
// type. The verdict is the same, whichever of them matches.
func merge(rules []firewall.Rule) []mergedRule {
	out := make([]mergedRule, 0, len(rules))
	for _, r := range rules {
		f := mergedRule{Rule: r}
		if (r.Limit == nil || r.Limit.Name != "") && r.Target != firewall.Log { // other limits count per rule
			if n := len(out); n > 0 && out[n-1].add(r) {
				continue
			}
			if r.Src.IsValid() {
				f.sources = []netip.Prefix{r.Src}
			}
			if single(r.DstPort) {
				f.ports = []uint16{r.DstPort.First}
			}
			if r.ICMPType != nil {
				f.types = []uint8{*r.ICMPType}
			}
		}
		out = append(out, f)
	}
	for i := range out {
		slices.Sort(out[i].ports)
		slices.Sort(out[i].types)
		if out[i].sources = distinct(out[i].sources); len(out[i].sources) == 1 {
			out[i].Src = out[i].sources[0] // the widest, which need not be the first rule's
		}
	}
	return out
}

// add merges a rule, if it differs in one list only. Only one list can have several
// entries: two would match all their combinations.
func (f *mergedRule) add(r firewall.Rule) bool {
	source, port, kind := f.Rule, f.Rule, f.Rule // each with one field of r
	source.Src, port.DstPort, kind.ICMPType = r.Src, r.DstPort, r.ICMPType
	sources, ports, types := len(f.sources), len(f.ports), len(f.types)
	switch {
	case sources > 0 && ports < 2 && types < 2 && r.Src.IsValid() && alike(source, r):
		f.sources = append(f.sources, r.Src)
	case ports > 0 && sources < 2 && types < 2 && single(r.DstPort) && alike(port, r):
		f.ports = append(f.ports, r.DstPort.First)
	case types > 0 && sources < 2 && ports < 2 && r.ICMPType != nil && alike(kind, r):
		f.types = append(f.types, *r.ICMPType)
	default:
		return false
	}
	return true
}

// alike reports whether two rules are equal.
func alike(a, b firewall.Rule) bool {
	flags := func(m *firewall.FlagMatch) firewall.FlagMatch {
		if m == nil {
			return firewall.FlagMatch{}
		}
		return *m
	}
	limit := func(l *firewall.Limit) firewall.Limit {
		if l == nil {
			return firewall.Limit{}
		}
		return *l
	}
	same := flags(a.Flags) == flags(b.Flags) && limit(a.Limit) == limit(b.Limit) && (a.ICMPType == nil) == (b.ICMPType == nil) && (a.ICMPType == nil || *a.ICMPType == *b.ICMPType)
	a.Flags, b.Flags, a.ICMPType, b.ICMPType, a.Limit, b.Limit = nil, nil, nil, nil, nil, nil
	return same && a == b
}

// distinct sorts networks and removes those within another: the intervals of a set must
// not overlap.
func distinct(list []netip.Prefix) []netip.Prefix {
	list = slices.Clone(list)
	slices.SortFunc(list, func(a, b netip.Prefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), a.Bits()-b.Bits())
	})
	var out []netip.Prefix
	for _, p := range list {
		if n := len(out); n == 0 || !out[n-1].Contains(p.Addr()) {
			out = append(out, p)
		}
	}
	return out
}

// add appends a rule and the sets that it uses.
func (c *compiled) add(f firewall.Family, in string, r mergedRule) {
	w := writer{comment: r.Comment, family: f}
	if r.In != "" {
		w.iface("iifname", expr.MetaKeyIIFNAME, r.In)
	}
	if r.Out != "" {
		w.iface("oifname", expr.MetaKeyOIFNAME, r.Out)
	}
	switch {
	case r.Sources != nil:
		w.address("saddr", firstOf(r.Sources.List[0]), c.networks(f, r.Sources.Name, r.Sources.List))
	case len(r.sources) > 1:
		w.address("saddr", firstOf(r.sources[0]), c.networks(f, strings.TrimPrefix(r.Comment, "basicfw-"), r.sources))
	case r.Src.IsValid():
		w.address("saddr", r.Src, "")
	}
	if r.Dst.IsValid() {
		w.address("daddr", r.Dst, "")
	}
	if r.HopLimit != 0 {
		w.network()
		w.add(fmt.Sprintf("ip6 hoplimit %d", r.HopLimit), payload(expr.PayloadBaseNetworkHeader, 7, 1), equal(r.HopLimit))
	}
	c.transport(&w, r)
	switch r.State {
	case "":
	case firewall.StateReply:
		w.add("ct direction reply", &expr.Ct{Key: expr.CtKeyDIRECTION, Register: 1}, equal(1)) // IP_CT_DIR_REPLY
	case firewall.StateNotDNAT:
		w.add("ct status ! dnat", &expr.Ct{Key: expr.CtKeySTATUS, Register: 1})
		w.masked(binaryutil.NativeEndian.PutUint32(statusDNAT), expr.CmpOpEq, make([]byte, 4))
	default:
		w.add("ct state "+stateNames[r.State], &expr.Ct{Key: expr.CtKeySTATE, Register: 1})
		w.masked(binaryutil.NativeEndian.PutUint32(states[r.State]), expr.CmpOpNeq, make([]byte, 4))
	}
	if r.IPsec {
		w.add("meta ipsec exists", &expr.Meta{Key: metaSecpath, Register: 1}, equal(1))
	}
	if r.DstType != "" {
		w.add("fib daddr type "+strings.ToLower(r.DstType), &expr.Fib{Register: 1, FlagDADDR: true, ResultADDRTYPE: true},
			equal(binaryutil.NativeEndian.PutUint32(addressTypes[r.DstType])...))
	}
	// The first and the last second are included.
	if !r.Since.IsZero() {
		w.clock(">=", expr.CmpOpGte, r.Since)
	}
	if !r.Until.IsZero() {
		w.clock("<", expr.CmpOpLt, r.Until.Add(time.Second))
	}
	if r.Limit != nil {
		c.limit(&w, *r.Limit)
	}
	w.add("counter", &expr.Counter{})
	switch r.Target {
	case firewall.Accept:
		w.add("accept", &expr.Verdict{Kind: expr.VerdictAccept})
	case firewall.Drop:
		w.add("drop", &expr.Verdict{Kind: expr.VerdictDrop})
	case firewall.Return:
		w.add("return", &expr.Verdict{Kind: expr.VerdictReturn})
	case firewall.Log:
		w.add(fmt.Sprintf("log prefix %q level debug", r.LogPrefix),
			&expr.Log{Key: 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_LEVEL, Level: expr.LogLevelDebug, Data: []byte(r.LogPrefix)})
	default:
		to := chainName(f, r.Target)
		w.add("jump "+to, &expr.Verdict{Kind: expr.VerdictJump, Chain: to})
	}
	c.put(in, w)
}

// put appends a writer's rule to a chain.
func (c *compiled) put(in string, w writer) {
	r := rule{chain: in}
	if w.comment != "" {
		r.userdata = userdata.AppendString(nil, userdata.TypeComment, w.comment)
		w.words = append(w.words, fmt.Sprintf("comment %q", w.comment))
	}
	c.rules, c.texts, c.exprs = append(c.rules, r), append(c.texts, strings.Join(w.words, " ")), append(c.exprs, w.exprs)
}

// marshal converts the rules to the form that the kernel expects.
func (c *compiled) marshal() {
	for i, exprs := range c.exprs {
		c.rules[i].exprs = make([]expression, len(exprs))
		for j, e := range exprs {
			// Our expressions can always be marshalled.
			data, err := expr.Marshal(unix.NFPROTO_INET, e)
			if err == nil {
				c.rules[i].exprs[j], err = readExpression(data)
			}
			if err != nil {
				panic(fmt.Sprintf("expression of %q: %v", c.texts[i], err))
			}
		}
	}
	c.exprs = nil
}

func (c *compiled) transport(w *writer, r mergedRule) {
	if r.Proto == "" {
		return
	}
	number := r.Proto.Number()
	name := string(r.Proto)
	if r.ICMPType != nil {
		of := nft.TypeICMPType
		if r.Proto == firewall.ICMPv6 {
			name, of = "icmpv6", nft.TypeICMP6Type
		}
		w.network()
		w.silent(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal(number))
		if len(r.types) < 2 {
			w.add(name+" type "+typeName(r.Proto, *r.ICMPType), payload(expr.PayloadBaseTransportHeader, 0, 1), equal(*r.ICMPType))
			return
		}
		keys, words := [][]byte{}, []string{}
		for _, t := range r.types {
			keys, words = append(keys, []byte{t}), append(words, typeName(r.Proto, t))
		}
		w.add(name+" type { "+strings.Join(words, ", ")+" }", payload(expr.PayloadBaseTransportHeader, 0, 1),
			&expr.Lookup{SourceRegister: 1, SetName: c.anonymous(of, keys)})
		return
	}
	if r.SrcPort.IsZero() && r.DstPort.IsZero() && r.Flags == nil {
		w.add("meta l4proto "+name, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal(number))
		return
	}
	field, load := name+" dport", payload(expr.PayloadBaseTransportHeader, 2, 2)
	if r.Dialled {
		field, load = "ct original proto-dst", &expr.Ct{Key: expr.CtKeyPROTODST, Register: 1} // direction 0
		w.add("meta l4proto "+name, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal(number))
	} else {
		w.silent(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, equal(number))
	}
	switch {
	case len(r.ports) > 1:
		keys, words := [][]byte{}, []string{}
		for _, p := range r.ports {
			keys, words = append(keys, be16(p)), append(words, strconv.Itoa(int(p)))
		}
		w.ports(name+" sport", payload(expr.PayloadBaseTransportHeader, 0, 2), r.SrcPort)
		w.add(field+" { "+strings.Join(words, ", ")+" }", load,
			&expr.Lookup{SourceRegister: 1, SetName: c.anonymous(nft.TypeInetService, keys)})
	case single(r.SrcPort) && single(r.DstPort): // one comparison for both, as in nft
		w.add(fmt.Sprintf("%s sport %d %s dport %d", name, r.SrcPort.First, name, r.DstPort.First),
			payload(expr.PayloadBaseTransportHeader, 0, 4), equal(append(be16(r.SrcPort.First), be16(r.DstPort.First)...)...))
	default:
		w.ports(name+" sport", payload(expr.PayloadBaseTransportHeader, 0, 2), r.SrcPort)
		w.ports(field, load, r.DstPort)
	}
	if r.Flags != nil {
		w.flags(*r.Flags)
	}
}

// limit adds the match of a rate limit. A limit per source has a dynamic set with an
// element for each source. The element expires if the source sends nothing for the time
// that the limit needs to recover fully.
func (c *compiled) limit(w *writer, l firewall.Limit) {
	e := &expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(l.Rate.N), Unit: units[l.Rate.Per].unit, Burst: l.Burst}
	words := fmt.Sprintf("limit rate %d/%s", l.Rate.N, units[l.Rate.Per].name)
	if l.Burst != 5 { // nft's default, which it does not print
		words += fmt.Sprintf(" burst %d packets", l.Burst)
	}
	if l.Name == "" {
		w.add(words, e)
		return
	}
	whole := time.Duration(e.Unit) * time.Second * time.Duration(l.Burst) / time.Duration(l.Rate.N)
	s := set{name: l.Name, flags: unix.NFT_SET_EVAL | unix.NFT_SET_TIMEOUT, size: maxSources, timeout: uint64(max(whole, time.Second).Round(time.Second).Milliseconds())}
	key, saddr := addressType(w.family), firewall.ByFamily(w.family, "ip saddr", "ip6 saddr")
	s.keyType, s.keyLen = key.GetNFTMagic(), key.Bytes
	if _, exists := c.set(s.name); !exists {
		c.sets = append(c.sets, s)
	}
	w.network()
	w.silent(payload(expr.PayloadBaseNetworkHeader, firewall.ByFamily[uint32](w.family, 12, 8), s.keyLen))
	if bits := int(s.keyLen) * 8; l.SourceBits < bits {
		mask := maskOf(l.SourceBits, int(s.keyLen))
		a, _ := netip.AddrFromSlice(mask)
		saddr += " & " + a.String()
		w.silent(and(mask))
	}
	w.add("update @"+l.Name+" { "+saddr+" "+words+" }",
		&expr.Dynset{SrcRegKey: 1, SetName: l.Name, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: []expr.Any{e}})
}

// maxSources is the maximum number of sources of a rate limit at a time. Packets of
// further sources do not match until an element expires.
const maxSources = 65535

// networks returns the name of the set for a rule's sources. It adds the set if it
// does not exist.
func (c *compiled) networks(f firewall.Family, name string, list []netip.Prefix) string {
	key := addressType(f)
	s := set{flags: unix.NFT_SET_INTERVAL, keyType: key.GetNFTMagic(), keyLen: key.Bytes, userdata: userdata.AppendUint32(nil, userdata.NFTNL_UDATA_SET_KEYBYTEORDER, 2)}
	first := f.String() + "-" + name
	s.name = first
	for n := 2; ; n++ {
		if _, exists := c.set(s.name); !exists {
			break
		}
		if slices.Equal(c.lists[s.name], list) {
			return s.name
		}
		s.name = fmt.Sprintf("%s-%d", first, n)
	}
	for _, p := range list {
		s.elements = append(s.elements, setElement{key: p.Addr().AsSlice()})
		if next := lastOf(p).Next(); next.IsValid() {
			s.elements = append(s.elements, setElement{key: next.AsSlice(), end: true})
		}
	}
	c.sets = append(c.sets, s)
	if c.lists == nil {
		c.lists = map[string][]netip.Prefix{}
	}
	c.lists[s.name] = list
	return s.name
}

// firstOf returns the first address of a network as a network of one address.
func firstOf(p netip.Prefix) netip.Prefix { return netip.PrefixFrom(p.Addr(), p.Addr().BitLen()) }

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i, m := range maskOf(p.Bits(), len(b)) {
		b[i] |= ^m
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// anonymous adds an anonymous set of a rule, and returns its name.
func (c *compiled) anonymous(key nft.SetDatatype, keys [][]byte) string {
	n := 0
	for _, s := range c.sets {
		if strings.HasPrefix(s.name, "__set") {
			n++
		}
	}
	s := set{name: fmt.Sprintf("__set%d", n), flags: unix.NFT_SET_ANONYMOUS | unix.NFT_SET_CONSTANT, keyType: key.GetNFTMagic(), keyLen: key.Bytes, size: uint32(len(keys))}
	for _, k := range keys {
		s.elements = append(s.elements, setElement{key: k})
	}
	c.sets = append(c.sets, s)
	return s.name
}

// writer builds a rule, as nft's text and as expressions for the kernel.
type writer struct {
	family  firewall.Family
	words   []string
	exprs   []expr.Any
	comment string
	known   bool // the rule matches the network protocol
}

func (w *writer) add(words string, exprs ...expr.Any) {
	w.words, w.exprs = append(w.words, words), append(w.exprs, exprs...)
}

// silent adds expressions that nft does not print.
func (w *writer) silent(exprs ...expr.Any) { w.exprs = append(w.exprs, exprs...) }

// network adds, once, a match of the network protocol. Without it nft does not print
// matches of that header by name.
func (w *writer) network() {
	if !w.known {
		w.known = true
		w.silent(&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, equal(protocolFamily(w.family)))
	}
}

func (w *writer) iface(field string, key expr.MetaKey, name string) {
	base, any := strings.CutSuffix(name, "*")
	data := []byte(base)
	if !any {
		data = append(data, make([]byte, unix.IFNAMSIZ-len(data))...)
	}
	w.add(fmt.Sprintf("%s %q", field, name), &expr.Meta{Key: key, Register: 1}, equal(data...))
}

func (w *writer) address(field string, p netip.Prefix, set string) {
	ip := firewall.ByFamily(w.family, "ip", "ip6")
	offset := firewall.ByFamily(w.family, map[string]uint32{"saddr": 12, "daddr": 16}, map[string]uint32{"saddr": 8, "daddr": 24})[field]
	w.network()
	size, bits := p.Addr().BitLen()/8, p.Bits()
	switch {
	case set != "":
		w.add(ip+" "+field+" @"+set, payload(expr.PayloadBaseNetworkHeader, offset, uint32(size)), &expr.Lookup{SourceRegister: 1, SetName: set})
	case bits == 0:
		// It contains every address, and nft refuses an empty comparison.
	case bits%8 == 0: // whole bytes need no mask
		w.add(ip+" "+field+" "+firewall.FormatPrefix(p), payload(expr.PayloadBaseNetworkHeader, offset, uint32(bits/8)), equal(p.Addr().AsSlice()[:bits/8]...))
	default:
		w.add(ip+" "+field+" "+firewall.FormatPrefix(p), payload(expr.PayloadBaseNetworkHeader, offset, uint32(size)))
		w.masked(maskOf(bits, size), expr.CmpOpEq, p.Addr().AsSlice())
	}
}

func (w *writer) ports(words string, load expr.Any, p firewall.PortRange) {
	switch {
	case p.IsZero():
	case p.First == p.Last:
		w.add(words+" "+p.String(), load, equal(be16(p.First)...))
	default:
		w.add(words+" "+p.String(), load,
			&expr.Cmp{Op: expr.CmpOpGte, Register: 1, Data: be16(p.First)}, &expr.Cmp{Op: expr.CmpOpLte, Register: 1, Data: be16(p.Last)})
	}
}

func (w *writer) flags(m firewall.FlagMatch) {
	op, words := expr.CmpOpEq, "tcp flags "+flagNames(m.Set)+" / "+flagNames(m.Mask)
	if m.Invert {
		op, words = expr.CmpOpNeq, "tcp flags != "+flagNames(m.Set)+" / "+flagNames(m.Mask)
	} else if m.Set == 0 {
		words = "tcp flags ! " + flagNames(m.Mask)
	}
	w.add(words, payload(expr.PayloadBaseTransportHeader, 13, 1))
	w.masked([]byte{byte(m.Mask)}, op, []byte{byte(m.Set)})
}

// clock adds a comparison of the time, in nanoseconds since 1970.
func (w *writer) clock(words string, op expr.CmpOp, t time.Time) {
	w.add(fmt.Sprintf("meta time %s %d", words, t.Unix()), &expr.Meta{Key: metaTime, Register: 1},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 8, Size: 8},
		&expr.Cmp{Op: op, Register: 1, Data: binary.BigEndian.AppendUint64(nil, uint64(t.UnixNano()))})
}

// Keys of linux/netfilter/nf_tables.h: NFT_META_TIME_NS (since 5.4) and NFT_META_SECPATH
// (since 4.16).
const (
	metaTime    expr.MetaKey = 30
	metaSecpath expr.MetaKey = 25
)

func (w *writer) masked(mask []byte, op expr.CmpOp, data []byte) {
	w.silent(and(mask), &expr.Cmp{Op: op, Register: 1, Data: data})
}

func and(mask []byte) expr.Any {
	return &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))}
}

func equal(data ...byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data} }

func payload(base expr.PayloadBase, offset, size uint32) expr.Any {
	return &expr.Payload{DestRegister: 1, Base: base, Offset: offset, Len: size}
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

// maskOf returns a mask of size bytes with the first bits set.
func maskOf(bits, size int) []byte {
	mask := make([]byte, size)
	for i := range bits {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return mask
}

// statusDNAT is IPS_DST_NAT.
const statusDNAT = 1 << 5

// The conntrack states of nf_tables (linux/netfilter/nf_conntrack_common.h), and
// nft's names for them.
var (
	states = map[firewall.State]uint32{
		firewall.StateInvalid:     expr.CtStateBitINVALID,
		firewall.StateEstablished: expr.CtStateBitESTABLISHED,
		firewall.StateRelated:     expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED,
		firewall.StateNew:         expr.CtStateBitNEW,
		firewall.StateUntracked:   expr.CtStateBitUNTRACKED,
		firewall.StateOpen:        expr.CtStateBitNEW | expr.CtStateBitUNTRACKED,
		firewall.StateNone:        expr.CtStateBitINVALID | expr.CtStateBitUNTRACKED,
	}
	stateNames = map[firewall.State]string{
		firewall.StateInvalid: "invalid", firewall.StateEstablished: "established", firewall.StateRelated: "established,related",
		firewall.StateNew: "new", firewall.StateUntracked: "untracked", firewall.StateOpen: "new,untracked", firewall.StateNone: "invalid,untracked",
	}
	addressTypes = map[string]uint32{"BROADCAST": unix.RTN_BROADCAST, "MULTICAST": unix.RTN_MULTICAST}
	units        = map[firewall.Unit]struct {
		unit expr.LimitTime
		name string
	}{firewall.Second: {expr.LimitTimeSecond, "second"}, firewall.Minute: {expr.LimitTimeMinute, "minute"},
		firewall.Hour: {expr.LimitTimeHour, "hour"}, firewall.Day: {expr.LimitTimeDay, "day"}}
)

// nft's names of ICMP types (RFC 792, RFC 4443, RFC 4861).
var (
	icmpTypes  = map[uint8]string{0: "echo-reply", 3: "destination-unreachable", 8: "echo-request", 11: "time-exceeded", 12: "parameter-problem"}
	icmp6Types = map[uint8]string{1: "destination-unreachable", 2: "packet-too-big", 3: "time-exceeded", 4: "parameter-problem",
		128: "echo-request", 129: "echo-reply", 130: "mld-listener-query", 131: "mld-listener-report", 132: "mld-listener-done",
		133: "nd-router-solicit", 134: "nd-router-advert", 135: "nd-neighbor-solicit", 136: "nd-neighbor-advert", 143: "mld2-listener-report"}
)

func typeName(p firewall.Proto, t uint8) string {
	names := icmpTypes
	if p == firewall.ICMPv6 {
		names = icmp6Types
	}
	return cmp.Or(names[t], strconv.Itoa(int(t)))
}

func flagNames(f firewall.TCPFlags) string { return cmp.Or(strings.ToLower(f.Names()), "0x0") }
