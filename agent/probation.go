package agent

import (
	"context"
	"net/netip"
	"reflect"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// beginProbation has a probation that is new count the logins from now on, when
// the rules stand: one that came before them proves nothing.
func (a *Agent) beginProbation(next, previous *store.State) {
	p := next.Desired.SSH.Probation
	if p == nil || previous != nil && reflect.DeepEqual(previous.Desired.SSH.Probation, p) {
		return
	}
	if m := a.Moment(); m.Boot == p.Boot {
		later := *p
		later.Began = m.Uptime
		next.Desired.SSH.Probation = &later
	}
}

// WithoutRule has the agent alone end a probation, where st has one that a rule
// is to end.
func WithoutRule(st *store.State) bool {
	p := st.Desired.SSH.Probation
	if p == nil || p.NoRule {
		return false
	}
	silent := *p
	silent.NoRule = true
	st.Desired.SSH.Probation = &silent
	var err error
	st.Ruleset, err = firewall.Compile(st.Desired)
	return err == nil
}

// Proves tells whether an SSH session shows that a client which was detected is
// the owner's: it comes from there, and began after the rules stood.
func Proves(s Session, st store.State, m firewall.Moment) bool {
	p := st.Desired.SSH.Probation
	return FromClient(s, st) && (p == nil || p.Boot != m.Boot || s.Began > p.Began)
}

// FromClient tells whether a session comes from where the client is.
func FromClient(s Session, st store.State) bool {
	return slices.ContainsFunc(st.Client.Allow, func(c netip.Prefix) bool { return c.Contains(s.From) })
}

// Detected tells whether a client was detected and is not confirmed.
func Detected(st store.State) bool {
	return st.Desired.SSH.Probation != nil || st.Client.Source == store.Unconfirmed
}

// ConfirmClient pins SSH for good to a client that was detected. The error is
// ErrNothingPending where none waits for that.
func (a *Agent) ConfirmClient(ctx context.Context, why string) (store.State, error) {
	st, err := a.Store.Load()
	if err != nil {
		return st, err
	}
	if st = st.At(a.Moment()); !Detected(st) {
		return st, ErrNothingPending
	}
	st.Client.Source = "session"
	st.Client.Reason += "; confirmed by " + why
	ssh := &st.Desired.SSH
	ssh.Mode, ssh.Probation = firewall.SSHPinned, nil
	if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
		return st, err
	}
	_, err = a.Converge(ctx, st, Options{})
	return st, err
}

// proveEvery is how often it is looked for a login while a client is on
// probation. It takes a few milliseconds.
const proveEvery = 2 * time.Second

// prove confirms the client, if somebody has logged in from there who can only
// be a person: at a terminal, in a shell. Programs log in too, and some of them
// ask for a terminal, to run a command in it.
func (w *watcher) prove(ctx context.Context) (proved bool) {
	st, err := w.Store.Load()
	if err != nil || st.At(w.Moment()).Desired.SSH.Probation == nil {
		return false
	}
	shells, err := w.Shells()
	if err != nil {
		w.Log.WithError(err).Debug("who is logged in is not known")
		return false
	}
	i := slices.IndexFunc(shells, func(s Session) bool { return s.Began > 0 && Proves(s, st, w.Moment()) })
	if i < 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, bootLockWait)
	defer cancel()
	unlock, err := w.Store.Lock(ctx, "run")
	if err != nil {
		return false // another change is under way: the session is likely to last
	}
	defer unlock()
	// What waits for a confirmation is another change, and has its turn first.
	if p, err := w.Pending(); err != nil || p != nil {
		return false
	}
	if now, err := w.Store.Load(); err != nil || !reflect.DeepEqual(now.Client, st.Client) {
		return false
	}
	if _, err := w.ConfirmClient(ctx, "a new login from there"); err != nil {
		w.fail(err)
		return false
	}
	w.Log.Info("SSH stays pinned to the client that was detected: " + shells[i].Reason)
	return true
}
