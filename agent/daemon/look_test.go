package daemon

import (
	"context"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/motd"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/test/fake"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// moved returns the ports of an sshd that was seen on port 2222.
func moved() ([]uint16, []string, bool, error) {
	return []uint16{2222}, []string{"2222: test"}, true, nil
}

// The next check repairs what another program changed and touches nothing else.
func TestCheckRepairs(t *testing.T) {
	w, good := newWatched(t)
	before := w.Contents(t)
	w.Steps = nil
	for range 3 {
		if changed, err := w.check(time.Minute); changed || err != nil {
			t.Fatalf("nothing differs: %v, %v", changed, err)
		}
	}
	for _, s := range w.Steps {
		if !strings.Contains(s, store.RunDir) {
			t.Errorf("nothing differs, but: %s", s)
		}
	}
	if s, _ := w.public(t); s.LastVerified == nil || !s.LastVerified.Equal(w.Now.Time) {
		t.Errorf("verified %v, want %v", s.LastVerified, w.Now.Time)
	}
	path := w.Path("/etc/sysconfig/iptables")
	for name, spoil := range map[string]func(){
		"flushed": func() { w.Kernel.Rules = firewall.Ruleset{} },
		"altered": func() { w.Kernel.Rules.IPv6 = w.Kernel.Rules.IPv6[:1:1] },
		"file":    func() { os.Remove(path) },
		"mode":    func() { os.Chmod(path, 0o644) },
		"unit":    func() { w.Service.Registered = false },
		"all":     func() { w.Kernel.Rules = firewall.Ruleset{}; os.Remove(path); w.Service.Registered = false },
	} {
		spoil()
		if changed, err := w.check(time.Minute); !changed || err != nil {
			t.Errorf("%s: %v, %v", name, changed, err)
		}
		after := w.Contents(t)
		if !w.Kernel.Rules.Equal(good) || !w.Service.Registered || after["/etc/sysconfig/iptables"] != before["/etc/sysconfig/iptables"] {
			t.Errorf("%s: not repaired", name)
		}
		if changed, err := w.check(time.Minute); changed || err != nil {
			t.Errorf("%s: the check after the repair: %v, %v", name, changed, err)
		}
	}
	if n := strings.Count(w.log.String(), "level=warning"); n == 0 || n > 30 {
		t.Errorf("%d warnings:\n%s", n, w.log.String())
	}
}

// The rules are repaired even if no file can be written.
func TestCheckRepairsRulesFirst(t *testing.T) {
	w, good := newWatched(t)
	w.Kernel.Rules, w.Service.Registered = firewall.Ruleset{}, false
	os.Remove(w.Path("/etc/sysconfig/iptables"))
	w.System.Step = lab.Before(func(op, name string) error {
		if strings.HasPrefix(name, "/etc/") {
			return fs.ErrPermission
		}
		return nil
	})
	if _, err := w.check(0); !errors.Is(err, fs.ErrPermission) || !w.Kernel.Rules.Equal(good) || w.Kernel.Loads != 1 {
		t.Fatalf("%v, %d loads", err, w.Kernel.Loads)
	}
	// Attempts become rare.
	w.log.Reset()
	for range 600 {
		w.check(time.Second)
	}
	if n := strings.Count(w.log.String(), "could not be repaired"); n == 0 || n > 15 { // files and unit
		t.Errorf("%d attempts in ten minutes", n)
	}
	w.Kernel.Rules = firewall.Ruleset{}
	if _, err := w.check(time.Second); !w.Kernel.Rules.Equal(good) {
		t.Errorf("files that cannot be written prevent the repair of the rules: %v", err)
	}
}

// If another program undoes each repair, the daemon backs off, reports it, and resumes.
func TestCheckBacksOff(t *testing.T) {
	w, _ := newWatched(t)
	undo := func() { w.Kernel.Rules = firewall.Ruleset{} }
	for range 30 {
		undo()
		w.check(time.Second)
	}
	// Five, and one after ten seconds.
	if w.Kernel.Loads != backoffRepairs+1 {
		t.Errorf("%d loads", w.Kernel.Loads)
	}
	undo()
	s, in := w.public(t)
	if s.State != report.Drifted || len(in.RepairPaused) != 1 ||
		!slices.ContainsFunc(report.New(in).Warnings, func(w report.Warning) bool { return w.Code == "repair-paused" && w.Text == in.RepairPaused[0] }) {
		t.Errorf("state %q, %q, %q", s.State, in.RepairPaused, report.New(in).Warnings)
	}
	message := w.Contents(t)[motd.MessageFile]
	if !strings.Contains(message, "repairs of the rules fail or do not last") || strings.Count(message, "\n") != 2 {
		t.Errorf("the login message: %q", message)
	}
	// sshd's port is opened nevertheless.
	w.daemon.Ports, w.facts = moved, host.Facts{SSHPorts: []uint16{2222}, SSHLive: true}
	if _, err := w.check(time.Second); err != nil || w.Kernel.Rules.IsZero() {
		t.Errorf("sshd moved during the backoff: %v", err)
	}
	w.check(backoffLongest)
	w.check(backoffLongest)
	if s, in := w.public(t); s.State != report.Protected || len(in.RepairPaused) > 0 {
		t.Errorf("after the backoff: %q, %q", s.State, in.RepairPaused)
	}
	if message := w.Contents(t)[motd.MessageFile]; message != "" {
		t.Errorf("the login message is still %q", message)
	}
	loads := w.Kernel.Loads
	for range backoffRepairs {
		undo()
		w.check(time.Second)
	}
	if w.Kernel.Loads != loads+backoffRepairs {
		t.Errorf("%d repairs after the backoff", w.Kernel.Loads-loads)
	}
	// After the daemon has returned, no pause is left.
	undo()
	w.check(time.Second)
	if _, in := w.public(t); len(in.RepairPaused) == 0 {
		t.Error("it does not back off again")
	}
	w.daemon.leave()
	if _, in := w.public(t); len(in.RepairPaused) > 0 {
		t.Error("the backoff remains without the daemon")
	}
}

// After sshd moved, the next check opens the new port and closes the old one. It does so
// also in a pending change and while repairs are paused.
func TestCheckFollowsSSHD(t *testing.T) {
	for i := range 4 {
		pending, paused := i&1 != 0, i&2 != 0
		w, _ := newWatched(t)
		want := fake.Decided(t, "203.0.113.9/32")
		if pending {
			want = fake.Decided(t, "198.51.100.7/32")
			if _, err := w.Try(context.Background(), want, time.Hour, apply.Options{}); err != nil {
				t.Fatal(err)
			}
		}
		for n := 0; paused && n < backoffRepairs+2; n++ {
			w.Kernel.Rules = firewall.Ruleset{}
			w.check(time.Second)
		}
		w.log.Reset()
		w.daemon.Ports = moved
		if changed, err := w.check(time.Second); !changed || err != nil {
			t.Fatalf("pending %v, paused %v: %v, %v", pending, paused, changed, err)
		}
		want.Desired.SSH.Ports = []uint16{2222}
		if !w.Kernel.Rules.Equal(fake.Compiled(t, want).Ruleset) {
			t.Errorf("pending %v, paused %v: the rules do not follow", pending, paused)
		}
		if changed, err := w.check(time.Second); changed || err != nil {
			t.Errorf("pending %v, paused %v: the next check: %v, %v", pending, paused, changed, err)
		}
		if strings.Contains(w.log.String(), "another program") {
			t.Errorf("pending %v, paused %v: no other program changed anything: %s", pending, paused, w.log.String())
		}
	}
}

// A pending change is repaired as such, and rolled back if it is not confirmed.
func TestCheckRepairsAndExpiresPending(t *testing.T) {
	w, good := newWatched(t)
	w.Now.Boot, w.Now.Uptime = "b", time.Minute
	pass := func(d time.Duration) (bool, error) {
		w.Now.Uptime += d
		return w.check(d)
	}
	if _, err := w.Try(context.Background(), fake.Decided(t, "198.51.100.7/32"), time.Minute, apply.Options{}); err != nil {
		t.Fatal(err)
	}
	tried := w.Kernel.Rules
	file := w.Contents(t)["/etc/sysconfig/iptables"]
	if changed, err := pass(time.Second); changed || err != nil || !w.Kernel.Rules.Equal(tried) {
		t.Errorf("%v, %v", changed, err)
	}
	w.Kernel.Rules = firewall.Ruleset{}
	if changed, err := pass(time.Second); !changed || err != nil || !w.Kernel.Rules.Equal(tried) {
		t.Errorf("flushed: %v, %v", changed, err)
	}
	if w.Contents(t)["/etc/sysconfig/iptables"] != file {
		t.Error("the files have the pending change")
	}
	// What expires in the previous rules causes no check while a change is pending.
	st, err := w.Store.Load()
	if err != nil {
		t.Fatal(err)
	}
	st.Desired.SSH.Timed = []firewall.TimedSource{{From: netip.MustParsePrefix("192.0.2.9/32"), Until: w.Now.Time.Add(-time.Second)}}
	if err := w.Store.Save(st); err != nil {
		t.Fatal(err)
	}
	if end, _ := w.daemon.due(); !end.After(w.Now.Time) {
		t.Errorf("the next check is at %v, %v ago", end, w.Now.Time.Sub(end))
	}
	st.Desired.SSH.Timed = nil
	if err := w.Store.Save(st); err != nil {
		t.Fatal(err)
	}
	if changed, err := pass(2 * time.Minute); !changed || err != nil || !w.Kernel.Rules.Equal(good) {
		t.Errorf("rolled back: %v, %v", changed, err)
	}
	if st, err := w.Store.Load(); err != nil || !strings.Contains(st.RolledBack, "not confirmed within") || w.System.Exists(store.PendingFile) {
		t.Errorf("the state has %q, %v", st.RolledBack, err)
	}
	if changed, err := pass(time.Second); changed || err != nil {
		t.Errorf("the check after that: %v, %v", changed, err)
	}
}

// If the state or its copy becomes unreadable or is lost while the daemon runs, the next
// check restores it.
func TestCheckRestoresTheState(t *testing.T) {
	for name, spoil := range map[string]func(w *watched) error{
		"unreadable":      func(w *watched) error { return os.WriteFile(w.Path(store.StateFile), []byte("{"), 0o600) },
		"/var wiped":      func(w *watched) error { return os.RemoveAll(w.Path(store.Dir)) },
		"copy lost":       func(w *watched) error { return os.Remove(w.Path(store.CopyFile)) },
		"copy unreadable": func(w *watched) error { return os.WriteFile(w.Path(store.CopyFile), []byte("{"), 0o600) },
	} {
		w, good := newWatched(t)
		want := w.Contents(t)[store.StateFile]
		if err := spoil(w); err != nil {
			t.Fatal(err)
		}
		if changed, err := w.check(time.Second); changed || err != nil {
			t.Errorf("%s: %v, %v", name, changed, err)
		}
		files := w.Contents(t)
		if files[store.StateFile] != want || files[store.CopyFile] != want {
			t.Errorf("%s: the state is %q, its copy %q", name, files[store.StateFile], files[store.CopyFile])
		}
		w.Kernel.Rules = firewall.Ruleset{}
		if changed, err := w.check(time.Second); !changed || err != nil || !w.Kernel.Rules.Equal(good) {
			t.Errorf("%s: flushed: %v, %v", name, changed, err)
		}
	}
}

// If /var cannot be written, the machine is repaired from the copy, and the lost state is
// reported.
func TestCheckRepairsWithoutVar(t *testing.T) {
	w, good := newWatched(t)
	w.Store.UseCopy()
	if err := os.RemoveAll(w.Path("var")); err != nil {
		t.Fatal(err)
	}
	w.System.Step = lab.Before(func(_, name string) error {
		if strings.HasPrefix(name, "/var/") {
			return syscall.EROFS
		}
		return nil
	})
	second := w.Contents(t)[store.CopyFile]
	for _, flushed := range []bool{false, true, false} {
		if flushed {
			w.Kernel.Rules = firewall.Ruleset{}
		}
		changed, err := w.check(time.Second)
		if changed != flushed || !errors.Is(err, syscall.EROFS) || !strings.Contains(err.Error(), "restoring "+store.StateFile) {
			t.Errorf("flushed %v: %v, %v", flushed, changed, err)
		}
		if !w.Kernel.Rules.Equal(good) {
			t.Errorf("flushed %v: the rules differ", flushed)
		}
	}
	if w.Contents(t)[store.CopyFile] != second {
		t.Error("the copy differs")
	}
}

// If state and copy become unreadable while the daemon runs, the machine does not stay
// open.
func TestCheckClosesWithoutState(t *testing.T) {
	w, _ := newWatched(t)
	paths := []string{w.Path(store.StateFile), w.Path(store.CopyFile)}
	for _, path := range paths {
		if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		if changed, err := w.check(time.Second); changed || err == nil {
			t.Errorf("the rules are loaded: %v, %v", changed, err)
		}
	}
	w.Kernel.Open = true
	if changed, err := w.check(time.Second); !changed || err == nil || w.Kernel.Loads != 1 {
		t.Errorf("the rules are gone: %v, %v, %d loads", changed, err, w.Kernel.Loads)
	}
	// Uninstalled: the machine is no longer filtered.
	w.Kernel.Open = false
	if err := errors.Join(os.Remove(paths[1]), w.Store.Forget()); err != nil {
		t.Fatal(err)
	}
	w.Kernel.Rules = firewall.Ruleset{}
	w.Steps = nil
	if changed, err := w.check(time.Second); changed || err != nil || len(w.Steps) > 0 {
		t.Errorf("without a state: %v, %v, %q", changed, err, w.Steps)
	}
}

// The daemon lowers a guard that an interrupted change left.
func TestCheckLowersTheGuard(t *testing.T) {
	w, _ := newWatched(t)
	w.Guard.Raised = true
	if changed, err := w.check(0); !changed || err != nil || w.Guard.Raised {
		t.Errorf("changed %v, %v, guard %v", changed, err, w.Guard.Raised)
	}
	if changed, err := w.check(0); changed || err != nil {
		t.Errorf("the second check: %v, %v", changed, err)
	}
}

// On a clone, SSH is not pinned to the detected client of the original. A client that the
// administrator named stays.
func TestCheckLoosensClone(t *testing.T) {
	for _, source := range []string{"named", "settings"} {
		w := watch(t, fake.New(t))
		st := fake.Decided(t, "203.0.113.9/32")
		st.InstanceID, st.Client.Source = "i-1", source
		w.Install(t, st)
		w.daemon.Instance = func() string { return "i-2" }
		if changed, err := w.check(0); changed || err != nil {
			t.Errorf("%s: another instance: %v, %v", source, changed, err)
		}
		if got, err := w.Store.Load(); err != nil || got.Desired.SSH.Mode != firewall.SSHPinned {
			t.Errorf("%s: %+v, %v", source, got.Desired.SSH, err)
		}
	}
	w := watch(t, fake.New(t))
	st := fake.Decided(t, "203.0.113.9/32")
	st.InstanceID, st.Client.Source = "i-1", "session"
	w.Install(t, st)
	w.daemon.Instance = func() string { return "i-1" }
	if changed, err := w.check(0); changed || err != nil {
		t.Errorf("the same instance: %v, %v", changed, err)
	}
	w.daemon.Instance = func() string { return "i-2" }
	if changed, err := w.check(0); !changed || err != nil {
		t.Fatalf("another instance: %v, %v", changed, err)
	}
	got, err := w.Store.Load()
	if err != nil || got.Desired.SSH.Mode != firewall.SSHLimited || got.Client.Source != "clone" {
		t.Errorf("%+v, %v", got.Desired.SSH, err)
	}
	if changed, err := w.check(0); changed || err != nil {
		t.Errorf("the second check: %v, %v", changed, err)
	}
}

// Temporary rules are removed from the kernel, the state and the settings when they have
// expired, and not before.
func TestCheckRemovesWhatExpired(t *testing.T) {
	for _, broken := range []bool{false, true} {
		w := watch(t, fake.New(t))
		begin := time.Now().UTC().Truncate(time.Second)
		w.Now.Time = begin
		st := fake.Decided(t, "192.0.2.9/32")
		end, source := begin.Add(time.Minute), netip.MustParsePrefix("192.0.2.10/32")
		st.Desired.Open = []firewall.Service{{Name: "x", Proto: firewall.TCP, Ports: firewall.Port(8080), On: "any", Until: end}}
		st.Desired.SSH.Timed = []firewall.TimedSource{{From: source, Until: end.Add(time.Hour)}}
		st.Allowed = []store.Allowed{{From: source, Until: end.Add(time.Hour), Reason: "test"}}
		w.Install(t, fake.Compiled(t, st))
		w.Write(t, fake.LocalFile, "with it")
		w.daemon.Prune = func([]firewall.Timer) (*files.Change, error) {
			if broken {
				return nil, errors.New("a typing mistake")
			}
			return &files.Change{Path: fake.LocalFile, Data: []byte("without it"), Mode: 0o600}, nil
		}
		for _, c := range []struct {
			after       time.Duration
			changed     bool
			open, timed int
			settings    string
		}{
			{0, false, 1, 1, "with it"},
			{time.Minute, false, 1, 1, "with it"},
			{time.Minute + time.Second, true, 0, 1, "without it"},
			{time.Minute + 2*time.Second, false, 0, 1, "without it"},
			{2 * time.Hour, true, 0, 0, "without it"},
		} {
			w.Now.Time = begin.Add(c.after)
			changed, err := w.check(0)
			if err != nil || changed != c.changed {
				t.Errorf("after %v: changed %v, %v", c.after, changed, err)
			}
			st, err := w.Store.Load()
			if err != nil {
				t.Fatal(err)
			}
			if len(st.Desired.Open) != c.open || len(st.Desired.SSH.Timed) != c.timed || len(st.Allowed) != c.timed {
				t.Errorf("after %v: %v, %v, %v", c.after, st.Desired.Open, st.Desired.SSH.Timed, st.Allowed)
			}
			if !w.Kernel.Rules.Equal(fake.Compiled(t, st).Ruleset) {
				t.Errorf("after %v: other rules are loaded", c.after)
			}
			want := c.settings
			if broken {
				want = "with it"
			}
			if data, _ := os.ReadFile(w.Path(fake.LocalFile)); string(data) != want {
				t.Errorf("after %v: the settings are %q, want %q", c.after, data, want)
			}
		}
	}
}
