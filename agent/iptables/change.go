package iptables

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"io"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// loadLines returns the input of iptables-restore --noflush that changes filter table
// t to the desired chains. With rewrite, INPUT is flushed and refilled; otherwise it is
// changed rule by rule.
func loadLines(t table, want []chain, clear, rewrite bool) []string {
	return tableLines(firewall.Drop, firewall.Accept, t.ours(), want,
		inputLines(t.chain(input).Rules, effectsOf(t).wantInput(clear), rewrite))
}

// tableLines returns a file that sets the policies, replaces our chains and includes
// lines that change INPUT.
func tableLines(inputPolicy, outputPolicy string, got, want []chain, lines []string) []string {
	head := []string{"*" + filter, declare(input, inputPolicy), declare(output, outputPolicy)}
	var rules, stale []string
	for _, c := range want {
		head = append(head, declare(c.Name, "-"))
		rules = append(rules, appendLines(c.Name, c.Rules)...)
	}
	for _, c := range got {
		if chainOf(want, c.Name).Name == "" {
			head = append(head, declare(c.Name, "-"))
			stale = append(stale, "-X "+c.Name)
		}
	}
	return slices.Concat(head, lines, rules, stale, []string{commit})
}

// declare returns the line that creates or empties a chain and sets its policy.
func declare(chain, policy string) string { return ":" + chain + " " + policy + " [0:0]" }

// appendLines returns the lines that append rules to a chain.
func appendLines(chain string, rules []string) []string {
	var lines []string
	for _, r := range rules {
		lines = append(lines, "-A "+chain+" "+r)
	}
	return lines
}

// inputLines returns the lines that change INPUT from got to wanted. Rules are deleted
// by their text, not by number. If another program has changed INPUT since, the whole
// change then fails instead of deleting another program's rule.
func inputLines(got, wanted []string, rewrite bool) []string {
	if slices.Equal(got, wanted) {
		return nil
	}
	if rewrite {
		return append([]string{"-F INPUT"}, appendLines(input, wanted)...)
	}
	var lines []string
	for _, r := range got {
		if jumpsToUs(r) || !slices.Contains(wanted, r) {
			lines = append(lines, "-D INPUT "+r)
		}
	}
	if place := slices.Index(wanted, jump); place < len(wanted)-1 {
		return append(lines, fmt.Sprintf("-I INPUT %d %s", place+1, jump))
	}
	return append(lines, "-A INPUT "+jump)
}

// sameParts reports whether two tables are equal in the parts that Load changes.
func sameParts(a, b table) bool {
	same := func(x, y chain) bool { return x.Name == y.Name && slices.Equal(x.Rules, y.Rules) }
	return a.policy(input) == b.policy(input) && a.policy(output) == b.policy(output) &&
		slices.Equal(a.chain(input).Rules, b.chain(input).Rules) && slices.EqualFunc(a.ours(), b.ours(), same)
}

// revertLines returns the lines that restore a filter table from now to was, without
// the rules that we added to INPUT since.
func revertLines(now, was table, added []string) []string {
	var lines []string
	if got, want := now.chain(input).Rules, was.chain(input).Rules; !slices.Equal(got, want) {
		others := slices.DeleteFunc(slices.Clone(got), func(r string) bool { // other programs' new rules stay
			return jumpsToUs(r) || slices.Contains(want, r) || slices.Contains(added, r)
		})
		lines = append([]string{"-F INPUT"}, appendLines(input, slices.Concat(others, want))...)
	}
	return tableLines(was.policy(input), was.policy(output), now.ours(), was.ours(), lines)
}

func removeLines(t table, before backend.FamilyBackup, rewrite bool) []string {
	return tableLines(cmp.Or(before.Input, firewall.Accept), cmp.Or(before.Output, firewall.Accept), t.ours(), nil,
		restoredInput(t.chain(input).Rules, before, rewrite))
}

// restoredInput returns the lines that restore the rules removed from INPUT at bootstrap. If
// other programs' rules are unchanged, the former order is restored. Otherwise, the removed
// rules are appended. With rewrite, or to restore the order, INPUT is flushed and refilled.
func restoredInput(got []string, before backend.FamilyBackup, rewrite bool) []string {
	var others, lines, all []string
	for _, r := range got {
		if jumpsToUs(r) {
			lines = append(lines, "-D INPUT "+r)
		} else {
			others = append(others, r)
		}
	}
	same := len(before.Removed) > 0 && len(before.Places) == len(before.Removed) && checksum(others) == before.Stayed
	if same && before.Places[0] < len(others) {
		rewrite = true
		for i := 0; i <= len(others); i++ {
			for j, r := range before.Removed {
				if before.Places[j] == i {
					all = append(all, r)
				}
			}
			if i < len(others) {
				all = append(all, others[i])
			}
		}
	} else {
		all = slices.Clone(others)
		for _, r := range before.Removed {
			if !slices.Contains(others, r) {
				all = append(all, r)
			}
		}
	}
	if rewrite {
		lines, others = []string{"-F INPUT"}, nil
	}
	return append(lines, appendLines(input, all[len(others):])...)
}

// checksum returns a text that differs if rules or policies differ. Counters and
// comments of the dump are ignored.
func (d dump) checksum() string {
	var b strings.Builder
	for _, t := range d.tables {
		t.write(&b)
	}
	return checksum([]string{b.String()}) + " "
}

// checksum detects accidental changes. It is not cryptographic: such a hash costs
// memory at every start of the program.
func checksum(rules []string) string {
	h := fnv.New128a()
	io.WriteString(h, strings.Join(rules, "\n")) // never fails
	return fmt.Sprintf("%x", h.Sum(nil))
}
