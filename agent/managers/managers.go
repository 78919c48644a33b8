// Package managers knows the other programs that manage the firewall of a
// machine: whether one is in charge, how to stop it for good, and how to bring it
// back as it was.
package managers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// manager is one that is known here.
type manager struct {
	name  string
	units []string
	// mask keeps it from being started by whoever asks for it over D-Bus.
	mask bool
	// table is its own in nf_tables.
	table string
	// enabled tells whether its unit, started at boot, does anything; nil is yes.
	enabled func(*system.System) bool
	// clear, for a unit, is a program that takes away what its stop leaves.
	clear map[string][]string
	// ready is a program that succeeds once its rules stand, where the start of
	// its unit comes back before.
	ready []string
}

// known are those that write rules of their own into INPUT, or filter beside
// it. Not among them are iptables-services and netfilter-persistent, which load
// our files, and nftables.service, which loads the owner's.
var known = []manager{
	{name: "firewalld", units: []string{"firewalld.service"}, mask: true, table: "firewalld", ready: []string{"firewall-cmd", "--state"}},
	{name: "ufw", units: []string{"ufw.service"}, enabled: ufwEnabled},
	{name: "shorewall", units: []string{"shorewall.service", "shorewall6.service"},
		clear: map[string][]string{"shorewall.service": {"shorewall", "clear"}, "shorewall6.service": {"shorewall6", "clear"}}},
}

// ufwEnabled tells whether ufw is on. Its unit is started at boot on every
// Ubuntu, and does nothing unless it is.
func ufwEnabled(sys *system.System) bool {
	data, err := sys.ReadLimited("/etc/ufw/ufw.conf", 1<<20)
	if err != nil {
		return false
	}
	on := false
	for _, line := range strings.Split(string(data), "\n") {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), "ENABLED="); ok {
			on = strings.EqualFold(strings.Trim(value, `"' `), "yes")
		}
	}
	return on
}

// Managers finds, stops and brings back other managers, on machines whose
// service manager is systemd.
type Managers struct {
	sys *system.System
	// table tells whether nf_tables has a table of a name.
	table func(name string) (bool, error)
	// cgroups is where control groups are.
	cgroups string
	// live tells whether systemd runs, and can be asked. Below a root, units are
	// files and no more.
	live func() bool
}

// New gives the managers of a machine.
func New(sys *system.System, table func(name string) (bool, error)) *Managers {
	return &Managers{sys: sys, table: table, cgroups: "/sys/fs/cgroup",
		live: func() bool { return sys.Root == "" && sys.Exists("/run/systemd/system") }}
}

// Find lists those that filter now, or will from the next boot on. chains names
// those whose chains are in iptables. It runs no program: every status asks.
func (m *Managers) Find(chains []string) ([]firewall.Manager, error) {
	var out []firewall.Manager
	var errs []error
	for _, k := range known {
		st := firewall.Manager{Name: k.name, Active: slices.Contains(chains, k.name)}
		if k.table != "" && !st.Active {
			has, err := m.table(k.table)
			errs = append(errs, err)
			st.Active = has
		}
		for _, u := range k.units {
			if m.masked(u) {
				continue
			}
			links, err := m.links(u)
			errs = append(errs, err)
			st.Enabled = st.Enabled || len(links) > 0 && (k.enabled == nil || k.enabled(m.sys))
			// Before its rules stand it has processes.
			st.Active = st.Active || k.table != "" && m.live() && system.Populated(m.cgroups, u)
		}
		if st.Active || st.Enabled {
			out = append(out, st)
		}
	}
	return out, errors.Join(errs...)
}

// Record tells how the units of a manager are. The error is a *NotHereError
// where it is active, and cannot be stopped.
func (m *Managers) Record(ctx context.Context, st firewall.Manager) (firewall.ManagerBefore, error) {
	k, err := lookUp(st.Name)
	if err != nil {
		return firewall.ManagerBefore{}, err
	}
	out := firewall.ManagerBefore{Name: st.Name}
	if !m.live() && st.Active {
		return out, &NotHereError{st.Name}
	}
	if !m.live() {
		for _, u := range k.units {
			links, err := m.links(u)
			if err != nil {
				return out, err
			}
			unit := firewall.UnitBefore{Name: u, Masked: m.masked(u), Enabled: len(links) > 0, Links: links}
			if unit.Masked || unit.Enabled {
				out.Units = append(out.Units, unit)
			}
		}
		return out, nil
	}
	for _, u := range k.units {
		p, err := m.show(ctx, u)
		if err != nil {
			return out, err
		}
		if p["LoadState"] == "not-found" {
			continue
		}
		out.Units = append(out.Units, firewall.UnitBefore{Name: u, Masked: p["LoadState"] == "masked",
			Enabled: strings.HasPrefix(p["UnitFileState"], "enabled"), Active: running(p), Queued: !up(p) && running(p)})
	}
	if !st.Active {
		return out, nil
	}
	if !slices.ContainsFunc(out.Units, func(u firewall.UnitBefore) bool { return !u.Masked }) {
		return out, &NotHereError{st.Name}
	}
	// Who loaded the rules may have been the program itself ("ufw enable"). To
	// have them again, its unit has to be started.
	if !out.Active() {
		for i := range out.Units {
			out.Units[i].Active = !out.Units[i].Masked
		}
	}
	return out, nil
}

// show asks systemd for what it knows of a unit.
func (m *Managers) show(ctx context.Context, unit string) (map[string]string, error) {
	res, err := m.sys.Run(ctx, system.Command{Name: "systemctl", Args: []string{"show", "-p", "LoadState,UnitFileState,ActiveState,Job", unit}})
	if err != nil {
		return nil, err
	}
	p := map[string]string{}
	for _, line := range strings.Split(string(res.Stdout), "\n") {
		if k, v, ok := strings.Cut(line, "="); ok {
			p[k] = v
		}
	}
	return p, nil
}

// running tells whether a unit is up, or will be: early in a boot it may wait
// for its turn.
func running(p map[string]string) bool { return up(p) || p["Job"] != "" && p["Job"] != "0" }

func up(p map[string]string) bool {
	return p["ActiveState"] != "inactive" && p["ActiveState"] != "failed"
}

// NotHereError says that a manager's rules stand, and that nothing of it is
// here that could be stopped.
type NotHereError struct{ Name string }

func (e *NotHereError) Error() string {
	return fmt.Sprintf("rules of %s are loaded, but no unit of systemd is here that could be stopped", e.Name)
}

// Stop stops a manager that is as rec says, and keeps it from coming back: at
// boot, and where it has mask, in any way. active tells whether its rules stand.
func (m *Managers) Stop(ctx context.Context, rec firewall.ManagerBefore, active bool) error {
	k, err := lookUp(rec.Name)
	if err != nil {
		return err
	}
	for _, u := range rec.Units {
		if u.Masked {
			continue
		}
		if !m.live() {
			if err := m.stopFiles(k, u); err != nil {
				return err
			}
			continue
		}
		// The stop of a unit that is not up would leave the rules that another
		// loaded. To those a start changes nothing.
		if active && u.Active {
			if err := m.start(ctx, k, u.Name); err != nil {
				return err
			}
		}
		if u.Enabled {
			if err := m.systemctl(ctx, "disable", u.Name); err != nil {
				return err
			}
		}
		// Also one that is not up: a start that waits for its turn ends so.
		if err := m.systemctl(ctx, "stop", u.Name); err != nil {
			return err
		}
		if k.mask {
			if err := m.systemctl(ctx, "mask", "--now", u.Name); err != nil {
				return err
			}
		}
		if p, err := m.show(ctx, u.Name); err != nil {
			return err
		} else if running(p) {
			return fmt.Errorf("%s is still %s", u.Name, p["ActiveState"])
		}
		if c := k.clear[u.Name]; c != nil && active && u.Active {
			if _, err := m.sys.Run(ctx, system.Command{Name: c[0], Args: c[1:], Timeout: time.Minute}); err != nil {
				return err
			}
		}
	}
	return nil
}

// stopFiles is Stop below a root.
func (m *Managers) stopFiles(k manager, u firewall.UnitBefore) error {
	for _, l := range u.Links {
		if err := m.sys.Remove(l.Path); err != nil {
			return err
		}
	}
	if k.mask {
		return m.sys.Symlink(os.DevNull, systemDir+u.Name)
	}
	return nil
}

// Restore brings a manager back as rec says that it was, and waits until its
// rules stand; at the boot in which it was recorded not for one that waited for
// its turn: it might wait for whoever asks. One that was removed since is no
// error, but gone.
func (m *Managers) Restore(ctx context.Context, rec firewall.ManagerBefore, sameBoot bool) (gone bool, err error) {
	k, err := lookUp(rec.Name)
	if err != nil {
		return false, err
	}
	gone = len(rec.Units) > 0
	for _, u := range rec.Units {
		if u.Masked {
			gone = false
			continue
		}
		if m.masked(u.Name) {
			if err := m.unmask(ctx, u.Name); err != nil {
				return false, err
			}
		}
		if !m.live() {
			for _, l := range u.Links {
				if err := m.sys.MkdirAll(filepath.Dir(l.Path), 0o755); err != nil {
					return false, err
				}
				if err := m.sys.Symlink(l.Target, l.Path); err != nil {
					return false, err
				}
			}
			gone = false
			continue
		}
		p, err := m.show(ctx, u.Name)
		if err != nil {
			return false, err
		}
		if p["LoadState"] == "not-found" {
			continue
		}
		gone = false
		if u.Enabled {
			if err := m.systemctl(ctx, "enable", u.Name); err != nil {
				return false, err
			}
		}
		switch {
		case u.Queued && sameBoot:
			err = m.systemctl(ctx, "start", "--no-block", u.Name)
		case u.Active:
			err = m.start(ctx, k, u.Name)
		}
		if err != nil {
			return false, err
		}
	}
	return gone, nil
}

// start has a unit up, and its rules loaded.
func (m *Managers) start(ctx context.Context, k manager, unit string) error {
	p, err := m.show(ctx, unit)
	if err != nil || p["ActiveState"] == "active" {
		return err
	}
	if err := m.systemctl(ctx, "start", unit); err != nil {
		return err
	}
	return m.await(ctx, k)
}

// readyWait is how long a manager may take from its start until its rules
// stand.
const readyWait = 30 * time.Second

func (m *Managers) await(ctx context.Context, k manager) error {
	if k.ready == nil {
		return nil
	}
	for end := time.Now().Add(readyWait); ; {
		_, err := m.sys.Run(ctx, system.Command{Name: k.ready[0], Args: k.ready[1:]})
		var missing *system.NotFoundError
		if err == nil || errors.As(err, &missing) {
			return nil
		}
		var exit *system.ExitError
		if !errors.As(err, &exit) || time.Now().After(end) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func (m *Managers) unmask(ctx context.Context, unit string) error {
	if m.live() {
		return m.systemctl(ctx, "unmask", unit)
	}
	return m.sys.Remove(systemDir + unit)
}

func (m *Managers) systemctl(ctx context.Context, args ...string) error {
	_, err := m.sys.Run(ctx, system.Command{Name: "systemctl", Args: append([]string{"--quiet"}, args...), Timeout: 2 * time.Minute})
	return err
}

// systemDir is where units of the owner's, and links that enable units, are.
const systemDir = "/etc/systemd/system/"

// masked tells whether a unit is one that cannot be started.
func (m *Managers) masked(unit string) bool {
	target, err := m.sys.Readlink(systemDir + unit)
	return err == nil && target == os.DevNull
}

// links are what has a unit started at boot, and its other names, in order.
func (m *Managers) links(unit string) ([]firewall.Link, error) {
	var out []firewall.Link
	for _, pattern := range []string{"*.wants/" + unit, "*.requires/" + unit, "dbus-*.service"} {
		found, err := m.sys.Glob(systemDir + pattern)
		if err != nil {
			return nil, err
		}
		for _, f := range found {
			target, err := m.sys.Readlink(f)
			if err != nil || filepath.Base(target) != unit {
				continue
			}
			out = append(out, firewall.Link{Path: f, Target: target})
		}
	}
	return out, nil
}

func lookUp(name string) (manager, error) {
	for _, k := range known {
		if k.name == name {
			return k, nil
		}
	}
	return manager{}, fmt.Errorf("no other firewall is known here as %q", name)
}
