package lease

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// now is the moment of all tests.
var now = firewall.Moment{Time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Boot: "b", Uptime: 10 * time.Hour}

// since is a window that began some time before now.
func since(ago, length time.Duration) firewall.Window {
	return firewall.NewWindow(firewall.Moment{Time: now.Time.Add(-ago), Boot: now.Boot, Uptime: now.Uptime - ago}, length)
}

// The possible windows of each of the three parts: none, a running or an expired one.
const none, running, over = "none", "running", "over"

// window returns the window of this length that a word stands for.
func window(word string, length time.Duration) firewall.Window {
	if word == over {
		return since(2*time.Hour+length, length)
	}
	return since(time.Minute, length)
}

// The lengths of the running windows, which identify them.
const pendingLength, probationLength, unlockLength = 30 * time.Minute, 20 * time.Minute, 40 * time.Minute

// state returns a state that restricts SSH to one client.
func state(t testing.TB, client string) store.State {
	t.Helper()
	st := store.State{Client: store.Client{Source: "session", Reason: "seen", Allow: []netip.Prefix{netip.MustParsePrefix(client)}}}
	st.Desired.SSH = firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHPinned, Allow: st.Client.Allow, Limit: firewall.Rate{N: 30, Per: firewall.Minute}}
	return compiled(t, st)
}

func compiled(t testing.TB, st store.State) store.State {
	t.Helper()
	var err error
	if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
		t.Fatal(err)
	}
	return st
}

// leased returns a lease whose parts are as the words specify.
func leased(t testing.TB, pending, probation, unlock string) Lease {
	t.Helper()
	l := Lease{State: state(t, "203.0.113.9/32")}
	if probation != none {
		l.State.Desired.SSH.Probation = &firewall.Probation{Window: window(probation, probationLength)}
	}
	if unlock != none {
		l.State.Desired.Unlock = &firewall.Unlock{Window: window(unlock, unlockLength)}
	}
	l.State = compiled(t, l.State)
	if pending != none {
		l.Pending = &store.Pending{State: state(t, "198.51.100.7/32"), Window: window(pending, pendingLength)}
	}
	return l
}

// The other possible results for a part: it is the event's, SSH is open to any address, or
// the client is confirmed.
const another, anySSH, pinned = "another", "any SSH", "pinned"

// words returns the pending change, probation and unlock of l in the terms of the
// test tables.
func words(l Lease, by firewall.Moment) (pending, probation, unlock string) {
	word := func(w firewall.Window, length time.Duration) string {
		switch w {
		case window(running, length):
			return running
		case window(over, length):
			return over
		case firewall.NewWindow(by, eventLength):
			return another
		}
		return fmt.Sprintf("%+v", w)
	}
	pending, probation, unlock = none, none, none
	if p := l.Pending; p != nil {
		pending = word(p.Window, pendingLength)
	}
	ssh := l.State.Desired.SSH
	switch {
	case ssh.Probation != nil:
		probation = word(ssh.Probation.Window, probationLength)
	case l.State.Client.Source == store.Unconfirmed && ssh.Mode == firewall.SSHLimited:
		probation = anySSH
	case strings.Contains(l.State.Client.Reason, "confirmed by") && ssh.Mode == firewall.SSHPinned && l.State.Client.Source == "session":
		probation = pinned
	}
	if u := l.State.Desired.Unlock; u != nil {
		unlock = word(u.Window, unlockLength)
	}
	return pending, probation, unlock
}

// eventLength is the length of the windows that events begin.
const eventLength = 50 * time.Minute

// becomes is the result of an event for a part that is none, running or over.
type becomes [3]string

func (b becomes) of(was string) string {
	return map[string]string{none: b[0], running: b[1], over: b[2]}[was]
}

// transitions is the table of Next's doc comment. An event that changes the state also
// removes what has expired by then.
func transitions(t testing.TB) []transition {
	same, expired := becomes{none, running, over}, becomes{none, running, none}
	client := becomes{none, running, anySSH}
	next := state(t, "192.0.2.1/32")
	return []transition{
		{"tick", Tick{}, expired, client, expired, "not confirmed within 30m"},
		{"try", Try{State: next, Length: eventLength}, becomes{another, another, another}, same, same, ""},
		{"keep", Keep{}, becomes{none, none, over}, same, same, ""},
		{"rollback", Rollback{Why: "requested"}, becomes{none, none, none}, same, same, "requested"},
		{"confirm the client", ConfirmClient{By: "test"}, same, becomes{none, pinned, pinned}, expired, ""},
		{"unlock", Unlock{Length: eventLength}, becomes{none, none, none}, client, becomes{another, another, another}, "unlocked"},
		{"lock", Lock{}, becomes{none, none, none}, client, becomes{none, none, none}, "locked"},
		{"rescue", Rescue{Parameter: "basicfw.unlock", Length: eventLength}, same, same, becomes{another, another, another}, ""},
		{"no rescue", Rescue{}, same, same, same, ""},
	}
}

type transition struct {
	name                       string
	event                      Event
	pending, probation, unlock becomes
	why                        string // why a change was rolled back
}

// TestNextFollowsTheTable checks the effect of each event on a pending change, a probation and
// an unlock, for all combinations of these. The rules are those of the desired state.
func TestNextFollowsTheTable(t *testing.T) {
	each := []string{none, running, over}
	for _, tt := range transitions(t) {
		for i := range 27 {
			pending, probation, unlock := each[i/9], each[i/3%3], each[i%3]
			name := fmt.Sprintf("%s, pending %s, probation %s, unlock %s", tt.name, pending, probation, unlock)
			l := leased(t, pending, probation, unlock)
			before := leased(t, pending, probation, unlock)
			got, err := l.Next(tt.event, now)
			if !reflect.DeepEqual(l, before) {
				t.Errorf("%s: the original lease has changed", name)
			}
			_, keep := tt.event.(Keep)
			_, client := tt.event.(ConfirmClient)
			if keep && pending != running || client && probation == none {
				if !errors.Is(err, ErrNothingPending) {
					t.Errorf("%s: %v", name, err)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if keep {
				if !reflect.DeepEqual(got, Lease{State: before.Pending.State}) {
					t.Errorf("%s: not the state of the change: %+v", name, got)
				}
				continue
			}
			p, c, u := words(got, now)
			if p != tt.pending.of(pending) || c != tt.probation.of(probation) || u != tt.unlock.of(unlock) {
				t.Errorf("%s: %s, %s, %s; want %s, %s, %s", name, p, c, u, tt.pending.of(pending), tt.probation.of(probation), tt.unlock.of(unlock))
			}
			if rolledBack := pending != none && p == none; rolledBack != (got.State.RolledBack != "") || rolledBack && !strings.Contains(got.State.RolledBack, tt.why) {
				t.Errorf("%s: rolled back %q, want %q", name, got.State.RolledBack, tt.why)
			}
			if rules := compiled(t, got.State).Ruleset; !got.State.Ruleset.Equal(rules) {
				t.Errorf("%s: the rules are not those of the desired state", name)
			}
			if try, ok := tt.event.(Try); ok && !reflect.DeepEqual(got.Pending.State, try.State) {
				t.Errorf("%s: another change is pending", name)
			}
			if rescue, ok := tt.event.(Rescue); ok && got.State.RescueArgument != rescue.Parameter {
				t.Errorf("%s: recorded %q", name, got.State.RescueArgument)
			}
		}
	}
}

// TestUnlockIsForWhomItNames checks that an unlock has the sources of its event.
func TestUnlockIsForWhomItNames(t *testing.T) {
	from := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	for _, all := range []bool{false, true} {
		l, err := leased(t, none, none, none).Next(Unlock{From: from, All: all, Length: time.Hour}, now)
		if u := l.State.Desired.Unlock; err != nil || !reflect.DeepEqual(u.From, from) || u.All != all {
			t.Errorf("%v, %+v", err, u)
		}
	}
}

// TestNextRefusesTimesOutOfRange checks that times which the kernel cannot represent are refused.
func TestNextRefusesTimesOutOfRange(t *testing.T) {
	late := firewall.Moment{Time: firewall.MaxTime}
	for _, e := range []Event{Try{State: state(t, "192.0.2.1/32"), Length: time.Hour}, Unlock{Length: time.Hour}, Rescue{Length: time.Hour}} {
		if _, err := leased(t, none, none, none).Next(e, late); err == nil {
			t.Errorf("%T until an hour after %v is accepted", e, late.Time)
		}
	}
}

// TestWaitingEndsWithItsTimeAndBoot checks that a change is pending only during the boot in which
// it was made, and until its time has expired by the uptime.
func TestWaitingEndsWithItsTimeAndBoot(t *testing.T) {
	end := 29 * time.Minute // of 30, one of which is over
	for _, tt := range []struct {
		name    string
		pending string
		later   func(m *firewall.Moment)
		want    bool
		why     string
	}{
		{"none", none, func(*firewall.Moment) {}, false, ""},
		{"running", running, func(*firewall.Moment) {}, true, ""},
		{"its end", running, func(m *firewall.Moment) { m.Uptime += end }, true, ""},
		{"after it", running, func(m *firewall.Moment) { m.Uptime += end + 1 }, false, "not confirmed within 30m"},
		{"the clock was set forward", running, func(m *firewall.Moment) { m.Time = m.Time.Add(time.Hour) }, true, ""},
		{"the clock was set back before its beginning", running, func(m *firewall.Moment) { m.Time = m.Time.Add(-time.Hour) }, true, ""},
		{"another boot", running, func(m *firewall.Moment) { m.Boot, m.Uptime = "c", time.Minute }, false, "rebooted"},
		{"over", over, func(*firewall.Moment) {}, false, "not confirmed within 30m"},
	} {
		l, m := leased(t, tt.pending, none, none), now
		tt.later(&m)
		if got := l.Waiting(m); got != tt.want {
			t.Errorf("%s: waiting %v", tt.name, got)
		}
		after, err := l.Next(Tick{}, m)
		if err != nil || (after.Pending != nil) != tt.want || (after.State.RolledBack == "") != (tt.why == "") || !strings.Contains(after.State.RolledBack, tt.why) {
			t.Errorf("%s: after a tick %+v, %q, %v", tt.name, after.Pending, after.State.RolledBack, err)
		}
	}
}

// TestDueIsWhenATickEndsSomething checks that Due is the end of the pending change or, without
// one, of what expires first. A tick at that moment ends it, an earlier tick does not.
func TestDueIsWhenATickEndsSomething(t *testing.T) {
	each := []string{none, running, over}
	for i := range 27 {
		pending, probation, unlock := each[i/9], each[i/3%3], each[i%3]
		name := fmt.Sprintf("pending %s, probation %s, unlock %s", pending, probation, unlock)
		l := leased(t, pending, probation, unlock)
		var want time.Time
		ends := func(word string, length time.Duration) {
			if end := window(word, length).Until.Add(time.Second); word != none && (want.IsZero() || end.Before(want)) {
				want = end
			}
		}
		if pending == running {
			ends(pending, pendingLength)
		} else {
			ends(probation, probationLength)
			ends(unlock, unlockLength)
		}
		due := l.Due(now)
		if !due.Equal(want) {
			t.Errorf("%s: due %v, want %v", name, due, want)
		}
		if want.IsZero() || pending == over || probation == over || unlock == over {
			continue
		}
		for _, early := range []time.Duration{time.Second, 0} {
			left := due.Sub(now.Time) - early
			m := firewall.Moment{Time: now.Time.Add(left), Boot: now.Boot, Uptime: now.Uptime + left}
			after, err := l.Next(Tick{}, m)
			p, c, u := words(after, now)
			changed := p != pending
			if pending == none { // while a change is pending, nothing else expires
				changed = c != probation || u != unlock
			}
			if err != nil || changed != (early == 0) {
				t.Errorf("%s: a tick %v before it is due makes %s, %s, %s: %v", name, early, p, c, u, err)
			}
		}
	}
}

// TestDueFollowsTheUptime checks that within a boot, setting the clock does not move the end.
func TestDueFollowsTheUptime(t *testing.T) {
	l := leased(t, running, none, none)
	m := now
	m.Uptime += 10 * time.Minute // and the clock was set back by as much
	if due, want := l.Due(m), now.Time.Add(19*time.Minute+time.Second); !due.Equal(want) {
		t.Errorf("due %v, want %v", due, want)
	}
}

// TestDueKnowsTimedSettings checks that temporary settings are due too.
func TestDueKnowsTimedSettings(t *testing.T) {
	l := leased(t, none, none, running)
	l.State.Desired.Open = []firewall.Service{{Name: "x", Until: now.Time.Add(3 * time.Minute)}}
	l.State.Desired.SSH.Timed = []firewall.TimedSource{{Until: now.Time.Add(2 * time.Minute)}}
	if due, want := l.Due(now), now.Time.Add(2*time.Minute+time.Second); !due.Equal(want) {
		t.Errorf("due %v, want %v", due, want)
	}
}

// TestProbationBeginsWithItsRules checks that a new probation begins when its rules are loaded, and
// that one that continues does not begin again.
func TestProbationBeginsWithItsRules(t *testing.T) {
	l := leased(t, none, running, none)
	other := leased(t, none, over, none).State
	loaded := now
	loaded.Uptime += time.Second
	reboot := loaded
	reboot.Boot = "c"
	for _, tt := range []struct {
		name     string
		next     store.State
		previous *store.State
		at       firewall.Moment
		begins   bool
	}{
		{"first", l.State, nil, loaded, true},
		{"another", l.State, &other, loaded, true},
		{"the same", l.State, &l.State, loaded, false},
		{"of another boot", l.State, nil, reboot, false},
		{"none", state(t, "203.0.113.9/32"), nil, loaded, false},
	} {
		before := tt.next.Desired.SSH.Probation
		got := BeginProbation(tt.next, tt.previous, tt.at).Desired.SSH.Probation
		if !tt.begins {
			if got != before {
				t.Errorf("%s: %+v", tt.name, got)
			}
			continue
		}
		if got.Began != loaded.Uptime || got.Ends != before.Ends || got == before || before.Began == loaded.Uptime {
			t.Errorf("%s: %+v of %+v", tt.name, got, before)
		}
	}
}

// TestWithoutRuleLeavesTheEndToTheService checks that the service ends a probation if the kernel
// does not support rules that begin at a time.
func TestWithoutRuleLeavesTheEndToTheService(t *testing.T) {
	l := leased(t, none, running, none)
	silent, ok := WithoutRule(l.State)
	if p := silent.Desired.SSH.Probation; !ok || !p.NoRule || p.Window != l.State.Desired.SSH.Probation.Window || l.State.Desired.SSH.Probation.NoRule {
		t.Fatalf("%v, %+v", ok, p)
	}
	for _, f := range firewall.Families {
		for _, c := range silent.Ruleset.Chains(f) {
			for _, r := range c.Rules {
				if !r.Since.IsZero() {
					t.Errorf("%v: a rule begins at %v", f, r.Since)
				}
			}
		}
	}
	if l.State.Ruleset.Equal(silent.Ruleset) {
		t.Error("the rules are the same")
	}
	for name, st := range map[string]store.State{"again": silent, "no probation": state(t, "203.0.113.9/32")} {
		if same, ok := WithoutRule(st); ok || !reflect.DeepEqual(same, st) {
			t.Errorf("%s: %v", name, ok)
		}
	}
	// The end is the same as with the rule.
	late := firewall.Moment{Time: now.Time.Add(time.Hour), Boot: now.Boot, Uptime: now.Uptime + time.Hour}
	after, err := Lease{State: silent}.Next(Tick{}, late)
	if _, probation, _ := words(after, now); err != nil || probation != anySSH {
		t.Errorf("%s, %v", probation, err)
	}
}

func TestDetectedEndsWithTheConfirmation(t *testing.T) {
	for word, want := range map[string]bool{none: false, running: true, over: true} {
		l := leased(t, none, word, none)
		if got := Detected(l.State.At(now)); got != want {
			t.Errorf("probation %s: %v", word, got)
		}
		if word == none {
			continue
		}
		if after, err := l.Next(ConfirmClient{By: "test"}, now); err != nil || Detected(after.State) {
			t.Errorf("confirmed: %v", err)
		}
	}
}

// from returns a session that began some time before now; if ago is zero, when is unknown.
func from(addr string, ago time.Duration) *host.Session {
	s := &host.Session{Addr: netip.MustParseAddr(addr)}
	if ago > 0 {
		s.Began = now.Uptime - ago
	}
	return s
}
