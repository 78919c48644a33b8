package nftables

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"
)

// requestsTo make table t, as it was read, what want says, by what differs and
// nothing else: the rules that stay keep their counters, and limits what they know
// of their sources. It is false where the whole table has to be made anew.
func (t table) requestsTo(want table) ([]request, bool) {
	if len(t.chains) == 0 || t.flags != want.flags || !slices.EqualFunc(t.chains[:1], want.chains[:1], sameChain) {
		return nil, false
	}
	c := change{from: t, to: want}
	c.name = func(kind uint16) []byte { return putString(nil, kind, want.name) }
	for _, s := range want.sets {
		if was, ok := t.set(s.name); ok && !s.isAnonymous() && (was.definition() != s.definition() || was.isAnonymous()) {
			return nil, false
		}
	}
	var last []request // of what is not there before that
	for _, ch := range want.chains {
		was, ok := t.chain(ch.name)
		if ok && !sameChain(was, ch) {
			return nil, false
		}
		if !ok {
			last = append(last, request{unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, putString(c.name(unix.NFTA_CHAIN_TABLE), unix.NFTA_CHAIN_NAME, ch.name), "chain " + ch.name})
		}
	}
	for _, s := range want.sets {
		if was, ok := t.set(s.name); s.isAnonymous() {
			continue // with its rule
		} else if !ok {
			last = append(last, s.requests(want.name, c.id())...)
		} else if !s.isDynamic() {
			last = append(last, c.elements(was, s)...)
		}
	}
	for _, ch := range want.chains {
		rules, ok := c.rules(ch.name)
		if !ok {
			return nil, false
		}
		last = append(last, rules...)
	}
	var first []request
	for _, ch := range t.chains {
		if _, ok := want.chain(ch.name); ok {
			continue
		}
		for _, r := range t.rulesOf(ch.name) {
			c.remove(r)
		}
		first = append(first, request{unix.NFT_MSG_DELCHAIN, 0, putString(c.name(unix.NFTA_CHAIN_TABLE), unix.NFTA_CHAIN_NAME, ch.name), "that chain " + ch.name + " goes"})
	}
	for _, s := range t.sets {
		if _, ok := want.set(s.name); !ok && !s.isAnonymous() {
			first = append(first, request{unix.NFT_MSG_DELSET, 0, putString(c.name(unix.NFTA_SET_TABLE), unix.NFTA_SET_NAME, s.name), "that set " + s.name + " goes"})
		}
	}
	return slices.Concat(c.gone, first, last), true
}

func sameChain(x, y chain) bool {
	return x.name == y.name && x.policy == y.policy && x.kind == y.kind && (x.hook == nil) == (y.hook == nil) && sameHook(x.hook, y.hook)
}

// change is one table on its way to another.
type change struct {
	from, to table
	name     func(kind uint16) []byte // the table's, as an attribute
	gone     []request                // rules that go, which is before all else
	ids      uint32
}

// id numbers a set within the change.
func (c *change) id() uint32 {
	c.ids++
	return c.ids
}

func (c *change) remove(r rule) {
	data := putString(c.name(unix.NFTA_RULE_TABLE), unix.NFTA_RULE_CHAIN, r.chain)
	c.gone = append(c.gone, request{unix.NFT_MSG_DELRULE, 0, put64(data, unix.NFTA_RULE_HANDLE, r.handle), fmt.Sprintf("that %q in %s goes", r.describe(), r.chain)})
}

// maxCompared bounds the work of comparing two chains.
const maxCompared = 1 << 20

// rules take a chain's rules to what they are to be. Those that are new go in
// front of the next one that stays, or to the end.
func (c *change) rules(chain string) ([]request, bool) {
	got, want := c.from.rulesOf(chain), c.to.rulesOf(chain)
	if len(got)*len(want) > maxCompared {
		return nil, false
	}
	keys := func(t table, rules []rule) []string {
		out := make([]string, len(rules))
		for i, r := range rules {
			out[i] = t.identity(r)
		}
		return out
	}
	g, w := keys(c.from, got), keys(c.to, want)
	// common[i][j] is how many of g[i:] can stay, as they are in w[j:].
	common := make([][]int, len(g)+1)
	for i := range common {
		common[i] = make([]int, len(w)+1)
	}
	for i := len(g) - 1; i >= 0; i-- {
		for j := len(w) - 1; j >= 0; j-- {
			if g[i] == w[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	var out []request
	var fresh []rule
	place := func(before uint64) {
		for _, r := range fresh {
			out = append(out, c.insert(r, before)...)
		}
		fresh = nil
	}
	i, j := 0, 0
	for i < len(g) || j < len(w) {
		switch {
		case i < len(g) && j < len(w) && g[i] == w[j]:
			place(got[i].handle)
			i, j = i+1, j+1
		case j == len(w) || i < len(g) && common[i+1][j] >= common[i][j+1]:
			c.remove(got[i])
			i++
		default:
			fresh = append(fresh, want[j])
			j++
		}
	}
	place(0)
	return out, true
}

// insert puts a rule in front of another; 0 is the chain's end. Its anonymous sets
// get names that no other has.
func (c *change) insert(r rule, before uint64) []request {
	var out []request
	r.exprs = slices.Clone(r.exprs)
	for i, e := range r.exprs {
		s, ok := c.to.set(e.setName())
		if !ok || !s.isAnonymous() {
			continue
		}
		id := c.id()
		for n := int(id); ; n++ {
			s.name = fmt.Sprintf("__set%d", n)
			if _, there := c.from.set(s.name); !there {
				c.from.sets = append(c.from.sets, set{name: s.name, flags: s.flags})
				break
			}
		}
		out = append(out, s.requests(c.to.name, id)...)
		r.exprs[i] = e.withSet(s.name)
	}
	q := r.request(c.to.name)
	q.flags |= unix.NLM_F_APPEND
	if before != 0 {
		q.flags &^= unix.NLM_F_APPEND
		q.data = put64(q.data, unix.NFTA_RULE_POSITION, before)
	}
	return append(out, q)
}

// elements take a set's elements to what they are to be.
func (c *change) elements(was, want set) []request {
	pairs := func(s set) (keys []string, of map[string][]setElement) {
		of = map[string][]setElement{}
		for i, e := range s.elements {
			if e.end {
				continue
			}
			pair := []setElement{e}
			if i+1 < len(s.elements) && s.elements[i+1].end {
				pair = append(pair, s.elements[i+1])
			}
			key := fmt.Sprintf("%x", pair[0].key)
			if len(pair) == 2 {
				key += fmt.Sprintf("-%x", pair[1].key)
			}
			keys, of[key] = append(keys, key), pair
		}
		return keys, of
	}
	wasKeys, wasOf := pairs(was)
	wantKeys, wantOf := pairs(want)
	gone, fresh := want, want
	gone.elements, fresh.elements = nil, nil
	for _, k := range wasKeys {
		if wantOf[k] == nil {
			gone.elements = append(gone.elements, wasOf[k]...)
		}
	}
	for _, k := range wantKeys {
		if wasOf[k] == nil {
			fresh.elements = append(fresh.elements, wantOf[k]...)
		}
	}
	return append(gone.elementRequests(c.to.name, unix.NFT_MSG_DELSETELEM, 0), fresh.elementRequests(c.to.name, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE)...)
}

// setName is the set that an expression asks, or "".
func (e expression) setName() string {
	if e.name != "lookup" {
		return ""
	}
	var room [few]attribute
	list, _ := appendAttributes(room[:0], e.data)
	for _, a := range list {
		if a.kind == unix.NFTA_LOOKUP_SET {
			return text(a.data)
		}
	}
	return ""
}

// withSet is a lookup in another set.
func (e expression) withSet(name string) expression {
	list, _ := attributes(e.data)
	var data []byte
	for _, a := range list {
		switch a.kind {
		case unix.NFTA_LOOKUP_SET:
			data = putString(data, a.kind, name)
		case unix.NFTA_LOOKUP_SET_ID:
		default:
			data = put(data, a.kind, a.data)
		}
	}
	return expression{e.name, data}
}
