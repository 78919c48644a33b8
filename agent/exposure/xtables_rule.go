package exposure

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"sync"
)

// ruleReader reads one rule of iptables.
type ruleReader struct {
	*saveReader
	rule    Rule
	line    string
	words   []word
	module  string // of the last match or target
	target  string
	goes    bool // to the target without returning (--goto)
	group   int  // the match of a module that is not modelled, or -1
	ignore  bool // the options of the module
	tracked tracking
	foreign bool // for the other family
}

// modelled lists the matches of which option reads options. Others are unknown as a whole.
var modelled = sync.OnceValue(func() map[string]bool {
	return map[string]bool{"tcp": true, "udp": true, "sctp": true, "dccp": true, "udplite": true, "icmp": true, "icmp6": true, "icmpv6": true,
		"ipv6-icmp": true, "multiport": true, "conntrack": true, "state": true, "addrtype": true, "iprange": true, "mark": true, "pkttype": true, "comment": true}
})

// sometimes lists the matches that depend on rate or time.
var sometimes = sync.OnceValue(func() map[string]bool {
	return map[string]bool{"limit": true, "hashlimit": true, "recent": true, "time": true, "statistic": true, "connlimit": true, "quota": true}
})

// short lists the short names of options that each rule can have.
var short = sync.OnceValue(func() map[string]string {
	return map[string]string{"--source": "-s", "--src": "-s", "--destination": "-d", "--dst": "-d", "--in-interface": "-i", "--out-interface": "-o",
		"--protocol": "-p", "--proto": "-p", "--jump": "-j", "--goto": "-g", "--match": "-m", "--fragments": "-f", "--fragment": "-f",
		"--ipv4": "-4", "--ipv6": "-6", "--set-counters": "-c"}
})

// free lists the options whose value may look like an option.
var free = sync.OnceValue(func() map[string]bool {
	return map[string]bool{"-s": true, "-d": true, "-i": true, "-o": true, "-p": true, "-j": true, "-g": true, "-m": true, "--comment": true,
		"--log-prefix": true, "--nflog-prefix": true, "--string": true, "--hex-string": true, "--name": true, "--hashlimit-name": true, "--helper": true}
})

// xoption is an option of a rule with its values.
type xoption struct {
	name string
	not  bool
	args []string // valid until the next option
	text string   // as in the line
}

// rule returns the rule with the given words. It returns false for a rule of the other family.
func (r *saveReader) rule(line string, words []word) (Rule, bool) {
	p := ruleReader{saveReader: r, line: line, words: words, group: -1}
	if len(words) > 0 {
		p.rule.Text = line[words[0].start:words[len(words)-1].end]
		p.rule.Matches = r.matches[:0]
	}
	for len(p.words) > 0 {
		p.read(p.next())
	}
	p.flush()
	p.decide()
	r.matches, p.rule.Matches = p.rule.Matches, slices.Clone(p.rule.Matches)
	return p.rule, !p.foreign
}

// next returns the next option with its values: the words up to the next option.
func (p *ruleReader) next() xoption {
	o := xoption{args: p.args[:0]}
	start := p.words[0].start
	if p.words[0].text == "!" && len(p.words) > 1 {
		o.not, p.words = true, p.words[1:]
	}
	o.name = p.words[0].text
	end := p.words[0].end
	p.words = p.words[1:]
	if name, value, ok := strings.Cut(o.name, "="); ok && strings.HasPrefix(name, "--") {
		o.name, o.args = name, append(o.args, value)
	} else if len(o.name) > 2 && o.name[0] == '-' && free()[o.name[:2]] { // as in -jACCEPT
		o.name, o.args = o.name[:2], append(o.args, o.name[2:])
	}
	if len(o.name) > 2 {
		o.name = cmp.Or(short()[o.name], o.name)
	}
	if len(o.args) == 0 && len(p.words) > 1 && p.words[0].text == "!" && !isOption(p.words[1].text) { // up to 1.4.2
		o.not, p.words = !o.not, p.words[1:]
	}
	for len(p.words) > 0 && (!p.ends() || free()[o.name]) {
		if free()[o.name] && len(o.args) > 0 {
			break
		}
		o.args = append(o.args, p.words[0].text)
		end = p.words[0].end
		p.words = p.words[1:]
	}
	o.text, p.args = p.line[start:end], o.args
	return o
}

// ends reports whether the next word is not a value, but an option.
func (p *ruleReader) ends() bool {
	w := p.words[0].text
	return isOption(w) || w == "!" && len(p.words) > 1 && isOption(p.words[1].text)
}

func isOption(w string) bool {
	return len(w) > 1 && w[0] == '-' && (w[1] < '0' || w[1] > '9' || w == "-4" || w == "-6")
}

// read adds an option to the rule.
func (p *ruleReader) read(o xoption) {
	switch o.name {
	case "-m":
		p.flush()
		p.module, p.group, p.ignore = strings.Join(o.args, " "), -1, false
		if !modelled()[p.module] {
			p.group = len(p.rule.Matches)
			p.add(Match{Field: p.unmodelled(), Text: o.text})
		}
	case "-j", "-g":
		p.flush()
		p.target, p.goes = strings.Join(o.args, " "), o.name == "-g"
		p.module, p.group = p.target, -1
		p.ignore = p.targets()
	case "-4", "-6":
		p.foreign = p.foreign || (o.name == "-4") != (p.family == "ip")
	case "-c":
	default:
		switch {
		case p.option(o):
		case p.module == "recent" && o.name == "--set" && !o.not && p.group >= 0: // always true
			p.rule.Matches = slices.Delete(p.rule.Matches, p.group, p.group+1)
			p.group, p.ignore = -1, true
		case p.ignore || p.change(o):
		case p.group >= 0:
			m := &p.rule.Matches[p.group]
			m.Text += " " + o.text
		default:
			p.unknown(o.text)
		}
	}
}

func (p *ruleReader) unmodelled() Field {
	if sometimes()[p.module] {
		return Sometimes
	}
	return Unknown
}

func (p *ruleReader) add(m ...Match) { p.rule.Matches = append(p.rule.Matches, m...) }

func (p *ruleReader) unknown(text string) { p.add(Match{Field: Unknown, Text: text}) }

// tracking is a conntrack match. It matches untracked packets only by their state,
// and ignores its other conditions for them (linux/net/netfilter/xt_conntrack.c).
type tracking struct {
	state bool
	rest  []Match
}

// flush adds the rest of a conntrack match.
func (p *ruleReader) flush() {
	c := p.tracked
	p.tracked = tracking{}
	untracked := Match{Field: State, Names: []string{"UNTRACKED"}}
	switch raw := p.table.Name == "raw"; {
	case len(c.rest) == 0 || raw && c.state:
	case raw: // it comes before conntrack
		p.add(never)
	case c.state:
		p.add(Match{Field: Any, Of: [][]Match{{untracked}, c.rest}})
	default:
		untracked.Not = true
		p.add(append(c.rest, untracked)...)
	}
}

// never matches no packet.
var never = Match{Field: Any}

// verdicts lists the targets that are not chains. Those that only change a packet
// have the verdict Next. The mark that CONNMARK restores is not modelled.
var verdicts = sync.OnceValue(func() map[string]Verdict {
	return map[string]Verdict{"ACCEPT": Accept, "DROP": Drop, "REJECT": Drop, "TARPIT": Drop, "RETURN": Return, "SNAT": Accept, "MASQUERADE": Accept,
		"QUEUE": Undecided, "NFQUEUE": Undecided, "CLUSTERIP": Undecided, "SYNPROXY": Undecided,
		"LOG": Next, "NFLOG": Next, "ULOG": Next, "AUDIT": Next, "TRACE": Next, "CONNMARK": Next, "CLASSIFY": Next, "DSCP": Next, "TOS": Next, "TTL": Next,
		"HL": Next, "ECN": Next, "TCPMSS": Next, "TCPOPTSTRIP": Next, "CHECKSUM": Next, "SECMARK": Next, "CONNSECMARK": Next, "SET": Next, "RATEEST": Next,
		"NOTRACK": Next, "CT": Next, "MARK": Next, "DNAT": Next, "REDIRECT": Next, "NETMAP": Next, "TPROXY": Next, "TEE": Next, "LED": Next, "IDLETIMER": Next}
})

// targets begins to read the target, and reports whether its options have no effect here.
func (p *ruleReader) targets() bool {
	switch p.target {
	case "NOTRACK":
		p.rule.Untracked = true
	case "REDIRECT", "DNAT", "NETMAP", "TPROXY":
		p.rule.Translate = &Translation{Known: p.target == "REDIRECT"}
	case "ACCEPT", "DROP", "RETURN":
		return false
	}
	_, ok := verdicts()[p.target]
	return ok && p.target != "MARK" && p.target != "CONNMARK" && p.target != "CT" && p.rule.Translate == nil
}

// decide sets the verdict. resolve looks up the chain of a jump.
func (p *ruleReader) decide() {
	if p.target == "" {
		return
	}
	v, ok := verdicts()[p.target]
	switch {
	case ok && !p.goes:
		p.rule.Verdict = v
	case p.goes:
		p.rule.Verdict, p.rule.To = Goto, p.target
	default:
		p.rule.Verdict, p.rule.To = Jump, p.target
	}
}

// change reads an option of a target that changes packets.
func (p *ruleReader) change(o xoption) bool {
	value := strings.Join(o.args, " ")
	switch p.module {
	case "MARK":
		return p.setMark(o.name, value)
	case "CONNMARK":
		p.rule.Marks = p.rule.Marks || o.name == "--restore-mark"
		return true
	case "CT":
		p.rule.Untracked = p.rule.Untracked || o.name == "--notrack"
		return true
	case "REDIRECT", "DNAT":
		switch o.name {
		case "--to-ports":
			value = ":" + value
			fallthrough
		case "--to-destination", "--to":
			t, ok := destination(value)
			if p.rule.Translate.To.IsValid() { // one of several
				t.Known = false
			}
			*p.rule.Translate = t
			return ok
		}
		return true
	case "NETMAP":
		if n, ok := network(value); ok && o.name == "--to" {
			p.rule.Translate.To = n.Addr()
		}
		return true
	case "TPROXY":
		// The packet keeps its destination, also in the rules that follow.
		if o.name == "--tproxy-mark" {
			return p.setMark("--set-xmark", value)
		}
		return true
	}
	return false
}

// setMark reads an option of MARK.
func (p *ruleReader) setMark(name, text string) bool {
	v, mask, ok := masked(text)
	if !ok {
		return false
	}
	var c MarkChange
	switch name {
	case "--set-xmark":
		c = MarkChange{mask, v}
	case "--set-mark":
		c = MarkChange{mask | v, v}
	case "--or-mark":
		c = MarkChange{v, v}
	case "--and-mark":
		c = MarkChange{^v, 0}
	case "--xor-mark":
		c = MarkChange{0, v}
	default:
		return false
	}
	p.rule.Mark = &c
	return true
}

// masked returns a value and its mask: "0x1/0xff", or "1".
func masked(text string) (value, mask uint32, ok bool) {
	v, m, found := strings.Cut(text, "/")
	n, err := strconv.ParseUint(v, 0, 32)
	if err != nil {
		return 0, 0, false
	}
	if !found {
		return uint32(n), 0xffffffff, true
	}
	k, err := strconv.ParseUint(m, 0, 32)
	return uint32(n), uint32(k), err == nil
}
