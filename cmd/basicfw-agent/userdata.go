package main

import (
	"github.com/spf13/cobra"
)

func (a *app) userDataCmd() *cobra.Command {
	return &cobra.Command{Use: "user-data", Args: noArgs, RunE: func(*cobra.Command, []string) error { return nil }}
}
