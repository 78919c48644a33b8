package backend

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

var errStep = errors.New("step failed")

// kernel is a kernel with two engines, each with or without our rules.
type kernel struct {
	iptables, nftables bool // our rules are there
	foreign            bool // iptables has other programs' terminal rules
	fail               int  // the step that fails, from 1; 0: none
	steps              []string
	open               []bool // after each step, no engine had our rules
}

// step performs a step, which changes one of the engines.
func (k *kernel) step(name string, do func()) error {
	if k.steps = append(k.steps, name); len(k.steps) == k.fail {
		k.open = append(k.open, !k.iptables && !k.nftables)
		return fmt.Errorf("%s: %w", name, errStep)
	}
	do()
	k.open = append(k.open, !k.iptables && !k.nftables)
	return nil
}

// engine is one of the two.
type engine struct {
	k    *kernel
	name string
	has  *bool
	// beside is set if our rules do not belong there.
	beside bool
	err    error
}

func (e engine) Inspect(_ context.Context, want firewall.Ruleset) (Inspection, error) {
	in := Inspection{Backend: e.name, Present: *e.has, Snapshot: engineSnapshot{e, *e.has, e.k.foreign}}
	if *e.has != (!want.IsZero() && !e.beside) {
		in.Drift = []firewall.Drift{{Chain: e.name, Kind: firewall.Altered}}
	}
	if e.k.foreign && e.name == Iptables {
		in.Foreign = []firewall.Foreign{{Rule: "-j REJECT"}}
	}
	return in, e.err
}

func (e engine) Yield(context.Context) error { return e.k.step(e.name+" yield", func() {}) }

func (e engine) Remove(context.Context, Backup) error {
	return e.k.step(e.name+" remove", func() { *e.has = false })
}

// engineSnapshot is what one engine had.
type engineSnapshot struct {
	engine
	was, foreign bool
}

func (s engineSnapshot) Load(_ context.Context, want firewall.Ruleset, clear bool) error {
	return s.k.step(s.name+" load", func() {
		*s.has = !want.IsZero() && !s.beside
		if clear && s.name == Iptables {
			s.k.foreign = false
		}
	})
}

func (s engineSnapshot) Predict(_ context.Context, live, _ exposure.Ruleset, _ bool) exposure.Ruleset {
	return live
}

func (s engineSnapshot) Restore(context.Context, Backup) error {
	return s.k.step(s.name+" restore", func() {
		*s.has = s.was
		if s.name == Iptables {
			s.k.foreign = s.foreign
		}
	})
}

func (k *kernel) engines() Engines {
	return Engines{
		Iptables:    engine{k: k, name: Iptables, has: &k.iptables},
		Beside:      engine{k: k, name: Iptables, has: &k.iptables, beside: true},
		Nftables:    engine{k: k, name: Nftables, has: &k.nftables},
		InUse:       func() bool { return k.iptables || k.foreign },
		HasPrograms: func() bool { return true },
	}
}

func ruleset(t *testing.T) firewall.Ruleset {
	t.Helper()
	r, err := firewall.Compile(firewall.Failsafe([]uint16{22}))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A closed machine stays closed at each step of a load, of a restore and after every
// failure. After a failure the rules are where they were.
func TestLoadNeverOpensTheMachine(t *testing.T) {
	want := ruleset(t)
	for _, name := range []string{Iptables, Nftables} {
		for i := range 8 {
			before := kernel{iptables: i&1 != 0, nftables: i&2 != 0, foreign: i&4 != 0}
			closed := before.iptables || before.nftables
			for n, done := 1, false; !done; n++ {
				k := before
				k.fail = n
				text := fmt.Sprintf("%s, from %+v", name, before)
				in, err := k.engines().For(name).Inspect(context.Background(), want)
				if err != nil {
					t.Fatal(err)
				}
				err = in.Snapshot.Load(context.Background(), want, true)
				if closed && slices.Contains(k.open, true) {
					t.Errorf("%s, step %d fails: open after %q: %v", text, n, k.steps, k.open)
				}
				if done = len(k.steps) < n; !done {
					if !errors.Is(err, errStep) || k.iptables != before.iptables || k.nftables != before.nftables || k.foreign != before.foreign {
						t.Errorf("%s, step %d fails: %v, %+v", text, n, err, k)
					}
					continue
				}
				if err != nil || k.iptables != (name == Iptables) || k.nftables != (name == Nftables) || k.foreign {
					t.Errorf("%s: %v, %+v", text, err, k)
				}
				k.fail, k.open = 0, nil
				if err := in.Snapshot.Restore(context.Background(), Backup{}); err != nil || k.iptables != before.iptables || k.nftables != before.nftables || k.foreign != before.foreign {
					t.Errorf("%s: restored: %v, %+v", text, err, k)
				}
				if closed && slices.Contains(k.open, true) {
					t.Errorf("%s: restored: open after %q: %v", text, k.steps, k.open)
				}
			}
		}
	}
}

// Only the last step of a removal opens the machine. After a failure the rules are where
// they were.
func TestRemoveOpensTheMachineLast(t *testing.T) {
	old := Backup{IPv4: FamilyBackup{Removed: []string{"-j REJECT"}}}
	for _, name := range []string{Iptables, Nftables} {
		for i := range 3 {
			before := kernel{iptables: i != 1, nftables: i != 0}
			for n, done := 1, false; !done; n++ {
				k := before
				k.fail = n
				text := fmt.Sprintf("%s, from %+v, step %d fails", name, before, n)
				err := k.engines().For(name).Remove(context.Background(), old)
				if done = len(k.steps) < n; done {
					if err != nil || k.iptables || k.nftables {
						t.Errorf("%s: %v, %+v", text, err, k)
					}
					k.open = k.open[:len(k.open)-1]
				} else if !errors.Is(err, errStep) || k.iptables != before.iptables || k.nftables != before.nftables {
					t.Errorf("%s: %v, %+v", text, err, k)
				}
				if slices.Contains(k.open, true) {
					t.Errorf("%s: open after %q: %v", text, k.steps, k.open)
				}
			}
		}
	}
}

// An engine that need not change is not touched.
func TestUnusedEngineIsLeftAlone(t *testing.T) {
	want := ruleset(t)
	for _, name := range []string{Iptables, Nftables} {
		k := &kernel{iptables: name == Iptables, nftables: name == Nftables}
		e, old := k.engines(), Backup{}
		if name == Nftables { // iptables was uninstalled since
			e.HasPrograms = func() bool { return false }
			e.Beside, old.IPv4.Input = nil, firewall.Drop
		}
		in, err := e.For(name).Inspect(context.Background(), want)
		if err == nil {
			err = in.Snapshot.Load(context.Background(), want, true)
		}
		if err == nil {
			err = e.For(name).Remove(context.Background(), old)
		}
		if err != nil || slices.ContainsFunc(k.steps, func(s string) bool { return s[:len(Iptables)] != name }) {
			t.Errorf("%s: %v, %q", name, err, k.steps)
		}
	}
}

// The backend is the one that holds our rules, or could hold them.
func TestFindLooksForOurRules(t *testing.T) {
	broken := errors.New("broken")
	for _, tt := range []struct {
		what           string
		name           string
		nftables       bool // has our rules
		programs       bool // of iptables exist
		errIpt, errNft error
		want           string
		err            bool
	}{
		{what: "nowhere", programs: true, want: Iptables},
		{what: "in nf_tables", nftables: true, programs: true, want: Nftables},
		{what: "no iptables", want: Nftables},
		{what: "nf_tables is broken", programs: true, errNft: broken, want: Iptables},
		{what: "iptables is broken", programs: true, errIpt: broken, want: Nftables},
		{what: "both are broken", programs: true, errIpt: broken, errNft: broken, err: true},
		{what: "named", name: Iptables, nftables: true, programs: true, want: Iptables},
		{what: "named and broken", name: Iptables, programs: true, errIpt: broken, err: true},
	} {
		k := &kernel{nftables: tt.nftables}
		e := k.engines()
		e.HasPrograms = func() bool { return tt.programs }
		e.Iptables = engine{k: k, name: Iptables, has: &k.iptables, err: tt.errIpt}
		e.Nftables = engine{k: k, name: Nftables, has: &k.nftables, err: tt.errNft}
		_, in, err := Find(context.Background(), e.For, tt.name)
		if (err != nil) != tt.err || err == nil && in.Backend != tt.want {
			t.Errorf("%s: %q, %v", tt.what, in.Backend, err)
		}
	}
}
