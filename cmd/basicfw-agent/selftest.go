//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/selftest"
)

func (a *app) selftestCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "selftest",
		Short: "Test the rules with packets, in a copy of the network",
		Long: `Test the rules with real packets: open and closed ports, scans, spoofed packets,
SSH from allowed and other sources, ping, replies and more, over IPv4 and IPv6.
The command copies this machine's interfaces into a network namespace, loads the
rules there, sends packets from outside and compares what passes with the
desired state. It does not change this machine and needs no other program. The
exit code is 3 if any packet behaves differently.

Before bootstrap, it tests the rules that "basicfw-agent bootstrap" would load.`,
		Args: noArgs,
		RunE: a.forRoot(func(ctx context.Context, machine *agent.Agent) error {
			report, err := machine.Selftest(ctx)
			if err != nil {
				return err
			}
			if asJSON {
				err = a.printJSON(report)
			} else {
				showSelftest(a.stdout, report)
			}
			if err == nil && !report.Agrees {
				return &silentError{exitDrift}
			}
			return err
		}),
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, with a row for each packet")
	return cmd
}

// showSelftest prints a line for each kind of packet, and each row that differs.
func showSelftest(out io.Writer, report selftest.Report) {
	type line struct {
		kind           string
		expected, seen map[string]int
	}
	var lines []*line
	byKind := map[string]*line{}
	var differ []selftest.Row
	for _, r := range report.Rows {
		l := byKind[r.Kind]
		if l == nil {
			l = &line{r.Kind, map[string]int{}, map[string]int{}}
			byKind[r.Kind] = l
			lines = append(lines, l)
		}
		l.expected[r.Expected]++
		l.seen[r.Seen]++
		if !r.Agrees() {
			differ = append(differ, r)
		}
	}
	tab := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(tab, "PACKETS\tEXPECTED\tSEEN\n")
	for _, l := range lines {
		fmt.Fprintf(tab, "%s\t%s\t%s\n", l.kind, tally(l.expected), tally(l.seen))
	}
	tab.Flush()
	for _, r := range differ {
		fmt.Fprintf(out, "differs: %s %s, from %s on %s: expected: %s, seen: %s (the rules say: %s, by %s)\n",
			r.Family, r.Title(), r.From, r.On, r.Expected, r.Seen, r.Rules, r.Rule)
	}
	if len(differ) > 0 {
		next := "plan" // the rules are those of an older version
		if slices.ContainsFunc(differ, func(r selftest.Row) bool { return r.Rules != r.Seen }) {
			next = "verify"
		}
		fmt.Fprintf(out, "%d of %s behaved differently than expected; see \"basicfw-agent %s\"\n", len(differ), count(len(report.Rows), "packet"), next)
		return
	}
	fmt.Fprintf(out, "all of %s behaved as expected, tested with %s\n", count(len(report.Rows), "packet"), report.Backend)
}

// tally returns a text such as "12 pass, 3 dropped".
func tally(counts map[string]int) string {
	var parts []string
	if n := counts[selftest.Passes]; n > 0 {
		parts = append(parts, fmt.Sprintf("%d pass", n))
	}
	if n := counts[selftest.Dropped]; n > 0 {
		parts = append(parts, fmt.Sprintf("%d dropped", n))
	}
	return strings.Join(parts, ", ")
}
