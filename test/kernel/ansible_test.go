package kernel_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// ansible runs the Ansible role on a machine without a connection. It returns the numbers of
// its tasks, and its output.
func (m *machine) ansible(t *testing.T, settings string, args ...string) (stats map[string]int, output string) {
	t.Helper()
	roles, err := filepath.Abs("../../packaging/ansible/roles")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := m.command()
	wrapper := "#!/bin/sh\nexport " + c.Env[0] + "\n[ \"$1\" != bootstrap ] || set -- \"$@\" --no-service --no-selftest\nexec " + program + " --root " + m.root + " \"$@\"\n"
	playbook := `[{"hosts": "all", "gather_facts": false, "roles": ["basicfw"], "vars": {"basicfw_settings": ` + settings +
		`, "basicfw_command": "` + dir + `/basicfw-agent", "basicfw_config": "` + m.root + `/etc/basicfw/agent.ini", "basicfw_reconnect_timeout": 5}}]`
	for name, text := range map[string]string{"basicfw-agent": wrapper, "play.yml": playbook} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	c.Args = append([]string{"ansible-playbook", "-i", "localhost,", "-c", "local", dir + "/play.yml"}, args...)
	c.Env = append(c.Env, "ANSIBLE_ROLES_PATH="+roles, "ANSIBLE_NOCOLOR=1", "ANSIBLE_LOCAL_TEMP="+dir, "ANSIBLE_REMOTE_TEMP="+dir, "ANSIBLE_SSH_CONTROL_PATH_DIR="+dir, "ANSIBLE_TIMEOUT=5", "LC_ALL=C.UTF-8")
	c.Limit = 5 * time.Minute // a play takes seconds, but a minute on a busy computer
	r := m.Host.Run(t, c)
	stats, output = map[string]int{}, r.Stdout+r.Stderr
	for _, m := range regexp.MustCompile(`(\w+)=(\d+)`).FindAllStringSubmatch(output[strings.LastIndex(output, "PLAY RECAP")+1:], -1) {
		stats[m[1]], _ = strconv.Atoi(m[2])
	}
	if _, ok := stats["failed"]; !ok {
		t.Fatal(output)
	}
	return stats, output
}

// TestAnsible installs a machine with the role, repeats it, and changes the settings.
func TestAnsible(t *testing.T) {
	lab.NeedTools(t, "ansible-playbook")
	check := exec.Command("ansible-playbook", "--syntax-check", "-i", "localhost,", "site.yml")
	check.Dir = "../../packaging/ansible"
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("site.yml: %v\n%s", err, out)
	}
	on(t, variants[:1], func(t *testing.T, m *machine) {
		want := func(what string, stats map[string]int, changed bool, output string) {
			t.Helper()
			if stats["failed"] > 0 || stats["unreachable"] > 0 || changed != (stats["changed"] > 0) {
				t.Fatalf("%s: %v\n%s", what, stats, output)
			}
		}
		web := `{"agent": {"profile": "web-only"}, "ssh": {"allow": ["` + m.Client.V4.String() + `", "` + m.Client.V6.String() + `"]}}`
		more := strings.Replace(web, "{", `{"log": {"drops": false}, "open": {"x": "8080/tcp"}, `, 1)
		m.Host.Listen(t, 22, 80, 8080)
		reach := func(what string, open bool) {
			t.Helper()
			for _, to := range m.Server.Both() {
				m.wantReach(t, to, 22, true, false)
				m.wantReach(t, to, 80, true, true)
				m.wantReach(t, to, 8080, open, open)
			}
		}

		before := m.everything(t)
		stats, output := m.ansible(t, web, "--check", "--diff")
		want("check of a new machine", stats, true, output)
		same(t, "check of a new machine", before, m.everything(t))
		stats, output = m.ansible(t, web)
		want("first run", stats, true, output)
		reach("first run", false)
		stats, output = m.ansible(t, web)
		want("second run", stats, false, output)
		stats, output = m.ansible(t, web, "--check")
		want("check without a change", stats, false, output)

		before = m.everything(t)
		stats, output = m.ansible(t, more, "--check", "--diff")
		want("check of a change", stats, true, output)
		same(t, "check of a change", before, m.everything(t))
		says(t, output, "8080", "basicfw-x", "+[open]")
		stats, output = m.ansible(t, more)
		want("change", stats, true, output)
		reach("change", true)
		if s := m.status(t, exitOK); s.State != "protected" {
			t.Errorf("state %s after the change", s.State)
		}
		stats, output = m.ansible(t, more)
		want("run after the change", stats, false, output)

		stats, output = m.ansible(t, `{"agent": {"profil": "web-only"}}`)
		if stats["failed"] == 0 || !strings.Contains(output, "profil") {
			t.Errorf("wrong settings: %v\n%s", stats, output)
		}
		stats, output = m.ansible(t, more)
		want("run after wrong settings", stats, false, output)
	})
}
