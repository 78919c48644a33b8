//go:build vm

package vm

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// checkDayTwo opens and closes ports on a machine whose service runs in its sandbox: rules,
// settings, status and login message have to follow.
func (s *site) checkDayTwo(t *testing.T, m *Machine) {
	// The prober uses up the SSH limit of the stranger's address.
	lockedOut := s.wire.Router.V4
	closed := func(port uint16) {
		t.Helper()
		for _, to := range s.wire.Machine.Both() {
			if c, err := s.wire.Dial(s.wire.Stranger.Like(to), to, port, greeting(port), silence); err == nil {
				c.Close()
				t.Errorf("port %d of %v answers", port, to)
			}
		}
	}
	open := func(port uint16) {
		t.Helper()
		for _, to := range s.wire.Machine.Both() {
			s.dial(t, s.wire.Stranger.Like(to), to, port).Close()
		}
	}
	closed(60000)
	m.Must(t, "basicfw-agent open 60000/tcp")
	open(60000)
	s.wantPublic(t, m, `"name": "tcp-60000"`, true)
	m.Must(t, "basicfw-agent close 60000/tcp && basicfw-agent close 443/tcp")
	closed(60000)
	closed(443)
	s.wantPublic(t, m, `"name": "https"`, false)
	m.Must(t, "basicfw-agent open 443/tcp")
	open(443)

	// The service removes a temporary port when it expires.
	s.answersDuring(t, 60000, func() { m.Must(t, "basicfw-agent open 60000/tcp --for 20s") })
	s.wantSettings(t, m, "60000", false)
	closed(60000)
	if out, code := m.Run(t, "rules | grep basicfw-tcp-60000"); code == 0 {
		t.Errorf("a rule is left: %s", out)
	}

	// A client is locked out, and unlocked from the console.
	if out, code := s.login(t, lockedOut, "true", silence); code == 0 {
		t.Fatalf("a stranger could log in: %s", out)
	}
	m.Must(t, "basicfw-agent unlock --for 10m")
	if out := m.Must(t, "cat /etc/motd.d/basicfw"); !strings.Contains(out, "basicfw-agent lock") {
		t.Errorf("the login message says %q", out)
	}
	out, code := s.login(t, lockedOut, "sudo basicfw-agent ssh allow me && sudo basicfw-agent lock; sudo basicfw-agent status", time.Minute)
	if code != 0 || !strings.Contains(out, lockedOut.String()+" may log in") || !strings.Contains(out, "\nyour session "+lockedOut.String()+", allowed (") {
		t.Errorf("as the stranger: exit code %d\n%s", code, out)
	}
	if out, code := s.login(t, lockedOut, "sudo basicfw-agent ssh remove "+lockedOut.String(), time.Minute); code != 1 || !strings.Contains(out, "could not log in again") {
		t.Errorf("removing the caller's address: exit code %d\n%s", code, out)
	}
	m.Must(t, "basicfw-agent ssh remove "+lockedOut.String())
	if out, code := s.login(t, lockedOut, "true", silence); code == 0 {
		t.Errorf("a stranger could log in again: %s", out)
	}
	// When the unlock expires, the service removes the message, then the rule.
	m.Must(t, "basicfw-agent unlock --for 3s")
	until(t, answerLimit, "the login message and the rule to be removed", func() error {
		if out, code := m.Run(t, "cat /etc/motd.d/basicfw || flock /run/basicfw-agent/lock grep basicfw-unlock "+s.backend.files); code == 0 {
			return fmt.Errorf("found %s", out)
		}
		return nil
	})
	if out, code := m.Run(t, "journalctl -b -u basicfw-agent --no-pager | grep -E 'level=(warning|error)'"); code == 0 {
		t.Errorf("the service logged warnings or errors:\n%s", out)
	}
}

// answersDuring runs a function that opens a port temporarily, and checks that a stranger
// reaches it in both families. On a busy computer the function may return when the port has
// closed again.
func (s *site) answersDuring(t *testing.T, port uint16, open func()) {
	t.Helper()
	var both sync.WaitGroup
	for _, to := range s.wire.Machine.Both() {
		both.Add(1)
		go func() {
			defer both.Done()
			for end := time.Now().Add(scriptLimit); ; {
				c, err := s.wire.Dial(s.wire.Stranger.Like(to), to, port, greeting(port), silence)
				if err == nil {
					c.Close()
					return
				}
				if time.Now().After(end) {
					t.Errorf("port %d of %v does not answer: %v", port, to, err)
					return
				}
			}
		}()
	}
	open()
	both.Wait()
}

// wantPublic waits until the status for monitoring contains a text, or does not.
func (s *site) wantPublic(t *testing.T, m *Machine, text string, there bool) {
	t.Helper()
	s.wantText(t, m, "/run/basicfw-agent/status.json", text, there)
}

// wantSettings waits until local.ini contains a text, or does not.
func (s *site) wantSettings(t *testing.T, m *Machine, text string, there bool) {
	t.Helper()
	s.wantText(t, m, "/etc/basicfw/local.ini", text, there)
}

func (s *site) wantText(t *testing.T, m *Machine, file, text string, there bool) {
	t.Helper()
	until(t, time.Minute, fmt.Sprintf("%s to hold %s: %v", file, text, there), func() error {
		if out := m.Must(t, "cat "+file); strings.Contains(out, text) != there {
			return fmt.Errorf("it holds\n%s", out)
		}
		return nil
	})
}
