package iptables

import (
	"fmt"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// expand returns a chain's rules with one rule for each network of a list, up to
// maxNetworks rules in total. A list that would exceed the limit keeps its one rule.
func expand(rules []firewall.Rule) (out []firewall.Rule) {
	n := 0
	for _, r := range rules {
		if !fits(r.Sources, &n) {
			out = append(out, r)
			continue
		}
		list := r.Sources.List
		r.Sources = nil
		for _, p := range list {
			r.Src = p
			out = append(out, r)
		}
	}
	return out
}

// fits reports whether l is a list whose networks become rules of their own. n is the
// number of those rules so far.
func fits(l *firewall.Networks, n *int) bool {
	if l == nil || *n+len(l.List) > maxNetworks {
		return false
	}
	*n += len(l.List)
	return true
}

// listNote begins the comment in a persisted file about a list that it does not contain.
const listNote = "# basicfw-agent: "

// persisted returns the chains of a file. They name no set: if one were missing,
// iptables-restore would load nothing from the file. The notes are comments about the
// lists that are omitted.
func persisted(r firewall.Ruleset, f firewall.Family, forward bool) (out []chain, notes []string) {
	for _, c := range chains(r, f, forward) {
		c.Rules = c.Rules[:0:0]
		for _, rule := range expand(rulesOf(r, f, c.Name)) {
			if rule.Sources == nil {
				c.Rules = append(c.Rules, spec(f, rule))
				continue
			}
			notes = append(notes, fmt.Sprintf("%sthe %d networks of %s are left to the service, which blocks them", listNote, len(rule.Sources.List), strings.TrimPrefix(rule.Comment, "basicfw-")))
		}
		out = append(out, c)
	}
	return out, notes
}

func rulesOf(r firewall.Ruleset, f firewall.Family, name string) []firewall.Rule {
	for _, c := range r.Chains(f) {
		if c.Name == name {
			return c.Rules
		}
	}
	return nil
}

// setName returns the name of the kernel's set of a list. It encodes the content, so
// that a changed list has a new set, and no rule is ever without its networks.
func setName(f firewall.Family, l *firewall.Networks) string {
	return fmt.Sprintf("basicfw%d-%s", f, checksum(firewall.FormatPrefixes(l.List))[:16])
}
