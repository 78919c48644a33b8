package nftables

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/mdlayher/netlink"
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
func (s set) isAnonymous() bool { return s.flags&unix.NFT_SET_ANONYMOUS != 0 }

type rule struct {
	chain    string
	exprs    []expression
	userdata []byte
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
		{unix.NFT_MSG_NEWTABLE, netlink.Create, data, "table inet " + name}, // so that there is one to delete
		{unix.NFT_MSG_DELTABLE, 0, data, "that table inet " + name + " goes"},
	}
}

// maxSent is how many elements one message has: an attribute, and so a list of
// them, ends at 64 KB.
const maxSent = 500

// requests make the table what t says, whatever it was.
func (t table) requests() []request {
	out := remove(t.name)
	at := func(kind uint16) []byte { return putString(nil, kind, t.name) }
	out = append(out, request{unix.NFT_MSG_NEWTABLE, netlink.Create, put32(at(unix.NFTA_TABLE_NAME), unix.NFTA_TABLE_FLAGS, t.flags), "table inet " + t.name})
	for _, c := range t.chains {
		data := putString(at(unix.NFTA_CHAIN_TABLE), unix.NFTA_CHAIN_NAME, c.name)
		if c.hook != nil {
			data = putNested(data, unix.NFTA_CHAIN_HOOK, c.hook)
			data = put32(data, unix.NFTA_CHAIN_POLICY, c.policy)
			data = putString(data, unix.NFTA_CHAIN_TYPE, c.kind)
		}
		out = append(out, request{unix.NFT_MSG_NEWCHAIN, netlink.Create, data, "chain " + c.name})
	}
	for i, s := range t.sets {
		out = append(out, s.requests(t.name, uint32(i+1))...)
	}
	for _, r := range t.rules {
		data := putString(at(unix.NFTA_RULE_TABLE), unix.NFTA_RULE_CHAIN, r.chain)
		var list []byte
		for _, e := range r.exprs {
			list = putNested(list, unix.NFTA_LIST_ELEM, putNested(putString(nil, unix.NFTA_EXPR_NAME, e.name), unix.NFTA_EXPR_DATA, e.data))
		}
		data = putNested(data, unix.NFTA_RULE_EXPRESSIONS, list)
		if len(r.userdata) > 0 {
			data = put(data, unix.NFTA_RULE_USERDATA, r.userdata)
		}
		out = append(out, request{unix.NFT_MSG_NEWRULE, netlink.Create | unix.NLM_F_APPEND, data, fmt.Sprintf("%q in %s", r.describe(), r.chain)})
	}
	return out
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
	about := "set " + s.name
	out := []request{{unix.NFT_MSG_NEWSET, netlink.Create, data, about}}
	if s.isDynamic() {
		return out // packets fill it
	}
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
		data := put32(slices.Clone(name), unix.NFTA_SET_ELEM_LIST_SET_ID, id)
		out = append(out, request{unix.NFT_MSG_NEWSETELEM, netlink.Create, putNested(data, unix.NFTA_SET_ELEM_LIST_ELEMENTS, list), "an element of " + about})
	}
	return out
}

// readTries is how often a table is read that changes meanwhile.
const readTries = 20

// read gives our table as it is at one moment; false where there is none, also
// where the kernel has no nf_tables.
func read() (table, bool, error) {
	conn, err := dial()
	if absent(err) {
		return table{}, false, nil
	}
	if err != nil {
		return table{}, false, err
	}
	defer conn.Close()
	for n := 1; ; n++ {
		t, err := readOnce(conn)
		switch {
		case errors.Is(err, errNoTable):
			return table{}, false, nil
		case err == nil:
			return t, true, nil
		case n == readTries || !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.ENOENT):
			return table{}, false, fmt.Errorf("reading table inet %s: %w", TableName, errno(err))
		}
	}
}

var errNoTable = errors.New("no such table")

func readOnce(conn *netlink.Conn) (t table, err error) {
	t.name = TableName
	before, err := generation(conn)
	if absent(err) {
		return t, errNoTable
	}
	if err != nil {
		return t, err
	}
	answers, err := ask(conn, unix.NFT_MSG_GETTABLE, 0, putString(nil, unix.NFTA_TABLE_NAME, TableName))
	if errors.Is(err, unix.ENOENT) {
		return t, errNoTable
	}
	if err != nil {
		return t, err
	}
	for _, m := range answers {
		err = each(m.Data[4:], func(a attribute) {
			if a.kind == unix.NFTA_TABLE_FLAGS {
				t.flags = uint32(number(a.data))
			}
		})
		if err != nil {
			return t, err
		}
	}
	if answers, err = ask(conn, unix.NFT_MSG_GETCHAIN, netlink.Dump, nil); err != nil {
		return t, err
	}
	for _, m := range answers {
		c, of, err := readChain(m.Data[4:])
		if err != nil {
			return t, err
		}
		if of == TableName {
			t.chains = append(t.chains, c)
		}
	}
	if answers, err = ask(conn, unix.NFT_MSG_GETSET, netlink.Dump, putString(nil, unix.NFTA_SET_TABLE, TableName)); err != nil {
		return t, err
	}
	for _, m := range answers {
		s, err := readSet(m.Data[4:])
		if err == nil && !s.isDynamic() {
			s.elements, err = readElements(conn, s)
		}
		if err != nil {
			return t, err
		}
		t.sets = append(t.sets, s)
	}
	if answers, err = ask(conn, unix.NFT_MSG_GETRULE, netlink.Dump, putString(nil, unix.NFTA_RULE_TABLE, TableName)); err != nil {
		return t, err
	}
	for _, m := range answers {
		r, of, err := readRule(m.Data[4:])
		if err != nil {
			return t, err
		}
		if of == TableName { // the kernel before 4.17 does not choose
			t.rules = append(t.rules, r)
		}
	}
	after, err := generation(conn)
	if err == nil && !bytes.Equal(before, after) {
		err = unix.EINTR
	}
	return t, err
}

// generation is another one after each change of nf_tables.
func generation(conn *netlink.Conn) (id []byte, err error) {
	answers, err := ask(conn, unix.NFT_MSG_GETGEN, 0, nil)
	for _, m := range answers {
		err = errors.Join(err, each(m.Data[4:], func(a attribute) {
			if a.kind == unix.NFTA_GEN_ID {
				id = a.data
			}
		}))
	}
	return id, err
}

func each(b []byte, do func(attribute)) error {
	list, err := attributes(b)
	for _, a := range list {
		do(a)
	}
	return err
}

func readChain(b []byte) (c chain, of string, err error) {
	err = each(b, func(a attribute) {
		switch a.kind {
		case unix.NFTA_CHAIN_TABLE:
			of = text(a.data)
		case unix.NFTA_CHAIN_NAME:
			c.name = text(a.data)
		case unix.NFTA_CHAIN_HOOK:
			c.hook = a.data
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
			s.userdata = a.data
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

func readElements(conn *netlink.Conn, s set) ([]setElement, error) {
	answers, err := ask(conn, unix.NFT_MSG_GETSETELEM, netlink.Dump,
		putString(putString(nil, unix.NFTA_SET_ELEM_LIST_TABLE, TableName), unix.NFTA_SET_ELEM_LIST_SET, s.name))
	if err != nil {
		return nil, err
	}
	var out []setElement
	for _, m := range answers {
		list, err := attributes(m.Data[4:])
		if err != nil {
			return nil, err
		}
		for _, a := range list {
			if a.kind != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				continue
			}
			items, err := attributes(a.data)
			if err != nil {
				return nil, err
			}
			for _, item := range items {
				e, err := readElement(item.data)
				if err != nil {
					return nil, err
				}
				out = append(out, e)
			}
		}
	}
	slices.SortFunc(out, func(a, b setElement) int {
		if c := bytes.Compare(a.key, b.key); c != 0 || a.end == b.end {
			return c
		}
		if a.end { // where one interval ends and the next begins
			return -1
		}
		return 1
	})
	return out, nil
}

func readElement(b []byte) (e setElement, err error) {
	list, err := attributes(b)
	for _, a := range list {
		switch a.kind {
		case unix.NFTA_SET_ELEM_KEY:
			inner, bad := attributes(a.data)
			if bad != nil || len(inner) != 1 {
				return e, errors.New("a set's element has no key")
			}
			e.key = inner[0].data
		case unix.NFTA_SET_ELEM_FLAGS:
			e.end = number(a.data)&unix.NFT_SET_ELEM_INTERVAL_END != 0
		case unix.NFTA_SET_ELEM_DATA:
			e.data = a.data
		}
	}
	return e, err
}

func readRule(b []byte) (r rule, of string, err error) {
	list, err := attributes(b)
	if err != nil {
		return r, "", err
	}
	for _, a := range list {
		switch a.kind {
		case unix.NFTA_RULE_TABLE:
			of = text(a.data)
		case unix.NFTA_RULE_CHAIN:
			r.chain = text(a.data)
		case unix.NFTA_RULE_USERDATA:
			r.userdata = a.data
		case unix.NFTA_RULE_EXPRESSIONS:
			items, err := attributes(a.data)
			if err != nil {
				return r, of, err
			}
			for _, item := range items {
				e, err := readExpression(item.data)
				if err != nil {
					return r, of, err
				}
				r.exprs = append(r.exprs, e)
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

// canonical is a rule in a form in which two are the same if, and only if, the
// kernel does the same by them. What counts packets is left out, and what is
// zero: a kernel sends back more attributes than it was sent, the more the newer
// it is, and those are zero.
func (r rule) canonical() string {
	var b strings.Builder
	for _, e := range r.exprs {
		e.write(&b)
	}
	fmt.Fprintf(&b, "%x", r.userdata)
	return b.String()
}

// nested are the attributes of expressions in which others are nested, as deep
// as they are.
var nested = map[string]map[uint16]int{
	"cmp":       {unix.NFTA_CMP_DATA: 1},
	"bitwise":   {unix.NFTA_BITWISE_MASK: 1, unix.NFTA_BITWISE_XOR: 1},
	"range":     {unix.NFTA_RANGE_FROM_DATA: 1, unix.NFTA_RANGE_TO_DATA: 1},
	"immediate": {unix.NFTA_IMMEDIATE_DATA: 2},
}

func (e expression) write(b *strings.Builder) {
	fmt.Fprintf(b, "%q{", e.name)
	defer b.WriteString("}")
	if e.name == "counter" {
		return
	}
	list, err := attributes(e.data)
	if err != nil {
		fmt.Fprintf(b, "?%x", e.data)
		return
	}
	slices.SortStableFunc(list, func(x, y attribute) int { return int(x.kind) - int(y.kind) })
	for _, a := range list {
		// Within a transaction sets may have numbers besides their names.
		id := e.name == "lookup" && a.kind == unix.NFTA_LOOKUP_SET_ID || e.name == "dynset" && a.kind == unix.NFTA_DYNSET_SET_ID
		if id || len(bytes.Trim(a.data, "\x00")) == 0 {
			continue
		}
		if e.name == "dynset" && a.kind == unix.NFTA_DYNSET_EXPR {
			if inner, err := readExpression(a.data); err == nil {
				inner.write(b)
				continue
			}
		}
		a.write(b, nested[e.name][a.kind])
	}
}

func (a attribute) write(b *strings.Builder, depth int) {
	if depth > 0 {
		if inner, err := attributes(a.data); err == nil {
			fmt.Fprintf(b, "%d(", a.kind)
			for _, i := range inner {
				i.write(b, depth-1)
			}
			b.WriteString(")")
			return
		}
	}
	fmt.Fprintf(b, "%d=%x;", a.kind, a.data)
}

// be32 is a number as the kernel compares numbers of that size.
func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
