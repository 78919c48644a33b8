package files

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// TestRestoreWritesOnlyChanges checks that a file that is as it was is not written again.
func TestRestoreWritesOnlyChanges(t *testing.T) {
	sys := &system.System{Root: t.TempDir()}
	path := filepath.Join(sys.Root, "etc/rules")
	if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("before"), 0o600); err != nil {
		t.Fatal(err)
	}
	was, err := Snapshot(sys, "/etc/rules")
	if err != nil {
		t.Fatal(err)
	}
	first, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := was.Restore(sys); err != nil {
		t.Fatal(err)
	}
	if second, err := os.Stat(path); err != nil || !os.SameFile(first, second) {
		t.Errorf("the file was written again: %v", err)
	}
	if err := os.WriteFile(path, []byte("after"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := was.Restore(sys); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(path); err != nil || string(data) != "before" {
		t.Errorf("restored %q, %v", data, err)
	}
}
