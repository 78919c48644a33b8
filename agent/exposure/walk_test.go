package exposure

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

func tcp(port uint16) Packet {
	return Packet{Family: firewall.IPv4, In: "eth0", Dst: netip.MustParseAddr("192.0.2.1"), DstType: "LOCAL", Proto: 6, DstPort: port, TCPFlags: 2}
}

func from(text ...string) Sources {
	var out []netip.Prefix
	for _, t := range text {
		out = append(out, netip.MustParsePrefix(t))
	}
	return Of(out...)
}

var (
	isTCP   = Match{Field: Protocol, Numbers: []Span{{6, 6}}}
	unknown = Match{Field: Unknown, Text: "-m u32"}
)

func port(n uint32) Match             { return Match{Field: DestinationPort, Numbers: []Span{{n, n}}} }
func source(s ...string) Match        { return Match{Field: Source, Addrs: from(s...)} }
func rule(v Verdict, m ...Match) Rule { return Rule{Verdict: v, Matches: m, Text: fmt.Sprint(v)} }
func to(v Verdict, chain string, m ...Match) Rule {
	return Rule{Verdict: v, To: chain, Matches: m}
}

func text(s Sources) string {
	var out []string
	for _, r := range s {
		out = append(out, r.First.String()+"-"+r.Last.String())
	}
	return strings.Join(out, " ")
}

func TestTrace(t *testing.T) {
	const all, none = "0.0.0.0-255.255.255.255", ""
	host := Host{Type: func(a netip.Addr) string {
		if a == netip.MustParseAddr("192.0.2.1") {
			return "LOCAL"
		}
		return "UNICAST"
	}, Route: func(a netip.Addr) string {
		if a == netip.MustParseAddr("172.17.0.2") {
			return "docker0"
		}
		return ""
	}, Redirect: func(string, netip.Addr) netip.Addr { return netip.MustParseAddr("192.0.2.2") }}
	input := func(drop bool, rules ...Rule) Chain {
		return Chain{Name: "INPUT", Hook: Input, Drop: drop, Rules: rules}
	}
	one := func(chains ...Chain) []Table { return []Table{{Family: "ip", Name: "filter", Chains: chains}} }
	for _, tt := range []struct {
		name          string
		tables        []Table
		port          uint16
		sure, perhaps string
	}{
		{"nothing", nil, 80, all, none},
		{"policy", one(input(true)), 80, none, none},
		{"a port", one(input(true, rule(Accept, isTCP, port(80)))), 80, all, none},
		{"another port", one(input(true, rule(Accept, isTCP, port(80)))), 81, none, none},
		{"a source", one(input(true, rule(Accept, source("10.0.0.0/8"), port(80)))), 80, "10.0.0.0-10.255.255.255", none},
		{"a ban", one(input(false, rule(Drop, source("10.0.0.0/8")))), 80, "0.0.0.0-9.255.255.255 11.0.0.0-255.255.255.255", none},
		{"bans in a row", one(input(false, rule(Drop, source("0.0.0.0/1")), rule(Drop, source("192.0.0.0/2")))), 80, "128.0.0.0-191.255.255.255", none},
		{"a negated source", one(input(true, rule(Accept, Match{Field: Source, Not: true, Addrs: from("0.0.0.0/1")}))), 80, "128.0.0.0-255.255.255.255", none},
		{"an unknown accept", one(input(true, rule(Accept, unknown))), 80, none, all},
		{"an unknown drop", one(input(false, rule(Drop, unknown))), 80, none, all},
		{"an unknown drop of some", one(input(false, rule(Drop, source("0.0.0.0/1"), unknown))), 80, "128.0.0.0-255.255.255.255", "0.0.0.0-127.255.255.255"},
		{"an unknown return before a sure drop", one(input(false, to(Jump, "X")), Chain{Name: "X", Rules: []Rule{rule(Return, unknown), rule(Drop)}}), 80, none, all},
		{"a sure accept after an unknown one", one(input(true, rule(Accept, unknown), rule(Accept))), 80, all, none},
		{"a sure drop after an unknown accept", one(input(false, rule(Accept, unknown), rule(Drop))), 80, none, all},
		{"a jump", one(input(false, to(Jump, "X", port(80))), Chain{Name: "X", Rules: []Rule{rule(Return, source("0.0.0.0/1")), rule(Drop)}}), 80, "0.0.0.0-127.255.255.255", none},
		{"a goto", one(input(true, to(Goto, "X"), rule(Accept)), Chain{Name: "X"}), 80, none, none},
		{"a mark", one(input(true, Rule{Mark: &MarkChange{0xff, 1}, Matches: []Match{source("0.0.0.0/1")}}, rule(Accept, Match{Field: Mark, Mask: 0xff, Numbers: []Span{{1, 1}}}))), 80, "0.0.0.0-127.255.255.255", none},
		{"an unknown mark", one(input(true, Rule{Marks: true, Matches: []Match{source("0.0.0.0/1")}}, rule(Accept, Match{Field: Mark, Mask: 0xff, Numbers: []Span{{0, 0}}}))), 80, "128.0.0.0-255.255.255.255", "0.0.0.0-127.255.255.255"},
		{"two tables", []Table{{Family: "ip", Chains: []Chain{input(false, rule(Drop, source("0.0.0.0/1")))}}, {Family: "inet", Chains: []Chain{{Hook: Input, Priority: -1, Rules: []Rule{rule(Drop, source("128.0.0.0/2"))}}}}}, 80, "192.0.0.0-255.255.255.255", none},
		{"IPv6's table", []Table{{Family: "ip6", Chains: []Chain{input(true)}}}, 80, all, none},
		{"a redirect", one(Chain{Hook: Prerouting, NAT: true, Priority: -100, Rules: []Rule{{Matches: []Match{port(80)}, Translate: &Translation{Port: 8080, Known: true}}}},
			input(true, rule(Accept, port(8080)))), 80, all, none},
		{"the port behind a redirect", one(Chain{Hook: Prerouting, NAT: true, Priority: -100, Rules: []Rule{{Matches: []Match{port(80)}, Translate: &Translation{Port: 8080, Known: true}}}},
			input(true, rule(Accept, port(80)))), 80, none, none},
		{"a published port", one(Chain{Hook: Prerouting, NAT: true, Rules: []Rule{{Matches: []Match{port(80)}, Translate: &Translation{To: netip.MustParseAddr("172.17.0.2"), Port: 8080, Known: true}}}},
			input(true), Chain{Hook: Forward, Drop: true, Rules: []Rule{rule(Accept, port(8080), Match{Field: OriginalPort, Numbers: []Span{{80, 80}}})}}), 80, all, none},
		{"a forwarded port, by its way out", one(Chain{Hook: Prerouting, NAT: true, Rules: []Rule{{Matches: []Match{port(80)}, Translate: &Translation{To: netip.MustParseAddr("172.17.0.2"), Known: true}}}},
			Chain{Hook: Forward, Drop: true, Rules: []Rule{rule(Accept, Match{Field: OutInterface, Names: []string{"docker*"}})}}), 80, all, none},
		{"not tracked", one(Chain{Hook: Prerouting, Priority: -300, Rules: []Rule{{Untracked: true, Matches: []Match{port(80)}}}},
			input(true, rule(Accept, Match{Field: State, Names: []string{"NEW"}}))), 80, none, none},
		{"not tracked, of any original port", one(Chain{Hook: Prerouting, Priority: -300, Rules: []Rule{{Untracked: true}}},
			input(true, rule(Accept, Match{Field: OriginalPort, Not: true, Numbers: []Span{{81, 81}}}))), 80, none, none},
		{"a state before conntrack", one(Chain{Hook: Prerouting, Priority: -300, Rules: []Rule{rule(Drop, Match{Field: State, Names: []string{"NEW"}})}}), 80, all, none},
		{"a state after conntrack", one(Chain{Hook: Prerouting, Priority: -150, Rules: []Rule{rule(Drop, Match{Field: State, Names: []string{"NEW"}})}}), 80, none, none},
		{"translated to the same port", one(Chain{Hook: Prerouting, NAT: true, Rules: []Rule{{Translate: &Translation{To: tcp(80).Dst, Port: 80, Known: true}}}},
			input(false, rule(Drop, Match{Field: State, Names: []string{"DNAT"}}))), 80, all, none},
		{"redirected to the interface's address", one(Chain{Hook: Prerouting, NAT: true, Rules: []Rule{{Translate: &Translation{Known: true}}}},
			input(true, rule(Accept, Match{Field: Destination, Addrs: from("192.0.2.2/32")}))), 80, all, none},
		{"one of several ports", one(Chain{Hook: Prerouting, NAT: true, Rules: []Rule{{Matches: []Match{source("0.0.0.0/1")}, Translate: &Translation{Port: 8000}}}},
			input(true, rule(Accept, port(8001)))), 80, none, "0.0.0.0-127.255.255.255"},
		{"ingress of another interface", []Table{{Family: "inet", Chains: []Chain{{Hook: Ingress, Devices: []string{"eth1"}, Rules: []Rule{rule(Drop)}}}}}, 80, all, none},
		{"one of several", one(input(true, rule(Accept, Match{Field: Any, Of: [][]Match{{port(81)}, {port(80), source("0.0.0.0/1")}, {source("192.0.0.0/2"), unknown}}}))), 80, "0.0.0.0-127.255.255.255", "192.0.0.0-255.255.255.255"},
		{"any source port", one(input(true, rule(Accept, Match{Field: SourcePort, Numbers: []Span{{53, 53}}}))), 80, none, all},
		{"a queue", one(input(true, rule(Undecided))), 80, none, all},
	} {
		sure, perhaps := Ruleset{tt.tables}.Trace(tcp(tt.port), All(tcp(80).Dst), host, false).Open()
		if text(sure) != tt.sure || text(perhaps) != tt.perhaps {
			t.Errorf("%s: surely open from %q, perhaps from %q; want %q and %q", tt.name, text(sure), text(perhaps), tt.sure, tt.perhaps)
		}
	}
}

// TestWhy checks that a reason is given once, also if several rules have it.
func TestWhy(t *testing.T) {
	sport := Match{Field: SourcePort, Numbers: []Span{{67, 67}}}
	rules := []Rule{rule(Drop, sport), rule(Accept, sport), rule(Next, unknown), rule(Drop, sport)}
	tables := []Table{{Family: "ip", Name: "filter", Chains: []Chain{{Name: "INPUT", Hook: Input, Rules: rules}}}}
	res := Ruleset{tables}.Trace(tcp(80), All(tcp(80).Dst), Host{Type: func(netip.Addr) string { return "LOCAL" }}, false)
	for _, p := range slices.Concat(res.Accepted, res.Dropped) {
		if p.Perhaps && !slices.Contains(p.Why, "the source port") {
			t.Errorf("%v depends on %q", p.By, p.Why)
		}
		for i, why := range p.Why {
			if why == "" || slices.Contains(p.Why[:i], why) {
				t.Errorf("%v depends on %q", p.By, p.Why)
			}
		}
	}
}
