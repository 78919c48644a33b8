package iptables

import (
	"fmt"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// inspect is Inspect for a snapshot.
func inspect(snap snapshot, families []firewall.Family, want map[firewall.Family]parts) backend.Inspection {
	in := backend.Inspection{}
	for _, f := range families {
		in.Changes += snap[f].checksum()
		t := effectsOf(snap[f].table(filter))
		m := effectsOf(snap[f].table(mangle))
		in.Present = in.Present || len(t.ours())+len(m.ours()) > 0
		in.Drift = append(append(in.Drift, t.drift(f, want[f].input)...), m.forwardDrift(f, want[f].forward)...)
		if !slices.ContainsFunc(t.ours(), func(c chain) bool { return len(c.Rules) > 0 }) && !slices.Contains(t.chain(input).Rules, jump) {
			in.Flushed = append(in.Flushed, f)
		}
		before := in.Backup.Family(f)
		before.Input, before.Output = t.policy(input), t.policy(output)
		behind := false
		var stay []string
		for _, r := range t.chain(input).Rules {
			behind = behind || r == jump
			if !t.decides(r) {
				if !jumpsToUs(r) {
					stay = append(stay, r)
				}
				continue
			}
			before.Removed, before.Places = append(before.Removed, r), append(before.Places, len(stay))
			in.Foreign = append(in.Foreign, t.foreign(f, r, behind))
			if admits(r) == everything {
				in.Exposed = append(in.Exposed, backend.Finding{Family: f, Next: program(f, "") + " -D INPUT " + r,
					Why: fmt.Sprintf("%q in INPUT accepts new connections to every port", r)})
			}
		}
		before.Stayed = checksum(stay)
		for _, c := range t.ours() {
			wanted := chainOf(want[f].input, c.Name).Rules
			for _, r := range c.Rules {
				if !slices.Contains(wanted, r) && admits(r) == everything {
					in.Exposed = append(in.Exposed, backend.Finding{Family: f, Why: fmt.Sprintf("%q in %s accepts new connections to every port", r, c.Name)})
				}
			}
		}
		switch {
		case before.Input == firewall.Accept:
			in.Exposed = append(in.Exposed, backend.Finding{Family: f, Why: "INPUT's policy is ACCEPT: every listening port is open"})
		case !behind || len(t.chain(firewall.InputChain).Rules) == 0:
			in.LockedOut = append(in.LockedOut, backend.Finding{Family: f, Why: "our rules are missing and INPUT drops everything: no port answers, not even SSH"})
		}
		in.Conflicts = conflicts(in.Conflicts, t.table)
	}
	return in
}

// chainOf returns the chain with a name, or one without a name.
func chainOf(list []chain, name string) chain {
	if i := slices.IndexFunc(list, func(c chain) bool { return c.Name == name }); i >= 0 {
		return list[i]
	}
	return chain{}
}

// drift compares one family's filter table with the desired chains.
func (t effects) drift(f firewall.Family, want []chain) []firewall.Drift {
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
	wanted := t.wantInput(false)
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
	return append(out, t.chainDrift(f, want)...)
}

// chainDrift compares our chains in a table with the desired ones.
func (t table) chainDrift(f firewall.Family, want []chain) (out []firewall.Drift) {
	for _, c := range want {
		live := t.chain(c.Name)
		if live.Name == "" {
			out = append(out, firewall.Drift{Family: f.String(), Chain: c.Name, Kind: firewall.Missing, Want: "the chain"})
		}
		out = append(out, firewall.Lines(f.String(), c.Name, c.Rules, live.Rules)...)
	}
	for _, c := range t.ours() {
		if chainOf(want, c.Name).Name == "" {
			out = append(out, firewall.Drift{Family: f.String(), Chain: c.Name, Kind: firewall.Extra, Got: "the chain"})
		}
	}
	return out
}

// wantInput returns the desired rules of INPUT: other programs' rules, with our jump
// at the position that place returns.
func (e effects) wantInput(clear bool) []string {
	got := e.chain(input).Rules
	before, after := e.place(clear)
	return slices.Concat(pick(got, before), []string{jump}, pick(got, after))
}

// place returns the indexes of other programs' rules of INPUT that come before our jump
// and after it. The jump comes before the first rule that drops all packets of a
// protocol, or before a rule after the present jump that drops packets from any source.
// If there is no such rule, the jump is last. With clear, terminal rules are omitted.
func (e effects) place(clear bool) (before, after []int) {
	got := e.chain(input).Rules
	present := max(0, slices.Index(got, jump))
	for i, r := range got {
		shuts := e.shuts(r)
		switch {
		case jumpsToUs(r) || clear && e.decides(r):
		case len(after) > 0, shuts == everything, shuts == anyone && i >= present:
			after = append(after, i)
		default:
			before = append(before, i)
		}
	}
	return before, after
}

// conflicts appends the firewall managers whose chains are in a table. A stopped ufw
// leaves its chains in INPUT, but empty. An active shorewall has an empty chain as a
// marker.
func conflicts(out []string, t table) []string {
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

// parts is the chains of one family, as iptables-save prints them: those of the table
// filter, and those of mangle.
type parts struct{ input, forward []chain }

func texts(r firewall.Ruleset) map[firewall.Family]parts {
	out := map[firewall.Family]parts{}
	for _, f := range firewall.Families {
		out[f] = parts{chains(r, f, false), chains(r, f, true)}
	}
	return out
}

func chains(r firewall.Ruleset, f firewall.Family, forward bool) []chain {
	var out []chain
	for _, c := range r.Chains(f) {
		if c.Forward != forward {
			continue
		}
		rules := expand(c.Rules)
		own := chain{Name: c.Name, Policy: "-", Rules: make([]string, len(rules))}
		for i, rule := range rules {
			own.Rules[i] = spec(f, rule)
		}
		out = append(out, own)
	}
	return out
}
