// Package iptables loads rulesets through iptables-restore and ip6tables-restore, and
// reads them back through iptables-save and ip6tables-save. It also writes the files
// that iptables-services and netfilter-persistent load. It supports both variants,
// legacy and nft, from version 1.4.7 on.
package iptables

import (
	"bytes"
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// spec returns the text of a rule after "-A CHAIN ", exactly as iptables-save prints
// it: options in the kernel's order, networks with their prefix length, numbers instead
// of names. 1.4.21 and later print exactly this; 1.4.7 adds quotes and spaces, which
// the parser removes.
func spec(f firewall.Family, r firewall.Rule) string {
	words := make([]string, 0, 32) // enough for most rules
	arg := func(more ...string) { words = append(words, more...) }
	if r.Src.IsValid() {
		arg("-s", r.Src.String())
	}
	if r.Dst.IsValid() {
		arg("-d", r.Dst.String())
	}
	if r.In != "" {
		in := r.In
		if base, ok := strings.CutSuffix(in, "*"); ok {
			in = base + "+"
		}
		arg("-i", in)
	}
	if r.Out != "" {
		arg("-o", strings.Replace(r.Out, "*", "+", 1))
	}
	arg(transport(f, r)...)
	if r.Sources != nil {
		arg("-m", "set", "--match-set", setName(f, r.Sources), "src")
	}
	if r.State == firewall.StateReply {
		arg("-m", "conntrack", "--ctdir", string(r.State))
	} else if state, not := strings.CutPrefix(string(r.State), "!"); not {
		arg("-m", "conntrack", "!", "--ctstate", state)
	} else if state != "" {
		arg("-m", "conntrack", "--ctstate", state)
	}
	if r.IPsec {
		arg("-m", "policy", "--dir", "in", "--pol", "ipsec")
	}
	if r.DstType != "" {
		arg("-m", "addrtype", "--dst-type", r.DstType)
	}
	if r.Limit != nil {
		arg(limit(f, r.Limit)...)
	}
	until := r.Until
	if !r.Since.IsZero() {
		arg("-m", "time", "--datestart", date(r.Since))
		if until.IsZero() { // otherwise iptables adds an end, and may print it
			until = firewall.MaxTime
		}
		arg("--datestop", date(until))
	} else if !until.IsZero() {
		arg("-m", "time", "--datestop", date(until))
	}
	arg("-m", "comment", "--comment", r.Comment)
	if r.HopLimit != 0 { // last: ip6tables 1.4.7 refuses options after it
		arg("-m", "hl", "--hl-eq", strconv.Itoa(int(r.HopLimit)))
	}
	arg("-j", r.Target)
	if r.Target == firewall.Log {
		arg("--log-prefix", `"`+r.LogPrefix+`"`, "--log-level", "7")
	}
	return strings.Join(words, " ")
}

// transport returns the matches of the protocol and of the fields of its header.
func transport(f firewall.Family, r firewall.Rule) (words []string) {
	arg := func(more ...string) { words = append(words, more...) }
	switch {
	case f == firewall.IPv6 && r.Proto == "51": // ip6tables skips this header to find the protocol
		arg("-m", "ah")
	case r.Proto != "":
		arg("-p", string(r.Proto))
	}
	switch {
	case r.Dialled:
		arg("-m", "conntrack", "--ctorigdstport", ports(r.DstPort))
	case !r.SrcPort.IsZero() || !r.DstPort.IsZero() || r.Flags != nil:
		arg("-m", string(r.Proto))
		if !r.SrcPort.IsZero() {
			arg("--sport", ports(r.SrcPort))
		}
		if !r.DstPort.IsZero() {
			arg("--dport", ports(r.DstPort))
		}
		if r.Flags != nil {
			if r.Flags.Invert {
				arg("!")
			}
			arg("--tcp-flags", flags(r.Flags.Mask), flags(r.Flags.Set))
		}
	case r.ICMPType != nil && f == firewall.IPv4:
		arg("-m", "icmp", "--icmp-type", strconv.Itoa(int(*r.ICMPType)))
	case r.ICMPType != nil:
		arg("-m", "icmp6", "--icmpv6-type", strconv.Itoa(int(*r.ICMPType)))
	}
	return words
}

// limit returns the match of a rate limit.
func limit(f firewall.Family, l *firewall.Limit) []string {
	burst := strconv.Itoa(int(l.Burst))
	if l.Name == "" {
		return []string{"-m", "limit", "--limit", l.Rate.String(), "--limit-burst", burst}
	}
	words := []string{"-m", "hashlimit", "--hashlimit-upto", l.Rate.String(), "--hashlimit-burst", burst,
		"--hashlimit-mode", "srcip", "--hashlimit-name", l.Name}
	if l.SourceBits != firewall.ByFamily(f, 32, 128) {
		words = append(words, "--hashlimit-srcmask", strconv.Itoa(l.SourceBits))
	}
	return words
}

// date returns a time as the match "time" prints it.
func date(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05") }

func ports(r firewall.PortRange) string { return strings.Replace(r.String(), "-", ":", 1) }

func flags(f firewall.TCPFlags) string { return cmp.Or(f.Names(), "NONE") }

// jump is the last rule of INPUT.
const jump = "-j " + firewall.InputChain

// Render returns the ruleset of one family as a complete file for iptables-restore. It
// equals the output of iptables-save, except for the header and the counters.
func Render(r firewall.Ruleset, f firewall.Family) string {
	own, notes := persisted(r, f, false)
	t := table{Name: filter, Chains: append([]chain{
		{Name: input, Policy: firewall.Drop, Rules: []string{jump}},
		{Name: forward, Policy: firewall.Accept},
		{Name: output, Policy: firewall.Accept},
	}, own...)}
	var b strings.Builder
	b.Grow(8 << 10)
	t.write(&b)
	if len(notes) > 0 {
		text := strings.Replace(b.String(), "\n"+commit+"\n", "\n"+strings.Join(append(notes, commit), "\n")+"\n", 1)
		b.Reset()
		b.WriteString(text)
	}
	forwards, _ := persisted(r, f, true)
	for _, line := range forwardSection(forwards) {
		b.WriteString(line + "\n")
	}
	return b.String()
}

// RenderAll returns the rulesets of families. If there are several, each is preceded
// by its name.
func RenderAll(r firewall.Ruleset, families []firewall.Family) string {
	var b strings.Builder
	for _, f := range families {
		if len(families) > 1 {
			fmt.Fprintf(&b, "# %v\n", f)
		}
		b.WriteString(Render(r, f))
	}
	return b.String()
}

// Files converts the files with the persisted rules.
type Files struct{}

// Persisted returns the file for iptables-restore with the ruleset of one family. It
// keeps the administrator's parts of the existing file unchanged: other tables, other
// chains, FORWARD, and jumps from INPUT to chains of the file. INPUT's terminal rules
// are removed, as in the kernel.
func (Files) Persisted(existing []byte, r firewall.Ruleset, f firewall.Family) ([]byte, error) {
	if own := Render(r, f); len(bytes.TrimSpace(existing)) == 0 || string(existing) == own {
		return []byte(own), nil
	}
	file, err := parseFile(existing)
	if err != nil {
		return nil, err
	}
	part := &file.filter
	part.strip()
	part.input = append(slices.DeleteFunc(part.input, file.decides), jump)
	forwards := func(line string) bool { return strings.HasPrefix(strings.TrimSpace(line), ":"+forward+" ") }
	if !slices.ContainsFunc(part.chains, forwards) { // a complete file declares it
		part.chains = slices.Insert(part.chains, 0, declare(forward, firewall.Accept))
	}
	part.policies = map[string]string{input: firewall.Drop, output: firewall.Accept}
	forwarded, _ := persisted(r, f, true)
	file.setForward(forwarded)
	own, notes := persisted(r, f, false)
	for _, c := range own {
		part.ourChains = append(part.ourChains, c.Name)
		part.ourRules = append(part.ourRules, appendLines(c.Name, c.Rules)...)
	}
	part.ourRules = append(part.ourRules, notes...)
	return file.bytes(), nil
}

// Aside returns the file for another filtering backend: without our rules and INPUT's
// terminal rules, and with ACCEPT policies. It is nil if nothing is left. A file that
// needs no change is returned unchanged.
func (Files) Aside(existing []byte) ([]byte, error) {
	file, err := parseFile(existing)
	if err != nil {
		return nil, err
	}
	part := &file.filter
	closes := func(name string) bool { p := part.policies[name]; return p != "" && p != firewall.Accept }
	if !closes(input) && !closes(output) && !file.forwards() && len(part.ourChains)+len(part.ourRules) == 0 &&
		!slices.ContainsFunc(part.input, func(r string) bool { return jumpsToUs(r) || file.decides(r) }) {
		return existing, nil
	}
	part.strip()
	file.setForward(nil)
	part.input = slices.DeleteFunc(part.input, file.decides)
	part.policies = map[string]string{input: firewall.Accept, output: firewall.Accept}
	if file.empty() {
		return nil, nil
	}
	return file.bytes(), nil
}

// empty reports whether a file has the same effect as an empty one.
func (f restoreFile) empty() bool {
	part := f.filter
	return len(f.before) == 0 && len(f.after) == 0 && len(part.input) == 0 && len(part.rules) == 0 &&
		!slices.ContainsFunc(part.chains, func(c string) bool { return !strings.HasPrefix(c, ":"+forward+" "+firewall.Accept) })
}

// Unpersisted removes our rules from a file, and restores what Persisted removed from
// the original: INPUT's terminal rules and the policies. It is nil if nothing is left.
func (Files) Unpersisted(current, original []byte) ([]byte, error) {
	file, err := parseFile(current)
	if err != nil {
		return nil, err
	}
	file.filter.strip()
	file.setForward(nil)
	file.filter.policies = map[string]string{input: firewall.Accept, output: firewall.Accept}
	if len(original) > 0 {
		old, err := parseFile(original)
		if err != nil {
			return nil, err
		}
		maps.Copy(file.filter.policies, old.filter.policies)
		for _, rule := range old.filter.input {
			// An interrupted run may already have restored it.
			if old.decides(rule) && !slices.Contains(file.filter.input, rule) {
				file.filter.input = append(file.filter.input, rule)
			}
		}
	}
	if file.empty() {
		return nil, nil
	}
	return file.bytes(), nil
}

// restoreFile is a file for iptables-restore, with a parsed filter table. The other
// lines are unchanged.
type restoreFile struct {
	effects       // of the filter table
	before, after []string
	filter        filterPart
}

type filterPart struct {
	chains    []string // ":NAME POLICY [0:0]" lines except for INPUT, OUTPUT and our chains
	policies  map[string]string
	input     []string // INPUT's rules, canonical
	rules     []string // other lines, unchanged
	ourChains []string
	ourRules  []string
}

// strip removes our chains and rules.
func (p *filterPart) strip() {
	p.input, p.ourChains, p.ourRules = slices.DeleteFunc(p.input, jumpsToUs), nil, nil
}

func parseFile(data []byte) (restoreFile, error) {
	parsed, err := parse(data)
	if err != nil {
		return restoreFile{}, err
	}
	file := restoreFile{effects: effectsOf(parsed.table(filter)), filter: filterPart{policies: map[string]string{}}}
	inFilter, seen := false, false
	for _, line := range strings.Split(strings.TrimRight(string(data), "\n"), "\n") {
		text := strings.TrimSpace(line)
		switch {
		case text == "*"+filter:
			if seen {
				return restoreFile{}, fmt.Errorf("duplicate table %s", filter)
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

// line adds one line of the filter table, which parse has accepted.
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
	if strings.HasPrefix(text, listNote) {
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
	part := f.filter
	policy := func(name string) string { return declare(name, cmp.Or(part.policies[name], firewall.Accept)) }
	lines := slices.Concat(f.before, []string{"*" + filter, policy(input)}, part.chains, []string{policy(output)})
	for _, c := range part.ourChains {
		lines = append(lines, declare(c, "-"))
	}
	lines = slices.Concat(lines, appendLines(input, part.input), part.rules, part.ourRules, []string{commit}, f.after)
	return []byte(strings.Join(lines, "\n") + "\n")
}
