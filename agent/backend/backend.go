// Package backend defines where rules take effect: the contract of iptables and
// nftables, how the two share one kernel, and the fallback policy.
package backend

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// The names of the backends, in the settings and in the state.
const (
	Iptables = "iptables"
	Nftables = "nftables"
)

// Backend applies our rules to a kernel's INPUT. One of the kernel's two engines holds
// them and the other holds none of them. Other programs' rules are in effect in both.
type Backend interface {
	Engine
	// Yield sets INPUT's policy to ACCEPT while the guard filters.
	Yield(ctx context.Context) error
	// Remove removes our rules and restores what Load removed.
	Remove(ctx context.Context, b Backup) error
}

// Engine is one of the kernel's packet filters, iptables or nftables.
type Engine interface {
	// Inspect reads the kernel's rules and compares them with want. If want is empty,
	// none of our rules should be there.
	Inspect(ctx context.Context, want firewall.Ruleset) (Inspection, error)
}

// Engines are the packet filters of one kernel.
type Engines struct {
	Iptables Backend
	// Beside is iptables if our rules are in nftables: it should have none of them.
	Beside interface {
		Engine
		Remove(ctx context.Context, b Backup) error
	}
	Nftables Engine // our table, or none if a ruleset is empty
	// Leftover is those of our rules that iptables has but cannot remove.
	Leftover interface {
		Exists() (bool, error)
		Remove() error
	}
	// InUse reports whether iptables' tables hold anything. If not, its programs need
	// not be run or exist.
	InUse       func() bool
	HasPrograms func() bool // iptables is installed
}

// For returns the named backend. If name is empty, it returns the one that holds our
// rules, or could hold them.
func (e Engines) For(name string) Backend {
	if name == "" {
		name = e.guess()
	}
	if name == Nftables {
		return inNftables{e}
	}
	return inIptables{e}
}

func (e Engines) guess() string {
	in, err := e.Nftables.Inspect(context.Background(), firewall.Ruleset{})
	if err == nil && (in.Present || !e.HasPrograms()) {
		return Nftables
	}
	return Iptables
}

// Find returns the backend that holds our rules, or could hold them, and what it
// found. If name is empty and iptables fails, it returns nftables.
func Find(ctx context.Context, choose func(name string) Backend, name string) (Backend, Inspection, error) {
	b := choose(name)
	in, err := b.Inspect(ctx, firewall.Ruleset{})
	if err != nil && name == "" {
		other := choose(Nftables)
		if found, e := other.Inspect(ctx, firewall.Ruleset{}); e == nil {
			return other, found, nil
		}
	}
	return b, in, err
}

// Permanent reports whether another attempt to read an engine would also fail.
func Permanent(err error) bool {
	var p interface{ Permanent() bool }
	return errors.As(err, &p) && p.Permanent()
}

// both are the snapshots of the two engines; other is nil if it was not read.
type both struct {
	ours, other Snapshot
	// Whether the other engine has our rules, rules that drop what ours accept, and
	// other programs' terminal rules.
	present, blocks, foreign bool
}

// restoreOurs undoes a load into our engine after err.
func (s both) restoreOurs(ctx context.Context, err error) error {
	if e := s.ours.Restore(context.WithoutCancel(ctx), Backup{}); e != nil {
		return fmt.Errorf("%w; and restoring the previous rules failed: %w", err, e)
	}
	return err
}

// inIptables is the backend with our rules in iptables.
type inIptables struct{ Engines }

func (b inIptables) Inspect(ctx context.Context, want firewall.Ruleset) (Inspection, error) {
	in, err := b.Iptables.Inspect(ctx, want)
	if err != nil {
		return in, err
	}
	other, err := b.Nftables.Inspect(ctx, firewall.Ruleset{})
	if err != nil {
		in.Warnings = append(in.Warnings, fmt.Sprintf("nftables could not be searched for rules of basicfw-agent: %v", err))
	}
	in.Snapshot = iptablesSnapshot{both{ours: in.Snapshot, other: other.Snapshot, present: other.Present}}
	in.Changes += other.Changes
	in.Present = in.Present || other.Present
	in.Drift = append(in.Drift, other.Drift...)
	return in, nil
}

func (b inIptables) Yield(ctx context.Context) error { return b.Iptables.Yield(ctx) }

func (b inIptables) Remove(ctx context.Context, old Backup) error {
	if _, err := b.Iptables.Inspect(ctx, firewall.Ruleset{}); Permanent(err) {
		// What was removed from INPUT cannot be restored.
		return errors.Join(b.Leftover.Remove(), inNftables(b).Remove(ctx, Backup{}))
	}
	other, err := b.Nftables.Inspect(ctx, firewall.Ruleset{})
	if err != nil {
		return err
	}
	if !other.Present {
		return b.Iptables.Remove(ctx, old)
	}
	// An interrupted change left our table, which may be all that closes the
	// machine: remove it last.
	in, err := b.Iptables.Inspect(ctx, firewall.Ruleset{})
	if err != nil {
		return err
	}
	if err := b.Iptables.Remove(ctx, old); err != nil {
		return err
	}
	if err = other.Snapshot.Load(ctx, firewall.Ruleset{}, false); err != nil {
		err = errors.Join(err, in.Snapshot.Restore(context.WithoutCancel(ctx), old))
	}
	return err
}

type iptablesSnapshot struct{ both }

func (s iptablesSnapshot) Load(ctx context.Context, want firewall.Ruleset, clear bool) error {
	if err := s.ours.Load(ctx, want, clear); err != nil {
		return err
	}
	if !s.present {
		return nil
	}
	// Remove our table now that iptables closes the machine.
	if err := s.other.Load(ctx, firewall.Ruleset{}, false); err != nil {
		return s.restoreOurs(ctx, err)
	}
	return nil
}

func (s iptablesSnapshot) Predict(ctx context.Context, live, own exposure.Ruleset, clear bool) exposure.Ruleset {
	if s.present {
		live = s.other.Predict(ctx, live, exposure.Ruleset{}, false)
	}
	return s.ours.Predict(ctx, live, own, clear)
}

func (s iptablesSnapshot) Restore(ctx context.Context, added Backup) error {
	// First restore what closed the machine before.
	var err error
	if s.other != nil {
		err = s.other.Restore(ctx, Backup{})
	}
	return errors.Join(err, s.ours.Restore(ctx, added))
}

// inNftables is the backend with our rules in an nftables table.
type inNftables struct{ Engines }

func (b inNftables) Inspect(ctx context.Context, want firewall.Ruleset) (Inspection, error) {
	in, err := b.Nftables.Inspect(ctx, want)
	if err != nil {
		return in, err
	}
	snap := nftablesSnapshot{both: both{ours: in.Snapshot}, table: in.Present, engines: b.Engines}
	if b.InUse() && b.HasPrograms() {
		other, err := b.Beside.Inspect(ctx, want)
		if Permanent(err) {
			if snap.leftover, _ = b.Leftover.Exists(); snap.leftover {
				in.Drift = append(in.Drift, firewall.Drift{Chain: "iptables", Kind: firewall.Extra, Got: "chains of basicfw-agent in table filter"})
				in.Present = true
			}
		}
		if err != nil {
			in.Warnings = append(in.Warnings, fmt.Sprintf("iptables also has rules, which could not be read: %v", err))
		} else {
			snap.other, snap.present, snap.blocks, snap.foreign = other.Snapshot, other.Present, len(other.Drift) > 0, len(other.Foreign) > 0
			in.Present = in.Present || other.Present
			in.Changes += other.Changes
			in.Drift = append(in.Drift, other.Drift...)
			in.LockedOut = append(in.LockedOut, other.LockedOut...)
			in.Foreign, in.Conflicts, in.Backup = other.Foreign, other.Conflicts, other.Backup
			in.Warnings = append(in.Warnings, other.Warnings...)
		}
	}
	in.Snapshot = snap
	return in, nil
}

// Yield does nothing: this backend sets no policy of iptables.
func (b inNftables) Yield(context.Context) error { return nil }

func (b inNftables) Remove(ctx context.Context, old Backup) error {
	in, err := b.Inspect(ctx, firewall.Ruleset{})
	if err != nil {
		return err
	}
	// Restore iptables while our table still closes the machine. If iptables was
	// uninstalled, there is nothing to restore.
	snap := in.Snapshot.(nftablesSnapshot)
	if snap.leftover {
		if err := b.Leftover.Remove(); err != nil {
			return err
		}
	} else if b.HasPrograms() && (snap.present || !old.empty()) {
		if err := b.Beside.Remove(ctx, old); err != nil {
			return err
		}
	}
	if !snap.table {
		return nil
	}
	if err = snap.ours.Load(ctx, firewall.Ruleset{}, false); err != nil {
		err = errors.Join(err, snap.Restore(context.WithoutCancel(ctx), old))
	}
	return err
}

type nftablesSnapshot struct {
	both
	table    bool // our table exists
	leftover bool // iptables cannot remove some of our rules
	engines  Engines
}

func (s nftablesSnapshot) Load(ctx context.Context, want firewall.Ruleset, clear bool) error {
	if err := s.ours.Load(ctx, want, false); err != nil {
		return err
	}
	if s.leftover {
		if err := s.engines.Leftover.Remove(); err != nil {
			return s.restoreOurs(ctx, err)
		}
	}
	if s.other == nil || !s.blocks && !(clear && s.foreign) {
		return nil
	}
	if err := s.other.Load(ctx, want, clear); err != nil {
		return s.restoreOurs(ctx, err)
	}
	return nil
}

func (s nftablesSnapshot) Predict(ctx context.Context, live, own exposure.Ruleset, clear bool) exposure.Ruleset {
	live = s.ours.Predict(ctx, live, own, false)
	if s.other == nil || !s.blocks && !(clear && s.foreign) {
		return live
	}
	return s.other.Predict(ctx, live, own, clear)
}

func (s nftablesSnapshot) Restore(ctx context.Context, added Backup) error {
	var err error
	if s.other != nil {
		err = s.other.Restore(ctx, added)
	}
	return errors.Join(err, s.ours.Restore(ctx, Backup{}))
}

// Inspection is what a backend found in the kernel, compared with a ruleset.
type Inspection struct {
	Backend string           // the program and its version: "iptables 1.8.9 (nf_tables)"
	Present bool             // one of our chains exists in any family
	Changes string           // differs after a change of any program's rules
	Drift   []firewall.Drift // how the kernel differs from the ruleset
	// Exposed are the differences that open ports which should be closed; LockedOut are
	// those that lock everyone out.
	Exposed, LockedOut []Finding
	Flushed            []firewall.Family  // the families in which none of our rules is left
	Foreign            []firewall.Foreign // other programs' rules in INPUT that decide about packets to this host
	Conflicts          []string           // other firewall managers whose chains INPUT jumps to
	Warnings           []string           // sentences about what else decides about packets
	Backup             Backup             // the present rules that Load changes outside our own chains
	Snapshot           Snapshot           // what was read; nil if nothing could be read
}

// Snapshot is the kernel's rules as a backend read them. A load starts from them, and
// can be rolled back to them.
type Snapshot interface {
	// Load replaces our rules by want, in both families or in neither. With clear, it
	// also removes other programs' terminal rules from INPUT. The error is a
	// [*MismatchError] if the kernel accepted the rules but holds different ones.
	Load(ctx context.Context, want firewall.Ruleset, clear bool) error
	// Predict returns the live rules of all programs as Load would leave them. own are
	// the rules to load, alone on a machine.
	Predict(ctx context.Context, live, own exposure.Ruleset, clear bool) exposure.Ruleset
	// Restore undoes a Load, or a Remove that added the rules of added to INPUT. Later
	// changes by other programs elsewhere are kept.
	Restore(ctx context.Context, added Backup) error
}

// Finding is a consequence of what is in the kernel.
type Finding struct {
	Family firewall.Family
	Why    string // a sentence
	Next   string // the command that fixes it if a repair does not, or ""
}

// Backup is the former content of what Load changes outside our own chains. Remove restores it.
type Backup struct {
	IPv4 FamilyBackup `json:"ipv4"`
	IPv6 FamilyBackup `json:"ipv6"`
}

// FamilyBackup is one family's part of a Backup.
type FamilyBackup struct {
	Input  string `json:"input"`  // INPUT's policy
	Output string `json:"output"` // OUTPUT's policy
	// Removed are the rules that were removed from INPUT, in order, as
	// iptables-save writes them after "-A INPUT ".
	Removed []string `json:"removed,omitempty"`
	// Places are, for each of Removed, how many of the remaining rules preceded it.
	// Stayed is a checksum of those. If they are unchanged later, all rules get their
	// previous order.
	Places []int  `json:"places,omitempty"`
	Stayed string `json:"stayed,omitempty"`
}

// Family returns a family's part, to read or to change.
func (b *Backup) Family(f firewall.Family) *FamilyBackup {
	if f == firewall.IPv4 {
		return &b.IPv4
	}
	return &b.IPv6
}

// empty reports whether there is nothing to restore in iptables.
func (b *Backup) empty() bool {
	for _, f := range firewall.Families {
		old := b.Family(f)
		if len(old.Removed) > 0 || old.Input != "" && old.Input != firewall.Accept || old.Output != "" && old.Output != firewall.Accept {
			return false
		}
	}
	return true
}

// Choice is a backend and the reason for it.
type Choice struct{ Name, Reason string }

// Error reports that a backend does not work on this machine: it is not
// installed, or the kernel refused the rules.
type Error struct{ Err error }

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// MismatchError reports that the kernel accepted the rules but holds different ones: it
// spells them differently, or another program changed them. The backend may still work.
type MismatchError struct{ First firewall.Drift }

func (e *MismatchError) Error() string {
	return fmt.Sprintf("the kernel's rules differ from those that were loaded: %v", e.First)
}

// ErrNoRehearsal reports that rules cannot be rehearsed on this machine.
var ErrNoRehearsal = errors.New("the rules cannot be rehearsed: this machine allows no network namespace")

// Fallback returns nftables and true if first was detected and err shows that iptables
// does not work here. It is the only policy for changing the backend automatically. A
// temporary failure (a held lock, no free process) or a mismatch causes no change.
func Fallback(first Choice, detected bool, err error) (Choice, bool) {
	var failed *Error
	var temporary interface{ Temporary() bool }
	var mismatch *MismatchError
	switch {
	case !detected, first.Name != Iptables, !errors.As(err, &failed),
		errors.As(err, &temporary) && temporary.Temporary(), errors.As(err, &mismatch), errors.Is(err, syscall.EAGAIN):
		return first, false
	}
	if missing := new(system.NotFoundError); errors.As(err, &missing) {
		return Choice{Nftables, missing.Name + " is not installed"}, true
	}
	return Choice{Nftables, "iptables does not work here: " + strings.ReplaceAll(failed.Error(), "\n", "; ")}, true
}

// WithFallback runs do with the first choice and, if that fails, with the one that
// [Fallback] returns. If both fail, it returns the first, for the administrator to fix.
func WithFallback(first Choice, detected bool, note func(Choice), do func(Choice) error) (Choice, error) {
	err := do(first)
	other, ok := Fallback(first, detected, err)
	if err == nil || !ok {
		return first, err
	}
	note(other)
	if e := do(other); e != nil {
		return first, fmt.Errorf("%w; nftables failed too: %w", err, e)
	}
	return other, nil
}
