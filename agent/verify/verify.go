// Package verify compares a machine with its desired state: the rules in the kernel,
// the persisted rules, and the service.
package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/service"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Report is the result of a verification: how the machine differs from its desired state.
type Report struct {
	State      store.State // the desired state, with sshd's present ports
	Inspection backend.Inspection
	Drift      []firewall.Drift // in the kernel, the files and the service
	Persisted  []PersistedFile
	Service    service.Status
	Warnings   []string
	// Pending is the pending change. The kernel should have its rules, and the files
	// those of State.
	Pending *store.Pending
	// Guard, Files and Unit are the parts of Drift outside our rules.
	Guard, Files, Unit []firewall.Drift
	Moved              bool // sshd's ports differ from those of the desired state

	serviceKnown bool // the service manager answered
}

// PersistedFile is a file of persisted rules.
type PersistedFile struct {
	Path string `json:"path"`
	OK   bool   `json:"ok"`
}

// Verifier compares one machine with its desired state. LoadRules, Repair and
// SaveVerified change it and require the store's lock.
type Verifier struct{ *apply.Applier }

// Verify compares the machine with its desired state. The error is [store.ErrNone] if
// there is none. The SSH ports follow sshd unless the settings name them.
func (v Verifier) Verify(ctx context.Context, ports apply.Ports) (Report, error) {
	st, err := v.Store.Load()
	if err != nil {
		return Report{}, err
	}
	r := Report{State: st}
	if r.Pending, err = v.Pending(); err != nil {
		r.Warnings = append(r.Warnings, err.Error())
	}
	r.followSSHD(ports)
	if r.Inspection, err = v.Backend(r.Wanted().Backend.Name).Inspect(ctx, r.Wanted().Ruleset); err != nil {
		return Report{}, &backend.Error{Err: err}
	}
	v.files(&r)
	if r.Service, err = v.Service.Status(); err != nil {
		r.Warnings = append(r.Warnings, fmt.Sprintf("the service manager does not respond: %v", err))
	} else if r.serviceKnown = true; st.Service {
		for _, want := range []struct {
			what string
			is   bool
		}{{"registered", r.Service.Registered}, {"enabled at boot", r.Service.Enabled}} {
			if !want.is {
				r.Unit = append(r.Unit, firewall.Drift{Chain: "service basicfw-agent", Kind: firewall.Missing, Want: want.what})
			}
		}
	}
	if v.Guard.Up() {
		r.Guard = []firewall.Drift{{Chain: "nftables", Kind: firewall.Extra, Got: "table " + apply.GuardTable + ", left by an interrupted change"}}
	}
	r.Drift = slices.Concat(r.Inspection.Drift, r.Guard, r.Files, r.Unit)
	return r, nil
}

// Wanted returns the state whose rules should be in the kernel.
func (r Report) Wanted() store.State {
	if r.Pending != nil {
		return r.Pending.State
	}
	return r.State
}

// Flushed returns the families in which none of our rules is left.
func (r Report) Flushed() (families []string) {
	for _, f := range r.Inspection.Flushed {
		families = append(families, f.String())
	}
	return families
}

// followSSHD sets the SSH ports to those of sshd unless the settings name them.
func (r *Report) followSSHD(ports apply.Ports) {
	st := &r.State
	if r.Pending != nil {
		st = &r.Pending.State
	}
	if st.SSHFixed {
		return
	}
	now, why, live, err := ports()
	if err != nil || len(now) == 0 {
		return // keep the known ports
	}
	if r.Moved, err = moveSSH(st, now, why, live); err != nil {
		r.Warnings = append(r.Warnings, fmt.Sprintf("sshd moved to a port that cannot be opened: %v", err))
	}
}

// moveSSH sets the SSH ports of a state to sshd's present ones.
func moveSSH(st *store.State, now []uint16, why []string, live bool) (moved bool, err error) {
	// At boot only sshd's configuration is known. A port that was set in another way
	// stays until sshd itself is seen on other ports.
	now, why = st.KeepPorts(now, why, !live)
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

// files compares the persisted rules. A file that cannot be read is drift: it must not prevent
// a repair of the rules. The rules of a held state are for this boot only, and need no files.
func (v Verifier) files(r *Report) {
	differs := func(path string, err error) []firewall.Drift {
		return []firewall.Drift{{Chain: path, Kind: firewall.Altered, Want: "a readable file", Got: err.Error()}}
	}
	if r.State.Held {
		if r.State.Failsafe == "" {
			r.Files = []firewall.Drift{{Chain: store.StateFile, Kind: firewall.Missing, Want: "the desired state, which could not be saved"}}
		}
		return
	}
	wanted, err := v.Files.Wanted(r.State)
	if err != nil {
		r.Files = differs("persisted rules", err)
	}
	for _, f := range wanted {
		drift, err := v.file(f)
		if err != nil {
			drift = differs(f.Path, err)
		}
		r.Files = append(r.Files, drift...)
		if !f.Remove {
			r.Persisted = append(r.Persisted, PersistedFile{Path: f.Path, OK: len(drift) == 0})
		}
	}
}

// file compares one file.
func (v Verifier) file(f apply.RulesFile) (drift []firewall.Drift, err error) {
	one := func(kind, want, got string) []firewall.Drift {
		return []firewall.Drift{{Family: f.Family, Chain: f.Path, Kind: kind, Want: want, Got: got}}
	}
	fi, err := v.System.Lstat(f.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && f.Remove:
		return nil, nil
	case errors.Is(err, fs.ErrNotExist):
		return one(firewall.Missing, "the file", ""), nil
	case err != nil:
		return nil, err
	case f.Remove:
		return one(firewall.Extra, "", "the file"), nil
	case !fi.Mode().IsRegular():
		return one(firewall.Altered, "a regular file", fi.Mode().String()), nil
	case f.Broken != nil:
		return one(firewall.Altered, "a rules file", f.Broken.Error()), nil
	case fi.Mode().Perm() != f.Mode:
		drift = one(firewall.Altered, fmt.Sprintf("mode %04o", f.Mode), fmt.Sprintf("mode %04o", fi.Mode().Perm()))
	default:
		if err := system.CheckOwner(fi); err != nil {
			drift = one(firewall.Altered, "a root-owned file", err.Error())
		}
	}
	data, err := v.System.ReadLimited(f.Path, files.MaxRules)
	if err != nil {
		return nil, err
	}
	if bytes.Equal(data, f.Data) {
		return drift, nil
	}
	return append(drift, firewall.Lines(f.Family, f.Path, lines(f.Data), lines(data))...), nil
}

// lines splits a text into lines.
func lines(data []byte) []string {
	return strings.Split(strings.TrimRight(string(data), "\n"), "\n")
}

// PartialError reports that only the rules were repaired.
type PartialError struct{ Err error }

func (e *PartialError) Error() string { return fmt.Sprintf("only the rules were repaired: %v", e.Err) }
func (e *PartialError) Unwrap() error { return e.Err }

// Temporary returns false: the rules need no second attempt, regardless of the cause.
func (e *PartialError) Temporary() bool { return false }

// Repair brings the machine to the state that r wants. If that fails, it loads the rules
// alone: a full disk must not prevent that. The error is then a [*PartialError].
func (v Verifier) Repair(ctx context.Context, r Report) (apply.Outcome, error) {
	if r.Pending != nil {
		// The files are repaired when it is confirmed or rolled back.
		return apply.Outcome{Inspection: r.Inspection, Changed: true}, v.LoadRules(ctx, r)
	}
	r.State.Held = r.State.Held && r.State.Failsafe != "" // save it
	out, err := v.Apply(ctx, r.State, apply.Options{Service: r.State.Service && r.serviceKnown})
	if err == nil || len(r.Inspection.Drift) == 0 || ctx.Err() != nil {
		return out, err
	}
	var e error
	if r.Inspection, e = v.Backend(r.State.Backend.Name).Inspect(ctx, r.State.Ruleset); e == nil {
		e = v.LoadRules(ctx, r)
	}
	if e == nil {
		err = &PartialError{err}
	}
	return out, err
}

// LoadRules loads the rules that r wants and repairs nothing else.
func (v Verifier) LoadRules(ctx context.Context, r Report) error {
	if len(r.Inspection.Drift) > 0 {
		v.Adopt()
		if err := r.Inspection.Snapshot.Load(ctx, r.Wanted().Ruleset, false); err != nil {
			return err
		}
	}
	if r.Pending != nil && r.Moved {
		return v.Store.SavePending(*r.Pending)
	}
	return nil
}

// SaveVerified records that no drift was found. The lock must be held since before
// Verify.
func (v Verifier) SaveVerified(r Report) error {
	r.State.LastVerified = v.Moment().Time
	return v.Store.Save(r.State)
}
