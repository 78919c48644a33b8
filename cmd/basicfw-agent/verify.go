//go:build linux

package main

import (
	"context"
	"fmt"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/verify"
	"github.com/spf13/cobra"
)

func (a *app) verifyCmd() *cobra.Command {
	var repair bool
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Compare the machine with its desired state",
		Long: `Compare the rules in the kernel, the persisted rules and the service with the
desired state, and print each difference. The exit code is 3 on drift, unless
--repair repairs it.`,
		Args: noArgs,
		RunE: a.forRoot(func(ctx context.Context, machine *agent.Agent) error {
			r, err := machine.Verify(ctx, repair)
			if err != nil {
				return err
			}
			return a.showReport(r, repair)
		}),
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "repair the differences")
	return cmd
}

// showReport prints the result of a verification.
func (a *app) showReport(r verify.Report, repair bool) error {
	for _, warning := range r.Warnings {
		a.log.Warn(warning)
	}
	for _, d := range r.Drift {
		fmt.Fprintln(a.stdout, d)
	}
	for _, f := range r.Inspection.Foreign {
		fmt.Fprintf(a.stdout, "note: %s %s: %s: %s\n", f.Family, f.Chain, f.Rule, f.Effect)
	}
	for _, o := range r.Inspection.Exposed {
		fmt.Fprintf(a.stdout, "open: %v: %s\n", o.Family, o.Why)
	}
	switch {
	case len(r.Drift) == 0 && len(r.Inspection.Exposed) > 0:
		// We do not remove another program's rules.
		fmt.Fprintf(a.stdout, "our rules match the configuration, but another program's rules open ports; see \"basicfw-agent status\"\n")
		return &silentError{exitDrift}
	case len(r.Drift) == 0:
		fmt.Fprintf(a.stdout, "OK: rules match profile %s\n", r.State.Profile.Name)
		return nil
	case !repair:
		fmt.Fprintf(a.stdout, "%s; to repair: basicfw-agent verify --repair\n", count(len(r.Drift), "difference"))
		return &silentError{exitDrift}
	}
	fmt.Fprintf(a.stdout, "%s repaired\n", count(len(r.Drift), "difference"))
	return nil
}
