//go:build vm

package vm

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// testSandbox has the service do all that it is for, in the sandbox of its unit,
// with both variants of iptables, each from a boot on that finds none of their
// modules loaded.
func (s *site) testSandbox(t *testing.T, m *Machine) {
	// systemd 252 gives tenths, and here takes them as whole numbers.
	if out, code := m.Run(t, "systemd-analyze security --no-pager --threshold=25 basicfw-agent.service"); code != 0 {
		t.Errorf("the unit is exposed more than 2.5:\n%s", out)
	}
	for _, variant := range []string{"nft", "legacy"} {
		t.Run(variant, func(t *testing.T) {
			m.Must(t, fmt.Sprintf("update-alternatives --set iptables /usr/sbin/iptables-%s && update-alternatives --set ip6tables /usr/sbin/ip6tables-%[1]s", variant))
			since := time.Now()
			m.Reboot(t)
			s.checkBoot(t, m, since)
			s.checkProtected(t, m, webOnly)
			for kind, marks := range map[string]string{"nft": "chain BASICFW-INPUT", "legacy": ":BASICFW-INPUT"} {
				out := m.Must(t, map[string]string{"nft": "nft list ruleset", "legacy": "iptables-legacy-save; ip6tables-legacy-save"}[kind])
				if got, want := strings.Count(out, marks), map[bool]int{true: 2}[kind == variant]; got != want {
					t.Errorf("the rules of %s have our chain %d times, want %d:\n%s", kind, got, want, out)
				}
			}
			s.checkJob(t, m)
			s.checkProtected(t, m, webOnly)
			s.checkUncomplaining(t, m)
		})
	}
}

// checkJob changes a machine and has the service follow, repair and end things.
func (s *site) checkJob(t *testing.T, m *Machine) {
	t.Helper()
	const settled = "flock -w 5 /run/basicfw-agent/lock true && basicfw-agent verify"
	stranger := func(port uint16, want bool) {
		t.Helper()
		says := greeting(port)
		if port == 2222 {
			says = greeting(22)
		}
		for _, to := range s.wire.Machine.Both() {
			until(t, answerLimit, fmt.Sprintf("port %d to be open: %v", port, want), func() error {
				limit := silence
				if want {
					limit = answerLimit
				}
				c, err := s.wire.Dial(s.wire.Stranger.Like(to), to, port, says, limit)
				if err == nil {
					c.Close()
				}
				if (err == nil) != want {
					return fmt.Errorf("to %v: %v", to, err)
				}
				return nil
			})
		}
	}

	m.Must(t, "iptables -F; iptables -X; ip6tables -F; ip6tables -P INPUT ACCEPT")
	until(t, 2*time.Minute, "the repair of a flush", func() error {
		if out, code := m.Run(t, settled); code != 0 {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	stranger(8080, false)

	m.Must(t, "printf 'Port 22\nPort 2222\n' >/etc/ssh/sshd_config.d/lab.conf && systemctl restart ssh")
	stranger(2222, true)
	m.Must(t, "rm /etc/ssh/sshd_config.d/lab.conf && systemctl restart ssh")
	stranger(2222, false)

	m.Must(t, "ip link add lab0 type dummy && ip addr add 10.9.9.1/24 dev lab0 && ip link set lab0 up")
	s.wantPublic(t, m, `"name": "lab0"`, true)
	m.Must(t, "ip link del lab0")
	s.wantPublic(t, m, `"name": "lab0"`, false)

	// A reload is apply, within the sandbox.
	m.Must(t, `cp -p /etc/basicfw/agent.ini /root
		printf '\n[open]\nx = 23/tcp\n' >>/etc/basicfw/agent.ini
		systemctl reload basicfw-agent`)
	stranger(23, true)
	m.Must(t, "cp -p /root/agent.ini /etc/basicfw/agent.ini && systemctl reload basicfw-agent")
	stranger(23, false)

	m.Must(t, `printf '\n[open]\nx = 23/tcp\n' >>/etc/basicfw/agent.ini
		basicfw-agent apply --confirm 20s`)
	s.wantPublic(t, m, `"state": "pending"`, true)
	stranger(23, true)
	s.wantPublic(t, m, `"state": "pending"`, false)
	stranger(23, false)
	m.Must(t, "cp -p /root/agent.ini /etc/basicfw/agent.ini && rm /root/agent.ini && basicfw-agent apply")

	m.Must(t, "basicfw-agent open 60000/tcp --for 10s")
	s.wantSettings(t, m, "60000", true)
	s.wantSettings(t, m, "60000", false)
	m.Must(t, "basicfw-agent unlock --all --for 10s")
	s.wantPublic(t, m, `"state": "unlocked"`, true)
	s.wantText(t, m, "/etc/motd.d/basicfw", "basicfw-agent lock", true)
	s.wantPublic(t, m, `"state": "unlocked"`, false)
	stranger(8080, false)
}

// checkUncomplaining checks that nothing of what the service did in this boot
// was forbidden to it.
func (s *site) checkUncomplaining(t *testing.T, m *Machine) {
	t.Helper()
	log := m.Must(t, "journalctl -b -o cat --no-pager UNIT=basicfw-agent.service + _SYSTEMD_UNIT=basicfw-agent.service")
	for _, line := range strings.Split(log, "\n") {
		for _, word := range []string{"level=error", "not permitted", "ermission denied", "ead-only file system", "only once a minute", "FAILURE", "seccomp"} {
			if strings.Contains(line, word) {
				t.Errorf("the service was kept from something: %s", line)
			}
		}
	}
	if out, code := m.Run(t, "journalctl -b -k --no-pager | grep 'type=1326'"); code == 0 {
		t.Errorf("the kernel says: %s", out)
	}
}
