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

// machine isolates this process's view of the machine: what it writes to /etc,
// /var, /usr and /run is lost with it. A stand-in for the agent records its
// arguments.
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

// machines returns what makes kardianos detect each kind of machine. systemctl performs
// the operations on files; the rest needs systemd.
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
		"container": "",
		"unix-systemv": `
rm -f /usr/bin/systemctl
mkdir -p /etc/init.d /etc/rc0.d /etc/rc1.d /etc/rc2.d /etc/rc3.d /etc/rc4.d /etc/rc5.d /etc/rc6.d
`,
	}
}

// onMachine runs the rest of a test on a machine of a kind, in a process of its own:
// kardianos detects the kind when a program starts. It reports whether this is that
// process.
func onMachine(t *testing.T, kind string) bool {
	t.Helper()
	if os.Getenv("BASICFW_TEST_MACHINE") == kind {
		return true
	}
	lab.Need(t, "unshare")
	if kind == "linux-systemd" || kind == "container" {
		lab.Need(t, "systemctl")
	}
	sys := &system.System{}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	var own []string
	if kind == "container" { // its first process is a shell
		own = []string{"-p", "-f", "--mount-proc"}
	}
	// The mounts may hide the program.
	res, err := sys.Run(context.Background(), system.Command{Name: "unshare", Args: append(own, "-m", "--propagation", "private", "sh", "-c",
		"exec 3<"+self+"\n"+machine+machines()[kind]+
			"cat <&3 >/run/self; chmod 755 /run/self; BASICFW_TEST_MACHINE="+kind+" exec /run/self -test.v -test.run '^"+t.Name()+"$'")})
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
		t.Fatalf("kardianos detects %q", m.initSystem)
	}
	// Another user's directory must not decide what root runs.
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
		t.Errorf("Install called systemctl with %q, want %q", got, want)
	}
	if data, err := os.ReadFile(unitPath); err != nil || string(data) != strings.ReplaceAll(systemdUnit, "@EXEC@", testExec) {
		t.Errorf("the unit is %q, %v", data, err)
	}
	if fi, err := os.Stat(unitPath); err != nil || fi.Mode().Perm() != 0o644 {
		t.Errorf("the unit is %v, %v", fi.Mode(), err)
	}
	if err := m.Install(); err != nil || logged(t, "/run/systemctl.log") != "" {
		t.Errorf("the second Install changes something: %v", err)
	}
	if err := m.Start(); err != nil {
		t.Error(err)
	}
	if got, want := logged(t, "/run/systemctl.log"), "reset-failed basicfw-agent.service\nstart --no-block basicfw-agent.service"; got != want {
		t.Errorf("Start called systemctl with %q, want %q", got, want)
	}
	put(t, sys, unitPath, "[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=sysinit.target\n")
	if changed, err := m.Refresh(); !changed || err != nil {
		t.Errorf("Refresh() = %v, %v", changed, err)
	}
	if got, want := logged(t, "/run/systemctl.log"), "reenable basicfw-agent.service\ndaemon-reload"; got != want {
		t.Errorf("Refresh called systemctl with %q, want %q", got, want)
	}
	wantStatus(t, m, Status{Registered: true, Enabled: true})
	for i := range 2 {
		if err := m.Uninstall(); err != nil {
			t.Errorf("Uninstall %d: %v", i+1, err)
		}
	}
	if got, want := logged(t, "/run/systemctl.log"), "stop basicfw-agent.service\ndisable basicfw-agent.service\ndaemon-reload"; got != want {
		t.Errorf("Uninstall called systemctl with %q, want %q", got, want)
	}
	wantStatus(t, m, Status{})
	if sys.Exists(linkPath) || sys.Exists(unitPath) {
		t.Error("Uninstall leaves files")
	}
	if sys.Exists("/run/hidden") {
		t.Error("systemd found a unit that other users cannot read")
	}
	if sys.Exists("/run/pwned") {
		t.Error("a program from the caller's PATH was run, or one with the caller's environment")
	}
	if now := slices.Sorted(slices.Values(os.Environ())); !slices.Equal(now, before) {
		t.Errorf("the environment is %q, and was %q before", now, before)
	}

	// A failed Install leaves nothing that would count as registered.
	if err := os.WriteFile("/usr/bin/systemctl", []byte("#!/bin/sh\n[ $1 != daemon-reload ]\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := m.Install(); err == nil {
		t.Error("Install succeeds without daemon-reload")
	}
	wantStatus(t, m, Status{})

	// Uninstall removes the unit even without systemctl.
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
		t.Fatalf("kardianos detects %q", m.initSystem)
	}
	if err := m.Install(); err != nil {
		t.Fatal(err)
	}
	wantStatus(t, m, Status{Registered: true, Enabled: true, Active: true})
	logged(t, "/run/initctl.log")
	upstartLog(t)
	for i, err := range []error{m.Start(), m.Restart(), m.Uninstall(), m.Uninstall()} {
		if err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
	if got, want := logged(t, "/run/initctl.log"), "start --no-wait basicfw-agent\nstatus basicfw-agent\nrestart --no-wait basicfw-agent\nstop basicfw-agent"; !strings.HasPrefix(got, want) {
		t.Errorf("initctl was called with %q, want %q", got, want)
	}
	wantStatus(t, m, Status{})
}

// upstartLog runs the scripts of the job as Upstart does, with and without a place for the
// log.
func upstartLog(t *testing.T) {
	t.Helper()
	const log = "/var/log/basicfw-agent.log"
	job, err := os.ReadFile("/etc/init/basicfw-agent.conf")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(job), "pre-start script\n")
	before, rest, _ := strings.Cut(rest, "end script\n")
	_, rest, _ = strings.Cut(rest, "\nscript\n")
	main, _, ok := strings.Cut(rest, "end script\n")
	if !ok || !strings.Contains(string(job), "\nenv LOG="+log+"\n") {
		t.Fatalf("the job has other scripts:\n%s", job)
	}
	main = strings.Replace(main, " run ", " plan ", 1) // the stand-in's run does not end
	run := func() {
		t.Helper()
		for _, script := range []string{before, main} {
			cmd := system.Command{Name: "env", Args: []string{"LOG=" + log, "sh", "-e", "-c", script}}
			if res, err := (&system.System{}).Run(context.Background(), cmd); err != nil {
				t.Errorf("%v\n%s%s", err, res.Stdout, res.Stderr)
			}
		}
		if got, want := logged(t, "/run/agent.log"), "verify --repair\nplan"; got != want {
			t.Errorf("the agent was called with %q, want %q", got, want)
		}
	}
	if err := os.WriteFile(log, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	run()
	if fi, err := os.Stat(log); err != nil || fi.Mode() != 0o600 {
		t.Errorf("the log: %v, %v", fi, err)
	}
	nowhere(t, log)
	run()
}

func TestSystemV(t *testing.T) {
	if !onMachine(t, "unix-systemv") {
		return
	}
	sys := &system.System{}
	m := newTest(t, sys)
	if m.initSystem != "unix-systemv" {
		t.Fatalf("kardianos detects %q", m.initSystem)
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

	// A log of an earlier version may be readable by all users.
	const log = "/var/log/basicfw-agent.log"
	private := func() {
		t.Helper()
		if fi, err := os.Stat(log); err != nil || fi.Mode() != 0o600 {
			t.Errorf("the log: %v, %v", fi, err)
		}
	}
	if err := os.WriteFile(log, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(); err != nil {
		t.Fatal(err)
	}
	defer m.Uninstall()
	private()
	called := func() bool {
		data, _ := os.ReadFile("/run/agent.log")
		st, err := m.Status()
		return string(data) == "run\n" && err == nil && st.Active
	}
	// Bootstrap holds the lock, for which a verification would wait.
	eventually(t, "started, without a verification", called)
	if err := m.Start(); err != nil || !called() {
		t.Fatalf("the second Start: %v, or it changes something", err)
	}
	logged(t, "/run/agent.log")
	if err := os.Remove(log); err != nil {
		t.Fatal(err)
	}
	if err := m.Restart(); err != nil {
		t.Fatal(err)
	}
	again := func() bool {
		data, _ := os.ReadFile("/run/agent.log")
		return string(data) == "verify --repair\nrun\n"
	}
	eventually(t, "started again", again)
	private()
	logged(t, "/run/agent.log")
	// Without /var there is no log, but there are rules.
	nowhere(t, log)
	if err := m.Restart(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "started without /var", again)
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
		t.Error("the service still runs after Uninstall")
	}
	if left, _ := filepath.Glob("/etc/*/*" + name + "*"); len(left) > 0 {
		t.Errorf("Uninstall leaves %q", left)
	}
}

// nowhere makes a file impossible to write.
func nowhere(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/run/nowhere/log", path); err != nil {
		t.Fatal(err)
	}
}

// A container whose first process is a shell registers the service for the systemd that it
// has, and starts nothing.
func TestContainer(t *testing.T) {
	if !onMachine(t, "container") {
		return
	}
	m := newTest(t, &system.System{})
	if m.initSystem != "linux-systemd" {
		t.Fatalf("the service manager is %q", m.initSystem)
	}
	for _, err := range []error{m.Install(), m.Start(), m.Restart()} {
		if err != nil {
			t.Error(err)
		}
	}
	wantStatus(t, m, Status{Registered: true, Enabled: true})
	if err := m.Uninstall(); err != nil {
		t.Error(err)
	}
	wantStatus(t, m, Status{})
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
