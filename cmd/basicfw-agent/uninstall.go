package main

import (
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
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot(cmd); err != nil {
				return err
			}
			w, err := a.wire()
			if err != nil {
				return err
			}
			unlock, err := a.lock(cmd.Context(), w, "uninstall")
			if err != nil {
				return err
			}
			defer unlock()
			if err := w.agent.Uninstall(cmd.Context()); errors.Is(err, store.ErrNone) {
				return explainState(err)
			} else if err != nil {
				return err
			}
			fmt.Fprintln(a.stdout, "this machine is as it was before bootstrap")
			return nil
		},
	}
}
