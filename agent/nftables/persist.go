package nftables

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Files knows the file that holds the table over a boot.
type Files struct{}

const fileHeader = `# The firewall of this machine, written by basicfw-agent, which puts back what is
# changed here: "basicfw-agent open", "ssh allow" and /etc/basicfw/agent.ini change
# it. The agent loads it by itself; "nft -f" loads this file without the agent.
table inet ` + TableName + `
delete table inet ` + TableName + `
`

// Persisted gives the file of a ruleset: nft -f makes the table what it says,
// whatever it was.
func (Files) Persisted(r firewall.Ruleset, families []firewall.Family) []byte {
	return []byte(fileHeader + Render(r, families))
}

// Parse reads what Persisted wrote. The rules mean the same, though what was
// written as one with a list comes back as several. It reads nothing but that:
// what else nft knows is an error, with its line.
func (Files) Parse(data []byte) (firewall.Ruleset, error) {
	p := parser{chains: map[string][]firewall.Rule{}, sets: map[string][]netip.Prefix{}}
	for i, line := range strings.Split(string(data), "\n") {
		if err := p.line(strings.TrimSpace(line)); err != nil {
			return firewall.Ruleset{}, fmt.Errorf("line %d: %w", i+1, err)
		}
	}
	if !p.ended {
		return firewall.Ruleset{}, errors.New("it ends before its table does")
	}
	r := p.ruleset()
	return r, r.Check()
}

type parser struct {
	block  string // "set" or "chain", of what the line is in; "" is neither
	name   string
	list   bool // within the elements of a set
	ended  bool // the table has
	order  []string
	chains map[string][]firewall.Rule
	sets   map[string][]netip.Prefix
}

func (p *parser) line(line string) error {
	first, rest, _ := strings.Cut(line, " ")
	switch {
	case line == "" || line[0] == '#', strings.HasPrefix(line, "table inet "), strings.HasPrefix(line, "delete table inet "):
	case p.list:
		return p.elements(line)
	case p.ended:
		return fmt.Errorf("%q is behind the end of the table", line)
	case line == "}":
		p.ended = p.block == ""
		p.block = ""
	case p.block == "" && (first == "set" || first == "chain") && strings.HasSuffix(rest, " {"):
		p.block, p.name = first, strings.TrimSuffix(rest, " {")
		if first == "chain" && p.name != baseChain {
			if _, there := p.chains[p.name]; there {
				return fmt.Errorf("chain %q twice", p.name)
			}
			p.order, p.chains[p.name] = append(p.order, p.name), nil
		}
	case p.block == "set" && first == "elements":
		p.list = true
		return p.elements(strings.TrimPrefix(line, "elements = {"))
	case p.block == "set" && slices.Contains([]string{"type", "flags", "size", "timeout"}, first), p.block == "chain" && p.name == baseChain:
	case p.block == "chain":
		return p.rule(line)
	default:
		return fmt.Errorf("%q is nothing that is written here", line)
	}
	return nil
}

func (p *parser) elements(text string) error {
	text, last := strings.CutSuffix(text, "}")
	p.list = !last
	for _, word := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' || r == ' ' }) {
		n, err := networkOf(word)
		if err != nil {
			return err
		}
		p.sets[p.name] = append(p.sets[p.name], n)
	}
	return nil
}

func networkOf(word string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(word); err == nil {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	return netip.ParsePrefix(word)
}

// words are what is left of a rule.
type words []string

// next takes a word.
func (w *words) next() string {
	if len(*w) == 0 {
		return ""
	}
	first := (*w)[0]
	*w = (*w)[1:]
	return first
}

// is takes a word, if it is the next.
func (w *words) is(word string) bool {
	if len(*w) == 0 || (*w)[0] != word {
		return false
	}
	w.next()
	return true
}

// list takes one word, or several in braces.
func (w *words) list() []string {
	if !w.is("{") {
		return []string{w.next()}
	}
	var out []string
	for len(*w) > 0 && !w.is("}") {
		out = append(out, strings.TrimSuffix(w.next(), ","))
	}
	return out
}

// splitWords takes a rule apart; what is in quotes is one word.
func splitWords(line string) words {
	var out words
	for i, part := range strings.Split(line, `"`) {
		if i%2 == 1 {
			out = append(out, part)
		} else {
			out = append(out, strings.Fields(part)...)
		}
	}
	return out
}

func (p *parser) rule(line string) error {
	r := firewall.Rule{}
	var sources []netip.Prefix
	ports := []firewall.PortRange{{}}
	types := []*uint8{nil}
	w := splitWords(line)
	for len(w) > 0 {
		var err error
		switch word := w.next(); word {
		case "iifname":
			r.In = w.next()
		case "ip", "ip6":
			switch w.next() {
			case "saddr":
				sources, err = p.networks(w.next())
			case "daddr":
				r.Dst, err = networkOf(w.next())
			case "hoplimit":
				r.HopLimit, err = number8(w.next())
			default:
				err = errors.New("no such field of a header")
			}
		case "tcp", "udp":
			r.Proto = firewall.Proto(word)
			switch w.next() {
			case "sport":
				r.SrcPort, err = portRange(w.next())
			case "dport":
				ports = nil
				for _, text := range w.list() {
					one, e := portRange(text)
					ports, err = append(ports, one), errors.Join(err, e)
				}
			case "flags":
				r.Flags, err = flagMatch(&w)
			default:
				err = errors.New("no such field of a header")
			}
		case "icmp", "icmpv6":
			r.Proto, types = firewall.ICMP, nil
			if word == "icmpv6" {
				r.Proto = firewall.ICMPv6
			}
			w.is("type")
			for _, name := range w.list() {
				t, e := typeNumber(r.Proto, name)
				types, err = append(types, &t), errors.Join(err, e)
			}
		case "meta":
			switch {
			case w.is("l4proto"):
				r.Proto = firewall.Proto(w.next())
			case w.is("time"):
				op := w.next()
				var seconds int64
				if seconds, err = strconv.ParseInt(w.next(), 10, 64); op == ">=" {
					r.Since = time.Unix(seconds, 0).UTC()
				} else {
					r.Until = time.Unix(seconds-1, 0).UTC()
				}
			default:
				err = errors.New("no such meta")
			}
		case "ct":
			w.is("state")
			name := w.next()
			for state, is := range stateNames {
				if is == name {
					r.State = state
				}
			}
			if r.State == "" {
				err = fmt.Errorf("state %q", name)
			}
		case "fib":
			if w.is("daddr") && w.is("type") {
				r.DstType = strings.ToUpper(w.next())
			}
		case "limit":
			r.Limit, err = limitOf(&w)
		case "update":
			name := strings.TrimPrefix(w.next(), "@")
			w.is("{")
			bits := 32
			if w.next() == "ip6" {
				bits = 128
			}
			w.is("saddr")
			if w.is("&") {
				mask, e := netip.ParseAddr(w.next())
				bits, err = maskBits(mask.AsSlice()), e
			}
			if w.is("limit") && err == nil {
				if r.Limit, err = limitOf(&w); err == nil {
					r.Limit.Name, r.Limit.SourceBits = name, bits
				}
			}
			w.is("}")
		case "counter":
			if w.is("packets") {
				w.next()
				w.is("bytes")
				w.next()
			}
		case "log":
			w.is("prefix")
			r.Target, r.LogPrefix = firewall.Log, w.next()
			if !w.is("level") || !w.is("debug") {
				err = errors.New("want level debug")
			}
		case "accept", "drop":
			r.Target = strings.ToUpper(word)
		case "jump":
			_, name := ruleChain(w.next())
			r.Target = name
		case "comment":
			r.Comment = w.next()
		default:
			err = fmt.Errorf("%q is nothing that is written here", word)
		}
		if err != nil {
			return fmt.Errorf("%q: %w", line, err)
		}
	}
	if len(sources) == 0 {
		sources = []netip.Prefix{{}}
	}
	if len(ports)*len(types) > 1 && len(sources) > 1 || len(ports) > 1 && len(types) > 1 {
		return fmt.Errorf("%q: more lists than one", line)
	}
	for _, r.Src = range sources {
		for _, r.DstPort = range ports {
			for _, r.ICMPType = range types {
				p.chains[p.name] = append(p.chains[p.name], r)
			}
		}
	}
	return nil
}

// networks are a network, or those of a set.
func (p *parser) networks(word string) ([]netip.Prefix, error) {
	if name, ok := strings.CutPrefix(word, "@"); ok {
		if len(p.sets[name]) == 0 {
			return nil, fmt.Errorf("set %q has nothing in it", name)
		}
		return p.sets[name], nil
	}
	n, err := networkOf(word)
	return []netip.Prefix{n}, err
}

func number8(word string) (uint8, error) {
	n, err := strconv.ParseUint(word, 10, 8)
	return uint8(n), err
}

func portRange(word string) (firewall.PortRange, error) {
	first, last, isRange := strings.Cut(word, "-")
	if !isRange {
		last = first
	}
	f, err := strconv.ParseUint(first, 10, 16)
	l, e := strconv.ParseUint(last, 10, 16)
	return firewall.PortRange{First: uint16(f), Last: uint16(l)}, errors.Join(err, e)
}

func flagMatch(w *words) (*firewall.FlagMatch, error) {
	m := &firewall.FlagMatch{}
	var err error
	if w.is("!") {
		m.Mask, err = flagsOf(w.next())
		return m, err
	}
	m.Invert = w.is("!=")
	if m.Set, err = flagsOf(w.next()); err != nil {
		return nil, err
	}
	if !w.is("/") {
		return nil, errors.New("flags without a mask")
	}
	m.Mask, err = flagsOf(w.next())
	return m, err
}

func flagsOf(text string) (f firewall.TCPFlags, err error) {
	for _, name := range strings.Split(text, ",") {
		i := slices.Index([]string{"fin", "syn", "rst", "psh", "ack", "urg"}, name)
		if i < 0 && name != "0x0" {
			return 0, fmt.Errorf("no such TCP flag: %q", name)
		}
		if i >= 0 {
			f |= 1 << i
		}
	}
	return f, nil
}

func typeNumber(p firewall.Proto, name string) (uint8, error) {
	names := icmpTypes
	if p == firewall.ICMPv6 {
		names = icmp6Types
	}
	for _, t := range slices.Sorted(maps.Keys(names)) {
		if names[t] == name {
			return t, nil
		}
	}
	return number8(name)
}

func limitOf(w *words) (*firewall.Limit, error) {
	w.is("rate")
	rate, unit, _ := strings.Cut(w.next(), "/")
	n, err := strconv.ParseUint(rate, 10, 32)
	l := &firewall.Limit{Rate: firewall.Rate{N: uint32(n)}, Burst: 5}
	for u, is := range units {
		if is.name == unit {
			l.Rate.Per = u
		}
	}
	if w.is("burst") {
		burst, e := strconv.ParseUint(w.next(), 10, 32)
		l.Burst, err = uint32(burst), errors.Join(err, e)
		w.is("packets")
	}
	return l, err
}

// ruleChain tells which family's a chain is, and what a ruleset calls it.
func ruleChain(name string) (family, chain string) {
	family = familyOf(name)
	chain = strings.TrimPrefix(name, family+"-")
	if upper := firewall.ChainPrefix + strings.ToUpper(chain); upper == firewall.InputChain || upper == firewall.SSHChain {
		return family, upper
	}
	return family, firewall.ChainPrefix + chain
}

func (p *parser) ruleset() firewall.Ruleset {
	var r firewall.Ruleset
	for _, name := range p.order {
		family, chain := ruleChain(name)
		c := firewall.Chain{Name: chain, Rules: p.chains[name]}
		if family == firewall.IPv6.String() {
			r.IPv6 = append(r.IPv6, c)
		} else {
			r.IPv4 = append(r.IPv4, c)
		}
	}
	// Where the kernel had no IPv6, nothing was written for it: it is closed.
	if r.IPv6 == nil {
		r.IPv6 = []firewall.Chain{{Name: firewall.InputChain}}
	}
	return r
}
