// Package apply applies a desired state to a machine, all or nothing: the rules, the
// persisted rules, the state, the service, and conflicts with other firewall managers.
// It also manages the pending change and uninstalls.
package apply

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"reflect"
	"slices"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/lease"
	"github.com/basicfw/basicfw-agent/agent/motd"
	"github.com/basicfw/basicfw-agent/agent/service"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Ports returns where sshd listens or will listen, with the source of each port. live
// is set if sshd was seen listening, not only its configuration.
type Ports func() (ports []uint16, why []string, live bool, err error)

// Service is this program's entry in the machine's service manager.
type Service interface {
	Install() error
	Uninstall() error
	Start() error // does not wait
	Status() (service.Status, error)
}

// Conntrack is the kernel's conntrack table.
type Conntrack interface {
	// Grow enlarges the table if necessary and returns its previous size.
	Grow(ctx context.Context) (before host.Conntrack, err error)
	Set(host.Conntrack) error // resizes it
	// Adopt adds established TCP connections, so that they survive rules that match
	// their state.
	Adopt() (n int, err error)
}

// Applier changes one machine. All its methods except Plan require the store's lock.
type Applier struct {
	System    *system.System
	Backend   func(name string) backend.Backend // [backend.Engines.For]
	Files     RulesFiles
	Store     *store.Store
	Service   Service
	Conntrack Conntrack
	Conflicts Conflicts
	Guard     Guard
	Log       logrus.FieldLogger
	Version   string
	Families  []firewall.Family // that the kernel supports
	Moment    func() firewall.Moment
	Live      func(context.Context) (exposure.Ruleset, error) // the rules of all programs in the kernel
	Ports     Ports
	// OtherKernel reports whether the kernel belongs to another system: [system.Chrooted].
	OtherKernel func() bool
	// Rehearse, if set, loads rules where they have no effect, to check that this
	// kernel accepts them. The error is [backend.ErrNoRehearsal] if that is impossible.
	Rehearse func(ctx context.Context, backend string, rules firewall.Ruleset) error
}

// Options control what Apply does.
type Options struct {
	Previous *store.State   // the state on disk, if already read
	Clear    bool           // remove other programs' terminal rules from INPUT, as bootstrap does once
	Service  bool           // register and start the service
	Files    []files.Change // to be written with the rules
	Record   []string       // additional files that uninstall restores
	Check    func() error   // if set, may refuse a change before it begins
	TakeOver bool           // stop and disable other firewall managers; otherwise leave them alone
	Refuse   bool           // refuse any change if there is another firewall manager
	// Choose falls back to the other backend if a detected one does not work. Set it
	// only when a backend is being selected, not for later failures.
	Choose bool
	// Proof, if set, checks the effect of a change of the rules.
	Proof Proof
	// Watch, if set, starts what calls Expire in time. Try calls it before it loads the
	// rules: the program may be killed at any moment after that.
	Watch func() error
	// Prove, if set, checks a completed change. An error rolls it back.
	Prove func(ctx context.Context, st store.State) error
}

// Proof checks the effect of the rules: Begin checks them before a change, as predict
// returns them (nil if that is not known), and End after it. If they need no change,
// Test checks them. An error from any of these refuses the change.
type Proof interface {
	Begin(ctx context.Context, predict func(live, own exposure.Ruleset) exposure.Ruleset) error
	End(context.Context) error
	Test(context.Context) error
}

// RefusedError is the error of a change that the proof refuses.
type RefusedError struct{ Err error }

func (e *RefusedError) Error() string { return e.Err.Error() }
func (e *RefusedError) Unwrap() error { return e.Err }

// Outcome is what Apply found and did.
type Outcome struct {
	Inspection backend.Inspection  // before the change
	Written    []string            // files that were written, or would be
	Deleted    []string            // files that were deleted, or would be
	Adopted    int                 // connections added to the conntrack table
	Removed    []firewall.Foreign  // other programs' rules removed from INPUT
	Others     []firewall.Conflict // other firewall managers that were stopped
	Registered bool                // the service the service had not been registered or enabled
	Guarded    bool                // an interrupted change had left the guard
	Changed    bool
	Unsaved    error       // why the rules are loaded only until the next boot
	State      store.State // as applied, with the backend that was used
}

// Plan returns what Apply would change, also with a [*RefusedError].
func (a *Applier) Plan(ctx context.Context, next store.State, o Options) (Outcome, error) {
	return a.withFallback(next, o, func(next store.State) (Outcome, error) {
		p, err := a.prepare(ctx, next, o)
		if err == nil && p.load {
			err = a.rehearse(ctx, next)
		}
		if err == nil {
			err = p.foresee(ctx)
		}
		return p.Outcome, err
	})
}

// Apply brings the machine to next. A failed change is rolled back as a whole; if
// nothing differs, nothing is touched.
func (a *Applier) Apply(ctx context.Context, next store.State, o Options) (Outcome, error) {
	return a.withFallback(next, o, func(next store.State) (Outcome, error) { return a.apply(ctx, next, o) })
}

// ApplyOrWithoutRule is Apply. If this kernel or iptables cannot match the time, the
// service ends a probation in place of a rule.
func (a *Applier) ApplyOrWithoutRule(ctx context.Context, st store.State, o Options) (Outcome, error) {
	out, err := a.Apply(ctx, st, o)
	var failed *backend.Error
	silent, ok := lease.WithoutRule(st)
	if !errors.As(err, &failed) || !ok {
		return out, err
	}
	again, e := a.Apply(ctx, silent, o)
	if e != nil {
		return out, err
	}
	a.Log.WithError(err).Warn("the end of the probation is left to the service: the rule for it was refused")
	return again, nil
}

// ApplyOrHold is Apply. If st cannot be saved (a full disk, or an unreadable file in its
// place), its rules are loaded until the next boot; see [store.Store.Hold].
func (a *Applier) ApplyOrHold(ctx context.Context, st store.State, o Options) (Outcome, error) {
	st.Held = st.Failsafe != "" && st.Held
	out, err := a.Apply(ctx, st, o)
	var failed *backend.Error
	if err == nil || st.Held || errors.As(err, &failed) || ctx.Err() != nil {
		return out, err
	}
	st.Held, o.Service, o.Files = true, false, nil
	held, e := a.Apply(ctx, st, o)
	if e != nil {
		return out, err
	}
	a.Log.WithError(err).Warn("the rules are loaded, but lost at a reboot: they could not be saved")
	held.Unsaved = err
	return held, nil
}

// withFallback runs do with the state's backend and, if that was detected and does
// not work here, with nftables.
func (a *Applier) withFallback(next store.State, o Options, do func(store.State) (Outcome, error)) (out Outcome, err error) {
	first := backend.Choice{Name: next.Backend.Name, Reason: next.Backend.Reason}
	last, err := backend.WithFallback(first, o.Choose && next.BackendDetected(),
		func(other backend.Choice) { a.Log.Info(other.Reason + "; trying nftables instead") },
		func(c backend.Choice) (err error) {
			next.Backend.Name, next.Backend.Reason = c.Name, c.Reason
			out, err = do(next)
			return err
		})
	out.State = next
	out.State.Backend.Name, out.State.Backend.Reason = last.Name, last.Reason
	return out, err
}

// Find returns the backend that holds our rules, or could hold them, and what it found.
// If the state cannot be read, an existing TableFile means nftables.
func (a *Applier) Find(ctx context.Context) (backend.Backend, backend.Inspection, error) {
	name := ""
	if st, err := a.Store.Load(); err == nil {
		name = st.Backend.Name
	} else if a.System.Exists(TableFile) {
		name = backend.Nftables
	}
	return backend.Find(ctx, a.Backend, name)
}

// rehearse checks that this kernel accepts the rules of a state.
func (a *Applier) rehearse(ctx context.Context, st store.State) error {
	if a.Rehearse == nil {
		return nil
	}
	err := a.Rehearse(ctx, st.Backend.Name, st.Ruleset)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, backend.ErrNoRehearsal):
		a.Log.Warn(err)
		return nil
	}
	return &backend.Error{Err: fmt.Errorf("rehearsing the rules: %w", err)}
}

// Adopt adds open connections to the conntrack table and returns how many it added.
// An error is only logged: it must not prevent loading the rules.
func (a *Applier) Adopt() (n int) {
	n, err := a.Conntrack.Adopt()
	if err != nil {
		a.Log.WithError(err).Warn("open connections may be interrupted: they could not be added to the conntrack table")
	}
	return n
}

// Grow enlarges the conntrack table if necessary. An error is only logged.
func (a *Applier) Grow(ctx context.Context) (before host.Conntrack, ok bool) {
	before, err := a.Conntrack.Grow(ctx)
	if err != nil {
		a.Log.WithError(err).Warn("the conntrack table could not be enlarged")
	}
	return before, err == nil
}

// change is an Apply in progress.
type change struct {
	*Applier
	transaction
	prepared
	next   store.State
	others []other // managers to stop
	raised bool    // this change raised the guard
}

func (a *Applier) apply(ctx context.Context, next store.State, o Options) (out Outcome, err error) {
	p, err := a.prepare(ctx, next, o)
	if err == nil && !p.load {
		err = p.foresee(ctx)
	}
	if err != nil || !p.Changed {
		return p.Outcome, err
	}
	c := &change{Applier: a, prepared: p, next: next}
	if err := c.permitted(ctx); err != nil {
		return c.Outcome, err
	}
	if c.others, err = a.recordOthers(ctx, &c.prepared); err != nil {
		return c.Outcome, err
	}
	if err := c.run(ctx); err != nil {
		return c.Outcome, c.rollBack(err)
	}
	return c.Outcome, nil
}

// permitted returns why the change must not begin, or nil.
func (c *change) permitted(ctx context.Context) error {
	if c.options.Check != nil {
		if err := c.options.Check(); err != nil {
			return err
		}
	}
	if len(c.Others) > 0 && c.options.Refuse {
		return newConflict(Names(c.Others), nil)
	}
	if !c.load {
		return nil
	}
	if err := c.foresee(ctx); err != nil {
		return err
	}
	return c.rehearse(ctx, c.next)
}

// run performs all steps of a change in order.
func (c *change) run(ctx context.Context) error {
	for _, step := range []func(context.Context) error{c.saveBackup, c.keepFlags, c.loadRules, c.writeFiles, c.saveState} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	start := func() error { return nil }
	if c.options.Service {
		var err error
		if start, err = c.register(); err != nil {
			return err
		}
	}
	if len(c.others) > 0 {
		// Last: by now a boot loads our rules, even after a power failure.
		if err := c.takeOver(ctx); err != nil {
			return &TakeOverError{Names(c.Others), err}
		}
	}
	if err := c.prove(ctx); err != nil {
		return err
	}
	if c.options.Prove != nil {
		if err := c.options.Prove(ctx, c.next); err != nil {
			return &backend.Error{Err: err}
		}
	}
	if err := start(); err != nil {
		return err
	}
	if !c.raised && !c.Guarded {
		return nil
	}
	if err := c.Guard.Lower(); err != nil {
		return err
	}
	// A service that was running has seen the guard. Saving makes it check again.
	if err := c.Store.Save(c.next); err != nil {
		c.Log.WithError(err).Warn("the status for monitoring may be out of date")
	}
	return nil
}

// prove checks the effect of the rules that were loaded.
func (c *change) prove(ctx context.Context) error {
	if c.options.Proof == nil || !c.load {
		return nil
	}
	return refused(c.options.Proof.End(ctx))
}

func refused(err error) error {
	if err == nil {
		return nil
	}
	return &RefusedError{err}
}

// rollBack rolls back the change after err. If that fails, the guard stays: nothing
// else is known to close the machine.
func (c *change) rollBack(err error) error {
	clean, err := c.rollback(err)
	switch {
	case !c.raised:
		return err
	case !clean:
		return hint.Wrap(fmt.Errorf("%w; table %s keeps the machine closed", err, GuardTable), "basicfw-agent bootstrap")
	}
	if e := c.Guard.Lower(); e != nil {
		err = fmt.Errorf("%w; the rollback failed: %w", err, e)
	}
	return err
}

// saveBackup writes the backup, before the first change.
func (c *change) saveBackup(ctx context.Context) error {
	if c.load {
		if size, ok := c.Grow(ctx); ok && c.first {
			c.original.Conntrack = size
			c.onRollback(func() error { return c.Conntrack.Set(size) })
		}
	}
	if !c.recorded {
		err := c.do(func() error { return c.Store.SaveBackup(c.original) }, func() error {
			if c.first || c.lost {
				return c.Store.RemoveBackup()
			}
			return c.Store.SaveBackup(c.before)
		})
		if err != nil {
			return fmt.Errorf("saving the backup: %w", err)
		}
	}
	// The service can write to this directory but not create it: in its sandbox the
	// rest of /etc is read-only.
	dir := filepath.Dir(motd.MessageFile)
	if !c.first || c.System.Exists(dir) {
		return nil
	}
	return c.do(func() error { return c.System.MkdirAll(dir, 0o755) }, func() error { return c.System.RemoveDir(dir) })
}

// loadRules loads the rules into the kernel, if they differ.
func (c *change) loadRules(ctx context.Context) error {
	if !c.load {
		return nil
	}
	c.Adopted = c.Adopt()
	if len(c.others) > 0 {
		if err := c.raise(); err != nil {
			return err
		}
	}
	// A failed load has already been undone.
	if err := c.Inspection.Snapshot.Load(ctx, c.next.Ruleset, c.options.Clear); err != nil {
		return &backend.Error{Err: err}
	}
	c.onRollback(func() error { return c.Inspection.Snapshot.Restore(context.WithoutCancel(ctx), backend.Backup{}) })
	c.next = lease.BeginProbation(c.next, c.previous, c.Moment())
	return nil
}

// keepFlags writes the requested files before the first rules, so that a bootstrap after an
// interrupted one knows what was asked for.
func (c *change) keepFlags(context.Context) error {
	if !c.first {
		return nil
	}
	return c.write(func(f files.Change) bool { return c.requested(f.Path) })
}

// writeFiles writes the persisted rules and the requested files.
func (c *change) writeFiles(context.Context) error {
	return c.write(func(f files.Change) bool { return !c.first || !c.requested(f.Path) })
}

func (c *change) requested(path string) bool {
	return slices.ContainsFunc(c.options.Files, func(f files.Change) bool { return f.Path == path })
}

// write writes the files that differ and are wanted.
func (c *change) write(wanted func(files.Change) bool) error {
	for _, f := range c.files {
		if !wanted(f) {
			continue
		}
		was, err := files.Snapshot(c.System, f.Path)
		if err != nil {
			return fmt.Errorf("%s: %w", f.Path, err)
		}
		c.removeNewDir(filepath.Dir(f.Path))
		if err := c.do(func() error { return f.Apply(c.System) }, func() error { return was.Restore(c.System) }); err != nil {
			return err
		}
	}
	return nil
}

// removeNewDir makes a rollback remove a directory that does not exist yet.
func (c *change) removeNewDir(dir string) {
	if !c.System.Exists(dir) {
		c.onRollback(func() error { return c.System.RemoveDir(dir) })
	}
}

// saveState saves next as the desired state and removes the pending change: that of
// another boot, or the present one.
func (c *change) saveState(context.Context) error {
	c.next.Version, c.next.LastVerified = c.Version, c.Moment().Time
	if c.next.Bootstrapped.IsZero() {
		c.next.Bootstrapped = c.next.LastVerified
	}
	c.removeNewDir(filepath.Dir(store.CopyFile))
	// They may be unreadable or of a newer version, and are restored byte for byte, in
	// the order in which Save writes them: the state last.
	for _, path := range []string{store.HeldFile, store.StateFile, store.CopyFile, store.PendingFile} {
		was, err := files.Snapshot(c.System, path)
		switch {
		case err == nil:
			c.onRollback(func() error { return was.Restore(c.System) })
		case !c.next.Held: // which does not need the disk
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	if err := c.Store.Save(c.next); err != nil {
		return fmt.Errorf("saving the state: %w", err)
	}
	return c.Store.RemovePending()
}

// register registers the service and returns a function that starts it. Call that
// once the rules are loaded: an earlier repair would interfere.
func (c *change) register() (start func() error, err error) {
	was, _ := c.Service.Status() // if unknown, register it again
	if !was.Registered {
		c.onRollback(c.Service.Uninstall)
	}
	if !was.Registered || !was.Enabled {
		if err := c.Service.Install(); err != nil {
			return nil, fmt.Errorf("registering the service: %w", err)
		}
	}
	return func() error {
		if was.Active {
			return nil
		}
		if err := c.Service.Start(); err != nil {
			return fmt.Errorf("starting the service: %w", err)
		}
		return nil
	}, nil
}

// Equivalent reports whether two states differ only in when, and on what evidence,
// they were written.
func Equivalent(a, b store.State) bool {
	for _, s := range []*store.State{&a, &b} {
		s.Schema, s.Version, s.Bootstrapped, s.LastVerified = 0, "", time.Time{}, time.Time{}
		s.RescueArgument = ""
		s.SSHPorts, s.Allowed = nil, nil // reasons; ports and networks themselves are in Desired
	}
	return reflect.DeepEqual(a, b)
}

// Names returns the names of firewall managers.
func Names(list []firewall.Conflict) []string {
	var out []string
	for _, m := range list {
		out = append(out, m.Name)
	}
	return slices.Clip(out)
}

// transaction is a change that is made step by step and rolled back as a whole.
type transaction struct{ undo []func() error }

// do performs a step. It registers undo first: a failed step may be partly done.
func (t *transaction) do(step, undo func() error) error {
	t.onRollback(undo)
	return step()
}

// onRollback registers an action that a rollback performs.
func (t *transaction) onRollback(undo func() error) { t.undo = append(t.undo, undo) }

// rollback undoes all steps in reverse order after err, to which it adds what could
// not be undone. clean reports whether everything was undone.
func (t *transaction) rollback(err error) (clean bool, _ error) {
	clean = true
	for i := len(t.undo) - 1; i >= 0; i-- {
		if e := t.undo[i](); e != nil {
			clean, err = false, fmt.Errorf("%w; the rollback failed: %w", err, e)
		}
	}
	return clean, err
}
