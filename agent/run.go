package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// RunOptions are what Run looks at and tells.
type RunOptions struct {
	Ports    Ports
	Look     func() ([]firewall.Interface, error)
	Instance func() string // cloud-init's instance-id as far as it is known yet
	// CommandLine is the kernel's.
	CommandLine string
	// Changed is called when a command has changed something.
	Changed func()
	// Prune gives the settings that commands wrote, without what has ended; nil
	// is nothing to change.
	Prune func() (*Change, error)
	// Ready is called once the rules stand, with a sentence for the service
	// manager.
	Ready func(status string)
	// Watch begins to call tell, which does not wait, for whatever may mean that
	// the machine differs from what was decided, until the context ends.
	Watch func(ctx context.Context, tell func())
	// Shells are the SSH sessions in which people who may become root have a
	// shell at a terminal.
	Shells func() ([]Session, error)
	// Say, where set, writes a line to the serial consoles, and with shown to the
	// screen.
	Say func(text string, shown bool) error
	// Every is how often it is looked at without being told.
	Every time.Duration
	// Facts are for status.json.
	Facts func() Facts
}

// bootLockWait is how long a boot waits for another change. Whoever holds the
// lock then, the rules are loaded all the same: an open machine is worse than
// two loads of the same rules.
const bootLockWait = 5 * time.Second

// StatusFile is the status that monitoring may read. It has no addresses of
// clients.
const StatusFile = store.RunDir + "/status.json"

// Run loads and verifies the rules, says that it is ready, and then watches: it
// repairs what others change, and follows what a boot cannot know at its
// beginning, such as the interfaces, once they are up, and the instance-id,
// once cloud-init has it. It follows what commands change, and clears away what
// has ended. It ends with the context and leaves the rules.
func (a *Agent) Run(ctx context.Context, o RunOptions) error {
	// First, so that nothing happens between the boot's verification and it.
	news := make(chan struct{}, 1)
	if o.Watch != nil {
		o.Watch(ctx, func() {
			select {
			case news <- struct{}{}:
			default: // there is some already
			}
		})
	}
	status, err := a.enforce(ctx, o)
	if err != nil {
		return a.shut(o, err)
	}
	changes, err := a.System.Watch(ctx, store.StateFile, store.PendingFile)
	if err != nil {
		a.Log.WithError(err).Warn("what commands change is followed only now and then")
	}
	w := &watcher{Agent: a, RunOptions: o, said: a.loadNote().Said}
	w.note(a.Now())
	defer w.leave()
	w.publish(ctx)
	o.Ready(status)
	w.greet()
	return w.run(ctx, news, changes)
}

// run looks whenever there is news, and now and then without.
func (w *watcher) run(ctx context.Context, news, changes <-chan struct{}) error {
	tick := time.NewTicker(w.Every)
	defer tick.Stop()
	prove := time.NewTicker(proveEvery)
	defer prove.Stop()
	var settle settling
	end, probation := w.nextEnd()
	for {
		limit, pauses := settleLimit, time.Time{}
		for _, f := range w.fights() {
			if f.paused(w.Now()) {
				limit, pauses = fightLimit, earliest(pauses, f.until)
			}
		}
		var due <-chan time.Time
		if t := earliest(settle.due(limit), pauses, end, w.publishDue()); !t.IsZero() {
			due = time.After(max(t.Sub(w.Now()), 0))
		}
		var proving <-chan time.Time
		if probation {
			proving = prove.C
		}
		select {
		case <-ctx.Done():
			return nil
		case <-news:
			settle.news(w.Now())
			continue
		case <-changes:
			// By a command, or by ourselves a moment ago.
			w.Changed()
			w.publish(ctx)
			w.greet()
			settle.news(w.Now())
			end, probation = w.nextEnd()
			continue
		case <-proving:
			if w.prove(ctx) {
				w.publish(ctx)
				end, probation = w.nextEnd()
			}
			continue
		case <-tick.C:
		case <-due:
		}
		settle = settling{}
		changed, err := w.look(ctx)
		if ctx.Err() != nil {
			return nil // cut short, which is no failure
		}
		busy := errors.Is(err, errBusy)
		switch {
		case !busy:
			w.fail(err)
		case !w.busy:
			w.Log.WithError(err).Warn("the look is repeated")
		}
		if w.busy = busy; busy {
			settle.news(w.Now())
		}
		// What has ended and is still there waits for the next look.
		if end, probation = w.nextEnd(); !end.After(w.Now()) {
			end = time.Time{}
		}
		if t := w.publishDue(); changed || w.urgent || !t.IsZero() && !w.Now().Before(t) || w.Now().Sub(w.published) >= time.Hour {
			w.publish(ctx)
		}
	}
}

// publishEvery is how often the status is written, at most, for the sake of
// what others do and we leave alone.
const publishEvery = 10 * time.Second

// publishDue is when the status has to be written because the last one is not
// what was seen since; zero is not.
func (w *watcher) publishDue() time.Time {
	if w.seen == "" || w.seen == w.shown {
		return time.Time{}
	}
	return w.published.Add(publishEvery)
}

// nextEnd is when something that lasts for a while is over, zero is never, and
// whether a client is on probation until then.
func (a *Agent) nextEnd() (end time.Time, probation bool) {
	st, err := a.Store.Load()
	if err != nil {
		return time.Time{}, false
	}
	m := a.Moment()
	end, probation = st.Desired.Ends(m), st.Desired.SSH.Probation != nil
	if p, err := a.Pending(); err == nil && p != nil {
		end = p.Window.End(m) // nothing else is cleared away until then
	}
	if end.IsZero() {
		return end, probation
	}
	return end.Add(time.Second), probation // its last second is a part of it
}

// enforce makes the rules stand: those that were applied last; where they are
// not known, those of the persisted files; where there are none, the failsafe.
func (a *Agent) enforce(ctx context.Context, o RunOptions) (string, error) {
	unlock := a.tryLock(ctx)
	defer unlock()
	if _, err := a.Conntrack.Grow(ctx); err != nil {
		a.Log.WithError(err).Warn("the kernel's table of connections could not be enlarged")
	}
	if _, err := a.expire(ctx); err != nil {
		a.Log.WithError(err).Warn("a change that waited for a confirmation is not taken back yet")
	}
	if err := a.rescue(o.CommandLine); err != nil {
		a.Log.WithError(err).Error("the machine was to be unlocked")
	}
	r, err := a.verifyOr(ctx, o.Ports)
	if err == nil {
		for _, d := range r.Inspection.Drift {
			a.Log.WithField("drift", d.String()).Debug("not in the kernel as decided")
		}
		var failed error
		if len(r.Drift) > 0 {
			_, failed = a.Mend(ctx, r)
			if over, err := a.goOver(ctx, failed); over {
				failed = err
			}
		} else {
			failed = a.Verified(r)
		}
		if failed == nil {
			msg := fmt.Sprintf("protected by profile %s; repaired: %d", r.State.Profile.Name, len(r.Drift))
			a.Log.Info(msg)
			return msg, nil
		}
		// By themselves: a full or a broken disk must not keep the rules out.
		if r.Inspection, err = a.Kernel(r.backend()).Inspect(ctx, r.wanted()); err == nil {
			err = a.load(ctx, r)
		}
		if err == nil {
			a.Log.WithError(failed).Error("the rules stand, but not all that keeps them")
			return fmt.Sprintf("protected by profile %s, but %v", r.State.Profile.Name, failed), nil
		}
		a.Log.WithError(err).Debug("nor can the rules alone be loaded")
		err = failed
	}
	a.Log.WithError(err).Error("the rules that were decided cannot be enforced")
	return a.fallBack(ctx, o, err)
}

// verifyOr is Verify, but that it goes over to nf_tables where iptables cannot even
// be asked.
func (a *Agent) verifyOr(ctx context.Context, ports Ports) (Report, error) {
	r, err := a.Verify(ctx, ports)
	over, failed := a.goOver(ctx, err)
	if !over {
		return r, err
	}
	if failed != nil {
		return r, failed
	}
	return a.Verify(ctx, ports)
}

// goOver puts the rules that were decided into nf_tables, where iptables was chosen
// by us and has failed; from then on they are there. Otherwise it does nothing.
func (a *Agent) goOver(ctx context.Context, cause error) (over bool, err error) {
	st, err := a.Store.Load()
	if err != nil {
		return false, nil
	}
	other, ok := alternative(st.At(a.Moment()), cause)
	if !ok {
		return false, nil
	}
	a.Log.Warn(other.Backend.Reason + ": the rules are loaded into nf_tables instead")
	if _, err := a.Converge(ctx, other, Options{}); err != nil {
		return true, fmt.Errorf("%w; nor does nf_tables: %w", cause, err)
	}
	return true, nil
}

// tryLock takes the lock, or after a while goes on without it.
func (a *Agent) tryLock(ctx context.Context) (unlock func()) {
	ctx, cancel := context.WithTimeout(ctx, bootLockWait)
	defer cancel()
	unlock, err := a.Store.Lock(ctx, "run")
	if err != nil {
		a.Log.WithError(err).Warn("going on without the lock")
		return func() {}
	}
	return unlock
}

// fallBack closes the machine where what was decided cannot be had.
func (a *Agent) fallBack(ctx context.Context, o RunOptions, cause error) (string, error) {
	kernel, in, err := a.find(ctx)
	if err != nil {
		return "", errors.Join(cause, err)
	}
	err = a.loadFiles(ctx, kernel, in)
	if err == nil {
		msg := fmt.Sprintf("closed by the persisted files, because %v", cause)
		a.Log.Warn(msg)
		return msg, nil
	}
	a.Log.WithError(err).Error("the persisted files cannot be loaded")

	st, err := a.FailsafeState(o.Ports, cause)
	if err != nil {
		return "", err
	}
	if err := a.Store.SetAside(); err != nil {
		a.Log.WithError(err).Warn("the unreadable state could not be set aside")
	}
	if _, err := a.Converge(ctx, st, Options{Choose: true}); err != nil {
		// On a full or a broken disk the rules alone have to do.
		a.Log.WithError(err).Error("the failsafe rules cannot be kept")
		if err := kernel.Load(ctx, st.Ruleset, in, false); err != nil {
			return "", fmt.Errorf("loading the failsafe rules: %w", err)
		}
	}
	msg := fmt.Sprintf("closed by the failsafe rules, because %v", cause)
	a.Log.Warn(msg)
	return msg, nil
}

// loadFiles has the kernel hold what the persisted files say.
func (a *Agent) loadFiles(ctx context.Context, kernel Kernel, in firewall.Inspection) error {
	read := func(path string) ([]byte, error) {
		fi, err := a.System.Lstat(path)
		if err == nil {
			err = system.CheckOwner(fi)
		}
		if err != nil {
			return nil, err
		}
		return a.System.ReadLimited(path, maxRules)
	}
	if a.System.Exists(TableFile) {
		data, err := read(TableFile)
		if err != nil {
			return fmt.Errorf("%s: %w", TableFile, err)
		}
		rules, err := a.Table.Parse(data)
		if err != nil {
			return fmt.Errorf("%s: %w", TableFile, err)
		}
		return kernel.Load(ctx, rules, in, false)
	}
	files := map[firewall.Family][]byte{}
	for _, f := range firewall.Families {
		path := a.RulesPath(f)
		var err error
		if files[f], err = read(path); err != nil {
			a.Log.WithError(err).Warnf("%s cannot be used", path)
		}
	}
	return kernel.LoadFiles(ctx, files, in)
}

// FailsafeState is what stands where nothing better can be had: the baseline,
// SSH limited from anywhere, no other port.
func (a *Agent) FailsafeState(ports Ports, cause error) (store.State, error) {
	sshPorts, why, _, err := ports()
	if err != nil || len(sshPorts) == 0 {
		sshPorts, why = []uint16{22}, []string{"22: the default, because sshd could not be asked"}
	}
	st := store.State{Schema: store.Schema, Version: a.Version, Failsafe: cause.Error(), SSHPorts: why,
		Desired: firewall.Failsafe(sshPorts),
		Profile: store.Choice{Name: "failsafe", Source: "failsafe", Reason: cause.Error()},
		Backend: store.Choice{Name: Iptables, Source: "failsafe", Reason: "the failsafe rules need no other"},
		Client:  store.Client{Source: "none", Reason: "the failsafe rules pin nobody"},
	}
	if before, err := a.Store.Load(); err == nil && before.Backend.Name != "" {
		st.Backend = before.Backend // whose owner may want no other
	} else if a.backend() == Nftables {
		st.Backend.Name = Nftables
	}
	st.Ruleset, err = firewall.Compile(st.Desired)
	return st, err
}

// shut closes a machine whose iptables does not work, by the guard, which needs
// none. It stays until the rules stand: the service manager tries again, and so
// does whoever has mended iptables. The error is still the cause.
func (a *Agent) shut(o RunOptions, cause error) error {
	st, err := a.Store.Load()
	if err != nil {
		st, err = a.FailsafeState(o.Ports, cause)
	}
	if err == nil {
		if _, err := a.Conntrack.Adopt(); err != nil {
			a.Log.WithError(err).Warn("sessions that are open now may have to be opened again")
		}
		err = a.Guard.Raise(st.At(a.Moment()).Ruleset, a.Families)
	}
	if err != nil {
		return fmt.Errorf("%w; and nothing else can close this machine: %w", cause, err)
	}
	a.Log.Errorf("only table %s of nf_tables closes this machine, without limits, until iptables works and \"basicfw-agent verify --repair\" succeeds", GuardTable)
	return cause
}

// publish writes the status for monitoring. It is for others' convenience, so
// a failure is only logged.
func (w *watcher) publish(ctx context.Context) {
	w.published, w.urgent, w.seen = w.Now(), false, ""
	facts := w.Facts()
	facts.Session, facts.Seen = nil, nil
	s, err := w.Status(ctx, facts)
	if err != nil {
		w.Log.WithError(err).Warn("no status for monitoring")
		return
	}
	w.shown = s.found
	w.issue = s.issue()
	// Whoever waits for the status then also finds the message.
	if err := w.announce(s); err != nil {
		w.Log.WithError(err).Warn("the login message could not be brought up to date")
	}
	s.redact()
	data, err := json.MarshalIndent(s, "", "  ")
	if err == nil {
		err = w.put(Change{Path: StatusFile, Data: append(system.PrintableJSON(data), '\n'), Mode: 0o644})
	}
	if err != nil {
		w.Log.WithError(err).Warn("no status for monitoring")
	}
}

// leave takes back what is true only while the service runs.
func (w *watcher) leave() {
	w.rules, w.files, w.unit = fight{}, fight{}, fight{}
	w.note(time.Time{})
}
