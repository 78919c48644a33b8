package store

import (
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// TestSameRules compares states that differ in the ports of containers, and in others.
func TestSameRules(t *testing.T) {
	state := func(change func(*firewall.Desired)) (st State) {
		t.Helper()
		st.Desired = firewall.Failsafe([]uint16{22})
		st.Desired.Published = firewall.PublishedProfile
		change(&st.Desired)
		var err error
		if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
			t.Fatal(err)
		}
		return st
	}
	is := state(func(*firewall.Desired) {})
	direct := state(func(d *firewall.Desired) {
		d.Direct = []firewall.ContainerPort{{Out: "docker0", Proto: firewall.TCP, Ports: firewall.Port(80)}}
	})
	other := state(func(d *firewall.Desired) { d.Published = firewall.PublishedLeave })
	if is.Ruleset.Equal(direct.Ruleset) || !is.SameRules(direct) || !direct.SameRules(is) {
		t.Error("ports of containers count")
	}
	if is.SameRules(other) || other.SameRules(direct) {
		t.Error("other rules do not count")
	}
}
