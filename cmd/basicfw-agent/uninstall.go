package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent/store"
)

func (a *app) uninstallCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "uninstall",
		Short: "Give the machine back as it was before bootstrap",
		Long: `Give the machine back as it was before bootstrap: our rules go, what bootstrap
took out of INPUT returns, policies, files and the service are as before. What
others changed meanwhile stays. The machine is then as open as it was.`,
		Args: noArgs,
		RunE: a.alone(func(ctx context.Context, w *wiring) error {
			if err := w.agent.Uninstall(ctx); errors.Is(err, store.ErrNone) {
				return explainState(err)
			} else if err != nil {
				return err
			}
			_, err := fmt.Fprintln(a.stdout, "this machine is as it was before bootstrap, and as open")
			return err
		}),
	}
}
