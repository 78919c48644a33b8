package nftables

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// GuardTable is the name of the guard's table, in the family inet.
const GuardTable = firewall.GuardTable

// Guard is a temporary table that drops what a ruleset drops, regardless of the
// iptables tables. A firewall manager that is stopped flushes those, and leaves INPUT
// open or closed depending on its backend, but keeps a table that it does not know. In
// nf_tables a drop is final and an accept is not, so the guard opens nothing that
// another table closes.
type Guard struct{}

// ErrNoGuard is the error for a kernel without nf_tables.
var ErrNoGuard = errors.New("the kernel does not support nf_tables")

// Raise loads or replaces the guard, in one transaction. Its rules have no rate limits
// and do not expire: it exists for a moment, or until iptables works.
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
		return fmt.Errorf("loading the guard, table inet %s: %w", GuardTable, err)
	}
	return nil
}

// unlimited returns the ruleset of the guard. It omits rules for broadcasts, which are
// dropped at the end anyway, as matching them may need a kernel module. It also omits
// rules that have not begun.
func unlimited(r firewall.Ruleset) firewall.Ruleset {
	strip := func(chains []firewall.Chain) (out []firewall.Chain) {
		for _, c := range chains {
			kept := c
			kept.Rules = nil
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

// Lower removes the guard, if there is one.
func (g Guard) Lower() error {
	up, err := HasTable(GuardTable)
	if err != nil || !up {
		return err
	}
	removal := request{unix.NFT_MSG_DELTABLE, 0, putString(nil, unix.NFTA_TABLE_NAME, GuardTable), "removal of table inet " + GuardTable}
	if err := commit([]request{removal}); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("removing the guard, table inet %s: %w", GuardTable, err)
	}
	return nil
}

// Up reports whether the guard is loaded, possibly by an interrupted run.
func (g Guard) Up() bool {
	up, err := HasTable(GuardTable)
	return err == nil && up
}

// HasTable reports whether nf_tables has a table with the given name in the family
// inet, ip or ip6.
func HasTable(name string) (bool, error) {
	all, err := tables(unix.NFPROTO_INET, unix.NFPROTO_IPV4, unix.NFPROTO_IPV6)
	return slices.Contains(all, name), err
}

// Xtables reports whether iptables' nft variant has any table.
func Xtables() bool {
	all, err := tables(unix.NFPROTO_IPV4, unix.NFPROTO_IPV6)
	return err != nil || slices.ContainsFunc(all, func(name string) bool {
		return slices.Contains([]string{"filter", "nat", "mangle", "raw", "security"}, name)
	})
}

// tables returns the names of the tables of some families, or none if the kernel does
// not support nf_tables.
func tables(families ...byte) (names []string, err error) {
	s, err := dial()
	if absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer s.close()
	for _, s.family = range families {
		var err error = unix.EINTR
		for n := 0; errors.Is(err, unix.EINTR) && n < readTries; n++ { // EINTR: they changed meanwhile
			err = s.ask(unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP, nil, func(b []byte) error {
				return each(b, func(a attribute) {
					if a.kind == unix.NFTA_TABLE_NAME {
						names = append(names, text(a.data))
					}
				})
			})
		}
		if absent(err) {
			return nil, nil
		}
		if err != nil {
			return names, fmt.Errorf("listing the tables of nf_tables: %w", err)
		}
	}
	return names, nil
}
