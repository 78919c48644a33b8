package apply

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
)

// Conflicts handles the other firewall managers of a machine.
type Conflicts interface {
	// Find lists those that filter now, or will from the next boot on. chains names
	// those whose chains are in iptables. It is cheap.
	Find(chains []string) ([]firewall.Conflict, error)
	// Record returns how one is configured.
	Record(ctx context.Context, m firewall.Conflict) (firewall.ConflictBackup, error)
	// Stop stops and disables one. active is set if its rules are loaded.
	Stop(ctx context.Context, m firewall.ConflictBackup, active bool) error
	// Restore restores one as recorded. gone is set if it was uninstalled since.
	Restore(ctx context.Context, m firewall.ConflictBackup, sameBoot bool) (gone bool, err error)
}

// Guard closes the machine like a ruleset, in a table that other managers do not know.
// It accepts nothing that they drop.
type Guard interface {
	Raise(r firewall.Ruleset, families []firewall.Family) error
	Lower() error
	Up() bool
}

// GuardTable is the name of the guard's table.
const GuardTable = firewall.GuardTable

// ConflictError reports that another firewall manager is active, or will be from the
// next boot on, and that it is left alone.
type ConflictError struct {
	Names []string
	Why   error // why it could not be taken over; nil if it must not be
}

// newConflict returns a [*ConflictError] with the hint to stop the managers by hand.
func newConflict(names []string, why error) error {
	return hint.Wrap(&ConflictError{names, why}, "run \"systemctl disable --now %s\" (for ufw, \"ufw disable\") and repeat the command", strings.Join(names, " "))
}

func (e *ConflictError) Error() string {
	text := fmt.Sprintf("the firewall of this machine is also managed by %s; nothing was changed", strings.Join(e.Names, " and "))
	if e.Why != nil {
		text += fmt.Sprintf(", because taking over failed: %v", e.Why)
	}
	return text
}

func (e *ConflictError) Unwrap() error { return e.Why }

// TakeOverError reports that another firewall manager could not be stopped.
type TakeOverError struct {
	Names []string
	Err   error
}

func (e *TakeOverError) Error() string {
	return fmt.Sprintf("taking over from %s: %v", strings.Join(e.Names, " and "), e.Err)
}

func (e *TakeOverError) Unwrap() error { return e.Err }

// other is a manager to be stopped, with its present configuration, which a rollback
// restores.
type other struct {
	firewall.ConflictBackup
	active bool
}

// recordOthers records the managers that are to be stopped and adds them to the
// backup. Existing records stay: they are from before the first change.
func (a *Applier) recordOthers(ctx context.Context, p *prepared) ([]other, error) {
	if !p.options.TakeOver {
		return nil, nil
	}
	var out []other
	for _, m := range p.Others {
		rec, err := a.Conflicts.Record(ctx, m)
		if err != nil {
			return nil, newConflict([]string{m.Name}, err)
		}
		out = append(out, other{rec, m.Active})
		if !slices.ContainsFunc(p.original.Conflicts, func(r firewall.ConflictBackup) bool { return r.Name == m.Name }) {
			p.original.Conflicts = append(p.original.Conflicts, rec)
			p.recorded = false
		}
	}
	return out, nil
}

// raise raises the guard. Without it the machine would be open, or its administrator
// locked out, while other managers stop. Inactive managers flush nothing when they
// are disabled, and need no guard.
func (c *change) raise() error {
	err := c.Guard.Raise(c.next.At(c.Moment()).Ruleset, c.Families)
	var active []string
	for _, o := range c.others {
		if o.active {
			active = append(active, o.Name)
		}
	}
	if err != nil && len(active) > 0 {
		return newConflict(active, err)
	}
	c.raised = err == nil
	return nil
}

// takeOver stops the other managers while our rules are loaded and the guard is up.
// It then loads our rules again: the managers flush them and leave INPUT open or
// closed.
func (c *change) takeOver(ctx context.Context) error {
	kernel := c.Backend(c.next.Backend.Name)
	// With our rules flushed and policy DROP, the administrator could not log in.
	yield := func(ctx context.Context) error {
		if !c.raised {
			return nil
		}
		return kernel.Yield(ctx)
	}
	if err := yield(ctx); err != nil {
		return err
	}
	undoCtx := context.WithoutCancel(ctx)
	for _, m := range c.others {
		err := c.do(func() error { return c.Conflicts.Stop(ctx, m.ConflictBackup, m.active) }, func() error {
			_, err := c.Conflicts.Restore(undoCtx, m.ConflictBackup, true)
			return err
		})
		if err != nil {
			return err
		}
	}
	c.onRollback(func() error { return yield(undoCtx) })
	in, err := kernel.Inspect(ctx, c.next.Ruleset)
	if err != nil {
		return err
	}
	// Terminal rules in INPUT that were not there before are what they left.
	if err := in.Snapshot.Load(ctx, c.next.Ruleset, c.options.Clear || len(c.Inspection.Foreign) == 0); err != nil {
		return err
	}
	if in, err = kernel.Inspect(ctx, c.next.Ruleset); err != nil {
		return err
	}
	left, err := c.Conflicts.Find(in.Conflicts)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("%s was stopped but is still active or enabled", left[0].Name)
	}
	return err
}

// ClosedBy reports whether all the named managers filter.
func (a *Applier) ClosedBy(ctx context.Context, names []string) bool {
	_, in, err := a.Find(ctx)
	if err != nil {
		return false
	}
	found, err := a.Conflicts.Find(in.Conflicts)
	return err == nil && !slices.ContainsFunc(names, func(name string) bool {
		return !slices.ContainsFunc(found, func(m firewall.Conflict) bool { return m.Name == name && m.Active })
	})
}
