package nftables

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// requestsTo returns the requests that change only the differences between t, as it
// was read, and want. Unchanged rules keep their counters, and rate limits their
// sources. It returns false if the whole table has to be created again.
func (t table) requestsTo(want table) ([]request, bool) {
	if len(t.chains) == 0 || t.flags != want.flags || !slices.EqualFunc(t.chains[:1], want.chains[:1], sameChain) {
		return nil, false
	}
	c := change{from: t, to: want, name: func(kind uint16) []byte { return putString(nil, kind, want.name) }}
	for _, s := range want.sets {
		if was, ok := t.set(s.name); ok && !s.isAnonymous() && (was.definition() != s.definition() || was.isAnonymous()) {
			return nil, false
		}
	}
	var last []request // additions, which come last
	for _, ch := range want.chains {
		was, ok := t.chain(ch.name)
		if ok && !sameChain(was, ch) {
			return nil, false
		}
		if !ok {
			last = append(last, ch.request(want.name))
		}
	}
	for _, s := range want.sets {
		if was, ok := t.set(s.name); s.isAnonymous() {
			continue // added with its rule
		} else if !ok {
			last = append(last, s.requests(want.name, c.id())...)
		} else if !s.isDynamic() {
			last = append(last, c.elements(was, s)...)
		}
	}
	for _, ch := range want.chains {
		last = append(last, c.rules(ch.name)...)
	}
	var first []request
	for _, ch := range t.chains {
		if _, ok := want.chain(ch.name); ok {
			continue
		}
		for _, r := range t.rulesOf(ch.name) {
			c.remove(r)
		}
		first = append(first, request{unix.NFT_MSG_DELCHAIN, 0, putString(c.name(unix.NFTA_CHAIN_TABLE), unix.NFTA_CHAIN_NAME, ch.name), "removal of chain " + ch.name})
	}
	for _, s := range t.sets {
		if _, ok := want.set(s.name); !ok && !s.isAnonymous() {
			first = append(first, request{unix.NFT_MSG_DELSET, 0, putString(c.name(unix.NFTA_SET_TABLE), unix.NFTA_SET_NAME, s.name), "removal of set " + s.name})
		}
	}
	return slices.Concat(c.removed, first, last), true
}

func sameChain(x, y chain) bool {
	return x.name == y.name && x.policy == y.policy && x.kind == y.kind && (x.hook == nil) == (y.hook == nil) && sameHook(x.hook, y.hook)
}

// change is the change of one table to another.
type change struct {
	from, to table
	name     func(kind uint16) []byte // the table's name as an attribute
	removed  []request                // removals of rules, which are first
	ids      uint32
}

func (c *change) id() uint32 {
	c.ids++
	return c.ids
}

func (c *change) remove(r rule) {
	data := putString(c.name(unix.NFTA_RULE_TABLE), unix.NFTA_RULE_CHAIN, r.chain)
	c.removed = append(c.removed, request{unix.NFT_MSG_DELRULE, 0, put64(data, unix.NFTA_RULE_HANDLE, r.handle), fmt.Sprintf("removal of rule %q in %s", r.describe(), r.chain)})
}

// rules returns the requests that change a chain's rules to the desired ones. New
// rules are inserted before the next unchanged rule, or at the end.
func (c *change) rules(chain string) []request {
	got, want := c.from.rulesOf(chain), c.to.rulesOf(chain)
	keys := func(t table, rules []rule) []string {
		out := make([]string, len(rules))
		for i, r := range rules {
			out[i] = t.identity(r)
		}
		return out
	}
	var out []request
	for _, h := range firewall.Hunks(keys(c.from, got), keys(c.to, want)) {
		for _, r := range got[h.From:h.FromEnd] {
			c.remove(r)
		}
		before := uint64(0)
		if h.FromEnd < len(got) {
			before = got[h.FromEnd].handle
		}
		for _, r := range want[h.To:h.ToEnd] {
			out = append(out, c.insert(r, before)...)
		}
	}
	return out
}

// insert returns the requests that insert a rule before another; 0 is the end of the
// chain. Its anonymous sets get unique names.
func (c *change) insert(r rule, before uint64) []request {
	var out []request
	r.exprs = slices.Clone(r.exprs)
	for i, e := range r.exprs {
		s, ok := c.to.setOf(e)
		if !ok || !s.isAnonymous() {
			continue
		}
		id := c.id()
		for n := int(id); ; n++ {
			s.name = fmt.Sprintf("__set%d", n)
			if _, exists := c.from.set(s.name); !exists {
				c.from.sets = append(c.from.sets, set{name: s.name, flags: s.flags})
				break
			}
		}
		out = append(out, s.requests(c.to.name, id)...)
		r.exprs[i] = e.withSet(s.name)
	}
	return append(out, r.request(c.to.name, before))
}

// elements returns the requests that change a set's elements to the desired ones.
func (c *change) elements(was, want set) []request {
	pairs := func(s set) (keys []string, of map[string][]setElement) {
		of = map[string][]setElement{}
		for i, e := range s.elements {
			if e.end {
				continue
			}
			pair, key := []setElement{e}, fmt.Sprintf("%x", e.key)
			if i+1 < len(s.elements) && s.elements[i+1].end {
				end := s.elements[i+1]
				pair, key = append(pair, end), fmt.Sprintf("%s-%x", key, end.key)
			}
			keys, of[key] = append(keys, key), pair
		}
		return keys, of
	}
	wasKeys, wasOf := pairs(was)
	wantKeys, wantOf := pairs(want)
	removed, added := want, want
	removed.elements, added.elements = nil, nil
	for _, k := range wasKeys {
		if wantOf[k] == nil {
			removed.elements = append(removed.elements, wasOf[k]...)
		}
	}
	for _, k := range wantKeys {
		if wasOf[k] == nil {
			added.elements = append(added.elements, wantOf[k]...)
		}
	}
	return append(removed.elementRequests(c.to.name, unix.NFT_MSG_DELSETELEM, 0), added.elementRequests(c.to.name, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE)...)
}

// setName returns the name of the set that an expression uses, or "".
func (e expression) setName() (name string) {
	if e.name == "lookup" {
		_ = each(e.data, func(a attribute) {
			if a.kind == unix.NFTA_LOOKUP_SET {
				name = text(a.data)
			}
		})
	}
	return name
}

func (e expression) withSet(name string) expression {
	var data []byte
	_ = each(e.data, func(a attribute) {
		switch a.kind {
		case unix.NFTA_LOOKUP_SET:
			data = putString(data, a.kind, name)
		case unix.NFTA_LOOKUP_SET_ID:
		default:
			data = put(data, a.kind, a.data)
		}
	})
	return expression{e.name, data}
}
