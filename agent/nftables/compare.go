package nftables

import (
	"bytes"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// inspect is Inspect for a snapshot.
func (b *Backend) inspect(got snapshot, wanted firewall.Ruleset) backend.Inspection {
	if !wanted.IsZero() {
		got.compared, got.with = compile(wanted, b.families), wanted
		return b.compare(got, got.compared)
	}
	in := backend.Inspection{Snapshot: got, Present: got.exists, Backend: backendName, Changes: fmt.Sprintf("%x ", got.generation)}
	if got.exists {
		in.Drift = append(in.Drift, firewall.Drift{Chain: "nftables", Kind: firewall.Extra, Got: "table inet " + TableName})
	}
	return in
}

const backendName = "nf_tables over netlink"

func (b *Backend) compare(got snapshot, want compiled) backend.Inspection {
	in := backend.Inspection{Snapshot: got, Present: got.exists, Backend: backendName, Changes: fmt.Sprintf("%x ", got.generation)}
	c := comparison{want: want, got: got.table, texts: map[string]string{}}
	for i, r := range want.rules {
		c.texts[r.canon] = want.texts[i]
	}
	for _, f := range b.families {
		c.family(f, got.exists)
	}
	c.dispatch()
	c.forward(got.exists)
	c.extras()
	in.Drift, in.Exposed, in.LockedOut, in.Flushed = c.drift, c.exposed, c.lockedOut, c.flushed
	return in
}

type comparison struct {
	want      compiled
	got       table
	texts     map[string]string // of desired rules, by their canonical form
	drift     []firewall.Drift
	exposed   []backend.Finding
	lockedOut []backend.Finding
	flushed   []firewall.Family
}

func (c *comparison) family(f firewall.Family, exists bool) {
	add := func(chain, kind, want, got string) {
		c.drift = append(c.drift, firewall.Drift{Family: f.String(), Chain: chain, Kind: kind, Want: want, Got: got})
	}
	opened := func(format string, args ...any) {
		c.exposed = append(c.exposed, backend.Finding{Family: f, Why: fmt.Sprintf(format, args...)})
	}
	closes := c.base(f, exists, add, opened)
	wanted, missing := 0, 0
	for _, w := range c.want.chains {
		if familyOf(w.name) != f.String() {
			continue
		}
		if _, ok := c.got.chain(w.name); !ok {
			add(w.name, firewall.Missing, "the chain", "")
		}
		wanted += len(c.want.rulesOf(w.name))
		missing += c.rules(f, w.name)
	}
	if missing == wanted {
		c.flushed = append(c.flushed, f)
		if closes {
			c.lockedOut = append(c.lockedOut, backend.Finding{Family: f, Why: "our rules are missing and chain input drops everything: no port answers, not even SSH"})
		}
	}
	for _, s := range c.want.sets {
		// An anonymous set is compared with its rule; a missing table is reported once.
		if exists && !s.isAnonymous() && c.setFamily(s.name) == f.String() {
			c.set(f, s)
		}
	}
}

// base compares the base chain, and reports whether it drops packets by default.
func (c *comparison) base(f firewall.Family, exists bool, add func(chain, kind, want, got string), opened func(string, ...any)) (closes bool) {
	if !exists {
		add(baseChain, firewall.Missing, "table inet "+TableName, "")
		opened("table inet %s is missing: every listening port is open", TableName)
		return false
	}
	if c.got.flags != 0 {
		got := fmt.Sprintf("flags %#x", c.got.flags)
		if c.got.flags&unix.NFT_TABLE_F_DORMANT != 0 {
			got = "flags dormant"
			opened("table inet %s is disabled (%s): every listening port is open", TableName, got)
		}
		add(baseChain, firewall.Altered, "no flags", got)
	}
	want := c.want.chains[0]
	got, ok := c.got.chain(baseChain)
	switch {
	case !ok:
		add(baseChain, firewall.Missing, "the chain", "")
		opened("chain %s is missing: every listening port is open", baseChain)
		return false
	case got.hook == nil || !sameHook(got.hook, want.hook) || got.kind != want.kind:
		add(baseChain, firewall.Altered, "type filter hook input priority filter", "another hook")
		opened("chain %s is not at the input hook", baseChain)
	case got.policy != want.policy:
		add(baseChain, firewall.Altered, "policy drop", "policy accept")
	}
	closes = got.policy == want.policy
	for _, r := range c.got.rulesOf(baseChain) {
		closes = closes || strings.HasPrefix(withoutCounter(r.describe()), "drop")
	}
	if !closes {
		opened("chain %s accepts packets that no rule drops", baseChain)
	}
	c.rules(f, baseChain)
	return closes
}

// forward compares the base chain for forwarded packets, if there should be one.
func (c *comparison) forward(exists bool) {
	want, ok := c.want.chain(forwardChain)
	got, found := c.got.chain(forwardChain)
	d := firewall.Drift{Chain: forwardChain, Kind: firewall.Altered, Want: forwardHook, Got: "another hook or policy"}
	switch {
	case !ok || !exists:
		return
	case !found:
		d.Kind, d.Want, d.Got = firewall.Missing, "the chain", ""
		c.drift = append(c.drift, d)
	case !sameChain(got, want):
		c.drift = append(c.drift, d)
	}
	c.drift = append(c.drift, firewall.Lines("", forwardChain, c.want.textsOf(forwardChain), c.lines(forwardChain))...)
}

// rules compares a chain's rules, and returns how many are missing.
func (c *comparison) rules(f firewall.Family, chain string) (missing int) {
	lines := firewall.Lines(f.String(), chain, c.want.textsOf(chain), c.lines(chain))
	c.drift = append(c.drift, lines...)
	for _, d := range lines {
		if d.Kind == firewall.Missing {
			missing++
		} else if acceptsAll(d.Got) {
			c.openedBy(f, d.Got, chain)
		}
	}
	return missing
}

func (c *comparison) openedBy(f firewall.Family, rule, chain string) {
	c.exposed = append(c.exposed, backend.Finding{Family: f, Why: fmt.Sprintf("%q in %s accepts new connections to every port", rule, chain)})
}

// sameHook compares the hook number and priority of two hooks.
func sameHook(a, b []byte) bool {
	numbers := func(hook []byte) (n struct{ hooknum, priority uint64 }) {
		_ = each(hook, func(a attribute) {
			switch a.kind {
			case unix.NFTA_HOOK_HOOKNUM:
				n.hooknum = number(a.data)
			case unix.NFTA_HOOK_PRIORITY:
				n.priority = number(a.data)
			}
		})
		return n
	}
	return numbers(a) == numbers(b)
}

// lines returns the rules of a chain as text. A rule has the text of a desired rule
// only if it equals one.
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

func (c compiled) textsOf(chain string) []string {
	var out []string
	for i, r := range c.rules {
		if r.chain == chain {
			out = append(out, c.texts[i])
		}
	}
	return out
}

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
	if want.isDynamic() {
		return
	}
	// The comparison below takes the square of the number of differences.
	if n := want.differences(got); n > maxElements {
		add(firewall.Altered, fmt.Sprintf("%d elements", len(want.elements)), fmt.Sprintf("%d elements, %d of them differ", len(got.elements), n))
		return
	} else if n > 0 {
		c.drift = append(c.drift, firewall.Lines(f.String(), name, want.lines(), got.lines())...)
	}
}

// maxElements is how many different elements of a set are reported one by one.
const maxElements = 100

// differences returns the number of elements that only one of two sets has. Both are in
// the same order.
func (s set) differences(o set) (n int) {
	less := func(a, b setElement) int {
		switch c := bytes.Compare(a.key, b.key); {
		case c != 0:
			return c
		case a.end == b.end:
			return bytes.Compare(a.data, b.data)
		case a.end:
			return -1
		}
		return 1
	}
	a, b := s.elements, o.elements
	for len(a) > 0 && len(b) > 0 {
		switch c := less(a[0], b[0]); {
		case c == 0:
			a, b = a[1:], b[1:]
		case c < 0:
			a, n = a[1:], n+1
		default:
			b, n = b[1:], n+1
		}
	}
	return n + len(a) + len(b)
}

// dispatch compares the map that sends each family's packets to its chain. A family
// that the map accepts is exposed.
func (c *comparison) dispatch() {
	isMap := func(s set) bool { return s.isMap() && s.isAnonymous() }
	i, j := slices.IndexFunc(c.want.sets, isMap), slices.IndexFunc(c.got.sets, isMap)
	if j < 0 {
		return // its rule is missing as well
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
			c.openedBy(f, d.Got, baseChain)
		}
	}
}

// definition returns the properties of a set, without its elements.
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

// lines returns a set's elements as text, sorted by key.
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
		if e.end { // nft's first element ends no interval
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

// interval returns a range as a network if it is one, otherwise as its ends.
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

// extras adds chains and sets that are not desired.
func (c *comparison) extras() {
	add := func(name, got string) {
		c.drift = append(c.drift, firewall.Drift{Family: familyOf(name), Chain: name, Kind: firewall.Extra, Got: got})
	}
	for _, g := range c.got.chains {
		if _, ok := c.want.chain(g.name); !ok {
			add(g.name, "the chain") // a base chain can only close more
		}
	}
	for _, g := range c.got.sets {
		if _, ok := c.want.set(g.name); !ok && !g.isAnonymous() {
			add(g.name, "the set")
		}
	}
}

// familyOf returns the family of a chain or set by its name; "" is both.
func familyOf(name string) string {
	for _, f := range firewall.Families {
		if strings.HasPrefix(name, f.String()+"-") {
			return f.String()
		}
	}
	return ""
}

// setFamily returns the family whose rules use a set.
func (c *comparison) setFamily(name string) string {
	for _, r := range c.want.rules {
		for _, e := range r.exprs {
			if (e.name == "lookup" || e.name == "dynset") && bytes.Contains(e.data, append([]byte(name), 0)) {
				return familyOf(r.chain)
			}
		}
	}
	return ""
}

// same reports whether two tables have the same effect in the kernel.
func (t table) same(o table) bool {
	same := func(x, y set) bool {
		return x.name == y.name && x.definition() == y.definition() && slices.Equal(x.lines(), y.lines())
	}
	named := func(t table) []set {
		list := slices.DeleteFunc(slices.Clone(t.sets), set.isAnonymous)
		slices.SortFunc(list, func(a, b set) int { return strings.Compare(a.name, b.name) })
		return list
	}
	for _, c := range t.chains { // in order of their creation
		if d, ok := o.chain(c.name); !ok || !sameChain(c, d) || !slices.EqualFunc(t.rulesOf(c.name), o.rulesOf(c.name), func(x, y rule) bool { return t.identity(x) == o.identity(y) }) {
			return false
		}
	}
	return t.flags == o.flags && len(t.chains) == len(o.chains) && slices.EqualFunc(named(t), named(o), same)
}

func withoutCounter(text string) string { return strings.TrimPrefix(text, "counter ") }

// acceptsAll reports whether a rule, given as text, accepts every new connection of a
// family.
func acceptsAll(text string) bool {
	text, _, _ = strings.Cut(text, " comment ")
	// The text of "ip protocol" and "ip6 nexthdr" is their offset.
	harmless := strings.NewReplacer(" counter", "", " meta nfproto ipv4", "", " meta nfproto ipv6", "", " meta l4proto tcp", "",
		" @1,72,8 0x06", "", " @1,48,8 0x06", "", " ct state new", "")
	return harmless.Replace(" "+text) == " accept"
}
