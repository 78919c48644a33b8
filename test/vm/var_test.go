//go:build vm

package vm

import (
	"fmt"
	"testing"
	"time"
)

const wipe = "rm -r /var/lib/basicfw; "

// checkWithoutVar wipes the state's directory under the service, whose sandbox cannot make
// it again, and restarts the service. The rules stay, and the state is restored. What has no
// copy, the backup, is kept for the removal.
func (s *site) checkWithoutVar(t *testing.T, m *Machine) {
	m.Must(t, "cp -a /var/lib/basicfw/backup /root/backup")
	before := m.Must(t, "rules")
	m.Must(t, "flock /run/basicfw-agent/lock sh -c '"+wipe+s.backend.damage[0].script+"'")
	until(t, 30*time.Second, "the rules to be back without the state", func() error {
		if now := m.Must(t, "rules"); now != before {
			return fmt.Errorf("they are\n%s", now)
		}
		return nil
	})
	m.Must(t, "systemctl restart basicfw-agent")
	s.checkRestored(t, m, before)
}

// checkRestored checks that rules and state are as before.
func (s *site) checkRestored(t *testing.T, m *Machine, before string) {
	t.Helper()
	if now := m.Must(t, "rules"); now != before {
		t.Errorf("the rules are\n%s\nand were\n%s", now, before)
	}
	m.Must(t, "cmp /var/lib/basicfw/state.json /etc/basicfw/state.json && test \"$(stat -c %a%U /var/lib/basicfw)\" = 700root && basicfw-agent verify")
}

// checkBroken boots the machine with damaged rules and files, and without the state's
// directory: all of it is restored from the copy of the state.
func (s *site) checkBroken(t *testing.T, m *Machine) {
	rules, files := m.Must(t, "rules"), m.Must(t, "cat "+s.backend.files)
	m.Must(t, "set -e; systemctl stop basicfw-agent; "+s.backend.spoil)
	if out, code := m.Run(t, "basicfw-agent verify"); code != 3 {
		t.Fatalf("verify of broken rules: exit code %d\n%s", code, out)
	}
	m.Must(t, wipe)
	since := time.Now()
	m.Reboot(t)
	s.checkBoot(t, m, since)
	s.checkRestored(t, m, rules)
	s.checkProtected(t, m, webMail)
	if now := m.Must(t, "cat "+s.backend.files); now != files {
		t.Errorf("the persisted files are\n%s\nand were before the damage\n%s", now, files)
	}
	s.checkLog(t, m)
	m.Must(t, "mv /root/backup /var/lib/basicfw/backup")
}
