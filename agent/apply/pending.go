package apply

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/lease"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// PendingError reports that a change is refused because another one is pending.
type PendingError struct{ Until time.Time }

func (e *PendingError) Error() string {
	return fmt.Sprintf("another change is pending until %s", firewall.FormatTime(e.Until))
}

func refuse(p *store.Pending) error {
	return hint.Wrap(&PendingError{p.Window.Until}, "basicfw-agent confirm keeps it; otherwise wait until it is rolled back")
}

// RefusePending returns a [*PendingError] if a change is pending.
func (a *Applier) RefusePending() error {
	p, err := a.Pending()
	switch {
	case err != nil:
		return hint.Wrap(err, "basicfw-agent verify --repair rolls the change back")
	case p != nil:
		return refuse(p)
	}
	return nil
}

// Pending returns the pending change, or nil.
func (a *Applier) Pending() (*store.Pending, error) {
	p, err := a.Store.LoadPending()
	if errors.Is(err, store.ErrNone) {
		return nil, nil
	}
	if err != nil || !(lease.Lease{Pending: &p}).Waiting(a.Moment()) {
		return nil, err
	}
	return &p, nil
}

// InEffect returns the state whose rules are loaded: that of the pending change if
// there is one, otherwise the desired state.
func (a *Applier) InEffect() (store.State, error) {
	st, err := a.Store.Load()
	if err != nil {
		return st, err
	}
	p, err := a.Pending()
	if p != nil {
		st = p.State
	}
	return st.At(a.Moment()), err
}

// Try loads the rules of next for a limited time, unless Confirm is called in time. It
// leaves the state and the files unchanged, so that a reboot rolls back. The caller
// ensures that Expire is called in time, with o.Watch. A failed Try is rolled back; if
// nothing differs, nothing is touched. Another Try of the same state restarts the time.
func (a *Applier) Try(ctx context.Context, next store.State, length time.Duration, o Options) (Outcome, error) {
	return a.withFallback(next, o, func(next store.State) (Outcome, error) { return a.try(ctx, next, length, o) })
}

func (a *Applier) try(ctx context.Context, next store.State, length time.Duration, o Options) (Outcome, error) {
	switch p, err := a.Pending(); {
	case err != nil:
		return Outcome{}, err
	case p != nil && !Equivalent(p.State, next):
		return Outcome{}, refuse(p)
	}
	p, err := a.prepare(ctx, next, o)
	if err != nil || !p.Changed {
		return p.Outcome, err
	}
	if len(p.Others) > 0 && o.TakeOver { // nothing would undo the takeover in time
		return p.Outcome, hint.Wrap(&ConflictError{Names: Names(p.Others)}, "basicfw-agent apply, without --confirm, takes over")
	}
	c := &change{Applier: a, prepared: p, next: next}
	c.options.Clear = false // not until it is confirmed
	if err := c.permitted(ctx); err != nil {
		return p.Outcome, err
	}
	l, err := lease.Lease{}.Next(lease.Try{State: next, Length: length}, a.Moment())
	if err != nil {
		return p.Outcome, err
	}
	was, err := files.Snapshot(a.System, store.PendingFile)
	if err != nil {
		return p.Outcome, fmt.Errorf("%s: %w", store.PendingFile, err)
	}
	// Record it first: an unrecorded change is never rolled back.
	err = c.do(func() error { return a.Store.SavePending(*l.Pending) }, func() error { return was.Restore(a.System) })
	if err != nil {
		err = fmt.Errorf("recording the pending change: %w", err)
	} else if o.Watch != nil {
		err = o.Watch()
	}
	if err == nil && p.load {
		p.Adopted = a.Adopt()
		if err = p.Inspection.Snapshot.Load(ctx, next.Ruleset, false); err != nil {
			err = &backend.Error{Err: err}
		} else {
			c.onRollback(func() error { return p.Inspection.Snapshot.Restore(context.WithoutCancel(ctx), backend.Backup{}) })
			err = c.prove(ctx)
		}
	}
	if err != nil {
		_, err = c.rollback(err)
	}
	return p.Outcome, err
}

// Confirm keeps the pending change. The error is [lease.ErrNothingPending] if there is
// none.
func (a *Applier) Confirm(ctx context.Context) (store.State, error) {
	p, err := a.Pending()
	if err != nil {
		return store.State{}, err
	}
	l, err := lease.Lease{Pending: p}.Next(lease.Keep{}, a.Moment())
	if err != nil {
		return store.State{}, err
	}
	out, err := a.Apply(ctx, l.State, Options{})
	if err == nil && !out.Changed {
		err = a.Store.RemovePending()
	}
	return l.State, err
}

// Change applies what a lease event changes in the desired state: unlock, lock, and
// the confirmation of a client. The first two must not depend on files: see
// [Applier.Recover] and [Applier.ApplyOrHold].
func (a *Applier) Change(ctx context.Context, e lease.Event) (store.State, Outcome, error) {
	p, err := a.Pending()
	if err != nil { // its rules are unknown
		if err := a.Rollback(ctx, "its record cannot be read"); err != nil {
			a.Log.WithError(err).Warn("the pending change could not be rolled back")
		}
	}
	st, err := a.Recover()
	if err != nil {
		return st, Outcome{}, err
	}
	l, err := lease.Lease{State: st, Pending: p}.Next(e, a.Moment())
	if err != nil {
		return l.State, Outcome{}, err
	}
	change := a.ApplyOrHold
	switch e.(type) {
	case lease.ConfirmClient: // permanently, or not at all
		change = a.Apply
	case lease.Lock:
		if !st.Held {
			change = a.Apply
		}
	}
	out, err := change(ctx, l.State, Options{})
	return l.State, out, err
}

// Rollback rolls back the pending change and records why. If there is none, it does
// nothing.
func (a *Applier) Rollback(ctx context.Context, why string) error {
	_, err := a.settle(ctx, func(*store.Pending) lease.Event { return lease.Rollback{Why: why} })
	return err
}

// Expire rolls back the pending change if it has expired.
func (a *Applier) Expire(ctx context.Context) (expired bool, err error) {
	return a.settle(ctx, func(p *store.Pending) lease.Event {
		if p == nil {
			return lease.Rollback{Why: "its record cannot be read"}
		}
		return lease.Tick{}
	})
}

// settle applies an event to the pending change (nil if it cannot be read). If that
// ends the change, settle loads the rules of the desired state.
func (a *Applier) settle(ctx context.Context, event func(*store.Pending) lease.Event) (settled bool, err error) {
	p, err := a.Store.LoadPending()
	if errors.Is(err, store.ErrNone) {
		return false, nil
	}
	l := lease.Lease{Pending: &p}
	e := event(&p)
	if err != nil {
		// The change is unknown, but the desired state is not.
		a.Log.WithError(err).Warn("the pending change cannot be read and is rolled back")
		e = event(nil)
	} else if _, tick := e.(lease.Tick); tick && l.Waiting(a.Moment()) {
		return false, nil
	}
	st, err := a.Recover()
	if errors.Is(err, store.ErrNone) {
		st, err = a.Failsafe(err)
	}
	if err != nil {
		return true, err
	}
	in, err := a.Backend(st.Backend.Name).Inspect(ctx, st.Ruleset)
	if err != nil {
		return true, err
	}
	if len(in.Drift) > 0 {
		if err := in.Snapshot.Load(ctx, st.Ruleset, false); err != nil {
			return true, fmt.Errorf("rolling back an unconfirmed change: %w", err)
		}
	}
	l.State = st
	if l, err = l.Next(e, a.Moment()); err != nil {
		return true, err
	}
	st.RolledBack = l.State.RolledBack // removing other expired parts is another change
	if err := a.Store.Save(st); err != nil {
		return true, fmt.Errorf("recording the rollback: %w", err)
	}
	a.Log.Warn(st.RolledBack)
	return true, a.Store.RemovePending()
}

// ExpireWhenDue waits until the pending change expires, takes the lock, and rolls it
// back.
func (a *Applier) ExpireWhenDue(ctx context.Context) error {
	for {
		p, err := a.Pending()
		if err != nil || p == nil {
			break
		}
		// The clock may be set during the wait.
		m := a.Moment()
		left := lease.Lease{Pending: p}.Due(m).Sub(m.Time)
		if err := sleep(ctx, min(max(left, 10*time.Millisecond), time.Minute)); err != nil {
			return err
		}
	}
	unlock, err := a.Store.Lock(ctx, "expire")
	if err != nil {
		return err
	}
	defer unlock()
	// Retry after a full disk or a concurrent change of the tables: nothing else would.
	for range 60 {
		if _, err = a.Expire(ctx); err == nil {
			return nil
		}
		if err := sleep(ctx, time.Second); err != nil {
			return err
		}
	}
	return err
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
