package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
)

func (a *app) renderCmd() *cobra.Command {
	var families, format string
	cmd := &cobra.Command{
		Use:   "render",
		Short: "Print the rules that would be loaded",
		Long: `Print the rules that "basicfw-agent apply" would load, or on a machine that was
not bootstrapped yet, "basicfw-agent bootstrap": what iptables-restore loads into
an empty table; or with --format nftables, what "nft -f" loads and
"nft list table inet basicfw" prints.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != agent.Iptables && format != agent.Nftables {
				return usageError{fmt.Errorf("--format %q: want iptables or nftables", format)}
			}
			wanted, err := parseFamilies(families)
			if err != nil {
				return usageError{err}
			}
			w, err := a.wire()
			if err != nil {
				return err
			}
			s, err := settings.Load(a.sys, a.config)
			if err != nil {
				return err
			}
			st, _, _, err := a.decide(w, s, convergeRequest{})
			if err != nil && !errors.Is(err, store.ErrNone) {
				return err
			}
			if format == agent.Nftables {
				fmt.Fprint(a.stdout, nftables.Render(st.Ruleset, wanted))
				return nil
			}
			for _, f := range wanted {
				if len(wanted) > 1 {
					fmt.Fprintf(a.stdout, "# %v\n", f)
				}
				fmt.Fprint(a.stdout, iptables.Render(st.Ruleset, f))
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&families, "family", "ipv4,ipv6", "ipv4, ipv6, or ipv4,ipv6")
	cmd.Flags().StringVar(&format, "format", agent.Iptables, "iptables or nftables")
	a.completeFlags(cmd, map[string]completer{
		"family": func() []string { return []string{"ipv4", "ipv6", "ipv4,ipv6"} },
		"format": func() []string { return []string{agent.Iptables, agent.Nftables} },
	})
	return cmd
}

func parseFamilies(list string) ([]firewall.Family, error) {
	var out []firewall.Family
	for _, name := range strings.Split(list, ",") {
		switch strings.TrimSpace(name) {
		case "ipv4":
			out = append(out, firewall.IPv4)
		case "ipv6":
			out = append(out, firewall.IPv6)
		default:
			return nil, fmt.Errorf("--family %q: want ipv4, ipv6, or ipv4,ipv6", list)
		}
	}
	return out, nil
}
