package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/sirupsen/logrus"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// News are looked at once there were none for a while, or there were some for
// too long.
func TestSettling(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(1000000 + ms)) }
	for _, tt := range []struct {
		name string
		news []int // ms
		due  int
	}{
		{"one", []int{0}, 250},
		{"a burst", []int{0, 10, 200}, 450},
		{"without end", []int{0, 200, 400, 600, 800, 990}, 1000},
	} {
		var s settling
		if !s.due(settleLimit).IsZero() {
			t.Errorf("%s: due without news", tt.name)
		}
		for _, n := range tt.news {
			s.news(at(n))
		}
		if got := s.due(settleLimit); !got.Equal(at(tt.due)) {
			t.Errorf("%s: due at %v, want %v", tt.name, got.Sub(at(0)), at(tt.due).Sub(at(0)))
		}
	}
}

// Somebody undoes each repair at once: a look a second finds that something
// differs. The repairs become few, and go on once it is quiet.
func TestFight(t *testing.T) {
	var f fight
	start := time.Now()
	repairs := map[int]int{} // by minute
	var pauses []time.Duration
	for s := range 3600 {
		repair, paused := f.drifted(start.Add(time.Duration(s) * time.Second))
		if repair {
			repairs[s/60]++
		}
		if paused {
			pauses = append(pauses, f.pause)
		}
	}
	if repairs[0] < fightRepairs || repairs[0] > fightRepairs+3 {
		t.Errorf("%d repairs in the first minute", repairs[0])
	}
	all := 0
	for _, n := range repairs {
		all += n
	}
	if all > fightRepairs+12 {
		t.Errorf("%d repairs in an hour", all)
	}
	for i, p := range pauses {
		if want := min(fightFirst<<i, fightLongest); p != want {
			t.Errorf("pause %d is %v, want %v", i, p, want)
		}
	}

	now := f.until
	if repair, _ := f.drifted(now); !repair {
		t.Error("nothing is repaired when the pause is over")
	}
	for s := 1; s < 60; s++ {
		if f.quiet(now.Add(time.Duration(s) * time.Second)) {
			t.Fatalf("over after %d seconds", s)
		}
	}
	if now = now.Add(time.Minute); !f.quiet(now) || f.quiet(now) {
		t.Error("not over, once, after a minute")
	}
	for i := range fightRepairs {
		if repair, _ := f.drifted(now); !repair {
			t.Errorf("repair %d after the fight is kept back", i)
		}
	}

	// Somebody who changes something every now and then is repaired each time.
	f = fight{}
	for i := range 100 {
		if repair, _ := f.drifted(now.Add(time.Duration(i) * 15 * time.Second)); !repair {
			t.Fatalf("change %d in %d quarters of a minute is not repaired", i, i)
		}
	}
}

// watched is a machine whose service runs, by a clock of the test's.
type watched struct {
	*bench
	*watcher
	now  time.Time
	log  bytes.Buffer
	says []string // on the consoles; true is on the screen too
	good firewall.Ruleset
}

func newWatched(t *testing.T) *watched {
	t.Helper()
	w := &watched{bench: newBench(t), now: time.Now()}
	w.bench.agent.Now = func() time.Time { return w.now }
	if _, err := w.bench.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), options()); err != nil {
		t.Fatal(err)
	}
	log := logrus.New()
	log.SetOutput(&w.log)
	w.bench.agent.Log = log
	w.good, w.kernel.loads = w.kernel.rules, 0
	w.watcher = &watcher{Agent: w.bench.agent, RunOptions: RunOptions{Ports: noPorts, Instance: func() string { return "" },
		Say:  func(text string, shown bool) error { w.says = append(w.says, fmt.Sprint(shown, " ", text)); return nil },
		Look: func() ([]firewall.Interface, error) { return nil, nil }, Facts: func() Facts { return Facts{SSHPorts: []uint16{22}} }}}
	return w
}

// looks looks once, after some time.
func (w *watched) looks(after time.Duration) (bool, error) {
	w.now = w.now.Add(after)
	return w.look(context.Background())
}

func (w *watched) public(t *testing.T) (s Status) {
	t.Helper()
	w.publish(context.Background())
	data, err := os.ReadFile(filepath.Join(w.root, StatusFile))
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// What others change is repaired at the next look, and what is as decided is
// left alone.
func TestLookRepairs(t *testing.T) {
	w := newWatched(t)
	before := w.bench.files(t)
	w.steps = nil
	for range 3 {
		if changed, err := w.looks(time.Minute); changed || err != nil {
			t.Fatalf("nothing differs: %v, %v", changed, err)
		}
	}
	for _, s := range w.steps {
		if !strings.Contains(s, store.RunDir) {
			t.Errorf("nothing differs, but: %s", s)
		}
	}
	if s := w.public(t); s.LastVerified == nil || !s.LastVerified.Equal(w.now) {
		t.Errorf("verified %v, want %v", s.LastVerified, w.now)
	}
	path := filepath.Join(w.root, "/etc/sysconfig/iptables")
	for name, spoil := range map[string]func(){
		"flushed": func() { w.kernel.rules = firewall.Ruleset{} },
		"altered": func() { w.kernel.rules.IPv6 = w.kernel.rules.IPv6[:1:1] },
		"file":    func() { os.Remove(path) },
		"mode":    func() { os.Chmod(path, 0o644) },
		"unit":    func() { w.service.there = false },
		"all":     func() { w.kernel.rules = firewall.Ruleset{}; os.Remove(path); w.service.there = false },
	} {
		spoil()
		if changed, err := w.looks(time.Minute); !changed || err != nil {
			t.Errorf("%s: %v, %v", name, changed, err)
		}
		after := w.bench.files(t)
		if !w.kernel.rules.Equal(w.good) || !w.service.there || after["/etc/sysconfig/iptables"] != before["/etc/sysconfig/iptables"] {
			t.Errorf("%s: not mended", name)
		}
		if changed, err := w.looks(time.Minute); changed || err != nil {
			t.Errorf("%s: the look after the repair: %v, %v", name, changed, err)
		}
	}
	if n := strings.Count(w.log.String(), "level=warning"); n == 0 || n > 30 {
		t.Errorf("%d warnings:\n%s", n, w.log.String())
	}
}

// The consoles are told once a boot who may come in, and each time that flushed
// rules are back.
func TestConsoles(t *testing.T) {
	w := newWatched(t)
	says := func(want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, w.says); diff != "" {
			t.Errorf("the consoles show (-want +got):\n%s", diff)
		}
		w.says = nil
	}
	const how = "Shut out? Log in here and type: basicfw-agent unlock"
	for range 2 {
		w.publish(context.Background())
		w.greet()
	}
	says("false basicfw: SSH is for 203.0.113.9 only. " + how)
	w.watcher = &watcher{Agent: w.bench.agent, RunOptions: w.RunOptions, said: w.loadNote().Said} // restarted
	w.note(w.now)
	w.publish(context.Background())
	w.greet()
	says()
	w.kernel.rules.IPv6 = w.kernel.rules.IPv6[:1:1]
	w.looks(time.Minute)
	says()
	flushed := "true basicfw: the ipv4 and ipv6 rules were flushed, and are back. " + how
	w.kernel.rules = firewall.Ruleset{}
	w.looks(time.Minute)
	says(flushed)
	for range 600 { // somebody flushes them again and again
		w.kernel.rules = firewall.Ruleset{}
		w.looks(time.Second)
	}
	if n := len(w.says); n < 5 || n > 15 {
		t.Errorf("it was said %d times in ten minutes", n)
	}
}

// The rules are repaired also where nothing can be written.
func TestLookRepairsRulesFirst(t *testing.T) {
	w := newWatched(t)
	w.kernel.rules, w.service.there = firewall.Ruleset{}, false
	os.Remove(filepath.Join(w.root, "/etc/sysconfig/iptables"))
	w.System.Step = system.Before(func(op, name string) error {
		if strings.HasPrefix(name, "/etc/") {
			return fs.ErrPermission
		}
		return nil
	})
	if _, err := w.looks(0); !errors.Is(err, fs.ErrPermission) || !w.kernel.rules.Equal(w.good) || w.kernel.loads != 1 {
		t.Fatalf("%v, %d loads", err, w.kernel.loads)
	}
	// Nor does it become a storm of tries.
	w.log.Reset()
	for range 600 {
		w.looks(time.Second)
	}
	if n := strings.Count(w.log.String(), "cannot be repaired"); n == 0 || n > 15 { // files and unit
		t.Errorf("%d tries in ten minutes", n)
	}
	w.kernel.rules = firewall.Ruleset{}
	if _, err := w.looks(time.Second); !w.kernel.rules.Equal(w.good) {
		t.Errorf("what cannot be written keeps the rules out: %v", err)
	}
}

// Somebody undoes each repair: we give in for a while, say so, and come back.
func TestLookGivesIn(t *testing.T) {
	w := newWatched(t)
	undo := func() { w.kernel.rules = firewall.Ruleset{} }
	for range 30 {
		undo()
		w.looks(time.Second)
	}
	// Five, and one after ten seconds.
	if w.kernel.loads != fightRepairs+1 {
		t.Errorf("%d loads", w.kernel.loads)
	}
	undo()
	s := w.public(t)
	if s.State != Drifted || len(s.Unrepaired) != 1 || !strings.Contains(strings.Join(s.Warnings, "\n"), s.Unrepaired[0]) {
		t.Errorf("state %q, %q, %q", s.State, s.Unrepaired, s.Warnings)
	}
	message := w.bench.files(t)[MessageFile]
	if !strings.Contains(message, "drift that could not be repaired: repairs of the rules") || !strings.Contains(message, "not as it was decided") {
		t.Errorf("the login message: %q", message)
	}
	// A port of sshd's is opened all the same.
	w.Ports = func() ([]uint16, []string, bool, error) { return []uint16{2222}, []string{"2222: test"}, true, nil }
	w.Facts = func() Facts { return Facts{SSHPorts: []uint16{2222}, SSHLive: true} }
	if _, err := w.looks(time.Second); err != nil || w.kernel.rules.IsZero() {
		t.Errorf("sshd moved during a fight: %v", err)
	}
	w.looks(fightLongest)
	w.looks(fightLongest)
	if s := w.public(t); s.State != Protected || len(s.Unrepaired) > 0 {
		t.Errorf("after the fight: %q, %q", s.State, s.Unrepaired)
	}
	loads := w.kernel.loads
	for range fightRepairs {
		undo()
		w.looks(time.Second)
	}
	if w.kernel.loads != loads+fightRepairs {
		t.Errorf("%d repairs after the fight", w.kernel.loads-loads)
	}
	// Who leaves has no part in a fight any more.
	undo()
	w.looks(time.Second)
	if s := w.public(t); len(s.Unrepaired) == 0 {
		t.Error("it does not give in again")
	}
	w.leave()
	if s := w.public(t); len(s.Unrepaired) > 0 {
		t.Error("the fight goes on without it")
	}
}

// sshd moves: the new port is opened and the old one closed at the next look,
// also in rules that wait for a confirmation.
func TestLookFollowsSSHD(t *testing.T) {
	for _, pending := range []bool{false, true} {
		w := newWatched(t)
		if pending {
			if _, err := w.Try(context.Background(), decided(t, "198.51.100.7/32"), time.Hour, Options{}); err != nil {
				t.Fatal(err)
			}
		}
		w.Ports = func() ([]uint16, []string, bool, error) { return []uint16{2222}, []string{"2222: test"}, true, nil }
		if changed, err := w.looks(time.Second); !changed || err != nil {
			t.Fatalf("%v, %v", changed, err)
		}
		want := decided(t, "203.0.113.9/32").Desired
		if pending {
			want = decided(t, "198.51.100.7/32").Desired
		}
		want.SSH.Ports = []uint16{2222}
		rules, err := firewall.Compile(want)
		if err != nil || !w.kernel.rules.Equal(rules) {
			t.Errorf("pending %v: the rules do not follow: %v", pending, err)
		}
		if changed, err := w.looks(time.Second); changed || err != nil {
			t.Errorf("pending %v: the next look: %v, %v", pending, changed, err)
		}
		if strings.Contains(w.log.String(), "changed by others") {
			t.Errorf("pending %v: nobody changed anything: %s", pending, w.log.String())
		}
	}
}

// What waits for a confirmation is repaired as such, and taken back when nobody
// confirmed it.
func TestLookRepairsPending(t *testing.T) {
	w := newWatched(t)
	if _, err := w.Try(context.Background(), decided(t, "198.51.100.7/32"), time.Minute, Options{}); err != nil {
		t.Fatal(err)
	}
	tried := w.kernel.rules
	files := w.bench.files(t)["/etc/sysconfig/iptables"]
	if changed, err := w.looks(time.Second); changed || err != nil || !w.kernel.rules.Equal(tried) {
		t.Errorf("%v, %v", changed, err)
	}
	w.kernel.rules = firewall.Ruleset{}
	if changed, err := w.looks(time.Second); !changed || err != nil || !w.kernel.rules.Equal(tried) {
		t.Errorf("flushed: %v, %v", changed, err)
	}
	if w.bench.files(t)["/etc/sysconfig/iptables"] != files {
		t.Error("the files have it already")
	}
	// What has ended of the former rules is no reason to look meanwhile.
	st, err := w.Store.Load()
	if err != nil {
		t.Fatal(err)
	}
	st.Desired.SSH.Timed = []firewall.TimedSource{{From: netip.MustParsePrefix("192.0.2.9/32"), Until: w.now.Add(-time.Second)}}
	if err := w.Store.Save(st); err != nil {
		t.Fatal(err)
	}
	if end, _ := w.nextEnd(); !end.After(w.now) {
		t.Errorf("the next look is at %v, %v ago", end, w.now.Sub(end))
	}
	st.Desired.SSH.Timed = nil
	if err := w.Store.Save(st); err != nil {
		t.Fatal(err)
	}
	uptime := 2 * time.Minute
	w.bench.agent.Boot = func() (string, time.Duration, error) { return "", uptime, nil }
	if changed, err := w.looks(2 * time.Minute); !changed || err != nil || !w.kernel.rules.Equal(w.good) {
		t.Errorf("taken back: %v, %v", changed, err)
	}
	if changed, err := w.looks(time.Second); changed || err != nil {
		t.Errorf("the look after that: %v, %v", changed, err)
	}
}

// A state that goes bad while the service runs does not leave the machine open.
func TestLookWithoutState(t *testing.T) {
	w := newWatched(t)
	path := filepath.Join(w.root, store.StateFile)
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if changed, err := w.looks(time.Second); changed || err == nil {
			t.Errorf("the rules stand: %v, %v", changed, err)
		}
	}
	w.kernel.open = true
	if changed, err := w.looks(time.Second); !changed || err == nil || w.kernel.loads != 1 {
		t.Errorf("the rules are gone: %v, %v, %d loads", changed, err, w.kernel.loads)
	}
	// Uninstalled: it is no business of ours any more.
	w.kernel.open = false
	os.Remove(path)
	w.kernel.rules = firewall.Ruleset{}
	w.steps = nil
	if changed, err := w.looks(time.Second); changed || err != nil || len(w.steps) > 0 {
		t.Errorf("without a state: %v, %v, %q", changed, err, w.steps)
	}
}

// While a command holds the lock there is no look, and one afterwards. Nothing
// is left of the service when it ends.
func TestRunWaitsForCommands(t *testing.T) {
	w := newWatched(t)
	w.bench.agent.Now = time.Now
	goroutines := runtime.NumGoroutine()
	var tell func()
	var looks atomic.Int32
	o := w.RunOptions
	o.Look = func() ([]firewall.Interface, error) { looks.Add(1); return nil, nil }
	o.Watch = func(ctx context.Context, f func()) { tell = f }
	o.Every, o.Changed = time.Hour, func() {}
	ready := make(chan struct{})
	o.Ready = func(string) { close(ready) }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- w.bench.agent.Run(ctx, o) }()
	<-ready
	unlock, err := w.Store.Lock(ctx, "a command")
	if err != nil {
		t.Fatal(err)
	}
	before := looks.Load()
	for range 1000 {
		tell()
	}
	// Longer than it waits for the lock.
	<-time.After(bootLockWait + 2*settleQuiet)
	if n := looks.Load(); n != before {
		t.Fatalf("%d looks while a command is at work", n-before)
	}
	unlock()
	lab.Poll(t, "the look after the command", func() bool { return looks.Load() > before })
	// A thousand news that come together are one.
	if n := looks.Load() - before; n > 2 {
		t.Errorf("%d looks", n)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	lab.Poll(t, "the service's goroutines to end", func() bool { return runtime.NumGoroutine() <= goroutines })
}
