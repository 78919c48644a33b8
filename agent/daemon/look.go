package daemon

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/lease"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/verify"
)

// errBusy reports that a command holds the lock.
var errBusy = errors.New("waiting for the lock")

// check compares the machine with its desired state, repairs drift, and follows what
// changed since the rules were made. changed is set if the status has changed. An
// error in one step does not prevent the others, least of all the repair of the rules.
func (d *Daemon) check(ctx context.Context) (changed bool, err error) {
	if !d.Store.Known() {
		return false, nil // uninstalled: there is nothing to protect
	}
	lockCtx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	unlock, err := d.Store.Lock(lockCtx, "run")
	switch {
	case err == nil:
		defer unlock()
	case lockCtx.Err() != nil:
		d.waits++
		return d.withoutLock(ctx, fmt.Errorf("%w: %w", errBusy, err))
	}
	d.waits = 0
	errs := []error{err}
	defer func() { err = errors.Join(append(errs, err)...) }()
	errs = append(errs, d.restoreState())
	expired, err := d.Expire(ctx)
	errs = append(errs, err)
	r, err := d.verify(ctx)
	switch {
	case errors.Is(err, store.ErrNone):
		return expired, nil
	case err != nil:
		changed, err = d.unreadable(ctx, err)
		return changed || expired, err
	}
	f, err := d.follow(ctx, r)
	errs = append(errs, err)
	changed, err = d.repair(ctx, r, f)
	d.seen = fingerprint(r, f.interfaces)
	if errors.Join(append(errs, err)...) == nil && len(r.Drift) == 0 {
		d.note(d.now())
		if !r.State.Held {
			err = d.Store.SyncCopy()
		}
	}
	return changed || expired, err
}

// maxWaits is the number of checks, each of lockWait, for which a command may hold the lock. The
// three minutes are more than any change needs. A suspended command would hold the lock forever.
const maxWaits = int(3 * time.Minute / lockWait)

// withoutLock returns cause, the error of taking the lock. If the lock stays
// unavailable, and the live rules expose the machine or lock the administrator out,
// it loads the desired rules without the lock.
func (d *Daemon) withoutLock(ctx context.Context, cause error) (changed bool, err error) {
	if d.waits < maxWaits {
		return false, cause
	}
	r, err := d.Verify(ctx, d.Ports)
	if err != nil {
		return false, errors.Join(cause, err)
	}
	in := r.Inspection
	if len(in.Exposed)+len(in.LockedOut) == 0 || !d.repairs("rules", in.Drift, d.now()) {
		return false, cause
	}
	d.Log.WithError(cause).Warn("repairing the rules without the lock")
	return true, errors.Join(cause, d.repairRules(ctx, r))
}

// verify compares the machine with its desired state. Unlike other failures, missing
// iptables programs and tables that they cannot print are permanent and change the backend.
func (d *Daemon) verify(ctx context.Context) (verify.Report, error) {
	if _, err := d.System.LookPath("iptables-save"); err != nil {
		return d.verifyOrFallBack(ctx)
	}
	r, err := d.Verify(ctx, d.Ports)
	if backend.Permanent(err) {
		return d.verifyOrFallBack(ctx)
	}
	return r, err
}

// followed is the desired state adapted to changes of the machine.
type followed struct {
	next       store.State
	interfaces []firewall.Interface
	changed    bool // the rules differ
	zones      bool // the zones that the state keeps differ
	lists      bool // lists in files differ
	expired    bool // something temporary has expired
	retimed    bool // the clock was set, so the times of rules differ
	timers     []firewall.Timer
	opened     bool // a probation has expired, which opens SSH
}

// follow adapts the desired state to the machine's interfaces, instance and time.
// While a change is pending it follows nothing: that would be another change. What
// cannot be followed is left unchanged, and the error is the reason.
func (d *Daemon) follow(ctx context.Context, r verify.Report) (f followed, err error) {
	f.next = r.State
	zoned := r.Wanted()
	links, err := d.Interfaces()
	if err == nil { // otherwise they are left unchanged
		zoned = zoned.Zoned(links, d.Named)
	}
	f.interfaces = zoned.Desired.Interfaces
	if r.Pending != nil {
		return f, err
	}
	st := r.State.Retimed(d.Moment())
	next := r.State.Settled(d.Moment())
	f.timers = st.Desired.Timers
	f.retimed = !reflect.DeepEqual(st.Desired, r.State.Desired)
	f.expired = !reflect.DeepEqual(next.Desired, st.Desired)
	was, e := firewall.Compile(next.Desired)
	if e != nil {
		return f, errors.Join(err, e)
	}
	detected := next.Client.Source == "session" || lease.Detected(next) // not named by the administrator
	if id := d.Instance(); id != "" && st.InstanceID != "" && id != st.InstanceID && detected && next.Desired.SSH.Mode == firewall.SSHPinned {
		next.Desired.SSH.Mode, next.Desired.SSH.Probation = firewall.SSHLimited, nil
		if next.Desired.SSH.Limit.IsZero() {
			next.Desired.SSH.Limit = firewall.Failsafe(nil).SSH.Limit
		}
		next.Client.Source = "clone"
		next.Client.Reason = fmt.Sprintf("this is a clone of instance %q, which may have another owner; \"basicfw-agent bootstrap\" detects the client again", st.InstanceID)
	}
	next, f.lists = d.followLists(next)
	next.Desired.Interfaces, next.Named, next.Zones = f.interfaces, zoned.Named, zoned.Zones
	if d.Blocks != nil {
		next.Desired.Blocks = d.Blocks(next.Desired)
	}
	if next.Desired.Published == firewall.PublishedProfile {
		next.Desired.Direct = d.ContainerPorts(ctx, f.interfaces, &st)
	}
	f.zones = err == nil && (!reflect.DeepEqual(next.Zones, st.Zones) || st.Named == nil)
	// Compile both with this version, so that an upgrade alone changes no rule.
	rules, e := firewall.Compile(next.Desired)
	if e != nil {
		return f, errors.Join(err, e)
	}
	p := st.Desired.SSH.Probation
	f.opened = p != nil && next.Client.Source == store.Unconfirmed
	if f.changed = f.opened && p.NoRule || !was.Equal(rules); f.changed {
		next.Ruleset = rules
	}
	f.next = next
	return f, err
}

// repair repairs drift, unless repairs of its part are paused, and applies f.
func (d *Daemon) repair(ctx context.Context, r verify.Report, f followed) (changed bool, err error) {
	now := d.now()
	if len(r.Inspection.Drift) > 0 && d.repairs("rules", r.Inspection.Drift, now) || r.Moved {
		if err := d.repairRules(ctx, r); err != nil {
			return true, err
		}
		if changed = true; !r.Moved {
			d.count("rules")
		}
	}
	if r.Pending != nil {
		// The files are repaired when it is confirmed or rolled back.
		return changed, nil
	}
	files := len(r.Files) > 0 && d.repairs("persisted files", r.Files, now)
	if files && !r.Moved {
		d.list("another program changed a persisted file; writing it again", r.Files)
	}
	if more := len(r.Guard) > 0 || r.Moved || f.changed || f.zones || f.lists || f.expired || f.retimed; files || more {
		if err := d.applyFollowed(ctx, f, !more); err != nil {
			if files {
				d.postpone("persisted files", err)
			}
			return changed, err
		}
		if changed = true; files && !r.Moved {
			d.count("files")
		}
	}
	if len(r.Unit) > 0 && d.repairs("service's registration", r.Unit, now) {
		d.list("the service was unregistered; registering it again", r.Unit)
		if _, err := d.Apply(ctx, f.next, apply.Options{Service: true}); err != nil {
			d.postpone("service's registration", err)
			return changed, fmt.Errorf("registering the service again: %w", err)
		}
		changed = true
		d.count("service")
	}
	d.calm(r, now)
	return changed, nil
}

// repairRules loads only the rules: a full disk must not prevent that.
func (d *Daemon) repairRules(ctx context.Context, r verify.Report) error {
	flushed := strings.Join(r.Flushed(), " and ")
	switch {
	case r.Moved:
		d.Log.WithField("ports", r.Wanted().Desired.SSH.Ports).Info("sshd listens on other ports; updating the rules")
	case flushed != "":
		d.Log.Warnf("another program flushed the %s rules; loading them again", flushed)
	default:
		d.list("another program changed the rules; repairing them", r.Inspection.Drift)
	}
	if err := d.LoadRules(ctx, r); err != nil {
		return fmt.Errorf("repairing the rules: %w", err)
	}
	if flushed != "" {
		// Most likely a locked-out administrator did this at a console.
		d.say(fmt.Sprintf("basicfw: the %s rules were flushed and have been restored. %s", flushed, report.WayIn), true)
	}
	return nil
}

// applyFollowed applies f. filesOnly is set if only persisted files differ.
func (d *Daemon) applyFollowed(ctx context.Context, f followed, filesOnly bool) error {
	if f.changed && !f.lists {
		d.Log.WithField("client", f.next.Client.Source).Info("this machine has changed; updating the rules")
	}
	var options apply.Options
	if f.retimed {
		d.Log.Info("the clock was set; updating the times in the rules")
	}
	if f.expired {
		if f.opened {
			d.Log.Warn("SSH is open to any address, limited: " + f.next.Client.Why())
		}
		d.Log.Info("removing temporary rules that have expired")
		change, err := d.Prune(f.timers)
		if err != nil {
			d.Log.WithError(err).Warn("expired entries stay in the settings, without effect")
		} else if change != nil {
			options.Files = append(options.Files, *change)
		}
	}
	f.next.Held = f.next.Held && f.next.Failsafe != "" // save it
	change := d.ApplyOrHold
	if filesOnly {
		change = d.Apply
	}
	_, err := change(ctx, f.next, options)
	return err
}

// repairs reports whether a part is to be repaired now.
func (d *Daemon) repairs(part string, drift []firewall.Drift, now time.Time) bool {
	b := d.backoffs()[part]
	repair, paused := b.drifted(now)
	if paused {
		d.list(fmt.Sprintf("another program keeps modifying the %s; next repair in %s", part, firewall.FormatDuration(b.pause)), drift)
		d.note(time.Time{})
		d.urgent = true
	}
	return repair
}

// postpone delays the next repair of a part after a failure. Repairs of the rules are not
// delayed: another program may just be changing them.
func (d *Daemon) postpone(part string, err error) {
	b := d.backoffs()[part]
	b.startPause(d.now())
	d.Log.WithError(err).Warnf("the %s could not be repaired; next attempt in %s", part, firewall.FormatDuration(b.pause))
	d.note(time.Time{})
}

// calm ends the backoff of parts without drift.
func (d *Daemon) calm(r verify.Report, now time.Time) {
	for _, part := range []struct {
		name  string
		drift []firewall.Drift
	}{{"rules", r.Inspection.Drift}, {"persisted files", r.Files}, {"service's registration", r.Unit}} {
		if len(part.drift) == 0 && d.backoffs()[part.name].quiet(now) {
			d.Log.Infof("repairs of the %s are no longer paused", part.name)
		}
	}
}

// maxListed is the maximum number of differences that are logged one by one.
const maxListed = 10

// list logs drift, one line each.
func (d *Daemon) list(what string, drift []firewall.Drift) {
	d.Log.Warn(what)
	for i, x := range drift {
		if i == maxListed {
			d.Log.Warnf("and %d more differences", len(drift)-i)
			break
		}
		d.Log.WithField("drift", system.Printable(x.String())).Warn("difference")
	}
}

// unreadable handles a machine that cannot be verified because of cause. If the state
// is unreadable and the machine is not closed, it loads the failsafe rules until a
// state is readable.
func (d *Daemon) unreadable(ctx context.Context, cause error) (changed bool, err error) {
	if _, err := d.Store.Load(); err == nil {
		return false, cause // the state is readable
	}
	_, in, err := d.Find(ctx)
	if err != nil {
		return false, errors.Join(cause, err)
	}
	if len(in.Exposed)+len(in.LockedOut) == 0 || !d.repairs("rules", in.Drift, d.now()) {
		return false, cause
	}
	d.hold(cause)
	r, err := d.Verify(ctx, d.Ports)
	if err == nil {
		err = d.LoadRules(ctx, r)
	}
	return true, errors.Join(cause, err)
}

// proveEvery is how often logins are checked while a client is on probation. A check
// takes a few milliseconds.
const proveEvery = 2 * time.Second

// prove confirms the client after an interactive login from there: a shell at a terminal.
// A terminal alone is not enough, since some programs request one.
func (d *Daemon) prove(ctx context.Context) (proved bool) {
	st, err := d.Store.Load()
	if err != nil || st.At(d.Moment()).Desired.SSH.Probation == nil {
		return false
	}
	shells, err := d.Shells()
	if err != nil {
		d.Log.WithError(err).Debug("the SSH sessions could not be read")
		return false
	}
	i := slices.IndexFunc(shells, func(s host.Session) bool { return s.Began > 0 && lease.Proves(s, st, d.Moment()) })
	if i < 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	unlock, err := d.Store.Lock(ctx, "run")
	if err != nil {
		return false // another change is in progress; the session is likely to last
	}
	defer unlock()
	// A pending change must be confirmed or rolled back first.
	if p, err := d.Pending(); err != nil || p != nil {
		return false
	}
	if now, err := d.Store.Load(); err != nil || !reflect.DeepEqual(now.Client, st.Client) {
		return false
	}
	if _, _, err := d.Change(ctx, lease.ConfirmClient{By: "a new login from there"}); err != nil {
		d.fail(err)
		return false
	}
	d.Log.Info("SSH stays pinned to the detected client: " + shells[i].Reason)
	return true
}

// If repairs are undone, backoffRepairs are made within backoffWithin, and then one after
// each pause. Each pause is twice the previous one.
const (
	backoffRepairs = 5
	backoffWithin  = time.Minute
	backoffFirst   = 10 * time.Second
	backoffLongest = 10 * time.Minute
	backoffOver    = time.Minute // without drift and without a pause
)

// backoff limits repeated repairs of the same part. The zero value is no limit.
type backoff struct {
	repairs []time.Time   // of the last minute
	pause   time.Duration // length of the last pause; zero if there was none
	until   time.Time     // when it ends
	tried   bool          // there was a repair since
	last    time.Time     // when drift was last found
}

// drifted reports whether drift that was found at now is to be repaired. After too many
// repairs it begins a pause.
func (b *backoff) drifted(now time.Time) (repair, paused bool) {
	b.last = now
	if now.Before(b.until) {
		return false, false
	}
	for len(b.repairs) > 0 && now.Sub(b.repairs[0]) >= backoffWithin {
		b.repairs = b.repairs[1:]
	}
	if b.pause == 0 && len(b.repairs) >= backoffRepairs || b.tried {
		b.startPause(now)
		return false, true
	}
	b.tried = b.pause > 0
	b.repairs = append(b.repairs, now)
	return true, false
}

// startPause begins a pause.
func (b *backoff) startPause(now time.Time) {
	b.pause = min(max(2*b.pause, backoffFirst), backoffLongest)
	b.until, b.tried = now.Add(b.pause), false
}

// quiet records that there was no drift and reports whether that ends the backoff.
func (b *backoff) quiet(now time.Time) (over bool) {
	if b.pause == 0 || now.Sub(b.last) < backoffOver || now.Sub(b.until) < backoffOver {
		return false
	}
	*b = backoff{}
	return true
}

// paused reports whether repairs are paused.
func (b *backoff) paused(now time.Time) bool { return now.Before(b.until) }
