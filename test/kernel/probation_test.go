package kernel_test

import (
	"encoding/json"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// detect bootstraps the machine in a session of the client.
func (s *sshServer) detect(t *testing.T, within string) time.Time {
	t.Helper()
	m := s.m
	m.write(t, "/etc/basicfw/agent.ini", "[agent]\nprofile = web-only\n[ssh]\nconfirm_within = "+within+"\n", 0o640)
	s.must(t, exitOK, m.Client.V4, "bootstrap --no-service")
	st := m.status(t, exitOK)
	if st.SSH.Mode != "probation" || st.SSH.ConfirmBy == nil || st.SSH.Source != "session" {
		t.Fatalf("SSH after a bootstrap with a detected client: %+v", st.SSH)
	}
	if !strings.Contains(m.rules(t), m.begins(*st.SSH.ConfirmBy)) {
		t.Errorf("no rule begins at %v:\n%s", st.SSH.ConfirmBy, m.rules(t))
	}
	return *st.SSH.ConfirmBy
}

// stay logs in and keeps the session open.
func (s *sshServer) stay(t *testing.T, from netip.Addr, args ...string) (leave func()) {
	t.Helper()
	input := filepath.Join(t.TempDir(), "input") // without input, and without an end
	if err := syscall.Mkfifo(input, 0o600); err != nil {
		t.Fatal(err)
	}
	p := s.m.Outsider.Start(t, lab.Command{Args: append([]string{"sh", "-c", `exec ssh "$@" <>` + input, "ssh"}, s.login(from, args...)...)})
	lab.Poll(t, "the session to begin", func() bool {
		return s.m.Host.MustRun(t, "ss", "-Htn", "state", "established", "sport = :22 and dst = "+from.String()) != ""
	})
	return func() {
		p.Stop(t)
		lab.Poll(t, "the session to end", func() bool {
			return s.m.Host.MustRun(t, "ss", "-Htn", "state", "established", "sport = :22 and dst = "+from.String()) == ""
		})
	}
}

// TestProbation confirms a detected client. Until then SSH is open to it alone.
func TestProbation(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		sshd := m.sshd(t)
		client := m.Client.V4
		by := sshd.detect(t, "30m")
		if left := time.Until(by); left < 29*time.Minute || left > 30*time.Minute {
			t.Errorf("probation ends in %v", left)
		}
		m.wantOpen(t, map[string]string{"22/tcp": "client4"})
		m.wantMessage(t, "on probation", "unless the detected client logs in", "basicfw-agent confirm")
		text := m.must(t, exitOK, "status").Stdout
		says(t, text, "unless confirmed", "next         basicfw-agent confirm")
		wantScreen(t, text)
		says(t, m.must(t, exitOK, "ssh", "list").Stdout, "any address, 30/min per source", "from "+by.Format("2006-01-02T15:04:05Z")+", in 29m", client.String())
		before := m.settled(t)
		says(t, m.must(t, exitOK, "bootstrap", "--no-service").Stdout, "nothing changed")
		same(t, "after another bootstrap", before, m.settled(t))

		// From another address, and in the session of the bootstrap.
		m.must(t, exitOK, "unlock", "--from", m.Stranger.V4.String())
		sshd.refused(t, m.Stranger.V4, "confirm", "your address "+m.Stranger.V4.String(), client.String(), "--force")
		m.must(t, exitOK, "lock")
		m.must(t, exitOK, "uninstall")
		r := sshd.run(t, client, "bootstrap --no-service", "confirm")
		if r.Code != exitFailed {
			t.Errorf("confirmed in the session of the bootstrap: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		says(t, r.Stderr, "older than the rules", "--force")

		says(t, sshd.must(t, exitOK, client, "confirm").Stdout, "SSH remains restricted to "+client.String())
		if s := m.status(t, exitOK); s.SSH.Mode != "pinned" || s.SSH.ConfirmBy != nil || len(s.Next) > 0 {
			t.Errorf("confirmed: %+v, next %q", s.SSH, s.Next)
		}
		if strings.Contains(m.rules(t)+m.kept(t), m.comment("ssh-limit")) {
			t.Error("the rule that opens SSH is still there")
		}
		m.wantMessage(t, "confirmed")
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "plan", "--exit-code")
		m.refused(t, exitFailed, []string{"confirm"}, "no change is pending")
		m.wantOpen(t, map[string]string{"22/tcp": "client4"})
	})
}

// TestProbationRunsOut never confirms: SSH opens, and nothing else, without a service,
// across a boot, and with the service. ssh allow closes it.
func TestProbationRunsOut(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 80, 8080)
		sshd := m.sshd(t)
		client, stranger := m.Client.V4, m.Stranger.V4
		by := sshd.detect(t, "8s")
		m.wantOpen(t, map[string]string{"22/tcp": "client4", "80/tcp": everybody, "8080/tcp": nobody})
		kept := m.kept(t)
		waitFor(t, by)
		opened := map[string]string{"22/tcp": everybody, "80/tcp": everybody, "8080/tcp": nobody}
		m.wantOpen(t, opened)
		expired := func(when string) {
			t.Helper()
			s := m.status(t, exitOK)
			if s.SSH.Mode != "limited" || s.SSH.Source != "unconfirmed" || s.SSH.ConfirmBy != nil {
				t.Errorf("%s: SSH %+v", when, s.SSH)
			}
			says(t, s.warnings(), "SSH is open to any address", "no new login from there came in time")
			says(t, strings.Join(s.Next, "\n"), "basicfw-agent ssh allow YOUR-ADDRESS")
			m.must(t, exitOK, "verify")
		}
		expired("without a service")
		m.restart(t)
		m.wantOpen(t, opened)
		same(t, "the file, without a service", kept, m.kept(t))

		s := m.serve(t)
		lab.Poll(t, "the service to persist it", func() bool { return m.timed(m.kept(t)) == 0 })
		lab.Poll(t, "the login message", func() bool { return m.public(t).SSH.Mode == "limited" })
		m.wantMessage(t, "probation expired", "SSH is open to any address", "ssh allow me")
		expired("with the service")
		m.wantOpen(t, opened)
		says(t, m.must(t, exitOK, "plan", "--exit-code").Stdout, "nothing")

		// The client has to run ssh allow now, as may any user who gets in.
		says(t, sshd.must(t, exitOK, client, "ssh allow me").Stdout, client.String()+" may log in")
		m.wantOpen(t, map[string]string{"22/tcp": "client4"})
		if s := m.status(t, exitOK); s.SSH.Mode != "pinned" {
			t.Errorf("%+v", s.SSH)
		}
		sshd.must(t, exitOK, client, "ssh allow "+stranger.String())
		sshd.must(t, exitOK, stranger, "ssh remove "+client.String())
		m.wantOpen(t, map[string]string{"22/tcp": "stranger4"})
		m.must(t, exitOK, "verify")
		if r := s.Stop(t); r.Code != exitOK {
			t.Errorf("stopped: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
	})
}

// mode returns the SSH mode of the desired state.
func (m *machine) mode(t *testing.T) string {
	t.Helper()
	var st struct {
		Desired struct {
			SSH struct {
				Mode      string
				Probation *struct{}
			}
		}
	}
	if err := json.Unmarshal([]byte(m.read(t, "/var/lib/basicfw/state.json")), &st); err != nil {
		t.Fatal(err)
	}
	if st.Desired.SSH.Probation != nil {
		return "probation"
	}
	return st.Desired.SSH.Mode
}

// TestProbationProved logs in while the service runs: a program's login proves nothing, a
// person's does.
func TestProbationProved(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		sshd := m.sshd(t)
		client := m.Client.V4
		sshd.detect(t, "30m")
		s := m.serve(t)
		m.must(t, exitOK, "unlock", "--from", m.Stranger.V4.String())
		proof := func(what string, want string, from netip.Addr, args ...string) {
			t.Helper()
			leave := sshd.stay(t, from, args...)
			defer leave()
			seen := time.Now().Add(6 * time.Second) // three checks
			lab.Poll(t, what+" to be checked", func() bool { return time.Now().After(seen) || m.mode(t) == "pinned" })
			if got := m.mode(t); got != want {
				t.Errorf("%s: SSH is %s, want %s", what, got, want)
			}
		}
		proof("a command", "probation", client, "sleep 60")
		proof("a command at a terminal", "probation", client, "-tt", "sleep 60")
		proof("a shell without a terminal", "probation", client, "-T")
		proof("a shell from another address", "probation", m.Stranger.V4, "-tt")
		proof("a shell at a terminal", "pinned", client, "-tt")
		m.must(t, exitOK, "lock")
		if strings.Contains(m.rules(t)+m.kept(t), m.comment("ssh-limit")) {
			t.Error("the rule that opens SSH is still there")
		}
		says(t, m.must(t, exitOK, "ssh", "list").Stdout, client.String())
		m.must(t, exitOK, "verify")
		if r := s.Stop(t); r.Code != exitOK || strings.Contains(r.Stderr, "level=error") {
			t.Errorf("stopped: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
	})
}

// TestProbationByService uses an iptables that supports no start time: bootstrap succeeds,
// and the service opens SSH.
func TestProbationByService(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		sshd := m.sshd(t)
		for _, family := range families() {
			m.wrap(t, tables(family)+"-restore", `rules=$(cat); case "$rules" in *"-m time"*) echo "iptables-restore: line 1 failed" >&2; exit 1;; esac; echo "$rules" | $real "$@"`)
		}
		m.write(t, "/etc/basicfw/agent.ini", "[agent]\nprofile = web-only\nbackend = iptables\n[ssh]\nconfirm_within = 8s\n", 0o640)
		r := sshd.must(t, exitOK, m.Client.V4, "bootstrap --no-service")
		says(t, r.Stderr, "left to the service")
		st := m.status(t, exitOK)
		if st.SSH.Mode != "probation" || strings.Contains(m.rules(t), "datestart") {
			t.Fatalf("%+v\n%s", st.SSH, m.rules(t))
		}
		m.wantOpen(t, map[string]string{"22/tcp": "client4"})
		s := m.serve(t)
		lab.Poll(t, "the service to open SSH", func() bool { return m.mode(t) == "limited" })
		if early := time.Until(*st.SSH.ConfirmBy); early > 0 {
			t.Errorf("opened %v too early", early)
		}
		m.wantOpen(t, map[string]string{"22/tcp": everybody})
		m.must(t, exitOK, "verify")
		s.Stop(t)
	})
}
