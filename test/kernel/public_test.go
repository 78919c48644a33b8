package kernel_test

import (
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestPublicTexts adds rules of other programs whose chains, comments and targets contain
// an address: what all users may read does not show it.
func TestPublicTexts(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		const secret = "198.51.100.77"
		m.Host.Listen(t, 22, 80)
		m.bootstrap(t)
		s := m.serve(t)
		defer s.Stop(t)
		for _, rule := range []string{
			"-t nat -N c" + secret, "-t nat -A PREROUTING -j c" + secret,
			"-t nat -A c" + secret + " -p tcp -m tcp --dport 9999 -j DNAT --to-destination " + secret + ":4444",
			"-t raw -A PREROUTING -p tcp -m tcp --dport 80 -m comment --comment admin:" + secret + " -j DROP",
			"-I INPUT -s " + secret + " -p tcp -m tcp --dport 8080 -m comment --comment admin:" + secret + " -j ACCEPT",
			"-I INPUT -p tcp -m tcp --dport 8081 -m comment --comment admin:" + secret + " -j ACCEPT",
		} {
			m.iptables(t, ipv4, strings.Fields(rule)...)
		}
		m.must(t, exitOK, "open", "8082/tcp", "--from", secret)
		lab.Poll(t, "the service to follow", func() bool {
			public := m.read(t, publicStatus)
			return strings.Contains(public, `"8082"`) && strings.Contains(public, `"9999"`)
		})
		if whole := m.agent(t, "status", "--json").Stdout; !strings.Contains(whole, "c"+secret) || !m.netlink && (!strings.Contains(whole, secret+":4444") || !strings.Contains(whole, "admin:"+secret)) {
			t.Errorf("the whole status lacks what must not be public: this test proves less\n%s", whole)
		}
		for _, path := range []string{publicStatus, message} {
			if text := m.read(t, path); strings.Contains(text, secret) {
				t.Errorf("%s contains %s:\n%s", path, secret, text)
			}
		}
	})
}
