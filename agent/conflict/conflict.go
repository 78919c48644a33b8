// Package conflict handles other firewall managers: it finds them, stops and disables
// them, and restores them.
package conflict

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

// manager is a known firewall manager.
type manager struct {
	name    string
	units   []string
	mask    bool                      // prevents a start over D-Bus
	table   string                    // its nftables table
	enabled func(*system.System) bool // reports whether its unit does anything at boot; nil is yes
	clear   map[string][]string       // by unit, a command that removes the rules that its stop leaves
	ready   []string                  // a command that succeeds once its rules are loaded, if its start returns earlier
}

// known returns the managers that write their own rules into INPUT, or that filter
// elsewhere. It omits programs that load our files or the administrator's
// (netfilter-persistent, nftables.service).
func known() []manager {
	return []manager{
		{name: "firewalld", units: []string{"firewalld.service"}, mask: true, table: "firewalld", ready: []string{"firewall-cmd", "--state"}},
		{name: "ufw", units: []string{"ufw.service"}, enabled: ufwEnabled},
		{name: "shorewall", units: []string{"shorewall.service", "shorewall6.service"},
			clear: map[string][]string{"shorewall.service": {"shorewall", "clear"}, "shorewall6.service": {"shorewall6", "clear"}}},
	}
}

// ufwEnabled reports whether ufw is enabled. Its unit is started at boot on every Ubuntu,
// and does nothing if it is not.
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

// Resolver finds, stops and restores other managers on machines with systemd.
type Resolver struct {
	sys     *system.System
	table   func(name string) (bool, error) // reports whether nftables has a table
	cgroups string                          // where control groups are mounted
	live    func() bool                     // reports whether systemd runs; below a root, units are only files
}

// New returns the resolver of a machine.
func New(sys *system.System, table func(name string) (bool, error)) *Resolver {
	return &Resolver{sys: sys, table: table, cgroups: "/sys/fs/cgroup",
		live: func() bool { return sys.Root == "" && !system.Chrooted() && sys.Exists("/run/systemd/system") }}
}

// Find lists the managers that filter now, or will from the next boot on. chains names
// those whose chains are in iptables. Find runs no program, because every status calls it.
func (m *Resolver) Find(chains []string) ([]firewall.Conflict, error) {
	var out []firewall.Conflict
	var errs []error
	for _, k := range known() {
		st := firewall.Conflict{Name: k.name, Active: slices.Contains(chains, k.name)}
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
			// Its processes exist before its rules are loaded.
			st.Active = st.Active || k.table != "" && m.live() && system.Populated(m.cgroups, u)
		}
		if st.Active || st.Enabled {
			out = append(out, st)
		}
	}
	return out, errors.Join(errs...)
}

// Record returns the status of a manager's units. The error is a [*NotHereError] if
// the manager is active but cannot be stopped.
func (m *Resolver) Record(ctx context.Context, st firewall.Conflict) (firewall.ConflictBackup, error) {
	k, err := lookUp(st.Name)
	if err != nil {
		return firewall.ConflictBackup{}, err
	}
	out := firewall.ConflictBackup{Name: st.Name}
	live := m.live()
	if !live && st.Active {
		return out, &NotHereError{st.Name}
	}
	for _, u := range k.units {
		if !live {
			links, err := m.links(u)
			if err != nil {
				return out, err
			}
			if masked := m.masked(u); masked || len(links) > 0 {
				out.Units = append(out.Units, firewall.UnitBackup{Name: u, Masked: masked, Enabled: len(links) > 0, Links: links})
			}
			continue
		}
		p, err := m.show(ctx, u)
		if err != nil {
			return out, err
		}
		if p["LoadState"] == "not-found" {
			continue
		}
		out.Units = append(out.Units, firewall.UnitBackup{Name: u, Masked: p["LoadState"] == "masked",
			Enabled: strings.HasPrefix(p["UnitFileState"], "enabled"), Active: running(p), Queued: !up(p) && running(p)})
	}
	if !st.Active {
		return out, nil
	}
	if !slices.ContainsFunc(out.Units, func(u firewall.UnitBackup) bool { return !u.Masked }) {
		return out, &NotHereError{st.Name}
	}
	// The program itself may have loaded the rules ("ufw enable"). To restore them, its
	// unit must be started.
	if !out.Active() {
		for i := range out.Units {
			out.Units[i].Active = !out.Units[i].Masked
		}
	}
	return out, nil
}

// show returns the properties of a unit from systemd.
func (m *Resolver) show(ctx context.Context, unit string) (map[string]string, error) {
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

// running reports whether a unit is running, or will be: early in a boot, its start
// may be queued.
func running(p map[string]string) bool { return up(p) || p["Job"] != "" && p["Job"] != "0" }

func up(p map[string]string) bool {
	return p["ActiveState"] != "inactive" && p["ActiveState"] != "failed"
}

// NotHereError reports that a manager's rules are loaded, but it has no unit that could
// be stopped.
type NotHereError struct{ Name string }

func (e *NotHereError) Error() string {
	return fmt.Sprintf("rules of %s are loaded, but it has no systemd unit that could be stopped", e.Name)
}

// Stop stops the manager that rec describes and prevents its start at boot or, with
// mask, any start. active is set if its rules are loaded.
func (m *Resolver) Stop(ctx context.Context, rec firewall.ConflictBackup, active bool) error {
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
		// Stopping a unit that is not up would leave rules that it has not loaded
		// itself. Starting it does not change them.
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
		// Also a unit that is not up: this cancels a queued start.
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
func (m *Resolver) stopFiles(k manager, u firewall.UnitBackup) error {
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

// Restore restores a manager as recorded and waits until its rules are loaded. In the
// same boot it does not wait for a queued start, which may wait for the caller. gone is
// set, without an error, if the manager was uninstalled since.
func (m *Resolver) Restore(ctx context.Context, rec firewall.ConflictBackup, sameBoot bool) (gone bool, err error) {
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

// start starts a unit and waits until its rules are loaded.
func (m *Resolver) start(ctx context.Context, k manager, unit string) error {
	p, err := m.show(ctx, unit)
	if err != nil || p["ActiveState"] == "active" {
		return err
	}
	if err := m.systemctl(ctx, "start", unit); err != nil {
		return err
	}
	return m.await(ctx, k)
}

// readyWait is how long a manager may take to load its rules after its start.
const readyWait = 30 * time.Second

func (m *Resolver) await(ctx context.Context, k manager) error {
	for end := time.Now().Add(readyWait); k.ready != nil; {
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
	return nil
}

func (m *Resolver) unmask(ctx context.Context, unit string) error {
	if m.live() {
		return m.systemctl(ctx, "unmask", unit)
	}
	return m.sys.Remove(systemDir + unit)
}

func (m *Resolver) systemctl(ctx context.Context, args ...string) error {
	_, err := m.sys.Run(ctx, system.Command{Name: "systemctl", Args: append([]string{"--quiet"}, args...), Timeout: 2 * time.Minute})
	return err
}

// systemDir is where the administrator's units and the links that enable units are.
const systemDir = "/etc/systemd/system/"

// masked reports whether a unit is masked, so that it cannot be started.
func (m *Resolver) masked(unit string) bool {
	target, err := m.sys.Readlink(systemDir + unit)
	return err == nil && target == os.DevNull
}

// links returns the links that start a unit at boot, and its aliases, in order.
func (m *Resolver) links(unit string) ([]firewall.Link, error) {
	var out []firewall.Link
	for _, pattern := range []string{"*.wants/" + unit, "*.requires/" + unit, "dbus-*.service"} {
		found, err := m.sys.Glob(systemDir + pattern)
		if err != nil {
			return nil, err
		}
		for _, f := range found {
			if target, err := m.sys.Readlink(f); err == nil && filepath.Base(target) == unit {
				out = append(out, firewall.Link{Path: f, Target: target})
			}
		}
	}
	return out, nil
}

func lookUp(name string) (manager, error) {
	i := slices.IndexFunc(known(), func(k manager) bool { return k.name == name })
	if i < 0 {
		return manager{}, fmt.Errorf("unknown firewall manager %q", name)
	}
	return known()[i], nil
}
