package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
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
	// Every is how often interfaces and the instance are looked at.
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

// Run loads and verifies the rules, says that it is ready, and then looks at
// what a boot cannot know at its beginning: the interfaces, once they are up,
// and the instance-id, once cloud-init has it. It follows what commands change,
// and clears away what has ended. It ends with the context and leaves the rules.
func (a *Agent) Run(ctx context.Context, o RunOptions) error {
	status, err := a.enforce(ctx, o)
	if err != nil {
		return err
	}
	changes, err := a.System.Watch(ctx, store.StateFile, store.PendingFile)
	if err != nil {
		a.Log.WithError(err).Warn("what commands change is followed only now and then")
	}
	a.publish(ctx, o)
	o.Ready(status)
	tick := time.NewTicker(o.Every)
	defer tick.Stop()
	published, failed := a.Now(), false
	for {
		end := a.nextEnd(failed)
		select {
		case <-ctx.Done():
			return nil
		case <-changes:
			// By a command, or by ourselves a moment ago.
			o.Changed()
			a.publish(ctx, o)
			published = a.Now()
			continue
		case <-end:
		case <-tick.C:
		}
		changed, err := a.look(ctx, o)
		if failed = err != nil; failed {
			a.Log.WithError(err).Error("the rules could not follow what changed on this machine")
		}
		if changed && changes == nil || a.Now().Sub(published) >= time.Hour {
			a.publish(ctx, o)
			published = a.Now()
		}
	}
}

// nextEnd fires when something that lasts for a while is over; after a failure
// not before the next look.
func (a *Agent) nextEnd(failed bool) <-chan time.Time {
	st, err := a.Store.Load()
	if err != nil || failed {
		return nil
	}
	m := a.Moment()
	end := st.Desired.Ends(m)
	if p, err := a.Pending(); err == nil && p != nil {
		if t := p.Window.End(m); end.IsZero() || t.Before(end) {
			end = t
		}
	}
	if end.IsZero() {
		return nil
	}
	// Its last second is a part of it.
	return time.After(max(end.Add(time.Second).Sub(m.Time), 0))
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
	r, err := a.Verify(ctx, o.Ports)
	if err == nil {
		for _, d := range r.Inspection.Drift {
			a.Log.WithField("drift", d.String()).Debug("not in the kernel as decided")
		}
		if len(r.Drift) > 0 {
			_, err = a.Mend(ctx, r)
		} else {
			err = a.Verified(r)
		}
		if err == nil {
			msg := fmt.Sprintf("protected by profile %s; repaired: %d", r.State.Profile.Name, len(r.Drift))
			a.Log.Info(msg)
			return msg, nil
		}
	}
	a.Log.WithError(err).Error("the rules that were decided cannot be enforced")
	return a.fallBack(ctx, o, err)
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
	in, err := a.Kernel.Inspect(ctx, firewall.Ruleset{})
	if err != nil {
		return "", errors.Join(cause, err)
	}
	files := map[firewall.Family][]byte{}
	for _, f := range firewall.Families {
		if data, err := a.System.ReadLimited(a.RulesPath(f), maxRules); err == nil {
			files[f] = data
		}
	}
	err = a.Kernel.LoadFiles(ctx, files, in)
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
	if _, err := a.Converge(ctx, st, Options{}); err != nil {
		// On a full or a broken disk the rules alone have to do.
		a.Log.WithError(err).Error("the failsafe rules cannot be kept")
		if err := a.Kernel.Load(ctx, st.Ruleset, in, false); err != nil {
			return "", fmt.Errorf("loading the failsafe rules: %w", err)
		}
	}
	msg := fmt.Sprintf("closed by the failsafe rules, because %v", cause)
	a.Log.Warn(msg)
	return msg, nil
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
		Backend: store.Choice{Name: "iptables", Source: "failsafe", Reason: "the failsafe rules need no other"},
		Client:  store.Client{Source: "none", Reason: "the failsafe rules pin nobody"},
	}
	st.Ruleset, err = firewall.Compile(st.Desired)
	return st, err
}

// look follows what changed on the machine since the rules were made.
func (a *Agent) look(ctx context.Context, o RunOptions) (changed bool, err error) {
	lockCtx, cancel := context.WithTimeout(ctx, bootLockWait)
	defer cancel()
	unlock, err := a.Store.Lock(lockCtx, "run")
	if err != nil {
		return false, err // the next look tries again
	}
	defer unlock()
	if expired, err := a.expire(ctx); expired || err != nil {
		return expired, err
	}
	if p, err := a.Pending(); p != nil || err != nil {
		return false, err // what is followed then would be another change
	}
	st, err := a.Store.Load()
	if err != nil {
		return false, err
	}
	next := st.At(a.Moment())
	ended := !reflect.DeepEqual(next.Desired, st.Desired)
	was, err := firewall.Compile(next.Desired)
	if err != nil {
		return false, err
	}
	if id := o.Instance(); id != "" && st.InstanceID != "" && id != st.InstanceID && next.Desired.SSH.Mode == firewall.SSHPinned {
		next.Desired.SSH.Mode = firewall.SSHLimited
		if next.Desired.SSH.Limit.IsZero() {
			next.Desired.SSH.Limit = firewall.Failsafe(nil).SSH.Limit
		}
		next.Client.Source = "clone"
		next.Client.Reason = fmt.Sprintf("this is a clone of instance %q, whose owner may be another: \"basicfw-agent bootstrap\" decides anew", st.InstanceID)
	}
	if next.Desired.Interfaces, err = o.Look(); err != nil {
		return false, err
	}
	// Both by this program, so that an upgrade alone changes no rule.
	rules, err := firewall.Compile(next.Desired)
	if err != nil {
		return false, err
	}
	if !was.Equal(rules) {
		next.Ruleset = rules
		a.Log.WithField("client", next.Client.Source).Info("the rules follow what changed on this machine")
	} else if !ended {
		return false, nil
	}
	var options Options
	if ended {
		a.Log.Info("something that was open for a while has ended")
		change, err := o.Prune()
		if err != nil {
			a.Log.WithError(err).Warn("it stays in the settings, where it has no effect any more")
		} else if change != nil {
			options.Files = append(options.Files, *change)
		}
	}
	_, err = a.Converge(ctx, next, options)
	return err == nil, err
}

// publish writes the status for monitoring. It is for others' convenience, so
// a failure is only logged.
func (a *Agent) publish(ctx context.Context, o RunOptions) {
	facts := o.Facts()
	facts.Session, facts.Seen = nil, nil
	s, err := a.Status(ctx, facts)
	if err != nil {
		a.Log.WithError(err).Warn("no status for monitoring")
		return
	}
	// Whoever waits for the status then also finds the message.
	if err := a.announce(s); err != nil {
		a.Log.WithError(err).Warn("the login message could not be brought up to date")
	}
	s.redact()
	data, err := json.MarshalIndent(s, "", "  ")
	if err == nil {
		err = a.put(Change{Path: StatusFile, Data: append(data, '\n'), Mode: 0o644})
	}
	if err != nil {
		a.Log.WithError(err).Warn("no status for monitoring")
	}
}
