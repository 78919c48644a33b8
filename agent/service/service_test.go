package service

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

const (
	testExec = "/usr/sbin/basicfw-agent"
	unitPath = "/etc/systemd/system/basicfw-agent.service"
	linkPath = "/etc/systemd/system/sysinit.target.wants/basicfw-agent.service"
)

func newTest(t *testing.T, sys *system.System) *Manager {
	t.Helper()
	m, err := New(sys, testExec)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func wantStatus(t *testing.T, m *Manager, want Status) {
	t.Helper()
	got, err := m.Status()
	if err != nil || got != want {
		t.Errorf("Status() = %+v, %v, want %+v", got, err, want)
	}
}

func TestTextsAreComplete(t *testing.T) {
	for initSystem := range definitions() {
		m := &Manager{sys: &system.System{Root: t.TempDir()}, executable: testExec, initSystem: initSystem}
		d, err := m.definition()
		if err != nil {
			t.Fatal(err)
		}
		// kardianos would expand "{{".
		for _, leftover := range []string{"@EXEC@", "{{"} {
			if strings.Contains(d.text, leftover) {
				t.Errorf("%s: the text has %q", initSystem, leftover)
			}
		}
		for _, want := range []string{testExec, "run"} {
			if !strings.Contains(d.text, want) {
				t.Errorf("%s: the text has no %q", initSystem, want)
			}
		}
	}
}

func TestBelowARoot(t *testing.T) {
	var steps []string
	sys := &system.System{Root: t.TempDir(), Step: lab.Before(func(op, name string) error {
		steps = append(steps, op+" "+name)
		return nil
	})}
	m := newTest(t, sys)
	wantStatus(t, m, Status{})
	if err := m.Install(); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, m, Status{Registered: true, Enabled: true})
	if target, err := sys.Readlink(linkPath); err != nil || target != unitPath {
		t.Errorf("the link of sysinit.target points to %q, %v", target, err)
	}
	if fi, err := sys.Stat(unitPath); err != nil || fi.Mode().Perm() != 0o644 {
		t.Errorf("the unit is %v, %v", fi, err)
	}
	if strings.Contains(strings.Join(steps, "\n"), "run ") {
		t.Errorf("a program was run: %q", steps)
	}

	steps = nil
	if err := m.Install(); err != nil || len(steps) > 0 {
		t.Errorf("the second Install: %v, steps %q", err, steps)
	}
	if err := m.Start(); err != nil || len(steps) > 0 {
		t.Errorf("Start: %v, steps %q", err, steps)
	}
	if err := m.Restart(); err != nil || len(steps) > 0 {
		t.Errorf("Restart: %v, steps %q", err, steps)
	}

	for i := range 2 {
		if err := m.Uninstall(); err != nil {
			t.Errorf("Uninstall %d: %v", i+1, err)
		}
		wantStatus(t, m, Status{})
		for _, p := range []string{unitPath, linkPath} {
			if sys.Exists(p) {
				t.Errorf("Uninstall %d leaves %s", i+1, p)
			}
		}
	}
}

func TestInstallReplacesADefinition(t *testing.T) {
	for name, leftover := range map[string]string{
		"empty":           "",
		"another version": "[Service]\nExecStart=/usr/sbin/basicfw-agent old\n",
	} {
		t.Run(name, func(t *testing.T) {
			sys := &system.System{Root: t.TempDir()}
			put(t, sys, unitPath, leftover)
			m := newTest(t, sys)
			if st, err := m.Status(); err != nil || st.Registered != (leftover != "") || st.Enabled {
				t.Errorf("Status() = %+v, %v before", st, err)
			}
			if err := m.Install(); err != nil {
				t.Fatal(err)
			}
			wantStatus(t, m, Status{Registered: true, Enabled: true})
		})
	}
}

func TestInstallAllOrNothing(t *testing.T) {
	count := 0
	sys := &system.System{Root: t.TempDir(), Step: lab.Before(func(op, name string) error { count++; return nil })}
	if err := newTest(t, sys).Install(); err != nil {
		t.Fatal(err)
	}
	if count < 3 {
		t.Fatalf("only %d steps", count)
	}
	for broken := range count {
		i := -1
		boom := errors.New("boom")
		sys := &system.System{Root: t.TempDir(), Step: lab.Before(func(op, name string) error {
			if i++; i == broken {
				return boom
			}
			return nil
		})}
		m := newTest(t, sys)
		if err := m.Install(); !errors.Is(err, boom) {
			t.Errorf("step %d broken: Install() = %v", broken, err)
		}
		wantStatus(t, m, Status{})
	}
}

func TestRefresh(t *testing.T) {
	sys := &system.System{Root: t.TempDir()}
	m := newTest(t, sys)
	if changed, err := m.Refresh(); changed || err != nil || sys.Exists(unitPath) {
		t.Errorf("not registered: Refresh() = %v, %v", changed, err)
	}
	if err := m.Install(); err != nil {
		t.Fatal(err)
	}
	want, err := sys.ReadLimited(unitPath, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if changed, err := m.Refresh(); changed || err != nil {
		t.Errorf("up to date: Refresh() = %v, %v", changed, err)
	}
	put(t, sys, unitPath, "[Unit]\nDescription=of an earlier version\n")
	if changed, err := m.Refresh(); !changed || err != nil {
		t.Errorf("of an earlier version: Refresh() = %v, %v", changed, err)
	}
	if got, err := sys.ReadLimited(unitPath, 1<<20); err != nil || string(got) != string(want) {
		t.Errorf("the unit is %q, %v after Refresh", got, err)
	}
	wantStatus(t, m, Status{Registered: true, Enabled: true})
}

func TestMasked(t *testing.T) {
	sys := &system.System{Root: t.TempDir()}
	if err := sys.MkdirAll(filepath.Dir(unitPath), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/null", filepath.Join(sys.Root, unitPath)); err != nil {
		t.Fatal(err)
	}
	m := newTest(t, sys)
	wantStatus(t, m, Status{})
	if err := m.Install(); err == nil || !strings.Contains(hint.Of(err), "systemctl unmask") {
		t.Errorf("Install() = %v, want a hint", err)
	}
	if changed, err := m.Refresh(); changed || err != nil {
		t.Errorf("Refresh() = %v, %v", changed, err)
	}
	if err := m.Uninstall(); err != nil {
		t.Errorf("Uninstall() = %v", err)
	}
	if target, err := sys.Readlink(unitPath); err != nil || target != "/dev/null" {
		t.Errorf("the administrator's mask points to %q, %v", target, err)
	}
}

func TestInstallRefuses(t *testing.T) {
	for _, executable := range []string{"basicfw-agent", "/opt/my agent", "/opt/a;b", "/opt/100%", `/opt/a"b`, "/opt/$x", "/opt/a\nb", "/"} {
		sys := &system.System{Root: t.TempDir()}
		m, err := New(sys, executable)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Install(); err == nil || !strings.Contains(err.Error(), "cannot be run as a service") {
			t.Errorf("%q: Install() = %v", executable, err)
		}
		wantStatus(t, m, Status{})
	}
	m := &Manager{sys: &system.System{Root: t.TempDir()}, executable: testExec, initSystem: "linux-openrc"}
	if err := m.Install(); err == nil || !strings.Contains(err.Error(), "linux-openrc") {
		t.Errorf("openrc: Install() = %v", err)
	}
	wantStatus(t, m, Status{})
	if err := m.Uninstall(); err != nil {
		t.Errorf("openrc: Uninstall() = %v", err)
	}
}

func TestPopulated(t *testing.T) {
	const group = "/system.slice/basicfw-agent.service/"
	for name, tt := range map[string]struct {
		file, data string
		want       bool
	}{
		"none":            {"cgroup.procs", "", false},
		"unified":         {group + "cgroup.events", "populated 1\nfrozen 0\n", true},
		"unified, empty":  {group + "cgroup.events", "populated 0\nfrozen 0\n", false},
		"hybrid":          {"/unified" + group + "cgroup.events", "populated 1\n", true},
		"legacy":          {"/systemd" + group + "cgroup.procs", "4711\n", true},
		"legacy, empty":   {"/systemd" + group + "cgroup.procs", "", false},
		"another service": {"/system.slice/sshd.service/cgroup.events", "populated 1\n", false},
	} {
		dir := t.TempDir()
		p := filepath.Join(dir, tt.file)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(tt.data), 0o644); err != nil {
			t.Fatal(err)
		}
		if got := system.Populated(dir, unit); got != tt.want {
			t.Errorf("%s: Populated() = %v", name, got)
		}
	}
}

// TestUnitSettings checks what the manual says about the unit, and what could be lost
// unnoticed.
func TestUnitSettings(t *testing.T) {
	for _, line := range []string{
		"Type=notify", "DefaultDependencies=no", "Conflicts=shutdown.target", "Before=shutdown.target",
		"Wants=network-pre.target", "Before=network-pre.target cloud-init-local.service",
		"ExecReload=@EXEC@ apply --no-rehearsal", "Restart=on-failure",
		// Its failure does not prevent loading the rules.
		"ExecStartPre=-+@EXEC@ prepare",
	} {
		if !regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(line) + `$`).MatchString(systemdUnit) {
			t.Errorf("the unit has no line %q", line)
		}
	}
	// PrivateTmp= and settings that name directories would order the unit after
	// their mounts.
	for _, key := range []string{"ExecStop", "PrivateTmp", "StateDirectory", "RuntimeDirectory", "RequiresMountsFor", "Requires"} {
		if regexp.MustCompile(`(?m)^` + key + `=`).MatchString(systemdUnit) {
			t.Errorf("the unit has %s=", key)
		}
	}
}

func put(t *testing.T, sys *system.System, path, text string) {
	t.Helper()
	if err := sys.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := sys.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
