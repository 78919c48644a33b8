package nftables

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// TableName is what our table is called, in the family inet.
const TableName = "basicfw"

// table is one of the family inet, as the kernel has it.
type table struct {
	name   string
	flags  uint32
	chains []chain
	sets   []set
	rules  []rule
}

type chain struct {
	name string
	// A base chain has the others; the rest are zero.
	hook   []byte // the attributes of NFTA_CHAIN_HOOK
	policy uint32
	kind   string
}

// set is a set or a map.
type set struct {
	name              string
	flags             uint32
	keyType, keyLen   uint32
	dataType, dataLen uint32
	size              uint32
	timeout           uint64 // in milliseconds
	userdata          []byte
	elements          []setElement
}

// setElement is a key of a set. In a set of intervals it is where one begins, or
// with end where it is over.
type setElement struct {
	key, data []byte // data are the attributes of NFTA_SET_ELEM_DATA
	end       bool
}

func (s set) isDynamic() bool   { return s.flags&unix.NFT_SET_EVAL != 0 }
func (s set) isMap() bool       { return s.flags&unix.NFT_SET_MAP != 0 }
func (s set) isAnonymous() bool { return s.flags&unix.NFT_SET_ANONYMOUS != 0 }

type rule struct {
	chain    string
	handle   uint64 // the kernel's, of one that was read
	exprs    []expression
	userdata []byte
	canon    string // canonical; setCanon gives it to those of a table
}

// expression is one of a rule's: what it is called, and its attributes.
type expression struct {
	name string
	data []byte
}

// chain gives one by its name.
func (t table) chain(name string) (chain, bool) {
	i := slices.IndexFunc(t.chains, func(c chain) bool { return c.name == name })
	if i < 0 {
		return chain{}, false
	}
	return t.chains[i], true
}

// set gives one by its name.
func (t table) set(name string) (set, bool) {
	i := slices.IndexFunc(t.sets, func(s set) bool { return s.name == name })
	if i < 0 {
		return set{}, false
	}
	return t.sets[i], true
}

// rulesOf are those of a chain, in their order.
func (t table) rulesOf(name string) []rule {
	var out []rule
	for _, r := range t.rules {
		if r.chain == name {
			out = append(out, r)
		}
	}
	return out
}

// remove takes a table out, be it there or not.
func remove(name string) []request {
	data := putString(nil, unix.NFTA_TABLE_NAME, name)
	return []request{
		{unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, data, "table inet " + name}, // so that there is one to delete
		{unix.NFT_MSG_DELTABLE, 0, data, "that table inet " + name + " goes"},
	}
}

// maxSent is how many elements one message has: an attribute, and so a list of
// them, ends at 64 KB.
const maxSent = 500

// requests make the table what t says, whatever it was.
func (t table) requests() []request { return append(remove(t.name), t.create(0)...) }

// requestsFresh make the table, which must not be there.
func (t table) requestsFresh() []request { return t.create(unix.NLM_F_EXCL) }

func (t table) create(flags uint16) []request {
	var out []request
	at := func(kind uint16) []byte { return putString(nil, kind, t.name) }
	out = append(out, request{unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE | flags, put32(at(unix.NFTA_TABLE_NAME), unix.NFTA_TABLE_FLAGS, t.flags), "table inet " + t.name})
	for _, c := range t.chains {
		data := putString(at(unix.NFTA_CHAIN_TABLE), unix.NFTA_CHAIN_NAME, c.name)
		if c.hook != nil {
			data = putNested(data, unix.NFTA_CHAIN_HOOK, c.hook)
			data = put32(data, unix.NFTA_CHAIN_POLICY, c.policy)
			data = putString(data, unix.NFTA_CHAIN_TYPE, c.kind)
		}
		out = append(out, request{unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, data, "chain " + c.name})
	}
	for i, s := range t.sets {
		out = append(out, s.requests(t.name, uint32(i+1))...)
	}
	for _, r := range t.rules {
		q := r.request(t.name)
		q.flags |= unix.NLM_F_APPEND
		out = append(out, q)
	}
	return out
}

// request makes the rule.
func (r rule) request(table string) request {
	data := putString(putString(nil, unix.NFTA_RULE_TABLE, table), unix.NFTA_RULE_CHAIN, r.chain)
	var list []byte
	for _, e := range r.exprs {
		list = putNested(list, unix.NFTA_LIST_ELEM, putNested(putString(nil, unix.NFTA_EXPR_NAME, e.name), unix.NFTA_EXPR_DATA, e.data))
	}
	data = putNested(data, unix.NFTA_RULE_EXPRESSIONS, list)
	if len(r.userdata) > 0 {
		data = put(data, unix.NFTA_RULE_USERDATA, r.userdata)
	}
	return request{unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE, data, fmt.Sprintf("%q in %s", r.describe(), r.chain)}
}

func (s set) requests(table string, id uint32) []request {
	name := putString(putString(nil, unix.NFTA_SET_TABLE, table), unix.NFTA_SET_NAME, s.name)
	data := put32(slices.Clone(name), unix.NFTA_SET_FLAGS, s.flags)
	data = put32(put32(data, unix.NFTA_SET_KEY_TYPE, s.keyType), unix.NFTA_SET_KEY_LEN, s.keyLen)
	if s.flags&unix.NFT_SET_MAP != 0 {
		data = put32(put32(data, unix.NFTA_SET_DATA_TYPE, s.dataType), unix.NFTA_SET_DATA_LEN, s.dataLen)
	}
	data = put32(data, unix.NFTA_SET_ID, id)
	if s.timeout > 0 {
		data = put64(data, unix.NFTA_SET_TIMEOUT, s.timeout)
	}
	if s.size > 0 {
		data = putNested(data, unix.NFTA_SET_DESC, put32(nil, unix.NFTA_SET_DESC_SIZE, s.size))
	}
	if len(s.userdata) > 0 {
		data = put(data, unix.NFTA_SET_USERDATA, s.userdata)
	}
	out := []request{{unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, data, "set " + s.name}}
	if s.isDynamic() {
		return out // packets fill it
	}
	return append(out, s.elementRequests(table, unix.NFT_MSG_NEWSETELEM, unix.NLM_F_CREATE)...)
}

// elementRequests add a set's elements to it, or take them out.
func (s set) elementRequests(table string, kind, flags uint16) []request {
	var out []request
	name := putString(putString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, table), unix.NFTA_SET_ELEM_LIST_SET, s.name)
	for some := range slices.Chunk(s.elements, maxSent) {
		var list []byte
		for _, e := range some {
			item := putNested(nil, unix.NFTA_SET_ELEM_KEY, put(nil, unix.NFTA_DATA_VALUE, e.key))
			if e.end {
				item = put32(item, unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
			}
			if e.data != nil {
				item = putNested(item, unix.NFTA_SET_ELEM_DATA, e.data)
			}
			list = putNested(list, unix.NFTA_LIST_ELEM, item)
		}
		out = append(out, request{kind, flags, putNested(slices.Clone(name), unix.NFTA_SET_ELEM_LIST_ELEMENTS, list), "an element of set " + s.name})
	}
	return out
}

// readTries is how often a table is read that changes meanwhile.
const readTries = 20

// read gives our table as it is at one moment; false where there is none, also
// where the kernel has no nf_tables.
func read() (table, bool, error) {
	s, err := dial()
	if absent(err) {
		return table{}, false, nil
	}
	if err != nil {
		return table{}, false, err
	}
	defer s.close()
	for n := 1; ; n++ {
		t, err := readOnce(s)
		switch {
		case errors.Is(err, errNoTable):
			return table{}, false, nil
		case err == nil:
			return t, true, nil
		case n == readTries || !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOENT):
			return table{}, false, fmt.Errorf("reading table inet %s: %w", TableName, err)
		}
	}
}

var errNoTable = errors.New("no such table")

func readOnce(s *socket) (t table, err error) {
	t.name = TableName
	before, err := generation(s)
	if absent(err) {
		return t, errNoTable
	}
	if err != nil {
		return t, err
	}
	err = s.ask(unix.NFT_MSG_GETTABLE, 0, putString(nil, unix.NFTA_TABLE_NAME, TableName), func(b []byte) error {
		return each(b, func(a attribute) {
			if a.kind == unix.NFTA_TABLE_FLAGS {
				t.flags = uint32(number(a.data))
			}
		})
	})
	if errors.Is(err, unix.ENOENT) {
		return t, errNoTable
	}
	if err != nil {
		return t, err
	}
	err = s.ask(unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP, nil, func(b []byte) error {
		c, of, err := readChain(b)
		if of == TableName {
			t.chains = append(t.chains, c)
		}
		return err
	})
	if err != nil {
		return t, err
	}
	err = s.ask(unix.NFT_MSG_GETSET, unix.NLM_F_DUMP, putString(nil, unix.NFTA_SET_TABLE, TableName), func(b []byte) error {
		set, err := readSet(b)
		t.sets = append(t.sets, set)
		return err
	})
	if err != nil {
		return t, err
	}
	for i := range t.sets {
		if !t.sets[i].isDynamic() {
			if err := readElements(s, &t.sets[i]); err != nil {
				return t, err
			}
		}
	}
	err = s.ask(unix.NFT_MSG_GETRULE, unix.NLM_F_DUMP, putString(nil, unix.NFTA_RULE_TABLE, TableName), func(b []byte) error {
		// The place of the message is used again.
		r, of, err := readRule(bytes.Clone(b))
		if of == TableName { // the kernel before 4.17 does not choose
			t.rules = append(t.rules, r)
		}
		return err
	})
	if err != nil {
		return t, err
	}
	t.setCanon()
	after, err := generation(s)
	if err == nil && !bytes.Equal(before, after) {
		err = unix.EINTR
	}
	return t, err
}

// generation is another one after each change of nf_tables.
func generation(s *socket) (id []byte, err error) {
	err = s.ask(unix.NFT_MSG_GETGEN, 0, nil, func(b []byte) error {
		return each(b, func(a attribute) {
			if a.kind == unix.NFTA_GEN_ID {
				id = bytes.Clone(a.data)
			}
		})
	})
	return id, err
}

func readChain(b []byte) (c chain, of string, err error) {
	err = each(b, func(a attribute) {
		switch a.kind {
		case unix.NFTA_CHAIN_TABLE:
			of = text(a.data)
		case unix.NFTA_CHAIN_NAME:
			c.name = text(a.data)
		case unix.NFTA_CHAIN_HOOK:
			c.hook = bytes.Clone(a.data)
		case unix.NFTA_CHAIN_POLICY:
			c.policy = uint32(number(a.data))
		case unix.NFTA_CHAIN_TYPE:
			c.kind = text(a.data)
		}
	})
	return c, of, err
}

func readSet(b []byte) (s set, err error) {
	err = each(b, func(a attribute) {
		n := number(a.data)
		switch a.kind {
		case unix.NFTA_SET_NAME:
			s.name = text(a.data)
		case unix.NFTA_SET_FLAGS:
			s.flags = uint32(n)
		case unix.NFTA_SET_KEY_TYPE:
			s.keyType = uint32(n)
		case unix.NFTA_SET_KEY_LEN:
			s.keyLen = uint32(n)
		case unix.NFTA_SET_DATA_TYPE:
			s.dataType = uint32(n)
		case unix.NFTA_SET_DATA_LEN:
			s.dataLen = uint32(n)
		case unix.NFTA_SET_TIMEOUT:
			s.timeout = n
		case unix.NFTA_SET_USERDATA:
			s.userdata = bytes.Clone(a.data)
		case unix.NFTA_SET_DESC:
			if d, e := attributes(a.data); e == nil {
				for _, a := range d {
					if a.kind == unix.NFTA_SET_DESC_SIZE {
						s.size = uint32(number(a.data))
					}
				}
			}
		}
	})
	return s, err
}

func readElements(s *socket, of *set) error {
	name := putString(putString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, TableName), unix.NFTA_SET_ELEM_LIST_SET, of.name)
	err := s.ask(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, name, func(b []byte) error {
		list, err := attributes(b)
		if err != nil {
			return err
		}
		for _, a := range list {
			if a.kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				continue
			}
			items, err := attributes(a.data)
			if err != nil {
				return err
			}
			for _, item := range items {
				e, err := readElement(item.data)
				if err != nil {
					return err
				}
				of.elements = append(of.elements, e)
			}
		}
		return nil
	})
	slices.SortFunc(of.elements, func(a, b setElement) int {
		if c := bytes.Compare(a.key, b.key); c != 0 || a.end == b.end {
			return c
		}
		if a.end { // where one interval ends and the next begins
			return -1
		}
		return 1
	})
	return err
}

func readElement(b []byte) (e setElement, err error) {
	var room, within [few]attribute
	list, err := appendAttributes(room[:0], b)
	for _, a := range list {
		switch a.kind {
		case unix.NFTA_SET_ELEM_KEY:
			inner, bad := appendAttributes(within[:0], a.data)
			if bad != nil || len(inner) != 1 {
				return e, errors.New("a set's element has no key")
			}
			e.key = bytes.Clone(inner[0].data)
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end = number(a.data)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_DATA:
			e.data = bytes.Clone(a.data)
		}
	}
	return e, err
}

func readRule(b []byte) (r rule, of string, err error) {
	var room, within [few]attribute
	list, err := appendAttributes(room[:0], b)
	if err != nil {
		return r, "", err
	}
	for _, a := range list {
		switch a.kind {
		case unix.NFTA_RULE_TABLE:
			of = text(a.data)
		case unix.NFTA_RULE_CHAIN:
			r.chain = text(a.data)
		case unix.NFTA_RULE_HANDLE:
			r.handle = number(a.data)
		case unix.NFTA_RULE_USERDATA:
			r.userdata = a.data
		case unix.NFTA_RULE_EXPRESSIONS:
			items, err := appendAttributes(within[:0], a.data)
			if err != nil {
				return r, of, err
			}
			r.exprs = make([]expression, len(items))
			for i, item := range items {
				if r.exprs[i], err = readExpression(item.data); err != nil {
					return r, of, err
				}
			}
		}
	}
	return r, of, nil
}

func readExpression(b []byte) (e expression, err error) {
	err = each(b, func(a attribute) {
		switch a.kind {
		case unix.NFTA_EXPR_NAME:
			e.name = text(a.data)
		case unix.NFTA_EXPR_DATA:
			e.data = a.data
		}
	})
	return e, err
}

// setCanon keeps what each rule is to the kernel, once all of the table is there.
func (t *table) setCanon() {
	for i := range t.rules {
		t.rules[i].canon = t.canonical(t.rules[i])
	}
}

// canonical is a rule in a form in which two are the same if, and only if, the
// kernel does the same by them. What counts packets is left out, and what is
// zero: a kernel sends back more attributes than it was sent, the more the newer
// it is, and those are zero. An anonymous set is what is in it, whatever its name;
// of a map that is left out.
func (t table) canonical(r rule) string {
	b := make([]byte, 0, 512)
	for _, e := range r.exprs {
		if name := e.setName(); name != "" {
			if s, ok := t.set(name); ok && s.isAnonymous() {
				b = fmt.Appendf(b, "%s ", s.definition())
				if !s.isMap() { // of which its own comparison tells
					b = fmt.Appendf(b, "%v ", s.lines())
				}
				e = e.withSet("__set")
			}
		}
		b = e.append(b)
	}
	return string(hex.AppendEncode(b, r.userdata))
}

// identity is canonical, with what is in maps.
func (t table) identity(r rule) string {
	text := r.canon
	for _, e := range r.exprs {
		if name := e.setName(); name != "" {
			if s, ok := t.set(name); ok && s.isMap() {
				text += fmt.Sprint(s.lines())
			}
		}
	}
	return text
}

// nested are the attributes of expressions in which others are nested, as deep
// as they are.
func nested(name string, kind uint16) int {
	switch name {
	case "cmp":
		return one(kind == unix.NFTA_CMP_DATA)
	case "bitwise":
		return one(kind == unix.NFTA_BITWISE_MASK || kind == unix.NFTA_BITWISE_XOR)
	case "range":
		return one(kind == unix.NFTA_RANGE_FROM_DATA || kind == unix.NFTA_RANGE_TO_DATA)
	case "immediate":
		return 2 * one(kind == unix.NFTA_IMMEDIATE_DATA)
	}
	return 0
}

func one(is bool) int {
	if is {
		return 1
	}
	return 0
}

func (e expression) append(b []byte) []byte {
	b = append(append(b, e.name...), '{')
	if e.name == "counter" {
		return append(b, '}')
	}
	var room [few]attribute
	list, err := appendAttributes(room[:0], e.data)
	if err != nil {
		return append(hex.AppendEncode(append(b, '?'), e.data), '}')
	}
	slices.SortStableFunc(list, func(x, y attribute) int { return int(x.kind) - int(y.kind) })
	for _, a := range list {
		// Within a transaction sets may have numbers besides their names.
		id := e.name == "lookup" && a.kind == unix.NFTA_LOOKUP_SET_ID || e.name == "dynset" && a.kind == unix.NFTA_DYNSET_SET_ID
		if id || !slices.ContainsFunc(a.data, func(c byte) bool { return c != 0 }) {
			continue
		}
		if e.name == "dynset" && a.kind == unix.NFTA_DYNSET_EXPR {
			if inner, err := readExpression(a.data); err == nil {
				b = inner.append(b)
				continue
			}
		}
		b = a.append(b, nested(e.name, a.kind))
	}
	return append(b, '}')
}

func (a attribute) append(b []byte, depth int) []byte {
	b = strconv.AppendUint(b, uint64(a.kind), 10)
	if depth > 0 {
		var room [few]attribute
		if inner, err := appendAttributes(room[:0], a.data); err == nil {
			b = append(b, '(')
			for _, i := range inner {
				b = i.append(b, depth-1)
			}
			return append(b, ')')
		}
	}
	return append(hex.AppendEncode(append(b, '='), a.data), ';')
}
