package fake

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/service"
)

// Kernel holds a ruleset as a kernel would: it refuses what Check refuses.
type Kernel struct {
	Step    Step
	Rules   firewall.Ruleset
	Refused firewall.Ruleset   // a ruleset that it rejects, unless zero
	Foreign []firewall.Foreign // other programs' terminal rules in INPUT
	Cleared bool               // they were removed
	Tables  []exposure.Table   // of other programs
	Loads   int                // successful loads
	Yielded bool               // INPUT's policy is ACCEPT
	Open    bool               // INPUT accepts everything
}

// Live returns the rules of all programs.
func (k *Kernel) Live(context.Context) (exposure.Ruleset, error) {
	r := exposure.Ruleset{Tables: slices.Clone(k.Tables)}
	if !k.Rules.IsZero() {
		r.Tables = append(r.Tables, iptables.Model(k.Rules).Tables...)
	}
	return r, nil
}

// Inspect compares the rules with want.
func (k *Kernel) Inspect(_ context.Context, want firewall.Ruleset) (backend.Inspection, error) {
	in := backend.Inspection{Backend: "fake", Present: !k.Rules.IsZero(), Snapshot: snapshot{k, k.Rules}}
	if k.Open {
		in.Exposed = []backend.Finding{{Family: firewall.IPv4, Why: "INPUT's policy is ACCEPT"}}
	}
	for _, f := range firewall.Families {
		*in.Backup.Family(f) = backend.FamilyBackup{Input: "ACCEPT", Output: "ACCEPT"}
	}
	if !k.Cleared {
		in.Foreign = k.Foreign
		for _, fo := range k.Foreign {
			in.Backup.IPv4.Removed = append(in.Backup.IPv4.Removed, fo.Rule)
		}
	}
	switch {
	case k.Rules.Equal(want):
	case !k.Rules.IsZero():
		in.Drift = []firewall.Drift{{Family: "ipv4", Chain: firewall.InputChain, Kind: firewall.Altered, Want: "this", Got: "that"}}
	default:
		in.Flushed = firewall.Families[:]
		for _, f := range firewall.Families {
			in.Drift = append(in.Drift, firewall.Drift{Family: f.String(), Chain: "INPUT", Kind: firewall.Missing, Want: "-j BASICFW-INPUT"})
			for _, c := range want.Chains(f) {
				for _, r := range c.Rules {
					in.Drift = append(in.Drift, firewall.Drift{Family: f.String(), Chain: c.Name, Kind: firewall.Missing, Want: r.Target})
				}
			}
		}
	}
	return in, nil
}

// Yield sets INPUT's policy to ACCEPT.
func (k *Kernel) Yield(context.Context) error {
	if err := k.Step("yield", ""); err != nil {
		return err
	}
	k.Yielded = true
	return nil
}

// Remove removes the rules.
func (k *Kernel) Remove(context.Context, backend.Backup) error {
	k.Rules, k.Cleared = firewall.Ruleset{}, false
	return nil
}

// snapshot is the rules that the kernel held.
type snapshot struct {
	k     *Kernel
	rules firewall.Ruleset
}

func (s snapshot) Load(_ context.Context, want firewall.Ruleset, clear bool) error {
	if err := want.Check(); err != nil {
		return err
	}
	if !want.IsZero() && want.Equal(s.k.Refused) {
		return fs.ErrPermission
	}
	if err := s.k.Step("load", ""); err != nil {
		return err
	}
	s.k.Rules, s.k.Cleared, s.k.Yielded = want, s.k.Cleared || clear, false
	s.k.Loads++
	return nil
}

func (s snapshot) Predict(_ context.Context, _, own exposure.Ruleset, _ bool) exposure.Ruleset {
	return exposure.Ruleset{Tables: slices.Concat(s.k.Tables, own.Tables)}
}

func (s snapshot) Restore(context.Context, backend.Backup) error {
	s.k.Rules, s.k.Cleared, s.k.Yielded = s.rules, false, false
	return nil
}

// Service is a service manager.
type Service struct {
	Step       Step
	Registered bool // enabled and active too
}

// Install registers the service.
func (s *Service) Install() error {
	if err := s.Step("service", "install"); err != nil {
		return err
	}
	s.Registered = true
	return nil
}

// Start only records a step.
func (s *Service) Start() error { return s.Step("service", "start") }

// Uninstall unregisters the service.
func (s *Service) Uninstall() error { s.Registered = false; return nil }

// Status reports whether the service is registered.
func (s *Service) Status() (service.Status, error) {
	return service.Status{Registered: s.Registered, Enabled: s.Registered, Active: s.Registered}, nil
}

// Conntrack is a conntrack table that is large enough.
type Conntrack struct{}

// Grow returns a size.
func (Conntrack) Grow(context.Context) (host.Conntrack, error) {
	return host.Conntrack{Max: 4096, Buckets: 1024}, nil
}

// Set does nothing.
func (Conntrack) Set(host.Conntrack) error { return nil }

// Adopt finds no connection.
func (Conntrack) Adopt() (int, error) { return 0, nil }

// Conflicts are other firewalls that flush the kernel's rules when they stop and
// when they start, as firewalld does.
type Conflicts struct {
	Step    Step
	Up      map[string]bool // installed firewalls; true is active and enabled
	Idle    bool            // none of them is active, but enabled
	Gone    bool            // they were removed from the machine
	Flushes []string        // what else closed the machine at each flush
	kernel  *Kernel
	guard   *Guard
}

// Add installs other firewalls, which then filter.
func (m *Conflicts) Add(names ...string) {
	m.Up = map[string]bool{}
	for _, name := range names {
		m.Up[name] = true
	}
}

// Find returns those that are up.
func (m *Conflicts) Find([]string) ([]firewall.Conflict, error) {
	var out []firewall.Conflict
	for _, name := range slices.Sorted(maps.Keys(m.Up)) {
		if m.Up[name] {
			out = append(out, firewall.Conflict{Name: name, Active: !m.Idle, Enabled: true})
		}
	}
	return out, nil
}

// Record returns that the firewall is enabled and active.
func (m *Conflicts) Record(_ context.Context, st firewall.Conflict) (firewall.ConflictBackup, error) {
	return firewall.ConflictBackup{Name: st.Name, Units: []firewall.UnitBackup{{Name: st.Name + ".service", Enabled: true, Active: true}}}, m.Step("record", st.Name)
}

// Stop stops a firewall: it flushes all rules and then is masked.
func (m *Conflicts) Stop(_ context.Context, rec firewall.ConflictBackup, active bool) error {
	if err := m.Step("disable", rec.Name); err != nil {
		return err
	}
	m.flush()
	m.Up[rec.Name] = false
	return m.Step("mask", rec.Name)
}

// Restore starts a firewall.
func (m *Conflicts) Restore(_ context.Context, rec firewall.ConflictBackup, _ bool) (bool, error) {
	if err := m.Step("restore", rec.Name); err != nil {
		return false, err
	}
	if m.Gone {
		return true, nil
	}
	if !m.Up[rec.Name] {
		m.flush()
	}
	m.Up[rec.Name] = true
	return false, nil
}

func (m *Conflicts) flush() {
	if m.Idle {
		return
	}
	m.Flushes = append(m.Flushes, fmt.Sprintf("guard %v, yielded %v", m.guard.Raised, m.kernel.Yielded))
	m.kernel.Rules = firewall.Ruleset{}
}

// Guard is a guard that refuses what Check refuses.
type Guard struct {
	Step   Step
	Err    error // why it cannot be raised
	Raised bool
}

// Raise raises the guard.
func (g *Guard) Raise(r firewall.Ruleset, _ []firewall.Family) error {
	if err := errors.Join(g.Err, r.Check(), g.Step("raise", "")); err != nil {
		return err
	}
	g.Raised = true
	return nil
}

// Lower lowers the guard.
func (g *Guard) Lower() error {
	if err := g.Step("lower", ""); err != nil {
		return err
	}
	g.Raised = false
	return nil
}

// Up reports whether the guard is raised.
func (g *Guard) Up() bool { return g.Raised }
