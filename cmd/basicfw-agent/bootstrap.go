//go:build linux

package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/bootstrap"
)

func (a *app) bootstrapCmd() *cobra.Command {
	var f bootstrap.Flags
	var r agent.Request
	cmd := &cobra.Command{
		Use:   "bootstrap",
		Short: "Close this machine: load, persist and verify its rules",
		Long: `Close this machine. Bootstrap detects the network interfaces, sshd's ports and
the provisioning client, and chooses the profile. It loads the rules for IPv4
and IPv6, reads them back, persists them for the next boot and registers the
service. Finally it tests the rules with real packets in a copy of this
machine's network, as "basicfw-agent selftest" does. If any step fails, the
previous state is restored.

Run again, it changes nothing unless flags or settings changed. Flags are saved
in /etc/basicfw/local.ini, which overrides agent.ini.`,
		Example: `  basicfw-agent bootstrap
  basicfw-agent bootstrap --profile web+mail --client-ip 203.0.113.9
  basicfw-agent bootstrap --dry-run`,
		Args: noArgs,
		RunE: a.forRoot(func(ctx context.Context, machine *agent.Agent) error {
			res, err := machine.Bootstrap(ctx, f, r)
			switch {
			case res.Unsaved != nil:
				fmt.Fprintln(a.stdout, "closed by the failsafe rules until a reboot, because they could not be saved: SSH is open to any address, limited, and no other port is open")
				err = hint.Wrap(err, "when files can be written, run bootstrap again with the same flags")
			case res.ClosedBy == "failsafe":
				fmt.Fprintln(a.stdout, "closed by the failsafe rules: SSH is open to any address, limited, and no other port is open")
			case res.ClosedBy != "":
				fmt.Fprintf(a.stdout, "closed by profile %s anyway, with SSH open to any address, limited\n", res.ClosedBy)
			}
			if r.DryRun {
				_, err = a.showPlanned(res, err)
			}
			if err != nil {
				return err
			}
			if !r.DryRun {
				a.showOutcome(res)
				a.showClosed(ctx, machine, res)
			}
			a.warnLockout(res.Lockout)
			return nil
		}),
	}
	cmd.Flags().StringVar(&f.Profile, "profile", "", "auto, web-only, web+mail, or a profile of your own")
	cmd.Flags().StringVar(&f.ClientIP, "client-ip", "", "addresses and CIDRs that may log in over SSH, separated by commas")
	cmd.Flags().StringVar(&f.Backend, "backend", "", "auto, iptables or nftables")
	cmd.Flags().BoolVar(&r.NoService, "no-service", false, "do not register the service")
	cmd.Flags().BoolVar(&r.NoRehearsal, "no-rehearsal", false, "do not check first, in a network namespace, that the kernel accepts the rules")
	cmd.Flags().BoolVar(&r.NoSelftest, "no-selftest", false, "do not test the rules with packets")
	cmd.Flags().BoolVar(&r.DryRun, "dry-run", false, "show what would change, without changing anything")
	cmd.Flags().BoolVar(&r.Force, "force", false, "bootstrap even if your SSH client address is locked out")
	cmd.Flags().BoolVar(&r.OrFailsafe, "or-failsafe", false, "on failure, close the machine anyway, with SSH open to any address, limited")
	a.completeFlags(cmd, map[string]completer{"profile": a.profileNames, "backend": func() []string { return []string{"auto", "iptables", "nftables"} }})
	return cmd
}

func (a *app) userDataCmd() *cobra.Command {
	cmd := userDataCmd(a.stdout, a.log.Warn)
	cmd.Args = noArgs
	a.completeFlags(cmd, map[string]completer{"profile": a.profileNames})
	return cmd
}

func (a *app) uninstallCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "uninstall",
		Short: "Restore the firewall that was there before bootstrap",
		Long: `Remove the rules of basicfw-agent, and restore the rules that bootstrap removed
from INPUT, the policies, the files and the services. What other programs have
changed since then is kept. The machine is then as open as it was before.
In a chroot, such as a rescue system's, the rules in the kernel stay.`,
		Args: noArgs,
		RunE: a.forRoot(func(ctx context.Context, machine *agent.Agent) error {
			if err := machine.Uninstall(ctx); err != nil {
				return err
			}
			done := "previous firewall restored; basicfw-agent no longer filters this machine"
			if machine.OtherKernel() {
				done = "previous files restored; the rules in the kernel are another system's and stay"
			}
			_, err := fmt.Fprintln(a.stdout, done)
			return err
		}),
	}
}

// showClosed prints the ports that containers publish and that the settings close.
func (a *app) showClosed(ctx context.Context, machine *agent.Agent, res agent.Result) {
	if !res.Changed || !res.State.Ruleset.Forwards() {
		return
	}
	s, err := machine.Situation(ctx)
	if err != nil {
		a.log.WithError(err).Warn("it is not known which published ports are closed")
		return
	}
	for i, text := range report.ClosedPorts(s.Forwarded(s.Report())) {
		fmt.Fprintf(a.stdout, "  %-9s %s\n", map[bool]string{true: "published"}[i == 0], text)
	}
}

// hintIPv4 prints how to log in if SSH is blocked over the family that clients prefer.
func (a *app) hintIPv4(st store.State) {
	if st.Desired.SSHNeedsIPv4() {
		fmt.Fprintf(a.stdout, "hint: %s\n", firewall.SSHOverIPv4)
	}
}

// showOutcome prints what was done, and what is open from now on.
func (a *app) showOutcome(out agent.Result) {
	st := out.State
	if !out.Changed {
		fmt.Fprintf(a.stdout, "nothing changed: profile %s is already in effect\n", st.Profile.Name)
		return
	}
	fmt.Fprintf(a.stdout, "protected by profile %s (%s)\n", st.Profile.Name, st.Profile.Reason)
	fmt.Fprintf(a.stdout, "  ssh       %s\n", sshSentence(st))
	fmt.Fprintf(a.stdout, "  open      %s\n", openLine(report.OpenOf(st.Desired)))
	fmt.Fprintf(a.stdout, "  backend   %s, %s\n", out.Inspection.Backend, st.Backend.Reason)
	if out.Registered {
		fmt.Fprintf(a.stdout, "  service   registered: verifies and repairs the rules at every boot\n")
	}
	list := func(label string, files []string) {
		for _, f := range files {
			fmt.Fprintf(a.stdout, "  %-9s %s\n", label, f)
			label = ""
		}
	}
	list("written", out.Written)
	list("removed", out.Deleted)
	if out.Adopted > 0 {
		fmt.Fprintf(a.stdout, "  sessions  kept %s\n", count(out.Adopted, "open connection"))
	}
	for i, f := range out.Removed {
		if i == 0 {
			fmt.Fprintf(a.stdout, "  replaced  previous rules in INPUT, which uninstall restores:\n")
		}
		fmt.Fprintf(a.stdout, "            %s %s\n", f.Family, f.Rule)
	}
	if len(out.Others) > 0 {
		fmt.Fprintf(a.stdout, "  stopped   and disabled: %s; uninstall restores this\n", strings.Join(apply.Names(out.Others), ", "))
	}
	for _, warning := range out.Inspection.Warnings {
		fmt.Fprintf(a.stdout, "  warning   %s\n", warning)
	}
	a.hintIPv4(st)
	if st.Desired.SSH.Probation != nil {
		fmt.Fprintln(a.stdout, "next: log in again from that address for a few seconds, or run there: basicfw-agent confirm")
	}
	if st.Desired.SSH.Mode == firewall.SSHLimited && st.Client.Source != "any" {
		fmt.Fprintln(a.stdout, "next: basicfw-agent ssh allow YOUR-ADDRESS")
	}
}
