package nftables

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestClosing(t *testing.T) {
	const hook = "type filter hook input priority 0;"
	for name, tt := range map[string]struct {
		text string
		want []string
	}{
		"nothing":             {"", nil},
		"as Debian ships it":  {"table inet filter {\nchain input { " + hook + " }\nchain forward { type filter hook forward priority 0; policy drop; }\n}", nil},
		"a policy":            {"table inet filter {\nchain input { " + hook + " policy drop; tcp dport 22 accept; }\n}", []string{"inet filter input"}},
		"a last rule":         {"table ip f {\nchain in { " + hook + " tcp dport 22 accept; counter log prefix \"no: \" drop; }\n}", []string{"ip f in"}},
		"a last rule rejects": {"table ip6 f {\nchain in { " + hook + " reject with icmpv6 admin-prohibited; }\n}", []string{"ip6 f in"}},
		"bans":                {"table inet f2b {\nset s { type ipv4_addr; }\nchain in { " + hook + " ip saddr @s drop; }\n}", nil},
		"switched off":        {"table inet filter {\nflags dormant;\nchain input { " + hook + " policy drop; }\n}", nil},
		"iptables' and firewalld's": {"table ip filter {\nchain INPUT { " + hook + " policy drop; }\n}\n" +
			"table inet firewalld {\nchain filter_INPUT { " + hook + " reject; }\n}", nil},
	} {
		n := load(t, tt.text)
		var got []string
		if err := n.Do(func() (err error) { got, err = Closing(true); return err }); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}
