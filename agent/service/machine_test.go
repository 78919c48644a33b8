package service

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// machine makes this process's view of the machine one of its own: what is
// written to /etc, /var, /usr and /run is gone with it. A stand-in for the
// agent writes down what it is called with.
const machine = `set -e
mount -t tmpfs machine /mnt
for d in etc var usr; do
	mkdir -p /mnt/$d/upper /mnt/$d/work
	mount -t overlay $d -o lowerdir=/$d,upperdir=/mnt/$d/upper,workdir=/mnt/$d/work /$d
done
mount -t tmpfs run /run
mkfifo /run/never
cat >/usr/sbin/basicfw-agent <<'EOF'
#!/bin/sh
echo "$@" >>/run/agent.log
case $1 in run) read -r _ </run/never;; esac
EOF
chmod 755 /usr/sbin/basicfw-agent
`

// machines are what makes kardianos take the machine for one of a kind. What
// systemctl is asked to do to files it does; the rest needs a systemd.
func machines() map[string]string {
	return map[string]string{
		"linux-systemd": `
mkdir -p /run/systemd/system
cp /usr/bin/systemctl /run/systemctl
rm /usr/bin/systemctl
cat >/usr/bin/systemctl <<'EOF'
#!/bin/sh
echo "$@" >>/run/systemctl.log
[ -z "$SYSTEMD_EDITOR" ] || touch /run/pwned
[ $1 != enable ] || [ "$(stat -c %a /etc/systemd/system/$2)" = 644 ] || touch /run/hidden
case $1 in enable|disable|reenable) SYSTEMD_OFFLINE=1 exec /run/systemctl "$@";; esac
EOF
chmod 755 /usr/bin/systemctl
`,
		"linux-upstart": `
cat >/usr/sbin/initctl <<'EOF'
#!/bin/sh
echo "$@" >>/run/initctl.log
case $1 in
--version) echo "initctl (upstart 0.6.5)";;
status) echo "basicfw-agent start/running, process 4711";;
esac
EOF
chmod 755 /usr/sbin/initctl
mkdir -p /etc/init
`,
		"unix-systemv": `
mkdir -p /etc/init.d /etc/rc0.d /etc/rc1.d /etc/rc2.d /etc/rc3.d /etc/rc4.d /etc/rc5.d /etc/rc6.d
`,
	}
}

// onMachine runs the rest of a test on a machine of a kind, in a process of its
// own: kardianos looks around when a program starts. It tells whether this is
// that process.
func onMachine(t *testing.T, kind string) bool {
	t.Helper()
	if os.Getenv("BASICFW_TEST_MACHINE") == kind {
		return true
	}
	lab.Need(t, "unshare")
	if kind == "linux-systemd" {
		lab.Need(t, "systemctl")
	}
	sys := &system.System{}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// The program may be below what is mounted over.
	res, err := sys.Run(context.Background(), system.Command{Name: "unshare", Args: []string{"-m", "--propagation", "private", "sh", "-c",
		"exec 3<" + self + "\n" + machine + machines()[kind] +
			"cat <&3 >/run/self; chmod 755 /run/self; BASICFW_TEST_MACHINE=" + kind + " exec /run/self -test.v -test.run '^" + t.Name() + "$'"}})
	if err != nil || !strings.Contains(string(res.Stdout), "--- PASS: "+t.Name()) {
		t.Fatalf("%v\n%s%s", err, res.Stdout, res.Stderr)
	}
	return false
}

func logged(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	os.Remove(path)
	return strings.TrimSpace(string(data))
}

func TestSystemd(t *testing.T) {
	if !onMachine(t, "linux-systemd") {
		return
	}
	sys := &system.System{}
	m := newTest(t, sys)
	if m.initSystem != "linux-systemd" {
		t.Fatalf("kardianos sees %q", m.initSystem)
	}
	// The directory of somebody else must not decide what root runs.
	if err := os.Mkdir("/run/bad", 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod("/run/bad", 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/run/bad/systemctl", []byte("#!/bin/sh\ntouch /run/pwned\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", "/run/bad:"+os.Getenv("PATH"))
	t.Setenv("SYSTEMD_EDITOR", "/run/bad/systemctl")
	before := os.Environ()
	slices.Sort(before)

	defer syscall.Umask(syscall.Umask(0o077))
	put(t, sys, unitPath, "") // as a failure of kardianos leaves it
	wantStatus(t, m, Status{})
	if err := m.Install(); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, m, Status{Registered: true, Enabled: true})
	if got, want := logged(t, "/run/systemctl.log"), "enable basicfw-agent.service\ndaemon-reload"; got != want {
		t.Errorf("Install asked systemctl for %q, want %q", got, want)
	}
	if data, err := os.ReadFile(unitPath); err != nil || string(data) != strings.ReplaceAll(systemdUnit, "@EXEC@", testExec) {
		t.Errorf("the unit is %q, %v", data, err)
	}
	if fi, err := os.Stat(unitPath); err != nil || fi.Mode().Perm() != 0o644 {
		t.Errorf("the unit is %v, %v", fi.Mode(), err)
	}
	if err := m.Install(); err != nil || logged(t, "/run/systemctl.log") != "" {
		t.Errorf("the second Install does something: %v", err)
	}
	if err := m.Start(); err != nil {
		t.Error(err)
	}
	if got, want := logged(t, "/run/systemctl.log"), "reset-failed basicfw-agent.service\nstart --no-block basicfw-agent.service"; got != want {
		t.Errorf("Start asked systemctl for %q, want %q", got, want)
	}
	put(t, sys, unitPath, "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=sysinit.target\n")
	if changed, err := m.Refresh(); !changed || err != nil {
		t.Errorf("Refresh() = %v, %v", changed, err)
	}
	if got, want := logged(t, "/run/systemctl.log"), "reenable basicfw-agent.service\ndaemon-reload"; got != want {
		t.Errorf("Refresh asked systemctl for %q, want %q", got, want)
	}
	wantStatus(t, m, Status{Registered: true, Enabled: true})
	for i := range 2 {
		if err := m.Uninstall(); err != nil {
			t.Errorf("Uninstall %d: %v", i+1, err)
		}
	}
	if got, want := logged(t, "/run/systemctl.log"), "stop basicfw-agent.service\ndisable basicfw-agent.service\ndaemon-reload"; got != want {
		t.Errorf("Uninstall asked systemctl for %q, want %q", got, want)
	}
	wantStatus(t, m, Status{})
	if sys.Exists(linkPath) || sys.Exists(unitPath) {
		t.Error("Uninstall leaves files")
	}
	if sys.Exists("/run/hidden") {
		t.Error("systemd is shown a unit that others cannot read")
	}
	if sys.Exists("/run/pwned") {
		t.Error("a program from a directory of the caller's was run, or one with the caller's environment")
	}
	if now := slices.Sorted(slices.Values(os.Environ())); !slices.Equal(now, before) {
		t.Errorf("the environment is %q afterwards, and was %q", now, before)
	}

	// A failure on the way leaves nothing that would count as registered.
	if err := os.WriteFile("/usr/bin/systemctl", []byte("#!/bin/sh\n[ $1 != daemon-reload ]\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := m.Install(); err == nil {
		t.Error("Install is fine without daemon-reload")
	}
	wantStatus(t, m, Status{})

	// Without systemctl, what is there is still taken out.
	put(t, sys, unitPath, systemdUnit)
	if err := os.Remove("/usr/bin/systemctl"); err != nil {
		t.Fatal(err)
	}
	if err := m.Uninstall(); err != nil || sys.Exists(unitPath) {
		t.Errorf("Uninstall without systemctl: %v", err)
	}
}

func TestUpstart(t *testing.T) {
	if !onMachine(t, "linux-upstart") {
		return
	}
	m := newTest(t, &system.System{})
	if m.initSystem != "linux-upstart" {
		t.Fatalf("kardianos sees %q", m.initSystem)
	}
	if err := m.Install(); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, m, Status{Registered: true, Enabled: true, Active: true})
	logged(t, "/run/initctl.log")
	for i, err := range []error{m.Start(), m.Restart(), m.Uninstall(), m.Uninstall()} {
		if err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
	if got, want := logged(t, "/run/initctl.log"), "start --no-wait basicfw-agent\nstatus basicfw-agent\nrestart --no-wait basicfw-agent\nstop basicfw-agent"; !strings.HasPrefix(got, want) {
		t.Errorf("initctl was asked for %q, want %q", got, want)
	}
	wantStatus(t, m, Status{})
}

func TestSystemV(t *testing.T) {
	if !onMachine(t, "unix-systemv") {
		return
	}
	sys := &system.System{}
	m := newTest(t, sys)
	if m.initSystem != "unix-systemv" {
		t.Fatalf("kardianos sees %q", m.initSystem)
	}
	if err := m.Install(); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, m, Status{Registered: true, Enabled: true})
	for _, want := range []string{"/etc/rc2.d/S09", "/etc/rc3.d/S09", "/etc/rc5.d/S09", "/etc/rc0.d/K02", "/etc/rc6.d/K02"} {
		if _, err := os.Stat(want + name); err != nil {
			t.Error(err)
		}
	}
	if late, _ := filepath.Glob("/etc/rc?.d/S50" + name); len(late) > 0 {
		t.Errorf("started after the network by %q", late)
	}

	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	defer m.Uninstall()
	called := func() bool {
		data, _ := os.ReadFile("/run/agent.log")
		st, err := m.Status()
		return string(data) == "verify --repair\nrun\n" && err == nil && st.Active
	}
	eventually(t, "started, with the rules first", called)
	if err := m.Start(); err != nil || !called() {
		t.Fatalf("a second Start = %v, or does something", err)
	}
	logged(t, "/run/agent.log")
	if err := m.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "started again", called)
	logged(t, "/run/agent.log")
	if _, err := sys.Run(context.Background(), system.Command{Name: "/etc/init.d/basicfw-agent", Args: []string{"reload"}}); err != nil {
		t.Error(err)
	}
	if got := logged(t, "/run/agent.log"); got != "apply" {
		t.Errorf("reload called the agent with %q", got)
	}
	if _, err := sys.Run(context.Background(), system.Command{Name: "/etc/init.d/basicfw-agent", Args: []string{"status"}}); err != nil {
		t.Error(err)
	}
	pid, err := os.ReadFile("/run/basicfw-agent.pid")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		if err := m.Uninstall(); err != nil {
			t.Errorf("Uninstall %d: %v", i+1, err)
		}
	}
	wantStatus(t, m, Status{})
	if _, err := os.Stat("/proc/" + strings.TrimSpace(string(pid))); err == nil {
		t.Error("the service runs after Uninstall")
	}
	if left, _ := filepath.Glob("/etc/*/*" + name + "*"); len(left) > 0 {
		t.Errorf("Uninstall leaves %q", left)
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not %s within 10 s", what)
		}
		<-time.After(10 * time.Millisecond)
	}
}
