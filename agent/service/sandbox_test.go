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

// security returns systemd's rating of a unit. The error reports that its exposure is
// over the threshold, which is in tenths.
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

// TestExposure limits the exposure of the unit.
func TestExposure(t *testing.T) {
	lab.NeedTools(t, "systemd-analyze")
	if words, err := security(t, systemdUnit); err != nil {
		t.Errorf("the exposure of the unit is over 2.5: %v\n%s", err, words)
	}
	if _, err := security(t, strings.Replace(systemdUnit, "ProtectKernelModules=yes\n", "", 1)); err == nil {
		t.Error("a unit that may load modules passes: this test proves nothing")
	}
}
