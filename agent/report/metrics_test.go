package report

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
)

func TestMetrics(t *testing.T) {
	status := time.Unix(1000, 0)
	got := string(Metrics{
		Status: Status{Version: `0.2"\` + "\n", State: Exposed, Conditions: []string{Exposed, Pending}, Drift: make([]firewall.Drift, 3), LastVerified: &status,
			SSH: SSHStatus{Allow: []string{"203.0.113.9/32"}}, exposed: 2, blocked: 1},
		Verified: time.Unix(2000, 5e8), Conntrack: host.Conntrack{Max: 65536, Count: 12},
		Repairs: map[string]int{"rules": 4, "files": 0},
		Dropped: []firewall.Dropped{{Family: "ipv6", Rule: "null", Packets: 1}, {Family: "ipv4", Rule: "spoofed-loopback", Packets: 2},
			{Family: "ipv4", Rule: "spoofed-loopback", Packets: 3}, {Family: "ipv4", Rule: firewall.Policy}},
	}.Text())
	want := `# HELP basicfw_build_info The version of basicfw-agent.
# TYPE basicfw_build_info gauge
basicfw_build_info{version="0.2\"\\\n"} 1
# HELP basicfw_state The state, as printed by basicfw-agent status: 1 for the present one.
# TYPE basicfw_state gauge
basicfw_state{state="not-bootstrapped"} 0
basicfw_state{state="unprotected"} 0
basicfw_state{state="failsafe"} 0
basicfw_state{state="unlocked"} 0
basicfw_state{state="drifted"} 0
basicfw_state{state="exposed"} 1
basicfw_state{state="blocked"} 0
basicfw_state{state="pending"} 0
basicfw_state{state="protected"} 0
# HELP basicfw_drift Differences between the machine and its desired state.
# TYPE basicfw_drift gauge
basicfw_drift 3
# HELP basicfw_exposed_ports Ports that other programs' rules open and the settings do not.
# TYPE basicfw_exposed_ports gauge
basicfw_exposed_ports 2
# HELP basicfw_blocked_ports Ports that the settings open and other programs' rules block.
# TYPE basicfw_blocked_ports gauge
basicfw_blocked_ports 1
# HELP basicfw_repairs_total Repairs since the service started.
# TYPE basicfw_repairs_total counter
basicfw_repairs_total{part="files"} 0
basicfw_repairs_total{part="rules"} 4
# HELP basicfw_dropped_packets_total Packets that a rule has dropped since it was loaded.
# TYPE basicfw_dropped_packets_total counter
basicfw_dropped_packets_total{family="ipv4",rule="policy"} 0
basicfw_dropped_packets_total{family="ipv4",rule="spoofed-loopback"} 5
basicfw_dropped_packets_total{family="ipv6",rule="null"} 1
# HELP basicfw_conntrack_entries Connections in the conntrack table.
# TYPE basicfw_conntrack_entries gauge
basicfw_conntrack_entries 12
# HELP basicfw_conntrack_entries_limit Maximum number of connections in the conntrack table.
# TYPE basicfw_conntrack_entries_limit gauge
basicfw_conntrack_entries_limit 65536
# HELP basicfw_last_verification_timestamp_seconds When the machine was last found in its desired state, in Unix time.
# TYPE basicfw_last_verification_timestamp_seconds gauge
basicfw_last_verification_timestamp_seconds 2000
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
