//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

func (a *app) sshCmd() *cobra.Command {
	return group("ssh", "Manage the addresses that may log in over SSH", "allow ADDRESS, remove ADDRESS, or list",
		a.sshAllowCmd(), a.sshRemoveCmd(), a.sshListCmd())
}

func (a *app) sshAllowCmd() *cobra.Command {
	var duration string
	var force bool
	cmd := &cobra.Command{
		Use:   "allow ADDRESS|me...",
		Short: "Allow an address or a network to log in over SSH",
		Long: `Allow addresses or networks to log in over SSH, immediately and at every boot.
With --for, the permission is temporary: the kernel ends it, also across a
reboot. "me" is your SSH client address; for a global IPv6 address, its /64.

If SSH was open to any address because no client was known, it is restricted to
the allowed addresses from then on, unless all of them are temporary. The
command is refused if that would lock out your SSH client address.`,
		Example: `  basicfw-agent ssh allow me
  basicfw-agent ssh allow 203.0.113.50 2001:db8:7::/64
  basicfw-agent ssh allow 198.51.100.0/24 --for 8h`,
		Args: someArgs("an address, a network, or me"),
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		who, err := parseWho(args)
		if err != nil {
			return err
		}
		length, err := parseFor(cmd, duration)
		if err != nil {
			return err
		}
		return a.forRoot(a.edit(func(ctx context.Context, machine *agent.Agent) (agent.Edited, error) {
			return machine.AllowSSH(ctx, who, length, force)
		}))(cmd, args)
	}
	cmd.Flags().StringVar(&duration, "for", "", "expire after this time, such as 90m, 8h or 7d (default never)")
	cmd.Flags().BoolVar(&force, "force", false, "allow it even if your SSH client address is locked out")
	a.completeFlags(cmd, map[string]completer{"for": durations})
	cmd.ValidArgsFunction = noFiles(func() []string { return []string{"me\tyour SSH client address"} })
	return cmd
}

func (a *app) sshRemoveCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "remove ADDRESS...",
		Short: "Remove an allowed address or network",
		Long: `Remove addresses or networks that "basicfw-agent ssh list" shows. Open sessions
stay open. The command is refused if your SSH client address could not log in
again, or if no permanently allowed address would remain, unless --force is
given. If none remains, SSH is blocked and only console login is possible.`,
		Example: "  basicfw-agent ssh remove 203.0.113.50",
		Args:    someArgs("an address or a network"),
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		who, err := parseWho(args)
		if err != nil {
			return err
		}
		return a.forRoot(a.edit(func(ctx context.Context, machine *agent.Agent) (agent.Edited, error) {
			return machine.RemoveSSH(ctx, who, force)
		}))(cmd, args)
	}
	cmd.Flags().BoolVar(&force, "force", false, "remove it even if you, or all clients, are locked out")
	cmd.ValidArgsFunction = noFiles(a.allowedAddresses)
	return cmd
}

func (a *app) sshListCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the allowed addresses, until when, and why",
		Args:  noArgs,
		RunE: a.forRoot(func(_ context.Context, machine *agent.Agent) error {
			st, err := machine.State()
			if err != nil {
				return err
			}
			m := machine.Moment()
			a.printAllowed(st.At(m), m.Time)
			return nil
		}),
	}
}

// printAllowed lists the addresses that may log in.
func (a *app) printAllowed(st store.State, now time.Time) {
	ssh := st.Desired.SSH
	tab := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	if u := st.Desired.Unlock; u != nil && u.Until.After(now) {
		who := letIn(firewall.FormatPrefixes(u.From))
		if u.All {
			who = "any address"
		}
		fmt.Fprintf(tab, "%s\tuntil %s, for %s\tbasicfw-agent unlock\n", who, firewall.FormatTime(u.Until), left(u.Until, now))
	}
	anybody := "any address"
	if !ssh.Limit.IsZero() {
		anybody += fmt.Sprintf(", %s per source", ssh.Limit)
	}
	switch p := ssh.Probation; {
	case ssh.Mode == firewall.SSHLimited:
		fmt.Fprintf(tab, "%s\talways\t%s\n", anybody, system.Printable(st.Client.Why()))
	case p != nil:
		fmt.Fprintf(tab, "%s\tfrom %s, in %s\tunless confirmed: basicfw-agent confirm\n", anybody, firewall.FormatTime(p.Until), left(p.Until, now))
	case len(ssh.Allow)+len(ssh.Timed) == 0:
		fmt.Fprintf(tab, "no address\talways\t%s\n", system.Printable(st.Client.Why()))
	}
	row := func(from netip.Prefix, until time.Time) {
		when := "always"
		if !until.IsZero() {
			when = fmt.Sprintf("until %s, for %s", firewall.FormatTime(until), left(until, now))
		}
		fmt.Fprintf(tab, "%s\t%s\t%s\n", firewall.FormatPrefix(from), when, system.Printable(st.WhyAllowed(from, until)))
	}
	for _, p := range ssh.Allow {
		row(p, time.Time{})
	}
	for _, t := range ssh.Timed {
		row(t.From, t.Until)
	}
	tab.Flush()
}

// someArgs is cobra.MinimumNArgs(1) with our exit code.
func someArgs(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError{fmt.Errorf("%s requires %s", shortPath(cmd), what)}
		}
		return nil
	}
}

// parseWho parses addresses, networks and "me".
func parseWho(args []string) (who agent.Who, err error) {
	var list []string
	for _, word := range args {
		switch word {
		case "me":
			who.Me = true
		case "any", "all":
			return who, usageError{hint.Wrap(fmt.Errorf("%s: this command does not open SSH to any address", word), "set allow = any in [ssh] of /etc/basicfw/agent.ini, and run: basicfw-agent apply")}
		default:
			list = append(list, word)
		}
	}
	addresses, errs := firewall.ParseSources(strings.Join(list, " "))
	if len(addresses) == 0 && len(errs) == 0 && !who.Me {
		errs = append(errs, errors.New("no address: want one such as 203.0.113.7, 198.51.100.0/24 or 2001:db8::/64"))
	}
	if len(errs) > 0 {
		return who, usageError{errors.Join(errs...)}
	}
	who.Addresses = addresses
	return who, nil
}

// left returns the time until a moment, to the minute if it is long.
func left(until, now time.Time) string {
	d := until.Sub(now)
	if d > time.Hour {
		d = d.Round(time.Minute)
	}
	return firewall.FormatDuration(d)
}
