package nftables

import (
	"context"
	"errors"
	"fmt"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Backend loads rulesets into the kernel's nf_tables over netlink, as one table
// for both families. It needs no program.
type Backend struct {
	sys      *system.System
	families []firewall.Family
}

// New gives a backend for the families that the kernel has.
func New(sys *system.System, families []firewall.Family) *Backend { return &Backend{sys, families} }

// ErrNone says that this kernel has no nf_tables, or not for both families in one
// table.
var ErrNone = errors.New("this kernel has no nf_tables with tables of the family inet")

// snapshot is the table as it was at one time.
type snapshot struct {
	table
	there bool
	// What it was compared with, compiled, and not compiled.
	compared compiled
	with     firewall.Ruleset
}

func (b *Backend) read() (s snapshot, err error) {
	err = b.sys.Do("read", "table inet "+TableName, func() (err error) {
		s.table, s.there, err = read()
		return err
	})
	return s, err
}

func (b *Backend) commit(what string, requests []request) error {
	err := b.sys.Do("netlink", what+" table inet "+TableName, func() error { return commit(requests) })
	var refused *refusedError
	if absent(err) && (!errors.As(err, &refused) || refused.about == "table inet "+TableName) {
		return ErrNone
	}
	return err
}

// Inspect reads our table and compares it with want. Where want is no ruleset at
// all, there should be none.
func (b *Backend) Inspect(_ context.Context, want firewall.Ruleset) (firewall.Inspection, error) {
	s, err := b.read()
	if err != nil {
		return firewall.Inspection{}, err
	}
	return b.inspect(s, want), nil
}

// Load makes our table want, in one transaction, reads it back and compares it.
// Where anything fails, it is as was says it was. Where want is no ruleset at all,
// the table goes.
func (b *Backend) Load(ctx context.Context, want firewall.Ruleset, was firewall.Inspection) error {
	if want.IsZero() {
		if err := b.commit("remove", remove(TableName)); err != nil {
			return fmt.Errorf("removing table inet %s: %w", TableName, err)
		}
		return nil
	}
	if err := want.Check(); err != nil {
		return err
	}
	before := was.Snapshot.(snapshot)
	wanted := before.compared
	if !want.Equal(before.with) {
		wanted = compile(want, b.families)
	}
	// By what differs, if that can be: the rules that stay keep their counters, and
	// limits what they know. Else, and where somebody else changed the table since
	// it was read, as a whole.
	var requests []request
	ok := true
	if before.there {
		requests, ok = before.requestsTo(wanted.table)
	} else {
		requests = wanted.requestsFresh()
	}
	if ok && b.commit("change", requests) == nil && b.holds(wanted) == nil {
		return nil
	}
	if err := b.commit("load", wanted.requests()); err != nil {
		return fmt.Errorf("loading table inet %s: %w", TableName, err)
	}
	err := b.holds(wanted)
	if err == nil {
		return nil
	}
	if e := b.Revert(ctx, was); e != nil {
		return fmt.Errorf("%w; and the former rules could not be brought back: %w", err, e)
	}
	return err
}

// holds reads back what was loaded, and compares it.
func (b *Backend) holds(want compiled) error {
	now, err := b.read()
	if err != nil {
		return fmt.Errorf("reading back what was loaded: %w", err)
	}
	if in := b.compare(now, want); len(in.Drift) > 0 {
		return fmt.Errorf("the kernel does not hold what was loaded: %v", in.Drift[0])
	}
	return nil
}

// Revert gives the table back as was says it was.
func (b *Backend) Revert(_ context.Context, was firewall.Inspection) error {
	s := was.Snapshot.(snapshot)
	now, err := b.read()
	switch {
	case err == nil && now.there == s.there && s.same(now.table):
		return nil
	case !s.there:
		err = b.commit("remove", remove(TableName))
	default:
		err = b.commit("bring back", s.requests())
	}
	if err != nil {
		return fmt.Errorf("bringing back table inet %s: %w", TableName, err)
	}
	return nil
}
