//go:build linux

package main

import (
	"fmt"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/profiles"
)

func (a *app) profileCmd() *cobra.Command {
	return group("profile", "List, show and check profiles", "list, show NAME, or check FILE", &cobra.Command{
		Use:   "list",
		Short: "List the profiles",
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			set, err := profiles.Load(a.sys)
			if err != nil {
				return err
			}
			tab := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
			for _, p := range set.List() {
				fmt.Fprintf(tab, "%s\t%s\t%s\n", p.Name, p.Title, p.Source)
			}
			return tab.Flush()
		},
	}, &cobra.Command{
		Use:   "show NAME",
		Short: "Show what a profile opens",
		Args:  oneArg("the name of a profile"),

		ValidArgsFunction: noFiles(func() []string { return a.profileNames()[1:] }), // auto is not a profile
		RunE: func(_ *cobra.Command, args []string) error {
			set, err := profiles.Load(a.sys)
			if err != nil {
				return err
			}
			p, source, err := set.Get(args[0])
			if err != nil {
				return usageError{err}
			}
			fmt.Fprintf(a.stdout, "%s: %s (%s)\n", p.Name, p.Title, source)
			tab := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
			fmt.Fprintf(tab, "  ping\t%s\n", map[bool]string{true: "answered", false: "not answered"}[p.Ping])
			for _, s := range p.Services {
				fmt.Fprintf(tab, "  %s\t%s\t%s\n", s.Name, s, s.Source)
			}
			return tab.Flush()
		},
	}, &cobra.Command{
		Use:   "check FILE",
		Short: "Check a profile file for errors",
		Args:  oneArg("a file"),

		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault
		},
		RunE: func(_ *cobra.Command, args []string) error {
			if err := profiles.Check(a.sys, args[0]); err != nil {
				return err
			}
			fmt.Fprintf(a.stdout, "%s: OK\n", args[0])
			return nil
		},
	})
}
