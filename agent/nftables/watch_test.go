package nftables

import (
	"context"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// Watch reports changes of our table and of the filter tables of iptables, however
// many, and nothing else.
func TestWatch(t *testing.T) {
	lab.Need(t, "ip", "nft", "xtables-nft-multi")
	n := lab.NewNamespace(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	news := lab.NewNews()
	if err := n.Do(func() error { return Watch(ctx, news.Tell) }); err != nil {
		t.Fatal(err)
	}
	// Changes to ignore are first: a later reported change proves that they were read.
	for _, tt := range []struct {
		name string
		args []string
		news bool
	}{
		{"a chain of another table", []string{"nft", "add table ip raw; add chain ip raw c"}, false},
		{"a set of another family", []string{"nft", "add table inet filter; add set inet filter s { type ipv4_addr; }; add element inet filter s { 192.0.2.1 }"}, false},
		{"our table", []string{"nft", "add table inet basicfw; add chain inet basicfw c; add set inet basicfw s { type ipv4_addr; }"}, true},
		{"a rule of ours", []string{"nft", "add rule inet basicfw c accept"}, true},
		{"an element of ours", []string{"nft", "add element inet basicfw s { 192.0.2.1 }"}, true},
		{"our table removed", []string{"nft", "delete table inet basicfw"}, true},
		{"a chain", []string{"xtables-nft-multi", "iptables", "-N", "X"}, true},
		{"a rule", []string{"xtables-nft-multi", "ip6tables", "-A", "INPUT", "-j", "ACCEPT"}, true},
		{"a policy", []string{"xtables-nft-multi", "iptables", "-P", "INPUT", "DROP"}, true},
		{"a published port", []string{"xtables-nft-multi", "iptables", "-t", "nat", "-N", "DOCKER"}, true},
		{"forwarded packets", []string{"xtables-nft-multi", "ip6tables", "-t", "mangle", "-A", "FORWARD", "-j", "ACCEPT"}, true},
		{"a table", []string{"nft", "delete table ip6 filter"}, true},
		{"more messages than the buffer holds", []string{"sh", "-c", "(echo '*filter'; i=0; while [ $i -lt 3000 ]; do echo -A X -p tcp --dport $i -j ACCEPT; i=$((i+1)); done; echo COMMIT) | xtables-nft-multi iptables-restore --noflush"}, true},
		{"a rule after that", []string{"xtables-nft-multi", "iptables", "-F", "X"}, true},
	} {
		n.MustRun(t, tt.args...)
		news.Want(t, tt.name, tt.news)
	}
	cancel()
	// It ends at the next message.
	lab.Poll(t, "the end of the watch", func() bool {
		n.MustRun(t, "xtables-nft-multi", "iptables", "-A", "X")
		return !news.Heard(500 * time.Millisecond)
	})
}
