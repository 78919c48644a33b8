package kernel_test

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// fleet is several machines that one controller reaches, from the addresses of the first
// machine's outsider.
type fleet struct {
	controller *lab.Namespace
	hosts      []*member
}

// member is a machine of a fleet.
type member struct {
	*sshServer
	addr    netip.Addr // by which the controller reaches it
	wrapper string     // the program, on this machine
}

// newFleet makes n machines.
func newFleet(t *testing.T, n int) *fleet {
	t.Helper()
	f := &fleet{}
	for i := range n {
		m := newMachine(t, "nft")
		h := &member{sshServer: m.sshd(t), addr: netip.AddrFrom4([4]byte{203, 0, 113, byte(i + 1)}), wrapper: filepath.Join(t.TempDir(), "basicfw-agent")}
		if f.controller == nil {
			f.controller = m.Outsider
		}
		name := fmt.Sprintf("fleet%d", i)
		(&lab.Lab{Host: m.Host, Outsider: f.controller}).Wire(t, name)
		m.Host.MustRun(t, "ip", "addr", "add", h.addr.String()+"/32", "dev", name)
		f.controller.MustRun(t, "ip", "link", "set", name, "up")
		m.Host.MustRun(t, "ip", "link", "set", name, "up")
		f.controller.MustRun(t, "ip", "route", "add", h.addr.String(), "dev", name)
		for _, from := range []lab.Addrs{m.Client, m.Stranger} {
			m.Host.MustRun(t, "ip", "route", "add", from.V4.String(), "dev", name)
		}
		c := m.command()
		script := "#!/bin/sh\nexport " + c.Env[0] + "\n[ \"$1\" != bootstrap ] || set -- \"$@\" --no-service --no-selftest\nexec " + program + " --root " + m.root + " \"$@\"\n"
		if err := os.WriteFile(h.wrapper, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		f.hosts = append(f.hosts, h)
	}
	return f
}

// play runs the Ansible role on all machines, from an address of the controller, with a list
// of the addresses that may log in.
func (f *fleet) play(t *testing.T, from netip.Addr, confirm string, office ...netip.Addr) (failed int, output string) {
	t.Helper()
	roles, err := filepath.Abs("../../packaging/ansible/roles")
	if err != nil {
		t.Fatal(err)
	}
	dir, hosts := t.TempDir(), map[string]any{}
	for i, h := range f.hosts {
		options := h.login(from)
		hosts[fmt.Sprintf("host%d", i)] = map[string]string{
			"ansible_host": h.addr.String(), "ansible_user": "root", "ansible_ssh_common_args": strings.Join(options[:len(options)-1], " "),
			"ansible_python_interpreter": "/usr/bin/python3", "basicfw_command": h.wrapper, "basicfw_config": filepath.Join(h.m.root, agentINI),
		}
	}
	playbook := []any{map[string]any{"hosts": "all", "gather_facts": false, "roles": []string{"basicfw"}, "vars": map[string]any{
		"basicfw_lists":             map[string]any{"office": office},
		"basicfw_lists_dir":         "/run/lists", // the only directory that is the same with and without --root
		"basicfw_settings":          map[string]any{"agent": map[string]string{"profile": "web-only"}, "ssh": map[string]string{"allow": "{{ basicfw_list.office }}"}},
		"basicfw_confirm":           confirm,
		"basicfw_reconnect_timeout": 5,
	}}}
	for name, content := range map[string]any{"hosts.json": map[string]any{"all": map[string]any{"hosts": hosts}}, "play.yml": playbook} {
		data, err := json.Marshal(content)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	c := lab.Command{Args: []string{"ansible-playbook", "-i", dir + "/hosts.json", "--forks", strconv.Itoa(len(f.hosts)), dir + "/play.yml"},
		Env: append(f.hosts[0].m.command().Env, "ANSIBLE_ROLES_PATH="+roles, "ANSIBLE_NOCOLOR=1", "ANSIBLE_LOCAL_TEMP="+dir, "ANSIBLE_REMOTE_TEMP="+dir,
			"ANSIBLE_SSH_CONTROL_PATH_DIR="+dir, "ANSIBLE_TIMEOUT=5", "ANSIBLE_PIPELINING=1", "LC_ALL=C.UTF-8"), Limit: 10 * time.Minute}
	r := f.controller.Run(t, c)
	_, recap, ok := strings.Cut(r.Stdout, "PLAY RECAP")
	if !ok {
		t.Fatal(r.Stdout + r.Stderr)
	}
	for _, line := range strings.Split(recap, "\n") {
		if strings.HasPrefix(line, "host") && !(strings.Contains(line, "failed=0") && strings.Contains(line, "unreachable=0")) {
			failed++
		}
	}
	return failed, r.Stdout + r.Stderr
}

// open returns how many machines an address of the controller reaches.
func (f *fleet) open(t *testing.T, from netip.Addr) (n int) {
	t.Helper()
	for _, h := range f.hosts {
		if f.controller.Run(t, lab.Command{Args: []string{"python3", "-c", "import socket, sys; socket.create_connection((sys.argv[1], 22), 1, (sys.argv[2], 0))", h.addr.String(), from.String()}}).Code == 0 {
			n++
		}
	}
	return n
}

// TestAnsibleFleet installs several machines with the role over SSH, and rotates the
// addresses of an office without locking Ansible out of one. With a list that does, all of
// them recover, and the next run can correct it. BASICFW_HOSTS is the number of machines.
func TestAnsibleFleet(t *testing.T) {
	t.Parallel()
	lab.NeedTools(t, "ansible-playbook", "python3")
	n, err := strconv.Atoi(os.Getenv("BASICFW_HOSTS"))
	if err != nil {
		n = 2
	}
	f := newFleet(t, n)
	defer f.controller.KillAll(t) // Ansible leaves connections open
	old, next, wrong := f.hosts[0].m.Client.V4, f.hosts[0].m.Stranger.V4, netip.MustParseAddr("198.51.100.99")
	want := func(what string, fromOld, fromNext int) {
		t.Helper()
		if a, b := f.open(t, old), f.open(t, next); a != fromOld || b != fromNext {
			t.Fatalf("%s: %d machines are open to the old address, and %d to the new one; want %d and %d", what, a, b, fromOld, fromNext)
		}
	}
	run := func(what string, from netip.Addr, confirm string, fail int, office ...netip.Addr) {
		t.Helper()
		if failed, output := f.play(t, from, confirm, office...); failed != fail {
			t.Fatalf("%s: %d machines failed, want %d\n%s", what, failed, fail, output)
		}
	}
	run("old and new", old, "10m", 0, old, next)
	want("old and new", n, n)
	run("new only", next, "10m", 0, next)
	want("new only", 0, n)
	for _, h := range f.hosts {
		if lists, err := os.ReadDir(filepath.Join(h.m.root, "run/lists")); err != nil || len(lists) != 1 {
			t.Errorf("lists %v, %v: want one", lists, err)
		}
	}
	run("a wrong list", next, "30s", n, wrong)
	by(t, time.Now().Add(3*time.Minute), "open again", func() bool { return f.open(t, next) == n })
	want("rolled back", 0, n)
	run("the right list", next, "10m", 0, old, next)
	want("the right list", n, n)
}
