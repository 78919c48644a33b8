package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
)

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
