//go:build linux

package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

func (a *app) renderCmd() *cobra.Command {
	var families, format string
	cmd := &cobra.Command{
		Use:   "render",
		Short: "Print the rules that would be loaded",
		Long: `Print the rules that "basicfw-agent apply" would load or, before bootstrap,
those that "basicfw-agent bootstrap" would load. The default format is that of
iptables-restore, for an empty table. With --format nftables, it is the format
that "nft -f" loads and "nft list table inet basicfw" prints.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != backend.Iptables && format != backend.Nftables {
				return usageError{fmt.Errorf("--format %q: want iptables or nftables", format)}
			}
			wanted, err := parseFamilies(families)
			if err != nil {
				return usageError{err}
			}
			machine, err := agent.New(a.sys, a.config, version, a.log)
			if err != nil {
				return err
			}
			text, err := machine.Render(format, wanted)
			if err != nil {
				return err
			}
			fmt.Fprint(a.stdout, text)
			return nil
		},
	}
	cmd.Flags().StringVar(&families, "family", "ipv4,ipv6", "ipv4, ipv6, or ipv4,ipv6")
	cmd.Flags().StringVar(&format, "format", backend.Iptables, "iptables or nftables")
	a.completeFlags(cmd, map[string]completer{
		"family": func() []string { return []string{"ipv4", "ipv6", "ipv4,ipv6"} },
		"format": func() []string { return []string{backend.Iptables, backend.Nftables} },
	})
	return cmd
}

func parseFamilies(list string) ([]firewall.Family, error) {
	var out []firewall.Family
	for _, name := range strings.Split(list, ",") {
		i := slices.IndexFunc(firewall.Families[:], func(f firewall.Family) bool { return f.String() == strings.TrimSpace(name) })
		if i < 0 {
			return nil, fmt.Errorf("--family %q: want ipv4, ipv6, or ipv4,ipv6", list)
		}
		out = append(out, firewall.Families[i])
	}
	return out, nil
}
