//go:build vm

package vm

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// checkWatching damages a machine whose service runs in its sandbox: the rules, the
// persisted files and the service's own unit have to be repaired.
func (s *site) checkWatching(t *testing.T, m *Machine) {
	session := s.dial(t, s.wire.Client.V4, s.wire.Machine.V4, 80)
	defer session.Close()
	const unit = "/etc/systemd/system/basicfw-agent.service"
	good := m.Must(t, "cat "+s.backend.files+" "+unit)
	all := append(slices.Clone(s.backend.damage),
		damage{"systemctl disable basicfw-agent 2>&1", nil},
		damage{"rm " + unit + "; systemctl daemon-reload", []string{"service basicfw-agent: missing: registered"}})
	for _, d := range all {
		// The damage is complete before the service checks, also on a slow machine.
		m.Must(t, "flock /run/basicfw-agent/lock sh -c '"+d.script+"'")
		start := time.Now()
		until(t, 2*time.Minute, "the repair after "+d.script, func() error {
			// Wait until the repair has finished.
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
		t.Errorf("a session opened before: %v", err)
	}
	log := m.Must(t, "journalctl -b -u basicfw-agent --no-pager")
	for _, d := range all {
		for _, words := range d.says {
			if !strings.Contains(log, words) {
				t.Errorf("the log lacks %q:\n%s", words, log)
			}
		}
	}
	until(t, time.Minute, "the service to have at most 15 MB resident", func() error {
		var resident, program int // kB
		out := m.Must(t, `awk '/^VmRSS:|^RssFile:/ { print $2 }' "/proc/$(systemctl show -p MainPID --value basicfw-agent)/status"`)
		if _, err := fmt.Sscan(out, &resident, &program); err != nil || resident > 15000 {
			return fmt.Errorf("%d kB, %d of them of the program file, %v", resident, program, err)
		}
		t.Logf("the service has %d kB resident, %d of them of the program file", resident, program)
		return nil
	})
	if strings.Contains(log, "level=error") || strings.Contains(log, "only once a minute") {
		t.Errorf("the service logged errors:\n%s", log)
	}
	s.checkProtected(t, m, webMail)
}
