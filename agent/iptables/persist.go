package iptables

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Files knows the files that hold rules over a boot.
type Files struct{}

// Persisted gives the file that holds the ruleset of one family for
// iptables-restore, and with it what the owner keeps in the existing one:
// other tables, other chains, FORWARD, and jumps of INPUT to chains of the
// file stay to the letter. Of INPUT's own rules those that decide by
// themselves go, as they do in the kernel. An existing file that already is
// so comes back unchanged.
func (Files) Persisted(existing []byte, r firewall.Ruleset, f firewall.Family) ([]byte, error) {
	if len(strings.TrimSpace(string(existing))) == 0 {
		return []byte(Render(r, f)), nil
	}
	file, err := takeApart(existing)
	if err != nil {
		return nil, err
	}
	part := file.filter
	part.strip()
	var rules []string
	for _, rule := range part.input {
		if !decides(rule) {
			rules = append(rules, rule)
		}
	}
	part.input = append(rules, jump)
	if !part.has(forward) { // the file is complete by itself
		part.chains = append([]string{":" + forward + " " + firewall.Accept + " [0:0]"}, part.chains...)
	}
	part.policies = map[string]string{input: firewall.Drop, output: firewall.Accept}
	for _, c := range r.Chains(f) {
		part.ourChains = append(part.ourChains, c.Name)
		for _, s := range specs(f, c) {
			part.ourRules = append(part.ourRules, "-A "+c.Name+" "+s)
		}
	}
	file.filter = part
	return file.bytes(), nil
}

// Aside gives a file as it is to be where something else filters: without our
// part, without the rules of INPUT that decide by themselves, and with policies
// that let through. Nil is that nothing is left of it. One that is so already
// comes back unchanged.
func (Files) Aside(existing []byte) ([]byte, error) {
	file, err := takeApart(existing)
	if err != nil {
		return nil, err
	}
	closes := func(name string) bool { p := file.filter.policies[name]; return p != "" && p != firewall.Accept }
	if !closes(input) && !closes(output) && len(file.filter.ourChains)+len(file.filter.ourRules) == 0 &&
		!slices.ContainsFunc(file.filter.input, func(r string) bool { return jumpsToUs(r) || decides(r) }) {
		return existing, nil
	}
	file.filter.strip()
	file.filter.input = slices.DeleteFunc(file.filter.input, decides)
	file.filter.policies = map[string]string{input: firewall.Accept, output: firewall.Accept}
	if file.empty() {
		return nil, nil
	}
	return file.bytes(), nil
}

// empty tells whether a file says nothing that an empty one would not.
func (f restoreFile) empty() bool {
	part := f.filter
	return len(f.before) == 0 && len(f.after) == 0 && len(part.input) == 0 && len(part.rules) == 0 && part.onlyOwnChains()
}

// Unpersisted takes our part out of a file again and puts back what Persisted
// left out of the original: INPUT's deciding rules and the policies. An empty
// result means that nothing is left to keep.
func (Files) Unpersisted(current, original []byte) ([]byte, error) {
	file, err := takeApart(current)
	if err != nil {
		return nil, err
	}
	file.filter.strip()
	file.filter.policies = map[string]string{input: firewall.Accept, output: firewall.Accept}
	if len(original) > 0 {
		old, err := takeApart(original)
		if err != nil {
			return nil, err
		}
		for name, policy := range old.filter.policies {
			file.filter.policies[name] = policy
		}
		for _, rule := range old.filter.input {
			// It may be back already, by a run that was cut short.
			if decides(rule) && !slices.Contains(file.filter.input, rule) {
				file.filter.input = append(file.filter.input, rule)
			}
		}
	}
	if file.empty() {
		return nil, nil
	}
	return file.bytes(), nil
}

// restoreFile is a file for iptables-restore, with the filter table apart and
// all else to the letter.
type restoreFile struct {
	before, after []string
	filter        filterPart
}

type filterPart struct {
	chains    []string // ":NAME POLICY [0:0]" lines but for INPUT, OUTPUT and ours
	policies  map[string]string
	input     []string // INPUT's rules, canonical
	rules     []string // other lines, to the letter
	ourChains []string
	ourRules  []string
}

// strip takes out what is ours.
func (p *filterPart) strip() {
	var rules []string
	for _, r := range p.input {
		if !jumpsToUs(r) {
			rules = append(rules, r)
		}
	}
	p.input, p.ourChains, p.ourRules = rules, nil, nil
}

// has tells whether a chain that is not ours is named.
func (p *filterPart) has(chain string) bool {
	return slices.ContainsFunc(p.chains, func(line string) bool { return strings.HasPrefix(strings.TrimSpace(line), ":"+chain+" ") })
}

// onlyOwnChains tells whether the kernel's own chains are all there is.
func (p *filterPart) onlyOwnChains() bool {
	for _, c := range p.chains {
		if !strings.HasPrefix(c, ":"+forward+" "+firewall.Accept) {
			return false
		}
	}
	return true
}

func takeApart(data []byte) (restoreFile, error) {
	if _, err := parse(data); err != nil {
		return restoreFile{}, err
	}
	file := restoreFile{filter: filterPart{policies: map[string]string{}}}
	inFilter, seen := false, false
	for _, line := range strings.Split(strings.TrimRight(string(data), "\n"), "\n") {
		text := strings.TrimSpace(line)
		switch {
		case text == "*"+filter:
			if seen {
				return restoreFile{}, fmt.Errorf("table %s twice", filter)
			}
			inFilter, seen = true, true
		case inFilter && text == commit:
			inFilter = false
		case inFilter:
			file.filter.line(line, text)
		case seen:
			file.after = append(file.after, line)
		default:
			file.before = append(file.before, line)
		}
	}
	return file, nil
}

// line sorts one line of the filter table, which parse has taken.
func (p *filterPart) line(line, text string) {
	if strings.HasPrefix(text, ":") {
		words := strings.Fields(text[1:])
		switch {
		case words[0] == input || words[0] == output:
			p.policies[words[0]] = words[1]
		case isOurs(words[0]):
			p.ourChains = append(p.ourChains, words[0])
		default:
			p.chains = append(p.chains, line)
		}
		return
	}
	words, err := split(text)
	if err != nil || text[0] == '#' {
		p.rules = append(p.rules, line)
		return
	}
	if strings.HasPrefix(words[0], "[") {
		words = words[1:]
	}
	switch {
	case words[1] == input:
		p.input = append(p.input, join(words[2:]))
	case isOurs(words[1]):
		p.ourRules = append(p.ourRules, line)
	default:
		p.rules = append(p.rules, line)
	}
}

func (f restoreFile) bytes() []byte {
	var b strings.Builder
	put := func(lines ...string) {
		for _, l := range lines {
			b.WriteString(l + "\n")
		}
	}
	policy := func(name string) string { return cmp.Or(f.filter.policies[name], firewall.Accept) }
	put(f.before...)
	put("*"+filter, fmt.Sprintf(":INPUT %s [0:0]", policy(input)))
	put(f.filter.chains...)
	put(fmt.Sprintf(":OUTPUT %s [0:0]", policy(output)))
	for _, c := range f.filter.ourChains {
		put(":" + c + " - [0:0]")
	}
	for _, r := range f.filter.input {
		put("-A INPUT " + r)
	}
	put(f.filter.rules...)
	put(f.filter.ourRules...)
	put(commit)
	put(f.after...)
	return []byte(b.String())
}
