//go:build vm

package vm

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// testLockedOut names a wrong address as the client of a server. Its owner has the serial
// console, the boot loader's prompt and a rescue system.
func testLockedOut(t *testing.T, b built) {
	t.Parallel()
	s := newSite(t, b, 80)
	s.download.Offer(b.older)
	m := s.start(t, b.image, run(t, time.Minute, b.agent, "user-data", "--rpm", s.download.URL, "--sha256", sum(t, b.older),
		"--client-ip", "203.0.113.50", "--profile", "web-only"))
	const hint = "basicfw: SSH is allowed only from 203.0.113.50. Locked out? Log in here and run: basicfw-agent unlock"
	since := time.Now()
	// loggedIn reports whether the owner can log in now.
	loggedIn := func() bool {
		t.Helper()
		out, code := s.login(t, s.wire.Client.V4, "echo logged in", silence)
		return code == 0 && strings.Contains(out, "logged in\n")
	}
	in := func(when string) {
		t.Helper()
		if out, code := s.login(t, s.wire.Client.V4, "echo logged in", time.Minute); code != 0 {
			t.Errorf("%s: cannot log in: exit code %d\n%s", when, code, out)
		}
	}
	out := func(when string) {
		t.Helper()
		if loggedIn() {
			t.Errorf("%s: can log in", when)
		}
	}
	// closes waits until the owner can no longer log in.
	closes := func(when string) {
		t.Helper()
		until(t, 2*time.Minute, when, func() error {
			if loggedIn() {
				return errors.New("can still log in")
			}
			return nil
		})
	}
	state := func(want string) {
		t.Helper()
		if out, _ := m.Run(t, "basicfw-agent status --json"); !strings.Contains(out, `"state": "`+want+`"`) {
			t.Errorf("the state is not %s:\n%s", want, out)
		}
	}
	// clock moves the machine's clock.
	clock := func(by string) { t.Helper(); m.Must(t, "date -s '"+by+"'") }

	t.Run("at the console", func(t *testing.T) {
		s.checkCloudInit(t, m)
		if out := m.Must(t, "cat /var/log/cloud-init-output.log"); !strings.Contains(out, "warning   root cannot log in at the console (") {
			t.Errorf("bootstrap does not warn about root's password:\n%s", out)
		}
		// Once by itself, and once by agetty.
		if n := strings.Count(read(t, m.console()), hint); n != 2 {
			t.Errorf("the console shows the allowed addresses %d times:\n%s", n, read(t, m.console()))
		}
		// Again at the login prompt.
		shown := len(read(t, m.console()))
		m.Must(t, "basicfw-agent ssh allow 203.0.113.51")
		until(t, answerLimit, "the console to show the new allowed addresses", func() error {
			if text := read(t, m.console())[shown:]; !strings.Contains(text, "SSH is allowed only from 203.0.113.50, 203.0.113.51.") {
				return errors.New(text)
			}
			return nil
		})
		m.Must(t, "basicfw-agent ssh remove 203.0.113.51")
		if out := m.Must(t, "stat -c %a /run/issue.d/basicfw.issue"); out != "600\n" {
			t.Errorf("the console's text has the mode %s", out)
		}
		out("locked out")
		m.Must(t, "echo root:open-sesame | chpasswd")
		c := m.Sit(t)
		c.Type(t, "", "login: ")
		c.Type(t, "root", "Password: ")
		c.Type(t, "open-sesame", "# ")
		c.Type(t, "basicfw-agent unlock --for 20s", "unlocked: SSH is open to any address, limited, until ", "# ")
		in("unlocked")
		closes("the end of the unlock")
		state("protected")

		// What users try who know iptables only.
		c.Type(t, "iptables -F; ip6tables -F", "basicfw: the ipv", " rules were flushed and have been restored. Locked out? Log in here and run: basicfw-agent unlock")
		out("flushed")

		// The clock is set: within a boot, the uptime decides what has expired.
		c.Type(t, "basicfw-agent unlock --for 15m; basicfw-agent open 60000/tcp --for 15m", "unlocked: ", "open", "60000", "# ")
		in("unlocked again")
		for _, by := range []string{"-1 hour", "+80 minutes"} {
			clock(by)
			until(t, answerLimit, "the rules to follow the clock "+by, func() error {
				if !loggedIn() {
					return errors.New("cannot log in")
				}
				c, err := s.wire.Dial(s.wire.Stranger.V4, s.wire.Machine.V4, 60000, greeting(60000), silence)
				if err == nil {
					c.Close()
				}
				return err
			})
			state("unlocked")
		}
		clock("-20 minutes")
		m.Must(t, "basicfw-agent close 60000/tcp && basicfw-agent lock")
		out("locked")
		state("protected")
		c.Type(t, "exit", hint, "login: ")
	})

	t.Run("by the boot loader", func(t *testing.T) {
		m.withoutCloudInit(t)
		m.BootWith(t, "basicfw.unlock=12m")
		in("with the kernel parameter")
		state("unlocked")
		m.Must(t, "basicfw-agent lock")
		shown := len(read(t, m.console()))
		m.Reboot(t)
		out("the same parameter at the next boot")
		state("protected")
		_, boot, _ := strings.Cut(read(t, m.console())[shown:], "reboot: Restarting system")
		if n := strings.Count(boot, hint); n != 2 {
			t.Errorf("the console of this boot shows the allowed addresses %d times:\n%s", n, boot)
		}
	})

	t.Run("from a rescue system", func(t *testing.T) {
		m.Must(t, "echo 12m >/etc/basicfw/unlock")
		m.Reboot(t)
		in("by the file")
		state("unlocked")
		if out, code := m.Run(t, "ls /etc/basicfw/unlock"); code == 0 {
			t.Errorf("the next boot will be unlocked, too: %s", out)
		}
		m.Must(t, "basicfw-agent lock")
		out("locked")
	})
	s.checkSilent(t, since)
	// IPv6 may be flushed while the repair of IPv4 reads back what it loaded.
	if out, code := m.Run(t, "journalctl -u basicfw-agent --no-pager | grep -E 'level=error|to the consoles' | grep -v 'differ from those that were loaded'"); code == 0 {
		t.Errorf("the service logged errors:\n%s", out)
	}
	if out, code := m.Run(t, "journalctl -b --no-pager _PID=1 | grep -i 'basicfw-agent.*device'"); code == 0 {
		t.Errorf("systemd logged errors about the unit:\n%s", out)
	}
}
