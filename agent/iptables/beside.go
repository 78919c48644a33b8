package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Beside is iptables where something else filters for us. Nothing of ours should
// be in it, and the policies of INPUT and OUTPUT should be ACCEPT; what drops in
// INPUT drops all the same, whatever we accept elsewhere.
type Beside struct{ *Backend }

// Inspect reads the kernel's rules and says what of them is in the way of want.
// Without the iptables programs the error is a *MissingError.
func (b Beside) Inspect(ctx context.Context, want firewall.Ruleset) (firewall.Inspection, error) {
	snap, err := b.read(ctx)
	if err != nil {
		return firewall.Inspection{}, err
	}
	in := besides(snap, b.families, want)
	in.Warnings = append(in.Warnings, b.legacyBeside()...)
	return in, nil
}

// besides is Inspect without the reading.
func besides(snap snapshot, families []firewall.Family, want firewall.Ruleset) firewall.Inspection {
	in := inspect(snap, families, nil)
	in.Drift, in.Open, in.Shut, in.Flushed, in.Foreign = nil, nil, nil, nil, nil
	for _, f := range families {
		t := snap[f].table(filter)
		add := func(chain, kind, want, got string) {
			in.Drift = append(in.Drift, firewall.Drift{Family: f.String(), Chain: "iptables " + chain, Kind: kind, Want: want, Got: got})
		}
		for _, chain := range []string{input, output} {
			if p := t.policy(chain); p != "" && p != firewall.Accept {
				add(chain, firewall.Altered, "policy ACCEPT", "policy "+p)
				if chain == input {
					in.Shut = append(in.Shut, firewall.Finding{Family: f, Why: "the policy of iptables' INPUT is " + p + ": what our rules accept is dropped there"})
				}
			}
		}
		for _, r := range t.chain(input).Rules {
			switch {
			case jumpsToUs(r):
				add(input, firewall.Extra, "", r)
			case decides(r):
				out := foreign(f, r, false)
				if out.Admits || target(r) == firewall.Accept {
					out.Admits, out.Effect = false, "accepts, and opens nothing that table inet basicfw closes"
				}
				if closes(r) {
					out.Effect = "drops everything, whatever our rules accept: no port answers, SSH neither"
					in.Shut = append(in.Shut, firewall.Finding{Family: f, Next: program(f, "") + " -D INPUT " + r,
						Why: fmt.Sprintf("%q in iptables' INPUT drops everything, whatever our rules accept", r)})
				}
				in.Foreign = append(in.Foreign, out)
			default:
				in.Warnings = append(in.Warnings, overridden(t, target(r), want.Chains(f))...)
			}
		}
		for _, c := range t.ours() {
			add(c.Name, firewall.Extra, "", "the chain")
		}
	}
	slices.Sort(in.Warnings)
	in.Warnings = slices.Compact(in.Warnings)
	return in
}

// overridden says where another program's chain lets in what comes in on some
// interface, a VPN's for example, and our rules do not.
func overridden(t table, name string, wanted []firewall.Chain) []string {
	var out []string
	for _, r := range t.chain(name).Rules {
		words, err := split(r)
		if err != nil || target(r) != firewall.Accept || len(words) < 4 || words[0] != "-i" {
			continue
		}
		iface := strings.Replace(words[1], "+", "*", 1)
		trusted := iface == "lo" || slices.ContainsFunc(wanted, func(c firewall.Chain) bool {
			return slices.ContainsFunc(c.Rules, func(w firewall.Rule) bool {
				return w.Target == firewall.Accept && w.Proto == "" && w.State == "" && w.In != "" && firewall.MatchInterface(w.In, strings.TrimSuffix(iface, "*"))
			})
		})
		if !trusted {
			out = append(out, fmt.Sprintf("chain %s of iptables lets in what comes in on %s, and table inet basicfw does not: \"trusted = %s\" in [interfaces] would", name, iface, iface))
		}
	}
	return out
}

// Load takes out what is ours, and with clear the rules of others in INPUT that
// decide by themselves; the policies become ACCEPT. A table with nothing of that
// is not touched. Where anything fails, both families are as was says they were.
func (b Beside) Load(ctx context.Context, was firewall.Inspection, clear bool) error {
	snap := was.Snapshot.(snapshot)
	t, err := b.tools(ctx, snap)
	if err != nil {
		return err
	}
	for i, f := range b.families {
		old := snap[f].table(filter)
		if !inTheWay(old, clear) {
			continue
		}
		if err := b.change(ctx, t, f, old, func(anew bool) []string { return asideLines(old, clear, anew) }); err != nil {
			err = fmt.Errorf("clearing the %v rules of iptables: %w", f, err)
			if i > 0 {
				err = b.back(ctx, was, firewall.Before{}, err)
			}
			return err
		}
	}
	now, err := b.read(ctx)
	if err == nil {
		for _, f := range b.families {
			if inTheWay(now[f].table(filter), clear) {
				err = errors.Join(err, fmt.Errorf("the kernel still has %v rules of iptables that were taken out", f))
			}
		}
	}
	if err != nil {
		return b.back(ctx, was, firewall.Before{}, err)
	}
	return nil
}

// inTheWay tells whether a filter table has what Load takes out.
func inTheWay(t table, clear bool) bool {
	policy := func(chain string) bool { p := t.policy(chain); return p != "" && p != firewall.Accept }
	return len(t.ours()) > 0 || policy(input) || policy(output) ||
		slices.ContainsFunc(t.chain(input).Rules, func(r string) bool { return jumpsToUs(r) || clear && decides(r) })
}

func asideLines(t table, clear, anew bool) []string {
	lines := []string{"*" + filter, ":INPUT ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]"}
	for _, c := range t.ours() {
		lines = append(lines, ":"+c.Name+" - [0:0]")
	}
	if anew {
		lines = append(lines, "-F INPUT")
	}
	for _, r := range t.chain(input).Rules {
		switch goes := jumpsToUs(r) || clear && decides(r); {
		case goes && !anew:
			lines = append(lines, "-D INPUT "+r)
		case !goes && anew:
			lines = append(lines, "-A INPUT "+r)
		}
	}
	for _, c := range t.ours() {
		lines = append(lines, "-X "+c.Name)
	}
	return append(lines, commit)
}
