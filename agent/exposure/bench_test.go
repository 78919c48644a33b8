package exposure

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// BenchmarkReport reports on 10,000 rules of another program, and on a set of 200,000 sources.
func BenchmarkReport(b *testing.B) {
	var banned []netip.Prefix
	for i := range 200000 {
		banned = append(banned, netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(i%200 + 1), byte(i / 200), byte(i / 51200), byte(i)}), 32))
	}
	set := machine(input(false, rule(Drop, Match{Field: Source, Addrs: Of(banned...)})))
	set.Add(firewall.TCP, "sshd", 22, 80, 443)
	b.Run("set", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			set.Report()
		}
	})
	for _, kind := range []string{"bans", "ports"} {
		var rules []Rule
		for i := range 10000 {
			r := Rule{Text: fmt.Sprint(i), Verdict: Drop, Matches: []Match{{Field: Source, Addrs: Of(netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(i%200 + 1), byte(i / 200), byte(i), 1}), 32))}}}
			if kind == "ports" {
				r.Verdict, r.Matches = Accept, append(r.Matches, isTCP, port(uint32(1000+i%3000)))
			}
			rules = append(rules, r)
		}
		s := machine(input(true, append(rules, rule(Accept, isTCP, port(22)))...))
		s.Add(firewall.TCP, "sshd", 22)
		b.Run(kind, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				s.Report()
			}
		})
	}
}
