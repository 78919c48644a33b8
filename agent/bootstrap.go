package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/lease"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/proof"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/bootstrap"
)

// Request is the options of a change. The zero value is a plain apply.
type Request struct {
	DryRun      bool // only plan
	Redetect    bool // repeat the detection
	Force       bool // even if the caller is locked out
	NoRehearsal bool
	NoSelftest  bool          // bootstrap only
	NoService   bool          // bootstrap only
	OrFailsafe  bool          // close the machine even if bootstrap fails
	Confirm     time.Duration // roll back after this time unless confirmed; zero is never
}

// Result is what a change did, or would do.
type Result struct {
	apply.Outcome
	Previous *store.State
	Refused  error               // why the change would be refused; set by a dry run only
	Lockout  *lease.LockoutError // set if the caller cannot log in again
	ClosedBy string              // the profile that closes the machine although bootstrap failed
	Unsaved  error               // why ClosedBy lasts only until a reboot
}

// Bootstrap closes the machine, and tests the rules with packets. Run again, it changes
// nothing unless flags or settings have changed.
func (a *Agent) Bootstrap(ctx context.Context, f bootstrap.Flags, r Request) (Result, error) {
	unlock, err := a.lock(ctx, "bootstrap", lockWait)
	var res Result
	locked := err == nil
	if locked {
		defer unlock()
		res, err = a.bootstrap(ctx, f, r)
	}
	if err == nil || !r.OrFailsafe || r.DryRun {
		return res, err
	}
	var e error
	if res.ClosedBy, res.Unsaved, e = a.closeAnyway(ctx, f, r, err, locked); e != nil {
		res.ClosedBy, res.Unsaved, err = "", nil, fmt.Errorf("%w\nclosing the machine anyway: %w", err, e)
	}
	return res, err
}

func (a *Agent) bootstrap(ctx context.Context, f bootstrap.Flags, r Request) (Result, error) {
	if st, err := a.Store.Load(); err == nil && bootstrap.IsClone(st.InstanceID, a.survey.Instance()) {
		// The clone may have another administrator than the original machine.
		f.ForgetClient = f.ClientIP == ""
	}
	s, local, err := bootstrap.LoadSettings(a.System, a.config, f)
	if err != nil {
		return Result{}, err
	}
	res, err := a.change(ctx, s, r, job{files: files.Optional(local), first: true, service: !r.NoService})
	if err != nil || r.DryRun {
		return res, err
	}
	if res.Changed {
		// Now, while the open session can still be used to fix the cause.
		res.Inspection.Warnings = append(res.Inspection.Warnings, bootstrap.LoginWarnings(res.State, a.found)...)
	}
	// While this file exists, the user-data script retries at each boot, with its flags.
	return res, a.System.Remove(bootstrap.MessageFile)
}

// Apply applies the settings to a bootstrapped machine.
func (a *Agent) Apply(ctx context.Context, r Request) (Result, error) {
	if !r.DryRun {
		unlock, err := a.lock(ctx, "apply", lockWait)
		if err != nil {
			return Result{}, err
		}
		defer unlock()
	}
	previous, err := a.State()
	if err != nil {
		return Result{}, err
	}
	s, err := settings.Load(a.System, a.config)
	if err != nil {
		return Result{}, err
	}
	return a.change(ctx, s, r, job{service: previous.Service, takeOver: true})
}

// job is the part of a change that depends on the command.
type job struct {
	files    []files.Change // to write in the same transaction
	first    bool           // the command is bootstrap
	service  bool           // register the service
	takeOver bool           // stop other firewall managers, if the settings allow it
}

// change computes the desired state and applies it; a dry run only plans it.
func (a *Agent) change(ctx context.Context, s settings.Settings, r Request, j job) (res Result, err error) {
	s.ForceBlocks = r.Force
	st, previous, warnings, err := a.decide(ctx, s, r.Redetect)
	for _, w := range warnings {
		a.Log.Warn(w)
	}
	if err != nil {
		return res, err
	}
	if r.NoRehearsal {
		a.Rehearse = nil
	}
	st.Service = j.service || previous != nil && previous.Service
	res.Previous = previous
	o := a.options(st, previous, s, r, j)
	switch {
	case r.DryRun:
		if res.Outcome, err = a.Plan(ctx, st, o); err == nil && o.Refuse && len(res.Others) > 0 {
			res.Refused = &apply.ConflictError{Names: apply.Names(res.Others)}
			res.Others = nil
		}
	case r.Confirm > 0:
		res.Outcome, err = a.tryFor(ctx, st, r.Confirm, o)
	default:
		if err := a.RefusePending(); err != nil {
			return res, err
		}
		res.Outcome, err = a.ApplyOrWithoutRule(ctx, st, o)
	}
	if err != nil {
		return res, err
	}
	res.Lockout = lease.Lockout(a.found.Session, res.State)
	if res.Changed && !r.DryRun {
		a.announce(ctx, res.State)
	}
	return res, nil
}

// options returns the options of applying st.
func (a *Agent) options(st store.State, previous *store.State, s settings.Settings, r Request, j job) apply.Options {
	clone := previous != nil && bootstrap.IsClone(previous.InstanceID, st.InstanceID)
	o := apply.Options{Previous: previous, Service: j.service, Files: j.files, Record: []string{a.localPath()}}
	// Once only: a rule that appears in INPUT later was added despite our rules. It is
	// reported rather than removed.
	o.Clear = j.first && (previous == nil || clone)
	o.Refuse = s.OnConflict == settings.Refuse
	o.TakeOver = (j.takeOver || j.first) && !o.Refuse
	// A detected backend is kept. Any other is chosen now.
	o.Choose = previous == nil || previous.Backend.Source != "detected" || r.Redetect || clone
	if !r.Force && r.Confirm == 0 {
		o.Check = func() error { return lease.Refuse(a.found.Session, st, previous, r.OrFailsafe) }
	}
	o.Proof = &proof.Proof{Live: a.Live, Facts: a.found, Families: a.Families, Next: st, Now: a.Moment(), Tests: s.Tests, Force: r.Force, Log: a.Log}
	if j.first && !r.NoSelftest {
		o.Prove = a.prove
	}
	return o
}

// closeAnyway closes a machine whose bootstrap failed with cause. It uses the profile if
// only the client was refused, otherwise the failsafe rules, and keeps the flags. profile
// is "" if another firewall manager or the previous desired state already closes the
// machine. If only the rules could be loaded, unsaved is the reason why nothing was saved.
func (a *Agent) closeAnyway(ctx context.Context, f bootstrap.Flags, r Request, cause error, locked bool) (profile string, unsaved, err error) {
	var conflict *apply.ConflictError
	var takeOver *apply.TakeOverError
	if errors.As(cause, &conflict) || errors.As(cause, &takeOver) && a.ClosedBy(ctx, takeOver.Names) {
		return "", nil, nil // closed by the other firewall manager
	}
	if st, err := a.Store.Load(); err == nil && st.Failsafe == "" {
		return "", nil, nil // closed by the previous desired state
	}
	f, retry := bootstrap.Keepable(a.System, f, cause)
	s, local, _ := bootstrap.LoadSettings(a.System, a.config, f) // it may have errors
	refuse := s.OnConflict == settings.Refuse
	o := apply.Options{Clear: true, Service: !r.NoService, Choose: true, Files: files.Optional(local), Record: []string{a.localPath()}, Refuse: refuse, TakeOver: !refuse}
	if locked && bootstrap.OnlyClient(cause) {
		s.ClientIP, s.Allow = nil, settings.Allow{Mode: settings.AllowAny}
		st, _, _, err := a.decide(ctx, s, false)
		if err == nil {
			st.Failsafe, st.Retry = cause.Error(), retry
			st.Client = store.Client{Source: "none", Reason: "the named client was refused"}
			_, err = a.applyFailsafe(ctx, st, o)
		}
		if err == nil {
			return st.Profile.Name, nil, nil
		}
		a.Log.WithError(err).Warn("cannot apply the profile either")
	}
	st, err := a.Failsafe(cause)
	st.Retry = retry
	if err == nil && locked {
		if unsaved, err := a.applyFailsafe(ctx, st, o); err == nil {
			return st.Profile.Name, unsaved, nil
		}
	}
	if err == nil {
		err = a.LoadOnly(ctx, st, o)
	}
	return st.Profile.Name, cause, err
}

func (a *Agent) applyFailsafe(ctx context.Context, st store.State, o apply.Options) (unsaved, err error) {
	st.Service, st.Held = o.Service, false
	out, err := a.ApplyOrHold(ctx, st, o)
	if err == nil {
		a.announce(ctx, out.State)
	}
	return out.Unsaved, err
}

// Desired returns the state that follows from the present settings and facts.
func (a *Agent) Desired() (store.State, error) {
	s, err := settings.Load(a.System, a.config)
	if err != nil {
		return store.State{}, err
	}
	st, _, _, err := a.decide(context.Background(), s, false)
	return st, err
}

// Render returns the rules that apply or bootstrap would load, as text for
// iptables-restore or for nft -f.
func (a *Agent) Render(name string, families []firewall.Family) (string, error) {
	st, err := a.Desired()
	if err != nil {
		return "", err
	}
	if name == backend.Nftables {
		return nftables.Render(st.Ruleset, families), nil
	}
	return iptables.RenderAll(st.Ruleset, families), nil
}
