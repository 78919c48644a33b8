package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/motd"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/verify"
	"github.com/basicfw/basicfw-agent/test/fake"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// watched is a machine with its daemon and a clock that the test sets.
type watched struct {
	*fake.Machine
	daemon *Daemon
	facts  host.Facts
	// dropped are the counters of the kernel.
	dropped []firewall.Dropped
	log     bytes.Buffer
	says    []string // on the consoles; true: on the screen too
}

// watch returns the daemon of a machine.
func watch(t testing.TB, m *fake.Machine) *watched {
	t.Helper()
	w := &watched{Machine: m, facts: host.Facts{SSHPorts: []uint16{22}}}
	m.Now.Time = time.Now()
	m.SetLog(&w.log)
	w.daemon = &Daemon{Verifier: m.Verifier, Options: Options{
		Instance: func() string { return "" }, Every: time.Hour, Ready: func(string) {},
		Interfaces: func() ([]firewall.Interface, error) { return nil, nil },
		Prune:      func([]firewall.Timer) (*files.Change, error) { return nil, nil },
		Shells:     func() ([]host.Session, error) { return nil, nil },
		Say:        func(text string, shown bool) error { w.says = append(w.says, fmt.Sprint(shown, " ", text)); return nil },
		Gather:     w.gather,
		Dropped:    func(context.Context, bool) ([]firewall.Dropped, error) { return w.dropped, nil },
	}}
	return w
}

// newWatched returns a machine that accepts SSH from 203.0.113.9.
func newWatched(t testing.TB) (w *watched, good firewall.Ruleset) {
	t.Helper()
	w = watch(t, fake.New(t))
	w.Install(t, fake.Decided(t, "203.0.113.9/32"))
	w.Kernel.Loads = 0
	w.log.Reset()
	return w, w.Kernel.Rules
}

// gather reads what the status is made from, as the program does.
func (w *watched) gather(ctx context.Context) (report.Input, error) {
	in := report.Input{Version: w.Version, Families: w.Families, Now: w.Moment(), Facts: w.facts}
	r, err := w.Verify(ctx, w.facts.Ports)
	if err != nil {
		if _, in.Err = w.Store.Load(); in.Err == nil {
			return in, err
		}
		r = verify.Report{}
	}
	in.Report = r
	note := LoadNote(w.System, w.Moment().Time)
	in.Verified = note.Verified
	for _, p := range note.Pauses {
		in.RepairPaused = append(in.RepairPaused, p.String())
	}
	return in, nil
}

// check runs one check after some time.
func (w *watched) check(after time.Duration) (bool, error) {
	w.Now.Time = w.Now.Time.Add(after)
	return w.daemon.check(context.Background())
}

// published is the status for monitoring, with the keys that all schemas have.
type published struct {
	State        string     `json:"state"`
	LastVerified *time.Time `json:"last_verified"`
}

// public publishes the status and returns it with its input.
func (w *watched) public(t *testing.T) (published, report.Input) {
	t.Helper()
	w.daemon.publish(context.Background())
	var s published
	data, err := os.ReadFile(w.Path(StatusFile))
	if err == nil {
		err = json.Unmarshal(data, &s)
	}
	if err != nil {
		t.Fatal(err)
	}
	in, err := w.gather(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return s, in
}

// The machine boots with its state, the copy, or both damaged or lost.
func TestBootFallsBackToTheCopyThenTheFailsafe(t *testing.T) {
	state := func(w *watched) string { return w.Path(store.StateFile) }
	second := func(w *watched) string { return w.Path(store.CopyFile) }
	loseVar := func(w *watched) error { return os.RemoveAll(w.Path("var")) }
	const fromCopy, failsafe = "protected by profile web-only", "closed by the failsafe rules"
	for _, tt := range []struct {
		name  string
		spoil func(w *watched) error
		want  string
		state string
		// lost is set if nothing can be written below /var.
		lost bool
	}{
		{"undamaged", func(*watched) error { return nil }, fromCopy, report.Protected, false},
		{"state unreadable", func(w *watched) error { return os.WriteFile(state(w), []byte("{"), 0o600) }, fromCopy, report.Protected, false},
		{"state of a newer version", func(w *watched) error { return os.WriteFile(state(w), []byte(`{"schema": 99, "version": "9"}`), 0o600) }, fromCopy, report.Protected, false},
		{"state that another user may write", func(w *watched) error { return os.Chmod(state(w), 0o666) }, fromCopy, report.Protected, false},
		{"state lost", func(w *watched) error { return os.Remove(state(w)) }, fromCopy, report.Protected, false},
		{"/var wiped", loseVar, fromCopy, report.Protected, false},
		{"/var wiped and read-only", func(w *watched) error {
			w.System.Step = lab.Before(func(op, name string) error {
				if strings.HasPrefix(name, "/var/") {
					return fmt.Errorf("%s %s: %w", op, name, syscall.EROFS)
				}
				return nil
			})
			return loseVar(w)
		}, fromCopy + ", but", report.Protected, true},
		{"a read that fails once", func(w *watched) error {
			failed := false
			w.System.Step = func(op, name string, do func() error) error {
				if op == "read" && name == "/etc/sysconfig/iptables" && !failed {
					failed = true
					return syscall.EIO
				}
				return do()
			}
			return nil
		}, fromCopy, report.Protected, false},
		{"state lost, copy of a newer version", func(w *watched) error {
			return errors.Join(loseVar(w), os.WriteFile(second(w), []byte(`{"schema": 99, "version": "9"}`), 0o600))
		}, failsafe, report.Failsafe, false},
		{"state lost, copy that another user may write", func(w *watched) error { return errors.Join(loseVar(w), os.Chmod(second(w), 0o666)) }, failsafe, report.Failsafe, false},
		{"both unreadable", func(w *watched) error {
			return errors.Join(os.WriteFile(state(w), []byte("{"), 0o600), os.WriteFile(second(w), []byte("{"), 0o600))
		}, failsafe, report.Failsafe, false},
		{"both lost", func(w *watched) error { return errors.Join(loseVar(w), os.Remove(second(w))) }, failsafe, report.Failsafe, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w, good := newWatched(t)
			w.Kernel.Rules = firewall.Ruleset{}
			if err := tt.spoil(w); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			var ready string
			w.daemon.Ready = func(s string) { ready = s; cancel() }
			if err := w.daemon.Run(ctx); err != nil || !strings.Contains(ready, tt.want) || w.Kernel.Loads == 0 {
				t.Errorf("ready %q, %v, %d loads", ready, err, w.Kernel.Loads)
			}
			data, err := os.ReadFile(w.Path(StatusFile))
			if err != nil || !strings.Contains(string(data), `"state": "`+tt.state+`"`) {
				t.Errorf("status.json, want state %s: %v\n%s", tt.state, err, data)
			}
			if tt.state != report.Protected {
				return
			}
			if !w.Kernel.Rules.Equal(good) {
				t.Error("the rules differ")
			}
			files := w.Contents(t)
			if got := files[store.StateFile]; tt.lost != (got == "") || !tt.lost && got != files[store.CopyFile] {
				t.Errorf("the state is %s\nits copy %s", got, files[store.CopyFile])
			}
		})
	}
}

// A boot that cannot load the rules does not destroy the desired state. The next boot
// loads it.
func TestFailsafeKeepsTheCopy(t *testing.T) {
	w, good := newWatched(t)
	w.Store.UseCopy()
	for _, refuses := range []bool{true, false} {
		w.Kernel.Rules, w.Kernel.Refused = firewall.Ruleset{}, firewall.Ruleset{}
		want := "protected by"
		if refuses {
			want, w.Kernel.Refused = "failsafe", good
		}
		msg, err := w.daemon.boot(context.Background())
		if err != nil || !strings.Contains(msg, want) || w.Kernel.Rules.IsZero() || w.Kernel.Rules.Equal(good) == refuses {
			t.Errorf("refuses %v: %q, %v", refuses, msg, err)
		}
	}
}

// An unreadable state is kept when its copy or the failsafe state replaces it.
func TestBootKeepsTheUnreadableState(t *testing.T) {
	for _, both := range []bool{false, true} {
		w, _ := newWatched(t)
		w.Store.UseCopy()
		paths := []string{store.StateFile, store.CopyFile}
		if !both {
			paths = paths[:1]
		}
		for _, path := range paths {
			if err := os.WriteFile(w.Path(path), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := w.daemon.boot(context.Background()); err != nil {
			t.Error(err)
		}
		if kept, err := os.ReadFile(w.Path(store.StateFile + ".broken")); string(kept) != "{" {
			t.Errorf("both %v: kept %q, %v", both, kept, err)
		}
	}
}

// If no backend works, the guard closes the machine and Run returns the error.
func TestGuardClosesWithoutBackend(t *testing.T) {
	w, _ := newWatched(t)
	w.Kernel.Rules = firewall.Ruleset{}
	w.Kernel.Step = func(string, string) error { return fs.ErrPermission }
	w.daemon.Ready = func(status string) { t.Errorf("ready: %s", status) }
	if err := w.daemon.Run(context.Background()); !errors.Is(err, fs.ErrPermission) || !w.Guard.Raised {
		t.Errorf("%v, guard %v", err, w.Guard.Raised)
	}
}

// For a state without a copy, only a verification that finds no drift writes one.
func TestVerificationWritesTheFirstCopy(t *testing.T) {
	for _, tt := range []struct {
		name   string
		verify func(w *watched) error
	}{
		{"verify", func(w *watched) error {
			r, err := w.Verify(context.Background(), fake.NoPorts)
			if err != nil {
				return err
			}
			return w.SaveVerified(r)
		}},
		{"boot", func(w *watched) error { _, err := w.daemon.boot(context.Background()); return err }},
		{"check", func(w *watched) error { _, err := w.check(0); return err }},
	} {
		w, _ := newWatched(t)
		if err := w.Store.RemoveCopy(); err != nil {
			t.Fatal(err)
		}
		if _, err := w.gather(context.Background()); err != nil || w.System.Exists(store.CopyFile) {
			t.Errorf("%s: the status writes a copy; %v", tt.name, err)
		}
		if err := tt.verify(w); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		files := w.Contents(t)
		if files[store.CopyFile] == "" || files[store.CopyFile] != files[store.StateFile] {
			t.Errorf("%s: the copy is %q", tt.name, files[store.CopyFile])
		}
	}
}

// Uninstall on a machine that has lost /var and was rebooted since leaves none of our
// rules and files.
func TestUninstallAfterABootWithoutVar(t *testing.T) {
	w, _ := newWatched(t)
	if err := os.RemoveAll(w.Path(store.Dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.daemon.boot(context.Background()); err != nil {
		t.Fatal(err)
	}
	if err := w.Uninstall(context.Background()); err != nil || !strings.Contains(w.log.String(), "the backup from before bootstrap is lost") {
		t.Errorf("%v; the log is %s", err, w.log.String())
	}
	// The previous content of local.ini is lost with the backup.
	want := map[string]string{fake.LocalFile: w.Contents(t)[fake.LocalFile]}
	if diff := cmp.Diff(want, w.Contents(t)); diff != "" || !w.Kernel.Rules.IsZero() || w.Service.Registered {
		t.Errorf("left behind: %s", diff)
	}
}

// The consoles show once per boot who may log in, and each time that flushed rules were
// restored.
func TestConsoleMessages(t *testing.T) {
	w, _ := newWatched(t)
	says := func(want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, w.says); diff != "" {
			t.Errorf("the consoles show (-want +got):\n%s", diff)
		}
		w.says = nil
	}
	for range 2 {
		w.daemon.publish(context.Background())
		w.daemon.greet()
	}
	in, err := w.gather(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	issue := strings.TrimSpace(report.New(in).Issue())
	if !strings.Contains(issue, "203.0.113.9") || !strings.Contains(issue, report.WayIn) {
		t.Errorf("the consoles are to show %q", issue)
	}
	says("false " + issue)
	w.daemon = &Daemon{Verifier: w.Verifier, Options: w.daemon.Options, said: LoadNote(w.System, w.Now.Time).Said} // restarted
	w.daemon.note(w.Now.Time)
	w.daemon.publish(context.Background())
	w.daemon.greet()
	says()
	w.Kernel.Rules.IPv6 = w.Kernel.Rules.IPv6[:1:1]
	w.check(time.Minute)
	says()
	w.Kernel.Rules = firewall.Ruleset{}
	w.check(time.Minute)
	says("true basicfw: the ipv4 and ipv6 rules were flushed and have been restored. " + report.WayIn)
	for range 600 { // another program flushes them again and again
		w.Kernel.Rules = firewall.Ruleset{}
		w.check(time.Second)
	}
	if n := len(w.says); n < 5 || n > 15 {
		t.Errorf("%d messages in ten minutes", n)
	}
}

// The public status and login message contain no client address. The console message
// does.
func TestPublishedStatusNamesNoClient(t *testing.T) {
	w, _ := newWatched(t)
	w.facts.Seen = nil
	st, err := w.Store.Load()
	if err != nil {
		t.Fatal(err)
	}
	st.Client = store.Client{Source: "named", Reason: "client_ip = 203.0.113.9"}
	if err := w.Store.Save(st); err != nil {
		t.Fatal(err)
	}
	w.Kernel.Rules = firewall.Ruleset{}
	w.daemon.publish(context.Background())
	files := w.Contents(t)
	for _, path := range []string{StatusFile, motd.MessageFile} {
		if text := files[path]; text == "" || strings.Contains(text, "203.0.113.9") {
			t.Errorf("%s is %s", path, text)
		}
	}
	if !strings.Contains(files[motd.IssueFile], "203.0.113.9") {
		t.Errorf("the console shows %s", files[motd.IssueFile])
	}
}

// While a command holds the lock there is no check, and one afterwards. When the daemon
// returns, it leaves no goroutine.
func TestRunWaitsForCommands(t *testing.T) {
	w, _ := newWatched(t)
	w.Now = firewall.Moment{} // the real time
	goroutines := runtime.NumGoroutine()
	var notify func()
	var checks atomic.Int32
	d := w.daemon
	d.Interfaces = func() ([]firewall.Interface, error) { checks.Add(1); return nil, nil }
	d.Watch = func(ctx context.Context, f func()) { notify = f }
	ready := make(chan struct{})
	d.Ready = func(string) { close(ready) }
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- d.Run(ctx) }()
	<-ready
	unlock, err := store.New(&system.System{Root: w.Root}).Lock(ctx, "a command")
	if err != nil {
		t.Fatal(err)
	}
	before := checks.Load()
	for range 1000 {
		notify()
	}
	// Longer than the daemon waits for the lock.
	<-time.After(lockWait + 2*settleQuiet)
	if n := checks.Load(); n != before {
		t.Fatalf("%d checks while a command holds the lock", n-before)
	}
	unlock()
	lab.Poll(t, "the check after the command", func() bool { return checks.Load() > before })
	// A thousand events at once cause one check.
	if n := checks.Load() - before; n > 2 {
		t.Errorf("%d checks", n)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	lab.Poll(t, "the daemon's goroutines to end", func() bool { return runtime.NumGoroutine() <= goroutines })
}
