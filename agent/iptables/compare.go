package iptables

import (
	"fmt"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// inspect is Inspect without the reading.
func inspect(snap snapshot, families []firewall.Family, want map[firewall.Family][]chain) firewall.Inspection {
	in := firewall.Inspection{Snapshot: snap}
	for _, f := range families {
		d := snap[f]
		t := d.table(filter)
		in.Present = in.Present || len(t.ours()) > 0
		in.Drift = append(in.Drift, drift(f, t, want[f])...)
		if !slices.ContainsFunc(t.ours(), func(c chain) bool { return len(c.Rules) > 0 }) && !slices.Contains(t.chain(input).Rules, jump) {
			in.Flushed = append(in.Flushed, f)
		}
		in.Bypass = append(in.Bypass, bypass(f, d.table("nat"))...)
		before := in.Before.Family(f)
		before.Input, before.Output = t.policy(input), t.policy(output)
		behind, jumps := false, false
		var stay []string
		for _, r := range t.chain(input).Rules {
			behind = behind || r == jump
			jumps = jumps || r == jump
			if !decides(r) {
				if !jumpsToUs(r) {
					stay = append(stay, r)
				}
				continue
			}
			before.Removed, before.Places = append(before.Removed, r), append(before.Places, len(stay))
			in.Foreign = append(in.Foreign, foreign(f, r, behind))
			if admits(r) == everything {
				in.Open = append(in.Open, firewall.Finding{Family: f, Next: program(f, "") + " -D INPUT " + r,
					Why: fmt.Sprintf("%q in INPUT accepts new connections to every port", r)})
			}
		}
		before.Stayed = checksum(stay)
		for _, c := range t.ours() {
			wanted := chainOf(want[f], c.Name).Rules
			for _, r := range c.Rules {
				if admits(r) == everything && !slices.Contains(wanted, r) {
					in.Open = append(in.Open, firewall.Finding{Family: f, Why: fmt.Sprintf("%q in %s accepts new connections to every port", r, c.Name)})
				}
			}
		}
		switch {
		case before.Input == firewall.Accept:
			in.Open = append(in.Open, firewall.Finding{Family: f, Why: "INPUT's policy is ACCEPT: every port that listens is open"})
		case !jumps || len(t.chain(firewall.InputChain).Rules) == 0:
			in.Shut = append(in.Shut, firewall.Finding{Family: f, Why: "our rules are gone and INPUT drops all: no port answers, SSH neither"})
		}
		for _, m := range managers(t) {
			if !slices.Contains(in.Managers, m) {
				in.Managers = append(in.Managers, m)
			}
		}
	}
	return in
}

// chainOf gives the chain of a name, or an empty one.
func chainOf(list []chain, name string) chain {
	for _, c := range list {
		if c.Name == name {
			return c
		}
	}
	return chain{}
}

// drift compares one family's filter table with the chains that are wanted.
func drift(f firewall.Family, t table, want []chain) []firewall.Drift {
	var out []firewall.Drift
	family := f.String()
	add := func(chain, kind, want, got string) {
		out = append(out, firewall.Drift{Family: family, Chain: chain, Kind: kind, Want: want, Got: got})
	}
	for _, p := range []struct{ chain, policy string }{{input, firewall.Drop}, {output, firewall.Accept}} {
		if got := t.policy(p.chain); got != p.policy {
			add(p.chain, firewall.Altered, "policy "+p.policy, "policy "+got)
		}
	}
	got := t.chain(input).Rules
	wanted := wantInput(got, false)
	if !slices.Equal(got, wanted) {
		jumps, others := 0, 0
		for _, r := range got {
			switch {
			case r == jump:
				jumps++
			case jumpsToUs(r):
				others++
				add(input, firewall.Extra, "", r)
			}
		}
		switch {
		case jumps == 0:
			add(input, firewall.Missing, jump, "")
		case jumps > 1:
			add(input, firewall.Extra, "", fmt.Sprintf("%s, %d times", jump, jumps))
		case others == 0:
			add(input, firewall.Altered, fmt.Sprintf("%s as rule %d", jump, slices.Index(wanted, jump)+1),
				fmt.Sprintf("%s as rule %d", jump, slices.Index(got, jump)+1))
		}
	}
	for _, c := range want {
		live := t.chain(c.Name)
		if live.Name == "" {
			add(c.Name, firewall.Missing, "the chain", "")
		}
		out = append(out, firewall.Lines(family, c.Name, c.Rules, live.Rules)...)
	}
	for _, c := range t.ours() {
		if !slices.ContainsFunc(want, func(w chain) bool { return w.Name == c.Name }) {
			add(c.Name, firewall.Extra, "", "the chain")
		}
	}
	return out
}

// wantInput is how INPUT should be, given what is in it: others' rules in their
// order, and our jump behind them. A rule that turns everything away would
// leave nothing for a jump behind it, and us shut out; so the jump goes before
// the first such rule. With clear the rules that decide by themselves are left
// out.
func wantInput(got []string, clear bool) []string {
	var want []string
	place := -1
	for _, r := range got {
		if jumpsToUs(r) || clear && decides(r) {
			continue
		}
		if place < 0 && closes(r) {
			place = len(want)
		}
		want = append(want, r)
	}
	if place < 0 {
		place = len(want)
	}
	return slices.Insert(want, place, jump)
}

// closes tells whether a rule turns every packet away.
func closes(rule string) bool {
	if !decides(rule) || target(rule) == "ACCEPT" {
		return false
	}
	words, _ := split(rule)
	return words[0] == "-j" || words[0] == "-m" && len(words) > 4 && words[1] == "comment" && words[4] == "-j"
}

// managers names the other firewall programs whose chains are in a table. ufw
// leaves its own in INPUT when it is stopped, but empty; shorewall marks with an
// empty one that it is up.
func managers(t table) []string {
	var out []string
	for _, m := range []struct{ name, chain string }{
		{"ufw", "ufw-before-input"}, {"ufw", "ufw6-before-input"},
		{"firewalld", "INPUT_direct"}, {"firewalld", "INPUT_ZONES"},
		{"shorewall", "shorewall"}, {"shorewall", "net-fw"}, {"shorewall", "net2fw"},
	} {
		if c := t.chain(m.chain); c.Name != "" && (m.name != "ufw" || len(c.Rules) > 0) && !slices.Contains(out, m.name) {
			out = append(out, m.name)
		}
	}
	return out
}

// texts are a ruleset's chains as iptables-save prints them.
func texts(r firewall.Ruleset) map[firewall.Family][]chain {
	out := map[firewall.Family][]chain{}
	for _, f := range firewall.Families {
		for _, c := range r.Chains(f) {
			out[f] = append(out[f], chain{Name: c.Name, Policy: "-", Rules: specs(f, c)})
		}
	}
	return out
}
