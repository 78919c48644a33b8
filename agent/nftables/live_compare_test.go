package nftables

import (
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// TestBlocked checks which chains of other programs are reported because they drop all
// packets of SSH or of a web server.
func TestBlocked(t *testing.T) {
	const hook = "type filter hook input priority 0;"
	required := []exposure.Requirement{{Name: "ssh", Proto: firewall.TCP, Ports: firewall.Port(22)}, {Name: "http", Proto: firewall.TCP, Ports: firewall.Port(80)}}
	for name, tt := range map[string]struct {
		text string
		want []string
	}{
		"nothing":            {"", nil},
		"as Debian ships it": {"table inet filter {\nchain input { " + hook + " }\nchain forward { type filter hook forward priority 0; policy drop; }\n}", nil},
		"policy": {"table inet filter {\nchain input { " + hook + " policy drop; tcp dport 22 accept; }\n}",
			[]string{"http ipv4 inet filter input: policy DROP", "http ipv6 inet filter input: policy DROP"}},
		"last rule drops": {"table ip f {\nchain in { " + hook + " tcp dport 22 accept; counter log prefix \"no: \" drop; }\n}",
			[]string{`http ipv4 ip f in: counter log drop`}},
		"last rule rejects": {"table ip6 f {\nchain in { " + hook + " reject with icmpv6 admin-prohibited; }\n}",
			[]string{"ssh ipv6 ip6 f in: reject", "http ipv6 ip6 f in: reject"}},
		"one port":              {"table inet f {\nchain in { " + hook + " tcp dport { 25, 80 } drop; }\n}", []string{"http ipv4 inet f in: tcp dport { 25, 80 } drop", "http ipv6 inet f in: tcp dport { 25, 80 } drop"}},
		"another port":          {"table inet f {\nchain in { " + hook + " tcp dport 443 drop; }\n}", nil},
		"bans":                  {"table inet f2b {\nset s { type ipv4_addr; }\nchain in { " + hook + " ip saddr @s drop; }\n}", nil},
		"bans of addresses":     {"table inet f2b {\nset s { type ipv4_addr; elements = { 203.0.113.9, 192.0.2.9 }; }\nchain in { " + hook + " ip saddr @s drop; }\n}", nil},
		"a limit":               {"table inet f {\nchain in { " + hook + " limit rate over 3/second drop; }\n}", nil},
		"the address of podman": {"table ip f {\nchain in { " + hook + " ip daddr 10.88.0.1 drop; iifname \"podman1\" drop; }\n}", nil},
		"dormant":               {"table inet filter {\nflags dormant;\nchain input { " + hook + " policy drop; }\n}", nil},
		"iptables and firewalld": {"table ip filter {\nchain INPUT { " + hook + " policy drop; }\n}\n" +
			"table inet firewalld {\nchain filter_INPUT { type filter hook input priority filter + 10; reject; }\n}",
			[]string{"ssh ipv4 ip filter INPUT: policy DROP", "http ipv4 ip filter INPUT: policy DROP", "ssh ipv6 inet firewalld filter_INPUT: reject", "http ipv6 inet firewalld filter_INPUT: reject"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var got []string
			for _, e := range machine(readLive(t, load(t, tt.text))).Compare(exposure.Ruleset{}, required).Blocked {
				got = append(got, fmt.Sprintf("%s %s %s %s %s: %s", e.Service, e.Family, e.By.Family, e.By.Table, e.By.Chain, e.By.Rule))
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
