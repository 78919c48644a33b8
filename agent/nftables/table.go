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

// TableName is the name of our table, in the family inet.
const TableName = "basicfw"

// table is a table of the family inet, as in the kernel.
type table struct {
	name       string
	generation string // of all tables, when this one was read
	flags      uint32
	chains     []chain
	sets       []set
	rules      []rule
}

type chain struct {
	name string
	// The other fields are set for a base chain only.
	hook   []byte // the attributes of NFTA_CHAIN_HOOK
	policy uint32
	kind   string
}

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

// setElement is a key of a set. In a set of intervals, it is the first key of an
// interval or, if end is set, the first key after one.
type setElement struct {
	key, data []byte // data are the attributes of NFTA_SET_ELEM_DATA
	end       bool
}

func (s set) isDynamic() bool   { return s.flags&unix.NFT_SET_EVAL != 0 }
func (s set) isMap() bool       { return s.flags&unix.NFT_SET_MAP != 0 }
func (s set) isAnonymous() bool { return s.flags&unix.NFT_SET_ANONYMOUS != 0 }

type rule struct {
	chain    string
	handle   uint64 // the kernel's, if the rule was read
	exprs    []expression
	userdata []byte
	canon    string // the result of canonical; see setCanon
}

// expression is an expression of a rule: its name and attributes.
type expression struct {
	name string
	data []byte
}

func (t table) chain(name string) (chain, bool) {
	i := slices.IndexFunc(t.chains, func(c chain) bool { return c.name == name })
	if i < 0 {
		return chain{}, false
	}
	return t.chains[i], true
}

func (t table) set(name string) (set, bool) {
	i := slices.IndexFunc(t.sets, func(s set) bool { return s.name == name })
	if i < 0 {
		return set{}, false
	}
	return t.sets[i], true
}

func (t table) rulesOf(name string) []rule {
	var out []rule
	for _, r := range t.rules {
		if r.chain == name {
			out = append(out, r)
		}
	}
	return out
}

// remove returns the requests that remove a table, whether it exists or not.
func remove(name string) []request {
	data := putString(nil, unix.NFTA_TABLE_NAME, name)
	return []request{
		{unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, data, "table inet " + name}, // so that it exists
		{unix.NFT_MSG_DELTABLE, 0, data, "removal of table inet " + name},
	}
}

// maxSent is the maximum number of elements in a message: an attribute, such as a list
// of elements, is limited to 64 KB.
const maxSent = 500

// requests returns the requests that replace the table with t.
func (t table) requests() []request { return append(remove(t.name), t.create(0)...) }

// create returns the requests that create the table; with unix.NLM_F_EXCL it must not
// exist.
func (t table) create(flags uint16) []request {
	at := func(kind uint16) []byte { return putString(nil, kind, t.name) }
	out := []request{{unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE | flags, put32(at(unix.NFTA_TABLE_NAME), unix.NFTA_TABLE_FLAGS, t.flags), "table inet " + t.name}}
	for _, c := range t.chains {
		out = append(out, c.request(t.name))
	}
	for i, s := range t.sets {
		out = append(out, s.requests(t.name, uint32(i+1))...)
	}
	for _, r := range t.rules {
		out = append(out, r.request(t.name, 0))
	}
	return out
}

// request returns the request that creates the chain.
func (c chain) request(table string) request {
	data := putString(putString(nil, unix.NFTA_CHAIN_TABLE, table), unix.NFTA_CHAIN_NAME, c.name)
	if c.hook != nil {
		data = putNested(data, unix.NFTA_CHAIN_HOOK, c.hook)
		data = put32(data, unix.NFTA_CHAIN_POLICY, c.policy)
		data = putString(data, unix.NFTA_CHAIN_TYPE, c.kind)
	}
	return request{unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, data, "chain " + c.name}
}

// request returns the request that adds the rule before the one with a handle; 0 is the
// end of the chain.
func (r rule) request(table string, before uint64) request {
	data := putString(putString(nil, unix.NFTA_RULE_TABLE, table), unix.NFTA_RULE_CHAIN, r.chain)
	var list []byte
	for _, e := range r.exprs {
		list = putNested(list, unix.NFTA_LIST_ELEM, putNested(putString(nil, unix.NFTA_EXPR_NAME, e.name), unix.NFTA_EXPR_DATA, e.data))
	}
	data = putNested(data, unix.NFTA_RULE_EXPRESSIONS, list)
	if len(r.userdata) > 0 {
		data = put(data, unix.NFTA_RULE_USERDATA, r.userdata)
	}
	flags := uint16(unix.NLM_F_CREATE)
	if before == 0 {
		flags |= unix.NLM_F_APPEND
	} else {
		data = put64(data, unix.NFTA_RULE_POSITION, before)
	}
	return request{unix.NFT_MSG_NEWRULE, flags, data, fmt.Sprintf("rule %q in %s", r.describe(), r.chain)}
}

func (s set) requests(table string, id uint32) []request {
	name := putString(putString(nil, unix.NFTA_SET_TABLE, table), unix.NFTA_SET_NAME, s.name)
	data := put32(slices.Clone(name), unix.NFTA_SET_FLAGS, s.flags)
	data = put32(put32(data, unix.NFTA_SET_KEY_TYPE, s.keyType), unix.NFTA_SET_KEY_LEN, s.keyLen)
	if s.isMap() {
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

// elementRequests returns the requests that add or remove the elements of a set.
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
		out = append(out, request{kind, flags, putNested(slices.Clone(name), unix.NFTA_SET_ELEM_LIST_ELEMENTS, list), "elements of set " + s.name})
	}
	return out
}

// readTries is how often a read is attempted while the table keeps changing.
const readTries = 20

// read returns a consistent copy of our table. It returns false if there is none, or if
// the kernel does not support nf_tables.
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
		t, exists, err := readOnce(s)
		if err == nil {
			return t, exists, nil
		}
		if n == readTries || !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOENT) {
			return table{}, false, fmt.Errorf("reading table inet %s: %w", TableName, err)
		}
	}
}

func readOnce(s *socket) (t table, exists bool, err error) {
	before, err := generation(s)
	if absent(err) {
		return table{}, false, nil
	}
	if err != nil {
		return t, false, err
	}
	t.name, t.generation = TableName, string(before)
	err = s.ask(unix.NFT_MSG_GETTABLE, 0, putString(nil, unix.NFTA_TABLE_NAME, TableName), func(b []byte) error {
		return each(b, func(a attribute) {
			if a.kind == unix.NFTA_TABLE_FLAGS {
				t.flags = uint32(number(a.data))
			}
		})
	})
	if errors.Is(err, unix.ENOENT) {
		return table{generation: t.generation}, false, nil
	}
	list := func(kind uint16, of []byte, each func([]byte) error) {
		if err == nil {
			err = s.ask(kind, unix.NLM_F_DUMP, of, each)
		}
	}
	list(unix.NFT_MSG_GETCHAIN, nil, func(b []byte) error {
		c, of, err := readChain(b)
		if of == TableName {
			t.chains = append(t.chains, c)
		}
		return err
	})
	list(unix.NFT_MSG_GETSET, putString(nil, unix.NFTA_SET_TABLE, TableName), func(b []byte) error {
		set, err := readSet(b)
		t.sets = append(t.sets, set)
		return err
	})
	for i := range t.sets {
		if err == nil && !t.sets[i].isDynamic() {
			err = readElements(s, &t.sets[i])
		}
	}
	list(unix.NFT_MSG_GETRULE, putString(nil, unix.NFTA_RULE_TABLE, TableName), func(b []byte) error {
		// The buffer of the message is reused.
		r, of, err := readRule(bytes.Clone(b))
		if of == TableName { // kernels before 4.17 do not filter
			t.rules = append(t.rules, r)
		}
		return err
	})
	if err != nil {
		return t, false, err
	}
	t.setCanon()
	after, err := generation(s)
	if err == nil && !bytes.Equal(before, after) {
		err = unix.EINTR
	}
	return t, true, err
}

// generation returns the generation ID, which differs after each change of nf_tables.
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
			_ = each(a.data, func(a attribute) { // on an error there is no size
				if a.kind == unix.NFTA_SET_DESC_SIZE {
					s.size = uint32(number(a.data))
				}
			})
		}
	})
	return s, err
}

func readElements(s *socket, of *set) error {
	name := putString(putString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, TableName), unix.NFTA_SET_ELEM_LIST_SET, of.name)
	err := s.ask(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, name, func(b []byte) error {
		list, err := appendAttributes(nil, b)
		if err != nil {
			return err
		}
		for _, a := range list {
			if a.kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				continue
			}
			items, err := appendAttributes(nil, a.data)
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
		if a.end { // adjacent intervals: one ends before the next begins
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
				return e, errors.New("set element without a key")
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

// setCanon sets the canonical form of each rule, once the table is complete.
func (t *table) setCanon() {
	for i := range t.rules {
		t.rules[i].canon = t.canonical(t.rules[i])
	}
}

// canonical returns a form of a rule that is equal for two rules only if they have the
// same effect in the kernel. Counters are omitted. Zero attributes are omitted as well:
// newer kernels return more attributes than were sent, and those are zero. An anonymous
// set is represented by its elements, regardless of its name; for a map they are
// omitted.
func (t table) canonical(r rule) string {
	b := make([]byte, 0, 512)
	for _, e := range r.exprs {
		if s, ok := t.setOf(e); ok && s.isAnonymous() {
			b = fmt.Appendf(b, "%s ", s.definition())
			if !s.isMap() { // maps are compared separately
				b = fmt.Appendf(b, "%v ", s.lines())
			}
			e = e.withSet("__set")
		}
		b = e.append(b)
	}
	return string(hex.AppendEncode(b, r.userdata))
}

// identity returns canonical with the elements of maps.
func (t table) identity(r rule) string {
	text := r.canon
	for _, e := range r.exprs {
		if s, ok := t.setOf(e); ok && s.isMap() {
			text += fmt.Sprint(s.lines())
		}
	}
	return text
}

// setOf returns the set that an expression uses.
func (t table) setOf(e expression) (set, bool) {
	if name := e.setName(); name != "" {
		return t.set(name)
	}
	return set{}, false
}

// nested returns the depth of attributes nested in an attribute of an expression.
func nested(name string, kind uint16) int {
	switch {
	case name == "immediate" && kind == unix.NFTA_IMMEDIATE_DATA:
		return 2
	case name == "cmp" && kind == unix.NFTA_CMP_DATA,
		name == "bitwise" && (kind == unix.NFTA_BITWISE_MASK || kind == unix.NFTA_BITWISE_XOR),
		name == "range" && (kind == unix.NFTA_RANGE_FROM_DATA || kind == unix.NFTA_RANGE_TO_DATA):
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
		// In a transaction, sets may have an ID in addition to their name.
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
