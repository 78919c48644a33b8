//go:build linux

package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

func (a *app) unlockCmd() *cobra.Command {
	var from []string
	var duration string
	var all bool
	cmd := &cobra.Command{
		Use:   "unlock",
		Short: "Open SSH temporarily, when you are locked out",
		Long: `Open SSH temporarily; run this at the console when you are locked out. SSH is
open to any address, limited, or with --from only to the given addresses. With
--all, nothing is filtered. The unlock expires by itself, also across a reboot,
and "basicfw-agent lock" ends it earlier. Before it ends, log in and run
"basicfw-agent ssh allow me".`,
		Example: `  basicfw-agent unlock
  basicfw-agent unlock --from 203.0.113.80 --for 1h`,
		Args: noArgs,
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if all && len(from) > 0 {
			return usageError{fmt.Errorf("--all and --from exclude each other: with --all, nothing is filtered")}
		}
		who, errs := firewall.ParseSources(strings.Join(from, ","))
		if cmd.Flags().Changed("from") && len(who) == 0 && len(errs) == 0 {
			errs = append(errs, fmt.Errorf("no address"))
		}
		for _, err := range errs {
			return usageError{fmt.Errorf("--from: %w", err)}
		}
		length, err := firewall.ParseDuration(duration)
		if err != nil {
			return usageError{fmt.Errorf("--for: %w", err)}
		}
		return a.forRoot(func(ctx context.Context, machine *agent.Agent) error {
			u, err := machine.Unlock(ctx, who, length, all)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.stdout, "unlocked: %s, until %s, for %s\n", unlockedFor(all, firewall.FormatPrefixes(who)), firewall.FormatTime(u.Until), firewall.FormatDuration(length))
			fmt.Fprintln(a.stdout, "  it expires by itself; to end it earlier: basicfw-agent lock")
			if !all {
				fmt.Fprintln(a.stdout, "next, after you have logged in: basicfw-agent ssh allow me")
			}
			return nil
		})(cmd, args)
	}
	cmd.Flags().StringSliceVar(&from, "from", nil, "only from these addresses and CIDRs, separated by commas (default any address, limited)")
	cmd.Flags().StringVar(&duration, "for", "15m", "expire after this time, such as 90m, 8h or 7d")
	cmd.Flags().BoolVar(&all, "all", false, "filter nothing during this time")
	a.completeFlags(cmd, map[string]completer{"for": durations})
	return cmd
}

// unlockedFor returns what an unlock opens: everything, or SSH to some sources.
func unlockedFor(all bool, from []string) string {
	if all {
		return "nothing is filtered"
	}
	return "SSH is open to " + letIn(from)
}

// letIn returns the sources to which an unlock opens SSH.
func letIn(from []string) string {
	return cmp.Or(strings.Join(from, ", "), "any address, limited")
}

func (a *app) lockCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "lock",
		Short: "End an unlock",
		Args:  noArgs,
		RunE: a.forRoot(func(ctx context.Context, machine *agent.Agent) error {
			unlocked, lockout, err := machine.EndUnlock(ctx)
			switch {
			case err != nil:
				return err
			case !unlocked:
				fmt.Fprintln(a.stdout, "nothing changed: not unlocked")
			default:
				fmt.Fprintln(a.stdout, "locked: the configured rules are in effect again")
				a.warnLockout(lockout)
			}
			return nil
		}),
	}
}
