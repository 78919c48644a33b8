package kernel_test

import (
	"strings"
	"testing"
)

// TestBare runs everything on a machine that has neither iptables nor nft, nor
// any other program.
func TestBare(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "netlink")
	m.path = "/nonexistent"
	m.Host.Listen(t, 22, 80, 8080)
	before := m.everything(t)
	r := m.must(t, exitOK, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service") // with its selftest
	if r.Stderr != "" {
		t.Errorf("bootstrap warns: %s", r.Stderr)
	}
	open := map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody}
	m.wantOpen(t, open)
	m.must(t, exitOK, "verify")
	s := m.status(t, exitOK)
	if s.State != "protected" || s.Backend.Name != "nftables" || !strings.Contains(s.Backend.Reason, "iptables-save is not installed") {
		t.Errorf("state %q, backend %+v", s.State, s.Backend)
	}
	rules := m.rules(t)

	m.nft(t, "delete table inet basicfw")
	m.wantOpen(t, map[string]string{"8080/tcp": everybody})
	if r := m.must(t, exitDrift, "verify"); !named(r.Stdout, []string{"missing", "table inet basicfw"}) {
		t.Errorf("verify does not name the table: %s", r.Stdout)
	}
	if s := m.status(t, exitDrift); s.State != "unprotected" {
		t.Errorf("without the table: state %q", s.State)
	}
	m.must(t, exitOK, "verify", "--repair")
	same(t, "rules after the repair", rules, m.rules(t))

	m.must(t, exitOK, "open", "8080/tcp")
	m.wantOpen(t, map[string]string{"8080/tcp": everybody})
	m.must(t, exitOK, "close", "8080/tcp")
	m.must(t, exitOK, "unlock")
	m.wantSSH(t, true, false)
	m.must(t, exitOK, "lock")
	same(t, "rules after all that", rules, m.rules(t))
	m.wantOpen(t, open)
	if list := m.selftest(t, exitOK).differing(); len(list) > 0 {
		t.Errorf("selftest: %q", list)
	}

	const rule = "insert rule inet basicfw ipv6-input tcp dport 8080 accept"
	m.nft(t, rule)
	m.wantReach(t, m.Server.V6, 8080, true, true)
	if r := m.must(t, exitDrift, "verify"); !named(r.Stdout, []string{ipv6, "extra", "tcp dport 8080 accept"}) {
		t.Errorf("verify does not name the rule: %s", r.Stdout)
	}
	m.must(t, exitOK, "verify", "--repair")
	same(t, "rules after the second repair", rules, m.rules(t))
	service := m.quiet(t)
	for what, commands := range map[string]string{"a rule": rule, "the table": "delete table inet basicfw"} {
		m.nft(t, commands)
		m.back(t, repaired, what, rules)
	}
	m.wantOpen(t, open)
	service.Stop(t)

	m.must(t, exitOK, "uninstall")
	same(t, "after uninstall", before, m.everything(t))
	m.wantOpen(t, map[string]string{"8080/tcp": everybody})
}
