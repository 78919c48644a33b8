package nftables

import (
	"context"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// The kernel tells of what happens in iptables' own filter tables, however much
// it is, and of nothing else.
func TestWatch(t *testing.T) {
	lab.Need(t, "ip", "nft", "xtables-nft-multi")
	n := lab.NewNamespace(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	told := make(chan struct{}, 1)
	tell := func() {
		select {
		case told <- struct{}{}:
		default:
		}
	}
	if err := n.Do(func() error { return Watch(ctx, tell) }); err != nil {
		t.Fatal(err)
	}
	// news tells whether there was any. What counts comes behind what may not,
	// so that it is known to have been read.
	for _, tt := range []struct {
		name string
		args []string
		news bool
	}{
		{"a chain of another table", []string{"nft", "add table ip nat; add chain ip nat c"}, false},
		{"a set of another family", []string{"nft", "add table inet filter; add set inet filter s { type ipv4_addr; }; add element inet filter s { 192.0.2.1 }"}, false},
		{"a chain", []string{"xtables-nft-multi", "iptables", "-N", "X"}, true},
		{"a rule", []string{"xtables-nft-multi", "ip6tables", "-A", "INPUT", "-j", "ACCEPT"}, true},
		{"a policy", []string{"xtables-nft-multi", "iptables", "-P", "INPUT", "DROP"}, true},
		{"a table", []string{"nft", "delete table ip6 filter"}, true},
		{"more than there is room for", []string{"sh", "-c", "(echo '*filter'; i=0; while [ $i -lt 3000 ]; do echo -A X -p tcp --dport $i -j ACCEPT; i=$((i+1)); done; echo COMMIT) | xtables-nft-multi iptables-restore --noflush"}, true},
		{"a rule after that", []string{"xtables-nft-multi", "iptables", "-F", "X"}, true},
	} {
		n.MustRun(t, tt.args...)
		wait := 10 * time.Second
		if !tt.news {
			wait = 200 * time.Millisecond
		}
		select {
		case <-told:
			if !tt.news {
				t.Errorf("%s: told", tt.name)
			}
		case <-time.After(wait):
			if tt.news {
				t.Errorf("%s: nothing was told", tt.name)
			}
		}
		// The same news may come in two parts.
		for quiet := false; !quiet; {
			select {
			case <-told:
			case <-time.After(200 * time.Millisecond):
				quiet = true
			}
		}
	}
	cancel()
	time.Sleep(100 * time.Millisecond)
	n.MustRun(t, "xtables-nft-multi", "iptables", "-X", "X")
	select {
	case <-told:
		t.Error("told after the end")
	case <-time.After(200 * time.Millisecond):
	}
}
