package kernel_test

import (
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// incompatible makes iptables-save print "Table `filter' is incompatible" and no rule of it.
const incompatible = `add table ip filter
add chain ip filter FORWARD { type filter hook forward priority 0; }
add rule ip filter FORWARD ct state invalid drop
`

// filterOf returns the table filter of IPv4 as nft prints it, without counters.
func (m *machine) filterOf(t *testing.T) string {
	t.Helper()
	r := m.Host.Run(t, lab.Command{Args: []string{"nft", "-s", "list", "table", "ip", "filter"}})
	return r.Stdout
}

// TestIncompatibleTable bootstraps a machine whose table filter iptables cannot print. It is
// not taken for an empty one: the rules go into nftables, or nowhere, and nothing of ours is
// left in the table.
func TestIncompatibleTable(t *testing.T) {
	on(t, variants[:1], func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.nftables(t, incompatible)
		before, rules := m.filterOf(t), m.rules(t)
		says(t, before, "ct state invalid drop")
		r := m.must(t, exitFailed, "bootstrap", "--no-service", "--backend", "iptables", "--client-ip", m.Client.V4.String())
		says(t, r.Stderr, "table ip filter has rules that iptables-save cannot print", "hint: set \"backend = nftables\"")
		same(t, "the rules after a refused bootstrap", rules, m.rules(t))
		says(t, m.must(t, exitOK, "bootstrap", "--no-service", "--client-ip", m.Client.V4.String()).Stdout, "nf_tables over netlink")
		m.wantReach(t, m.Server.V4, 80, true, true)
		m.wantReach(t, m.Server.V4, 22, true, false)
		m.wantReach(t, m.Server.V4, 8080, false, false)
		m.must(t, exitOK, "verify")
		if s := m.status(t, exitOK); s.State != "protected" {
			t.Errorf("state %s", s.State)
		}
		same(t, "table ip filter", before, m.filterOf(t))
		m.must(t, exitOK, "uninstall")
		same(t, "table ip filter after uninstall", before, m.filterOf(t))
	})
}

// TestTableBecomesIncompatible adds such a rule to a machine whose rules are in iptables. The
// service moves them to nftables, and leaves nothing of ours in the table.
func TestTableBecomesIncompatible(t *testing.T) {
	on(t, variants[:1], func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.bootstrap(t)
		service := m.start(t, "run")
		for range 3 { // the first time the rules move, then they stay
			m.nftables(t, incompatible)
			lab.Poll(t, "the rules to be in nftables", func() bool {
				return !strings.Contains(m.filterOf(t), "BASICFW") && m.agent(t, "verify").Code == exitOK
			})
		}
		if text := m.filterOf(t); strings.Contains(text, "BASICFW") || !strings.Contains(text, "ct state invalid drop") || strings.Contains(text, "policy drop") {
			t.Errorf("table ip filter is\n%s", text)
		}
		m.wantReach(t, m.Server.V4, 80, true, true)
		m.wantReach(t, m.Server.V6, 22, true, false)
		m.wantReach(t, m.Server.V4, 8080, false, false)
		if s := m.status(t, exitOK); s.State != "protected" {
			t.Errorf("state %s", s.State)
		}
		service.Stop(t)
		m.must(t, exitOK, "uninstall")
		if text := m.rules(t); strings.Contains(text, "BASICFW") || strings.Contains(text, "basicfw") {
			t.Errorf("uninstall left\n%s", text)
		}
		m.wantReach(t, m.Server.V4, 8080, true, true)
	})
}

// TestMisprintedRules bootstraps a machine with rules in INPUT that iptables-save prints as
// bare "-j DROP" and "-j ACCEPT". They stay as they are, and uninstall leaves them so.
func TestMisprintedRules(t *testing.T) {
	on(t, variants[:1], func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.iptables(t, ipv4, "-A", "INPUT", "-p", "tcp", "--dport", "7", "-j", "ACCEPT")
		m.nftables(t, "add set ip filter bad { type ipv4_addr; elements = { 203.0.113.66 }; }\n"+
			"insert rule ip filter INPUT ip saddr @bad counter drop\ninsert rule ip filter INPUT ip saddr @bad tcp dport 9 counter accept\n")
		before := m.filterOf(t)
		says(t, before, "ip saddr @bad counter", "ip saddr @bad tcp dport 9")
		m.must(t, exitOK, "bootstrap", "--no-service", "--client-ip", m.Client.V4.String())
		m.wantReach(t, m.Server.V4, 80, true, true)
		m.wantReach(t, m.Server.V4, 22, true, false)
		m.wantReach(t, m.Server.V4, 8080, false, false)
		same(t, "table ip filter after bootstrap", before, m.filterOf(t))
		m.must(t, exitOK, "verify", "--repair")
		same(t, "table ip filter after a repair", before, m.filterOf(t))
		m.must(t, exitOK, "uninstall")
		same(t, "table ip filter after uninstall", before, m.filterOf(t))
	})
}

// nftables loads commands of nft.
func (m *machine) nftables(t *testing.T, commands string) {
	t.Helper()
	if r := m.Host.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: commands}); r.Code != 0 {
		t.Fatalf("nft: %s", r.Stderr)
	}
}
