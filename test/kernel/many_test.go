package kernel_test

import (
	"fmt"
	"strings"
	"testing"
)

// TestManyNetworks lists more networks than iptables, which needs a rule for each, may
// have. It refuses them and names the backend that holds them in one set, which auto
// chooses at first boot.
func TestManyNetworks(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 7)
		list := func(n int) string {
			var from []string
			for i := range n - 1 {
				from = append(from, fmt.Sprintf("10.%d.%d.0/25", i>>8, i&255))
			}
			return "[open]\necho = 7/tcp from " + strings.Join(append(from, m.Client.V4.String()), ", ") + "\n"
		}
		open := func(backend string, lines int) {
			t.Helper()
			m.wantOpen(t, map[string]string{"7/tcp": "client4"})
			if s := m.status(t, exitOK); s.Backend.Name != backend {
				t.Errorf("the backend is %+v", s.Backend)
			}
			if n := strings.Count(m.rules(t), "/25"); n != lines {
				t.Errorf("%d networks, want %d", n, lines)
			}
		}
		m.write(t, agentINI, "[agent]\nbackend = iptables\n"+list(500), 0o640)
		m.bootstrap(t)
		open("iptables", 2*499) // for INPUT and what is published
		before := m.everything(t)
		m.write(t, agentINI, "[agent]\nbackend = iptables\n"+list(501), 0o640)
		for _, args := range [][]string{{"apply"}, {"apply", "--no-rehearsal"}} {
			r := m.must(t, exitFailed, args...)
			oneLine(t, r.Stderr, "echo", "500", "backend = nftables")
		}
		m.write(t, agentINI, "[agent]\nbackend = iptables\n"+list(500), 0o640)
		same(t, "after the refusal", before, m.everything(t))
		m.must(t, exitOK, "uninstall")

		m.write(t, agentINI, list(10000), 0o640)
		m.bootstrap(t)
		open("nftables", 9999)
		m.must(t, exitOK, "selftest")
	})
}
