package iptables

import (
	"context"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Predict returns the live rules as Load would leave them, with our own rules as [Model]
// returns them.
func (s seen) Predict(ctx context.Context, live, own exposure.Ruleset, clear bool) exposure.Ruleset {
	program := "iptables-legacy"
	if t, err := s.b.tools(ctx, s.snap); err == nil && t.nft {
		program = "iptables"
	}
	out := exposure.Ruleset{Tables: slices.Clone(live.Tables)}
	for _, f := range s.b.families {
		family := firewall.ByFamily(f, "ip", "ip6")
		ours := map[string]exposure.Table{}
		for _, t := range own.Tables {
			if t.Family == family {
				t.Program, ours[t.Name] = program, t
			}
		}
		e := effectsOf(s.snap[f].table(filter))
		for i, t := range out.Tables {
			if t.Program == program && t.Family == family {
				out.Tables[i] = e.predict(t, ours[t.Name], clear)
				delete(ours, t.Name)
			}
		}
		for _, t := range own.Tables {
			if missing, ok := ours[t.Name]; ok && t.Family == family {
				out.Tables = append(out.Tables, missing)
			}
		}
	}
	return out
}

// predict returns a live table with own in place of our rules.
func (e effects) predict(live, own exposure.Table, clear bool) exposure.Table {
	chains := slices.Clone(own.Chains)
	for _, c := range live.Chains {
		if isOurs(c.Name) {
			continue
		}
		at := slices.IndexFunc(chains, func(o exposure.Chain) bool { return o.Name == c.Name })
		var rules []exposure.Rule
		if at >= 0 {
			rules = chains[at].Rules
		}
		others := slices.DeleteFunc(slices.Clone(c.Rules), func(r exposure.Rule) bool { return isOurs(r.To) })
		isInput := live.Name == filter && c.Name == input
		if isInput && len(c.Rules) == len(e.chain(input).Rules) { // otherwise it has changed since
			before, after := e.place(clear)
			c.Rules = slices.Concat(pick(c.Rules, before), rules, pick(c.Rules, after))
		} else {
			c.Rules = slices.Concat(rules, others)
		}
		if isInput {
			c.Drop = at >= 0
		}
		if at < 0 {
			chains = append(chains, c)
		} else {
			chains[at] = c
		}
	}
	live.Chains = chains
	return live
}

// pick returns the elements of a list at the given indexes.
func pick[T any](list []T, indexes []int) []T {
	out := make([]T, len(indexes))
	for i, n := range indexes {
		out[i] = list[n]
	}
	return out
}

// Predict returns the live rules as Load would leave them.
func (s seenBeside) Predict(ctx context.Context, live, _ exposure.Ruleset, clear bool) exposure.Ruleset {
	return s.seen.Predict(ctx, live, exposure.Ruleset{}, clear)
}
