package bootstrap

import (
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// TestPublished checks that a first bootstrap holds published ports to the profile, and that
// a state of an earlier version leaves them alone until the settings say otherwise.
func TestPublished(t *testing.T) {
	const key = "[containers]\npublished = "
	for _, tt := range []struct{ name, ini, previous, want string }{
		{"first", "", "none", "profile"},
		{"first, left", key + "leave\n", "none", "leave"},
		{"an upgrade", "", "", ""},
		{"after an upgrade", key + "profile\n", "", "profile"},
		{"left after an upgrade", key + "leave\n", "", "leave"},
		{"again", "", "profile", "profile"},
		{"no longer left", "", "leave", "profile"},
	} {
		in := input(t, tt.ini)
		if tt.previous != "none" {
			in.Previous = &store.State{InstanceID: in.Facts.Instance, Desired: firewall.Desired{Published: tt.previous}}
		}
		st, _, err := Decide(in)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if got := st.Desired.Published; got != tt.want || st.Ruleset.Forwards() != (tt.want == "profile") {
			t.Errorf("%s: %q, want %q; forward rules: %v", tt.name, got, tt.want, st.Ruleset.Forwards())
		}
	}
}
