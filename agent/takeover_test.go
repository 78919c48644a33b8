package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// fakeManagers are others that, when they stop, flush the kernel as firewalld
// does, and when they start too.
type fakeManagers struct {
	bench *bench
	step  func(op, name string) error
	list  []string        // that are here
	up    map[string]bool // those that are active and enabled
	gone  bool            // removed from the machine
	idle  bool            // not active, but enabled
	exits []string        // what the kernel was like when one flushed it
}

func (m *fakeManagers) Find([]string) ([]firewall.Manager, error) {
	var out []firewall.Manager
	for _, name := range m.list {
		if m.up[name] {
			out = append(out, firewall.Manager{Name: name, Active: !m.idle, Enabled: true})
		}
	}
	return out, nil
}

func (m *fakeManagers) Record(_ context.Context, st firewall.Manager) (firewall.ManagerBefore, error) {
	return firewall.ManagerBefore{Name: st.Name, Units: []firewall.UnitBefore{{Name: st.Name + ".service", Enabled: true, Active: true}}}, m.step("record", st.Name)
}

func (m *fakeManagers) flush() {
	if m.idle {
		return
	}
	k := m.bench.kernel
	m.exits = append(m.exits, fmt.Sprintf("guard %v, yielded %v", m.bench.guard.up, k.yielded))
	k.rules = firewall.Ruleset{}
}

func (m *fakeManagers) Stop(_ context.Context, rec firewall.ManagerBefore, active bool) error {
	if err := m.step("disable", rec.Name); err != nil {
		return err
	}
	m.flush()
	m.up[rec.Name] = false
	return m.step("mask", rec.Name)
}

func (m *fakeManagers) Restore(_ context.Context, rec firewall.ManagerBefore, _ bool) (bool, error) {
	if err := m.step("restore", rec.Name); err != nil {
		return false, err
	}
	if m.gone {
		return true, nil
	}
	if !m.up[rec.Name] {
		m.flush()
	}
	m.up[rec.Name] = true
	return false, nil
}

type fakeGuard struct {
	step func(op, name string) error
	up   bool
	err  error
}

func (g *fakeGuard) Raise(r firewall.Ruleset, _ []firewall.Family) error {
	if err := errors.Join(g.err, r.Check(), g.step("raise", "")); err != nil {
		return err
	}
	g.up = true
	return nil
}

func (g *fakeGuard) Lower() error {
	if err := g.step("lower", ""); err != nil {
		return err
	}
	g.up = false
	return nil
}

func (g *fakeGuard) Up() bool { return g.up }

// Every step of a takeover fails once, at bootstrap and later; each time the
// others, the rules and the files are as they were.
func TestTakeOverAllOrNothing(t *testing.T) {
	for _, later := range []bool{false, true} {
		for n, done := 1, false; !done; n++ {
			b := newBench(t)
			next, o := decided(t, "203.0.113.9/32"), options()
			if later {
				if _, err := b.agent.Converge(context.Background(), next, o); err != nil {
					t.Fatal(err)
				}
				o = Options{Service: true}
			}
			b.others.list = []string{"firewalld", "ufw"}
			b.others.up = map[string]bool{"firewalld": true, "ufw": true}
			o.TakeOver = true
			before, rules := b.files(t), b.kernel.rules
			b.steps, b.fail = nil, n
			out, err := b.agent.Converge(context.Background(), next, o)
			if len(b.steps) < n {
				done = true
				if err != nil || !out.Changed || len(out.Others) != 2 {
					t.Fatalf("nothing was broken, but: %v, %+v", err, out)
				}
				if n < 14 {
					t.Errorf("only %d steps were walked through", n)
				}
				if b.others.up["firewalld"] || b.others.up["ufw"] || !b.kernel.rules.Equal(next.Ruleset) || b.kernel.yielded || b.guard.up {
					t.Errorf("later %v: %+v, guard %v", later, b.others.up, b.guard.up)
				}
				org, err := b.agent.Store.LoadOriginal()
				if err != nil || len(org.Managers) != 2 {
					t.Errorf("recorded: %+v, %v", org.Managers, err)
				}
			} else if err == nil && slices.Index(b.steps, "lower ") < n-1 {
				// What is left then is to tell the service.
			} else {
				if !errors.Is(err, fs.ErrPermission) {
					t.Fatalf("later %v, %s: %v", later, b.steps[n-1], err)
				}
				if diff := cmp.Diff(before, b.files(t)); diff != "" {
					t.Errorf("later %v, %s failed: files differ (-before +after):\n%s", later, b.steps[n-1], diff)
				}
				if !b.kernel.rules.Equal(rules) || b.kernel.yielded || b.guard.up && b.steps[n-1] != "lower " {
					t.Errorf("later %v, %s failed: other rules, or yielded %v, or guard %v", later, b.steps[n-1], b.kernel.yielded, b.guard.up)
				}
				if !b.others.up["firewalld"] || !b.others.up["ufw"] {
					t.Errorf("later %v, %s failed: up: %v", later, b.steps[n-1], b.others.up)
				}
			}
			for _, e := range b.others.exits {
				if e != "guard true, yielded true" {
					t.Errorf("later %v, step %d: another flushed all while %s", later, n, e)
				}
			}
		}
	}
}

// The way back fails too: what keeps the machine closed stays.
func TestTakeOverNoWayBack(t *testing.T) {
	b := newBench(t)
	b.others.list, b.others.up = []string{"ufw"}, map[string]bool{"ufw": true}
	step := b.others.step
	b.others.step = func(op, name string) error {
		if op == "mask" || op == "restore" {
			return fs.ErrPermission
		}
		return step(op, name)
	}
	o := options()
	o.TakeOver = true
	_, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), o)
	if err == nil || !strings.Contains(err.Error(), "table "+GuardTable) || !b.guard.up {
		t.Fatalf("%v, guard %v", err, b.guard.up)
	}
	var takeOver *TakeOverError
	if !errors.As(err, &takeOver) {
		t.Errorf("%v is no TakeOverError", err)
	}
	// Whatever succeeds next takes it down.
	b.others.step, b.others.up = step, map[string]bool{}
	if out, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), o); err != nil || !out.Changed || b.guard.up {
		t.Errorf("%v, changed %v, guard %v", err, out.Changed, b.guard.up)
	}
	b.guard.up = true
	r, err := b.agent.Verify(context.Background(), noPorts)
	if err != nil || len(r.Drift) != 1 || !strings.Contains(r.Drift[0].String(), GuardTable) {
		t.Fatalf("%v, %v", r.Drift, err)
	}
	if _, err := b.agent.Mend(context.Background(), r); err != nil || b.guard.up {
		t.Errorf("the repair: %v, guard %v", err, b.guard.up)
	}
}

// Others that are left alone.
func TestRefuseConflict(t *testing.T) {
	for name, tt := range map[string]struct {
		spoil func(b *bench, o *Options)
		want  string
	}{
		"the settings say so":    {func(_ *bench, o *Options) { o.Refuse = true }, "systemctl disable --now firewalld"},
		"nothing to guard it by": {func(b *bench, o *Options) { b.guard.err, o.TakeOver = errors.New("no nf_tables"), true }, "no nf_tables"},
	} {
		b := newBench(t)
		b.others.list, b.others.up = []string{"firewalld"}, map[string]bool{"firewalld": true}
		o := options()
		tt.spoil(b, &o)
		before := b.files(t)
		_, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), o)
		var conflict *ConflictError
		if !errors.As(err, &conflict) || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(before, b.files(t)); diff != "" || !b.others.up["firewalld"] || len(b.others.exits) > 0 || !b.kernel.rules.IsZero() {
			t.Errorf("%s: not as before: %s", name, diff)
		}
	}
	// One that is not active needs no guard.
	b := newBench(t)
	b.others.list, b.others.up, b.others.idle = []string{"firewalld"}, map[string]bool{"firewalld": true}, true
	b.guard.err = errors.New("no nf_tables")
	o := options()
	o.TakeOver = true
	if _, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), o); err != nil || b.others.up["firewalld"] || slices.Contains(b.steps, "yield ") {
		t.Errorf("%v, up %v, steps %q", err, b.others.up, b.steps)
	}

	b = newBench(t)
	if _, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), options()); err != nil {
		t.Fatal(err)
	}
	b.others.list, b.others.up = []string{"firewalld"}, map[string]bool{"firewalld": true}
	o = Options{TakeOver: true}
	if _, err := b.agent.Try(context.Background(), decided(t, "203.0.113.10/32"), time.Minute, o); err == nil || !strings.Contains(err.Error(), "basicfw-agent apply") {
		t.Errorf("for a time: %v", err)
	}
}

// Uninstall has the others back as they were first; a failure leaves ours.
func TestUninstallGivesBackOthers(t *testing.T) {
	for _, gone := range []bool{false, true} {
		for n := range 3 {
			b := newBench(t)
			b.others.list, b.others.up = []string{"ufw"}, map[string]bool{"ufw": true}
			o := options()
			o.TakeOver = true
			before := b.files(t)
			if _, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), o); err != nil {
				t.Fatal(err)
			}
			b.others.gone = gone
			if n == 1 {
				b.fail = len(b.steps) + 1 + slices.Index([]string{"restore"}, "restore")
			}
			err := b.agent.Uninstall(context.Background())
			if n == 1 {
				if !errors.Is(err, fs.ErrPermission) || b.others.up["ufw"] || b.kernel.rules.IsZero() || !b.service.there {
					t.Errorf("the start failed: %v, up %v, service %v", err, b.others.up, b.service.there)
				}
				err = b.agent.Uninstall(context.Background())
			}
			if err != nil || b.others.up["ufw"] == gone || !b.kernel.rules.IsZero() {
				t.Errorf("gone %v: %v, up %v", gone, err, b.others.up)
			}
			if diff := cmp.Diff(before, b.files(t)); diff != "" {
				t.Errorf("files differ (-before +after):\n%s", diff)
			}
		}
	}
}

// Status names those that are active, and what follows.
func TestStatusOfOthers(t *testing.T) {
	b := newBench(t)
	if _, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), options()); err != nil {
		t.Fatal(err)
	}
	b.others.list, b.others.up = []string{"firewalld"}, map[string]bool{"firewalld": true}
	b.kernel.rules = firewall.Ruleset{} // flushed by it
	for _, tt := range []struct {
		takeOver bool
		next     string
	}{{true, "basicfw-agent apply"}, {false, "systemctl disable --now firewalld"}} {
		s, err := b.agent.Status(context.Background(), Facts{SSHPorts: []uint16{22}, TakeOver: tt.takeOver, Closing: []string{"inet filter input"}})
		if !slices.ContainsFunc(s.Warnings, func(w string) bool { return strings.HasPrefix(w, "chain inet filter input of nftables closes") }) {
			t.Errorf("warnings %q", s.Warnings)
		}
		if err != nil || !slices.Equal(s.Conflicts, []string{"firewalld"}) || len(s.Next) == 0 || s.Next[0] != tt.next ||
			!slices.ContainsFunc(s.Warnings, func(w string) bool {
				return strings.HasPrefix(w, "firewalld is active too") && strings.HasSuffix(w, tt.next)
			}) {
			t.Errorf("%v: conflicts %q, next %q, warnings %q", err, s.Conflicts, s.Next, s.Warnings)
		}
	}
}

// The service takes down a guard that was left behind.
func TestLookTakesDownGuard(t *testing.T) {
	w := newWatched(t)
	w.guard.up = true
	if changed, err := w.look(context.Background()); !changed || err != nil || w.guard.up {
		t.Errorf("changed %v, %v, guard %v", changed, err, w.guard.up)
	}
	if changed, err := w.look(context.Background()); changed || err != nil {
		t.Errorf("another look changes: %v, %v", changed, err)
	}
}
