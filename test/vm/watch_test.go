//go:build vm

package vm

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// checkWatching breaks a machine whose service runs in its sandbox: the rules,
// the files that keep them, and the service's own unit have to come back.
func (s *site) checkWatching(t *testing.T, m *Machine) {
	session := s.dial(t, s.wire.Client.V4, s.wire.Machine.V4, 80)
	defer session.Close()
	const unit = "/etc/systemd/system/basicfw-agent.service"
	good := m.Must(t, "cat "+s.backend.files+" "+unit)
	all := append(slices.Clone(s.backend.damage),
		damage{"systemctl disable basicfw-agent 2>&1", nil},
		damage{"rm " + unit + "; systemctl daemon-reload", []string{"service basicfw-agent: missing: registered"}})
	for _, d := range all {
		// All of it before the service looks: it takes a while on a slow machine.
		m.Must(t, "flock /run/basicfw-agent/lock sh -c '"+d.script+"'")
		start := time.Now()
		until(t, 30*time.Second, "the repair after "+d.script, func() error {
			// Not before the repair has ended.
			if out, code := m.Run(t, "flock -w 5 /run/basicfw-agent/lock true && basicfw-agent verify"); code != 0 {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
		t.Logf("repaired %v after %s", time.Since(start).Round(time.Millisecond), d.script)
	}
	if now := m.Must(t, "cat "+s.backend.files+" "+unit); now != good {
		t.Errorf("the files are\n%s\nand were\n%s", now, good)
	}
	if out, code := m.Run(t, "systemctl is-enabled basicfw-agent && systemctl is-active basicfw-agent"); code != 0 {
		t.Errorf("the service: %s", out)
	}
	if err := session.Talk(30 * time.Second); err != nil {
		t.Errorf("a session of before: %v", err)
	}
	log := m.Must(t, "journalctl -b -u basicfw-agent --no-pager")
	for _, d := range all {
		for _, words := range d.says {
			if !strings.Contains(log, words) {
				t.Errorf("the log does not say %q:\n%s", words, log)
			}
		}
	}
	if strings.Contains(log, "level=error") || strings.Contains(log, "only once a minute") {
		t.Errorf("the service has complained:\n%s", log)
	}
	s.checkProtected(t, m, webMail)
}
