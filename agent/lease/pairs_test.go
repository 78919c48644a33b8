package lease

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// model is a lease in other terms: only when each part ends. Zero is that there is none.
type model struct {
	pending     time.Time
	pendingBoot string
	probation   time.Time
	client      string // "" before its probation has ended; anySSH or pinned; another after Keep
	unlock      time.Time
	rolledBack  bool
}

// expire removes what has expired by m.
func (l model) expire(m firewall.Moment) model {
	if !l.probation.IsZero() && m.Time.After(l.probation) {
		l.probation, l.client = time.Time{}, anySSH
	}
	if m.Time.After(l.unlock) {
		l.unlock = time.Time{}
	}
	return l
}

func (l model) rollBack() model {
	l.rolledBack = l.rolledBack || !l.pending.IsZero()
	l.pending, l.pendingBoot = time.Time{}, ""
	return l
}

// next returns the model after an event, and false if that is an error.
func (l model) next(e Event, m firewall.Moment) (model, bool) {
	waiting := !l.pending.IsZero() && l.pendingBoot == m.Boot && !m.Time.After(l.pending)
	switch e := e.(type) {
	case Tick:
		if !waiting {
			l = l.rollBack()
		}
		return l.expire(m), true
	case Try:
		l.pending, l.pendingBoot = m.Time.Add(e.Length), m.Boot
	case Keep:
		return model{client: another}, waiting
	case Rollback:
		return l.rollBack(), true
	case ConfirmClient:
		if l = l.expire(m); l.probation.IsZero() && l.client != anySSH {
			return l, false
		}
		l.probation, l.client = time.Time{}, pinned
	case Unlock:
		l = l.rollBack().expire(m)
		l.unlock = m.Time.Add(e.Length)
	case Lock:
		l = l.rollBack().expire(m)
		l.unlock = time.Time{}
	case Rescue:
		if e.Length > 0 {
			l.unlock = m.Time.Add(e.Length)
		}
	}
	return l, true
}

// of returns the model of a lease.
func of(l Lease) model {
	m := model{rolledBack: l.State.RolledBack != ""}
	if l.Pending != nil {
		m.pending, m.pendingBoot = l.Pending.Window.Until, l.Pending.Window.Boot
	}
	st := l.State
	switch ssh := st.Desired.SSH; {
	case st.Client.Allow[0].String() != clientPrefix:
		m.client = another
	case ssh.Probation != nil:
		m.probation = ssh.Probation.Until
	case st.Client.Source == store.Unconfirmed && ssh.Mode == firewall.SSHLimited:
		m.client = anySSH
	case ssh.Mode == firewall.SSHPinned && st.Client.Reason != "seen":
		m.client = pinned
	}
	if u := st.Desired.Unlock; u != nil {
		m.unlock = u.Until
	}
	return m
}

const clientPrefix = "203.0.113.9/32"

// TestPairsOfEvents applies every two events after each other, at once, after some time in
// which shorter parts expire, and after a reboot, to leases with all combinations of parts,
// and compares them with the model.
func TestPairsOfEvents(t *testing.T) {
	var events []Event
	for _, tt := range transitions(t) {
		events = append(events, tt.event)
	}
	each := []string{none, running, over}
	later := func(m firewall.Moment, by time.Duration, boot string) firewall.Moment {
		return firewall.Moment{Time: m.Time.Add(by), Boot: boot, Uptime: m.Uptime + by}
	}
	for i := range 27 {
		start := leased(t, each[i/9], each[i/3%3], each[i%3])
		for _, first := range events {
			for _, second := range events {
				for _, between := range []firewall.Moment{now, later(now, 25*time.Minute, now.Boot), later(now, 2*time.Hour, now.Boot), later(now, time.Minute, "next")} {
					name := fmt.Sprintf("%+v: %T, then at %v of boot %s %T", of(start), first, between.Time, between.Boot, second)
					l, m, at := start, of(start), now
					for n, e := range []Event{first, second} {
						next, err := l.Next(e, at)
						want, ok := m.next(e, at)
						if ok != (err == nil) || err != nil && !errors.Is(err, ErrNothingPending) {
							t.Fatalf("%s, event %d: %v, want success %v", name, n, err, ok)
						}
						if ok { // else nothing is saved
							l, m = next, want
						}
						if got := of(l); got != m {
							t.Fatalf("%s, event %d: %+v, want %+v", name, n, got, m)
						}
						if n == 1 && i%5 == 0 && !l.State.Ruleset.Equal(compiled(t, l.State).Ruleset) {
							t.Fatalf("%s, event %d: the rules are not those of the desired state", name, n)
						}
						at = between
					}
				}
			}
		}
	}
}
