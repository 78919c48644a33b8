// Package service registers the agent with the machine's service manager. It is
// the only importer of github.com/kardianos/service, which finds out which
// manager that is and registers; what is registered is written here.
package service

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/kardianos/service"

	"github.com/basicfw/basicfw-agent/agent/system"
)

const (
	name = "basicfw-agent"
	unit = name + ".service"
)

//go:embed basicfw-agent.service
var systemdUnit string

//go:embed basicfw-agent.init
var sysvScript string

//go:embed basicfw-agent.conf
var upstartJob string

// Manager registers and starts the service.
type Manager struct {
	sys *system.System
	// executable is what the service runs.
	executable string
	// initSystem is what kardianos found, in its words.
	initSystem string
}

// New gives the manager of the service on sys, which runs executable; "" is
// the program that asks. Where sys has a root, systemd is taken to be what will
// boot there, and files are all that changes.
func New(sys *system.System, executable string) (*Manager, error) {
	if executable == "" {
		var err error
		if executable, err = os.Executable(); err != nil {
			return nil, fmt.Errorf("finding this program: %w", err)
		}
	}
	m := &Manager{sys: sys, executable: executable, initSystem: service.Platform()}
	if sys.Root != "" {
		m.initSystem = "linux-systemd"
	}
	return m, nil
}

// Status is how the service manager will see, and sees, the service.
type Status struct {
	Registered bool // the service manager knows it
	Enabled    bool // it is started at boot
	Active     bool // processes of it are there now
}

// definition is what a service manager reads about the service.
type definition struct {
	path string
	mode fs.FileMode
	text string // "@EXEC@" stands for the program
	// option is the name under which kardianos takes a text of ours.
	option string
}

// definitions are what the service managers read, by kardianos's names for
// them.
func definitions() map[string]definition {
	return map[string]definition{
		"linux-systemd": {"/etc/systemd/system/" + unit, 0o644, systemdUnit, "SystemdScript"},
		"linux-upstart": {"/etc/init/" + name + ".conf", 0o644, upstartJob, "UpstartScript"},
		"unix-systemv":  {"/etc/init.d/" + name, 0o755, sysvScript, "SysvScript"},
	}
}

func (m *Manager) definition() (definition, error) {
	d, ok := definitions()[m.initSystem]
	if !ok {
		return d, fmt.Errorf("the service manager of this machine is %q: only systemd, Upstart and System V are supported; run \"%s run\" at boot, before the network, in another way",
			m.initSystem, m.executable)
	}
	// The path goes into a unit, a shell script and an Upstart job, each with
	// quoting rules of its own. One that needs none is all that is asked for.
	if !regexp.MustCompile(`^/[A-Za-z0-9/._+-]+$`).MatchString(m.executable) {
		return d, fmt.Errorf("%q cannot be run as a service: move it to a path of letters, digits and \"/._+-\"", m.executable)
	}
	d.text = strings.ReplaceAll(d.text, "@EXEC@", m.executable)
	return d, nil
}

// Install registers the service, so that it is started at every boot. It does
// not start it. Where it is registered already, as this version would do it,
// nothing changes. If it fails, the service is not registered.
func (m *Manager) Install() (err error) {
	d, err := m.definition()
	if err != nil {
		return err
	}
	if m.masked(d) {
		return fmt.Errorf("%s is masked: run \"systemctl unmask %s\" first", unit, unit)
	}
	if m.installed(d) {
		return nil
	}
	// What is there is of another version, or incomplete. kardianos refuses to
	// go over it, even over the empty file that its own failures leave behind.
	if err := m.removeFiles(d); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.removeFiles(d))
		}
	}()
	if m.live() {
		err = m.register(d)
	} else {
		err = m.writeFiles(d)
	}
	if err != nil {
		return err
	}
	if !m.installed(d) {
		return fmt.Errorf("%s is not what was written to it, or is not started at boot", d.path)
	}
	return nil
}

// live tells whether the service manager runs, and can be talked to. Below a
// root, and in an image that is being built, it does not.
func (m *Manager) live() bool {
	return m.sys.Root == "" && (m.initSystem != "linux-systemd" || m.sys.Exists("/run/systemd/system"))
}

// register has kardianos write the definition and enable the service.
func (m *Manager) register(d definition) error {
	k, restore, err := m.kardianos(d)
	if err != nil {
		return err
	}
	defer restore()
	if err := m.sys.Do("install", d.path, k.Install); err != nil {
		return fmt.Errorf("registering %s: %w", d.path, err)
	}
	if m.initSystem == "unix-systemv" {
		if err := m.startBeforeNetwork(); err != nil {
			return err
		}
	}
	// It writes with the mode that the umask leaves, and trusts that no power
	// cut comes: a file that is empty at the next boot starts nothing.
	if err := m.sys.Chmod(d.path, d.mode); err != nil {
		return err
	}
	links, err := m.links()
	if err != nil {
		return err
	}
	dirs := []string{filepath.Dir(d.path)}
	for _, l := range links {
		dirs = append(dirs, filepath.Dir(l))
	}
	for _, p := range append(dirs, d.path) {
		if err := m.sys.Sync(p); err != nil {
			return fmt.Errorf("flushing %s: %w", p, err)
		}
	}
	return nil
}

// kardianos gives the library's view of the service. It runs systemctl by PATH,
// and hands on the environment. Until restore is called, that is what any
// program of ours gets: somebody else's must not decide what root runs, and how.
func (m *Manager) kardianos(d definition) (k service.Service, restore func(), err error) {
	k, err = service.New(nil, &service.Config{
		Name:       name,
		Executable: m.executable,
		Option:     service.KeyValue{d.option: d.text},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("asking for the service manager: %w", err)
	}
	if m.initSystem != "linux-systemd" {
		return k, func() {}, nil
	}
	systemctl, err := m.sys.LookPath("systemctl")
	if err != nil {
		return nil, nil, err
	}
	was := os.Environ()
	setEnviron([]string{"LC_ALL=C", "PATH=" + filepath.Dir(systemctl)})
	// systemd complains of a unit that others cannot read.
	umask := syscall.Umask(0o022)
	return k, func() { setEnviron(was); syscall.Umask(umask) }, nil
}

func setEnviron(environ []string) {
	os.Clearenv()
	for _, entry := range environ {
		if name, value, ok := strings.Cut(entry, "="); ok {
			os.Setenv(name, value)
		}
	}
}

// startBeforeNetwork moves the links that kardianos made: its S50 comes after
// the network (S10), and the rules must stand before. S09 is after the
// distribution's own iptables.
func (m *Manager) startBeforeNetwork() error {
	links, err := m.links()
	if err != nil {
		return err
	}
	for _, link := range links {
		if filepath.Base(link) != "S50"+name {
			continue
		}
		if err := m.sys.Rename(link, filepath.Join(filepath.Dir(link), "S09"+name)); err != nil {
			return err
		}
	}
	return nil
}

// writeFiles registers below a root, where no service manager runs.
func (m *Manager) writeFiles(d definition) error {
	wants := "/etc/systemd/system/sysinit.target.wants"
	if err := m.sys.MkdirAll(wants, 0o755); err != nil {
		return err
	}
	if err := m.sys.WriteFile(d.path, []byte(d.text), d.mode); err != nil {
		return err
	}
	return m.sys.Symlink(d.path, wants+"/"+unit)
}

// removeFiles takes out a definition and all that has it started at boot,
// without a service manager.
func (m *Manager) removeFiles(d definition) error {
	links, err := m.links()
	if err != nil {
		return err
	}
	for _, link := range links {
		if err := m.sys.Remove(link); err != nil {
			return err
		}
	}
	return m.sys.Remove(d.path)
}

// links are what has the service started, and for System V stopped, by the
// manager that it is registered with. Upstart needs none.
func (m *Manager) links() ([]string, error) {
	var links []string
	for _, pattern := range []string{"/etc/systemd/system/*.wants/" + unit, "/etc/rc[0-6S].d/[SK][0-9][0-9]" + name} {
		found, err := m.sys.Glob(pattern)
		if err != nil {
			return nil, err
		}
		links = append(links, found...)
	}
	return links, nil
}

// masked tells whether the owner has forbidden the unit.
func (m *Manager) masked(d definition) bool {
	target, err := m.sys.Readlink(d.path)
	return err == nil && target == os.DevNull
}

// installed tells whether the service is registered as this version does it.
func (m *Manager) installed(d definition) bool {
	data, err := m.sys.ReadFile(d.path)
	return err == nil && string(data) == d.text && m.enabled()
}

func (m *Manager) enabled() bool {
	if m.initSystem == "linux-upstart" {
		return true // by its "start on"
	}
	links, err := m.links()
	if err != nil {
		return false
	}
	for _, l := range links {
		if filepath.Base(l)[0] != 'K' {
			return true
		}
	}
	return false
}

// Uninstall stops the service, which leaves the rules, and takes it out of
// the service manager's books. Where it is not registered, or no service
// manager is there, that is no error. When it is back, no process of the
// service is left to repair anything.
func (m *Manager) Uninstall() error {
	for initSystem, d := range definitions() {
		if !m.sys.Exists(d.path) || m.masked(d) {
			continue
		}
		if initSystem == m.initSystem && m.live() {
			if err := m.unregister(d); err != nil {
				return err
			}
		}
		if err := m.removeFiles(d); err != nil {
			return err
		}
	}
	return nil
}

// unregister stops the service and has kardianos take it out.
func (m *Manager) unregister(d definition) error {
	switch m.initSystem {
	case "linux-upstart":
		// An error says that it does not run.
		m.sys.Run(context.Background(), system.Command{Name: "initctl", Args: []string{"stop", name}})
	case "unix-systemv":
		if err := m.run(d.path, "stop"); err != nil && m.active() {
			return err
		}
	case "linux-systemd":
		if _, err := m.sys.LookPath("systemctl"); err != nil {
			return nil // the files go all the same
		}
		// It also fails for a unit that cannot be read, which runs nothing.
		if err := m.systemctl("stop", unit); err != nil && m.active() {
			return err
		}
	}
	k, restore, err := m.kardianos(d)
	if err != nil {
		return err
	}
	defer restore()
	if err := m.sys.Do("uninstall", d.path, k.Uninstall); err != nil {
		return fmt.Errorf("taking %s out: %w", d.path, err)
	}
	return nil
}

// Status looks at files and control groups rather than ask systemctl: it is
// asked by every status and verify, and systemctl takes longer than all the
// rest of them.
func (m *Manager) Status() (Status, error) {
	d, ok := definitions()[m.initSystem]
	if !ok {
		return Status{}, nil
	}
	// What an earlier failure may leave is an empty file.
	fi, err := m.sys.Lstat(d.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Status{}, fmt.Errorf("looking for the service: %w", err)
	}
	if err != nil || !fi.Mode().IsRegular() || fi.Size() == 0 {
		return Status{}, nil
	}
	return Status{Registered: true, Enabled: m.enabled(), Active: m.active()}, nil
}

func (m *Manager) active() bool {
	if m.sys.Root != "" {
		return false // what runs is not of that root
	}
	switch m.initSystem {
	case "unix-systemv":
		pid, err := m.sys.ReadFile("/var/run/" + name + ".pid")
		if err != nil {
			return false
		}
		stat, err := m.sys.ReadFile("/proc/" + string(bytes.TrimSpace(pid)) + "/stat")
		return err == nil && bytes.Contains(stat, []byte("("+name+")"))
	case "linux-upstart":
		res, err := m.sys.Run(context.Background(), system.Command{Name: "initctl", Args: []string{"status", name}})
		return err == nil && bytes.Contains(res.Stdout, []byte("start/"))
	}
	return system.Populated("/sys/fs/cgroup", unit)
}

// Start has the service started and does not wait for it: within cloud-init's
// final stage, which comes after multi-user.target, a start that waits may
// wait for itself.
func (m *Manager) Start() error {
	switch m.initSystem {
	case "unix-systemv":
		return m.run("/etc/init.d/"+name, "start")
	case "linux-upstart":
		return m.run("initctl", "start", "--no-wait", name)
	}
	// Failures of the past must not count against this start. An error says
	// that systemd knows of none.
	_ = m.systemctl("reset-failed", unit)
	return m.systemctl("start", "--no-block", unit)
}

// Restart has the service restarted if it runs, and does not wait for it: who
// stopped it meant it. The rules stand meanwhile.
func (m *Manager) Restart() error {
	if !m.active() {
		return nil
	}
	switch m.initSystem {
	case "unix-systemv":
		return m.run("/etc/init.d/"+name, "restart")
	case "linux-upstart":
		return m.run("initctl", "restart", "--no-wait", name)
	}
	return m.systemctl("try-restart", "--no-block", unit)
}

// Refresh makes a registered service what this version would register. Where
// it is not registered, nothing changes.
func (m *Manager) Refresh() (changed bool, err error) {
	st, err := m.Status()
	if err != nil || !st.Registered {
		return false, err
	}
	d, err := m.definition()
	if err != nil {
		return false, err
	}
	data, err := m.sys.ReadFile(d.path)
	if err != nil {
		return false, fmt.Errorf("reading the registered service: %w", err)
	}
	if string(data) == d.text {
		return false, nil
	}
	if err := m.sys.WriteFile(d.path, []byte(d.text), d.mode); err != nil {
		return false, err
	}
	if m.initSystem != "linux-systemd" {
		return true, nil
	}
	if st.Enabled { // by what the other version said
		if err := m.systemctl("reenable", unit); err != nil {
			return true, err
		}
	}
	return true, m.systemctl("daemon-reload")
}

// systemctl runs systemctl where there is a systemd to talk to. An image that
// is being built has none, and needs none.
func (m *Manager) systemctl(args ...string) error {
	if !m.live() {
		return nil
	}
	return m.run("systemctl", args...)
}

func (m *Manager) run(program string, args ...string) error {
	_, err := m.sys.Run(context.Background(), system.Command{Name: program, Args: args, Timeout: time.Minute})
	return err
}
