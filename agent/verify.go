package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
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
	if !st.SSHFixed {
		a.follow(&r, ports)
	}
	if r.Pending, err = a.Pending(); err != nil {
		r.Warnings = append(r.Warnings, err.Error())
	}
	if r.Inspection, err = a.Kernel.Inspect(ctx, r.wanted()); err != nil {
		return Report{}, err
	}
	r.Drift = slices.Clone(r.Inspection.Drift)
	if a.Guard.Up() {
		r.Drift = append(r.Drift, firewall.Drift{Chain: "nftables", Kind: firewall.Extra, Got: "table " + GuardTable + ", left by a change that was cut short"})
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
				r.Drift = append(r.Drift, firewall.Drift{Chain: "service basicfw-agent", Kind: firewall.Missing, Want: want.what})
			}
		}
	}
	return r, nil
}

// wanted are the rules that should be in the kernel.
func (r Report) wanted() firewall.Ruleset {
	if r.Pending != nil {
		return r.Pending.State.Ruleset
	}
	return r.State.Ruleset
}

// follow makes the wanted state's SSH ports those where sshd is.
func (a *Agent) follow(r *Report, ports Ports) {
	now, why, live, err := ports()
	if err != nil || len(now) == 0 {
		return // what was known stays
	}
	if !live {
		// At boot only the configuration speaks. A port that was given to sshd
		// in another way stays until sshd itself is seen elsewhere.
		for i, p := range r.State.Desired.SSH.Ports {
			if !slices.Contains(now, p) {
				now = append(now, p)
				if i < len(r.State.SSHPorts) {
					why = append(why, r.State.SSHPorts[i])
				}
			}
		}
		slices.Sort(now)
	}
	if slices.Equal(now, r.State.Desired.SSH.Ports) {
		return
	}
	d := r.State.Desired
	d.SSH.Ports = now
	rules, err := firewall.Compile(d)
	if err != nil {
		r.Warnings = append(r.Warnings, fmt.Sprintf("sshd moved to a port that cannot be opened: %v", err))
		return
	}
	r.State.Desired, r.State.Ruleset, r.State.SSHPorts = d, rules, why
}

func (a *Agent) verifyFiles(r *Report) error {
	for _, f := range firewall.Families {
		path := a.RulesPath(f)
		file := PersistedFile{Path: path}
		fail := func(kind, want, got string) {
			r.Drift = append(r.Drift, firewall.Drift{Family: f.String(), Chain: path, Kind: kind, Want: want, Got: got})
		}
		fi, err := a.System.Lstat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			fail(firewall.Missing, "the file", "")
		case err != nil:
			return err
		case !fi.Mode().IsRegular():
			fail(firewall.Altered, "a plain file", fi.Mode().String())
		default:
			if fi.Mode().Perm() != 0o600 {
				fail(firewall.Altered, "mode 0600", fmt.Sprintf("mode %04o", fi.Mode().Perm()))
			}
			data, err := a.System.ReadLimited(path, maxRules)
			if err != nil {
				return err
			}
			want, err := a.Rules.Persisted(data, r.State.Ruleset, f)
			if err != nil {
				fail(firewall.Altered, "a file of rules", err.Error())
				break
			}
			drifts := firewall.Lines(f.String(), path, lines(want), lines(data))
			r.Drift = append(r.Drift, drifts...)
			file.OK = len(drifts) == 0 && fi.Mode().Perm() == 0o600
		}
		r.Persisted = append(r.Persisted, file)
	}
	return nil
}

// Mend brings the machine back to what r wants.
func (a *Agent) Mend(ctx context.Context, r Report) (Outcome, error) {
	if r.Pending != nil {
		// The files have their turn when it is confirmed or taken back.
		return Outcome{Inspection: r.Inspection, Changed: true}, a.Kernel.Load(ctx, r.wanted(), r.Inspection, false)
	}
	return a.Converge(ctx, r.State, r.options)
}

// Verified notes that the machine was found as it should be. Like any change it
// wants the lock to be held since before Verify.
func (a *Agent) Verified(r Report) error {
	r.State.LastVerified = a.Now()
	return a.Store.Save(r.State)
}
