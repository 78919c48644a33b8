// Package prometheus tests the example alerts.
package prometheus

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestAlerts runs the unit tests of the alerts with promtool, and checks that they use
// metrics that exist.
func TestAlerts(t *testing.T) {
	lab.NeedTools(t, "promtool")
	if out, err := exec.Command("promtool", "test", "rules", "basicfw.test.yml").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	rules, err := os.ReadFile("basicfw.rules.yml")
	if err != nil {
		t.Fatal(err)
	}
	metrics := string(report.Metrics{Verified: time.Now(), Conntrack: host.Conntrack{Max: 1}}.Text())
	names := regexp.MustCompile(`basicfw_\w+`).FindAllString(string(rules), -1)
	if len(names) == 0 {
		t.Error("the alerts use no metric")
	}
	for _, name := range names {
		if !strings.Contains(metrics, "# HELP "+name+" ") {
			t.Errorf("%s is no metric", name)
		}
	}
}
