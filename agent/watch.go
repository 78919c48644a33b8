package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// When news are looked at: once there were none for a while, for they come in
// bursts, and our own are among them; but not later than a limit, which is
// longer while somebody fights us.
const (
	settleQuiet = 250 * time.Millisecond
	settleLimit = time.Second
	fightLimit  = 10 * time.Second
)

// settling is news that were not looked at yet; zero is none.
type settling struct{ first, last time.Time }

func (s *settling) news(now time.Time) {
	if s.last = now; s.first.IsZero() {
		s.first = now
	}
}

// due is when to look; zero is not yet known to be needed.
func (s settling) due(limit time.Duration) time.Time {
	if s.first.IsZero() {
		return time.Time{}
	}
	return earliest(s.last.Add(settleQuiet), s.first.Add(limit))
}

// earliest is the first of some times; zero ones are none.
func earliest(times ...time.Time) (first time.Time) {
	for _, t := range times {
		if !t.IsZero() && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	return first
}

// watcher is the service at work: it sees to it that the machine is, and stays,
// as it was decided.
type watcher struct {
	*Agent
	RunOptions
	// A file that cannot be written must not keep the rules from being repaired.
	rules, files, unit fight

	seen      string // what the last look found
	shown     string // what the last published status was made from
	urgent    bool   // it has to be published soon
	published time.Time
	issue     string // what agetty shows
	said      bool   // in this boot, on the serial consoles
	busy      bool   // a command held the lock
	failed    string // the last failure, as it was logged
	failedAt  time.Time
}

// fights lists them, with what each is about.
func (w *watcher) fights() map[string]*fight {
	return map[string]*fight{"rules": &w.rules, "persisted files": &w.files, "service's registration": &w.unit}
}

// errBusy says that a command holds the lock.
var errBusy = errors.New("another change is under way")

// look compares the machine with what was decided, repairs what differs, and
// follows what changed on the machine since the rules were made. With changed
// the status is another.
func (w *watcher) look(ctx context.Context) (changed bool, err error) {
	if !w.System.Exists(store.StateFile) {
		return false, nil // uninstalled: there is nothing to guard
	}
	lockCtx, cancel := context.WithTimeout(ctx, bootLockWait)
	defer cancel()
	unlock, err := w.Store.Lock(lockCtx, "run")
	if err != nil {
		if lockCtx.Err() != nil {
			err = fmt.Errorf("%w: %w", errBusy, err)
		}
		return false, err
	}
	defer unlock()
	if expired, err := w.expire(ctx); expired || err != nil {
		return expired, err
	}
	verify := w.Verify
	if _, err := w.System.LookPath("iptables-save"); err != nil { // for good, unlike a failure
		verify = w.verifyOr
	}
	r, err := verify(ctx, w.Ports)
	switch {
	case errors.Is(err, store.ErrNone):
		return false, nil
	case err != nil:
		return w.unreadable(ctx, err)
	}
	f, err := w.follow(r)
	if err != nil {
		return false, err
	}
	changed, err = w.mend(ctx, r, f)
	w.seen = r.found(f.interfaces)
	if err == nil && len(r.Drift) == 0 {
		w.note(w.Now())
	}
	return changed, err
}

// followed is what becomes of what was decided by what changed on the machine.
type followed struct {
	next       store.State
	interfaces []firewall.Interface
	new        bool // in its rules
	// ended is set where something that was to last for a while is over, and
	// opened where that was a client's probation.
	ended, opened bool
}

// follow finds what the machine's interfaces, its instance and the time make of
// what was decided. While a change waits for a confirmation nothing is followed:
// that would be another change.
func (w *watcher) follow(r Report) (f followed, err error) {
	if f.interfaces, err = w.Look(); err != nil {
		return f, err
	}
	if f.next = r.State; r.Pending != nil {
		return f, nil
	}
	st, next := r.State, r.State.At(w.Moment())
	f.ended = !reflect.DeepEqual(next.Desired, st.Desired)
	was, err := firewall.Compile(next.Desired)
	if err != nil {
		return f, err
	}
	if id := w.Instance(); id != "" && st.InstanceID != "" && id != st.InstanceID && next.Desired.SSH.Mode == firewall.SSHPinned {
		next.Desired.SSH.Mode, next.Desired.SSH.Probation = firewall.SSHLimited, nil
		if next.Desired.SSH.Limit.IsZero() {
			next.Desired.SSH.Limit = firewall.Failsafe(nil).SSH.Limit
		}
		next.Client.Source = "clone"
		next.Client.Reason = fmt.Sprintf("this is a clone of instance %q, whose owner may be another: \"basicfw-agent bootstrap\" decides anew", st.InstanceID)
	}
	next.Desired.Interfaces = f.interfaces
	// Both by this program, so that an upgrade alone changes no rule.
	rules, err := firewall.Compile(next.Desired)
	if err != nil {
		return f, err
	}
	p := st.Desired.SSH.Probation
	f.opened = p != nil && next.Client.Source == store.Unconfirmed
	if f.new = f.opened && p.NoRule || !was.Equal(rules); f.new {
		next.Ruleset = rules
	}
	f.next = next
	return f, nil
}

// mend repairs what differs from what was decided, each part unless it is
// fought over, and makes the machine what it has to become.
func (w *watcher) mend(ctx context.Context, r Report, f followed) (changed bool, err error) {
	now := w.Now()
	if len(r.Inspection.Drift) > 0 && w.repairs("rules", r.Inspection.Drift, now) || r.moved {
		// By themselves: a full disk must not keep them out.
		if r.moved {
			w.Log.WithField("ports", r.wantedPorts()).Info("sshd is on other ports, and the rules follow")
		} else {
			w.tell(r)
		}
		if err := w.load(ctx, r); err != nil {
			return true, fmt.Errorf("repairing the rules: %w", err)
		}
		changed = true
		if gone := r.flushed(); len(gone) > 0 {
			// Most likely by somebody who is shut out, and stands there.
			w.say(fmt.Sprintf("basicfw: the %s rules were flushed, and are back. %s", strings.Join(gone, " and "), wayIn), true)
		}
	}
	if r.Pending != nil {
		// The files have their turn when it is confirmed or taken back.
		return changed, nil
	}
	files := len(r.files) > 0 && w.repairs("persisted files", r.files, now)
	if files && !r.moved {
		w.list("a persisted file was changed by others, and is written again", r.files)
	}
	if files || len(r.guard) > 0 || r.moved || f.new || f.ended {
		if err := w.become(ctx, f); err != nil {
			if files {
				w.rest("persisted files", err)
			}
			return changed, err
		}
		changed = true
	}
	if len(r.unit) > 0 && w.repairs("service's registration", r.unit, now) {
		w.list("the service was taken out of the service manager's books by others, and is registered again", r.unit)
		if _, err := w.Converge(ctx, f.next, Options{Service: true}); err != nil {
			w.rest("service's registration", err)
			return changed, fmt.Errorf("registering the service again: %w", err)
		}
		changed = true
	}
	w.calm(r, now)
	return changed, nil
}

// become makes the machine what f says.
func (w *watcher) become(ctx context.Context, f followed) error {
	if f.new {
		w.Log.WithField("client", f.next.Client.Source).Info("the rules follow what changed on this machine")
	}
	var options Options
	if f.ended {
		if f.opened {
			w.Log.Warn("SSH is open to any address, limited: " + f.next.Client.Why())
		}
		w.Log.Info("what was to end by now has ended")
		change, err := w.Prune()
		if err != nil {
			w.Log.WithError(err).Warn("it stays in the settings, where it has no effect any more")
		} else if change != nil {
			options.Files = append(options.Files, *change)
		}
	}
	_, err := w.Converge(ctx, f.next, options)
	return err
}

// repairs tells whether a part is to be repaired now.
func (w *watcher) repairs(part string, drift []firewall.Drift, now time.Time) bool {
	f := w.fights()[part]
	repair, paused := f.drifted(now)
	if paused {
		w.list(fmt.Sprintf("repairs of the %s do not last: the next one is in %v", part, f.pause), drift)
		w.note(time.Time{})
		w.urgent = true
	}
	return repair
}

// rest puts off the next repair of a part that could not be repaired. The rules
// are not put off by the first failure: it may be of what somebody does to them
// at that moment.
func (w *watcher) rest(part string, err error) {
	f := w.fights()[part]
	f.rest(w.Now())
	w.Log.WithError(err).Warnf("the %s cannot be repaired: the next try is in %v", part, f.pause)
	w.note(time.Time{})
}

// calm ends fights over what was found as it should be.
func (w *watcher) calm(r Report, now time.Time) {
	for _, part := range []struct {
		name  string
		drift []firewall.Drift
	}{{"rules", r.Inspection.Drift}, {"persisted files", r.files}, {"service's registration", r.unit}} {
		if len(part.drift) == 0 && w.fights()[part.name].quiet(now) {
			w.Log.Infof("repairs of the %s last again", part.name)
		}
	}
}

// maxListed is how many differences are logged one by one.
const maxListed = 10

// list logs differences, a line each.
func (w *watcher) list(what string, drift []firewall.Drift) {
	w.Log.Warn(what)
	for i, d := range drift {
		if i == maxListed {
			w.Log.Warnf("and %d more", len(drift)-i)
			break
		}
		w.Log.WithField("drift", system.Printable(d.String())).Warn("different")
	}
}

// tell logs what is repaired in the kernel.
func (w *watcher) tell(r Report) {
	if gone := r.flushed(); len(gone) > 0 {
		w.Log.Warnf("the %s rules were flushed by others, and are put back", strings.Join(gone, " and "))
		return
	}
	w.list("the rules were changed by others, and are repaired", r.Inspection.Drift)
}

// greet says on the serial consoles, once a boot, what agetty shows there: whoever
// reads their log, or is at a prompt from before bootstrap, finds it too.
func (w *watcher) greet() {
	if w.said || w.issue == "" {
		return
	}
	w.said = true
	w.note(time.Time{})
	w.say(strings.TrimSpace(w.issue), false)
}

// say tells the consoles. That it cannot is of no consequence.
func (w *watcher) say(text string, shown bool) {
	if w.Say == nil {
		return
	}
	if err := w.Say(text, shown); err != nil {
		w.Log.WithError(err).Info("not all consoles can be told")
	}
}

// unreadable is what becomes of a machine whose state cannot be read while it
// runs: as at boot, it is closed by what there is, if it is not closed.
func (w *watcher) unreadable(ctx context.Context, cause error) (changed bool, err error) {
	if _, err := w.Store.Load(); err == nil {
		return false, cause // it was something else
	}
	_, in, err := w.find(ctx)
	if err != nil {
		return false, errors.Join(cause, err)
	}
	if len(in.Open)+len(in.Shut) == 0 {
		return false, cause
	}
	if !w.repairs("rules", in.Drift, w.Now()) {
		return false, cause
	}
	_, err = w.fallBack(ctx, w.RunOptions, cause)
	return true, errors.Join(cause, err)
}

// fail logs a failure once, and again each hour as long as it lasts.
func (w *watcher) fail(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && (text != w.failed || w.Now().Sub(w.failedAt) >= time.Hour) {
		w.Log.WithError(err).Error("the machine is not as it was decided, and that could not be mended")
		w.failedAt = w.Now()
	}
	w.failed = text
}

// watchFile is what the service tells the other runs of the program. It is in
// memory, and goes with the boot.
const watchFile = store.RunDir + "/watch.json"

// watchNote is what is in it.
type watchNote struct {
	Verified time.Time     `json:"verified"` // all was as decided
	Pauses   []pausedFight `json:"pauses,omitempty"`
	Said     bool          `json:"said,omitempty"` // on the consoles, who may come in
}

// pausedFight is something that is not repaired for a while, because somebody
// else undoes it.
type pausedFight struct {
	What  string    `json:"what"`
	Until time.Time `json:"until"`
}

func (p pausedFight) String() string {
	return fmt.Sprintf("repairs of the %s fail or do not last: the next one is at %s", p.What, firewall.FormatTime(p.Until))
}

// note writes the note; a zero time leaves the former.
func (w *watcher) note(verified time.Time) {
	n := watchNote{Verified: verified, Said: w.said}
	if verified.IsZero() {
		n.Verified = w.loadNote().Verified
	}
	for what, f := range w.fights() {
		if f.paused(w.Now()) {
			n.Pauses = append(n.Pauses, pausedFight{what, f.until.Round(0)})
		}
	}
	slices.SortFunc(n.Pauses, func(a, b pausedFight) int { return strings.Compare(a.What, b.What) })
	data, err := json.Marshal(n)
	if err == nil {
		err = w.put(Change{Path: watchFile, Data: append(data, '\n'), Mode: 0o600})
	}
	if err != nil {
		w.Log.WithError(err).Debug("other runs do not learn what the service found")
	}
}

// loadNote reads the note; what cannot be read is none.
func (a *Agent) loadNote() (n watchNote) {
	fi, err := a.System.Lstat(watchFile)
	if err != nil || system.CheckOwner(fi) != nil {
		return n
	}
	data, err := a.System.ReadLimited(watchFile, 1<<16)
	if err != nil || json.Unmarshal(data, &n) != nil {
		return watchNote{}
	}
	n.Pauses = slices.DeleteFunc(n.Pauses, func(p pausedFight) bool { return !a.Now().Before(p.Until) })
	return n
}
