package kernel_test

import (
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestSessionsLiveOn opens sessions where the kernel follows no connections
// yet, and goes on with them once it does: it never saw how they began.
func TestSessionsLiveOn(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		type session struct {
			*lab.Session
			name string
		}
		var sessions []session
		for _, to := range m.Server.Both() {
			for _, from := range []lab.Addrs{m.Client, m.Stranger} {
				for _, port := range []uint16{22, 80, 8080} {
					from := from.Like(to)
					s, err := m.Outsider.Dial(from, to, port, lab.Patient)
					if err != nil {
						t.Fatalf("before bootstrap: %v", err)
					}
					t.Cleanup(s.Close)
					sessions = append(sessions, session{s, from.String() + " to port " + lab.Ports(port)})
				}
			}
		}
		talk := func(when string) {
			t.Helper()
			for _, s := range sessions {
				if err := s.Talk(); err != nil {
					t.Errorf("%s: session from %s: %v", when, s.name, err)
				}
			}
		}
		m.bootstrap(t)
		talk("after bootstrap")
		m.wantReach(t, m.Server.V4, 8080, false, false) // new ones are another matter

		for _, family := range families() {
			m.iptables(t, family, "-F")
		}
		m.must(t, exitOK, "verify", "--repair")
		talk("after a flush and its repair")

		for _, family := range families() {
			m.iptables(t, family, "-P", "INPUT", "ACCEPT")
			m.iptables(t, family, "-F")
			m.iptables(t, family, "-X")
		}
		m.must(t, exitOK, "verify", "--repair")
		talk("after all was taken away and repaired")
		m.wantReach(t, m.Server.V6, 8080, false, false)
	})
}
