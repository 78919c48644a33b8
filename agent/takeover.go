package agent

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// Managers are the other programs that manage the firewall of a machine.
type Managers interface {
	// Find lists those that filter now, or will from the next boot on; chains
	// names those whose chains are in iptables. It is cheap.
	Find(chains []string) ([]firewall.Manager, error)
	// Record tells how one is.
	Record(ctx context.Context, m firewall.Manager) (firewall.ManagerBefore, error)
	// Stop stops one for good. active tells whether its rules stand.
	Stop(ctx context.Context, m firewall.ManagerBefore, active bool) error
	// Restore brings one back as it was; gone is one that was removed since.
	Restore(ctx context.Context, m firewall.ManagerBefore, sameBoot bool) (gone bool, err error)
}

// Guard closes the machine as a ruleset does, in a place that other managers do
// not know, and lets nothing in that they do not let in.
type Guard interface {
	Raise(r firewall.Ruleset, families []firewall.Family) error
	Lower() error
	Up() bool
}

// GuardTable is what the guard is called in the kernel.
const GuardTable = "basicfw-guard"

// ConflictError says that another firewall is in charge of the machine, or will
// be from the next boot on, and that it is left so.
type ConflictError struct {
	Names []string
	Why   error // nil is that it is not to be taken over
	// Next says what to do; "" is to stop it by hand.
	Next string
}

func (e *ConflictError) Error() string {
	next := e.Next
	if next == "" {
		next = fmt.Sprintf("stop and disable it (\"systemctl disable --now %s\", for ufw \"ufw disable\") and run this again", strings.Join(e.Names, " "))
	}
	text := fmt.Sprintf("%s manages the firewall of this machine too, and two would undo each other's rules: nothing was changed; %s",
		strings.Join(e.Names, ", and "), next)
	if e.Why != nil {
		text += fmt.Sprintf(" (it could not be taken over: %v)", e.Why)
	}
	return text
}

func (e *ConflictError) Unwrap() error { return e.Why }

// TakeOverError says that another firewall could not be stopped.
type TakeOverError struct {
	Names []string
	Err   error
}

func (e *TakeOverError) Error() string {
	return fmt.Sprintf("taking over from %s: %v", strings.Join(e.Names, " and "), e.Err)
}

func (e *TakeOverError) Unwrap() error { return e.Err }

// Names gives the managers' names.
func Names(list []firewall.Manager) []string {
	var out []string
	for _, m := range list {
		out = append(out, m.Name)
	}
	return out
}

// other is a manager to be stopped: as it is now, which is what comes back if
// this fails.
type other struct {
	firewall.ManagerBefore
	active bool
}

// recordOthers looks at the managers that are to be stopped, and has the record
// of before hold them. What is recorded of one already stays: uninstall gives
// back what was before the first change.
func (a *Agent) recordOthers(ctx context.Context, p *prepared, o Options) ([]other, error) {
	if !o.TakeOver {
		return nil, nil
	}
	var out []other
	for _, m := range p.Others {
		rec, err := a.Managers.Record(ctx, m)
		if err != nil {
			return nil, &ConflictError{Names: []string{m.Name}, Why: err}
		}
		out = append(out, other{rec, m.Active})
		if !slices.ContainsFunc(p.original.Managers, func(r firewall.ManagerBefore) bool { return r.Name == m.Name }) {
			p.original.Managers = append(p.original.Managers, rec)
			p.recorded = false
		}
	}
	return out, nil
}

// raise puts up the guard, without which the machine would be open, or its owner
// shut out, while others stop. Those that are not active flush nothing when they
// are disabled: there it can be done without.
func (a *Agent) raise(rules firewall.Ruleset, others []other) (guarded bool, err error) {
	err = a.Guard.Raise(rules.At(a.Now()), a.Families)
	var active []string
	for _, o := range others {
		if o.active {
			active = append(active, o.Name)
		}
	}
	if err != nil && len(active) > 0 {
		return false, &ConflictError{Names: active, Why: err}
	}
	return err == nil, nil
}

// takeOver stops the others, while our rules are loaded and the guard is up,
// and loads our rules again: what others leave behind is no rule of ours, and
// INPUT open or shut.
func (a *Agent) takeOver(ctx context.Context, kernel Kernel, rules firewall.Ruleset, was firewall.Inspection, others []other, guarded bool, o Options, undo *[]func() error) error {
	// With our rules gone and the policy DROP, nobody could log in.
	yield := func(ctx context.Context) error {
		if !guarded {
			return nil
		}
		return kernel.Yield(ctx)
	}
	if err := yield(ctx); err != nil {
		return err
	}
	back := context.WithoutCancel(ctx)
	for _, m := range others {
		*undo = append(*undo, func() error {
			_, err := a.Managers.Restore(back, m.ManagerBefore, true)
			return err
		})
		if err := a.Managers.Stop(ctx, m.ManagerBefore, m.active); err != nil {
			return err
		}
	}
	*undo = append(*undo, func() error { return yield(back) })
	in, err := kernel.Inspect(ctx, rules)
	if err != nil {
		return err
	}
	// What decides in INPUT now and was not there is what they left.
	if err := kernel.Load(ctx, rules, in, o.Clear || len(was.Foreign) == 0); err != nil {
		return err
	}
	if in, err = kernel.Inspect(ctx, rules); err != nil {
		return err
	}
	left, err := a.Managers.Find(in.Managers)
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("%s was stopped, and is still there", left[0].Name)
	}
	return err
}

// giveBackOthers brings other managers back as they were, while our rules are
// still loaded: nothing is open meanwhile. Of one that was removed since, the
// policy that counted on its rules does not come back: it would shut out
// everybody.
func (a *Agent) giveBackOthers(ctx context.Context, org *store.Original) error {
	for _, m := range org.Managers {
		gone, err := a.Managers.Restore(ctx, m, false)
		if err != nil {
			return fmt.Errorf("bringing back %s: %w", m.Name, err)
		}
		if !gone {
			continue
		}
		a.Log.Warnf("%s was removed since bootstrap and does not come back", m.Name)
		for _, f := range firewall.Families {
			before := org.Rules.Family(f)
			before.Input, before.Output, before.Removed, before.Places = firewall.Accept, firewall.Accept, nil, nil
		}
	}
	return nil
}

// Closed tells whether all of some other managers filter.
func (a *Agent) Closed(ctx context.Context, list []string) bool {
	_, in, err := a.find(ctx)
	if err != nil {
		return false
	}
	found, err := a.Managers.Find(in.Managers)
	return err == nil && !slices.ContainsFunc(list, func(name string) bool {
		return !slices.ContainsFunc(found, func(m firewall.Manager) bool { return m.Name == name && m.Active })
	})
}
