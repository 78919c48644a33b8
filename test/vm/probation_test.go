//go:build vm

package vm

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// checkProbation pins SSH to the wrong client, as a provisioning client is, and then to the
// right one, which confirms that by a login. The service notices it from within its
// sandbox.
func (s *site) checkProbation(t *testing.T, m *Machine) {
	began := time.Now()
	program, owner := s.wire.Router.V4, s.wire.Client.V4
	within := func(length string) { // the probation's length
		t.Helper()
		m.Must(t, "sed -i 's/^#*confirm_within = .*/confirm_within = "+length+"/' /etc/basicfw/agent.ini")
	}
	mode := func() (string, time.Time) {
		t.Helper()
		var st struct {
			SSH struct {
				Mode      string
				ConfirmBy time.Time `json:"confirm_by"`
			}
		}
		out, _ := m.Run(t, "basicfw-agent status --json")
		if err := json.Unmarshal([]byte(out), &st); err != nil {
			t.Fatalf("%v in\n%s", err, out)
		}
		return st.SSH.Mode, st.SSH.ConfirmBy
	}
	want := func(when, want string) (by time.Time) {
		t.Helper()
		got, by := mode()
		if got != want {
			t.Fatalf("%s: SSH is %s, want %s", when, got, want)
		}
		return by
	}

	// With the wrong client, SSH opens in time.
	within("45s")
	if out, code := s.login(t, program, "sudo basicfw-agent apply --redetect", time.Minute); code != 0 || !strings.Contains(out, "only "+program.String()) {
		t.Fatalf("by the provisioning client: exit code %d\n%s", code, out)
	}
	by := want("detected", "probation")
	if out, code := s.login(t, owner, "true", silence); code == 0 {
		t.Errorf("the owner could log in without being allowed: %s", out)
	}
	until(t, 2*time.Minute, "the owner to be let in", func() error {
		if out, code := s.login(t, owner, "true", silence); code != 0 {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if now := m.Must(t, "date -u +%Y-%m-%dT%H:%M:%SZ"); strings.TrimSpace(now) < by.Format("2006-01-02T15:04:05Z") {
		t.Errorf("let in at %s, before %v", now, by)
	}
	until(t, answerLimit, "the login message", func() error {
		if out, _ := m.Run(t, "cat /etc/motd.d/basicfw"); !strings.Contains(out, "ssh allow me") {
			return fmt.Errorf("it says %q", out)
		}
		return nil
	})
	want("after the probation", "limited")
	if out, code := s.login(t, owner, "sudo basicfw-agent ssh allow me && sudo basicfw-agent ssh remove "+program.String(), time.Minute); code != 0 {
		t.Errorf("the owner runs ssh allow: exit code %d\n%s", code, out)
	}
	want("with the owner named", "pinned")

	// The detected owner is confirmed by a login.
	within("30m")
	m.Must(t, "rm /etc/basicfw/local.ini")
	if out, code := s.login(t, owner, "sudo basicfw-agent apply --redetect", time.Minute); code != 0 {
		t.Fatalf("by the owner: exit code %d\n%s", code, out)
	}
	want("detected", "probation")
	if out, code := s.login(t, owner, "sleep 6", time.Minute); code != 0 {
		t.Fatalf("exit code %d\n%s", code, out)
	}
	want("after a command", "probation")
	input := filepath.Join(t.TempDir(), "input") // without input, and without an end
	if err := syscall.Mkfifo(input, 0o600); err != nil {
		t.Fatal(err)
	}
	p := s.wire.Outsider.Start(t, lab.Command{Args: append([]string{"sh", "-c", `exec ssh -tt "$@" <>` + input, "ssh"}, s.ssh(owner, time.Minute)...)})
	until(t, 3*time.Minute, "the owner's login to confirm the address", func() error {
		if got, _ := mode(); got != "pinned" {
			return fmt.Errorf("SSH is %s", got)
		}
		return nil
	})
	p.Stop(t)
	if out, code := m.Run(t, "iptables-save | grep basicfw-ssh-limit"); code == 0 {
		t.Errorf("a rule is left: %s", out)
	}
	if out, code := m.Run(t, "journalctl -b -u basicfw-agent --no-pager | grep level=error"); code == 0 {
		t.Errorf("the service logged errors:\n%s", out)
	}
	s.checkSilent(t, began)
}
