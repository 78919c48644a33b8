package kernel_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

const metricsFile = "/run/basicfw-agent/basicfw.prom"

// metrics returns the metrics by name and labels.
func (m *machine) metrics(t *testing.T) map[string]float64 {
	t.Helper()
	lab.Poll(t, "the metrics", func() bool {
		_, err := os.Stat(filepath.Join(m.root, metricsFile))
		return err == nil
	})
	out := map[string]float64{}
	for _, line := range strings.Split(strings.TrimSpace(m.read(t, metricsFile)), "\n") {
		if strings.HasPrefix(line, "#") {
			continue
		}
		at := strings.LastIndex(line, " ")
		value, err := strconv.ParseFloat(line[at+1:], 64)
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		out[line[:at]] = value
	}
	return out
}

// TestMetrics checks the metrics against packets, and that they name no client.
func TestMetrics(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.bootstrap(t)
		dropped := func(family, rule string) string {
			return fmt.Sprintf(`basicfw_dropped_packets_total{family=%q,rule=%q}`, family, rule)
		}
		for _, to := range m.Server.Both() {
			m.wantReach(t, to, 80, true, true)
			m.wantReach(t, to, 22, true, false)
			m.wantReach(t, to, 8080, false, false)
		}
		began := time.Now().Add(-time.Second)
		m.serve(t)
		got := m.metrics(t)
		policies := []string{dropped(ipv4, "policy"), dropped(ipv6, "policy")}
		if m.netlink {
			policies = []string{dropped("inet", "policy")}
		}
		for _, name := range append(policies, dropped(ipv4, "ssh-drop"), dropped(ipv6, "ssh-drop")) {
			if got[name] == 0 {
				t.Errorf("%s is 0", name)
			}
		}
		for name, want := range map[string]float64{`basicfw_state{state="protected"}`: 1, `basicfw_state{state="exposed"}`: 0, "basicfw_drift": 0,
			"basicfw_exposed_ports": 0, `basicfw_repairs_total{part="rules"}`: 0, dropped(ipv4, "xmas"): 0} {
			if n, ok := got[name]; !ok || n != want {
				t.Errorf("%s is %v, want %v", name, n, want)
			}
		}
		if v := got["basicfw_last_verification_timestamp_seconds"]; v < float64(began.Unix()) {
			t.Errorf("last verification at %v, want after %v", v, began.Unix())
		}
		if text := m.read(t, metricsFile); regexp.MustCompile(`192\.0\.2\.|2001:db8`).MatchString(text) {
			t.Errorf("it has an address:\n%s", text)
		}
		if fi, err := os.Stat(filepath.Join(m.root, metricsFile)); err != nil || fi.Mode() != fs.FileMode(0o644) {
			t.Errorf("%v, %v", fi, err)
		}
	})
}

// TestMetricsCollected checks that promtool and node_exporter accept the metrics.
func TestMetricsCollected(t *testing.T) {
	lab.NeedTools(t, "promtool", "prometheus-node-exporter", "curl")
	on(t, variants[:1], func(t *testing.T, m *machine) {
		m.bootstrap(t)
		m.serve(t)
		m.metrics(t)
		file := filepath.Join(m.root, metricsFile)
		if r := m.Host.Run(t, lab.Command{Args: []string{"promtool", "check", "metrics"}, Stdin: m.read(t, metricsFile)}); r.Code != 0 || r.Stdout+r.Stderr != "" {
			t.Errorf("promtool: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		exporter := m.Host.Start(t, lab.Command{Args: []string{"prometheus-node-exporter", "--collector.disable-defaults", "--collector.textfile",
			"--collector.textfile.directory=" + filepath.Dir(file), "--web.listen-address=127.0.0.1:9100"}})
		defer func() {
			if err := exporter.Terminate(); err != nil {
				t.Error(err)
			}
			exporter.End(t)
		}()
		var page string
		lab.Poll(t, "node_exporter", func() bool {
			r := m.Host.Run(t, lab.Command{Args: []string{"curl", "-s", "http://127.0.0.1:9100/metrics"}})
			page = r.Stdout
			return r.Code == 0
		})
		for _, line := range []string{"node_textfile_scrape_error 0", `basicfw_state{state="protected"} 1`, "basicfw_drift 0"} {
			if !strings.Contains(page, "\n"+line+"\n") {
				t.Errorf("node_exporter lacks %s in\n%s", line, page)
			}
		}
	})
}
