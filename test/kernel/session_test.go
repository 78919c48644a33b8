package kernel_test

import (
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestSessionsLiveOn opens sessions before the kernel tracks connections, and keeps using
// them once it does: it has not seen them begin.
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
		m.wantReach(t, m.Server.V4, 8080, false, false) // new connections are dropped

		m.by(t, byFlush, families()...)
		m.must(t, exitOK, "verify", "--repair")
		talk("after a flush and its repair")

		m.by(t, byTakeAway, families()...)
		m.must(t, exitOK, "verify", "--repair")
		talk("after all rules were removed and repaired")
		m.wantReach(t, m.Server.V6, 8080, false, false)
	})
}
