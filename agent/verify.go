package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Ports tells where sshd listens or will listen, and for each of the ports why
// that is known. It is live where sshd itself was seen listening, not only its
// configuration.
type Ports func() (ports []uint16, why []string, live bool, err error)

// Report is how the machine differs from what was decided.
type Report struct {
	State      store.State // what is wanted now
	Inspection firewall.Inspection
	Drift      []firewall.Drift // of the kernel, the files and the service
	Persisted  []PersistedFile
	Service    ServiceStatus
	Warnings   []string
	// Pending is the change that waits for a confirmation. Its rules are wanted
	// in the kernel, while the files are those of State.
	Pending *store.Pending
	// guard, files and unit are the parts of Drift that are not of our rules.
	guard, files, unit []firewall.Drift
	// moved is set where the ports of SSH are not those that were decided: sshd
	// is elsewhere.
	moved bool
	// options are what Converge needs to mend it.
	options Options
}

// PersistedFile is a file that keeps the rules over a boot.
type PersistedFile struct {
	Path string `json:"path"`
	OK   bool   `json:"ok"`
}

// Verify compares the machine with what was decided. The error is
// store.ErrNone where nothing was. The ports of SSH follow sshd, unless the
// settings name them: one that it moved to is wanted from then on.
func (a *Agent) Verify(ctx context.Context, ports Ports) (Report, error) {
	st, err := a.Store.Load()
	if err != nil {
		return Report{}, err
	}
	r := Report{State: st}
	if r.Pending, err = a.Pending(); err != nil {
		r.Warnings = append(r.Warnings, err.Error())
	}
	a.followSSHD(&r, ports)
	if r.Inspection, err = a.Kernel(r.backend()).Inspect(ctx, r.wanted()); err != nil {
		return Report{}, &LoadError{err}
	}
	if err := a.verifyFiles(&r); err != nil {
		return Report{}, err
	}
	if r.Service, err = a.Service.Status(); err != nil {
		r.Warnings = append(r.Warnings, fmt.Sprintf("the service manager does not answer: %v", err))
	} else if st.Service {
		r.options.Service = true
		for _, want := range []struct {
			what string
			is   bool
		}{{"registered", r.Service.Registered}, {"enabled at boot", r.Service.Enabled}} {
			if !want.is {
				r.unit = append(r.unit, firewall.Drift{Chain: "service basicfw-agent", Kind: firewall.Missing, Want: want.what})
			}
		}
	}
	if a.Guard.Up() {
		r.guard = []firewall.Drift{{Chain: "nftables", Kind: firewall.Extra, Got: "table " + GuardTable + ", left by a change that was cut short"}}
	}
	r.Drift = slices.Concat(r.Inspection.Drift, r.guard, r.files, r.unit)
	return r, nil
}

// wanted are the rules that should be in the kernel.
func (r Report) wanted() firewall.Ruleset {
	if r.Pending != nil {
		return r.Pending.State.Ruleset
	}
	return r.State.Ruleset
}

// backend is what wanted is loaded with.
func (r Report) backend() string {
	if r.Pending != nil {
		return r.Pending.State.Backend.Name
	}
	return r.State.Backend.Name
}

// wantedPorts are the ports of SSH in wanted.
func (r Report) wantedPorts() []uint16 {
	if r.Pending != nil {
		return r.Pending.State.Desired.SSH.Ports
	}
	return r.State.Desired.SSH.Ports
}

// found is what is known by a report and a look at the interfaces, to compare
// with what another found.
func (r Report) found(interfaces []firewall.Interface) string {
	in := r.Inspection
	return fmt.Sprint(r.Drift, in.Foreign, in.Open, in.Shut, in.Managers, in.Bypass, interfaces)
}

// flushed names the families in whose kernel tables no rule of ours is left.
func (r Report) flushed() (families []string) {
	for _, f := range r.Inspection.Flushed {
		families = append(families, f.String())
	}
	return families
}

// followSSHD makes the wanted SSH ports those where sshd is, unless the
// settings name them.
func (a *Agent) followSSHD(r *Report, ports Ports) {
	st := &r.State
	if r.Pending != nil {
		st = &r.Pending.State
	}
	if st.SSHFixed {
		return
	}
	now, why, live, err := ports()
	if err != nil || len(now) == 0 {
		return // what was known stays
	}
	if r.moved, err = moveSSH(st, now, why, live); err != nil {
		r.Warnings = append(r.Warnings, fmt.Sprintf("sshd moved to a port that cannot be opened: %v", err))
	}
}

// moveSSH makes a state's SSH ports those where sshd is now.
func moveSSH(st *store.State, now []uint16, why []string, live bool) (moved bool, err error) {
	if !live {
		// At boot only the configuration speaks. A port that was given to sshd
		// in another way stays until sshd itself is seen elsewhere.
		now, why = KeepPorts(now, why, *st)
	}
	if slices.Equal(now, st.Desired.SSH.Ports) {
		return false, nil
	}
	d := st.Desired
	d.SSH.Ports = now
	rules, err := firewall.Compile(d)
	if err != nil {
		return false, err
	}
	st.Desired, st.Ruleset, st.SSHPorts = d, rules, why
	return true, nil
}

// KeepPorts adds to ports of sshd's, and why they are that, those that were
// decided before.
func KeepPorts(now []uint16, why []string, st store.State) ([]uint16, []string) {
	now, why = slices.Clone(now), slices.Clone(why)
	for i, p := range st.Desired.SSH.Ports {
		if at, there := slices.BinarySearch(now, p); !there {
			now = slices.Insert(now, at, p)
			reason := "decided before"
			if i < len(st.SSHPorts) {
				reason = st.SSHPorts[i]
			}
			why = slices.Insert(why, min(at, len(why)), reason)
		}
	}
	return now, why
}

func (a *Agent) verifyFiles(r *Report) error {
	wanted, err := a.persisted(r.State)
	if err != nil {
		return err
	}
	for _, c := range wanted {
		fail := func(kind, want, got string) {
			r.files = append(r.files, firewall.Drift{Family: c.family, Chain: c.Path, Kind: kind, Want: want, Got: got})
		}
		before := len(r.files)
		fi, err := a.System.Lstat(c.Path)
		switch {
		case errors.Is(err, fs.ErrNotExist) && c.Remove:
			continue
		case errors.Is(err, fs.ErrNotExist):
			fail(firewall.Missing, "the file", "")
		case err != nil:
			return err
		case c.Remove:
			fail(firewall.Extra, "", "the file")
		case !fi.Mode().IsRegular():
			fail(firewall.Altered, "a plain file", fi.Mode().String())
		case c.broken != nil:
			fail(firewall.Altered, "a file of rules", c.broken.Error())
		default:
			if fi.Mode().Perm() != c.Mode {
				fail(firewall.Altered, fmt.Sprintf("mode %04o", c.Mode), fmt.Sprintf("mode %04o", fi.Mode().Perm()))
			} else if err := system.CheckOwner(fi); err != nil {
				fail(firewall.Altered, "a file of root's", err.Error())
			}
			data, err := a.System.ReadLimited(c.Path, maxRules)
			if err != nil {
				return err
			}
			r.files = append(r.files, firewall.Lines(c.family, c.Path, lines(c.Data), lines(data))...)
		}
		if !c.Remove {
			r.Persisted = append(r.Persisted, PersistedFile{Path: c.Path, OK: len(r.files) == before})
		}
	}
	return nil
}

// Mend brings the machine back to what r wants.
func (a *Agent) Mend(ctx context.Context, r Report) (Outcome, error) {
	if r.Pending != nil {
		// The files have their turn when it is confirmed or taken back.
		return Outcome{Inspection: r.Inspection, Changed: true}, a.load(ctx, r)
	}
	return a.Converge(ctx, r.State, r.options)
}

// load brings the kernel alone to what r wants.
func (a *Agent) load(ctx context.Context, r Report) error {
	if r.Pending != nil && r.moved {
		if err := a.Store.SavePending(*r.Pending); err != nil {
			return err
		}
	}
	if len(r.Inspection.Drift) == 0 {
		return nil
	}
	if _, err := a.Conntrack.Adopt(); err != nil {
		a.Log.WithError(err).Warn("sessions that are open now may have to be opened again")
	}
	return a.Kernel(r.backend()).Load(ctx, r.wanted(), r.Inspection, false)
}

// Verified notes that the machine was found as it should be. Like any change it
// wants the lock to be held since before Verify.
func (a *Agent) Verified(r Report) error {
	r.State.LastVerified = a.Now()
	return a.Store.Save(r.State)
}
