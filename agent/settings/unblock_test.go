package settings

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// TestUnblockOneList removes an address from one of the two lists that block it.
func TestUnblockOneList(t *testing.T) {
	p := netip.MustParsePrefix("203.0.113.7/32")
	list := func(name string) Block { return Block{Name: name, Entries: []firewall.TimedSource{{From: p}}} }
	e := Editor{Settings: Settings{Blocks: []Block{list("one")}}, Now: firewall.Moment{Time: time.Unix(1e9, 0)}}
	got, err := e.Block(BlockRequest{Name: "two", Networks: []netip.Prefix{p}}, time.Time{})
	if err != nil || len(got.Changes) != 1 || got.Changes[0].Key != "two" {
		t.Fatalf("blocked by another list: %+v, %v", got, err)
	}
	if got, err = e.Block(BlockRequest{Networks: []netip.Prefix{p}}, time.Time{}); err != nil || len(got.Changes) > 0 {
		t.Errorf("blocked without a name: %+v, %v", got, err)
	}
	e.Settings.Blocks = append(e.Settings.Blocks, list("two"))
	for name, want := range map[string][]string{"one": {"one"}, "two": {"two"}, "": {"one", "two"}, "three": nil} {
		got, err := e.Unblock(name, []netip.Prefix{p})
		var keys []string
		for _, c := range got.Changes {
			keys = append(keys, c.Key)
		}
		if err != nil || !slices.Equal(keys, want) {
			t.Errorf("%q: changed %v, want %v; %v", name, keys, want, err)
		}
	}
}
