package iptables

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// loadLines is the file that takes a filter table from what it is to what is
// wanted, for iptables-restore --noflush. With anew, INPUT is emptied and filled
// again, else it is changed rule by rule.
func loadLines(t table, want []chain, clear, anew bool) []string {
	lines := []string{"*" + filter, ":INPUT DROP [0:0]", ":OUTPUT ACCEPT [0:0]"}
	var stale []string
	for _, c := range want {
		lines = append(lines, ":"+c.Name+" - [0:0]")
	}
	for _, c := range t.ours() {
		if !slices.ContainsFunc(want, func(w chain) bool { return w.Name == c.Name }) {
			lines = append(lines, ":"+c.Name+" - [0:0]")
			stale = append(stale, "-X "+c.Name)
		}
	}
	got := t.chain(input).Rules
	if wanted := wantInput(got, clear); !slices.Equal(got, wanted) {
		lines = append(lines, inputLines(got, wanted, anew)...)
	}
	for _, c := range want {
		for _, r := range c.Rules {
			lines = append(lines, "-A "+c.Name+" "+r)
		}
	}
	return append(append(lines, stale...), commit)
}

// inputLines take INPUT from got to wanted. Rules go by what they say, not by
// their number: another program may have changed INPUT since it was read, and
// then this fails whole rather than take out another's.
func inputLines(got, wanted []string, anew bool) []string {
	var lines []string
	if anew {
		lines = append(lines, "-F INPUT")
		for _, r := range wanted {
			lines = append(lines, "-A INPUT "+r)
		}
		return lines
	}
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

// sameParts tells whether two tables are the same in what Load changes.
func sameParts(a, b table) bool {
	same := func(x, y chain) bool { return x.Name == y.Name && slices.Equal(x.Rules, y.Rules) }
	return a.policy(input) == b.policy(input) && a.policy(output) == b.policy(output) &&
		slices.Equal(a.chain(input).Rules, b.chain(input).Rules) && slices.EqualFunc(a.ours(), b.ours(), same)
}

// revertLines takes a filter table back from now to was, less what we added to
// INPUT since.
func revertLines(now, was table, added []string) []string {
	lines := []string{"*" + filter,
		fmt.Sprintf(":INPUT %s [0:0]", was.policy(input)), fmt.Sprintf(":OUTPUT %s [0:0]", was.policy(output))}
	var stale []string
	for _, c := range was.ours() {
		lines = append(lines, ":"+c.Name+" - [0:0]")
	}
	for _, c := range now.ours() {
		if was.chain(c.Name).Name == "" {
			lines = append(lines, ":"+c.Name+" - [0:0]")
			stale = append(stale, "-X "+c.Name)
		}
	}
	if got, want := now.chain(input).Rules, was.chain(input).Rules; !slices.Equal(got, want) {
		lines = append(lines, "-F INPUT")
		for _, r := range got { // what others put there meanwhile
			if !jumpsToUs(r) && !slices.Contains(want, r) && !slices.Contains(added, r) {
				lines = append(lines, "-A INPUT "+r)
			}
		}
		for _, r := range want {
			lines = append(lines, "-A INPUT "+r)
		}
	}
	for _, c := range was.ours() {
		for _, r := range c.Rules {
			lines = append(lines, "-A "+c.Name+" "+r)
		}
	}
	return append(append(lines, stale...), commit)
}

func removeLines(t table, before firewall.FamilyBefore, anew bool) []string {
	lines := []string{"*" + filter,
		fmt.Sprintf(":INPUT %s [0:0]", cmp.Or(before.Input, firewall.Accept)), fmt.Sprintf(":OUTPUT %s [0:0]", cmp.Or(before.Output, firewall.Accept))}
	for _, c := range t.ours() {
		lines = append(lines, ":"+c.Name+" - [0:0]")
	}
	lines = append(lines, returned(t.chain(input).Rules, before, anew)...)
	for _, c := range t.ours() {
		lines = append(lines, "-X "+c.Name)
	}
	return append(lines, commit)
}

// returned gives INPUT back the rules that were taken out of it. Where others'
// rules are what they were, all is in the former order again; where they are
// not, the rules return behind those that are there now. With anew, INPUT is
// emptied and filled again in any case.
func returned(got []string, before firewall.FamilyBefore, anew bool) []string {
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
		anew = true
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
	if anew {
		lines, others = []string{"-F INPUT"}, nil
	}
	for _, r := range all[len(others):] {
		lines = append(lines, "-A INPUT "+r)
	}
	return lines
}

func checksum(rules []string) string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(rules, "\n"))))
}
