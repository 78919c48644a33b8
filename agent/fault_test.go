package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// killed is what a step panics with when the program is to end there.
type killed struct{ step string }

// operation is a change of a machine that was bootstrapped for old.
type operation struct {
	name string
	// before brings the machine to where the operation begins.
	before func(t *testing.T, b *bench)
	do     func(b *bench) error
	// stood are the rules that stand when it begins, and fresh those once it is
	// done.
	stood, fresh firewall.Ruleset
}

const (
	oldClient = "203.0.113.9/32"
	newClient = "198.51.100.7/32"
)

// operations are all that changes such a machine.
func operations(t *testing.T) []operation {
	t.Helper()
	ctx := context.Background()
	older, newer := decided(t, oldClient), decided(t, newClient)
	unlocked := older
	unlocked.Desired.Unlock = &firewall.Unlock{Window: firewall.NewWindow(firewall.Moment{Time: time.Now()}, time.Hour)}
	var err error
	if unlocked.Ruleset, err = firewall.Compile(unlocked.Desired); err != nil {
		t.Fatal(err)
	}
	o := Options{Files: []Change{{Path: "/etc/basicfw/local.ini", Data: []byte("[ssh]\nallow = any\n"), Mode: 0o600}}}
	none := func(*testing.T, *bench) {}
	try := func(t *testing.T, b *bench) {
		t.Helper()
		if _, err := b.agent.Try(ctx, newer, time.Hour, Options{}); err != nil {
			t.Fatal(err)
		}
	}
	return []operation{
		{"apply", none, func(b *bench) error { _, err := b.agent.Converge(ctx, newer, o); return err }, older.Ruleset, newer.Ruleset},
		{"unlock", none, func(b *bench) error { _, err := b.agent.Converge(ctx, unlocked, Options{}); return err }, older.Ruleset, unlocked.Ruleset},
		{"apply --confirm", none, func(b *bench) error {
			_, err := b.agent.Try(ctx, newer, time.Hour, Options{})
			return err
		}, older.Ruleset, newer.Ruleset},
		{"confirm", try, func(b *bench) error {
			_, err := b.agent.Confirm(ctx)
			if errors.Is(err, ErrNothingPending) {
				return nil
			}
			return err
		}, newer.Ruleset, newer.Ruleset},
		{"take back", try, func(b *bench) error { return b.agent.TakeBack(ctx, "a test") }, newer.Ruleset, older.Ruleset},
		{"verify --repair", func(t *testing.T, b *bench) {
			t.Helper()
			b.kernel.rules = firewall.Ruleset{}
			if err := os.Remove(filepath.Join(b.root, "/etc/sysconfig/iptables")); err != nil {
				t.Fatal(err)
			}
		}, func(b *bench) error {
			r, err := b.agent.Verify(ctx, noPorts)
			if err == nil {
				_, err = b.agent.Mend(ctx, r)
			}
			return err
		}, firewall.Ruleset{}, older.Ruleset},
		{"uninstall", none, func(b *bench) error {
			err := b.agent.Uninstall(ctx)
			if errors.Is(err, store.ErrNone) {
				return nil
			}
			return err
		}, older.Ruleset, firewall.Ruleset{}},
	}
}

// machine is a bench that was bootstrapped.
func machine(t *testing.T, op operation) *bench {
	t.Helper()
	b := newBench(t)
	b.agent.Boot = func() (string, time.Duration, error) { return "first", time.Hour, nil }
	if _, err := b.agent.Converge(context.Background(), decided(t, oldClient), options()); err != nil {
		t.Fatal(err)
	}
	op.before(t, b)
	b.steps = nil
	return b
}

// TestFaults breaks every step of every operation once, and ends the program
// before every step once: whatever stands then is the old or the new, whole;
// so it is after a boot; and the next run completes.
func TestFaults(t *testing.T) {
	injected, survived := 0, 0
	for _, op := range operations(t) {
		for _, kill := range []bool{false, true} {
			for n := 1; ; n++ {
				b := machine(t, op)
				step := ""
				fault(b, n, kill, &step)
				err := run(op, b)
				if step == "" { // it has fewer steps
					if err != nil {
						t.Fatalf("%s, unharmed: %v", op.name, err)
					}
					if n < 3 {
						t.Errorf("%s has only %d steps", op.name, n-1)
					}
					break
				}
				injected++
				what := fmt.Sprintf("%s, killed %v before step %d (%s)", op.name, kill, n, step)
				ok := true
				fail := func(format string, args ...any) {
					t.Helper()
					ok = false
					t.Errorf("%s: %s", what, fmt.Sprintf(format, args...))
				}
				if !kill && err == nil {
					fail("no error")
				}
				fault(b, 0, false, &step)
				b.intact(t, op, fail)
				if err := run(op, b); err != nil {
					fail("the next run: %v", err)
				}
				if !b.kernel.rules.Equal(op.fresh) {
					fail("the next run leaves other rules")
				}

				// The same again, with a boot in between.
				b = machine(t, op)
				fault(b, n, kill, &step)
				run(op, b)
				fault(b, 0, false, &step)
				b.boot(t, op, fail)
				if ok {
					survived++
				}
			}
		}
	}
	t.Logf("injected %d, survived %d", injected, survived)
}

// fault has a step fail, or end the program; 0 is none.
func fault(b *bench, n int, kill bool, step *string) {
	seen := 0
	b.agent.System.Step = func(op, name string) error {
		if seen++; seen != n {
			return nil
		}
		*step = op + " " + name
		if kill {
			panic(killed{*step})
		}
		return errors.New("no space left on device")
	}
	b.kernel.step, b.service.step = b.agent.System.Step, b.agent.System.Step
}

// run runs an operation, which may be ended.
func run(op operation, b *bench) (err error) {
	defer func() {
		if r := recover(); r != nil {
			k, ok := r.(killed)
			if !ok {
				panic(r)
			}
			err = fmt.Errorf("killed before %s", k.step)
		}
	}()
	return op.do(b)
}

// intact checks that what stands is the old or the new, and that verify knows
// which.
func (b *bench) intact(t *testing.T, op operation, fail func(string, ...any)) {
	t.Helper()
	older := decided(t, oldClient).Ruleset
	if k := b.kernel.rules; !k.Equal(op.stood) && !k.Equal(op.fresh) {
		fail("the kernel has neither the old nor the new rules")
	}
	if st, err := b.agent.Store.Load(); err == nil && !st.Ruleset.Equal(older) && !st.Ruleset.Equal(op.fresh) {
		fail("the state is neither the old nor the new one")
	} else if err != nil && !errors.Is(err, store.ErrNone) {
		fail("the state: %v", err)
	}
}

// boot starts the service on a machine without rules, and checks what stands
// then.
func (b *bench) boot(t *testing.T, op operation, fail func(string, ...any)) {
	t.Helper()
	b.kernel.rules = firewall.Ruleset{}
	b.agent.Boot = func() (string, time.Duration, error) { return "second", time.Minute, nil }
	if !b.service.there { // uninstall came that far
		return
	}
	older := decided(t, oldClient).Ruleset
	if _, err := b.agent.enforce(context.Background(), RunOptions{Ports: noPorts}); err != nil {
		fail("the boot: %v", err)
	}
	if k := b.kernel.rules; !k.Equal(older) && !k.Equal(op.fresh) {
		fail("after a boot neither the old nor the new rules stand")
	}
	if b.agent.System.Exists(store.PendingFile) {
		fail("after a boot a change still waits")
	}
	r, err := b.agent.Verify(context.Background(), noPorts)
	if err != nil || len(r.Drift) > 0 {
		fail("after a boot: %v, %v", r.Drift, err)
	}
}
