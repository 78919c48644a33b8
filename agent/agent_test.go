package agent

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/motd"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/test/fake"
)

// on is the agent of a machine.
func on(m *fake.Machine) *Agent {
	return &Agent{Verifier: m.Verifier, kernel: iptables.New(m.System, firewall.Families[:])}
}

// saved returns tables from the output of iptables-save.
func saved(t *testing.T, text string) []exposure.Table {
	t.Helper()
	tables, _, err := exposure.ReadSave("iptables", "ip", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return tables
}

// public is the machine's interface.
var public = firewall.Interface{Name: "eth0", Zone: firewall.PublicZone, Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}}

// TestAnnounceShowsWhatTheStateCallsFor checks that the login message and the issue exist while
// the state requires them, and are written only if they change. Uninstall removes them and
// their directories.
func TestAnnounceShowsWhatTheStateCallsFor(t *testing.T) {
	m := fake.New(t)
	st := m.Install(t, fake.Decided(t, "192.0.2.9/32"))
	open := st
	open.Client.Source, open.Desired.SSH = "none", firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHLimited}
	for _, c := range []struct {
		st      store.State
		there   bool // the message
		changes bool
	}{{st, false, true}, {st, false, false}, {open, true, true}, {open, true, false}, {st, false, true}, {open, true, true}} {
		before := len(m.Steps)
		on(m).announce(context.Background(), c.st)
		if there := m.System.Exists(motd.MessageFile); there != c.there || len(m.Steps) > before != c.changes {
			t.Errorf("there %v, want %v; %q", there, c.there, m.Steps[before:])
		}
		// The console's text lists the allowed addresses, so only root can read the file.
		issue, err := os.ReadFile(m.Path(motd.IssueFile))
		if says := strings.Contains(string(issue), "192.0.2.9") && strings.Contains(string(issue), "basicfw-agent unlock"); says == c.there {
			t.Errorf("the console's text is %q, %v", issue, err)
		}
		if target, err := os.Readlink(m.Path(motd.IssueLink)); target != motd.IssueFile {
			t.Errorf("the link in /etc/issue.d points to %q, %v", target, err)
		}
		if fi, err := os.Stat(m.Path(motd.IssueFile)); err == nil && fi.Mode() != 0o600 {
			t.Errorf("the console's text has mode %v", fi.Mode())
		}
	}
	// Other programs' rules count, too.
	m.Kernel.Tables = saved(t, "*mangle\n-A PREROUTING -j DROP\nCOMMIT\n")
	a := on(m)
	a.found.Interfaces = []firewall.Interface{public}
	a.announce(context.Background(), st)
	if message, err := os.ReadFile(m.Path(motd.MessageFile)); !strings.Contains(string(message), "blocked: ") {
		t.Errorf("the login message is %q, %v", message, err)
	}
	if err := m.Uninstall(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/etc/motd.d", "/run/issue.d", "/etc/issue.d"} {
		if m.System.Exists(dir) {
			t.Errorf("%s still exists", dir)
		}
	}
}

// TestStatusFollowsFromAllSources checks that the status combines the kernel's rules, other
// firewall managers, the store and the daemon's notes.
func TestStatusFollowsFromAllSources(t *testing.T) {
	m := fake.New(t)
	facts := host.Facts{SSHPorts: []uint16{22}, SSHLive: true, TakeOver: true, Interfaces: []firewall.Interface{public}}
	status := func() report.Status {
		t.Helper()
		in, err := on(m).gather(context.Background(), facts)
		if err != nil {
			t.Fatal(err)
		}
		return report.New(in)
	}
	if s := status(); s.State != report.NotBootstrapped {
		t.Errorf("before bootstrap: %s", s.State)
	}
	st := m.Install(t, fake.Decided(t, "192.0.2.9/32"))
	if s := status(); s.State != report.Protected || len(s.Warnings) != 1 { // of IPv6
		t.Errorf("after bootstrap: %s, %+v", s.State, s.Warnings)
	}
	m.Kernel.Tables = saved(t, "*raw\n-A PREROUTING -p tcp -m tcp --dport 80 -j DROP\nCOMMIT\n")
	if s := status(); s.State != report.Blocked || !strings.HasPrefix(s.Why, "80/tcp is blocked") {
		t.Errorf("80/tcp is dropped: %s, %s", s.State, s.Why)
	}
	m.Kernel.Tables = saved(t, "*nat\n-A PREROUTING -j DOCKER\n-A DOCKER -p tcp -m tcp --dport 5432 -j DNAT --to-destination 172.17.0.2:5432\nCOMMIT\n")
	m.Conflicts.Add("firewalld")
	m.Kernel.Rules = firewall.Ruleset{}
	until := time.Now().Add(time.Hour)
	note, err := json.Marshal(map[string]any{"verified": until, "pauses": []any{map[string]any{"what": "rules", "until": until}}})
	if err != nil {
		t.Fatal(err)
	}
	m.Write(t, store.RunDir+"/watch.json", string(note))
	if err := m.Store.RemoveBackup(); err != nil {
		t.Fatal(err)
	}
	s := status()
	if s.State != report.Drifted || !slices.Contains(s.Conditions, report.Exposed) || len(s.Forwarded) != 1 || !slices.Equal(s.Conflicts, []string{"firewalld"}) || s.LastVerified == nil || !s.LastVerified.Equal(until) {
		t.Errorf("%s, forwarded %v, conflicts %q, verified %v", s.Conditions, s.Forwarded, s.Conflicts, s.LastVerified)
	}
	for _, code := range []string{"conflict-active", "repair-paused", "ports-forwarded", "backup-lost"} {
		if !slices.ContainsFunc(s.Warnings, func(w report.Warning) bool { return w.Code == code }) {
			t.Errorf("no warning %s in %+v", code, s.Warnings)
		}
	}
	m.Live = func(context.Context) (exposure.Ruleset, error) { return exposure.Ruleset{}, os.ErrPermission }
	if s := status(); len(s.Exposure) > 0 || !slices.ContainsFunc(s.Warnings, func(w report.Warning) bool { return w.Code == "exposure-unknown" }) {
		t.Errorf("rules that cannot be read: exposure %v, %+v", s.Exposure, s.Warnings)
	}
	// Without a readable state, findings that do not depend on it are reported.
	m.Write(t, store.StateFile, "{")
	m.Kernel.Rules, m.Kernel.Open = st.Ruleset, true
	if s := status(); s.State != report.Unprotected {
		t.Errorf("unreadable and open: %s, %+v", s.State, s.Warnings)
	}
}

// FuzzStateStatus computes the status with any text as the state file.
func FuzzStateStatus(f *testing.F) {
	fake.FuzzState(f, func(t *testing.T, data string) {
		m := fake.New(t)
		m.Write(t, store.StateFile, data)
		in, err := on(m).gather(context.Background(), host.Facts{})
		if err != nil {
			t.Fatalf("gather: %v", err)
		}
		s := report.New(in)
		if _, err := json.Marshal(s); err != nil {
			t.Errorf("status: %v", err)
		}
		s.Message()
		s.Issue()
	})
}
