package agent

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/daemon"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/netsim"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/selftest"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/trial"
	"github.com/basicfw/basicfw-agent/agent/verify"
)

const (
	// noteWait is how long verify waits for the lock to record that there is no drift.
	noteWait = 100 * time.Millisecond
	// settleWait is how long a read-only command waits for a change before it reports drift.
	settleWait = 5 * time.Second
)

// Verify compares the machine with its desired state, and with repair it repairs drift. If
// there is none and the lock is free, it records the time.
func (a *Agent) Verify(ctx context.Context, repair bool) (verify.Report, error) {
	wait := noteWait
	if repair {
		wait = lockWait
	}
	unlock, lockErr := a.lock(ctx, "verify", wait)
	if lockErr == nil {
		defer unlock()
	} else if repair {
		return verify.Report{}, lockErr
	}
	var prepareErr error
	if repair {
		prepareErr = a.PrepareRepair(ctx)
	}
	r, err := a.Verifier.Verify(ctx, a.survey.Ports)
	if err != nil {
		_, e := a.State() // State adds a hint if the state could not be read
		return r, cmp.Or(e, err)
	}
	if lockErr != nil && len(r.Drift) > 0 {
		// The drift may be a change in progress, which holds the lock.
		if unlock, lockErr = a.lock(ctx, "verify", settleWait); lockErr == nil {
			defer unlock()
			if r, err = a.Verifier.Verify(ctx, a.survey.Ports); err != nil {
				return r, err
			}
		}
	}
	switch {
	case len(r.Drift) == 0 && len(r.Inspection.Exposed) == 0:
		if lockErr == nil {
			lockErr = a.SaveVerified(r)
		}
		if lockErr != nil {
			a.Log.WithError(lockErr).Warn("cannot record the time of this verification")
		}
	case len(r.Drift) > 0 && repair:
		if _, err := a.Repair(ctx, r); err != nil {
			return r, err
		}
		a.announce(ctx, r.State)
	}
	return r, prepareErr
}

// Status returns the status of the machine.
func (a *Agent) Status(ctx context.Context) (report.Status, error) {
	// Invalid settings do not change the status: the applied state counts.
	s, settingsErr := settings.Load(a.System, a.config)
	facts, err := a.facts(s, true)
	if err != nil {
		return report.Status{}, err
	}
	look := func() (report.Status, error) {
		in, err := a.gather(ctx, facts)
		in.SettingsErr = settingsErr
		return report.New(in), err
	}
	st, err := look()
	// It may be a change in progress.
	if slices.ContainsFunc(st.Conditions, func(c string) bool { return c == report.Drifted || c == report.Exposed || c == report.Blocked }) {
		if unlock, lockErr := a.lock(ctx, "status", settleWait); lockErr == nil {
			defer unlock()
			st, err = look()
		}
	}
	return st, err
}

// gather collects the input of a status, in addition to facts. It reads the rules once, for
// their comparison and their effect.
func (a *Agent) gather(ctx context.Context, facts host.Facts) (report.Input, error) {
	defer a.kernel.Hold()()
	in := report.Input{Version: a.Version, Families: a.Families, Now: a.Moment(), Facts: facts}
	r, err := a.Verifier.Verify(ctx, facts.Ports)
	if err != nil {
		if _, in.Err = a.Store.Load(); in.Err == nil {
			return in, err
		}
		r = verify.Report{}
	}
	if in.Err != nil { // there is no state to compare the rules with
		_, r.Inspection, in.InspectionErr = a.Find(ctx)
		r.Inspection.Drift, r.Inspection.LockedOut = nil, nil
	}
	in.Report = r
	in.Live, in.LiveErr = a.Live(ctx)
	in.Alone = iptables.Model(r.Wanted().At(in.Now).Ruleset)
	in.BackupLost = in.Err == nil && !a.Store.Recorded()
	in.Conflicts, in.ConflictsErr = a.Conflicts.Find(in.Inspection.Conflicts)
	note := daemon.LoadNote(a.System, a.Moment().Time)
	in.Verified = note.Verified
	for _, p := range note.Pauses {
		in.RepairPaused = append(in.RepairPaused, p.String())
	}
	return in, nil
}

// Selftest tests the rules with packets, in a copy of this machine's network: the rules in
// effect or, before bootstrap, those that bootstrap would load.
func (a *Agent) Selftest(ctx context.Context) (selftest.Report, error) {
	st, err := a.inEffect(ctx)
	if err != nil {
		return selftest.Report{}, err
	}
	res, err := a.Trial().Selftest(ctx, st, a.Families)
	var impossible *netsim.ImpossibleError
	if _, e := a.Store.Load(); err != nil && errors.Is(e, store.ErrNone) && !errors.As(err, &impossible) {
		// Bootstrap also switches if the first backend does not work here.
		if out, e := a.Plan(ctx, st, apply.Options{Choose: true}); e == nil && out.State.Backend.Name != st.Backend.Name {
			return a.Trial().Selftest(ctx, out.State, a.Families)
		}
	}
	return res, err
}

// inEffect returns the state whose rules are loaded: that of the pending change, or the
// desired state. Before bootstrap, it is the state that bootstrap would apply.
func (a *Agent) inEffect(ctx context.Context) (store.State, error) {
	if _, err := a.Store.Load(); errors.Is(err, store.ErrNone) {
		st, err := a.Desired()
		if err != nil {
			return st, err
		}
		// With the backend that bootstrap would choose.
		out, err := a.Plan(ctx, st, apply.Options{Clear: true, Choose: true})
		return out.State, err
	}
	if st, err := a.State(); err != nil { // with a hint
		return st, err
	}
	return a.InEffect()
}

// prove runs the selftest that a change must pass. If this machine cannot run one, prove
// logs a warning and returns nil.
func (a *Agent) prove(ctx context.Context, st store.State) error {
	res, err := a.Trial().Selftest(ctx, st.At(a.Moment()), a.Families)
	var impossible *netsim.ImpossibleError
	switch {
	case errors.As(err, &impossible):
		a.Log.WithError(err).Warn("the rules are loaded, but were not tested with packets")
		return nil
	case err != nil:
		return err
	}
	return res.Err()
}

// Trial returns the runner of rehearsals and selftests, in child processes of this program.
func (a *Agent) Trial() trial.Runner {
	return trial.Runner{System: a.System, Backend: a.Backend, Iptables: a.kernel}
}
