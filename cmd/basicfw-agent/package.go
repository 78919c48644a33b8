package main

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// erasedCmd is uninstall for the package's scriptlet. rpm 6, and rpm 4.20 with
// its plugin unshare, run scriptlets in a network of their own (macro
// __transaction_unshare_nonet), where there is no rule to take out and yet all
// looks well: the rules to take out are those of whoever erases the package.
func (a *app) erasedCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "package-erased PID",
		Short:  "Uninstall in the network of the process that erases the package",
		Hidden: true,
		Args:   oneArg("a process"),
		RunE: func(_ *cobra.Command, args []string) error {
			pid, err := strconv.Atoi(args[0])
			if err != nil {
				return usageError{fmt.Errorf("%q is no process", args[0])}
			}
			anew := []string{"uninstall"}
			if a.root != "" {
				anew = append(anew, "--root", a.root)
			}
			return system.BeginAnew(pid, anew...)
		},
	}
}

// packageCmd is what the package's scriptlets call; it is not for people.
func (a *app) packageCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "package-upgraded",
		Short:  "Refresh the service after the package was upgraded",
		Hidden: true,
		Args:   noArgs,
		RunE: a.forRoot(func(ctx context.Context, w *wiring) error {
			// The old program still runs, and would repair what it finds half done.
			lockCtx, cancel := context.WithTimeout(ctx, lockWait)
			defer cancel()
			unlock, err := w.agent.Store.Lock(lockCtx, "package-upgraded")
			if err != nil {
				a.log.WithError(err).Warn("going on without the lock")
				unlock = func() {}
			}
			_, err = w.manager.Refresh()
			unlock()
			if err != nil {
				return fmt.Errorf("refreshing the service: %w", err)
			}
			// The new program enforces what the old one applied; no rule changes.
			return w.manager.Restart()
		}),
	}
}
