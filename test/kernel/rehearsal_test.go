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

// watchRestores records in which network namespace the programs that load rules run, and
// then runs a script. In the script, $here is yes in the machine's own namespace, otherwise
// no. The function it returns lists the records.
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

// TestRehearsal checks that rules are rehearsed in a network namespace before they are
// loaded: the machine's own kernel tables never see rules that the kernel rejects.
func TestRehearsal(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.insist(t)
		m.stocked(t)
		before := m.everything(t)
		where := m.watchRestores(t, `[ $here = yes ] || { cat >/dev/null; echo "$0: line 3 failed" >&2; exit 1; }; `+restores)
		r := m.must(t, exitFailed, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
		oneLine(t, r.Stderr, "rehearsing the rules", "line 3 failed")
		same(t, "after bootstrap", before, m.everything(t))
		if got := where(); len(got) == 0 || slices.Contains(got, "yes") {
			t.Errorf("rules were loaded on the machine itself: %q", got)
		}
		m.heal(t)

		// Rules that the kernel accepts are rehearsed first, too.
		n := len(where())
		where = m.watchRestores(t, restores)
		m.bootstrap(t)
		if got := where()[n:]; len(got) < 2 || got[0] != "no" || got[len(got)-1] != "yes" {
			t.Errorf("rules were not rehearsed first: %q", got)
		}
	})
}

// TestRehearsalForbidden denies network namespaces, as a container does. The rules are
// loaded without a rehearsal, with a warning.
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
		oneLine(t, m.must(t, exitFailed, "selftest").Stderr, "cannot copy this machine's network", "operation not permitted")
		same(t, "rules after the selftest", rules, m.rules(t))
		m.must(t, exitOK, "uninstall")

		// A selftest that cannot run does not make bootstrap fail either.
		r = m.must(t, exitOK, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
		says(t, r.Stderr, "not tested with packets")
		same(t, "rules", rules, m.rules(t))
		m.must(t, exitOK, "uninstall")
		same(t, "after uninstall", before, m.everything(t))
	})
}

// TestSelftestRollsBack loads rules that do not do what the desired state says, which the
// selftest at bootstrap's end finds. Something can go wrong between iptables-restore and
// the kernel; over netlink no such program is involved.
func TestSelftestRollsBack(t *testing.T) {
	for name, c := range map[string]struct {
		script string // of a load that is neither the rehearsal nor the real one
		words  []string
	}{
		"it accepts more": {`$real "$@" && exec ${real%-restore} -I INPUT -p tcp --dport 23 -j ACCEPT`, []string{"selftest: ", "23/tcp", "expected dropped, seen passes"}},
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
					t.Error("no rules were loaded on the machine: this test proves less")
				}
				m.wantReach(t, m.Server.V4, 8080, true, true)
				m.must(t, exitNotBootstrapped, "status")
				m.heal(t)
				m.bootstrap(t)
			})
		})
	}
}

// TestRehearsalElsewhere runs the rehearsal's command, which is meant for an unused network
// namespace, in one that is in use: it does nothing there.
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
		oneLine(t, r.Stderr, "this network namespace is in use")
		same(t, "after the refusal", before, m.everything(t))
	})
}
