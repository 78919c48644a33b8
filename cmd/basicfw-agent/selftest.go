package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/selftest"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/twin"
)

func (a *app) selftestCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "selftest",
		Short: "Try the rules with real packets, in a copy of this machine's network",
		Long: `Try the rules with real packets: open and closed ports, scans, spoofed packets,
SSH from those who may log in and from others, ping, replies and more, over IPv4
and IPv6. It makes a copy of this machine's interfaces in a network namespace,
loads the rules there, sends the packets from outside and compares what passes
with what was decided. This machine stays as it is, and no other program is
needed. Exit 3 where they differ.

On a machine that was not bootstrapped yet, it tries what "basicfw-agent
bootstrap" would load.`,
		Args: noArgs,
		RunE: a.forRoot(func(ctx context.Context, w *wiring) error {
			st, err := a.inEffect(ctx, w)
			if err != nil {
				return err
			}
			report, err := a.selftest(ctx, w, st)
			var impossible *twin.ImpossibleError
			if _, e := w.agent.Store.Load(); err != nil && errors.Is(e, store.ErrNone) && !errors.As(err, &impossible) {
				// As bootstrap does, where the first backend does not work here.
				if out, e := w.agent.Assess(ctx, st, agent.Options{Choose: true}); e == nil && out.State.Backend.Name != st.Backend.Name {
					report, err = a.selftest(ctx, w, out.State)
				}
			}
			if err != nil {
				return err
			}
			if asJSON {
				data, err := json.MarshalIndent(report, "", "  ")
				if err != nil {
					return err
				}
				fmt.Fprintf(a.terminal, "%s\n", system.PrintableJSON(data))
			} else {
				showSelftest(a.stdout, report)
			}
			if !report.Agrees {
				return &silentError{exitDrift}
			}
			return nil
		}),
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, with a row for each packet")
	return cmd
}

// inEffect is what the machine's rules follow from at this moment: a change that
// waits for a confirmation, or what was decided; where nothing was, what bootstrap
// would decide.
func (a *app) inEffect(ctx context.Context, w *wiring) (store.State, error) {
	st, err := w.agent.Store.Load()
	switch {
	case errors.Is(err, store.ErrNone):
		s, err := settings.Load(a.sys, a.config)
		if err != nil {
			return st, err
		}
		if st, _, _, err = a.decide(w, s, convergeRequest{}); err != nil {
			return st, err
		}
		// With the backend that it would come to.
		out, err := w.agent.Assess(ctx, st, agent.Options{Clear: true, Choose: true})
		return out.State, err
	case err != nil:
		return st, explainState(err)
	}
	p, err := w.agent.Pending()
	if err != nil {
		return st, err
	}
	if p != nil {
		st = p.State
	}
	return st.At(w.agent.Moment()), nil
}

// selftestRequest is what the process in the namespace is told.
type selftestRequest struct {
	selftest.Wanted
	Backend string `json:"backend"`
}

// selftestAnswer is what it says.
type selftestAnswer struct {
	selftest.Report
	// Impossible is why this machine lets nobody try rules so.
	Impossible string `json:"impossible,omitempty"`
}

// selftest tries the rules of a state. The error is a *twin.ImpossibleError where
// this machine lets nobody do so, which says nothing about the rules.
func (a *app) selftest(ctx context.Context, w *wiring, st store.State) (selftest.Report, error) {
	data, err := a.elsewhere(ctx, "selftest-twin", selftestRequest{
		Wanted:  selftest.Wanted{Desired: st.Desired, Ruleset: st.Ruleset, Families: w.agent.Families},
		Backend: st.Backend.Name,
	})
	if errors.Is(err, agent.ErrNoRehearsal) || errors.Is(err, context.DeadlineExceeded) { // a machine too busy to tell
		err = &twin.ImpossibleError{Why: err}
	}
	var answer selftestAnswer
	if err == nil {
		err = json.Unmarshal(data, &answer)
	}
	if err == nil && answer.Impossible != "" {
		err = &twin.ImpossibleError{Why: errors.New(answer.Impossible)}
	}
	if err != nil {
		return selftest.Report{}, fmt.Errorf("trying the rules: %w", err)
	}
	return answer.Report, nil
}

// prove is a selftest that a change has to pass. Where this machine lets nobody try
// rules, it is left out.
func (a *app) prove(ctx context.Context, w *wiring, st store.State) error {
	report, err := a.selftest(ctx, w, st.At(w.agent.Moment()))
	var impossible *twin.ImpossibleError
	if errors.As(err, &impossible) {
		a.log.WithError(err).Warn("the rules are loaded, and were not tried with packets")
		return nil
	}
	if err != nil {
		return err
	}
	differ := slices.DeleteFunc(report.Rows, selftest.Row.Agrees)
	if len(differ) == 0 {
		return nil
	}
	r := differ[0]
	return fmt.Errorf("the selftest found %s that did otherwise than expected, the first: %s %s, from %s: expected %s, seen %s: \"basicfw-agent selftest\" shows all",
		count(len(differ), "packet"), r.Family, what(r), r.From, r.Expected, r.Seen)
}

// selftestTwinCmd is selftest in the namespace; it is not for people.
func (a *app) selftestTwinCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "selftest-twin",
		Short:  "Try rules in this network namespace, which is changed",
		Hidden: true,
		Args:   noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var request selftestRequest
			if err := json.NewDecoder(cmd.InOrStdin()).Decode(&request); err != nil {
				return usageError{fmt.Errorf("reading what to try from standard input: %w: this is for \"basicfw-agent selftest\"", err)}
			}
			if err := request.Ruleset.Check(); err != nil {
				return usageError{fmt.Errorf("the ruleset to try: %w", err)}
			}
			return a.forRoot(func(ctx context.Context, w *wiring) error {
				answer := selftestAnswer{Report: selftest.Report{Schema: selftest.Schema}}
				var err error
				answer.Rows, err = selftest.Run(ctx, a.sys, request.Wanted, func(ctx context.Context) error {
					kernel := w.agent.Kernel(request.Backend)
					was, err := kernel.Inspect(ctx, request.Ruleset)
					if err != nil {
						return err
					}
					answer.Backend = was.Backend
					return kernel.Load(ctx, request.Ruleset, was, false)
				})
				var impossible *twin.ImpossibleError
				if errors.As(err, &impossible) {
					answer.Impossible = impossible.Why.Error()
				} else if err != nil {
					return err
				}
				answer.Agrees = !slices.ContainsFunc(answer.Rows, func(r selftest.Row) bool { return !r.Agrees() })
				return json.NewEncoder(a.terminal).Encode(answer)
			})(cmd, nil)
		},
	}
}

// showSelftest shows a line for each kind of packet, and each row that differs.
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
			r.Family, what(r), r.From, r.On, r.Expected, r.Seen, r.Rules, r.Rule)
	}
	if len(differ) > 0 {
		fmt.Fprintf(out, "%d of %s did otherwise than expected; see \"basicfw-agent verify\"\n", len(differ), count(len(report.Rows), "packet"))
		return
	}
	fmt.Fprintf(out, "all of %s did as expected, by %s\n", count(len(report.Rows), "packet"), report.Backend)
}

// what is a row's packet, with its kind where that is not plain.
func what(r selftest.Row) string {
	if strings.HasSuffix(r.Kind, "ports") {
		return r.What
	}
	return r.Kind + ": " + r.What
}

// tally gives "12 pass, 3 dropped".
func tally(counts map[string]int) string {
	var parts []string
	for _, x := range []struct{ word, shown string }{{selftest.Passes, "pass"}, {selftest.Dropped, "dropped"}} {
		if n := counts[x.word]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, x.shown))
		}
	}
	return strings.Join(parts, ", ")
}
