package apply_test

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/lease"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/test/fake"
)

// trying returns a machine with a change that is pending for a minute.
func trying(t *testing.T) (m *fake.Machine, former, next store.State) {
	t.Helper()
	m = fake.New(t)
	m.Now = firewall.Moment{Time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), Boot: "b", Uptime: time.Hour}
	former, next = m.Install(t, fake.Decided(t, "203.0.113.9/32")), fake.Decided(t, "198.51.100.7/32")
	if out, err := m.Try(context.Background(), next, time.Minute, apply.Options{}); err != nil || !out.Changed {
		t.Fatalf("%v, changed %v", err, out.Changed)
	}
	return m, former, next
}

// later advances a machine's time.
func later(m *fake.Machine, d time.Duration) {
	m.Now.Time, m.Now.Uptime = m.Now.Time.Add(d), m.Now.Uptime+d
}

// While a change is pending, its rules are loaded and a boot finds the previous ones.
func TestTryKeepsTheState(t *testing.T) {
	m, former, next := trying(t)
	st, err := m.Store.Load()
	if err != nil || !st.Ruleset.Equal(former.Ruleset) || !m.Kernel.Rules.Equal(next.Ruleset) {
		t.Errorf("the state has the change, or the kernel lacks it: %v", err)
	}
	if file := m.Contents(t)["/etc/sysconfig/iptables"]; !strings.Contains(file, "203.0.113.9") || strings.Contains(file, "198.51.100.7") {
		t.Errorf("the persisted file is %s", file)
	}
	var waits *apply.PendingError
	if err := m.RefusePending(); !errors.As(err, &waits) || !waits.Until.Equal(m.Now.Time.Add(time.Minute)) {
		t.Errorf("another change is not refused: %v", err)
	}
	if _, err := m.Try(context.Background(), fake.Decided(t, "198.51.100.8/32"), time.Minute, apply.Options{}); !errors.As(err, &waits) {
		t.Errorf("another change can be tried: %v", err)
	}
	later(m, 30*time.Second)
	if _, err := m.Try(context.Background(), next, time.Minute, apply.Options{}); err != nil {
		t.Errorf("the same change cannot be tried again: %v", err)
	}
	if err := m.RefusePending(); !errors.As(err, &waits) || !waits.Until.Equal(m.Now.Time.Add(time.Minute)) {
		t.Errorf("its time does not restart: %v", err)
	}
}

// What rolls back the change is started when that is recorded and before its rules are
// loaded. If it cannot be started, nothing changes.
func TestTryIsWatchedFromTheBeginning(t *testing.T) {
	for _, failed := range []error{nil, fs.ErrPermission} {
		m := fake.New(t)
		former := m.Install(t, fake.Decided(t, "203.0.113.9/32"))
		before := m.Contents(t)
		watched := false
		_, err := m.Try(context.Background(), fake.Decided(t, "198.51.100.7/32"), time.Minute, apply.Options{Watch: func() error {
			watched = m.System.Exists(store.PendingFile) && m.Kernel.Rules.Equal(former.Ruleset)
			return failed
		}})
		if !errors.Is(err, failed) || !watched {
			t.Errorf("%v, watched %v", err, watched)
		}
		if diff := cmp.Diff(before, m.Contents(t)); failed != nil && (diff != "" || !m.Kernel.Rules.Equal(former.Ruleset)) {
			t.Errorf("not as before: %s", diff)
		}
	}
}

// Every step of a try fails once. Each time, rules and files are as before.
func TestTryIsAllOrNothing(t *testing.T) {
	for n, done := 1, false; !done; n++ {
		m := fake.New(t)
		former := m.Install(t, fake.Decided(t, "203.0.113.9/32"))
		before := m.Contents(t)
		m.BreakFrom(n)
		_, err := m.Try(context.Background(), fake.Decided(t, "198.51.100.7/32"), time.Minute, apply.Options{})
		if done = len(m.Steps) < n; done {
			if err != nil || n < 5 {
				t.Errorf("%v after %d steps", err, n)
			}
			continue
		}
		if !errors.Is(err, fs.ErrPermission) {
			t.Fatalf("%s: %v", m.Steps[n-1], err)
		}
		if diff := cmp.Diff(before, m.Contents(t)); diff != "" || !m.Kernel.Rules.Equal(former.Ruleset) {
			t.Errorf("%s failed: not as before: %s", m.Steps[n-1], diff)
		}
	}
}

func TestConfirmKeepsTheChange(t *testing.T) {
	m, _, next := trying(t)
	if _, err := m.Confirm(context.Background()); err != nil {
		t.Fatal(err)
	}
	st, err := m.Store.Load()
	if err != nil || !st.Ruleset.Equal(next.Ruleset) || m.System.Exists(store.PendingFile) {
		t.Errorf("the state differs, or a change is still pending: %v", err)
	}
	if file := m.Contents(t)["/etc/sysconfig/iptables"]; !strings.Contains(file, "198.51.100.7") {
		t.Errorf("the persisted file is %s", file)
	}
	later(m, time.Hour)
	if expired, err := m.Expire(context.Background()); expired || err != nil || !m.Kernel.Rules.Equal(next.Ruleset) {
		t.Errorf("a confirmed change expires: %v, %v", expired, err)
	}
	if _, err := m.Confirm(context.Background()); !errors.Is(err, lease.ErrNothingPending) {
		t.Errorf("a second time: %v", err)
	}
}

// Confirming a change that equals the state only removes the pending change.
func TestConfirmOfTheState(t *testing.T) {
	m := fake.New(t)
	former := m.Install(t, fake.Decided(t, "203.0.113.9/32"))
	before := m.Contents(t)
	if err := m.Store.SavePending(store.Pending{State: former, Window: firewall.NewWindow(m.Moment(), time.Hour)}); err != nil {
		t.Fatal(err)
	}
	_, err := m.Confirm(context.Background())
	if diff := cmp.Diff(before, m.Contents(t)); diff != "" || err != nil {
		t.Errorf("%v, not as before: %s", err, diff)
	}
}

// The change is rolled back once its time is over, or once the machine was
// restarted, or on request, and not before. The state records why.
func TestExpireRollsBack(t *testing.T) {
	for _, tt := range []struct {
		name string
		pass func(m *fake.Machine) error
		why  string // "" if it still waits
	}{
		{"in time", func(m *fake.Machine) error { later(m, time.Minute); return nil }, ""},
		{"over", func(m *fake.Machine) error { later(m, time.Minute+time.Second); return nil }, "not confirmed within 1m"},
		{"over by the uptime alone", func(m *fake.Machine) error { m.Now.Uptime += time.Minute + 1; return nil }, "not confirmed within 1m"},
		{"the clock was set back", func(m *fake.Machine) error { m.Now.Time = m.Now.Time.Add(-time.Hour); return nil }, ""},
		{"the clock was set forward", func(m *fake.Machine) error { m.Now.Time = m.Now.Time.Add(time.Hour); return nil }, ""},
		{"another boot", func(m *fake.Machine) error { m.Now.Boot, m.Now.Uptime = "c", time.Minute; return nil }, "rebooted"},
		{"on request", func(m *fake.Machine) error { return m.Rollback(context.Background(), "on request") }, "on request"},
		{"unreadable", func(m *fake.Machine) error { return m.System.WriteFile(store.PendingFile, []byte("{"), 0o600) }, "cannot be read"},
	} {
		m, former, next := trying(t)
		if err := tt.pass(m); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if _, err := m.Expire(context.Background()); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		st, err := m.Store.Load()
		if err != nil || tt.why == "" != (st.RolledBack == "") || !strings.Contains(st.RolledBack, tt.why) {
			t.Errorf("%s: the state has %q, want %q; %v", tt.name, st.RolledBack, tt.why, err)
		}
		want := former.Ruleset
		if tt.why == "" {
			want = next.Ruleset
		}
		if !m.Kernel.Rules.Equal(want) || m.System.Exists(store.PendingFile) != (tt.why == "") {
			t.Errorf("%s: other rules are loaded, or pending.json exists: %v", tt.name, m.System.Exists(store.PendingFile))
		}
	}
}

// A failed rollback can be repeated: the change stays pending until the rules are restored.
func TestFailedExpireCanBeRepeated(t *testing.T) {
	for n, done := 1, false; !done; n++ {
		m, former, _ := trying(t)
		later(m, 2*time.Minute)
		m.BreakFrom(n)
		_, err := m.Expire(context.Background())
		if done = len(m.Steps) < n; done {
			if err != nil || n < 5 {
				t.Errorf("%v after %d steps", err, n)
			}
			continue
		}
		step := m.Steps[n-1]
		if err != nil && !errors.Is(err, fs.ErrPermission) {
			t.Errorf("%s: %v", step, err)
		}
		if _, err := m.Expire(context.Background()); err != nil {
			t.Errorf("%s: the second Expire: %v", step, err)
		}
		if !m.Kernel.Rules.Equal(former.Ruleset) || m.System.Exists(store.PendingFile) {
			t.Errorf("%s failed: the change is still pending", step)
		}
	}
}

// A pending change is rolled back when it expires.
func TestExpireWhenDueWaits(t *testing.T) {
	m := fake.New(t)
	former := m.Install(t, fake.Decided(t, "203.0.113.9/32"))
	if _, err := m.Try(context.Background(), fake.Decided(t, "198.51.100.7/32"), time.Second, apply.Options{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := m.ExpireWhenDue(ctx); err != nil || !m.Kernel.Rules.Equal(former.Ruleset) {
		t.Errorf("%v", err)
	}
}

// An unlock and a lock take effect at once and roll back the pending change.
func TestChangeRollsBackThePendingChange(t *testing.T) {
	m, former, _ := trying(t)
	st, _, err := m.Change(context.Background(), lease.Unlock{Length: time.Hour})
	if err != nil || st.Desired.Unlock == nil || !m.Kernel.Rules.Equal(st.Ruleset) || m.System.Exists(store.PendingFile) {
		t.Fatalf("unlock: %v, %+v", err, st.Desired.Unlock)
	}
	if !slices.Equal(former.Desired.SSH.Allow, st.Desired.SSH.Allow) {
		t.Errorf("the state is not the previous one: %v", st.Desired.SSH.Allow)
	}
	st, _, err = m.Change(context.Background(), lease.Lock{})
	if err != nil || st.Desired.Unlock != nil || !m.Kernel.Rules.Equal(former.Ruleset) {
		t.Errorf("lock: %v, %+v", err, st.Desired.Unlock)
	}
	if _, _, err := m.Change(context.Background(), lease.ConfirmClient{By: "test"}); !errors.Is(err, lease.ErrNothingPending) {
		t.Errorf("confirming a client without probation: %v", err)
	}
}
