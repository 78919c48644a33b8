//go:build !linux

package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"
)

// version is set by the build: -ldflags "-X main.version=1.2.3".
var version = "0.0.0-dev"

// main runs the commands for the computer of the administrator: a firewall needs Linux.
func main() {
	warn := func(args ...any) { fmt.Fprintln(os.Stderr, append([]any{"warning:"}, args...)...) }
	root := &cobra.Command{
		Use:           "basicfw-agent",
		Short:         "Print the user-data of a new server; all other commands run on Linux",
		Version:       version,
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.AddCommand(userDataCmd(os.Stdout, warn), &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		Run:   func(*cobra.Command, []string) { fmt.Println(version) },
	})
	if err := root.Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "basicfw-agent:", err)
		os.Exit(2) // invalid usage, the only kind of error
	}
}
