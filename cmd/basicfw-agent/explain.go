//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

func (a *app) explainCmd() *cobra.Command {
	var asJSON bool
	var from, to, toAddr string
	var p exposure.Probe
	cmd := &cobra.Command{
		Use:   "explain --from ADDRESS --to PORT/PROTO",
		Short: "Show what the rules of all programs do to a packet",
		Long: `Show, hook by hook, each rule that a packet matches, and its effect. All tables
of iptables and nftables count, whichever program has loaded them. No packet is
sent, and neither bootstrap nor the service is needed.

Exit code 0 means delivered or forwarded, 3 dropped, and 5 that it depends on a
rule that this program cannot evaluate.`,
		Example: `  basicfw-agent explain --from 203.0.113.9 --to 22/tcp
  basicfw-agent explain --from 10.0.0.7 --to 53/udp --on eth1 --to-addr 10.0.0.1`,
		Args: noArgs,
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		for _, f := range []string{"from", "to"} {
			if !cmd.Flags().Changed(f) {
				return usageError{fmt.Errorf("explain requires --%s", f)}
			}
		}
		var err error
		if p.From, err = parseAddress("--from", from); err != nil {
			return err
		}
		ports, proto, err := firewall.ParsePorts(to)
		if err == nil && ports.First != ports.Last {
			err = fmt.Errorf("%s: want a single port", firewall.Quote(to))
		}
		if err != nil {
			return usageError{fmt.Errorf("--to: %w", err)}
		}
		p.Proto, p.Port = proto, ports.First
		if cmd.Flags().Changed("to-addr") {
			if p.To, err = parseAddress("--to-addr", toAddr); err != nil {
				return err
			}
		}
		if p.State = strings.ToUpper(p.State); !slices.Contains(exposure.States, p.State) {
			return usageError{fmt.Errorf("--state %s: want one of %s", firewall.Quote(p.State), strings.Join(exposure.States, ", "))}
		}
		return a.readOnly(func(ctx context.Context, machine *agent.Agent) error { return a.explain(ctx, machine, p, asJSON) })(cmd, args)
	}
	cmd.Flags().StringVar(&from, "from", "", "the source address")
	cmd.Flags().StringVar(&to, "to", "", "the port and protocol, such as 443/tcp")
	cmd.Flags().StringVar(&toAddr, "to-addr", "", "the destination (default the address of the interface)")
	cmd.Flags().StringVar(&p.On, "on", "", "the interface where it arrives (default the one whose network has the source, else the public one)")
	cmd.Flags().StringVar(&p.State, "state", "NEW", "its conntrack state: NEW, ESTABLISHED, RELATED, INVALID or UNTRACKED")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	a.completeFlags(cmd, map[string]completer{"on": a.interfaceNames, "state": func() []string { return exposure.States },
		"from": noWords, "to": a.servicePorts, "to-addr": noWords})
	return cmd
}

func (a *app) explain(ctx context.Context, machine *agent.Agent, p exposure.Probe, asJSON bool) error {
	s, err := machine.Situation(ctx)
	if err != nil {
		return err
	}
	if p, err = s.Complete(p); err != nil {
		return usageError{err}
	}
	e := s.Explain(p)
	if asJSON {
		err = a.printJSON(e)
	} else {
		printExplanation(a.terminal, e, coloured(a.terminal))
	}
	code := map[string]int{exposure.Dropped: exitDrift, exposure.Perhaps: exitPerhaps}[e.Verdict]
	if err == nil && code != 0 {
		return &silentError{code}
	}
	return err
}

// printExplanation prints the packet, two lines for each rule, and the verdict.
func printExplanation(out io.Writer, e exposure.Explanation, colour bool) {
	p := e.Probe
	what := firewall.FormatPorts(firewall.Port(p.Port), p.Proto)
	if p.Proto.HasPorts() {
		what = "port " + what
	}
	fmt.Fprintf(out, "%s packet from %s to %s, %s, on %s\n", p.State, p.From, p.To, what, system.Printable(p.On))
	hook := exposure.Hook("")
	for _, s := range e.Steps {
		label := ""
		if s.Hook != hook {
			hook, label = s.Hook, string(s.Hook)
		}
		place := s.Decision
		place.Rule = s.Effect
		policy := strings.HasPrefix(s.Rule, "policy ")
		if policy {
			place.Rule += ", the policy"
		}
		lines := []string{ruleText(place)}
		if s.Source != "" {
			lines[0] += " (" + s.Source + ")"
		}
		if !policy {
			lines = append(lines, s.Rule)
		}
		if len(s.Why) > 0 {
			lines = append(lines, "depends on "+strings.Join(s.Why, ", "))
		}
		indent := 11
		for _, l := range lines {
			fmt.Fprintln(out, cut(fmt.Sprintf("%-*s%s", indent, label, system.Printable(l)), screenWidth))
			label, indent = "", 13
		}
	}
	code := map[string]string{exposure.Dropped: "31;1", exposure.Perhaps: "35;1"}[e.Verdict]
	if code == "" {
		code = "32;1"
	}
	if colour {
		fmt.Fprintf(out, "\x1b[%sm%s\x1b[0m\n", code, e.Verdict)
	} else {
		fmt.Fprintln(out, e.Verdict)
	}
}

// noWords completes a value that only the user knows.
func noWords() []string { return nil }

// servicePorts returns the ports of the open services.
func (a *app) servicePorts() []string {
	var words []string
	for _, s := range a.services() {
		words = append(words, firewall.FormatPorts(firewall.Port(s.Ports.First), s.Proto)+"\t"+s.Name)
	}
	return words
}
