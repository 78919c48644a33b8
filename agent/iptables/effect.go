package iptables

import (
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// effect lists what can happen to the first packet of a connection that reaches a chain:
// it is accepted, dropped, or passed on to the rule after the jump.
type effect struct{ accepts, drops, passes bool }

// effects computes the effects of a table's rules. Each chain's effect is computed
// once per protocol.
type effects struct {
	table
	known map[string]effect // by protocol and chain
}

var judged = []firewall.Proto{firewall.TCP, firewall.UDP} // the protocols whose connections are examined

func effectsOf(t table) effects { return effects{t, map[string]effect{}} }

func (e effects) chainEffect(name string, p firewall.Proto) effect {
	key := string(p) + " " + name
	if _, ok := e.known[key]; !ok {
		e.known[key] = effect{passes: true} // within a cycle, which the kernel refuses
		e.known[key] = e.compute(name, p)
	}
	return e.known[key]
}

func (e effects) compute(name string, p firewall.Proto) (out effect) {
	for _, r := range e.chain(name).Rules {
		words, err := split(r)
		if err != nil {
			return effect{passes: true}
		}
		matches := scopeOf(words, p)
		if matches == nothing {
			continue
		}
		of := e.verdict(target(r), p)
		out.accepts, out.drops = out.accepts || of.accepts, out.drops || of.drops
		last := slices.Contains(words, "-g") || target(r) == "RETURN"
		out.passes = out.passes || last && of.passes
		if matches == everything && (last || !of.passes) {
			return out
		}
	}
	out.passes = true
	return out
}

// verdict returns the effect of a rule's target on the packets that match.
func (e effects) verdict(target string, p firewall.Proto) effect {
	switch target {
	case firewall.Accept:
		return effect{accepts: true}
	case firewall.Drop, "REJECT", "TARPIT":
		return effect{drops: true}
	case "QUEUE", "NFQUEUE": // a program decides; without one the kernel drops
		return effect{accepts: true, drops: true}
	}
	return e.chainEffect(target, p) // not a chain: RETURN, or a target such as LOG or MARK
}

// shuts returns how many new connections of a protocol a rule of INPUT, or its chain, drops.
func (e effects) shuts(rule string) breadth {
	out, to := nothing, target(rule)
	words, err := split(rule)
	if err != nil || isOurs(to) {
		return nothing
	}
	for _, p := range judged {
		if of := e.verdict(to, p); of.drops && !of.passes {
			out = max(out, scopeOf(words, p))
		}
	}
	return out
}

// decides reports whether a rule of INPUT is terminal, directly or through a jump. Rules
// that match a set, such as bans, are not: they belong to the program that fills the set.
func (e effects) decides(rule string) bool {
	switch target(rule) {
	case firewall.Accept, firewall.Drop, "REJECT", "RETURN", "QUEUE", "NFQUEUE", "TARPIT":
		words, _ := split(rule)
		return !slices.Contains(words, "--match-set")
	}
	return e.shuts(rule) >= anyone
}

// breadth is how many new connections of a protocol a rule matches.
type breadth int

const (
	nothing    breadth = iota // none
	some                      // those from some sources, or those that a set, a limit or an unknown match selects
	anyone                    // those from any source, to some ports or on some interfaces
	everything                // all
)

// scopeOf returns the breadth of a rule's matches. Except for sources, a negated match
// counts as no restriction.
func scopeOf(words []string, p firewall.Proto) breadth {
	out := everything
	for i := 0; i < len(words); i++ {
		value, negated := "", i > 0 && words[i-1] == "!"
		if i+1 < len(words) {
			value = words[i+1]
		}
		switch words[i] {
		case "!":
			continue
		case "-j", "-g":
			return out
		case "--comment":
		case "-m":
			if !slices.Contains([]string{"tcp", "udp", "comment", "conntrack", "state", "multiport"}, value) {
				out = min(out, some)
			}
		case "-p":
			if value != "all" && (value == string(p)) == negated {
				return nothing
			}
		case "--ctstate", "--state":
			if strings.Contains(value, "NEW") == negated {
				return nothing
			}
		case "-i", "--dport", "--dports", "--ports":
			out = min(out, anyone)
			if value == "lo" && !negated {
				return nothing
			}
		default:
			out = min(out, some)
			continue
		}
		i++
	}
	return out
}
