package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"

	nft "github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// GuardTable is the name of the guard's table, in each family.
const GuardTable = "basicfw-guard"

// Guard has nf_tables drop what a ruleset drops, whatever is in the tables of
// iptables meanwhile. Another firewall that is stopped flushes those, and leaves
// INPUT open or shut as its backend has it; a table that it does not know stays.
// To nf_tables a drop is final and an accept is not, so a guard opens nothing
// that another closes.
type Guard struct{}

// ErrNoGuard says that this kernel has no nf_tables.
var ErrNoGuard = errors.New("this kernel has no nf_tables")

// Raise puts the guard up, in one transaction; one that is there is replaced.
// Where a rule has a limit or an end, the guard has none: it is there for a
// moment, or until iptables works.
func (Guard) Raise(r firewall.Ruleset, families []firewall.Family) error {
	if err := r.Check(); err != nil {
		return err
	}
	conn, err := nft.New()
	if err == nil {
		for _, f := range families {
			t := conn.AddTable(guardTable(f)) // so that there is one to delete
			conn.DelTable(t)
			raise(conn, conn.AddTable(guardTable(f)), f, r.Chains(f))
		}
		err = conn.Flush()
	}
	if absent(err) {
		return ErrNoGuard
	}
	if err != nil {
		return fmt.Errorf("putting up the guard, table %s: %w", GuardTable, err)
	}
	return nil
}

func raise(conn *nft.Conn, t *nft.Table, f firewall.Family, chains []firewall.Chain) {
	drop := nft.ChainPolicyDrop
	for i, c := range chains {
		chain := &nft.Chain{Name: c.Name, Table: t}
		if i == 0 {
			chain.Type, chain.Hooknum, chain.Priority, chain.Policy = nft.ChainTypeFilter, nft.ChainHookInput, nft.ChainPriorityFilter, &drop
		}
		conn.AddChain(chain)
	}
	for _, c := range chains {
		for _, rule := range c.Rules {
			// What a broadcast's rule drops, the policy drops. To tell one, the
			// kernel may need a module. What has not begun is none yet.
			if rule.Target == firewall.Log || rule.DstType != "" || !rule.Since.IsZero() {
				continue
			}
			conn.AddRule(&nft.Rule{Table: t, Chain: &nft.Chain{Name: c.Name, Table: t}, Exprs: exprs(f, rule)})
		}
	}
}

// Lower takes the guard down; where there is none it does nothing.
func (g Guard) Lower() error {
	tables, err := guards()
	if err != nil || len(tables) == 0 {
		return err
	}
	conn, err := nft.New()
	if err != nil {
		return err
	}
	for _, t := range tables {
		conn.DelTable(t)
	}
	if err := conn.Flush(); err != nil && !errors.Is(err, syscall.ENOENT) {
		return fmt.Errorf("taking down the guard, table %s: %w", GuardTable, err)
	}
	return nil
}

// Up tells whether there is a guard: one that was cut short left it.
func (g Guard) Up() bool {
	tables, err := guards()
	return err == nil && len(tables) > 0
}

func guards() ([]*nft.Table, error) {
	all, err := tables()
	var out []*nft.Table
	for _, t := range all {
		if t.Name == GuardTable {
			out = append(out, t)
		}
	}
	return out, err
}

// HasTable tells whether nf_tables has a table of a name, in any family.
func HasTable(name string) (bool, error) {
	all, err := tables()
	for _, t := range all {
		if t.Name == name {
			return true, err
		}
	}
	return false, err
}

// tables lists the tables of nf_tables; a kernel without it has none.
func tables() ([]*nft.Table, error) {
	conn, err := nft.New()
	if err != nil {
		if absent(err) {
			return nil, nil
		}
		return nil, err
	}
	list, err := conn.ListTables()
	if absent(err) {
		return nil, nil
	}
	return list, err
}

func guardTable(f firewall.Family) *nft.Table {
	t := &nft.Table{Name: GuardTable, Family: nft.TableFamilyIPv4}
	if f == firewall.IPv6 {
		t.Family = nft.TableFamilyIPv6
	}
	return t
}

// The conntrack states of nf_tables (linux/netfilter/nf_conntrack_common.h).
var states = map[firewall.State]uint32{
	firewall.StateInvalid:     expr.CtStateBitINVALID,
	firewall.StateEstablished: expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED,
	firewall.StateNew:         expr.CtStateBitNEW,
}

// exprs is a rule as nft would compile it.
func exprs(f firewall.Family, r firewall.Rule) []expr.Any {
	var out []expr.Any
	is := func(load expr.Any, op expr.CmpOp, data ...byte) {
		out = append(out, load, &expr.Cmp{Op: op, Register: 1, Data: data})
	}
	network := func(offset, size uint32) expr.Any {
		return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}
	}
	transport := func(offset, size uint32) expr.Any {
		return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: size}
	}
	masked := func(load expr.Any, mask []byte, op expr.CmpOp, data ...byte) {
		out = append(out, load, &expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask))},
			&expr.Cmp{Op: op, Register: 1, Data: data})
	}
	address := func(p netip.Prefix, v4, v6 uint32) {
		if !p.IsValid() {
			return
		}
		offset := v4
		if f == firewall.IPv6 {
			offset = v6
		}
		size := p.Addr().BitLen() / 8
		mask := make([]byte, size)
		for i := range p.Bits() {
			mask[i/8] |= 0x80 >> (i % 8)
		}
		masked(network(offset, uint32(size)), mask, expr.CmpOpEq, p.Masked().Addr().AsSlice()...)
	}
	ports := func(p firewall.PortRange, offset uint32) {
		if p.IsZero() {
			return
		}
		if p.First == p.Last {
			is(transport(offset, 2), expr.CmpOpEq, binary.BigEndian.AppendUint16(nil, p.First)...)
			return
		}
		is(transport(offset, 2), expr.CmpOpGte, binary.BigEndian.AppendUint16(nil, p.First)...)
		is(transport(offset, 2), expr.CmpOpLte, binary.BigEndian.AppendUint16(nil, p.Last)...)
	}

	address(r.Src, 12, 8)
	address(r.Dst, 16, 24)
	if r.In != "" {
		name, any := strings.CutSuffix(r.In, "*")
		data := []byte(name)
		if !any {
			data = append(data, make([]byte, unix.IFNAMSIZ-len(data))...)
		}
		is(&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1}, expr.CmpOpEq, data...)
	}
	if r.Proto != "" {
		number := map[firewall.Proto]byte{firewall.TCP: unix.IPPROTO_TCP, firewall.UDP: unix.IPPROTO_UDP,
			firewall.ICMP: unix.IPPROTO_ICMP, firewall.ICMPv6: unix.IPPROTO_ICMPV6}[r.Proto]
		is(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, expr.CmpOpEq, number)
	}
	ports(r.SrcPort, 0)
	ports(r.DstPort, 2)
	if m := r.Flags; m != nil {
		op := expr.CmpOpEq
		if m.Invert {
			op = expr.CmpOpNeq
		}
		masked(transport(13, 1), []byte{byte(m.Mask)}, op, byte(m.Set))
	}
	if r.ICMPType != nil {
		is(transport(0, 1), expr.CmpOpEq, *r.ICMPType)
	}
	if r.State != "" {
		masked(&expr.Ct{Key: expr.CtKeySTATE, Register: 1}, binaryutil.NativeEndian.PutUint32(states[r.State]), expr.CmpOpNeq, 0, 0, 0, 0)
	}
	if r.HopLimit != 0 {
		is(network(7, 1), expr.CmpOpEq, r.HopLimit)
	}
	verdict := &expr.Verdict{Kind: expr.VerdictJump, Chain: r.Target}
	switch r.Target {
	case firewall.Accept:
		verdict = &expr.Verdict{Kind: expr.VerdictAccept}
	case firewall.Drop:
		verdict = &expr.Verdict{Kind: expr.VerdictDrop}
	}
	return append(out, verdict)
}
