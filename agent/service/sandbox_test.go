package service

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// security has systemd judge a unit. It counts in tenths; its verdict is whether
// the unit is exposed at most as much as we say.
func security(t *testing.T, text string) (words string, err error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), unit)
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(text, "@EXEC@", "/bin/true")), 0o644); err != nil {
		t.Fatal(err)
	}
	res, err := (&system.System{}).Run(context.Background(), system.Command{Name: "systemd-analyze", Args: []string{
		"security", "--offline=true", "--no-pager", "--threshold=25", file}})
	return string(res.Stdout), err
}

// TestExposure holds how far the unit is shut off from the machine.
func TestExposure(t *testing.T) {
	lab.NeedTools(t, "systemd-analyze")
	if words, err := security(t, systemdUnit); err != nil {
		t.Errorf("the unit is exposed by more than 2.5: %v\n%s", err, words)
	}
	if _, err := security(t, strings.Replace(systemdUnit, "ProtectKernelModules=yes\n", "", 1)); err == nil {
		t.Error("a unit that may load modules is as good: this test proves nothing")
	}
}
