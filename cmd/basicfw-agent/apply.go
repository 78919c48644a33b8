package main

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
)

func (a *app) applyCmd() *cobra.Command {
	var r convergeRequest
	var confirm string
	cmd := &cobra.Command{
		Use:   "apply",
		Short: "Bring changed settings into effect",
		Long: `Bring changed settings into effect: read them again, look at the machine again,
and load what follows. Where anything fails, all is as it was before. What was
detected at bootstrap, the client and with "profile = auto" the profile, stays,
unless --redetect asks for more. It is refused where the address that you come
from over SSH would be shut out, unless forced or to be confirmed.

With --confirm the new rules stand for that long only: the former ones come back,
also at a reboot, unless "basicfw-agent confirm" is called in time, in a session
that is newer than the change.`,
		Example: `  basicfw-agent apply
  basicfw-agent apply --confirm 5m`,
		Args: noArgs,
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if cmd.Flags().Changed("confirm") {
			var err error
			if r.confirm, err = firewall.ParseFor(confirm); err != nil {
				return usageError{fmt.Errorf("--confirm: %w", err)}
			}
		}
		return a.alone(func(ctx context.Context, w *wiring) error { return a.follow(ctx, w, r) })(cmd, args)
	}
	cmd.Flags().StringVar(&confirm, "confirm", "", "for how long, such as 5m, unless confirmed")
	cmd.Flags().BoolVar(&r.redetect, "redetect", false, "decide anew what was detected at bootstrap")
	cmd.Flags().BoolVar(&r.force, "force", false, "even if the address that you come from is shut out")
	cmd.Flags().BoolVar(&r.noRehearsal, "no-rehearsal", false, "load the rules without trying out first whether the kernel takes them")
	return cmd
}

func (a *app) planCmd() *cobra.Command {
	r := convergeRequest{dryRun: true}
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Show what apply would change, and change nothing",
		Args:  noArgs,
		RunE:  a.forRoot(func(ctx context.Context, w *wiring) error { return a.follow(ctx, w, r) }),
	}
	cmd.Flags().BoolVar(&r.exitCodeDrift, "exit-code", false, "exit with 3 where something would change")
	return cmd
}

// follow makes a machine that was bootstrapped follow its settings.
func (a *app) follow(ctx context.Context, w *wiring, r convergeRequest) error {
	previous, err := w.state()
	if err != nil {
		return err
	}
	r.previous, r.service = &previous, previous.Service
	s, err := settings.Load(a.sys, a.config)
	if err != nil {
		return err
	}
	r.takeOver = true
	return a.converge(ctx, w, s, r)
}

// bootstrapped is store.ErrNone, as an error for people, where the machine was
// not bootstrapped; else it tells whether the service belongs to it.
func (a *app) bootstrapped(w *wiring) (service bool, err error) {
	st, err := w.state()
	return st.Service, err
}

// refuseLockout keeps the caller from shutting out the address that they come
// from.
func refuseLockout(w *wiring, st store.State) error {
	s := w.found.Session
	if s == nil || st.Desired.SSH.Mode != firewall.SSHPinned {
		return nil
	}
	if _, may := st.Desired.SSH.AllowedBy(s.From); may {
		return nil
	}
	return &lockoutError{s.From}
}

// warnLockout tells the caller who is shut out all the same: by force, or at
// the first bootstrap, where who was named counts. That may well not be who
// types: a program that sets up machines for somebody else.
func (a *app) warnLockout(w *wiring, st store.State) {
	if err := refuseLockout(w, st); err != nil {
		fmt.Fprintf(a.stdout, "warning: you come from %s, which cannot log in again; to mend that: basicfw-agent ssh allow me\n", w.found.Session.From)
	}
}

// lockoutError says that the caller would be shut out.
type lockoutError struct{ from netip.Addr }

func (e *lockoutError) Error() string {
	return fmt.Sprintf("you come from %s, which could not log in again, so nothing was changed: allow it too (\"basicfw-agent ssh allow me\"), or use --force", e.from)
}
