package kernel_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// watchRestores has the programs that load rules note in which network namespace
// they do so, and then run a script, which has in $here whether that is the
// machine's own: yes, or no. The notes are given by the function.
func (m *machine) watchRestores(t *testing.T, script string) (where func() []string) {
	t.Helper()
	notes := filepath.Join(m.root, "usr/restores")
	home := strings.TrimSpace(m.Host.MustRun(t, "readlink", "/proc/self/ns/net"))
	for _, family := range families() {
		m.wrap(t, tables(family)+"-restore", `here=no; [ "$(readlink /proc/self/ns/net)" != "`+home+`" ] || here=yes
echo $here >>`+notes+"\n"+script)
	}
	return func() []string {
		data, err := os.ReadFile(notes)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return strings.Fields(string(data))
	}
}

const restores = `exec $real "$@"`

// TestRehearsal has rules be tried out where they have no effect, before they are
// loaded where they have: a kernel that does not take them is never asked to on
// the machine itself.
func TestRehearsal(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.insist(t)
		m.stocked(t)
		before := m.everything(t)
		where := m.watchRestores(t, `[ $here = yes ] || { cat >/dev/null; echo "$0: line 3 failed" >&2; exit 1; }; `+restores)
		r := m.must(t, exitFailed, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
		oneLine(t, r.Stderr, "trying out the rules", "line 3 failed")
		same(t, "after bootstrap", before, m.everything(t))
		if got := where(); len(got) == 0 || slices.Contains(got, "yes") {
			t.Errorf("rules were loaded on the machine itself: %q", got)
		}
		m.heal(t)

		// Where they are taken, they are loaded there first all the same.
		n := len(where())
		where = m.watchRestores(t, restores)
		m.bootstrap(t)
		if got := where()[n:]; len(got) < 2 || got[0] != "no" || got[len(got)-1] != "yes" {
			t.Errorf("rules were loaded on the machine itself: %q", got)
		}
	})
}

// TestRehearsalForbidden has a machine that lets nobody have a network namespace,
// as a container is. What cannot be tried out is loaded untried, and that is said.
func TestRehearsalForbidden(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.noNamespaces = true
		before := m.everything(t)
		r := m.bootstrap(t)
		oneLine(t, r.Stderr, "warning: ", "no network namespace", "operation not permitted")
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
		m.must(t, exitOK, "verify")
		rules := m.rules(t)
		oneLine(t, m.must(t, exitFailed, "selftest").Stderr, "no copy of this machine's network can be made here", "operation not permitted")
		same(t, "rules after the selftest", rules, m.rules(t))
		m.must(t, exitOK, "uninstall")

		// Nor is it any reason to fail that the rules cannot be tried with packets.
		r = m.must(t, exitOK, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
		says(t, r.Stderr, "not tried with packets")
		same(t, "rules", rules, m.rules(t))
		m.must(t, exitOK, "uninstall")
		same(t, "after uninstall", before, m.everything(t))
	})
}

// TestSelftestTakesBack has the test with packets at bootstrap's end find that the
// rules do otherwise than was decided. Between iptables-restore and the kernel
// something can go wrong; over netlink there is no program to do so.
func TestSelftestTakesBack(t *testing.T) {
	for name, c := range map[string]struct {
		script string // of a load that is neither the rehearsal nor the real one
		words  []string
	}{
		"it lets in more": {`$real "$@" && exec ${real%-restore} -I INPUT -p tcp --dport 23 -j ACCEPT`, []string{"selftest found", "23/tcp", "expected dropped, seen passes"}},
		"it fails":        {`cat >/dev/null; echo "$0: line 3 failed" >&2; exit 1`, []string{"trying the rules", "line 3 failed"}},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			onBoth(t, func(t *testing.T, m *machine) {
				m.insist(t)
				m.Host.Listen(t, 22, 8080)
				m.iptables(t, ipv4, "-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")
				before := m.everything(t)
				loaded := filepath.Join(m.root, "run/loaded")
				where := m.watchRestores(t, `[ $here = no ] || touch `+loaded+`; if [ $here = no ] && [ -e `+loaded+` ]; then `+c.script+`; fi; `+restores)
				r := m.must(t, exitFailed, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
				oneLine(t, r.Stderr, c.words...)
				same(t, "after bootstrap", before, m.everything(t))
				if !slices.Contains(where(), "yes") {
					t.Error("nothing was loaded on the machine: this test proves less")
				}
				m.wantReach(t, m.Server.V4, 8080, true, true)
				m.must(t, exitNotBootstrapped, "status")
				m.heal(t)
				m.bootstrap(t)
			})
		})
	}
}

// TestRehearsalElsewhere has somebody run the part of the program that loads rules in
// a namespace of nobody's in one that is used: it does nothing there.
func TestRehearsalElsewhere(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		var st struct {
			Backend struct{ Name string }
			Ruleset json.RawMessage
		}
		if err := json.Unmarshal([]byte(m.read(t, "/var/lib/basicfw/state.json")), &st); err != nil {
			t.Fatal(err)
		}
		m.must(t, exitOK, "uninstall")
		before := m.everything(t)
		c := m.command("rehearse")
		c.Stdin = fmt.Sprintf(`{"backend":%q,"ruleset":%s}`, st.Backend.Name, st.Ruleset)
		r := m.Host.Run(t, c)
		if r.Code != exitFailed {
			t.Errorf("exit code %d", r.Code)
		}
		oneLine(t, r.Stderr, "this network namespace is somebody's")
		same(t, "after that", before, m.everything(t))
	})
}
