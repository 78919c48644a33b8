package report

import (
	"slices"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// TestStatusNamesConflicts checks that the status names other active firewall managers, and
// that the command to stop them comes first.
func TestStatusNamesConflicts(t *testing.T) {
	for _, tt := range []struct {
		name     string
		takeOver bool
		before   bool // bootstrap
		active   bool
		next     string
	}{
		{"taken over", true, false, true, "basicfw-agent apply"},
		{"refused", false, false, true, "systemctl disable --now firewalld"},
		{"before bootstrap", true, true, true, "basicfw-agent bootstrap"},
		{"at the next boot", true, false, false, "basicfw-agent apply"},
	} {
		in := ordinary(t)
		if tt.before {
			in = Input{Err: store.ErrNone, Families: in.Families}
		}
		in.Conflicts = []firewall.Conflict{{Name: "firewalld", Active: tt.active, Enabled: true}}
		in.Inspection.Flushed = firewall.Families[:] // by it
		in.Drift = []firewall.Drift{{Family: "ipv4", Chain: "INPUT", Kind: firewall.Missing, Want: "-j BASICFW-INPUT"}}
		in.Facts.TakeOver = tt.takeOver
		s := New(in)
		code, conflicts := "conflict-at-boot", []string{}
		if tt.active {
			code, conflicts = "conflict-active", []string{"firewalld"}
		}
		if !slices.Equal(s.Conflicts, conflicts) || len(s.Next) == 0 || s.Next[0] != tt.next {
			t.Errorf("%s: conflicts %q, next %q", tt.name, s.Conflicts, s.Next)
		}
		if !slices.ContainsFunc(s.Warnings, func(w Warning) bool { return w.Code == code && w.Fix == tt.next }) {
			t.Errorf("%s: no %s with %q: %+v", tt.name, code, tt.next, s.Warnings)
		}
	}
}
