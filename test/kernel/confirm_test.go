package kernel_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

const pendingFile = "/var/lib/basicfw/pending.json"

// settings writes the administrator's file: the profile, the client, and more.
func (m *machine) settings(t *testing.T, more string) {
	t.Helper()
	m.write(t, "/etc/basicfw/agent.ini", "[agent]\nprofile = web+mail\n[ssh]\nclient_ip = "+m.Client.String()+"\n"+more, 0o640)
}

// pendingUntil returns when the pending change is rolled back; zero if there is none.
func (m *machine) pendingUntil(t *testing.T) (state string, until time.Time) {
	t.Helper()
	return m.waits(t, "pending")
}

// rolledBack waits until the former rules are back, and checks the reason that is given.
func (m *machine) rolledBack(t *testing.T, rules, why string) {
	t.Helper()
	lab.Poll(t, "the former rules to come back", func() bool { return m.rules(t) == rules })
	lab.Poll(t, "the pending file to be removed", func() bool { return !m.exists(t, pendingFile) })
	s := m.status(t, exitOK)
	if s.State != "protected" || !strings.Contains(s.warnings(), why) {
		t.Errorf("afterwards: %q, %q, want %q", s.State, s.Warnings, why)
	}
	lab.Poll(t, "the login message to give the reason", func() bool {
		data, _ := os.ReadFile(filepath.Join(m.root, message))
		return strings.Contains(string(data), why)
	})
	m.must(t, exitOK, "verify")
	r := m.must(t, exitFailed, "confirm")
	oneLine(t, r.Stderr, "no change is pending", why)
}

// TestConfirm applies rules that have to be confirmed.
func TestConfirm(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.must(t, exitNotBootstrapped, "confirm")
		m.settings(t, "")
		m.must(t, exitOK, "bootstrap", "--no-service")
		before := m.settled(t)
		m.refused(t, exitFailed, []string{"confirm"}, "no change is pending", "apply --confirm")
		for _, bad := range []string{"", "0", "none", "-1m", "1y", "8760h"} {
			m.refused(t, exitUsage, []string{"apply", "--confirm", bad}, "--confirm", "from 1s to 30d")
		}
		says(t, m.must(t, exitOK, "apply", "--confirm", "1m").Stdout, "nothing changed")
		same(t, "after an apply without changes", before, m.settled(t))

		// Confirmed in time.
		m.settings(t, "[open]\nx = 8080/tcp\n")
		files := m.tree(t, false, m.keptIn(), stateFile, copyFile)
		says(t, m.must(t, exitOK, "apply", "--confirm", "30s").Stdout, "30s", "basicfw-agent confirm")
		m.wantOpen(t, map[string]string{"8080/tcp": everybody})
		same(t, "files that a boot loads", files, m.tree(t, false, m.keptIn(), stateFile, copyFile))
		if state, until := m.pendingUntil(t); state != "pending" || time.Until(until) > 30*time.Second || time.Until(until) < 10*time.Second {
			t.Errorf("state %q, until %v", state, until)
		}
		text := m.must(t, exitDrift, "status").Stdout
		says(t, text, "pending: new rules roll back at ", "next         basicfw-agent confirm", "x 8080/tcp")
		wantScreen(t, text)
		says(t, m.read(t, message), "basicfw-agent confirm")
		waiting := m.rules(t) + m.tree(t, false, "etc", "var")
		for _, another := range [][]string{{"apply"}, {"open", "8081/tcp"}, {"close", "80/tcp"}, {"ssh", "allow", "203.0.113.50"},
			{"bootstrap", "--no-service", "--profile", "web-only"}} {
			oneLine(t, m.must(t, exitFailed, another...).Stderr, "another change is pending", "basicfw-agent confirm")
		}
		same(t, "the pending change after refused commands", waiting, m.rules(t)+m.tree(t, false, "etc", "var"))
		// Applying the same again only restarts the time.
		m.must(t, exitOK, "apply", "--confirm", "1m")
		if state, until := m.pendingUntil(t); state != "pending" || time.Until(until) < 40*time.Second {
			t.Errorf("restarted: state %q, until %v", state, until)
		}
		m.by(t, byFlushOurs, ipv4)
		m.must(t, exitDrift, "verify")
		m.must(t, exitOK, "verify", "--repair")
		m.wantOpen(t, map[string]string{"8080/tcp": everybody})
		m.must(t, exitOK, "confirm")
		if m.exists(t, pendingFile) || m.exists(t, message) {
			t.Error("the pending file or the login message is left")
		}
		m.wantOpen(t, map[string]string{"8080/tcp": everybody})
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "plan", "--exit-code")
		m.must(t, exitOK, "status")
	})
}

// TestConfirmRunsOut never confirms: without a service, with one, with the
// waiting process killed, and with a boot in between.
func TestConfirmRunsOut(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.settings(t, "")
		m.must(t, exitOK, "bootstrap", "--no-service")
		rules, files := m.rules(t), m.tree(t, false, "etc/basicfw", m.keptIn())
		// A change that closes SSH and port 80 for everyone.
		change := func(length string) {
			t.Helper()
			m.settings(t, "allow = 203.0.113.50\n[open]\nhttp = closed\n")
			m.must(t, exitOK, "apply", "--confirm", length)
		}
		shut := map[string]string{"22/tcp": nobody, "80/tcp": nobody}
		back := map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody}

		change("3s")
		m.wantOpen(t, shut)
		m.rolledBack(t, rules, "not confirmed within 3s")
		m.wantOpen(t, back)

		// The waiting process is killed before the service starts.
		change("6s")
		m.Host.MustRun(t, "pkill", "-KILL", "-f", program+" --root "+m.root+" expire")
		_, until := m.pendingUntil(t)
		waitFor(t, until.Add(time.Second))
		if state, left := m.pendingUntil(t); state != "drifted" || !left.IsZero() {
			t.Errorf("without a waiting process: %q, %v", state, left)
		}
		s := m.serve(t)
		m.rolledBack(t, rules, "not confirmed within 6s")

		// The service runs, and the waiting process is killed.
		change("6s")
		m.Host.MustRun(t, "pkill", "-KILL", "-f", program+" --root "+m.root+" expire")
		m.rolledBack(t, rules, "not confirmed within 6s")
		if r := s.Stop(t); r.Code != exitOK {
			t.Errorf("stopped: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}

		// A boot in between.
		change("10m")
		m.Host.MustRun(t, "pkill", "-KILL", "-f", program+" --root "+m.root+" expire")
		var p map[string]any
		if err := json.Unmarshal([]byte(m.read(t, pendingFile)), &p); err != nil {
			t.Fatal(err)
		}
		p["window"].(map[string]any)["boot"] = "another"
		text, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		m.write(t, pendingFile, string(text), 0o600)
		m.reboot(t)
		s = m.serve(t)
		m.rolledBack(t, rules, "the machine was rebooted before it was confirmed")
		m.wantOpen(t, back)
		s.Stop(t)

		m.settings(t, "")
		same(t, "settings in the end", files, m.tree(t, false, "etc/basicfw", m.keptIn()))
		m.must(t, exitOK, "apply")
		m.must(t, exitOK, "status")
		if m.exists(t, message) {
			t.Errorf("the message is still there: %s", m.read(t, message))
		}
	})
}

// TestConfirmInSession confirms over SSH. An older session proves nothing, nor
// does one that the new rules would keep out.
func TestConfirmInSession(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		sshd := m.sshd(t)
		client := m.Client.V4
		m.settings(t, "")
		m.must(t, exitOK, "bootstrap", "--no-service")
		rules := m.rules(t)

		m.settings(t, "[open]\nx = 8080/tcp\n")
		r := sshd.run(t, client, "apply --confirm 5m", "confirm")
		if r.Code != exitFailed {
			t.Errorf("confirmed in the session of the change: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		says(t, r.Stderr, "older than the change", "--force")
		sshd.must(t, exitOK, client, "confirm")
		m.must(t, exitOK, "verify")

		m.settings(t, "")
		sshd.must(t, exitOK, client, "apply --confirm 5m", "confirm --force")
		same(t, "rules after the reverse change", rules, m.rules(t))

		// Without --confirm the change is refused.
		m.settings(t, "allow = 203.0.113.50\n")
		says(t, sshd.must(t, exitFailed, client, "apply").Stderr, "your address "+client.String(), "--force")
		same(t, "rules after a refused change", rules, m.rules(t))
		r = sshd.run(t, client, "apply --confirm 3s", "confirm")
		says(t, r.Stderr, "older than the change")
		m.rolledBack(t, rules, "not confirmed within 3s")
		sshd.must(t, exitOK, client, "status")
	})
}
