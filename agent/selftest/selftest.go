// Package selftest tries a firewall with real packets: in a copy of this host's
// network it sends what a person would ask about, and compares what passes with
// what was decided.
package selftest

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/twin"
)

// What can become of a packet that arrives.
const (
	Passes  = "passes"
	Dropped = "dropped"
)

// Row is one packet, and what became of it.
type Row struct {
	Family string `json:"family"`
	Kind   string `json:"kind"` // what it is a case of: "open ports", "scans"
	What   string `json:"what"` // "443/tcp (https)"
	From   string `json:"from"` // an address
	On     string `json:"on"`   // an interface
	// Expected is what the decisions say, as a person would read them, and Rules
	// what follows from the rules that were made of them: by Rule, which is a
	// comment, or "policy".
	Expected string `json:"expected"`
	Rules    string `json:"rules"`
	Rule     string `json:"rule"`
	Seen     string `json:"seen"` // what the kernel did
}

// Agrees tells whether all is as expected.
func (r Row) Agrees() bool { return r.Expected == r.Seen && r.Expected == r.Rules }

// Report is what came of it.
type Report struct {
	Schema  int    `json:"schema"`
	Agrees  bool   `json:"agrees"`  // all rows do
	Backend string `json:"backend"` // what loaded the rules
	Rows    []Row  `json:"rows"`
}

// Schema is the version of Report.
const Schema = 1

// Wanted is what is tried.
type Wanted struct {
	Desired  firewall.Desired  `json:"desired"`
	Ruleset  firewall.Ruleset  `json:"ruleset"` // that load loads
	Families []firewall.Family `json:"families"`
}

// Run builds the copy, in the network namespace that the process is in, has load
// load the rules there, and tries them. The error is a *twin.ImpossibleError
// where this machine lets nobody do so, or is too busy.
func Run(ctx context.Context, sys *system.System, w Wanted, load func(context.Context) error) ([]Row, error) {
	list := interfaces(w.Desired, w.Ruleset)
	t, err := twin.New(sys, w.Families, forTwin(list))
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
	// Without rules first: what does not pass then is dropped by the kernel
	// itself, and tells nothing of rules that should let it pass.
	free, err := t.Send(packets)
	if err != nil {
		return nil, &twin.ImpossibleError{Why: err}
	}
	if err := load(ctx); err != nil {
		return nil, err
	}
	fates, err := t.Send(packets)
	if err == nil {
		err = arrived(fates)
	}
	if err != nil {
		return nil, &twin.ImpossibleError{Why: err}
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
		// What ends, or begins, just now cannot be told.
		if passes, ok := lasting[p.packet]; !ok || passes != p.passes || passes && free[i] != twin.Passed {
			continue
		}
		rows = append(rows, row(p, w.Ruleset.Decide(p.packet, now), fates[i]))
	}
	return rows, nil
}

func row(p probe, v firewall.Verdict, fate twin.Fate) Row {
	r := Row{
		Family: p.packet.Family().String(), Kind: p.kind, What: p.what, From: p.packet.Src.String(), On: p.packet.In,
		Expected: word(p.passes), Rules: word(v.Accepted), Rule: v.By, Seen: word(fate == twin.Passed),
	}
	if v.By == "" {
		r.Rule = "policy"
	}
	return r
}

// arrived tells whether something can be said of the rules: what did not arrive they
// did not drop.
func arrived(fates []twin.Fate) error {
	if slices.Contains(fates, twin.Lost) {
		return errors.New("packets get lost in it")
	}
	return nil
}

func word(passes bool) string {
	if passes {
		return Passes
	}
	return Dropped
}
