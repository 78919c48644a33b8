//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/lease"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/store"
)

func (a *app) applyCmd() *cobra.Command {
	var r agent.Request
	var confirm string
	cmd := &cobra.Command{
		Use:   "apply",
		Short: "Apply changed settings",
		Long: `Read the settings again, inspect the machine and load the resulting rules. If
any step fails, the previous state is restored. What bootstrap detected is kept
unless --redetect is given: the client and, with "profile = auto", the profile.
The command is refused if your SSH client address would be locked out, or the
port of your session or of its VPN closed, unless --force or --confirm is given.

With --confirm, the new rules are temporary. The previous rules are restored
when the time expires, or at a reboot, unless you run "basicfw-agent confirm"
before that, in a session that is newer than the change.`,
		Example: `  basicfw-agent apply
  basicfw-agent apply --confirm 5m`,
		Args: noArgs,
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if cmd.Flags().Changed("confirm") {
			var err error
			if r.Confirm, err = firewall.ParseDuration(confirm); err != nil {
				return usageError{fmt.Errorf("--confirm: %w", err)}
			}
		}
		return a.forRoot(func(ctx context.Context, machine *agent.Agent) error {
			res, err := machine.Apply(ctx, r)
			if err != nil {
				return err
			}
			a.showOutcome(res)
			a.showClosed(ctx, machine, res)
			if r.Confirm > 0 && res.Changed {
				fmt.Fprintf(a.stdout, "Rolling back in %s (or on reboot). To keep the change, log in with a new session and run: basicfw-agent confirm\n", firewall.FormatDuration(r.Confirm))
			}
			a.warnLockout(res.Lockout)
			return nil
		})(cmd, args)
	}
	cmd.Flags().StringVar(&confirm, "confirm", "", "roll back after this time, such as 5m, unless confirmed")
	cmd.Flags().BoolVar(&r.Redetect, "redetect", false, "repeat the detection that bootstrap did")
	cmd.Flags().BoolVar(&r.Force, "force", false, "apply even if your SSH client address is locked out")
	cmd.Flags().BoolVar(&r.NoRehearsal, "no-rehearsal", false, "do not check first, in a network namespace, that the kernel accepts the rules")
	return cmd
}

func (a *app) planCmd() *cobra.Command {
	var exitCode bool
	cmd := &cobra.Command{
		Use:   "plan",
		Short: "Show what apply would change, without changing anything",
		Args:  noArgs,
		RunE: a.forRoot(func(ctx context.Context, machine *agent.Agent) error {
			res, err := machine.Apply(ctx, agent.Request{DryRun: true})
			changes, err := a.showPlanned(res, err)
			if err != nil {
				return err
			}
			a.warnLockout(res.Lockout)
			if changes && exitCode {
				return &silentError{exitDrift}
			}
			return nil
		}),
	}
	cmd.Flags().BoolVar(&exitCode, "exit-code", false, "exit with 3 if anything would change")
	return cmd
}

// showPlanned is showPlan for the result of a dry run, including one that would be refused.
func (a *app) showPlanned(res agent.Result, err error) (changes bool, _ error) {
	var refused *apply.RefusedError
	if err != nil && !errors.As(err, &refused) {
		return false, err
	}
	return a.showPlan(res), err
}

// showPlan prints what would change, and reports whether anything would. Removed
// lines begin with "-", added lines with "+". Only rules, files and the service
// count: a new address of an interface is not a change.
func (a *app) showPlan(res agent.Result) (changes bool) {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	for _, m := range res.Others {
		add("would stop and disable %s", m.Name)
	}
	where := ""
	heading := func(family, chain string) {
		if at := family + " " + chain; at != where {
			add("%s", at)
			where = at
		}
	}
	for _, d := range res.Inspection.Drift {
		heading(d.Family, d.Chain)
		if d.Kind != firewall.Missing {
			add("- %s", d.Got)
		}
		if d.Kind != firewall.Extra {
			add("+ %s", d.Want)
		}
	}
	for _, f := range res.Removed {
		heading(f.Family, f.Chain)
		add("- %s", f.Rule)
	}
	if res.Previous == nil {
		add("would write %s", store.StateFile)
	}
	for _, f := range res.Written {
		add("would write %s", f)
	}
	for _, f := range res.Deleted {
		add("would remove %s", f)
	}
	if res.Guarded {
		add("would remove table %s, left by an interrupted change", apply.GuardTable)
	}
	if res.Registered {
		add("would register the service")
	}
	if res.Refused != nil {
		fmt.Fprintf(a.stdout, "would be refused: %v\n", res.Refused)
	}
	if len(lines) == 0 {
		fmt.Fprintf(a.stdout, "nothing would change: profile %s\n", res.State.Profile.Name)
		return false
	}
	fmt.Fprintf(a.stdout, "profile %s (%s)\nssh %s\n", res.State.Profile.Name, res.State.Profile.Reason, sshSentence(res.State))
	fmt.Fprintln(a.stdout, strings.Join(lines, "\n"))
	return true
}

func (a *app) confirmCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "confirm",
		Short: "Confirm a pending change, or the detected client",
		Long: `Keep the change that "basicfw-agent apply --confirm" loaded. If no change is
pending, keep SSH restricted to the client that bootstrap detected. Log in again
and run the command in the new session. A session that is older than the change
stays open whatever the new rules are, so it proves nothing: the command is
refused there, unless --force is given.`,
		Args: noArgs,
		RunE: a.forRoot(func(ctx context.Context, machine *agent.Agent) error {
			st, client, err := machine.Confirm(ctx, force)
			switch {
			case err != nil:
				return err
			case client:
				fmt.Fprintf(a.stdout, "confirmed: SSH remains restricted to %s\n", strings.Join(report.SSHOf(st).Allow, ", "))
			default:
				fmt.Fprintf(a.stdout, "confirmed: the rules of profile %s remain loaded\n", st.Profile.Name)
			}
			return nil
		}),
	}
	cmd.Flags().BoolVar(&force, "force", false, "confirm even if this session proves nothing")
	return cmd
}

// warnLockout warns a caller who is locked out, with --force or by the first bootstrap.
// The latter follows --client-ip, and the caller may be a provisioning system.
func (a *app) warnLockout(e *lease.LockoutError) {
	if e != nil {
		fmt.Fprintf(a.stdout, "warning: %s; to allow it: %s\n", e.What(), e.Fix())
	}
}
