package daemon

import (
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/lease"
	"github.com/basicfw/basicfw-agent/agent/motd"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/fake"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// lockHeld is the error of a lock that another program holds.
type lockHeld struct{}

func (lockHeld) Error() string   { return "another program holds the lock" }
func (lockHeld) Temporary() bool { return true }

// onDisk returns the files that a failure must not change.
func (w *watched) onDisk(t *testing.T) map[string]string {
	t.Helper()
	files := w.Contents(t)
	for path := range files {
		if strings.HasPrefix(path, store.RunDir) || path == motd.MessageFile || path == motd.IssueFile || strings.HasSuffix(path, ".broken") {
			delete(files, path)
		}
	}
	return files
}

// While another program holds iptables' lock, the guard closes a booting machine. The disk
// does not change, and the next check loads the desired state. Without a guard, the boot
// waits for the lock.
func TestBootWhileALockIsHeld(t *testing.T) {
	for _, guard := range []bool{true, false} {
		w, good := newWatched(t)
		w.Store.UseCopy()
		if !guard {
			w.Guard.Err = errors.New("no nf_tables")
		}
		w.Kernel.Rules = firewall.Ruleset{}
		tries := 0
		w.Kernel.Step = func(string, string) error {
			if tries++; guard || tries < 3 {
				return lockHeld{}
			}
			return nil
		}
		before := w.onDisk(t)[store.StateFile]
		msg, err := w.daemon.boot(context.Background())
		if err != nil || w.Guard.Raised != guard || guard != strings.Contains(msg, apply.GuardTable) || guard != w.Kernel.Rules.IsZero() {
			t.Errorf("guard %v: %q, %v, guard raised %v", guard, msg, err, w.Guard.Raised)
		}
		if after := w.onDisk(t); guard && after[store.StateFile] != before || w.System.Exists(store.StateFile+".broken") {
			t.Errorf("guard %v: the state is %s", guard, after[store.StateFile])
		}
		if guard && (w.daemon.retry.IsZero() || w.daemon.retry.Sub(w.Now.Time) > retryFirst) {
			t.Errorf("the next check is at %v", w.daemon.retry)
		}
		w.Kernel.Step = func(string, string) error { return nil }
		if _, err := w.check(time.Second); err != nil || !w.Kernel.Rules.Equal(good) || w.Guard.Raised {
			t.Errorf("guard %v: the lock is free: %v, guard raised %v", guard, err, w.Guard.Raised)
		}
	}
}

// A restarted service leaves the rules that still close the machine.
func TestBootKeepsRulesThatClose(t *testing.T) {
	w, good := newWatched(t)
	w.Store.UseCopy()
	w.Kernel.Rules.IPv6 = w.Kernel.Rules.IPv6[:1:1]
	w.Kernel.Step = func(string, string) error { return lockHeld{} }
	if msg, err := w.daemon.boot(context.Background()); err != nil || !strings.Contains(msg, "previous rules") || w.Guard.Raised {
		t.Errorf("%q, %v", msg, err)
	}
	w.Kernel.Step = func(string, string) error { return nil }
	if _, err := w.check(time.Second); err != nil || !w.Kernel.Rules.Equal(good) {
		t.Errorf("%v", err)
	}
}

// A load that fails once changes neither the state nor its backend.
func TestBootRepeatsALoad(t *testing.T) {
	w, good := newWatched(t)
	w.Store.UseCopy()
	w.Kernel.Rules = firewall.Ruleset{}
	tries := 0
	w.Kernel.Step = func(string, string) error {
		if tries++; tries == 1 {
			return syscall.ENOMEM
		}
		return nil
	}
	if msg, err := w.daemon.boot(context.Background()); err != nil || !strings.Contains(msg, "protected by") || !w.Kernel.Rules.Equal(good) {
		t.Errorf("%q, %v", msg, err)
	}
	if st, err := w.Store.Load(); err != nil || st.Failsafe != "" || !st.Ruleset.Equal(good) {
		t.Errorf("%+v, %v", st, err)
	}
}

// unreadable makes the state and its copy unreadable and returns what restores them.
func (w *watched) unreadable(t *testing.T) (restore func()) {
	t.Helper()
	var undo []func()
	for _, path := range []string{store.StateFile, store.CopyFile} {
		data, err := os.ReadFile(w.Path(path))
		if err == nil {
			err = os.WriteFile(w.Path(path), []byte("{"), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		undo = append(undo, func() { os.WriteFile(w.Path(path), data, 0o600) })
	}
	return func() {
		for _, f := range undo {
			f()
		}
	}
}

// The failsafe rules are loaded and repaired, but never saved: they end as soon as a state
// is readable.
func TestFailsafeIsNeverSaved(t *testing.T) {
	w, good := newWatched(t)
	w.Store.UseCopy()
	restore := w.unreadable(t)
	before := w.onDisk(t)
	w.Kernel.Rules = firewall.Ruleset{}
	msg, err := w.daemon.boot(context.Background())
	if err != nil || !strings.Contains(msg, "failsafe") || w.Kernel.Rules.IsZero() {
		t.Fatalf("%q, %v", msg, err)
	}
	failsafe := w.Kernel.Rules
	for range 2 {
		w.Kernel.Rules = firewall.Ruleset{}
		if changed, err := w.check(time.Second); !changed || err != nil || !w.Kernel.Rules.Equal(failsafe) {
			t.Errorf("flushed: %v, %v", changed, err)
		}
	}
	if s, _ := w.public(t); s.State != "failsafe" {
		t.Errorf("the status is %s", s.State)
	}
	for path, data := range w.onDisk(t) {
		if data != before[path] {
			t.Errorf("%s is %q, was %q", path, data, before[path])
		}
	}
	restore()
	if changed, err := w.check(time.Second); !changed || err != nil || !w.Kernel.Rules.Equal(good) {
		t.Errorf("readable again: %v, %v", changed, err)
	}
}

// The rescue file unlocks the machine whatever the disk has.
func TestRescueOfADamagedDisk(t *testing.T) {
	for name, spoil := range map[string]func(w *watched) error{
		"both unreadable": func(w *watched) error { w.unreadable(t); return nil },
		"both lost": func(w *watched) error {
			return errors.Join(os.Remove(w.Path(store.StateFile)), os.Remove(w.Path(store.CopyFile)))
		},
		"a directory in its place": func(w *watched) error {
			path := w.Path(store.StateFile)
			return errors.Join(os.Remove(path), os.MkdirAll(path+"/x", 0o700))
		},
		"/var full": func(w *watched) error {
			w.System.Step = lab.Before(func(_, name string) error {
				if strings.HasPrefix(name, "/var/") {
					return syscall.ENOSPC
				}
				return nil
			})
			return nil
		},
	} {
		w, _ := newWatched(t)
		w.Store.UseCopy()
		w.Now.Boot, w.Now.Uptime = "b", time.Minute
		w.Kernel.Rules = firewall.Ruleset{}
		w.Write(t, lease.RescueFile, "30m")
		if err := spoil(w); err != nil {
			t.Fatal(err)
		}
		if _, err := w.daemon.boot(context.Background()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		st, err := w.Store.Load()
		if err != nil || st.Desired.Unlock == nil || !w.Kernel.Rules.Equal(st.Ruleset) {
			t.Fatalf("%s: not unlocked: %v", name, err)
		}
		w.Kernel.Rules = firewall.Ruleset{}
		if w.check(time.Second); !w.Kernel.Rules.Equal(st.Ruleset) {
			t.Errorf("%s: the unlock is not repaired", name)
		}
		w.Now.Uptime += 31 * time.Minute
		_, failed := w.check(31 * time.Minute)
		if st, err := w.Store.Load(); err != nil || st.Desired.Unlock != nil || !w.Kernel.Rules.Equal(st.Ruleset) {
			t.Errorf("%s: the unlock does not end: %v, %v", name, err, failed)
		}
	}
}

// A rescue file that is not to be trusted does not keep the kernel parameter from unlocking.
func TestRescueParameterBesideABadFile(t *testing.T) {
	w, _ := newWatched(t)
	w.Write(t, lease.RescueFile, "1h")
	if err := os.Chmod(w.Path(lease.RescueFile), 0o666); err != nil {
		t.Fatal(err)
	}
	w.daemon.CommandLine = "quiet basicfw.unlock=30m"
	if _, err := w.daemon.boot(context.Background()); err != nil {
		t.Error(err)
	}
	if st, err := w.Store.Load(); err != nil || st.Desired.Unlock == nil || st.Desired.Unlock.Until.Sub(w.Now.Time) > 31*time.Minute {
		t.Errorf("%+v, %v", st.Desired.Unlock, err)
	}
}

// A pending change is rolled back in time, and the rules are repaired, whatever the disk has.
func TestPendingWithoutAState(t *testing.T) {
	for _, both := range []bool{false, true} {
		w, good := newWatched(t)
		w.Store.UseCopy()
		w.Now.Boot, w.Now.Uptime = "b", time.Minute
		if _, err := w.Try(context.Background(), fake.Decided(t, "198.51.100.7/32"), time.Minute, apply.Options{}); err != nil {
			t.Fatal(err)
		}
		tried := w.Kernel.Rules
		if both {
			w.unreadable(t)
		} else if err := os.WriteFile(w.Path(store.StateFile), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		w.Now.Uptime += 2 * time.Minute
		w.check(2 * time.Minute)
		want := w.Kernel.Rules
		if want.Equal(tried) || want.IsZero() || !both && !want.Equal(good) || w.System.Exists(store.PendingFile) {
			t.Errorf("both %v: not rolled back", both)
		}
		w.Kernel.Rules = firewall.Ruleset{}
		if w.check(time.Second); !w.Kernel.Rules.Equal(want) {
			t.Errorf("both %v: flushed rules are not repaired", both)
		}
	}
}

// No failure of another step keeps the rules from being repaired.
func TestCheckRepairsDespiteFailures(t *testing.T) {
	on := func(what string) func(w *watched) {
		return func(w *watched) {
			w.System.Step = func(op, name string, do func() error) error {
				if strings.Contains(op+" "+name, what) {
					return syscall.EIO
				}
				return do()
			}
		}
	}
	for name, spoil := range map[string]func(w *watched){
		"the interfaces cannot be read": func(w *watched) {
			w.daemon.Interfaces = func() ([]firewall.Interface, error) { return nil, syscall.EIO }
		},
		"a persisted file cannot be read": on("read /etc/sysconfig/iptables"),
		"a persisted file has no status":  on("stat /etc/sysconfig/iptables"),
		"the lock cannot be created":      on("lock " + store.RunDir),
		"a pending change cannot be settled": func(w *watched) {
			w.Write(t, store.PendingFile, "{")
			on("remove " + store.PendingFile)(w)
		},
		"the state cannot be read": on("read " + store.StateFile),
	} {
		w, good := newWatched(t)
		w.Store.UseCopy()
		w.Kernel.Rules = firewall.Ruleset{}
		spoil(w)
		if _, err := w.check(time.Second); !w.Kernel.Rules.Equal(good) {
			t.Errorf("%s: the rules are not repaired: %v", name, err)
		}
	}
}

// A command that is suspended holds the lock for ever. After some minutes an open machine is
// closed nevertheless.
func TestCheckRepairsDespiteASuspendedCommand(t *testing.T) {
	w, good := newWatched(t)
	unlock, err := store.New(&system.System{Root: w.Root}).Lock(context.Background(), "a command")
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	w.daemon.waits = maxWaits
	w.Kernel.Rules = firewall.Ruleset{}
	if changed, err := w.check(0); !errors.Is(err, errBusy) || changed || w.Kernel.Loads != 0 {
		t.Errorf("a machine that is not open: changed %v, %v", changed, err)
	}
	w.Kernel.Open = true
	if changed, err := w.check(0); !errors.Is(err, errBusy) || !changed || !w.Kernel.Rules.Equal(good) {
		t.Errorf("an open machine: changed %v, %v", changed, err)
	}
}

// When the clock is set, the next check writes the rules with a time again. Early in a boot,
// the clock alone removes nothing for good.
func TestCheckFollowsTheClock(t *testing.T) {
	for _, tt := range []struct {
		name    string
		step    time.Duration
		boot    string
		uptime  time.Duration // since the unlock
		changed bool
		kept    bool
	}{
		{"not set", 0, "b", 0, false, true},
		{"set back", -time.Hour, "b", 0, true, true},
		{"set forward", time.Hour, "b", 0, true, true},
		{"expired", 0, "b", time.Hour, true, false},
		{"ahead at another boot", 24 * time.Hour, "c", 0, true, true}, // only the timers of the former
		{"behind at another boot", -24 * time.Hour, "c", 0, true, true},
		{"expired at another boot", 24 * time.Hour, "c", 2 * time.Hour, true, false},
	} {
		w := watch(t, fake.New(t))
		w.Now = firewall.Moment{Time: time.Now().UTC().Truncate(time.Second), Boot: "b", Uptime: time.Minute}
		st := fake.Decided(t, "192.0.2.9/32")
		st.Desired.Open = []firewall.Service{{Name: "x", Proto: firewall.TCP, Ports: firewall.Port(8080), On: "any", Until: w.Now.Time.Add(30 * time.Minute)}}
		st.Desired = st.Desired.Start(nil, w.Now)
		st.Desired.Unlock = &firewall.Unlock{Window: firewall.NewWindow(w.Now, 30*time.Minute)}
		w.Install(t, fake.Compiled(t, st))
		var pruned bool
		w.daemon.Prune = func([]firewall.Timer) (*files.Change, error) { pruned = true; return nil, nil }
		w.Now.Boot, w.Now.Time, w.Now.Uptime = tt.boot, w.Now.Time.Add(tt.step), w.Now.Uptime+tt.uptime
		changed, err := w.check(0)
		if err != nil || changed != tt.changed || pruned == tt.kept {
			t.Errorf("%s: changed %v, pruned %v, %v", tt.name, changed, pruned, err)
		}
		got, err := w.Store.Load()
		if err != nil || (got.Desired.Unlock != nil) != tt.kept || (len(got.Desired.Open) > 0) != tt.kept {
			t.Fatalf("%s: %+v, %v", tt.name, got.Desired, err)
		}
		if rules := fake.Compiled(t, got).Ruleset; !w.Kernel.Rules.Equal(rules) {
			t.Errorf("%s: other rules are loaded", tt.name)
		}
		if want := w.Now.Time.Add(30 * time.Minute); tt.kept && tt.boot == "b" && (!got.Desired.Unlock.Until.Equal(want) || !got.Desired.RuleEnd(got.Desired.Open[0].Until).Equal(want)) {
			t.Errorf("%s: the rules end at %v, want %v", tt.name, got.Desired.Unlock.Until, want)
		}
		if changed, err := w.check(0); changed || err != nil {
			t.Errorf("%s: the next check: %v, %v", tt.name, changed, err)
		}
	}
}
