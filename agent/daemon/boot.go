package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"time"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/lease"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/verify"
)

// lockWait is how long the service waits for the lock. A boot then continues without it:
// an open machine is worse than loading the same rules twice.
const lockWait = 5 * time.Second

// bootLimit is how long the boot waits for a failure to pass if nothing else closes the
// machine. The service manager waits a little longer.
const bootLimit = 45 * time.Second

// boot loads the rules of the state or its copy, or the failsafe rules if neither is
// readable. It returns a status text for the service manager.
//
// After a failure that may pass, such as a lock that another program holds, nothing is changed
// on the disk. Until the desired state can be loaded, the machine is closed with what can be.
func (d *Daemon) boot(ctx context.Context) (string, error) {
	unlock, locked := d.tryLock(ctx)
	defer unlock()
	if locked {
		if err := d.restoreState(); err != nil {
			d.Log.WithError(err).Errorf("the state could not be restored; using %s", store.CopyFile)
		}
	}
	if _, err := d.Store.Load(); err != nil {
		d.hold(err)
	}
	d.Grow(ctx)
	if _, err := d.Expire(ctx); err != nil {
		d.Log.WithError(err).Warn("the pending change could not be rolled back yet")
	}
	if err := d.rescue(); err != nil {
		d.Log.WithError(err).Error("the machine could not be unlocked")
	}
	for start := time.Now(); ; {
		r, err := d.verifyOrFallBack(ctx)
		if err == nil {
			status := ""
			if status, err = d.enforce(ctx, r); err == nil {
				return status, nil
			}
		}
		d.Log.WithError(err).Error("the desired state could not be enforced")
		status, e := d.close(ctx, err)
		if e == nil || !temporary(err) || ctx.Err() != nil || time.Since(start) > bootLimit {
			d.retryAfter(err)
			return status, e
		}
	}
}

// temporary reports whether a failure may pass soon: another program holds a lock.
func temporary(err error) bool {
	var t interface{ Temporary() bool }
	return errors.As(err, &t) && t.Temporary()
}

// hold replaces a state that cannot be read by the failsafe state, until one can be read.
func (d *Daemon) hold(cause error) {
	st, err := d.Failsafe(cause)
	if err == nil {
		err = d.Store.Hold(st)
	}
	if err != nil {
		d.Log.WithError(err).Error("the failsafe state could not be recorded")
	}
	if err := d.Store.SetAside(); err != nil {
		d.Log.WithError(err).Warn("the unreadable state could not be set aside")
	}
}

// enforce repairs the drift in r, or at least that of the rules.
func (d *Daemon) enforce(ctx context.Context, r verify.Report) (string, error) {
	for _, drift := range r.Inspection.Drift {
		d.Log.WithField("drift", drift.String()).Debug("the kernel differs")
	}
	var failed error
	if len(r.Drift) > 0 {
		_, failed = d.Repair(ctx, r)
	} else {
		failed = d.SaveVerified(r)
	}
	msg := fmt.Sprintf("protected by profile %s; differences repaired: %d", r.State.Profile.Name, len(r.Drift))
	if r.State.Failsafe != "" {
		msg = "closed by the failsafe rules: " + r.State.Failsafe
	}
	if failed == nil {
		d.Log.Info(msg)
		return msg, nil
	}
	if temporary(failed) {
		return "", failed
	}
	// Load the rules alone: a full or broken disk must not prevent that. The programs are
	// tried a second time before the backend is changed.
	in, err := d.Backend(r.Wanted().Backend.Name).Inspect(ctx, r.Wanted().Ruleset)
	if err == nil {
		r.Inspection = in
		err = d.LoadRules(ctx, r)
	}
	if err != nil {
		d.Log.WithError(err).Debug("loading only the rules failed too")
		if fell, err := d.fallBack(ctx, failed); err != nil {
			return "", err
		} else if fell {
			d.Log.Info(msg)
			return msg, nil
		}
		return "", failed
	}
	d.Log.WithError(failed).Error("the rules are loaded, but the persisted rules, the state or the service could not be repaired")
	return fmt.Sprintf("protected by profile %s, but %v", r.State.Profile.Name, failed), nil
}

// verifyOrFallBack is Verify, but changes the backend if the rules cannot be read with
// the present one twice. A program that hangs is not run again: the boot waits for it.
func (d *Daemon) verifyOrFallBack(ctx context.Context) (verify.Report, error) {
	r, err := d.Verify(ctx, d.Ports)
	if err != nil && !temporary(err) && !errors.Is(err, context.DeadlineExceeded) {
		r, err = d.Verify(ctx, d.Ports)
	}
	fell, failed := d.fallBack(ctx, err)
	switch {
	case !fell:
		return r, err
	case failed != nil:
		return r, failed
	}
	return d.Verify(ctx, d.Ports)
}

// fallBack permanently moves the rules of the desired state to the other backend, if
// [backend.Fallback] returns one after cause.
func (d *Daemon) fallBack(ctx context.Context, cause error) (fell bool, err error) {
	st, err := d.Store.Load()
	if err != nil {
		return false, nil
	}
	choice, ok := backend.Fallback(backend.Choice{Name: st.Backend.Name}, st.BackendDetected(), cause)
	if !ok {
		return false, nil
	}
	other := st.At(d.Moment())
	other.Backend.Name, other.Backend.Reason = choice.Name, choice.Reason
	d.Log.Warn(choice.Reason + ": loading the rules into nftables instead")
	if _, err := d.ApplyOrHold(ctx, other, apply.Options{}); err != nil {
		return true, fmt.Errorf("%w; nftables failed too: %w", cause, err)
	}
	return true, nil
}

// restoreState restores a lost or unreadable state from its copy. Even after an error,
// the copy is used.
func (d *Daemon) restoreState() error {
	restored, err := d.Store.Restore()
	if restored {
		d.Log.Warnf("%s was lost or unreadable and has been restored from %s", store.StateFile, store.CopyFile)
	}
	if err != nil {
		return fmt.Errorf("restoring %s: %w", store.StateFile, err)
	}
	return nil
}

// tryLock takes the lock, or gives up after lockWait.
func (d *Daemon) tryLock(ctx context.Context) (unlock func(), locked bool) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	unlock, err := d.Store.Lock(ctx, "run")
	if err != nil {
		d.Log.WithError(err).Warn("continuing without the lock")
		return func() {}, false
	}
	return unlock, true
}

// close closes a machine that could not be verified or repaired because of cause. It
// uses the previous rules if they still close the machine, otherwise the guard, the
// rules of the state alone, or the failsafe rules. It saves nothing.
func (d *Daemon) close(ctx context.Context, cause error) (string, error) {
	closed := func(by string) (string, error) {
		msg := fmt.Sprintf("%s, but %v", by, cause)
		d.Log.Warn(msg)
		return msg, nil
	}
	st, err := d.Store.Load()
	if err != nil {
		return "", errors.Join(cause, err)
	}
	rules := st.At(d.Moment()).Ruleset
	in, err := d.Backend(st.Backend.Name).Inspect(ctx, rules)
	if err == nil && in.Present && len(in.Exposed)+len(in.LockedOut) == 0 {
		return closed("closed by the previous rules")
	}
	d.Adopt()
	if temporary(cause) {
		if err := d.Guard.Raise(rules, d.Families); err != nil {
			return "", errors.Join(cause, err)
		}
		return closed("closed by table " + apply.GuardTable + ", without rate limits")
	}
	if err != nil {
		return "", errors.Join(cause, err)
	}
	if err = in.Snapshot.Load(ctx, rules, false); err == nil {
		return closed("protected by profile " + st.Profile.Name)
	}
	d.Log.WithError(err).Error("the rules of the desired state could not be loaded")
	if st, err = d.Failsafe(cause); err != nil {
		return "", err
	}
	if err := in.Snapshot.Load(ctx, st.Ruleset, false); err != nil {
		return "", fmt.Errorf("loading the failsafe rules: %w", err)
	}
	return closed("closed by the failsafe rules")
}

// raiseGuard raises the guard on a machine where no backend works, until the rules can
// be loaded. It returns cause.
func (d *Daemon) raiseGuard(cause error) error {
	st, err := d.Store.Load()
	if err != nil {
		st, err = d.Failsafe(cause)
	}
	if err == nil {
		d.Adopt()
		err = d.Guard.Raise(st.At(d.Moment()).Ruleset, d.Families)
	}
	if err != nil {
		return fmt.Errorf("%w; raising the guard failed too: %w", cause, err)
	}
	d.Log.Errorf("only the nftables table %s closes this machine, without rate limits, until iptables works and \"basicfw-agent verify --repair\" succeeds", apply.GuardTable)
	return cause
}

// rescue unlocks the machine if the rescue file or the kernel parameter requests it, even if
// the files on the disk are unreadable. It changes only the state; boot then loads its rules.
func (d *Daemon) rescue() error {
	st, err := d.Store.Load()
	if err != nil {
		return err
	}
	parameter := lease.RescueParameter(d.CommandLine)
	text, file, err := d.rescueFile()
	if err == nil && file {
		// Remove it first: a file that stays would unlock at every boot.
		err = d.System.Remove(lease.RescueFile)
	}
	if err != nil {
		d.Log.WithError(err).Error("the rescue file has no effect")
		file = false
	}
	why := lease.RescueFile
	switch {
	case file:
	case parameter == st.RescueArgument:
		return nil // not requested, or already done
	default:
		text, why = parameter, "the kernel parameter "+system.Printable(parameter)
	}
	e := lease.Rescue{Parameter: parameter}
	if file || parameter != "" {
		if e.Length, err = lease.RescueLength(text); err != nil {
			d.Log.WithError(err).Warnf("%s has no valid duration; using %s", why, firewall.FormatDuration(e.Length))
		}
		d.Log.Warnf("unlocked for %s, by %s: SSH is open to any address, limited", firewall.FormatDuration(e.Length), why)
	}
	l, err := lease.Lease{State: st}.Next(e, d.Moment())
	if err != nil {
		return err
	}
	if err = d.Store.Save(l.State); err != nil && e.Length > 0 {
		d.Log.WithError(err).Warn("the unlock ends at a reboot: it could not be saved")
		err = d.Store.Hold(l.State)
	}
	return err
}

// rescueFile returns the text of the rescue file, if there is one. A file that a user
// other than root may have written is an error.
func (d *Daemon) rescueFile() (text string, there bool, err error) {
	fi, err := d.System.Lstat(lease.RescueFile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", false, nil
	}
	if err == nil {
		err = system.CheckOwner(fi)
	}
	if err != nil {
		return "", false, fmt.Errorf("%s: %w", lease.RescueFile, err)
	}
	data, err := d.System.ReadLimited(lease.RescueFile, 4096)
	return string(data), true, err
}

const prepareLimit = 30 * time.Second // the boot waits for Prepare

// Prepare does what the service's sandbox forbids, before the service is started: it
// loads kernel modules (by tables), sizes the conntrack table, and creates directories.
func Prepare(ctx context.Context, a *apply.Applier, tables func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, prepareLimit)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		a.Store.UseCopy()
		_, err := a.Conntrack.Grow(ctx)
		if st, e := a.Store.Load(); e != nil || st.Backend.Name != backend.Nftables {
			e := tables(ctx)
			if err = errors.Join(err, e); e != nil { // the rules may need the other backend
				err = errors.Join(err, a.System.MkdirAll(filepath.Dir(apply.TableFile), 0o755))
			}
		}
		done <- errors.Join(err, a.Store.MakeDirs())
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		// A process that is blocked in the kernel cannot even be killed.
		return fmt.Errorf("preparing the kernel took more than %s; continuing without it", firewall.FormatDuration(prepareLimit))
	}
}
