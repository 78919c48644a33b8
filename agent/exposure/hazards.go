package exposure

import (
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Untracked returns the ports at which packets from public interfaces arrive although
// conntrack does not see them, and for each the rule that exempts them.
func (s Situation) Untracked() (out []Entry) {
	var exempt []Reference
	s.Rules.eachRule(func(ref Reference, r Rule) {
		if r.Untracked {
			exempt = append(exempt, ref)
		}
	})
	if len(exempt) == 0 {
		return nil
	}
	r := s.reporter()
	for _, x := range r.examined {
		if x.Number == 0 || x.quiet {
			continue
		}
		for _, f := range firewall.Families {
			for _, v := range r.views[f] {
				res, _ := r.trace(f, x.Proto, x.number, v)
				if v.zone != firewall.PublicZone || !slices.ContainsFunc(res.Ends, func(e End) bool { return e.Packet.Untracked && len(e.Sure) > 0 }) {
					continue
				}
				if slices.ContainsFunc(out, func(e Entry) bool { return e.Proto == x.Proto && e.Port == x.Number }) {
					continue
				}
				p := first(v.on, v.dst, x.Proto, x.number)
				p.early = true
				for _, ref := range exempt {
					rule, _ := s.Rules.rule(ref)
					if _, possible, _ := conjunction(rule.Matches, &p); !possible.none() {
						out = append(out, Entry{Proto: x.Proto, Port: x.Number, Family: f.String(), By: s.decision(ref, nil)})
						break
					}
				}
			}
		}
	}
	return out
}

// Helpers returns the rules that assign conntrack helpers, by the helper's name.
func (r Ruleset) Helpers() map[string]Reference {
	out := map[string]Reference{}
	r.eachRule(func(ref Reference, rule Rule) {
		_, after, ok := strings.Cut(rule.Text, "ct helper set ")
		if _, target, is := strings.Cut(rule.Text, "-j CT "); is && !ok {
			_, after, ok = strings.Cut(target, "--helper ")
		}
		if name := strings.Fields(after); ok && len(name) > 0 {
			out[strings.Trim(name[0], `"`)] = ref
		}
	})
	return out
}

// Proxies returns the rules that hand packets to a proxy of this host.
func (r Ruleset) Proxies() (by []Reference) {
	r.eachRule(func(ref Reference, rule Rule) {
		if strings.Contains(rule.Text, "-j TPROXY") || rule.Text == "tproxy" || strings.HasSuffix(rule.Text, " tproxy") {
			by = append(by, ref)
		}
	})
	return by
}

// eachRule calls do with every rule.
func (r Ruleset) eachRule(do func(Reference, Rule)) {
	for i := range r.Tables {
		w := walker{table: &r.Tables[i]}
		for j := range w.table.Chains {
			c := &w.table.Chains[j]
			for k, rule := range c.Rules {
				do(w.reference(c, k), rule)
			}
		}
	}
}
