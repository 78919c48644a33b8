//go:build vm

package vm

import (
	"fmt"
	"testing"
	"time"
)

// checkWithoutVar wipes the state's directory three times: under the service, whose sandbox
// cannot make it again, before its next start, and before a boot. The rules stay, and the
// state is restored.
func (s *site) checkWithoutVar(t *testing.T, m *Machine) {
	const wipe = "rm -r /var/lib/basicfw; "
	// The backup, which the removal restores, has no copy.
	m.Must(t, "cp -a /var/lib/basicfw/backup /root/backup")
	before := m.Must(t, "rules")
	restored := func(when string) {
		t.Helper()
		if now := m.Must(t, "rules"); now != before {
			t.Errorf("%s, the rules are\n%s\nand were\n%s", when, now, before)
		}
		m.Must(t, "cmp /var/lib/basicfw/state.json /etc/basicfw/state.json && test \"$(stat -c %a%U /var/lib/basicfw)\" = 700root && basicfw-agent verify")
	}

	m.Must(t, "flock /run/basicfw-agent/lock sh -c '"+wipe+s.backend.damage[0].script+"'")
	until(t, 30*time.Second, "the rules to be back without the state", func() error {
		if now := m.Must(t, "rules"); now != before {
			return fmt.Errorf("they are\n%s", now)
		}
		return nil
	})
	m.Must(t, "systemctl restart basicfw-agent")
	restored("after a restart of the service")

	m.Must(t, "systemctl stop basicfw-agent; "+wipe)
	since := time.Now()
	m.Reboot(t)
	s.checkBoot(t, m, since)
	restored("after a boot")
	s.checkProtected(t, m, webMail)
	s.checkLog(t, m)
	m.Must(t, "mv /root/backup /var/lib/basicfw/backup")
}
