package daemon

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// TestMeasure checks that the metrics follow repairs and verifications without a new status.
func TestMeasure(t *testing.T) {
	w, _ := newWatched(t)
	ctx := context.Background()
	metrics := func() string {
		t.Helper()
		w.daemon.measure(ctx)
		data, err := os.ReadFile(w.Path(MetricsFile))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	w.daemon.measure(ctx)
	if _, err := os.Stat(w.Path(MetricsFile)); err == nil {
		t.Error("metrics were written before there is a status")
	}
	w.public(t)
	if text := metrics(); !strings.Contains(text, `basicfw_state{state="protected"} 1`) || !strings.Contains(text, `basicfw_repairs_total{part="rules"} 0`) {
		t.Errorf("got\n%s", text)
	}
	fi, err := os.Stat(w.Path(MetricsFile))
	if err != nil || fi.Mode() != 0o644 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	w.Kernel.Rules = firewall.Ruleset{}
	if _, err := w.check(time.Minute); err != nil {
		t.Fatal(err)
	}
	w.Write(t, w.Files.Path(firewall.IPv4), "")
	if _, err := w.check(time.Minute); err != nil {
		t.Fatal(err)
	}
	if _, err := w.check(time.Minute); err != nil {
		t.Fatal(err)
	}
	w.dropped = []firewall.Dropped{{Family: "ipv6", Rule: "xmas", Packets: 5}}
	text := metrics()
	for _, line := range []string{`basicfw_repairs_total{part="rules"} 1`, `basicfw_repairs_total{part="files"} 1`, `basicfw_repairs_total{part="service"} 0`,
		`basicfw_dropped_packets_total{family="ipv6",rule="xmas"} 5`, fmt.Sprintf("basicfw_last_verification_timestamp_seconds %d\n", w.Now.Time.Unix())} {
		if !strings.Contains(text, line) {
			t.Errorf("%s is missing in\n%s", line, text)
		}
	}
}
