package kernel_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

const (
	publicStatus = "/run/basicfw-agent/status.json"
	message      = "/etc/motd.d/basicfw"
	// soon is the time that the service has to follow a change.
	soon = time.Second
)

// public reads the status for monitoring.
func (m *machine) public(t *testing.T) (s status) {
	t.Helper()
	if err := json.Unmarshal([]byte(m.read(t, publicStatus)), &s); err != nil {
		t.Fatalf("%s: %v", publicStatus, err)
	}
	return s
}

// watch reads the status for monitoring continuously during the test: it must always be
// complete and contain none of the secrets.
func (m *machine) watch(t *testing.T, secrets ...string) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan struct{})
	path := filepath.Join(m.root, publicStatus)
	var reads int
	var problem error
	go func() {
		defer close(done)
		for problem == nil {
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
			data, err := os.ReadFile(path)
			var s status
			if err == nil {
				err = json.Unmarshal(data, &s)
			}
			if err == nil && s.State == "" {
				err = errors.New("it has no state")
			}
			for _, secret := range secrets {
				if err == nil && strings.Contains(string(data), secret) {
					err = fmt.Errorf("it contains %s", secret)
				}
			}
			if err != nil {
				problem = fmt.Errorf("%w: %.2000q", err, data)
			}
			reads++
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-done
		if problem != nil {
			t.Errorf("%s, read for the %dth time: %v", publicStatus, reads, problem)
		}
		if reads < 10 {
			t.Errorf("%s was read only %d times", publicStatus, reads)
		}
	})
}

// by fails if something has not happened by a deadline. It checks once more after it, as a
// busy machine may not have let us check earlier.
func by(t *testing.T, deadline time.Time, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for ; ; <-tick.C {
		late := time.Now().After(deadline)
		if done() {
			return
		}
		if late {
			t.Errorf("not in time: %s", what)
			return
		}
	}
}

// wantMessage fails unless the login message has all the words. Without words there must be
// no message.
func (m *machine) wantMessage(t *testing.T, when string, words ...string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(m.root, message))
	if len(words) == 0 {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: the login message is there, %v: %s", when, err, data)
		}
		return
	}
	if err != nil {
		t.Errorf("%s: no login message exists: %v", when, err)
		return
	}
	says(t, string(data), words...)
	if fi, err := os.Stat(filepath.Join(m.root, message)); err != nil || fi.Mode() != 0o644 {
		t.Errorf("%s: the login message: %v, %v", when, fi.Mode(), err)
	}
}

// TestFollow changes things by commands while the service runs. The status for monitoring
// has to follow within a second, and what is temporary has to expire. It is not parallel,
// as other tests would use up that second.
func TestFollow(t *testing.T) {
	for _, variant := range ofPart(t, variants) {
		t.Run(variant, func(t *testing.T) {
			m := newMachine(t, variant)
			m.Host.Listen(t, 22, 80, 8080)
			m.must(t, exitOK, "bootstrap", "--profile", "web-only", "--no-service")
			s := m.serve(t)
			client, stranger := m.Client.V4.String(), m.Stranger.V4.String()
			m.watch(t, client, stranger, "203.0.113.50")
			if fi, err := os.Stat(filepath.Join(m.root, publicStatus)); err != nil || fi.Mode() != 0o644 {
				t.Errorf("%s: %v, %v", publicStatus, fi, err)
			}
			m.wantMessage(t, "no client is known", "ssh allow")

			follows := func(command string, want func(s status) bool) {
				t.Helper()
				m.must(t, exitOK, strings.Fields(command)...)
				by(t, time.Now().Add(soon), "the status after "+command, func() bool { return want(m.public(t)) })
			}
			has := func(name string, there bool) func(s status) bool {
				return func(s status) bool { return slices.Contains(s.openNames(), name) == there }
			}
			follows("open 8080/tcp", has("tcp-8080", true))
			follows("close http", has("http", false))
			follows("close 8080/tcp", has("tcp-8080", false))
			follows("open 80/tcp", has("http", true))
			follows("ssh allow 203.0.113.50 --for 1h", func(s status) bool { return s.SSH.Mode == "limited" })
			follows("ssh allow "+client, func(s status) bool { return s.SSH.Mode == "pinned" })
			by(t, time.Now().Add(soon), "the login message is gone", func() bool {
				_, err := os.Stat(filepath.Join(m.root, message))
				return errors.Is(err, fs.ErrNotExist)
			})
			if t.Failed() {
				text, err := os.ReadFile(filepath.Join(m.root, message))
				t.Logf("the login message: %s, %v", text, err)
			}
			m.wantOpen(t, map[string]string{"22/tcp": "client4", "80/tcp": everybody, "8080/tcp": nobody})

			if m.variant() != "legacy" { // whose changes the kernel does not report
				rules := m.rules(t)
				m.by(t, byFlush, families()...)
				by(t, time.Now().Add(2*time.Second), "the repair", func() bool { return m.rules(t) == rules })
			}

			// Temporary entries exist until their end, and are removed within a second.
			const name = "tcp-8080"
			var end time.Time
			beforeEnd(t, func(length string) time.Time {
				m.must(t, exitOK, "ssh", "allow", stranger, "--for", length)
				m.must(t, exitOK, "open", "8080/tcp", "--for", length)
				end = until(t, setting(m.read(t, localINI), "open", name))
				return end
			}, func() error {
				if got := m.reached("8080/tcp", everybody, time.Second); got != everybody {
					return fmt.Errorf("port 8080 is reached by %q", got)
				}
				text := m.read(t, localINI)
				if !strings.Contains(text, "8080") || !strings.Contains(text, stranger) {
					return fmt.Errorf("local.ini holds\n%s", text)
				}
				tick := time.NewTicker(5 * time.Millisecond)
				defer tick.Stop()
				for ; !has(name, true)(m.public(t)); <-tick.C {
					if time.Now().After(end) {
						return errors.New("the status for monitoring does not have it")
					}
				}
				return nil
			})
			lab.Poll(t, "the end", func() bool { return time.Now().After(end) })
			deadline := end.Add(time.Second + soon) // the last second is included
			by(t, deadline, "the entries are gone from local.ini", func() bool {
				text := m.read(t, localINI)
				return !strings.Contains(text, "8080") && !strings.Contains(text, stranger)
			})
			by(t, deadline, "the rules are gone", func() bool {
				rules := m.rules(t)
				return !strings.Contains(rules, m.ends(end)) && !strings.Contains(rules, m.comment(name))
			})
			by(t, deadline, "the status for monitoring follows", func() bool { return has(name, false)(m.public(t)) })
			m.wantOpen(t, map[string]string{"22/tcp": "client4", "8080/tcp": nobody})
			if text := setting(m.read(t, localINI), "ssh", "allow"); !strings.Contains(text, client) || !strings.Contains(text, "203.0.113.50 until ") {
				t.Errorf("other entries are gone, too: allow = %s", text)
			}
			m.must(t, exitOK, "verify")
			m.must(t, exitOK, "plan", "--exit-code")
			m.wantMessage(t, "SSH is pinned, and the service has written its status since")

			// If SSH is blocked, users have to be told.
			m.must(t, exitOK, "ssh", "remove", "203.0.113.50")
			m.must(t, exitOK, "ssh", "remove", client, "--force")
			by(t, time.Now().Add(soon), "the login message is there", func() bool {
				_, err := os.Stat(filepath.Join(m.root, message))
				return err == nil
			})
			m.wantMessage(t, "no address is allowed", "SSH is blocked", "ssh allow")
			before := m.rules(t)
			s.Stop(t)
			same(t, "rules after the service has ended", before, m.rules(t))
		})
	}
}

// TestFollowWriters runs many commands at once while the service runs. No change may be
// lost.
func TestFollowWriters(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		s := m.serve(t)
		m.watch(t, m.Client.V4.String(), "203.0.113.")
		var writers []*lab.Process
		var names, addresses []string
		for i := range 10 {
			port, address := fmt.Sprint(8000+i), fmt.Sprintf("203.0.113.%d", 50+i)
			names, addresses = append(names, "tcp-"+port), append(addresses, address)
			writers = append(writers, m.start(t, "open", port+"/tcp"), m.start(t, "ssh", "allow", address))
		}
		for _, w := range writers {
			if r := w.Wait(t); r.Code != exitOK {
				t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
			}
		}
		text, rules := m.read(t, localINI), m.rules(t)
		st := m.status(t, exitOK)
		for _, name := range names {
			if want := strings.TrimPrefix(name, "tcp-") + "/tcp"; setting(text, "open", name) != want {
				t.Errorf("%s is lost from local.ini", name)
			}
			if n := strings.Count(rules, m.comment(name)); n != 4 {
				t.Errorf("%s has %d rules, want two in each family, for INPUT and what is published", name, n)
			}
			if !slices.Contains(st.openNames(), name) {
				t.Errorf("status does not have %s as open", name)
			}
		}
		m.wantAllowed(t, append([]string{"client"}, addresses...)...)
		if want := append(addresses, m.Client.V4.String(), m.Client.V6.String()); !sameSet(st.SSH.Allow, want) {
			t.Errorf("SSH is allowed from %q, want %q", st.SSH.Allow, want)
		}
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "plan", "--exit-code")
		lab.Poll(t, "the status for monitoring to have all ports", func() bool {
			have := m.public(t).openNames()
			return !slices.ContainsFunc(names, func(n string) bool { return !slices.Contains(have, n) })
		})
		s.Stop(t)
	})
}

// TestFollowMessage checks the login message without a service.
func TestFollowMessage(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	client := m.Client.V4.String()
	m.must(t, exitOK, "bootstrap", "--profile", "web-only", "--no-service")
	m.wantMessage(t, "no client is known", "basicfw-agent ssh allow")
	m.must(t, exitOK, "open", "8080/tcp")
	m.wantMessage(t, "no client is known, and something has changed", "basicfw-agent ssh allow")
	m.must(t, exitOK, "ssh", "allow", client)
	m.wantMessage(t, "pinned")
	m.must(t, exitOK, "ssh", "remove", client, "--force")
	m.wantMessage(t, "no address is allowed", "SSH is blocked", "basicfw-agent ssh allow")
	m.must(t, exitOK, "ssh", "allow", client)
	m.wantMessage(t, "pinned again")
	m.must(t, exitOK, "ssh", "remove", client, "--force")
	m.must(t, exitOK, "uninstall")
	m.wantMessage(t, "uninstalled")

	m = newMachine(t, "nft")
	m.write(t, agentINI, "[agent]\nprofil = web-only\n", 0o640)
	m.must(t, exitUsage, "bootstrap", "--no-service", "--or-failsafe")
	m.wantMessage(t, "failsafe", "your settings are not loaded", "basicfw-agent bootstrap")
	m.write(t, agentINI, "[agent]\nprofile = web-only\n", 0o640)
	m.must(t, exitOK, "bootstrap", "--no-service", "--client-ip", client)
	m.wantMessage(t, "bootstrapped")
	// By the administrator's files, with a command that does not concern SSH.
	m.write(t, agentINI, "[agent]\nprofile = web-only\n[ssh]\nallow = any\n", 0o640)
	m.must(t, exitOK, "apply")
	m.wantMessage(t, "open to any by the settings")
}

// TestFollowBoot boots a machine after a temporary opening has expired.
func TestFollowBoot(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.bootstrap(t)
		before := m.rules(t)
		m.must(t, exitOK, "ssh", "allow", m.Stranger.V4.String(), "--for", "1s")
		m.must(t, exitOK, "open", "8080/tcp", "--for", "1s")
		end := until(t, setting(m.read(t, localINI), "open", "tcp-8080"))
		m.reboot(t)
		waitFor(t, end)
		s := m.serve(t)
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
		if st := m.status(t, exitOK); st.State != "protected" || slices.Contains(st.openNames(), "tcp-8080") {
			t.Errorf("status: %+v", st)
		}
		lab.Poll(t, "expired entries to be gone from local.ini", func() bool {
			text := m.read(t, localINI)
			return !strings.Contains(text, "8080") && !strings.Contains(text, m.Stranger.V4.String())
		})
		m.must(t, exitOK, "verify")
		same(t, "rules", before, m.rules(t))
		s.Stop(t)
	})
}
