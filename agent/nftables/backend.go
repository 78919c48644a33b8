// Package nftables is the nftables backend. Over netlink it loads the rules into a
// separate table, compares the kernel's rules with them, and finds other programs'
// rules. It also writes the file that nft loads.
package nftables

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Backend loads rulesets into nf_tables over netlink, as one table for both families.
// It runs no program.
type Backend struct {
	sys      *system.System
	families []firewall.Family
}

// New returns a backend for the kernel's families.
func New(sys *system.System, families []firewall.Family) *Backend { return &Backend{sys, families} }

// ErrNone is the error for a kernel without nf_tables, or without tables for both
// families.
var ErrNone = errors.New("the kernel does not support nf_tables with the family inet")

type snapshot struct {
	table
	b      *Backend
	exists bool
	// The ruleset that it was compared with, compiled and not compiled.
	compared compiled
	with     firewall.Ruleset
}

func (b *Backend) read() (s snapshot, err error) {
	err = b.sys.Do("read", "table inet "+TableName, func() (err error) {
		s.table, s.exists, err = read()
		s.b = b
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

// Inspect reads our table and compares it with want. If want is zero, the table should
// not exist.
func (b *Backend) Inspect(_ context.Context, want firewall.Ruleset) (backend.Inspection, error) {
	s, err := b.read()
	if err != nil {
		return backend.Inspection{}, err
	}
	return b.inspect(s, want), nil
}

// Load loads want into our table in one transaction, reads it back and compares it. If
// anything fails, the table is rolled back. If want is zero, the table is removed.
func (s snapshot) Load(ctx context.Context, want firewall.Ruleset, _ bool) error {
	b := s.b
	if want.IsZero() {
		if err := b.commit("remove", remove(TableName)); err != nil {
			return fmt.Errorf("removing table inet %s: %w", TableName, err)
		}
		return nil
	}
	if err := want.Check(); err != nil {
		return err
	}
	wanted := s.compared
	if !want.Equal(s.with) {
		wanted = compile(want, b.families)
	}
	// If possible, only the differences are loaded: unchanged rules keep their counters,
	// and rate limits their state. Otherwise, or if another program changed the table
	// since it was read, the whole table is.
	var requests []request
	ok := true
	if s.exists {
		requests, ok = s.requestsTo(wanted.table)
	} else {
		requests = wanted.create(unix.NLM_F_EXCL)
	}
	if ok && b.commit("change", requests) == nil && b.readBack(wanted) == nil {
		return nil
	}
	if err := b.commit("load", wanted.requests()); err != nil {
		return fmt.Errorf("loading table inet %s: %w", TableName, err)
	}
	err := b.readBack(wanted)
	if err == nil {
		return nil
	}
	if e := s.Restore(ctx, backend.Backup{}); e != nil {
		return fmt.Errorf("%w; and restoring the previous rules failed: %w", err, e)
	}
	return err
}

func (b *Backend) readBack(want compiled) error {
	now, err := b.read()
	if err != nil {
		return fmt.Errorf("reading back the loaded rules: %w", err)
	}
	if in := b.compare(now, want); len(in.Drift) > 0 {
		return &backend.MismatchError{First: in.Drift[0]}
	}
	return nil
}

// Predict returns the live rules with own in place of our table.
func (s snapshot) Predict(_ context.Context, live, own exposure.Ruleset, _ bool) exposure.Ruleset {
	tables := slices.DeleteFunc(slices.Clone(live.Tables), func(t exposure.Table) bool {
		return t.Program == "nft" && t.Family == "inet" && t.Name == TableName
	})
	for _, t := range own.Tables {
		t.Program, t.Name = "nft", TableName
		tables = append(tables, t)
	}
	return exposure.Ruleset{Tables: tables}
}

// Restore restores the table of the snapshot.
func (s snapshot) Restore(_ context.Context, _ backend.Backup) error {
	b := s.b
	now, err := b.read()
	switch {
	case err == nil && now.exists == s.exists && s.same(now.table):
		return nil
	case !s.exists:
		err = b.commit("remove", remove(TableName))
	default:
		err = b.commit("restore", s.requests())
	}
	if err != nil {
		return fmt.Errorf("restoring table inet %s: %w", TableName, err)
	}
	return nil
}
