package kernel_test

import (
	"fmt"
	"strings"
	"testing"
)

// closingChains are what other programs and tutorials end INPUT with: chains that drop what
// reaches them, by themselves or through another chain.
const closingChains = `:LOGGING - [0:0]
:REFUSE - [0:0]
:NESTED - [0:0]
:SOME - [0:0]
-A LOGGING -m limit --limit 2/min -j LOG --log-prefix "dropped: "
-A LOGGING -j DROP
-A REFUSE -j REJECT
-A NESTED -p udp -j RETURN
-A NESTED -j LOGGING
-A SOME -p tcp -m tcp --dport 8080 -j ACCEPT
-A SOME -g LOGGING
`

// closingInput returns a filter table whose INPUT ends in a rule.
func closingInput(last string) string {
	return "*filter\n:INPUT DROP [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n" + closingChains + `-A INPUT -i lo -j ACCEPT
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p ipv6-icmp -j ACCEPT
-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT
-A INPUT -p tcp -m tcp --dport 80 -j ACCEPT
-A INPUT ` + last + "\nCOMMIT\n"
}

// wantClosed checks that the machine is closed and that nobody is locked out.
func (m *machine) wantClosed(t *testing.T) {
	t.Helper()
	for _, to := range m.Server.Both() {
		m.wantReach(t, to, 22, true, false)
		m.wantReach(t, to, 80, true, true)
		m.wantReach(t, to, 8080, false, false)
	}
	m.must(t, exitOK, "verify")
	if m.netlink { // iptables does not work: its rules stay, and close what they do not name
		if s := m.status(t, exitDrift); s.State != "blocked" || !strings.Contains(s.Why, "443/tcp") {
			t.Errorf("the state is %s: %s", s.State, s.Why)
		}
	} else if s := m.status(t, exitOK); s.State != "protected" {
		t.Errorf("the state is %s", s.State)
	}
}

// TestClosingChains bootstraps machines whose INPUT ends in a jump to a chain that closes.
// Uninstall restores it.
func TestClosingChains(t *testing.T) {
	for i, last := range []string{"-j LOGGING", "-i eth0 -j LOGGING", "-j REFUSE", "-p tcp -j NESTED", "-j SOME", "-p tcp -j DROP"} {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			onEach(t, func(t *testing.T, m *machine) {
				m.Host.Listen(t, 22, 80, 8080)
				for _, family := range families() {
					m.load(t, family, closingInput(last))
				}
				before := m.rules(t)
				m.bootstrap(t)
				m.wantClosed(t)
				m.must(t, exitOK, "uninstall")
				same(t, "rules after uninstall", before, m.rules(t))
			})
		})
	}
}

// TestClosingRulesLater adds rules that close to a machine that is protected. A repair
// places our jump before them.
func TestClosingRulesLater(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.bootstrap(t)
		for _, rules := range []string{"-A INPUT -p tcp -j DROP", "-A INPUT -p tcp -m tcp --dport 22 -j DROP", "-I INPUT -p tcp -j DROP"} {
			for _, family := range families() {
				m.iptables(t, family, strings.Fields(rules)...)
			}
			m.agent(t, "verify", "--repair")
			m.wantClosed(t)
		}
		// Another program replaces INPUT, as CSF does when it starts.
		for _, family := range families() {
			m.load(t, family, closingInput("-j LOGGING"))
		}
		m.must(t, exitOK, "verify", "--repair")
		m.wantReach(t, m.Server.V4, 22, true, true) // its rules accept SSH
		m.wantReach(t, m.Server.V6, 80, true, true)
		m.must(t, exitOK, "verify")
	})
}
