// Package daemon is the service: it loads the rules at boot, and from then on repairs
// drift and follows changes of the machine.
package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/lease"
	"github.com/basicfw/basicfw-agent/agent/motd"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/verify"
)

// Options are the sources and callbacks of the daemon.
type Options struct {
	Interfaces func() ([]firewall.Interface, error) // as detected
	Named      host.Naming                          // by the settings, for a state of a version that did not record it
	// Blocks returns the lists of blocked networks with the present content of their files.
	Blocks func(firewall.Desired) []firewall.Block
	// ReadList reads a file of addresses: SSH sources, or those of services.
	ReadList    func(path string, ssh bool) ([]netip.Prefix, error)
	Instance    func() string // cloud-init's instance-id, "" if not known yet
	CommandLine string        // the kernel's
	// Prune returns the settings that commands wrote without expired entries; nil if
	// there are none.
	Prune func(timers []firewall.Timer) (*files.Change, error)
	Ready func(status string) // called once the rules are loaded, with a text for the service manager
	// Watch starts to call notify, which does not block, for every event that may mean
	// drift, until the context ends.
	Watch func(ctx context.Context, notify func())
	// Shells returns the SSH sessions, at a terminal, of users who may become root.
	Shells func() ([]host.Session, error)
	// Say, if set, writes a line to the serial consoles and, if shown, to the screen.
	Say    func(text string, shown bool) error
	Every  time.Duration                                   // how often the machine is checked without an event
	Gather func(ctx context.Context) (report.Input, error) // reads all that the status is made from
	// Dropped reads the counters of our rules that drop, in nftables or in iptables.
	Dropped func(ctx context.Context, inNftables bool) ([]firewall.Dropped, error)
}

// Daemon keeps one machine in its desired state.
type Daemon struct {
	verify.Verifier
	Options
	// Each part has its own backoff: a file that cannot be written must not prevent
	// repairs of the rules.
	rules, files, unit backoff

	status   report.Status  // as last published
	repaired map[string]int // how often, by part

	seen      string // what the last check found
	shown     string // what the published status was made from
	urgent    bool   // the status must be published soon
	published time.Time
	issue     string          // what agetty shows
	said      bool            // the serial consoles have the login message of this boot
	busy      bool            // a command held the lock at the last check
	waits     int             // number of consecutive checks without the lock
	unread    map[string]bool // sentences about lists that cannot be used
	retry     time.Time       // when to repeat a check that failed; zero if none failed
	pause     time.Duration   // length of the pause before retry
	failed    string          // the last failure that was logged
	failedAt  time.Time
}

// now returns the wall-clock time.
func (d *Daemon) now() time.Time { return d.Moment().Time }

// backoffs returns the backoffs by the name of their part.
func (d *Daemon) backoffs() map[string]*backoff {
	return map[string]*backoff{"rules": &d.rules, "persisted files": &d.files, "service's registration": &d.unit}
}

// StatusFile is the status for monitoring. It contains no client address.
const StatusFile = store.RunDir + "/status.json"

// Run loads and verifies the rules and calls Ready. It then repairs drift, follows
// changes of the machine and those made by commands, and removes what has expired. It
// returns when the context ends and leaves the rules loaded.
func (d *Daemon) Run(ctx context.Context) error {
	d.Store.UseCopy()
	// Watch first, so that no change after the boot's verification is missed.
	events := make(chan struct{}, 1)
	notify := func() {
		select {
		case events <- struct{}{}:
		default: // one is already waiting
		}
	}
	if d.Watch != nil {
		d.Watch(ctx, notify)
	}
	if err := system.WatchClock(ctx, notify); err != nil {
		d.Log.WithError(err).Warn("a setting of the clock is noticed only at the periodic check")
	}
	status, err := d.boot(ctx)
	if err != nil {
		return d.raiseGuard(err)
	}
	changes, err := d.System.Watch(ctx, store.StateFile, store.PendingFile)
	if err != nil {
		d.Log.WithError(err).Warn("changes by commands are noticed only at the periodic check")
	}
	d.said = LoadNote(d.System, d.now()).Said
	d.note(d.now())
	defer d.leave()
	d.publish(ctx)
	d.Ready(status)
	d.greet()
	d.measure(ctx)
	return d.loop(ctx, events, changes)
}

// loop checks the machine after events and periodically.
func (d *Daemon) loop(ctx context.Context, events, changes <-chan struct{}) error {
	tick := time.NewTicker(d.Every)
	defer tick.Stop()
	prove := time.NewTicker(proveEvery)
	defer prove.Stop()
	var settle debounce
	end, probation := d.due()
	for {
		limit, pauses := settleLimit, time.Time{}
		for _, b := range d.backoffs() {
			if b.paused(d.now()) {
				limit, pauses = pausedLimit, earliest(pauses, b.until)
			}
		}
		var due <-chan time.Time
		if t := earliest(settle.due(limit), pauses, end, d.publishDue(), d.retry); !t.IsZero() {
			due = time.After(max(t.Sub(d.now()), 0))
		}
		var proving <-chan time.Time
		if probation {
			proving = prove.C
		}
		select {
		case <-ctx.Done():
			return nil
		case <-events:
			settle.event(d.now())
			continue
		case <-changes:
			// By a command, or by the daemon itself.
			d.publish(ctx)
			d.greet()
			d.measure(ctx)
			settle.event(d.now())
			end, probation = d.due()
			continue
		case <-proving:
			if d.prove(ctx) {
				d.publish(ctx)
				d.measure(ctx)
				end, probation = d.due()
			}
			continue
		case <-tick.C:
		case <-due:
		}
		settle = debounce{}
		changed, err := d.check(ctx)
		if ctx.Err() != nil {
			return nil // interrupted, which is not a failure
		}
		if d.noteFailure(err); d.busy {
			settle.event(d.now())
		} else {
			d.retryAfter(err)
		}
		// Expired entries that could not be removed wait for the next check.
		if end, probation = d.due(); !end.After(d.now()) {
			end = time.Time{}
		}
		if t := d.publishDue(); changed || d.urgent || !t.IsZero() && !d.now().Before(t) || d.now().Sub(d.published) >= time.Hour {
			d.publish(ctx)
		}
		d.measure(ctx)
		system.FreeMemory() // the next check may be a minute away
	}
}

// retryFirst is the first pause before a failed check is repeated. Each is twice the
// previous one, up to the interval of the periodic check.
const retryFirst = 2 * time.Second

// retryAfter sets when a check that failed with err is repeated.
func (d *Daemon) retryAfter(err error) {
	if err == nil {
		d.pause, d.retry = 0, time.Time{}
		return
	}
	d.pause = min(max(2*d.pause, retryFirst), d.Every)
	d.retry = d.now().Add(d.pause)
}

// noteFailure logs why a check failed. A check that could not get the lock is repeated.
func (d *Daemon) noteFailure(err error) {
	busy := errors.Is(err, errBusy)
	switch {
	case !busy:
		d.fail(err)
	case !d.busy:
		d.Log.WithError(err).Warn("the check is postponed")
	}
	d.busy = busy
}

// due returns when something expires next, including the probation of a client. Zero is never.
func (d *Daemon) due() (end time.Time, probation bool) {
	st, err := d.Store.Load()
	if err != nil {
		return time.Time{}, false
	}
	p, _ := d.Pending() // one that cannot be read is rolled back by the next check
	m := d.Moment()
	if probation = st.Desired.SSH.Probation != nil; p == nil && !reflect.DeepEqual(st.Retimed(m).Desired, st.Desired) {
		return m.Time, probation // the clock was set while the service was not running
	}
	return lease.Lease{State: st, Pending: p}.Due(m), probation
}

// Events come in bursts. The check follows once they pause, but no later than a limit,
// which is longer while repairs are paused.
const (
	settleQuiet = 250 * time.Millisecond
	settleLimit = time.Second
	pausedLimit = 10 * time.Second
)

// debounce records the first and the last event since the last check; zero if there was none.
type debounce struct{ first, last time.Time }

func (s *debounce) event(now time.Time) {
	if s.last = now; s.first.IsZero() {
		s.first = now
	}
}

// due returns when to check; zero if there was no event.
func (s debounce) due(limit time.Duration) time.Time {
	if s.first.IsZero() {
		return time.Time{}
	}
	return earliest(s.last.Add(settleQuiet), s.first.Add(limit))
}

// earliest returns the first of some times, ignoring zero ones.
func earliest(times ...time.Time) (first time.Time) {
	for _, t := range times {
		if !t.IsZero() && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	return first
}

// publishEvery is the minimum interval between updates of the status after changes that
// are not drift.
const publishEvery = 10 * time.Second

// publishDue returns when to write the status because it is out of date; zero if it is
// not.
func (d *Daemon) publishDue() time.Time {
	if d.seen == "" || d.seen == d.shown {
		return time.Time{}
	}
	return d.published.Add(publishEvery)
}

// fingerprint returns a text that differs if the findings differ.
func fingerprint(r verify.Report, interfaces []firewall.Interface) string {
	in := r.Inspection
	return fmt.Sprint(r.Drift, in.Foreign, in.Exposed, in.LockedOut, in.Conflicts, in.Changes, interfaces)
}

// publish writes the status for monitoring and the login message. Errors are only
// logged.
func (d *Daemon) publish(ctx context.Context) {
	d.published, d.urgent, d.seen = d.now(), false, ""
	in, err := d.Gather(ctx)
	if err != nil {
		d.Log.WithError(err).Warn("the status for monitoring could not be computed")
		return
	}
	d.shown = fingerprint(in.Report, in.Facts.Interfaces)
	s := report.New(in)
	d.status, d.issue = s, s.Issue()
	// Written first: a program that waits for the status also finds the message.
	if err := motd.Show(d.System, s.Message(), d.issue); err != nil {
		d.Log.WithError(err).Warn("the login message could not be updated")
	}
	data, err := json.MarshalIndent(s.Redacted(), "", "  ")
	if err == nil {
		err = files.Change{Path: StatusFile, Data: append(system.PrintableJSON(data), '\n'), Mode: 0o644}.Apply(d.System)
	}
	if err != nil {
		d.Log.WithError(err).Warn("the status for monitoring could not be written")
	}
}

// greet writes the login message to the serial consoles, once per boot. It thus
// appears in the console log, and at a login prompt that agetty printed before
// bootstrap.
func (d *Daemon) greet() {
	if d.said || d.issue == "" {
		return
	}
	d.said = true
	d.note(time.Time{})
	d.say(strings.TrimSpace(d.issue), false)
}

// say writes to the consoles. Errors are only logged.
func (d *Daemon) say(text string, shown bool) {
	if d.Say != nil {
		if err := d.Say(text, shown); err != nil {
			d.Log.WithError(err).Info("writing to the consoles failed")
		}
	}
}

// fail logs a failure once, and again every hour while it lasts.
func (d *Daemon) fail(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != "" && (text != d.failed || d.now().Sub(d.failedAt) >= time.Hour) {
		d.Log.WithError(err).Error("the machine could not be checked or repaired")
		d.failedAt = d.now()
	}
	d.failed = text
}

// noteFile is what the service reports to commands. It is in memory and lost at a
// reboot.
const noteFile = store.RunDir + "/watch.json"

// Note is the content of noteFile.
type Note struct {
	Verified time.Time `json:"verified"` // when the last check found no drift
	Pauses   []Pause   `json:"pauses,omitempty"`
	Said     bool      `json:"said,omitempty"` // the consoles have the login message
}

// Pause is a part that is not repaired until a time, because another program undoes
// each repair or because repairs fail.
type Pause struct {
	What  string    `json:"what"`
	Until time.Time `json:"until"`
}

func (p Pause) String() string {
	return fmt.Sprintf("repairs of the %s fail or do not last; next repair at %s", p.What, firewall.FormatTime(p.Until))
}

// LoadNote returns the note without pauses that are over. If unreadable, it is empty.
func LoadNote(sys *system.System, now time.Time) (n Note) {
	fi, err := sys.Lstat(noteFile)
	if err != nil || system.CheckOwner(fi) != nil {
		return n
	}
	data, err := sys.ReadLimited(noteFile, 1<<16)
	if err != nil || json.Unmarshal(data, &n) != nil {
		return Note{}
	}
	n.Pauses = slices.DeleteFunc(n.Pauses, func(p Pause) bool { return !now.Before(p.Until) })
	return n
}

// note writes the note. If the time is zero, the previous one is kept.
func (d *Daemon) note(verified time.Time) {
	n := Note{Verified: verified, Said: d.said}
	if verified.IsZero() {
		n.Verified = LoadNote(d.System, d.now()).Verified
	}
	for what, b := range d.backoffs() {
		if b.paused(d.now()) {
			n.Pauses = append(n.Pauses, Pause{what, b.until.Round(0)})
		}
	}
	slices.SortFunc(n.Pauses, func(a, b Pause) int { return strings.Compare(a.What, b.What) })
	data, err := json.Marshal(n)
	if err == nil {
		err = files.Change{Path: noteFile, Data: append(data, '\n'), Mode: 0o600}.Apply(d.System)
	}
	if err != nil {
		d.Log.WithError(err).Debug("the note for commands could not be written")
	}
}

// leave removes from the note what is true only while the service runs.
func (d *Daemon) leave() {
	d.rules, d.files, d.unit = backoff{}, backoff{}, backoff{}
	d.note(time.Time{})
}
