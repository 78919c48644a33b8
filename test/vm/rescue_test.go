//go:build vm

package vm

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// testShutOut names somebody else as the client of a server: its owner has the
// serial console, the boot loader's prompt and a rescue system.
func testShutOut(t *testing.T, b built) {
	t.Parallel()
	s := newSite(t, b, 80)
	s.download.Offer(b.older)
	m := s.start(t, b.image, run(t, time.Minute, b.agent, "user-data", "--rpm", s.download.URL, "--sha256", sum(t, b.older),
		"--client-ip", "203.0.113.50", "--profile", "web-only"))
	const hint = "basicfw: SSH is for 203.0.113.50 only. Shut out? Log in here and type: basicfw-agent unlock"
	since := time.Now()
	// loggedIn tells whether the owner can log in now.
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
	// closes waits for the end of what let the owner in.
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
			t.Errorf("bootstrap does not warn of root's password:\n%s", out)
		}
		// Once of its own, and once by agetty.
		if n := strings.Count(read(t, m.console()), hint); n != 2 {
			t.Errorf("the console says %d times who may come in:\n%s", n, read(t, m.console()))
		}
		// Anew where a name is waited for.
		shown := len(read(t, m.console()))
		m.Must(t, "basicfw-agent ssh allow 203.0.113.51")
		until(t, answerLimit, "the console to show who may come in now", func() error {
			if text := read(t, m.console())[shown:]; !strings.Contains(text, "SSH is for 203.0.113.50, 203.0.113.51 only.") {
				return errors.New(text)
			}
			return nil
		})
		m.Must(t, "basicfw-agent ssh remove 203.0.113.51")
		if out := m.Must(t, "stat -c %a /run/issue.d/basicfw.issue"); out != "600\n" {
			t.Errorf("the console's text has the mode %s", out)
		}
		out("shut out")
		m.Must(t, "echo root:open-sesame | chpasswd")
		c := m.Sit(t)
		c.Type(t, "", "login: ")
		c.Type(t, "root", "Password: ")
		c.Type(t, "open-sesame", "# ")
		c.Type(t, "basicfw-agent unlock --for 20s", "unlocked: SSH is open to any address, limited, until ", "# ")
		in("unlocked")
		closes("the end of the unlocking")
		state("protected")

		// What people try who know iptables only.
		c.Type(t, "iptables -F; ip6tables -F", "basicfw: the ipv", " rules were flushed, and are back. Shut out? Log in here and type: basicfw-agent unlock")
		out("flushed")

		// The clock is set back by an hour: by it, all would last an hour longer.
		c.Type(t, "basicfw-agent unlock --for 10m; basicfw-agent open 60000/tcp --for 10m", "unlocked: ", "open", "60000", "# ")
		in("unlocked again")
		clock("-1 hour")
		closes("the end of the unlocking when the clock was set back")
		s.dial(t, s.wire.Stranger.V4, s.wire.Machine.V4, 60000).Close()
		// And ahead: the rules have their end in them.
		clock("+1 hour")
		m.Must(t, "basicfw-agent unlock --for 10m")
		in("unlocked once more")
		clock("+11 minutes")
		out("the clock was set ahead")
		if c, err := s.wire.Dial(s.wire.Stranger.V4, s.wire.Machine.V4, 60000, greeting(60000), silence); err == nil {
			c.Close()
			t.Error("a port that was open for a while answers")
		}
		state("protected")
		// Or both would be as before, once the clock is right again.
		m.Must(t, "basicfw-agent close 60000/tcp && basicfw-agent lock")
		clock("-11 minutes")
		c.Type(t, "exit", hint, "login: ")
	})

	t.Run("by the boot loader", func(t *testing.T) {
		m.BootWith(t, "basicfw.unlock=12m")
		in("by the kernel's argument")
		state("unlocked")
		m.Must(t, "basicfw-agent lock")
		shown := len(read(t, m.console()))
		m.Reboot(t)
		out("the same argument at the next boot")
		state("protected")
		_, boot, _ := strings.Cut(read(t, m.console())[shown:], "reboot: Restarting system")
		if n := strings.Count(boot, hint); n != 2 {
			t.Errorf("the console of this boot says %d times who may come in:\n%s", n, boot)
		}
	})

	t.Run("from a rescue system", func(t *testing.T) {
		m.Must(t, "echo 12m >/etc/basicfw/unlock")
		m.Reboot(t)
		in("by the file")
		state("unlocked")
		if out, code := m.Run(t, "ls /etc/basicfw/unlock"); code == 0 {
			t.Errorf("the next boot will be unlocked too: %s", out)
		}
		m.Must(t, "basicfw-agent lock")
		out("locked")
	})
	s.checkSilent(t, since)
	if out, code := m.Run(t, "journalctl -u basicfw-agent --no-pager | grep -E 'level=error|consoles can'"); code == 0 {
		t.Errorf("the service has complained:\n%s", out)
	}
	if out, code := m.Run(t, "journalctl -b --no-pager _PID=1 | grep -i 'basicfw-agent.*device'"); code == 0 {
		t.Errorf("systemd has complained of the unit:\n%s", out)
	}
}
