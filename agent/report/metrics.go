package report

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
)

// Metrics are numbers for Prometheus. They contain no client address.
type Metrics struct {
	Status    Status
	Verified  time.Time // when the service last found no drift, if later than the status
	Conntrack host.Conntrack
	Repairs   map[string]int // by part, since the service started
	Dropped   []firewall.Dropped
}

// Text returns the metrics in the text format of Prometheus.
func (m Metrics) Text() []byte {
	var b strings.Builder
	family := func(name, kind, help string) { fmt.Fprintf(&b, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", name, help, kind) }
	gauge := func(name, help string, value int) {
		family(name, "gauge", help)
		fmt.Fprintf(&b, "%s %d\n", name, value)
	}
	s := m.Status
	family("basicfw_build_info", "gauge", "The version of basicfw-agent.")
	fmt.Fprintf(&b, "basicfw_build_info{version=%s} 1\n", label(s.Version))
	family("basicfw_state", "gauge", "The state, as printed by basicfw-agent status: 1 for the present one.")
	for _, c := range Conditions {
		is := 0
		if c == s.State {
			is = 1
		}
		fmt.Fprintf(&b, "basicfw_state{state=%s} %d\n", label(c), is)
	}
	gauge("basicfw_drift", "Differences between the machine and its desired state.", len(s.Drift))
	gauge("basicfw_exposed_ports", "Ports that other programs' rules open and the settings do not.", s.exposed)
	gauge("basicfw_blocked_ports", "Ports that the settings open and other programs' rules block.", s.blocked)
	family("basicfw_repairs_total", "counter", "Repairs since the service started.")
	for _, part := range slices.Sorted(maps.Keys(m.Repairs)) {
		fmt.Fprintf(&b, "basicfw_repairs_total{part=%s} %d\n", label(part), m.Repairs[part])
	}
	family("basicfw_dropped_packets_total", "counter", "Packets that a rule has dropped since it was loaded.")
	packets := map[[2]string]uint64{}
	for _, d := range m.Dropped {
		packets[[2]string{d.Family, d.Rule}] += d.Packets
	}
	byName := func(x, y [2]string) int { return slices.Compare(x[:], y[:]) }
	for _, of := range slices.SortedFunc(maps.Keys(packets), byName) {
		fmt.Fprintf(&b, "basicfw_dropped_packets_total{family=%s,rule=%s} %d\n", label(of[0]), label(of[1]), packets[of])
	}
	if m.Conntrack.Max > 0 {
		gauge("basicfw_conntrack_entries", "Connections in the conntrack table.", m.Conntrack.Count)
		gauge("basicfw_conntrack_entries_limit", "Maximum number of connections in the conntrack table.", m.Conntrack.Max)
	}
	verified := m.Verified
	if t := s.LastVerified; t != nil && t.After(verified) {
		verified = *t
	}
	if !verified.IsZero() {
		family("basicfw_last_verification_timestamp_seconds", "gauge", "When the machine was last found in its desired state, in Unix time.")
		fmt.Fprintf(&b, "basicfw_last_verification_timestamp_seconds %d\n", verified.Unix())
	}
	return []byte(b.String())
}

// label returns a label's value in quotes.
func label(value string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).Replace(value) + `"`
}

// countPorts returns the number of ports in entries, counting each once for both families.
func countPorts(list []exposure.Entry) int {
	ports := map[string]bool{}
	for _, e := range list {
		ports[fmt.Sprintf("%d/%s", e.Port, e.Proto)] = true
	}
	return len(ports)
}
