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
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/test/fake"
)

// Every step of a takeover fails once, at bootstrap and later. Each time, the other
// managers, the rules and the files are as before.
func TestTakeOverIsAllOrNothing(t *testing.T) {
	for _, later := range []bool{false, true} {
		for n, done := 1, false; !done; n++ {
			m := fake.New(t)
			next, o := fake.Decided(t, "203.0.113.9/32"), fake.Options()
			if later {
				m.Install(t, next)
				o = apply.Options{Service: true}
			}
			m.Conflicts.Add("firewalld", "ufw")
			o.TakeOver = true
			before, rules := m.Contents(t), m.Kernel.Rules
			m.BreakFrom(n)
			out, err := m.Apply(context.Background(), next, o)
			up := m.Conflicts.Up
			if len(m.Steps) < n {
				done = true
				if err != nil || !out.Changed || len(out.Others) != 2 {
					t.Fatalf("no step failed: %v, %+v", err, out)
				}
				if n < 14 {
					t.Errorf("only %d steps", n)
				}
				if up["firewalld"] || up["ufw"] || !m.Kernel.Rules.Equal(next.Ruleset) || m.Kernel.Yielded || m.Guard.Raised {
					t.Errorf("later %v: %+v, guard %v", later, up, m.Guard.Raised)
				}
				org, err := m.Store.LoadBackup()
				if err != nil || len(org.Conflicts) != 2 {
					t.Errorf("recorded: %+v, %v", org.Conflicts, err)
				}
			} else if err == nil && slices.Index(m.Steps, "lower ") < n-1 {
				// All that is left is to notify the service.
			} else {
				step := m.Steps[n-1]
				if !errors.Is(err, fs.ErrPermission) {
					t.Fatalf("later %v, %s: %v", later, step, err)
				}
				if diff := cmp.Diff(before, m.Contents(t)); diff != "" {
					t.Errorf("later %v, %s failed: files differ (-before +after):\n%s", later, step, diff)
				}
				if !m.Kernel.Rules.Equal(rules) || m.Kernel.Yielded || m.Guard.Raised && step != "lower " {
					t.Errorf("later %v, %s failed: the rules differ, or yielded %v, or guard %v", later, step, m.Kernel.Yielded, m.Guard.Raised)
				}
				if !up["firewalld"] || !up["ufw"] {
					t.Errorf("later %v, %s failed: up: %v", later, step, up)
				}
			}
			for _, f := range m.Conflicts.Flushes {
				if f != "guard true, yielded true" {
					t.Errorf("later %v, step %d: another program flushed everything while %s", later, n, f)
				}
			}
		}
	}
}

// If the rollback fails too, the guard stays until a change or repair succeeds.
func TestGuardStaysIfRollbackFails(t *testing.T) {
	m := fake.New(t)
	m.Conflicts.Add("ufw")
	step := m.Conflicts.Step
	m.Conflicts.Step = func(op, name string) error {
		if op == "mask" || op == "restore" {
			return fs.ErrPermission
		}
		return step(op, name)
	}
	o := fake.Options()
	o.TakeOver = true
	_, err := m.Apply(context.Background(), fake.Decided(t, "203.0.113.9/32"), o)
	if err == nil || !strings.Contains(err.Error(), "table "+apply.GuardTable) || !m.Guard.Raised {
		t.Fatalf("%v, guard %v", err, m.Guard.Raised)
	}
	var takeOver *apply.TakeOverError
	if !errors.As(err, &takeOver) {
		t.Errorf("%v is not a TakeOverError", err)
	}
	m.Conflicts.Step, m.Conflicts.Up = step, nil
	if out, err := m.Apply(context.Background(), fake.Decided(t, "203.0.113.9/32"), o); err != nil || !out.Changed || m.Guard.Raised {
		t.Errorf("%v, changed %v, guard %v", err, out.Changed, m.Guard.Raised)
	}
	m.Guard.Raised = true
	r, err := m.Verify(context.Background(), fake.NoPorts)
	if err != nil || len(r.Drift) != 1 || !strings.Contains(r.Drift[0].String(), apply.GuardTable) {
		t.Fatalf("%v, %v", r.Drift, err)
	}
	if _, err := m.Repair(context.Background(), r); err != nil || m.Guard.Raised {
		t.Errorf("the repair: %v, guard %v", err, m.Guard.Raised)
	}
}

func TestConflictChangesNothing(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(m *fake.Machine, o *apply.Options)
		want  string
	}{
		"refused by the settings": {func(_ *fake.Machine, o *apply.Options) { o.Refuse = true }, "systemctl disable --now firewalld"},
		"no guard":                {func(m *fake.Machine, o *apply.Options) { m.Guard.Err, o.TakeOver = errors.New("no nf_tables"), true }, "no nf_tables"},
	} {
		m := fake.New(t)
		m.Conflicts.Add("firewalld")
		o := fake.Options()
		tt.spoil(m, &o)
		before := m.Contents(t)
		_, err := m.Apply(context.Background(), fake.Decided(t, "203.0.113.9/32"), o)
		var conflict *apply.ConflictError
		if !errors.As(err, &conflict) || !strings.Contains(err.Error()+hint.Of(err), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(before, m.Contents(t)); diff != "" || !m.Conflicts.Up["firewalld"] || len(m.Conflicts.Flushes) > 0 || !m.Kernel.Rules.IsZero() {
			t.Errorf("%s: not as before: %s", name, diff)
		}
	}
}

func TestInactiveManagerNeedsNoGuard(t *testing.T) {
	m := fake.New(t)
	m.Conflicts.Add("firewalld")
	m.Conflicts.Idle, m.Guard.Err = true, errors.New("no nf_tables")
	o := fake.Options()
	o.TakeOver = true
	if _, err := m.Apply(context.Background(), fake.Decided(t, "203.0.113.9/32"), o); err != nil || m.Conflicts.Up["firewalld"] || slices.Contains(m.Steps, "yield ") {
		t.Errorf("%v, up %v, steps %q", err, m.Conflicts.Up, m.Steps)
	}
}

// Nothing would restore another firewall manager in time.
func TestTryTakesNothingOver(t *testing.T) {
	m := fake.New(t)
	m.Install(t, fake.Decided(t, "203.0.113.9/32"))
	m.Conflicts.Add("firewalld")
	_, err := m.Try(context.Background(), fake.Decided(t, "203.0.113.10/32"), time.Minute, apply.Options{TakeOver: true})
	if err == nil || !strings.Contains(hint.Of(err), "basicfw-agent apply") {
		t.Errorf("%v", err)
	}
}

// Uninstall restores the other managers as they were at first. A failure leaves our
// rules in force.
func TestUninstallRestoresManagers(t *testing.T) {
	for _, gone := range []bool{false, true} {
		for n := range 3 {
			m := fake.New(t)
			m.Conflicts.Add("ufw")
			o := fake.Options()
			o.TakeOver = true
			before := m.Contents(t)
			if _, err := m.Apply(context.Background(), fake.Decided(t, "203.0.113.9/32"), o); err != nil {
				t.Fatal(err)
			}
			m.Conflicts.Gone = gone
			step := m.Conflicts.Step
			if n == 1 {
				m.Conflicts.Step = func(op, name string) error {
					if op == "restore" {
						return fs.ErrPermission
					}
					return step(op, name)
				}
			}
			err := m.Uninstall(context.Background())
			if n == 1 {
				if !errors.Is(err, fs.ErrPermission) || m.Conflicts.Up["ufw"] || m.Kernel.Rules.IsZero() || !m.Service.Registered {
					t.Errorf("failed start: %v, up %v, service %v", err, m.Conflicts.Up, m.Service.Registered)
				}
				m.Conflicts.Step = step
				err = m.Uninstall(context.Background())
			}
			if err != nil || m.Conflicts.Up["ufw"] == gone || !m.Kernel.Rules.IsZero() {
				t.Errorf("gone %v: %v, up %v", gone, err, m.Conflicts.Up)
			}
			if diff := cmp.Diff(before, m.Contents(t)); diff != "" {
				t.Errorf("files differ (-before +after):\n%s", diff)
			}
		}
	}
}
