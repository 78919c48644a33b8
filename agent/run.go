package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/basicfw/basicfw-agent/agent/daemon"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/survey"
	"github.com/basicfw/basicfw-agent/bootstrap"
)

// Run is the service. It calls ready when the rules are loaded, with a status text for the
// service manager.
func (a *Agent) Run(ctx context.Context, s settings.Settings, ready func(status string)) error {
	commandLine, err := a.System.ReadLimited("/proc/cmdline", 64<<10)
	if err != nil {
		a.Log.WithError(err).Warn("cannot read the kernel parameters")
	}
	// The boot waits for this, so the first status does not read the rules again.
	release := a.kernel.Hold()
	lists := &bootstrap.Follower{System: a.System, Limit: firewall.MaxBlocked, Warn: a.Log.Warn}
	a.survey.Lists = func() []string { return settings.Lists(a.System, a.config) }
	a.Rehearse = nil // the sandbox forbids namespaces
	d := &daemon.Daemon{Verifier: a.Verifier, Options: daemon.Options{
		CommandLine: string(commandLine),
		Interfaces:  a.survey.Interfaces, ReadList: a.survey.ReadList,
		Dropped:  survey.Dropped(a.kernel),
		Named:    survey.Naming(s),
		Blocks:   lists.Blocks,
		Instance: a.survey.Instance,
		Prune: func(timers []firewall.Timer) (*files.Change, error) {
			return bootstrap.Prune(a.System, a.config, timers, a.Moment())
		},
		Ready: func(status string) {
			release()
			ready(status)
		},
		Say:   a.System.Say,
		Watch: a.survey.Watch, Shells: a.survey.Shells,
		Every: time.Minute,
		Gather: func(ctx context.Context) (report.Input, error) {
			now, _ := settings.Load(a.System, a.config) // the settings are only displayed
			_, facts, err := a.survey.Look(now, true)
			if err != nil {
				a.Log.WithError(err).Warn("the status is incomplete")
			}
			facts.Session, facts.Seen = nil, nil
			return a.gather(ctx, facts)
		},
	}}
	return d.Run(ctx)
}

// Prepare does what the service's sandbox forbids, before the service starts.
func (a *Agent) Prepare(ctx context.Context) error {
	return daemon.Prepare(ctx, a.Applier, a.kernel.Prepare)
}

// Upgraded refreshes the service after an upgrade of the package. The new program enforces
// the state that the old one applied; no rule changes.
func (a *Agent) Upgraded(ctx context.Context) error {
	// The old program is still running, and would repair a half-written unit.
	unlock, err := a.lock(ctx, "package-upgraded", lockWait)
	if err != nil {
		a.Log.WithError(err).Warn("continuing without the lock")
		unlock = func() {}
	}
	_, err = a.manager.Refresh()
	unlock()
	if err != nil {
		return fmt.Errorf("refreshing the service: %w", err)
	}
	return a.manager.Restart()
}

// Uninstall restores the firewall that was there before bootstrap.
func (a *Agent) Uninstall(ctx context.Context) error {
	unlock, err := a.lock(ctx, "uninstall", lockWait)
	if err != nil {
		return err
	}
	defer unlock()
	if err := a.Applier.Uninstall(ctx); !errors.Is(err, store.ErrNone) {
		return err
	}
	_, err = a.State()
	return err
}
