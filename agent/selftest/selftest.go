// Package selftest tests a firewall with real packets in a copy of this host's network.
// It compares the packets that pass with the desired state.
package selftest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/netsim"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// The results for a packet that arrives.
const (
	Passes  = "passes"
	Dropped = "dropped"
)

// Row is one packet and its result.
type Row struct {
	Family string `json:"family"`
	Kind   string `json:"kind"` // the kind of packet: "open ports", "scans"
	What   string `json:"what"` // "443/tcp (https)"
	From   string `json:"from"` // an address
	On     string `json:"on"`   // an interface
	// Expected follows from the desired state, and Rules from the compiled rules, by
	// Rule, which is a rule's comment or "policy".
	Expected string `json:"expected"`
	Rules    string `json:"rules"`
	Rule     string `json:"rule"`
	Seen     string `json:"seen"` // the kernel's result
}

// Agrees reports whether the packet behaved as expected.
func (r Row) Agrees() bool { return r.Expected == r.Seen && r.Expected == r.Rules }

// Report is the result of a selftest.
type Report struct {
	Schema  int    `json:"schema"`
	Agrees  bool   `json:"agrees"`  // all rows agree
	Backend string `json:"backend"` // the backend that loaded the rules
	Rows    []Row  `json:"rows"`
}

// Schema is the version of Report.
const Schema = 1

// Wanted is the input of a selftest.
type Wanted struct {
	Desired  firewall.Desired  `json:"desired"`
	Ruleset  firewall.Ruleset  `json:"ruleset"` // loaded by load
	Families []firewall.Family `json:"families"`
}

// Run builds the copy in the network namespace of this process, loads the rules there
// with load, and tests them. The error is a *netsim.ImpossibleError if this machine does
// not allow that, or is too busy.
func Run(ctx context.Context, sys *system.System, w Wanted, load func(context.Context) error) ([]Row, error) {
	list := interfaces(w.Desired, w.Ruleset)
	t, err := netsim.New(sys, w.Families, list)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	now := time.Now()
	probes := cases(w.Desired, list, w.Families, now)
	packets := make([]firewall.Packet, len(probes))
	for i, p := range probes {
		packets[i] = p.packet
	}
	// First without rules: the kernel itself drops the packets that do not pass then.
	// They are no evidence about rules that should accept them.
	free, err := t.Send(packets)
	if err != nil {
		return nil, &netsim.ImpossibleError{Why: err}
	}
	if err := load(ctx); err != nil {
		return nil, err
	}
	fates, err := t.Send(packets)
	if err == nil {
		err = arrived(fates)
	}
	if err != nil {
		return nil, &netsim.ImpossibleError{Why: err}
	}
	after := probes
	if later := time.Now(); later.Unix() != now.Unix() {
		after = cases(w.Desired, list, w.Families, later)
	}
	lasting := map[firewall.Packet]bool{}
	for _, p := range after {
		lasting[p.packet] = p.passes
	}
	rows := []Row{}
	for i, p := range probes {
		// Results that change just now, as a time limit is reached, prove nothing.
		if passes, ok := lasting[p.packet]; !ok || passes != p.passes || passes && free[i] != netsim.Passed {
			continue
		}
		rows = append(rows, row(p, w.Ruleset.Decide(p.packet, now), fates[i]))
	}
	return rows, nil
}

func row(p probe, v firewall.Verdict, fate netsim.Fate) Row {
	r := Row{
		Family: p.packet.Family().String(), Kind: p.kind, What: p.what, From: p.packet.Src.String(), On: p.packet.In,
		Expected: word(p.passes), Rules: word(v.Accepted), Rule: v.By, Seen: word(fate == netsim.Passed),
	}
	if v.By == "" {
		r.Rule = "policy"
	}
	return r
}

// arrived returns an error if a packet did not arrive, which the rules cannot have caused.
func arrived(fates []netsim.Fate) error {
	if slices.Contains(fates, netsim.Lost) {
		return errors.New("packets were lost")
	}
	return nil
}

func word(passes bool) string {
	if passes {
		return Passes
	}
	return Dropped
}

// Title returns the row's packet, with its kind unless that is obvious.
func (r Row) Title() string {
	if strings.HasSuffix(r.Kind, "ports") {
		return r.What
	}
	return r.Kind + ": " + r.What
}

// Err returns an error, with a hint, if packets behaved differently than expected.
func (r Report) Err() error {
	differ := slices.DeleteFunc(slices.Clone(r.Rows), Row.Agrees)
	if len(differ) == 0 {
		return nil
	}
	d := differ[0]
	return hint.Wrap(fmt.Errorf("selftest: %d of %d packets behaved differently than expected, the first: %s %s, from %s: expected %s, seen %s",
		len(differ), len(r.Rows), d.Family, d.Title(), d.From, d.Expected, d.Seen), "basicfw-agent selftest shows all")
}
