// Package nftables reads, over netlink, what others have in nf_tables beside
// the tables of iptables.
package nftables

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"syscall"

	nft "github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Bounds for rulesets such as those of a large cluster: status is for people
// who wait.
const (
	maxChains   = 1000 // chains whose rules are read
	maxElements = 4096 // elements of a set or map that are followed
)

// Forwarded lists the ports that rules of nf_tables forward past INPUT, in this
// network namespace: by "dnat to" in chains of type nat at prerouting, and in
// those that they lead to. What iptables wrote there is not among them:
// iptables-save knows it better. A kernel without nf_tables has none. With an
// error there may be some all the same.
func Forwarded() ([]firewall.Bypass, error) {
	var found []firewall.Bypass
	var err error
	// A chain can go between two looks: others work while we read.
	for range 3 {
		if found, err = forwarded(); err == nil {
			break
		}
	}
	// The kernel lists a set in no order.
	slices.SortFunc(found, order)
	if err != nil {
		err = fmt.Errorf("reading what nf_tables forwards: %w", err)
	}
	return found, err
}

func order(a, b firewall.Bypass) int {
	return cmp.Or(cmp.Compare(a.Family, b.Family), cmp.Compare(a.Span().First, b.Span().First), cmp.Compare(a.Proto, b.Proto),
		cmp.Compare(a.On, b.On), cmp.Compare(a.To, b.To), cmp.Compare(a.By, b.By))
}

func forwarded() ([]firewall.Bypass, error) {
	conn, err := nft.New(nft.AsLasting())
	if absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer conn.CloseLasting()
	chains, err := conn.ListChains()
	if absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	w := walk{conn: conn, rules: map[place][]*nft.Rule{}, seen: map[string]bool{}, sets: map[place]elements{}}
	var dormant []place
	for _, c := range chains {
		if c.Type != nft.ChainTypeNAT || c.Hooknum == nil || *c.Hooknum != *nft.ChainHookPrerouting {
			continue
		}
		switch c.Table.Family {
		case nft.TableFamilyIPv4, nft.TableFamilyIPv6, nft.TableFamilyINet:
		default:
			continue
		}
		if dormant == nil {
			if dormant, err = dormantTables(conn); err != nil {
				return nil, err
			}
		}
		at := place{c.Table.Family, c.Table.Name, c.Name}
		if !slices.Contains(dormant, at.table()) {
			w.follow(at, firewall.Passage{}, nil)
		}
	}
	return w.found, errors.Join(w.errs...)
}

// absent tells whether an error is of a kernel that has no nf_tables.
func absent(err error) bool {
	for _, e := range []error{syscall.EINVAL, syscall.EOPNOTSUPP, syscall.EPROTONOSUPPORT, syscall.EAFNOSUPPORT} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// dormantTables lists the tables that are switched off; never nil.
func dormantTables(conn *nft.Conn) ([]place, error) {
	out := []place{}
	tables, err := conn.ListTables()
	for _, t := range tables {
		// The library takes the number of big endian for the machine's own.
		if (t.Flags|t.Flags>>24)&unix.NFT_TABLE_F_DORMANT != 0 {
			out = append(out, place{family: t.Family, name: t.Name})
		}
	}
	return out, err
}

// place is a table, or a chain or a set in it.
type place struct {
	family nft.TableFamily
	name   string // the table's
	in     string
}

func (p place) table() place           { return place{family: p.family, name: p.name} }
func (p place) beside(in string) place { return place{p.family, p.name, in} }

// walk follows chains from prerouting on, with what a packet has to match on
// its way.
type walk struct {
	conn  *nft.Conn
	rules map[place][]*nft.Rule
	sets  map[place]elements
	seen  map[string]bool // a chain and the passage to it, followed already
	found []firewall.Bypass
	errs  []error
}

func (w *walk) fail(err error) {
	if len(w.errs) == 0 {
		w.errs = append(w.errs, err)
	}
}

func (w *walk) follow(at place, to firewall.Passage, way []string) {
	key := fmt.Sprint(at, to)
	if w.seen[key] {
		return
	}
	w.seen[key] = true
	rules, ok := w.rules[at]
	if !ok {
		if len(w.rules) == maxChains {
			w.fail(fmt.Errorf("more than %d chains: the rest was not looked at", maxChains))
			return
		}
		var err error
		rules, err = w.conn.GetRules(&nft.Table{Family: at.family, Name: at.name}, &nft.Chain{Name: at.in})
		if err != nil {
			w.fail(fmt.Errorf("chain %s of table %s: %w", at.in, at.name, err))
			return
		}
		w.rules[at] = rules
	}
	way = append(slices.Clone(way), at.in)
	for _, r := range rules {
		for _, o := range decode(at.family, r.Exprs, func(set string) elements { return w.elements(at.beside(set)) }) {
			through, ok := to.Narrow(o.Passage)
			switch {
			case !ok:
			case o.chain != "":
				w.follow(at.beside(o.chain), through, way)
			default:
				names := append([]string{at.name}, way...)
				for _, b := range through.Bypasses(o.family, o.to, at.name+" "+at.in, names...) {
					if !slices.Contains(w.found, b) {
						w.found = append(w.found, b)
					}
				}
			}
		}
	}
}

// elements gives a set's. It is read only where a rule that forwards, or that
// leads to others, needs it: sets of tens of thousands of addresses are common.
func (w *walk) elements(at place) elements {
	if list, ok := w.sets[at]; ok {
		return list
	}
	got, err := w.conn.GetSetElements(&nft.Set{Table: &nft.Table{Family: at.family, Name: at.name}, Name: at.in})
	if err != nil {
		w.fail(fmt.Errorf("set %s of table %s: %w", at.in, at.name, err))
	}
	list := ranges(got)
	if len(list) > maxElements {
		w.fail(fmt.Errorf("set %s of table %s has %d elements: only %d were looked at", at.in, at.name, len(list), maxElements))
		list = list[:maxElements]
	}
	w.sets[at] = list
	return list
}
