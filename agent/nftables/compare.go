package nftables

import (
	"bytes"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// inspect is Inspect without the reading.
func (b *Backend) inspect(got snapshot, wanted firewall.Ruleset) firewall.Inspection {
	if !wanted.IsZero() {
		got.compared, got.with = compile(wanted, b.families), wanted
		return b.compare(got, got.compared)
	}
	in := firewall.Inspection{Snapshot: got, Present: got.there, Backend: backendName}
	if got.there {
		in.Drift = append(in.Drift, firewall.Drift{Chain: "nftables", Kind: firewall.Extra, Got: "table inet " + TableName})
	}
	return in
}

const backendName = "nf_tables over netlink"

func (b *Backend) compare(got snapshot, want compiled) firewall.Inspection {
	in := firewall.Inspection{Snapshot: got, Present: got.there, Backend: backendName}
	c := comparison{want: want, got: got.table, texts: map[string]string{}}
	for i, r := range want.rules {
		c.texts[r.canon] = want.texts[i]
	}
	for _, f := range b.families {
		c.family(f, got.there)
	}
	c.ways()
	c.strangers()
	in.Drift, in.Open, in.Shut, in.Flushed = c.drift, c.open, c.shut, c.flushed
	return in
}

type comparison struct {
	want    compiled
	got     table
	texts   map[string]string // of wanted rules, by what they are to the kernel
	drift   []firewall.Drift
	open    []firewall.Finding
	shut    []firewall.Finding
	flushed []firewall.Family
}

// family compares what one family's packets pass.
func (c *comparison) family(f firewall.Family, there bool) {
	add := func(chain, kind, want, got string) {
		c.drift = append(c.drift, firewall.Drift{Family: f.String(), Chain: chain, Kind: kind, Want: want, Got: got})
	}
	opened := func(format string, args ...any) {
		c.open = append(c.open, firewall.Finding{Family: f, Why: fmt.Sprintf(format, args...)})
	}
	closes := c.base(f, there, add, opened)
	wanted, missing := 0, 0
	for _, w := range c.want.chains {
		if familyOf(w.name) != f.String() {
			continue
		}
		if _, ok := c.got.chain(w.name); !ok {
			add(w.name, firewall.Missing, "the chain", "")
		}
		want := c.want.textsOf(w.name)
		lines := firewall.Lines(f.String(), w.name, want, c.lines(w.name))
		c.drift = append(c.drift, lines...)
		wanted += len(want)
		for _, d := range lines {
			if d.Kind == firewall.Missing {
				missing++
			}
			if d.Kind != firewall.Missing && acceptsAll(d.Got) {
				opened("%q in %s accepts new connections to every port", d.Got, w.name)
			}
		}
	}
	if missing == wanted {
		c.flushed = append(c.flushed, f)
		if closes {
			c.shut = append(c.shut, firewall.Finding{Family: f, Why: "our rules are gone and the chain of input drops all: no port answers, SSH neither"})
		}
	}
	for _, s := range c.want.sets {
		// Of an anonymous one its rule tells, and of a table that is gone the first line.
		if there && !s.isAnonymous() && c.setFamily(s.name) == f.String() {
			c.set(f, s)
		}
	}
}

// base compares the base chain, and tells whether it drops what nothing accepts.
func (c *comparison) base(f firewall.Family, there bool, add func(chain, kind, want, got string), opened func(string, ...any)) (closes bool) {
	if !there {
		add(baseChain, firewall.Missing, "table inet "+TableName, "")
		opened("table inet %s is gone: every port that listens is open", TableName)
		return false
	}
	if c.got.flags != 0 {
		got := fmt.Sprintf("flags %#x", c.got.flags)
		if c.got.flags&unix.NFT_TABLE_F_DORMANT != 0 {
			got = "flags dormant"
			opened("table inet %s is switched off (%s): every port that listens is open", TableName, got)
		}
		add(baseChain, firewall.Altered, "no flags", got)
	}
	want := c.want.chains[0]
	got, ok := c.got.chain(baseChain)
	switch {
	case !ok:
		add(baseChain, firewall.Missing, "the chain", "")
		opened("chain %s is gone: every port that listens is open", baseChain)
		return false
	case got.hook == nil || !sameHook(got.hook, want.hook) || got.kind != want.kind:
		add(baseChain, firewall.Altered, "type filter hook input priority filter", "another hook")
		opened("chain %s is not where packets come in", baseChain)
	case got.policy != want.policy:
		add(baseChain, firewall.Altered, "policy drop", "policy accept")
	}
	lines := firewall.Lines(f.String(), baseChain, c.want.textsOf(baseChain), c.lines(baseChain))
	c.drift = append(c.drift, lines...)
	closes = got.policy == want.policy
	for _, r := range c.got.rulesOf(baseChain) {
		closes = closes || strings.HasPrefix(withoutCounter(r.describe()), "drop")
	}
	if !closes {
		opened("chain %s accepts what no rule drops", baseChain)
	}
	for _, d := range lines {
		if d.Kind != firewall.Missing && acceptsAll(d.Got) {
			opened("%q in %s accepts new connections to every port", d.Got, baseChain)
		}
	}
	return closes
}

// sameHook compares the attributes of two hooks that count.
func sameHook(a, b []byte) bool {
	numbers := func(hook []byte) (hooknum, priority uint64) {
		list, _ := attributes(hook)
		for _, a := range list {
			switch a.kind {
			case unix.NFTA_HOOK_HOOKNUM:
				hooknum = number(a.data)
			case unix.NFTA_HOOK_PRIORITY:
				priority = number(a.data)
			}
		}
		return hooknum, priority
	}
	an, ap := numbers(a)
	bn, bp := numbers(b)
	return an == bn && ap == bp
}

// lines are the rules that a chain has. One that is wanted somewhere reads as it
// is wanted; no other reads so.
func (c *comparison) lines(chain string) []string {
	var out []string
	for _, r := range c.got.rulesOf(chain) {
		text, ok := c.texts[r.canon]
		if !ok {
			if text = r.describe(); slices.Contains(c.want.texts, text) {
				text += " (in another form)"
			}
		}
		out = append(out, text)
	}
	return out
}

// textsOf are the texts of a chain's rules.
func (c compiled) textsOf(chain string) []string {
	var out []string
	for i, r := range c.rules {
		if r.chain == chain {
			out = append(out, c.texts[i])
		}
	}
	return out
}

// set compares a set.
func (c *comparison) set(f firewall.Family, want set) {
	name := "set " + want.name
	add := func(kind, w, g string) {
		c.drift = append(c.drift, firewall.Drift{Family: f.String(), Chain: name, Kind: kind, Want: w, Got: g})
	}
	got, ok := c.got.set(want.name)
	if !ok {
		add(firewall.Missing, "the set", "")
		return
	}
	if w, g := want.definition(), got.definition(); w != g {
		add(firewall.Altered, w, g)
		return
	}
	if !want.isDynamic() {
		c.drift = append(c.drift, firewall.Lines(f.String(), name, want.lines(), got.lines())...)
	}
}

// ways compares the map by which each family's packets go to its chain. A family
// that goes by is open.
func (c *comparison) ways() {
	isMap := func(s set) bool { return s.isMap() && s.isAnonymous() }
	i, j := slices.IndexFunc(c.want.sets, isMap), slices.IndexFunc(c.got.sets, isMap)
	if j < 0 {
		return // nor is there its rule
	}
	want, got := c.want.sets[i], c.got.sets[j]
	of := func(s set, key byte) string {
		for _, e := range s.elements {
			if bytes.Equal(e.key, []byte{key}) {
				return verdictName(expression{data: putNested(nil, unix.NFTA_IMMEDIATE_DATA, e.data)})
			}
		}
		return ""
	}
	for _, f := range firewall.Families {
		w, g := of(want, protocolFamily(f)), of(got, protocolFamily(f))
		text := func(verdict string) string {
			if verdict == "" {
				return ""
			}
			return fmt.Sprintf("%v : %s", f, verdict)
		}
		d := firewall.Drift{Family: f.String(), Chain: baseChain, Kind: firewall.Altered, Want: text(w), Got: text(g)}
		switch {
		case w == g:
			continue
		case g == "":
			d.Kind = firewall.Missing
		case w == "":
			d.Kind = firewall.Extra
		}
		c.drift = append(c.drift, d)
		if g == "accept" && w != "" {
			c.open = append(c.open, firewall.Finding{Family: f, Why: fmt.Sprintf("%q in %s accepts new connections to every port", d.Got, baseChain)})
		}
	}
}

// definition is what a set is like, but for its elements.
func (s set) definition() string {
	flags := fmt.Sprintf("flags %#x, keys of %d bytes", s.flags, s.keyLen)
	if s.isMap() {
		flags += fmt.Sprintf(" to %d", s.dataLen)
	}
	if s.isDynamic() {
		flags += fmt.Sprintf(", size %d, timeout %d ms", s.size, s.timeout)
	}
	return flags
}

// lines are a set's elements, in order of their keys.
func (s set) lines() []string {
	var out []string
	for i := 0; i < len(s.elements); i++ {
		e := s.elements[i]
		if s.flags&unix.NFT_SET_INTERVAL == 0 {
			text := fmt.Sprintf("%x", e.key)
			if e.data != nil {
				text += " : " + string(attribute{data: e.data}.append(nil, 2))
			}
			out = append(out, text)
			continue
		}
		if e.end { // nft begins with one that ends nothing
			continue
		}
		last := netip.Addr{}
		if i+1 < len(s.elements) && s.elements[i+1].end {
			end, _ := netip.AddrFromSlice(s.elements[i+1].key)
			last = end.Prev()
		}
		out = append(out, interval(e.key, last))
	}
	return out
}

// interval is a network, or where it is none, its ends.
func interval(first []byte, last netip.Addr) string {
	a, _ := netip.AddrFromSlice(first)
	for bits := a.BitLen(); bits >= 0; bits-- {
		p := netip.PrefixFrom(a, bits)
		if p.Masked() != p {
			break
		}
		if end := lastOf(p); end == last || !last.IsValid() && !end.Next().IsValid() {
			return firewall.FormatPrefix(p)
		}
	}
	return fmt.Sprintf("%v-%v", a, last)
}

// strangers are chains and sets that nothing of ours asks for.
func (c *comparison) strangers() {
	add := func(name, got string) {
		c.drift = append(c.drift, firewall.Drift{Family: familyOf(name), Chain: name, Kind: firewall.Extra, Got: got})
	}
	for _, g := range c.got.chains {
		if _, ok := c.want.chain(g.name); !ok {
			add(g.name, "the chain")
			if g.hook != nil {
				continue // it can only close more
			}
		}
	}
	for _, g := range c.got.sets {
		if _, ok := c.want.set(g.name); !ok && !g.isAnonymous() {
			add(g.name, "the set")
		}
	}
}

// familyOf is the family whose packets come to a chain, or to a set; "" is both.
func familyOf(name string) string {
	for _, f := range firewall.Families {
		if strings.HasPrefix(name, f.String()+"-") {
			return f.String()
		}
	}
	return ""
}

// setFamily is the family whose rules ask a set.
func (c *comparison) setFamily(name string) string {
	for i, r := range c.want.rules {
		for _, e := range r.exprs {
			if (e.name == "lookup" || e.name == "dynset") && bytes.Contains(e.data, append([]byte(name), 0)) {
				return familyOf(c.want.rules[i].chain)
			}
		}
	}
	return ""
}

// same tells whether two tables are the same to the kernel.
func (t table) same(o table) bool {
	same := func(x, y set) bool {
		return x.name == y.name && x.definition() == y.definition() && slices.Equal(x.lines(), y.lines())
	}
	named := func(t table) []set {
		return slices.DeleteFunc(slices.Clone(t.sets), func(s set) bool { return s.isAnonymous() })
	}
	sort := func(list []set) []set {
		slices.SortFunc(list, func(a, b set) int { return strings.Compare(a.name, b.name) })
		return list
	}
	for _, c := range t.chains { // which are in the order in which they were made
		if d, ok := o.chain(c.name); !ok || !sameChain(c, d) || !slices.EqualFunc(t.rulesOf(c.name), o.rulesOf(c.name), func(x, y rule) bool { return t.identity(x) == o.identity(y) }) {
			return false
		}
	}
	return t.flags == o.flags && len(t.chains) == len(o.chains) && slices.EqualFunc(sort(named(t)), sort(named(o)), same)
}

func withoutCounter(text string) string { return strings.TrimPrefix(text, "counter ") }

// acceptsAll tells whether a rule, as it is described, accepts every new
// connection of a family.
func acceptsAll(text string) bool {
	text, _, _ = strings.Cut(text, " comment ")
	return acceptsAny.MatchString(strings.ReplaceAll(" "+text, " counter", ""))
}

// acceptsAny is a rule that asks for no more than a family, TCP, and that a
// connection is new. What nft calls "ip protocol" and "ip6 nexthdr" is described
// by its place.
var acceptsAny = regexp.MustCompile(`^( meta nfproto ipv[46]| meta l4proto tcp| @1,(72|48),8 0x06| ct state new)* accept$`)
