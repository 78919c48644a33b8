package agent

import (
	"context"
	"errors"
	"fmt"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// The names of the backends, in the settings and in the state.
const (
	Iptables = "iptables"
	Nftables = "nftables"
)

// Kernels are the two places where rules may be in one kernel. One of them has
// ours, and the other nothing of ours; what others have there counts in both.
type Kernels struct {
	Iptables Kernel
	// Beside is iptables where the rules are elsewhere.
	Beside   Beside
	Nftables Table
	// InUse tells whether anything at all is in iptables' tables. Where nothing
	// is, its programs need not be asked, or be there.
	InUse func() bool
	// Has tells whether there are programs of iptables.
	Has func() bool
}

// backend is what the rules were loaded with, as far as that is known: where the
// state cannot be read, by the file that keeps them.
func (a *Agent) backend() string {
	if st, err := a.Store.Load(); err == nil {
		return st.Backend.Name
	}
	if a.System.Exists(TableFile) {
		return Nftables
	}
	return ""
}

// find gives the kernel that has our rules, or could, with what it found there.
// Where nothing is known of the backend, and iptables does not answer, it is
// nf_tables.
func (a *Agent) find(ctx context.Context) (Kernel, firewall.Inspection, error) {
	backend := a.backend()
	kernel := a.Kernel(backend)
	in, err := kernel.Inspect(ctx, firewall.Ruleset{})
	if err != nil && backend == "" {
		other := a.Kernel(Nftables)
		if found, e := other.Inspect(ctx, firewall.Ruleset{}); e == nil {
			return other, found, nil
		}
	}
	return kernel, in, err
}

// Beside is what the rules of iptables do to packets that are filtered elsewhere.
type Beside interface {
	Inspect(ctx context.Context, want firewall.Ruleset) (firewall.Inspection, error)
	// Load takes out what is in the way.
	Load(ctx context.Context, was firewall.Inspection, clear bool) error
	Revert(ctx context.Context, was firewall.Inspection, before firewall.Before) error
	Remove(ctx context.Context, before firewall.Before) error
}

// Table is nf_tables' part. No ruleset at all is no table.
type Table interface {
	Inspect(ctx context.Context, want firewall.Ruleset) (firewall.Inspection, error)
	Load(ctx context.Context, want firewall.Ruleset, was firewall.Inspection) error
	Revert(ctx context.Context, was firewall.Inspection) error
}

// For gives the kernel in which a backend has the rules. Where none is named, it
// is the one in which they are, or can be.
func (k Kernels) For(backend string) Kernel {
	if backend == "" {
		backend = k.guess()
	}
	if backend == Nftables {
		return nftKernel{k}
	}
	return iptKernel{k.Iptables, k.Nftables}
}

func (k Kernels) guess() string {
	in, err := k.Nftables.Inspect(context.Background(), firewall.Ruleset{})
	if err == nil && (in.Present || !k.Has()) {
		return Nftables
	}
	return Iptables
}

// both are what was found in the two places.
type both struct{ ours, other firewall.Inspection }

// iptKernel has the rules in iptables.
type iptKernel struct {
	Kernel
	table Table
}

func (k iptKernel) Inspect(ctx context.Context, want firewall.Ruleset) (firewall.Inspection, error) {
	ours, err := k.Kernel.Inspect(ctx, want)
	if err != nil {
		return ours, err
	}
	other, err := k.table.Inspect(ctx, firewall.Ruleset{})
	in := ours
	if err != nil {
		in.Warnings = append(in.Warnings, fmt.Sprintf("what nf_tables has of ours is not known: %v", err))
	}
	in.Present = in.Present || other.Present
	in.Drift = append(in.Drift, other.Drift...)
	in.Snapshot = both{ours, other}
	return in, nil
}

func (k iptKernel) Load(ctx context.Context, want firewall.Ruleset, was firewall.Inspection, clear bool) error {
	before := was.Snapshot.(both)
	if err := k.Kernel.Load(ctx, want, before.ours, clear); err != nil {
		return err
	}
	return k.clear(ctx, before)
}

func (k iptKernel) LoadFiles(ctx context.Context, files map[firewall.Family][]byte, was firewall.Inspection) error {
	before := was.Snapshot.(both)
	if err := k.Kernel.LoadFiles(ctx, files, before.ours); err != nil {
		return err
	}
	return k.clear(ctx, before)
}

// clear takes our table away, now that iptables closes the machine.
func (k iptKernel) clear(ctx context.Context, before both) error {
	if !before.other.Present {
		return nil
	}
	err := k.table.Load(ctx, firewall.Ruleset{}, before.other)
	if err != nil {
		if e := k.Kernel.Revert(context.WithoutCancel(ctx), before.ours, firewall.Before{}); e != nil {
			err = fmt.Errorf("%w; and the former rules could not be brought back: %w", err, e)
		}
	}
	return err
}

func (k iptKernel) Revert(ctx context.Context, was firewall.Inspection, removed firewall.Before) error {
	before := was.Snapshot.(both)
	// What closed the machine first.
	var err error
	if before.other.Snapshot != nil {
		err = k.table.Revert(ctx, before.other)
	}
	return errors.Join(err, k.Kernel.Revert(ctx, before.ours, removed))
}

func (k iptKernel) Remove(ctx context.Context, before firewall.Before) error {
	other, err := k.table.Inspect(ctx, firewall.Ruleset{})
	if err != nil {
		return err
	}
	if other.Present { // by a change that was cut short
		if err := k.table.Load(ctx, firewall.Ruleset{}, other); err != nil {
			return err
		}
	}
	err = k.Kernel.Remove(ctx, before)
	if err != nil && other.Present {
		err = errors.Join(err, k.table.Revert(context.WithoutCancel(ctx), other))
	}
	return err
}

// nftKernel has the rules in a table of nf_tables.
type nftKernel struct{ Kernels }

func (k nftKernel) Inspect(ctx context.Context, want firewall.Ruleset) (firewall.Inspection, error) {
	ours, err := k.Nftables.Inspect(ctx, want)
	if err != nil {
		return ours, err
	}
	in := ours
	snap := both{ours: ours}
	if k.InUse() && k.Has() {
		other, err := k.Beside.Inspect(ctx, want)
		if err != nil {
			in.Warnings = append(in.Warnings, fmt.Sprintf("iptables has rules too, and what they do is not known: %v", err))
		} else {
			snap.other = other
			in.Present = in.Present || other.Present
			in.Drift = append(in.Drift, other.Drift...)
			in.Shut = append(in.Shut, other.Shut...)
			in.Foreign, in.Bypass, in.Managers, in.Before = other.Foreign, other.Bypass, other.Managers, other.Before
			in.Warnings = append(in.Warnings, other.Warnings...)
		}
	}
	in.Snapshot = snap
	return in, nil
}

func (k nftKernel) Load(ctx context.Context, want firewall.Ruleset, was firewall.Inspection, clear bool) error {
	before := was.Snapshot.(both)
	if err := k.Nftables.Load(ctx, want, before.ours); err != nil {
		return err
	}
	if before.other.Snapshot == nil || len(before.other.Drift) == 0 && !(clear && len(before.other.Foreign) > 0) {
		return nil
	}
	err := k.Beside.Load(ctx, before.other, clear)
	if err != nil {
		if e := k.Nftables.Revert(context.WithoutCancel(ctx), before.ours); e != nil {
			err = fmt.Errorf("%w; and the former rules could not be brought back: %w", err, e)
		}
	}
	return err
}

// LoadFiles is for files of iptables alone.
func (k nftKernel) LoadFiles(context.Context, map[firewall.Family][]byte, firewall.Inspection) error {
	return errors.New("the persisted files are not iptables'")
}

// Yield has nothing to do: no policy of iptables' is ours.
func (k nftKernel) Yield(context.Context) error { return nil }

func (k nftKernel) Revert(ctx context.Context, was firewall.Inspection, removed firewall.Before) error {
	before := was.Snapshot.(both)
	var err error
	if before.other.Snapshot != nil {
		err = k.Beside.Revert(ctx, before.other, removed)
	}
	return errors.Join(err, k.Nftables.Revert(ctx, before.ours))
}

func (k nftKernel) Remove(ctx context.Context, before firewall.Before) error {
	was, err := k.Inspect(ctx, firewall.Ruleset{})
	if err != nil {
		return err
	}
	// What was taken out of iptables comes back while our table closes. Where its
	// programs are gone, so is what there was to give back.
	ours := was.Snapshot.(both).ours
	if other := was.Snapshot.(both).other; k.Has() && (other.Present || gives(before)) {
		if err := k.Beside.Remove(ctx, before); err != nil {
			return err
		}
	}
	if !ours.Present {
		return nil
	}
	err = k.Nftables.Load(ctx, firewall.Ruleset{}, ours)
	if err != nil {
		err = errors.Join(err, k.Revert(context.WithoutCancel(ctx), was, before))
	}
	return err
}

// gives tells whether something is to be given back to iptables.
func gives(before firewall.Before) bool {
	for _, f := range firewall.Families {
		b := before.Family(f)
		if len(b.Removed) > 0 || b.Input != "" && b.Input != firewall.Accept || b.Output != "" && b.Output != firewall.Accept {
			return true
		}
	}
	return false
}
