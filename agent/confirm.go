package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// ErrPending says that a change waits for a confirmation, and another one has
// to wait too.
var ErrPending = errors.New("a change waits for a confirmation")

// ErrNothingPending says that no change waits for a confirmation.
var ErrNothingPending = errors.New("no change waits for a confirmation")

// Pending gives the change that waits for a confirmation; nil is none. One of
// another boot waits no longer: the boot has loaded what was before.
func (a *Agent) Pending() (*store.Pending, error) {
	p, err := a.Store.LoadPending()
	switch m := a.Moment(); {
	case errors.Is(err, store.ErrNone):
		return nil, nil
	case err != nil:
		return nil, err
	case p.Window.Over(m) || p.Window.Boot != m.Boot:
		return nil, nil
	}
	return &p, nil
}

// Try loads the rules of next, for a time, unless Confirm is called within it.
// All else stays as it was: the state and the persisted files are what a boot
// in the meantime goes by. Whoever calls it sees to it that TakeBack is called
// when the time is over; the service does so too. Where it fails, all is as it
// was before; where nothing differs, nothing is touched. Called again for the
// same, it begins anew.
func (a *Agent) Try(ctx context.Context, next store.State, length time.Duration, o Options) (out Outcome, err error) {
	err = a.either(&next, o, func() (err error) {
		out, err = a.try(ctx, next, length, o)
		return err
	})
	out.State = next
	return out, err
}

func (a *Agent) try(ctx context.Context, next store.State, length time.Duration, o Options) (out Outcome, err error) {
	switch p, err := a.Pending(); {
	case err != nil:
		return out, err
	case p != nil && !sameDecision(p.State, next):
		return out, ErrPending
	}
	prep, err := a.prepare(ctx, next, o)
	if err != nil || !prep.Changed {
		return prep.Outcome, err
	}
	out = prep.Outcome
	if o.Check != nil {
		if err := o.Check(prep.Inspection); err != nil {
			return out, err
		}
	}
	if len(prep.Others) > 0 {
		conflict := &ConflictError{Names: Names(prep.Others)}
		if o.TakeOver { // which nothing would take back in time
			conflict.Next = "run \"basicfw-agent apply\" first, which takes over"
		}
		return out, conflict
	}
	if prep.load {
		if err := a.rehearse(ctx, next); err != nil {
			return out, err
		}
	}
	pending := store.Pending{State: next, Window: firewall.NewWindow(a.Moment(), length)}
	if err := firewall.CheckTime(pending.Window.Until); err != nil {
		return out, err
	}
	was, err := a.snapshot(store.PendingFile)
	if err != nil {
		return out, fmt.Errorf("%s: %w", store.PendingFile, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.putBack(was))
		}
	}()
	// The note comes first: a change that nobody knows of is never taken back.
	if err := a.Store.SavePending(pending); err != nil {
		return out, fmt.Errorf("noting the change: %w", err)
	}
	if !prep.load {
		return out, nil
	}
	if out.Adopted, err = a.Conntrack.Adopt(); err != nil {
		a.Log.WithError(err).Warn("sessions that are open now may have to be opened again")
	}
	if err := a.Kernel(next.Backend.Name).Load(ctx, next.Ruleset, prep.Inspection, false); err != nil {
		return out, &LoadError{err}
	}
	return out, nil
}

// Confirm keeps the change that waits. The error is ErrNothingPending where
// none does.
func (a *Agent) Confirm(ctx context.Context) (store.State, error) {
	p, err := a.Pending()
	if err != nil {
		return store.State{}, err
	}
	if p == nil {
		return store.State{}, ErrNothingPending
	}
	out, err := a.Converge(ctx, p.State, Options{})
	if err == nil && !out.Changed {
		err = a.Store.RemovePending()
	}
	return p.State, err
}

// TakeBack brings back what was before the change that waits, for a reason.
// Without such a change it does nothing.
func (a *Agent) TakeBack(ctx context.Context, why string) error {
	p, err := a.Store.LoadPending()
	if errors.Is(err, store.ErrNone) {
		return nil
	}
	if err != nil {
		// It cannot be known what it was; what was decided before can.
		a.Log.WithError(err).Warn("the change that waits for a confirmation cannot be read and is taken back")
	}
	st, err := a.Store.Load()
	if err != nil {
		return err
	}
	kernel := a.Kernel(st.Backend.Name)
	in, err := kernel.Inspect(ctx, st.Ruleset)
	if err != nil {
		return err
	}
	if len(in.Drift) > 0 {
		if err := kernel.Load(ctx, st.Ruleset, in, false); err != nil {
			return fmt.Errorf("taking back a change that nobody confirmed: %w", err)
		}
	}
	st.TakenBack = fmt.Sprintf("the change of %s was taken back: %s", p.Window.Since.Format("2006-01-02 15:04:05 MST"), why)
	if err := a.Store.Save(st); err != nil {
		return fmt.Errorf("noting that a change was taken back: %w", err)
	}
	a.Log.Warn(st.TakenBack)
	return a.Store.RemovePending()
}

// Expire takes back the change that waits, if its time is over.
func (a *Agent) Expire(ctx context.Context) error {
	_, err := a.expire(ctx)
	return err
}

// expire takes back a change whose time is over.
func (a *Agent) expire(ctx context.Context) (expired bool, err error) {
	p, err := a.Store.LoadPending()
	if errors.Is(err, store.ErrNone) {
		return false, nil
	}
	why := "what was noted of it cannot be read"
	if err == nil {
		switch m := a.Moment(); {
		case p.Window.Boot != m.Boot:
			why = "the machine was restarted before anybody confirmed it"
		case p.Window.Over(m):
			why = "nobody confirmed it within " + (p.Window.Ends - p.Window.Began).String()
		default:
			return false, nil
		}
	}
	return true, a.TakeBack(ctx, why)
}
