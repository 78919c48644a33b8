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
	up, err := HasTable(GuardTable)
	if err != nil || !up {
		return err
	}
	gone := request{unix.NFT_MSG_DELTABLE, 0, putString(nil, unix.NFTA_TABLE_NAME, GuardTable), "that table inet " + GuardTable + " goes"}
	if err := commit([]request{gone}); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("taking down the guard, table %s: %w", GuardTable, err)
	}
	return nil
}

// Up tells whether there is a guard: one that was cut short left it.
func (g Guard) Up() bool {
	up, err := HasTable(GuardTable)
	return err == nil && up
}

// HasTable tells whether nf_tables has a table of a name, of both families or of
// either.
func HasTable(name string) (bool, error) {
	all, err := tables(unix.NFPROTO_INET, unix.NFPROTO_IPV4, unix.NFPROTO_IPV6)
	return slices.Contains(all, name), err
}

// Xtables tells whether iptables' nft variant has any table.
func Xtables() bool {
	all, err := tables(unix.NFPROTO_IPV4, unix.NFPROTO_IPV6)
	return err != nil || slices.ContainsFunc(all, func(name string) bool {
		return slices.Contains([]string{"filter", "nat", "mangle", "raw", "security"}, name)
	})
}

// tables names the tables of some families; a kernel without nf_tables has none.
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
		for n := 0; errors.Is(err, unix.EINTR) && n < readTries; n++ { // they changed meanwhile
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
			return names, fmt.Errorf("listing tables of nf_tables: %w", err)
		}
	}
	return names, nil
}
