//go:build vm

package vm

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// testSandbox tests in the unit's sandbox what other tests do not: iptables' nft variant on
// a machine that has just been closed, and the legacy variant from a boot on that finds
// none of its modules loaded.
func (s *site) testSandbox(t *testing.T, m *Machine) {
	// The threshold is in tenths.
	if out, code := m.Run(t, "systemd-analyze security --no-pager --threshold=25 basicfw-agent.service"); code != 0 {
		t.Errorf("the unit's exposure level is above 2.5:\n%s", out)
	}
	t.Run("nft", func(t *testing.T) {
		s.checkJob(t, m)
		s.checkLog(t, m)
	})
	t.Run("legacy", func(t *testing.T) {
		m.Must(t, "update-alternatives --set iptables /usr/sbin/iptables-legacy && update-alternatives --set ip6tables /usr/sbin/ip6tables-legacy")
		m.withoutCloudInit(t)
		since := time.Now()
		m.Reboot(t)
		s.checkBoot(t, m, since)
		if out := m.Must(t, "iptables-legacy-save; ip6tables-legacy-save; nft list ruleset"); strings.Count(out, ":BASICFW-INPUT") != 2 || strings.Contains(out, "chain BASICFW") {
			t.Errorf("the rules are not in legacy tables alone:\n%s", out)
		}
		m.Must(t, "iptables -F; iptables -X; ip6tables -F; ip6tables -P INPUT ACCEPT")
		until(t, 2*time.Minute, "the repair of a flush", func() error {
			if out, code := m.Run(t, "flock -w 5 /run/basicfw-agent/lock true && basicfw-agent verify"); code != 0 {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
		s.checkJob(t, m)
		s.checkProtected(t, m, webOnly)
		s.checkLog(t, m)
	})
}

// checkJob changes a machine: the service has to follow, and to end what is temporary.
func (s *site) checkJob(t *testing.T, m *Machine) {
	t.Helper()
	stranger := func(port uint16, want bool) {
		t.Helper()
		greets, limit := greeting(port), silence
		if port == 2222 {
			greets = greeting(22)
		}
		if want {
			limit = answerLimit
		}
		var both sync.WaitGroup
		for _, to := range s.wire.Machine.Both() {
			both.Add(1)
			go func() {
				defer both.Done()
				for end := time.Now().Add(answerLimit); ; {
					c, err := s.wire.Dial(s.wire.Stranger.Like(to), to, port, greets, limit)
					if err == nil {
						c.Close()
					}
					if (err == nil) == want {
						return
					}
					if time.Now().After(end) {
						t.Errorf("port %d of %v: want it open: %v; %v", port, to, want, err)
						return
					}
				}
			}()
		}
		both.Wait()
	}

	m.Must(t, "printf 'Port 22\nPort 2222\n' >/etc/ssh/sshd_config.d/lab.conf && systemctl restart ssh")
	stranger(2222, true)
	m.Must(t, "rm /etc/ssh/sshd_config.d/lab.conf && systemctl restart ssh")
	stranger(2222, false)

	m.Must(t, "ip link add lab0 type dummy && ip addr add 10.9.9.1/24 dev lab0 && ip link set lab0 up")
	s.wantPublic(t, m, `"name": "lab0"`, true)
	m.Must(t, "ip link del lab0")
	s.wantPublic(t, m, `"name": "lab0"`, false)

	// A reload is an apply within the sandbox.
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

	m.Must(t, "basicfw-agent open 60000/tcp --for 10s && basicfw-agent unlock --all --for 10s")
	s.wantPublic(t, m, `"state": "unlocked"`, true)
	s.wantText(t, m, "/etc/motd.d/basicfw", "basicfw-agent lock", true)
	s.wantPublic(t, m, `"state": "unlocked"`, false)
	s.wantSettings(t, m, "60000", false)
	stranger(60000, false)
}

// checkLog checks that nothing was denied to the service in this boot.
func (s *site) checkLog(t *testing.T, m *Machine) {
	t.Helper()
	log := m.Must(t, "journalctl -b -o cat --no-pager UNIT=basicfw-agent.service + _SYSTEMD_UNIT=basicfw-agent.service")
	for _, line := range strings.Split(log, "\n") {
		for _, word := range []string{"level=error", "not permitted", "ermission denied", "ead-only file system", "only once a minute", "FAILURE", "seccomp"} {
			if strings.Contains(line, word) {
				t.Errorf("something was denied to the service: %s", line)
			}
		}
	}
	// The kernel logs what seccomp has killed, systemd a unit that is unreadable for
	// others, and a line that it rejects.
	if out, code := m.Run(t, "journalctl -b --no-pager | grep -E 'type=1326|basicfw-agent.service(:[0-9]+:| is marked)'"); code == 0 {
		t.Errorf("the journal has: %s", out)
	}
}
