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
			if _, err := w.manager.Refresh(); err != nil {
				return fmt.Errorf("refreshing the service: %w", err)
			}
			// The new program enforces what the old one applied; no rule changes.
			return w.manager.Restart()
		}),
	}
}
