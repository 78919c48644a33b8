// Package service registers the agent with the machine's service manager, which
// github.com/kardianos/service detects. The definitions are our own.
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
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/kardianos/service"

	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
)

const (
	name = "basicfw-agent"
	unit = name + ".service"
)

var (
	//go:embed basicfw-agent.service
	systemdUnit string
	//go:embed basicfw-agent.init
	sysvScript string
	//go:embed basicfw-agent.conf
	upstartJob string
)

// Manager registers and starts the service.
type Manager struct {
	sys        *system.System
	executable string // what the service runs
	initSystem string // as kardianos names it
}

// New returns the manager of the service on sys, which runs executable; "" is this
// program. Below a root, the service manager is assumed to be systemd.
func New(sys *system.System, executable string) (*Manager, error) {
	if executable == "" {
		var err error
		if executable, err = system.Executable(); err != nil {
			return nil, fmt.Errorf("finding this program: %w", err)
		}
	}
	m := &Manager{sys: sys, executable: executable, initSystem: service.Platform()}
	if sys.Root != "" || m.initSystem == "unix-systemv" && m.awaitsSystemd() {
		m.initSystem = "linux-systemd"
	}
	return m, nil
}

// awaitsSystemd reports whether systemd is installed but no init runs, as in a container
// that runs a single program, or while an image is built. kardianos assumes System V there.
func (m *Manager) awaitsSystemd() bool {
	comm, err := m.sys.ReadLimited("/proc/1/comm", 64)
	if err != nil || string(bytes.TrimSpace(comm)) == "init" {
		return false
	}
	_, err = m.sys.LookPath("systemctl")
	return err == nil
}

// Status is the status of the service in its service manager.
type Status struct {
	Registered bool `json:"registered"` // the service manager knows it
	Enabled    bool `json:"enabled"`    // it is started at boot
	Active     bool `json:"active"`     // it has running processes
}

// definition is a service manager's definition of the service.
type definition struct {
	path   string
	mode   fs.FileMode
	text   string // "@EXEC@" represents the program
	option string // kardianos's option for text
}

// definitions returns the definitions by kardianos's names of the service managers.
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
		return d, hint.Wrap(fmt.Errorf("service manager %q is not supported; only systemd, Upstart and System V are", m.initSystem),
			"start \"%s run\" at boot, before the network, by other means", m.executable)
	}
	// The path is used in a unit, a shell script and an Upstart job, each with its own
	// quoting rules. Only a path that needs no quoting is accepted.
	if !regexp.MustCompile(`^/[A-Za-z0-9/._+-]+$`).MatchString(m.executable) {
		return d, hint.Wrap(fmt.Errorf("%q cannot be run as a service: its path needs quoting", m.executable), "move it to a path of letters, digits and \"/._+-\"")
	}
	d.text = strings.ReplaceAll(d.text, "@EXEC@", m.executable)
	return d, nil
}

// Install registers the service to be started at every boot, but does not start it. If
// it fails, the service is not registered.
func (m *Manager) Install() (err error) {
	d, err := m.definition()
	if err != nil {
		return err
	}
	if m.masked(d) {
		return hint.Wrap(fmt.Errorf("%s is masked", unit), "first run: systemctl unmask %s", unit)
	}
	if m.installed(d) {
		return nil
	}
	// An existing definition is of another version or incomplete. kardianos refuses to
	// overwrite it, even the empty file that its own failures leave.
	if err := m.removeFiles(d); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.removeFiles(d))
		}
	}()
	register := m.writeFiles
	if m.live() {
		register = m.register
	}
	if err = register(d); err == nil && !m.installed(d) {
		err = fmt.Errorf("%s differs from what was written, or is not enabled at boot", d.path)
	}
	return err
}

// live reports whether the service manager runs and can be used. Below a root, and while
// an image is built, it does not run. In a chroot, another system's may run.
func (m *Manager) live() bool {
	return m.sys.Root == "" && !system.Chrooted() && (m.initSystem != "linux-systemd" || m.sys.Exists("/run/systemd/system"))
}

// register lets kardianos write the definition and enable the service.
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
	// kardianos does not flush. After a power failure, an empty definition would start
	// nothing.
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

// kardianos returns the library's view of the service. The library finds systemctl by
// PATH and passes on the environment. Until restore is called, they are our own: the
// caller's environment must not decide what root runs, and how.
func (m *Manager) kardianos(d definition) (k service.Service, restore func(), err error) {
	k, err = service.New(nil, &service.Config{
		Name:       name,
		Executable: m.executable,
		Option:     service.KeyValue{d.option: d.text},
	})
	if err != nil {
		return nil, nil, fmt.Errorf("detecting the service manager: %w", err)
	}
	was := os.Environ()
	if m.initSystem == "linux-systemd" {
		systemctl, err := m.sys.LookPath("systemctl")
		if err != nil {
			return nil, nil, err
		}
		setEnviron([]string{"LC_ALL=C", "PATH=" + filepath.Dir(systemctl)})
	}
	// The umask limits the mode of its files, and systemd warns about a unit that other
	// users cannot read.
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

// startBeforeNetwork renames the links that kardianos made. Its S50 starts after the
// network (S10). S09 starts before the network, and after the distribution's own iptables.
func (m *Manager) startBeforeNetwork() error {
	links, err := m.links()
	if err != nil {
		return err
	}
	for _, link := range links {
		if dir, was := filepath.Split(link); was == "S50"+name {
			if err := m.sys.Rename(link, dir+"S09"+name); err != nil {
				return err
			}
		}
	}
	return nil
}

// writeFiles registers the service below a root, where no service manager runs.
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

// removeFiles removes a definition and the links that start it at boot, without a
// service manager.
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

// links returns the links by which systemd starts the service and System V starts and
// stops it. Upstart needs none.
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

// masked reports whether the administrator has masked the unit.
func (m *Manager) masked(d definition) bool {
	target, err := m.sys.Readlink(d.path)
	return err == nil && target == os.DevNull
}

// installed reports whether the service is registered as this version registers it.
func (m *Manager) installed(d definition) bool {
	data, err := m.sys.ReadLimited(d.path, maxDefinition)
	return err == nil && string(data) == d.text && m.enabled()
}

// maxDefinition limits how many bytes of a definition are read; ours are small.
const maxDefinition = 1 << 20

func (m *Manager) enabled() bool {
	if m.initSystem == "linux-upstart" {
		return true // by its "start on"
	}
	links, err := m.links()
	return err == nil && slices.ContainsFunc(links, func(l string) bool { return filepath.Base(l)[0] != 'K' })
}

// Uninstall stops the service, which leaves the rules loaded, and unregisters it.
// When it returns, no process of the service is left that could repair anything. It
// is not an error if the service is not registered.
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

// unregister stops the service and lets kardianos remove it.
func (m *Manager) unregister(d definition) error {
	switch m.initSystem {
	case "linux-upstart":
		// An error means that it does not run.
		m.sys.Run(context.Background(), system.Command{Name: "initctl", Args: []string{"stop", name}})
	case "unix-systemv":
		if err := m.run(d.path, "stop"); err != nil && m.active() {
			return err
		}
	case "linux-systemd":
		if _, err := m.sys.LookPath("systemctl"); err != nil {
			return nil // the files are removed nevertheless
		}
		// This also fails for an unreadable unit, which runs nothing.
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
		return fmt.Errorf("unregistering %s: %w", d.path, err)
	}
	return nil
}

// Status reads files and control groups: systemctl would take longer than the rest of
// a status or verify.
func (m *Manager) Status() (Status, error) {
	d, ok := definitions()[m.initSystem]
	if !ok {
		return Status{}, nil
	}
	// An earlier failure may have left an empty file.
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
	if m.sys.Root != "" || system.Chrooted() {
		return false // running processes do not belong to that root
	}
	switch m.initSystem {
	case "unix-systemv":
		pid, err := m.sys.ReadLimited("/var/run/"+name+".pid", 4096)
		if err != nil {
			return false
		}
		stat, err := m.sys.ReadLimited("/proc/"+string(bytes.TrimSpace(pid))+"/stat", 4096)
		return err == nil && bytes.Contains(stat, []byte("("+name+")"))
	case "linux-upstart":
		res, err := m.sys.Run(context.Background(), system.Command{Name: "initctl", Args: []string{"status", name}})
		return err == nil && bytes.Contains(res.Stdout, []byte("start/"))
	}
	return system.Populated("/sys/fs/cgroup", unit)
}

// Start starts the service without waiting for it: within cloud-init's final stage,
// after multi-user.target, it might wait for itself.
func (m *Manager) Start() error {
	// Earlier failures must not count against this start. An error means that systemd
	// knows of none.
	if m.initSystem == "linux-systemd" {
		_ = m.systemctl("reset-failed", unit)
	}
	return m.begin("start", "start")
}

// Restart restarts the service without waiting for it, unless the administrator has
// stopped it. The rules stay loaded.
func (m *Manager) Restart() error {
	if !m.active() {
		return nil
	}
	return m.begin("restart", "try-restart")
}

// begin passes a verb to the service manager without waiting. systemctl has its own verb.
func (m *Manager) begin(verb, systemd string) error {
	switch m.initSystem {
	case "unix-systemv":
		// The caller has loaded the rules and holds the lock.
		return m.run("/etc/init.d/"+name, verb, "loaded")
	case "linux-upstart":
		return m.run("initctl", verb, "--no-wait", name)
	}
	return m.systemctl(systemd, "--no-block", unit)
}

// Refresh updates a registered service to the definition of this version. If it is not
// registered, nothing changes.
func (m *Manager) Refresh() (changed bool, err error) {
	st, err := m.Status()
	if err != nil || !st.Registered {
		return false, err
	}
	d, err := m.definition()
	if err != nil {
		return false, err
	}
	data, err := m.sys.ReadLimited(d.path, maxDefinition)
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
	if st.Enabled { // as in [Install] of the other version
		if err := m.systemctl("reenable", unit); err != nil {
			return true, err
		}
	}
	return true, m.systemctl("daemon-reload")
}

// systemctl runs systemctl if systemd runs.
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
