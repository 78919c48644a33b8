package main

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hostnet"
	"github.com/basicfw/basicfw-agent/agent/settings"
)

func (a *app) unlockCmd() *cobra.Command {
	var from []string
	var duration string
	var all bool
	cmd := &cobra.Command{
		Use:   "unlock",
		Short: "From the console: let SSH in for a while, from anywhere",
		Long: `Let SSH in for a while, for whoever is shut out and stands at the console: from
anywhere, limited, or with --from from some addresses only. With --all nothing is
filtered for that while. It closes again by itself, also across a reboot, or by
"basicfw-agent lock". Meanwhile log in, and say who may from then on:
"basicfw-agent ssh allow me".`,
		Example: `  basicfw-agent unlock
  basicfw-agent unlock --from 203.0.113.80 --for 1h`,
		Args: noArgs,
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if all && len(from) > 0 {
			return usageError{fmt.Errorf("--all and --from: nothing is filtered with --all, so --from has no effect: want one of them")}
		}
		who, errs := firewall.ParseSources(strings.Join(from, ","))
		if cmd.Flags().Changed("from") && len(who) == 0 && len(errs) == 0 {
			errs = append(errs, fmt.Errorf("no address"))
		}
		for _, err := range errs {
			return usageError{fmt.Errorf("--from: %w", err)}
		}
		length, err := firewall.ParseFor(duration)
		if err != nil {
			return usageError{fmt.Errorf("--for: %w", err)}
		}
		return a.alone(func(ctx context.Context, w *wiring) error { return a.unlock(ctx, w, who, length, all) })(cmd, args)
	}
	cmd.Flags().StringSliceVar(&from, "from", nil, "only from these addresses and CIDRs, separated by commas (default anywhere, limited)")
	cmd.Flags().StringVar(&duration, "for", "15m", "for how long, such as 90m, 8h or 7d")
	cmd.Flags().BoolVar(&all, "all", false, "filter nothing at all for that while")
	a.completeFlags(cmd, map[string]completer{"for": durations})
	return cmd
}

func (a *app) unlock(ctx context.Context, w *wiring, from []netip.Prefix, length time.Duration, all bool) error {
	host, err := hostnet.Detect(nil, nil)
	if err != nil {
		return err
	}
	for _, p := range from {
		warning, err := host.CheckNamed(p)
		if err != nil {
			return usageError{fmt.Errorf("--from: %w", err)}
		}
		if warning != "" {
			a.log.Warn(warning)
		}
	}
	u := &firewall.Unlock{From: from, All: all, Window: firewall.NewWindow(w.agent.Moment(), length)}
	if err := firewall.CheckTime(u.Until); err != nil {
		return fmt.Errorf("--for %v: %w", length, err)
	}
	if err := a.setUnlock(ctx, w, u); err != nil {
		return err
	}
	fmt.Fprintf(a.stdout, "unlocked: %s, until %s, for %v\n", unlockedFor(all, firewall.FormatPrefixes(from)), firewall.FormatTime(u.Until), length)
	fmt.Fprintln(a.stdout, "  it closes by itself then, or by: basicfw-agent lock")
	if !all {
		fmt.Fprintln(a.stdout, "next, when you have logged in: basicfw-agent ssh allow me")
	}
	return nil
}

// unlockedFor says what an unlocking lets in: all, or who over SSH.
func unlockedFor(all bool, from []string) string {
	if all {
		return "nothing is filtered"
	}
	return "SSH is open to " + letIn(from)
}

// letIn says who an unlocking lets in over SSH.
func letIn(from []string) string {
	if len(from) == 0 {
		return "any address, limited"
	}
	return strings.Join(from, ", ")
}

func (a *app) lockCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "lock",
		Short: "End what unlock began",
		Args:  noArgs,
		RunE: a.alone(func(ctx context.Context, w *wiring) error {
			st, err := w.state()
			if err != nil {
				return err
			}
			was := st.At(w.agent.Moment()).Desired.Unlock
			if st.Desired.Unlock != nil {
				if err := a.setUnlock(ctx, w, nil); err != nil {
					return err
				}
			}
			if was == nil {
				fmt.Fprintln(a.stdout, "nothing changed: not unlocked")
				return nil
			}
			fmt.Fprintln(a.stdout, "locked: what was decided holds again")
			s, _ := settings.Load(a.sys, a.config)
			if _, err := w.facts(s, false); err == nil {
				a.warnLockout(w, st)
			}
			return nil
		}),
	}
}

// setUnlock makes what was decided hold with something let in besides, or
// without.
func (a *app) setUnlock(ctx context.Context, w *wiring, u *firewall.Unlock) error {
	// Whoever needs it now was not served by a change that waits.
	// Nor by one of which nothing is known any more.
	if p, err := w.agent.Pending(); err != nil || p != nil {
		if err := w.agent.TakeBack(ctx, "somebody had to unlock the machine, or lock it"); err != nil {
			return err
		}
	}
	st, err := w.state()
	if err != nil {
		return err
	}
	st = st.At(w.agent.Moment())
	st.Desired.Unlock = u
	if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
		return err
	}
	out, err := w.agent.Converge(ctx, st, agent.Options{})
	if err != nil {
		return err
	}
	a.announce(w, st, out.Inspection)
	return nil
}
