package iptables

import (
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Forwarded packets pass our chains in the table mangle, which comes before the table
// filter. In filter, other programs accept what they publish, and our rule would have
// to be moved whenever they insert one.
const mangle = "mangle"

// forwardJump is our jump in FORWARD, which must come before any rule that decides.
const forwardJump = "-j " + firewall.ForwardChain

// jumpOf returns our jump in FORWARD for the desired chains, if there are any.
func jumpOf(want []chain) []string {
	if len(want) == 0 {
		return nil
	}
	return []string{forwardJump}
}

// forwardJumps returns the rules of FORWARD that jump to our chains.
func (t table) forwardJumps() []string {
	return slices.DeleteFunc(slices.Clone(t.chain(forward).Rules), func(r string) bool { return !jumpsToUs(r) })
}

// passed returns the first rule before our jump in FORWARD that lets packets bypass
// the jump, or "".
func (e effects) passed() string {
	for _, r := range e.chain(forward).Rules {
		words, err := split(r)
		avoids := func(p firewall.Proto) bool { return target(r) == firewall.Return || e.verdict(target(r), p).accepts }
		switch {
		case r == forwardJump:
			return ""
		case err == nil && (slices.Contains(words, "-g") || slices.ContainsFunc(judged, avoids)):
			return r
		}
	}
	return ""
}

// forwardDrift compares one family's mangle table with the desired chains.
func (e effects) forwardDrift(f firewall.Family, want []chain) []firewall.Drift {
	const at = mangle + " " + forward
	out := firewall.Lines(f.String(), at, jumpOf(want), e.forwardJumps())
	if r := e.passed(); len(out) == 0 && len(want) > 0 && r != "" {
		out = append(out, firewall.Drift{Family: f.String(), Chain: at, Kind: firewall.Altered, Want: forwardJump + " before " + r, Got: forwardJump})
	}
	return append(out, e.chainDrift(f, want)...)
}

// forwardLines returns the part of the input of iptables-restore --noflush that changes
// mangle table t to the desired chains, or nothing if it needs no change.
func forwardLines(t table, want []chain) []string {
	ours := t.ours()
	if jumps := t.forwardJumps(); len(want)+len(ours)+len(jumps) == 0 {
		return nil
	}
	head := []string{"*" + mangle}
	var lines, stale []string
	for _, c := range want {
		head, lines = append(head, declare(c.Name, "-")), append(lines, appendLines(c.Name, c.Rules)...)
	}
	for _, c := range ours {
		if chainOf(want, c.Name).Name == "" {
			head, stale = append(head, declare(c.Name, "-")), append(stale, "-X "+c.Name)
		}
	}
	return slices.Concat(head, jumpLines(t, want), lines, stale, []string{commit})
}

// jumpLines returns the lines that change our jump in FORWARD.
func jumpLines(t table, want []chain) (lines []string) {
	jumps := t.forwardJumps()
	if slices.Equal(jumps, jumpOf(want)) && effectsOf(t).passed() == "" {
		return nil
	}
	for _, r := range jumps {
		lines = append(lines, "-D "+forward+" "+r)
	}
	if len(want) > 0 {
		lines = append(lines, "-I "+forward+" 1 "+forwardJump)
	}
	return lines
}

// sameForward reports whether two mangle tables are equal in the parts that Load changes.
func sameForward(a, b table) bool {
	same := func(x, y chain) bool { return x.Name == y.Name && slices.Equal(x.Rules, y.Rules) }
	return slices.Equal(a.forwardJumps(), b.forwardJumps()) && slices.EqualFunc(a.ours(), b.ours(), same)
}

// forwardSection returns the table mangle of a file with our chains only.
func forwardSection(want []chain) []string {
	if len(want) == 0 {
		return nil
	}
	return withForward([]string{"*" + mangle, declare(forward, firewall.Accept), commit}, want)
}

// withForward returns the lines of a table mangle with our chains. The jump is the first
// rule.
func withForward(section []string, want []chain) []string {
	first := slices.IndexFunc(section[1:], func(l string) bool { l = strings.TrimSpace(l); return l != "" && l[0] != ':' && l[0] != '#' }) + 1
	head := slices.Clone(section[:first])
	if !slices.ContainsFunc(head, func(l string) bool { return strings.HasPrefix(strings.TrimSpace(l), ":"+forward+" ") }) {
		head = append(head, declare(forward, firewall.Accept))
	}
	for _, c := range want {
		head = append(head, declare(c.Name, "-"))
	}
	head = append(head, appendLines(forward, jumpOf(want))...)
	last := slices.IndexFunc(section, func(l string) bool { return strings.TrimSpace(l) == commit })
	body := slices.Clone(section[first:last])
	for _, c := range want {
		body = append(body, appendLines(c.Name, c.Rules)...)
	}
	return slices.Concat(head, body, section[last:])
}

// setForward changes the lines of a file outside the table filter: our chains in
// mangle become the desired ones. A table without any effect after that is removed.
func (f *restoreFile) setForward(want []chain) {
	done := len(want) == 0
	for _, part := range []*[]string{&f.before, &f.after} {
		first := slices.IndexFunc(*part, func(l string) bool { return strings.TrimSpace(l) == "*"+mangle })
		if first < 0 {
			continue
		}
		last := first + slices.IndexFunc((*part)[first:], func(l string) bool { return strings.TrimSpace(l) == commit }) + 1
		section := slices.DeleteFunc(slices.Clone((*part)[first:last]), oursInFile)
		switch {
		case !done:
			section, done = withForward(section, want), true
		case slices.Equal(section, []string{"*" + mangle, declare(forward, firewall.Accept), commit}):
			section = nil
		}
		*part = slices.Replace(*part, first, last, section...)
	}
	if !done {
		f.after = append(f.after, forwardSection(want)...)
	}
}

// forwards reports whether a file has any of our chains outside the table filter.
func (f restoreFile) forwards() bool {
	return slices.ContainsFunc(slices.Concat(f.before, f.after), oursInFile)
}

// oursInFile reports whether a line of a file, which parse has accepted, is about our
// chains.
func oursInFile(line string) bool {
	words, err := split(line)
	switch {
	case err != nil:
		return false
	case strings.HasPrefix(words[0], ":"):
		return isOurs(words[0][1:])
	case strings.HasPrefix(words[0], "["):
		words = words[1:]
	}
	return len(words) > 2 && strings.HasPrefix(words[0], "-A") && (isOurs(words[1]) || jumpsToUs(join(words[2:])))
}
