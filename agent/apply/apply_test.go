package apply_test

import (
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/test/fake"
)

// Every step of a first bootstrap, and of a later change, fails once. Each time, rules,
// files and service are as before.
func TestChangeIsAllOrNothing(t *testing.T) {
	stock := "*filter\n:INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n-A INPUT -j REJECT\nCOMMIT\n"
	for _, later := range []bool{false, true} {
		for n, done := 1, false; !done; n++ {
			m := fake.New(t)
			m.Write(t, "/etc/sysconfig/iptables", stock)
			m.Kernel.Foreign = []firewall.Foreign{{Family: "ipv4", Chain: "INPUT", Rule: "-j REJECT"}}
			next, o := fake.Decided(t, "203.0.113.9/32"), fake.Options()
			if later {
				m.Install(t, next)
				next = fake.Decided(t, "198.51.100.7/32")
				o.Clear = false
				o.Files[0].Data = []byte("[ssh]\nallow = any\n")
			}
			before, rules, registered := m.Contents(t), m.Kernel.Rules, m.Service.Registered
			m.BreakFrom(n)
			out, err := m.Apply(context.Background(), next, o)
			if len(m.Steps) < n {
				done = true
				if err != nil || !out.Changed {
					t.Fatalf("no step failed: %v, changed %v", err, out.Changed)
				}
				if !later && n < 12 {
					t.Errorf("only %d steps", n)
				}
				break
			}
			if !errors.Is(err, fs.ErrPermission) {
				t.Fatalf("later %v, %s: %v", later, m.Steps[n-1], err)
			}
			if diff := cmp.Diff(before, m.Contents(t)); diff != "" {
				t.Errorf("later %v, %s failed: files differ (-before +after):\n%s", later, m.Steps[n-1], diff)
			}
			if !m.Kernel.Rules.Equal(rules) {
				t.Errorf("later %v, %s failed: the rules differ", later, m.Steps[n-1])
			}
			if m.Service.Registered != registered {
				t.Errorf("later %v, %s failed: service registered: %v, was %v", later, m.Steps[n-1], m.Service.Registered, registered)
			}
		}
	}
}

// A change that fails on a machine without its backup deletes nothing: neither on one that was
// bootstrapped, nor what someone keeps in the directory of the state.
func TestFailedChangeWithoutBackup(t *testing.T) {
	for _, installed := range []bool{true, false} {
		for n, done := 1, false; !done; n++ {
			m := fake.New(t)
			if installed {
				m.Install(t, fake.Decided(t, "203.0.113.9/32"))
				if err := m.Store.RemoveBackup(); err != nil {
					t.Fatal(err)
				}
			}
			m.Write(t, store.StateFile+".broken", "{")
			m.Write(t, store.Dir+"/backup/notes", "mine")
			before := m.Contents(t)
			m.BreakFrom(n)
			_, err := m.Apply(context.Background(), fake.Decided(t, "198.51.100.7/32"), fake.Options())
			if done = len(m.Steps) < n; done {
				if err != nil {
					t.Fatal(err)
				}
				continue
			}
			if diff := cmp.Diff(before, m.Contents(t)); err == nil || diff != "" {
				t.Errorf("installed %v, %s failed: %v, files differ (-before +after):\n%s", installed, m.Steps[n-1], err, diff)
			}
		}
	}
}

// A completed change that fails its proof is rolled back.
func TestFailedProofRollsBack(t *testing.T) {
	m := fake.New(t)
	before := m.Contents(t)
	o, proved := fake.Options(), false
	o.Prove = func(_ context.Context, st store.State) error {
		proved = m.Kernel.Rules.Equal(st.Ruleset) && m.Service.Registered && m.System.Exists(store.StateFile)
		return errors.New("a packet came through")
	}
	_, err := m.Apply(context.Background(), fake.Decided(t, "203.0.113.9/32"), o)
	var failed *backend.Error
	if !errors.As(err, &failed) || !proved {
		t.Errorf("%v; proof called after all steps: %v", err, proved)
	}
	if diff := cmp.Diff(before, m.Contents(t)); diff != "" || !m.Kernel.Rules.IsZero() || m.Service.Registered {
		t.Errorf("not rolled back: %s", diff)
	}
}

// effect is a Proof that refuses rules which open a port, predicted or loaded.
type effect struct {
	m    *fake.Machine
	own  exposure.Ruleset
	port string
}

func (e effect) check(r exposure.Ruleset) error {
	for _, t := range r.Tables {
		for _, c := range t.Chains {
			if slices.ContainsFunc(c.Rules, func(r exposure.Rule) bool { return strings.Contains(r.Text, " --dport "+e.port+" ") }) {
				return errors.New("port " + e.port)
			}
		}
	}
	return nil
}

func (e effect) Begin(ctx context.Context, predict func(live, own exposure.Ruleset) exposure.Ruleset) error {
	live, err := e.m.Kernel.Live(ctx)
	if err != nil || predict == nil {
		return err
	}
	return e.check(predict(live, e.own))
}

func (e effect) End(ctx context.Context) error { return e.Test(ctx) }

func (e effect) Test(ctx context.Context) error {
	live, err := e.m.Kernel.Live(ctx)
	return errors.Join(err, e.check(live))
}

// A change whose predicted effect is refused loads nothing. What another manager leaves is
// not known before: then it is rolled back.
func TestEffectIsCheckedBeforeLoading(t *testing.T) {
	for _, takeOver := range []bool{false, true} {
		m := fake.New(t)
		before := m.Contents(t)
		o := fake.Options()
		o.TakeOver = takeOver
		if takeOver {
			m.Conflicts.Add("firewalld")
		}
		next := fake.Decided(t, "203.0.113.9/32")
		o.Proof = effect{m, iptables.Model(next.Ruleset), "22"}
		_, planErr := m.Plan(context.Background(), next, o)
		_, err := m.Apply(context.Background(), next, o)
		var refused *apply.RefusedError
		if !errors.As(err, &refused) || !takeOver && !errors.As(planErr, &refused) {
			t.Errorf("%v, planned: %v", err, planErr)
		}
		if diff := cmp.Diff(before, m.Contents(t)); diff != "" || !m.Kernel.Rules.IsZero() {
			t.Errorf("not rolled back: %s", diff)
		}
		if loaded := m.Kernel.Loads > 0; loaded != takeOver {
			t.Errorf("takeover %v: loaded %v", takeOver, loaded)
		}
	}
}

func TestSecondApplyChangesNothing(t *testing.T) {
	m := fake.New(t)
	next := fake.Decided(t, "203.0.113.9/32")
	for i := range 2 {
		before := m.Contents(t)
		m.Steps = nil
		out, err := m.Apply(context.Background(), next, fake.Options())
		if err != nil {
			t.Fatal(err)
		}
		if i == 1 && (out.Changed || len(m.Steps) > 0) {
			t.Errorf("the second Apply: %v", m.Steps)
			t.Error(cmp.Diff(before, m.Contents(t)))
		}
	}
}

// Plan changes nothing and returns what Apply then does.
func TestPlanIsWhatApplyDoes(t *testing.T) {
	m := fake.New(t)
	m.Kernel.Foreign = []firewall.Foreign{{Family: "ipv4", Chain: "INPUT", Rule: "-j REJECT"}}
	next := fake.Decided(t, "203.0.113.9/32")
	plan, err := m.Plan(context.Background(), next, fake.Options())
	if err != nil || len(m.Steps) > 0 || !plan.Changed || len(plan.Written) == 0 || len(plan.Removed) != 1 || !plan.Registered {
		t.Errorf("%v; steps %q; %+v", err, m.Steps, plan)
	}
	out, err := m.Apply(context.Background(), next, fake.Options())
	if err != nil {
		t.Fatal(err)
	}
	type visible struct {
		Written, Deleted    []string
		Removed             []firewall.Foreign
		Registered, Changed bool
	}
	see := func(o apply.Outcome) visible {
		return visible{o.Written, o.Deleted, o.Removed, o.Registered, o.Changed}
	}
	if diff := cmp.Diff(see(plan), see(out)); diff != "" {
		t.Errorf("(-planned +applied):\n%s", diff)
	}
	if plan, err = m.Plan(context.Background(), next, fake.Options()); err != nil || plan.Changed {
		t.Errorf("after Apply: %v, changed %v", err, plan.Changed)
	}
}
