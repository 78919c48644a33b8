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

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

func (a *app) sshCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ssh",
		Short: "Say who may log in over SSH: allow, remove, list",
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q: want allow ADDRESS, remove ADDRESS, or list", args[0])}
			}
			return cmd.Help()
		},
	}
	cmd.AddCommand(a.sshAllowCmd(), a.sshRemoveCmd(), a.sshListCmd())
	return cmd
}

func (a *app) sshAllowCmd() *cobra.Command {
	var duration string
	var force bool
	cmd := &cobra.Command{
		Use:   "allow ADDRESS|me...",
		Short: "Let an address or a network log in over SSH",
		Long: `Let addresses or networks log in over SSH, at once and at every further boot, or
with --for for a while: the kernel ends it, also across a reboot. "me" is the
address that you come from over SSH; of a global IPv6 address it is the /64.

Where SSH was open to any address because no client was known, it is pinned to
those that are allowed from then on; but not to one that is allowed for a while
only. It is refused where that would shut out the address that you come from.`,
		Example: `  basicfw-agent ssh allow me
  basicfw-agent ssh allow 203.0.113.50 2001:db8:7::/64
  basicfw-agent ssh allow 198.51.100.0/24 --for 8h`,
		Args: someArgs("an address, a network, or me"),
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if cmd.Flags().Changed("for") && duration == "" {
			duration = "none"
		}
		named, me, err := parseWho(args)
		if err != nil {
			return err
		}
		return a.alone(func(ctx context.Context, w *wiring) error {
			end, err := w.ends(duration)
			if err != nil {
				return err
			}
			return a.editSettings(ctx, w, force, func(e settings.Editor) (settings.Edit, error) {
				for _, p := range named {
					warning, err := w.host.CheckNamed(p)
					if err != nil {
						return settings.Edit{}, err
					}
					if warning != "" {
						a.log.Warn(warning)
					}
				}
				who, err := withCaller(w, named, me)
				if err != nil {
					return settings.Edit{}, err
				}
				return e.Allow(who, end), nil
			})
		})(cmd, args)
	}
	cmd.Flags().StringVar(&duration, "for", "", "for how long, such as 90m, 8h or 7d (default for good)")
	cmd.Flags().BoolVar(&force, "force", false, "even if the address that you come from is shut out")
	a.completeFlags(cmd, map[string]completer{"for": durations})
	cmd.ValidArgsFunction = noFiles(func() []string { return []string{"me\tthe address that you come from"} })
	return cmd
}

func (a *app) sshRemoveCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "remove ADDRESS...",
		Short: "Take away that an address or a network may log in over SSH",
		Long: `Take away that addresses or networks may log in, as "basicfw-agent ssh list" shows
them. Sessions that are open stay open. It is refused where the address that you
come from could not log in again, and for the last one that may, unless forced:
then SSH is for nobody, and the console is the only way in.`,
		Example: "  basicfw-agent ssh remove 203.0.113.50",
		Args:    someArgs("an address or a network"),
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		named, me, err := parseWho(args)
		if err != nil {
			return err
		}
		return a.alone(func(ctx context.Context, w *wiring) error {
			return a.editSettings(ctx, w, force, func(e settings.Editor) (settings.Edit, error) {
				who, err := withCaller(w, named, me)
				if err != nil {
					return settings.Edit{}, err
				}
				return e.Remove(who, force)
			})
		})(cmd, args)
	}
	cmd.Flags().BoolVar(&force, "force", false, "even if you, or everybody, could not log in again")
	cmd.ValidArgsFunction = noFiles(a.allowedAddresses)
	return cmd
}

func (a *app) sshListCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List who may log in over SSH, until when, and why",
		Args:  noArgs,
		RunE: a.forRoot(func(_ context.Context, w *wiring) error {
			st, err := w.state()
			if err != nil {
				return err
			}
			a.printAllowed(st.At(w.agent.Moment()), w.agent.Now())
			return nil
		}),
	}
}

// printAllowed lists who may log in.
func (a *app) printAllowed(st store.State, now time.Time) {
	ssh := st.Desired.SSH
	tab := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	if u := st.Desired.Unlock; u != nil && u.Until.After(now) {
		who := letIn(firewall.FormatPrefixes(u.From))
		if u.All {
			who = "any address"
		}
		fmt.Fprintf(tab, "%s\tuntil %s, for %s\tbasicfw-agent unlock\n", who, firewall.FormatTime(u.Until), u.Until.Sub(now).Round(time.Second))
	}
	switch {
	case ssh.Mode == firewall.SSHLimited && ssh.Limit.IsZero():
		fmt.Fprintf(tab, "any address\talways\t%s\n", system.Printable(st.Client.Why()))
	case ssh.Mode == firewall.SSHLimited:
		fmt.Fprintf(tab, "any address, %s from each\talways\t%s\n", ssh.Limit, system.Printable(st.Client.Why()))
	case len(ssh.Allow)+len(ssh.Timed) == 0:
		fmt.Fprintf(tab, "nobody\talways\t%s\n", system.Printable(st.Client.Why()))
	}
	row := func(from netip.Prefix, until time.Time) {
		when := "always"
		if !until.IsZero() {
			when = fmt.Sprintf("until %s, for %s", firewall.FormatTime(until), until.Sub(now).Round(time.Second))
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
			return usageError{fmt.Errorf("%s wants %s", cmd.CommandPath(), what)}
		}
		return nil
	}
}

// parseWho reads addresses and networks; me tells whether the caller is among
// them.
func parseWho(args []string) (who []netip.Prefix, me bool, err error) {
	var list []string
	for _, word := range args {
		switch word {
		case "me":
			me = true
		case "any", "all":
			return nil, false, usageError{fmt.Errorf("%s: who may log in from anywhere is not for a command: write allow = any into [ssh] of /etc/basicfw/agent.ini, and run \"basicfw-agent apply\"", word)}
		default:
			list = append(list, word)
		}
	}
	who, errs := firewall.ParseSources(strings.Join(list, " "))
	if len(who) == 0 && len(errs) == 0 && !me {
		errs = append(errs, errors.New("no address: want one such as 203.0.113.7, 198.51.100.0/24 or 2001:db8::/64"))
	}
	if len(errs) > 0 {
		return nil, false, usageError{errors.Join(errs...)}
	}
	return who, me, nil
}

// errNoSession says that it is not known where the caller comes from.
var errNoSession = errors.New("me: this command does not run in an SSH session that can be made sure of: give the address itself")

// withCaller adds where the caller comes from.
func withCaller(w *wiring, who []netip.Prefix, me bool) ([]netip.Prefix, error) {
	switch {
	case !me:
		return who, nil
	case w.found.Session == nil:
		return nil, errNoSession
	}
	return append(who, w.found.Session.Client), nil
}
