// Package agent applies, verifies, reports and removes the desired firewall state. It has
// one use case for each command, and wires the packages below it together.
package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/conflict"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/motd"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/service"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/survey"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/verify"
	"github.com/basicfw/basicfw-agent/bootstrap"
	"github.com/basicfw/basicfw-agent/profiles"
)

// Agent is the firewall of one machine.
type Agent struct {
	verify.Verifier // and the Applier below it
	survey          survey.Surveyor

	config  string // the settings file; "" is the default one
	manager *service.Manager
	kernel  *iptables.Backend
	// The facts about the machine, which each command collects once.
	host   host.Host
	found  host.Facts
	looked bool
}

// New returns the agent of a machine whose settings are in the file config; "" is the
// default file.
func New(sys *system.System, config, version string, log logrus.FieldLogger) (*Agent, error) {
	families := []firewall.Family{firewall.IPv4}
	if host.HasIPv6() {
		families = append(families, firewall.IPv6)
	}
	manager, err := service.New(sys, "")
	if err != nil {
		return nil, err
	}
	kernel := iptables.New(sys, families)
	kernel.Misprinted = nftables.Misprinted
	engines := backend.Engines{Iptables: kernel, Beside: iptables.Beside{Backend: kernel}, Nftables: nftables.New(sys, families), Leftover: nftables.Leftover{System: sys},
		HasPrograms: kernel.There, InUse: func() bool { return kernel.LegacyInUse() || nftables.Xtables() }}
	states := store.New(sys)
	a := &Agent{config: config, manager: manager, kernel: kernel}
	a.survey = survey.Surveyor{System: sys, Store: states, Log: log}
	a.Applier = &apply.Applier{
		System: sys, Backend: engines.For, Store: states,
		Files:   apply.RulesFiles{System: sys, Iptables: iptables.Files{}, Nftables: nftables.Files{}, Families: families},
		Service: manager, Conntrack: host.ConntrackTable{System: sys},
		Conflicts: conflict.New(sys, nftables.HasTable), Guard: nftables.Guard{},
		Live: survey.Live(kernel), Ports: a.survey.Ports, OtherKernel: system.Chrooted,
		Log: log, Version: version, Families: families, Moment: survey.Now,
	}
	a.Rehearse = a.Trial().Rehearse
	return a, nil
}

// UsageError is a wrong flag, argument or command.
type UsageError struct{ Err error }

func (e *UsageError) Error() string { return e.Err.Error() }
func (e *UsageError) Unwrap() error { return e.Err }

// lockWait is how long a command waits for another change to finish.
const lockWait = 60 * time.Second

// lock reserves changes for command until unlock is called. It waits at most wait for
// another change.
func (a *Agent) lock(ctx context.Context, command string, wait time.Duration) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	return a.Store.Lock(ctx, command)
}

// State returns the desired state. Its errors have hints.
func (a *Agent) State() (store.State, error) {
	st, err := a.Store.Load()
	switch {
	case errors.Is(err, store.ErrNone):
		err = hint.Wrap(fmt.Errorf("this machine is %w", err), "basicfw-agent bootstrap")
	case errors.Is(err, store.ErrLost):
		err = hint.Wrap(err, "%s restores it", report.RestoreCommand)
	case err != nil:
		err = hint.Wrap(err, "basicfw-agent bootstrap replaces it")
	}
	return st, err
}

// localPath returns the path of the file in which commands save settings.
func (a *Agent) localPath() string { return settings.LocalFile(a.config) }

// announce updates the login message after a successful change. If that fails, it logs a
// warning, because the change itself has succeeded.
func (a *Agent) announce(ctx context.Context, st store.State) {
	now := report.Input{Facts: a.found, Families: a.Families, Now: a.Moment()}
	now.State = st
	now.Live, now.LiveErr = a.Live(ctx)
	if p, err := a.Pending(); err == nil {
		now.Pending = p
	}
	now.Alone = iptables.Model(now.Wanted().Ruleset)
	s := report.New(now)
	if err := errors.Join(motd.Link(a.System), motd.Show(a.System, s.Message(), s.Issue())); err != nil {
		a.Log.WithError(err).Warn("cannot update the login message")
	}
}

// facts returns the facts about the machine, collected once for each command.
func (a *Agent) facts(s settings.Settings, names bool) (f host.Facts, err error) {
	if !a.looked {
		a.host, a.found, err = a.survey.Look(s, names)
		a.looked = err == nil
	}
	return a.found, err
}

// decide computes the desired state from the settings and the facts. previous is the state
// on disk. It is nil if the state cannot be read and is to be replaced; Apply logs that.
func (a *Agent) decide(ctx context.Context, s settings.Settings, redetect bool) (st store.State, previous *store.State, warnings []string, err error) {
	set, err := profiles.Load(a.System)
	if err != nil {
		return st, nil, nil, err
	}
	if st, err := a.Store.Load(); err == nil {
		previous = &st
	}
	// The reason for the profile includes the name of the mail server's process.
	facts, err := a.facts(s, s.Profile == settings.Auto && (previous == nil || redetect))
	if err != nil {
		return st, nil, nil, err
	}
	facts.Interfaces = a.host.Interfaces
	st, warnings, err = bootstrap.Decide(bootstrap.Input{Settings: s, Local: a.localPath(), Profiles: set, Facts: facts, Blocker: bootstrap.NewBlocker(a.System, a.host, facts.Session, s),
		CheckClient: a.host.CheckNamed, ReadList: a.survey.ReadList, Direct: a.ContainerPorts(ctx, a.host.Interfaces, previous), Previous: previous, Redetect: redetect, Now: a.Moment()})
	a.found.Interfaces = st.Desired.Interfaces
	return st, previous, warnings, err
}
