package exposure

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// base is where the kernel calls a built-in chain of iptables, if it is traced.
type base struct {
	hook     Hook // "" if it is not
	priority int
	nat      bool
}

// bases lists the built-in chains (linux/netfilter_ipv4.h, enum nf_ip_hook_priorities).
var bases = sync.OnceValue(func() map[string]base {
	return map[string]base{
		"raw PREROUTING":    {Prerouting, -300, false},
		"mangle PREROUTING": {Prerouting, -150, false},
		"nat PREROUTING":    {Prerouting, -100, true},
		"mangle INPUT":      {Input, -150, false},
		"filter INPUT":      {Input, 0, false},
		"security INPUT":    {Input, 50, false},
		"nat INPUT":         {Input, 100, true},
		"mangle FORWARD":    {Forward, -150, false},
		"filter FORWARD":    {Forward, 0, false},
		"security FORWARD":  {Forward, 50, false},
		"raw OUTPUT":        {}, "mangle OUTPUT": {}, "nat OUTPUT": {}, "filter OUTPUT": {}, "security OUTPUT": {},
		"mangle POSTROUTING": {}, "nat POSTROUTING": {},
	}
})

// ReadSave reads the output of iptables-save or ip6tables-save, or a file for
// iptables-restore. The family is "ip" or "ip6". Chains that no traced packet passes, such
// as OUTPUT, are left out.
//
// The nft variant does not print rules that iptables cannot express. Incompatible are
// the tables of which the text has no chains, or not all. Do not treat them as empty.
func ReadSave(program, family string, text []byte) (tables []Table, incompatible []string, err error) {
	r := saveReader{program: program, family: family, rest: string(text)}
	for r.rest != "" {
		r.line++
		if err := r.next(); err != nil {
			return nil, nil, fmt.Errorf("line %d: %w", r.line, err)
		}
	}
	if r.table != nil {
		return nil, nil, fmt.Errorf("unexpected end: no COMMIT for table %.80q", r.table.Name)
	}
	return r.tables, r.incompatible, nil
}

type saveReader struct {
	program, family string
	rest            string
	line            int
	words           []word   // of the line, reused
	args            []string // of an option, reused
	matches         []Match  // of a rule, reused
	tables          []Table
	incompatible    []string
	table           *Table         // the last one of tables, until its COMMIT
	chains          map[string]int // of table
}

// next reads a line, or several if a quoted word has line breaks.
func (r *saveReader) next() error {
	line, _, _ := strings.Cut(r.rest, "\n")
	first := strings.TrimSpace(line)
	if first == "" || strings.IndexByte("#*:", first[0]) >= 0 || first == "COMMIT" {
		r.rest = strings.TrimPrefix(r.rest[len(line):], "\n")
		return r.structure(first)
	}
	if r.table == nil {
		return fmt.Errorf("outside a table: %.80q", first)
	}
	text := r.rest
	size, err := r.split(text)
	if err != nil {
		return fmt.Errorf("%w: %.80q", err, first)
	}
	r.rest, text = text[size:], text[:size]
	if err := r.command(text); err != nil {
		return fmt.Errorf("%w: %.80q", err, first)
	}
	r.line += strings.Count(strings.TrimSuffix(text, "\n"), "\n")
	return nil
}

// structure reads a line that is not a rule.
func (r *saveReader) structure(line string) error {
	switch {
	case line == "":
	case line[0] == '#':
		if name, ok := strings.CutPrefix(line, "# Table `"); ok && strings.Contains(line, " incompatible") {
			name, _, _ = strings.Cut(name, "'")
			r.incompatible = append(r.incompatible, name)
		}
	case line[0] == '*':
		if r.table != nil {
			return fmt.Errorf("table within a table: %.80q", line)
		}
		r.tables = append(r.tables, Table{Program: r.program, Family: r.family, Name: strings.TrimSpace(line[1:])})
		r.table, r.chains = &r.tables[len(r.tables)-1], map[string]int{}
	case r.table == nil:
		return fmt.Errorf("outside a table: %.80q", line)
	case line[0] == ':':
		words := strings.Fields(line[1:])
		if len(words) < 2 {
			return fmt.Errorf("chain without a policy: %.80q", line)
		}
		r.chain(words[0]).Drop = words[1] == "DROP"
	default:
		r.resolve()
		r.table = nil
	}
	return nil
}

// chain returns a chain of the table. It adds those that the text does not declare, which
// iptables-restore allows for built-in ones.
func (r *saveReader) chain(name string) *Chain {
	i, ok := r.chains[name]
	if !ok {
		b := bases()[r.table.Name+" "+name]
		i, r.chains[name] = len(r.table.Chains), len(r.table.Chains)
		r.table.Chains = append(r.table.Chains, Chain{Name: name, Hook: b.hook, Priority: b.priority, NAT: b.nat})
	}
	return &r.table.Chains[i]
}

// traced reports whether packets pass a chain, judging by its name.
func (r *saveReader) traced(chain string) bool {
	b, ok := bases()[r.table.Name+" "+chain]
	return !ok || b.hook != ""
}

// command reads the words of a line, which are a rule or change a chain.
func (r *saveReader) command(line string) error {
	words := r.words
	if len(words) > 0 && strings.HasPrefix(words[0].text, "[") { // counters
		words = words[1:]
	}
	if len(words) == 0 {
		return errors.New("no command")
	}
	name := ""
	if len(words) > 1 {
		name = words[1].text
	} else if words[0].text[:min(2, len(words[0].text))] != "-F" {
		return errors.New("no chain")
	}
	command := words[0].text
	words = words[min(2, len(words)):]
	switch command {
	case "-A", "--append", "-I", "--insert":
		c, at := r.chain(name), 0
		if command == "-A" || command == "--append" {
			at = len(c.Rules)
		} else if len(words) > 0 {
			if n, err := strconv.Atoi(words[0].text); err == nil {
				if n < 1 || n > len(c.Rules)+1 {
					return errors.New("no such rule")
				}
				at, words = n-1, words[1:]
			}
		}
		if !r.traced(name) {
			return nil
		}
		if rule, ok := r.rule(line, words); ok {
			c.Rules = slices.Insert(c.Rules, at, rule)
		}
	case "-N", "--new-chain":
		r.chain(name)
	case "-P", "--policy":
		if len(words) == 0 {
			return errors.New("no policy")
		}
		r.chain(name).Drop = words[0].text == "DROP"
	case "-F", "--flush":
		for i := range r.table.Chains {
			if c := &r.table.Chains[i]; name == "" || c.Name == name {
				c.Rules = nil
			}
		}
	default:
		return errors.New("not a rule")
	}
	return nil
}

// resolve completes the rules of a table once all of its chains are known: it
// distinguishes jumps from unknown targets.
func (r *saveReader) resolve() {
	t := r.table
	for i := range t.Chains {
		for j := range t.Chains[i].Rules {
			rule := &t.Chains[i].Rules[j]
			if _, ok := r.chains[rule.To]; rule.To != "" && (!ok || !r.traced(rule.To)) {
				rule.Verdict, rule.To = Undecided, ""
			}
		}
	}
	t.Chains = slices.DeleteFunc(t.Chains, func(c Chain) bool { return !r.traced(c.Name) })
}

// word is a word of a line, and where it is in it.
type word struct {
	text       string
	start, end int
}

// split splits a line into words as iptables-restore does, and returns its size. White space
// outside double quotes separates words. Within quotes, a backslash escapes the next character.
// Quoted words may contain line breaks: iptables-save prints those of comments unchanged.
func (r *saveReader) split(text string) (size int, err error) {
	r.words = r.words[:0]
	for i := 0; ; {
		for i < len(text) && text[i] != '\n' && blank(text[i]) {
			i++
		}
		if i == len(text) {
			return i, nil
		}
		if text[i] == '\n' {
			return i + 1, nil
		}
		start, quoted := i, false
		for i < len(text) && text[i] != '"' && !blank(text[i]) {
			i++
		}
		w := text[start:i] // no copy, if nothing is quoted
		if i < len(text) && text[i] == '"' {
			unquoted := []byte(w)
			for ; i < len(text) && (quoted || !blank(text[i])); i++ {
				if text[i] == '"' {
					quoted = !quoted
					continue
				}
				if quoted && text[i] == '\\' && i+1 < len(text) {
					i++
				}
				unquoted = append(unquoted, text[i])
			}
			if quoted {
				return 0, errors.New("unterminated quote")
			}
			w = string(unquoted)
		}
		r.words = append(r.words, word{w, start, i})
	}
}

func blank(c byte) bool { return c == ' ' || c == '\t' || c == '\r' || c == '\n' }
