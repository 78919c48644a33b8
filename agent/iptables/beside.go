package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Beside is iptables while another backend filters. It should contain none of our
// rules, and the policies of INPUT and OUTPUT should be ACCEPT: what INPUT drops is
// dropped regardless of the other backend.
type Beside struct{ *Backend }

// Inspect reads the kernel's rules and returns those that interfere with want.
// Without the iptables programs the error is a *MissingError.
func (b Beside) Inspect(ctx context.Context, want firewall.Ruleset) (backend.Inspection, error) {
	snap, err := b.current(ctx)
	if err != nil {
		return backend.Inspection{}, err
	}
	in := inspectBeside(snap, b.families, want)
	in.Warnings = append(in.Warnings, b.legacyWarnings()...)
	in.Snapshot = seenBeside{seen{b.Backend, snap}}
	return in, nil
}

// inspectBeside is Inspect for a snapshot.
func inspectBeside(snap snapshot, families []firewall.Family, want firewall.Ruleset) backend.Inspection {
	in := inspect(snap, families, nil)
	in.Drift, in.Exposed, in.LockedOut, in.Flushed, in.Foreign = nil, nil, nil, nil, nil
	for _, f := range families {
		t := effectsOf(snap[f].table(filter))
		add := func(chain, kind, want, got string) {
			in.Drift = append(in.Drift, firewall.Drift{Family: f.String(), Chain: "iptables " + chain, Kind: kind, Want: want, Got: got})
		}
		for _, chain := range []string{input, output} {
			if p := t.policy(chain); p != "" && p != firewall.Accept {
				add(chain, firewall.Altered, "policy ACCEPT", "policy "+p)
				if chain == input {
					in.LockedOut = append(in.LockedOut, backend.Finding{Family: f, Why: "the INPUT policy of iptables is " + p + ": it drops what our rules accept"})
				}
			}
		}
		for _, r := range t.chain(input).Rules {
			switch {
			case jumpsToUs(r):
				add(input, firewall.Extra, "", r)
			case t.decides(r):
				out := t.foreign(f, r, false)
				if admits(r) != nothing || target(r) == firewall.Accept {
					out.Effect = "accepts, but opens nothing that table inet basicfw closes"
				}
				if t.shuts(r) == everything {
					out.Effect = "drops everything, regardless of our rules: no port answers, not even SSH"
					in.LockedOut = append(in.LockedOut, backend.Finding{Family: f, Next: program(f, "") + " -D INPUT " + r,
						Why: fmt.Sprintf("%q in INPUT of iptables drops everything, regardless of our rules", r)})
				}
				in.Foreign = append(in.Foreign, out)
			default:
				in.Warnings = append(in.Warnings, overridden(t.table, target(r), want.Chains(f))...)
			}
		}
		for _, c := range t.ours() {
			add(c.Name, firewall.Extra, "", "the chain")
		}
		for _, d := range effectsOf(snap[f].table(mangle)).forwardDrift(f, nil) {
			add(d.Chain, d.Kind, d.Want, d.Got)
		}
	}
	slices.Sort(in.Warnings)
	in.Warnings = slices.Compact(in.Warnings)
	return in
}

// overridden returns a warning if another program's chain accepts everything on an
// interface, such as a VPN's, that our rules do not trust.
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
			out = append(out, fmt.Sprintf("iptables chain %s accepts packets on %s that table inet basicfw drops: to accept them, set \"trusted = %s\" in [interfaces]", name, iface, iface))
		}
	}
	return out
}

// seenBeside is a snapshot of Beside.
type seenBeside struct{ seen }

// Load removes our rules and, with clear, other programs' terminal rules in INPUT, and
// sets the policies to ACCEPT. A table without any of these is not changed. If
// anything fails, both families are rolled back.
func (s seenBeside) Load(ctx context.Context, _ firewall.Ruleset, clear bool) error {
	b, snap := s.b, s.snap
	t, err := b.tools(ctx, snap)
	if err != nil {
		return err
	}
	for i, f := range b.families {
		old := snap[f].table(filter)
		more := forwardLines(snap[f].table(mangle), nil)
		if !interferes(old, clear) && len(more) == 0 {
			continue
		}
		if err := b.change(ctx, t, f, old, func(rewrite bool) []string { return append(asideLines(old, clear, rewrite), more...) }); err != nil {
			err = fmt.Errorf("clearing the %v rules of iptables: %w", f, err)
			if i > 0 || len(more) > 0 {
				err = b.rollBack(ctx, snap, backend.Backup{}, err)
			}
			return err
		}
	}
	now, err := b.read(ctx)
	if err == nil {
		for _, f := range b.families {
			if interferes(now[f].table(filter), clear) || len(forwardLines(now[f].table(mangle), nil)) > 0 {
				err = errors.Join(err, fmt.Errorf("the removed %v rules of iptables still exist", f))
			}
		}
	}
	if err != nil {
		return b.rollBack(ctx, snap, backend.Backup{}, err)
	}
	return nil
}

// interferes reports whether a filter table has rules or policies that Load changes.
func interferes(t table, clear bool) bool {
	policy := func(chain string) bool { p := t.policy(chain); return p != "" && p != firewall.Accept }
	e := effectsOf(t)
	return len(t.ours()) > 0 || policy(input) || policy(output) ||
		slices.ContainsFunc(t.chain(input).Rules, func(r string) bool { return jumpsToUs(r) || clear && e.decides(r) })
}

func asideLines(t table, clear, rewrite bool) []string {
	lines := []string{"*" + filter, ":INPUT ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]"}
	for _, c := range t.ours() {
		lines = append(lines, ":"+c.Name+" - [0:0]")
	}
	if rewrite {
		lines = append(lines, "-F INPUT")
	}
	e := effectsOf(t)
	for _, r := range t.chain(input).Rules {
		switch goes := jumpsToUs(r) || clear && e.decides(r); {
		case goes && !rewrite:
			lines = append(lines, "-D INPUT "+r)
		case !goes && rewrite:
			lines = append(lines, "-A INPUT "+r)
		}
	}
	for _, c := range t.ours() {
		lines = append(lines, "-X "+c.Name)
	}
	return append(lines, commit)
}
