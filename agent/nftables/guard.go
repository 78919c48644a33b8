package nftables

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"time"

	nft "github.com/google/nftables"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// GuardTable is the name of the guard's table, in the family inet.
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
	t := compile(unlimited(r), families).table
	t.name = GuardTable
	err := commit(t.requests())
	if absent(err) {
		return ErrNoGuard
	}
	if err != nil {
		return fmt.Errorf("putting up the guard, table %s: %w", GuardTable, err)
	}
	return nil
}

// unlimited is a ruleset as the guard has it. What a broadcast's rule drops is
// dropped at the end; to tell one, the kernel may need a module. What has not
// begun is none yet.
func unlimited(r firewall.Ruleset) firewall.Ruleset {
	strip := func(chains []firewall.Chain) []firewall.Chain {
		var out []firewall.Chain
		for _, c := range chains {
			kept := firewall.Chain{Name: c.Name}
			for _, rule := range c.Rules {
				if rule.Target == firewall.Log || rule.DstType != "" || !rule.Since.IsZero() {
					continue
				}
				rule.Limit, rule.Until = nil, time.Time{}
				kept.Rules = append(kept.Rules, rule)
			}
			out = append(out, kept)
		}
		return out
	}
	return firewall.Ruleset{IPv4: strip(r.IPv4), IPv6: strip(r.IPv6)}
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

// Xtables tells whether iptables' nft variant has any table.
func Xtables() bool {
	all, err := tables()
	return err != nil || slices.ContainsFunc(all, func(t *nft.Table) bool {
		return (t.Family == nft.TableFamilyIPv4 || t.Family == nft.TableFamilyIPv6) &&
			slices.Contains([]string{"filter", "nat", "mangle", "raw", "security"}, t.Name)
	})
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
