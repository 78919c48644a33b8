package apply

import (
	"slices"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// TestAddRemovedOnce checks that a rule that an interrupted uninstall restored, and the next
// bootstrap removes again, is not recorded twice: uninstall would restore it twice.
func TestAddRemovedOnce(t *testing.T) {
	const old, added = "-p tcp -j ACCEPT", "-p udp -j ACCEPT"
	org := store.Backup{}
	org.Rules.IPv4.Removed, org.Rules.IPv4.Places = []string{old}, []int{0}
	in := backend.Inspection{}
	in.Backup.IPv4.Removed = []string{old}
	if addRemoved(&org, in, Options{Clear: true}) || len(org.Rules.IPv4.Places) != 1 {
		t.Errorf("a known rule changes the backup: %+v", org.Rules.IPv4)
	}
	in.Backup.IPv4.Removed = []string{old, added}
	if !addRemoved(&org, in, Options{Clear: true}) || !slices.Equal(org.Rules.IPv4.Removed, []string{old, added}) {
		t.Errorf("recorded %q", org.Rules.IPv4.Removed)
	}
}
