package iptables

import (
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

func TestChainEffect(t *testing.T) {
	drop, accept, pass := effect{drops: true}, effect{accepts: true}, effect{passes: true}
	either := func(a, b effect) effect {
		return effect{a.accepts || b.accepts, a.drops || b.drops, a.passes || b.passes}
	}
	for _, tt := range []struct {
		name  string
		rules []string
		want  effect
	}{
		{"empty", nil, pass},
		{"log and drop", []string{"-m limit --limit 2/min -j LOG", "-j DROP"}, drop},
		{"reject", []string{"-m comment --comment \"a b\" -j REJECT --reject-with tcp-reset"}, drop},
		{"some ports, then drop", []string{"-p tcp -m tcp --dport 80 -j ACCEPT", "-j DROP"}, either(accept, drop)},
		{"bans", []string{"-s 192.0.2.1/32 -j DROP", "-j RETURN"}, either(drop, pass)},
		{"bans that return before a drop", []string{"-s 192.0.2.1/32 -j RETURN", "-j DROP"}, either(drop, pass)},
		{"a rule after a return", []string{"-j RETURN", "-j DROP"}, pass},
		{"established connections return", []string{"-m conntrack --ctstate RELATED,ESTABLISHED -j RETURN", "-p udp -j ACCEPT", "-j DROP"}, drop},
		{"an unknown match", []string{"-m u32 --u32 0x0=0x0 -j DROP"}, either(drop, pass)},
		{"a call", []string{"-j DROPS", "-j ACCEPT"}, drop},
		{"a goto to a chain that returns", []string{"-g EMPTY", "-j DROP"}, pass},
		{"a call of a chain that returns", []string{"-j EMPTY", "-j DROP"}, drop},
		{"a queue", []string{"-j NFQUEUE --queue-num 1"}, either(accept, drop)},
		{"a mark", []string{"-j MARK --set-xmark 0x1/0xffffffff"}, pass},
		{"a cycle", []string{"-j TESTED"}, pass},
	} {
		got := effectsOf(table{Chains: []chain{{Name: "TESTED", Rules: tt.rules}, {Name: "DROPS", Rules: []string{"-j DROP"}}, {Name: "EMPTY"}}}).chainEffect("TESTED", firewall.TCP)
		if got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestScope(t *testing.T) {
	for rule, want := range map[string]breadth{
		"-j DROP": everything,
		"-m comment --comment \"-s 1.2.3.4\" -j DROP": everything,
		"-p tcp -j DROP": everything,
		"-m conntrack --ctstate NEW,INVALID -j DROP":                 everything,
		"-m conntrack ! --ctstate RELATED,ESTABLISHED -j DROP":       everything,
		"-m conntrack --ctstate INVALID -j DROP":                     nothing,
		"-m state ! --state NEW -j DROP":                             nothing,
		"-i eth0 -j DROP":                                            anyone,
		"! -i lo -j DROP":                                            anyone,
		"-i lo -j DROP":                                              nothing,
		"-p tcp -m tcp ! --dport 22 -j DROP":                         anyone,
		"-p tcp -m multiport --dports 22,80 -j DROP":                 anyone,
		"-s 192.0.2.1/32 -j DROP":                                    some,
		"! -s 192.0.2.0/24 -p tcp -m tcp --dport 22 -j DROP":         some,
		"-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j DROP":      some,
		"-m set --match-set bad src -j DROP":                         some,
		"-p tcp -m tcp --dport 22 -m limit --limit 5/sec -j DROP":    some,
		"-p icmp -m icmp --icmp-type 8 -j DROP":                      nothing,
		"-p udp -j DROP":                                             nothing,
		"! -p udp -j DROP":                                           everything,
		"-m recent --update --seconds 60 --name a --rsource -j DROP": some,
	} {
		words, err := split(rule)
		if got := scopeOf(words, firewall.TCP); got != want || err != nil {
			t.Errorf("%s: %d, want %d; %v", rule, got, want, err)
		}
	}
}
