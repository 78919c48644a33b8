package kernel_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// unlocked returns the state, and the end of an unlock; a zero time is none.
func (m *machine) unlocked(t *testing.T) (state string, until time.Time) {
	t.Helper()
	return m.waits(t, "unlock")
}

// waits returns the state, and the "until" of a key of "status --json".
func (m *machine) waits(t *testing.T, key string) (state string, until time.Time) {
	t.Helper()
	r := m.agent(t, "status", "--json")
	var keys map[string]json.RawMessage
	var s struct{ Until time.Time }
	err := json.Unmarshal([]byte(r.Stdout), &keys)
	if err == nil {
		err = errors.Join(json.Unmarshal(keys["state"], &state), json.Unmarshal(keys[key], &s))
	}
	if err != nil {
		t.Fatalf("%v\n%s%s", err, r.Stdout, r.Stderr)
	}
	return state, s.Until
}

// wantSSH checks who reaches sshd, and that closed ports stay closed unless all are open.
func (m *machine) wantSSH(t *testing.T, stranger, all bool) {
	t.Helper()
	for _, to := range m.Server.Both() {
		m.wantReach(t, to, 22, true, stranger)
		m.wantReach(t, to, 80, true, true)
		m.wantReach(t, to, 8080, all, all)
	}
}

// TestUnlock lets a stranger in from the console for a limited time.
func TestUnlock(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.must(t, exitNotBootstrapped, "unlock")
		m.must(t, exitNotBootstrapped, "lock")
		m.bootstrap(t)
		m.wantSSH(t, false, false)
		const issue = "/run/issue.d/basicfw.issue"
		says(t, m.read(t, issue), m.Client.V4.String(), m.Client.V6.String(), "basicfw-agent unlock")
		rules, files := m.rules(t), m.tree(t, false, "etc")

		for _, wrong := range [][]string{{"--for", ""}, {"--for", "0"}, {"--for", "none"}, {"--for", "1y"}, {"--for", "-5m"}, {"--from", "nonsense"},
			{"--from", ""}, {"--from", "127.0.0.1"}, {"--from", "10.99.0.1"}, {"--all", "--from", "198.51.100.20"}} {
			r := m.must(t, exitUsage, append([]string{"unlock"}, wrong...)...)
			oneLine(t, r.Stderr)
		}
		says(t, m.must(t, exitOK, "lock").Stdout, "nothing changed")
		same(t, "after refused commands", rules+files, m.rules(t)+m.tree(t, false, "etc"))

		says(t, m.must(t, exitOK, "unlock").Stdout, "unlocked", ", for 15m\n", "basicfw-agent lock", "ssh allow me")
		m.wantSSH(t, true, false)
		if state, until := m.unlocked(t); state != "unlocked" || time.Until(until) > 15*time.Minute || time.Until(until) < 14*time.Minute {
			t.Errorf("state %q, until %v", state, until)
		}
		first := m.must(t, exitDrift, "status").Stdout
		says(t, first, "unlocked: SSH is open to any address", "next         basicfw-agent lock")
		wantScreen(t, first)
		says(t, m.read(t, "/etc/motd.d/basicfw"), "basicfw-agent lock")
		if m.exists(t, issue) {
			t.Error("the console still lists the allowed addresses")
		}
		m.must(t, exitOK, "verify")

		// Only lock and its end time end it.
		m.by(t, byFlush, ipv4)
		m.must(t, exitOK, "verify", "--repair")
		m.must(t, exitOK, "apply")
		m.must(t, exitOK, "open", "8081/tcp")
		m.must(t, exitOK, "close", "8081/tcp")
		m.must(t, exitOK, "bootstrap", "--no-service")
		m.wantSSH(t, true, false)

		says(t, m.must(t, exitOK, "lock").Stdout, "locked")
		m.wantSSH(t, false, false)
		same(t, "rules after lock", rules, m.rules(t))
		if m.exists(t, "/etc/motd.d/basicfw") {
			t.Error("the login message is still there")
		}
		says(t, m.read(t, issue), m.Client.V4.String())

		m.must(t, exitOK, "unlock", "--from", m.Stranger.V4.String())
		m.wantReach(t, m.Server.V4, 22, true, true)
		m.wantReach(t, m.Server.V6, 22, true, false)
		m.must(t, exitOK, "unlock", "--all")
		m.wantSSH(t, true, true)
		says(t, m.must(t, exitDrift, "status").Stdout, "unlocked: nothing is filtered", "8080/tcp")
		session, err := m.Outsider.Dial(m.Stranger.V4, m.Server.V4, 8080, lab.Patient)
		if err != nil {
			t.Fatal(err)
		}
		defer session.Close()
		m.must(t, exitOK, "lock")
		m.wantSSH(t, false, false)
		if err := session.Talk(); err != nil {
			t.Errorf("a session opened while nothing was filtered: %v", err)
		}
		same(t, "rules after the second lock", rules, m.rules(t))
	})
}

// exists reports whether there is a file below the root.
func (m *machine) exists(t *testing.T, path string) bool {
	t.Helper()
	_, err := os.Lstat(filepath.Join(m.root, path))
	return err == nil
}

// TestUnlockEnds lets an unlock expire: without a service, across a boot that only loads
// the persisted files, and with the service.
func TestUnlockEnds(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.bootstrap(t)
		rules := m.rules(t)
		// The kernel counts whole seconds, the last one included, by a clock that lags by a
		// tick.
		ended := func(until time.Time) {
			t.Helper()
			lab.Poll(t, "the unlock to expire", func() bool { return time.Now().After(until.Add(1200 * time.Millisecond)) })
			m.wantSSH(t, false, false)
		}
		m.must(t, exitOK, "unlock", "--for", "3s")
		_, until := m.unlocked(t)
		m.loadKept(t, m) // a boot without the agent
		m.wantReach(t, m.Server.V4, 22, true, true)
		ended(until)
		if state, left := m.unlocked(t); state != "protected" || !left.IsZero() {
			t.Errorf("afterwards: %q, %v", state, left)
		}
		m.must(t, exitOK, "verify")
		says(t, m.must(t, exitOK, "lock").Stdout, "nothing changed")
		same(t, "rules once the unlock is removed", rules, m.rules(t))

		m.must(t, exitOK, "unlock", "--for", "4s")
		_, until = m.unlocked(t)
		m.reboot(t)
		s := m.serve(t)
		m.wantReach(t, m.Server.V6, 22, true, true)
		ended(until)
		lab.Poll(t, "the service to remove the unlock", func() bool { return m.rules(t) == rules })
		if r := s.Stop(t); r.Code != exitOK {
			t.Errorf("stopped: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
	})
}
