package kernel_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// status is the part of "status --json" that tests check.
type status struct {
	State   string
	Why     string
	Profile struct{ Name, Source, Reason string }
	Backend struct{ Name, Reason string }
	SSH     struct {
		Ports        []uint16
		Mode, Source string
		Allow        []string
		Sessions     []string `json:"active_sessions"`
		Caller       struct {
			Address, Reason string
			Allowed         bool
		}
		ConfirmBy *time.Time `json:"confirm_by"`
	}
	Open []struct {
		Name, Proto, Ports, Zone string
		From                     []string
		Source                   string
	}
	Conditions []string
	Families   map[string]string
	Drift      []struct{ Family, Chain, Kind, Want, Got string }
	Foreign    []struct{ Family, Chain, Rule, Effect string }
	Forwarded  []forwarded

	Listening []struct {
		Proto       string
		Port        uint16
		Process     string
		Reachable   *bool
		OpenCommand string `json:"open_command"`
	}
	Warnings []struct{ Code, Severity, Text, Fix string }
	Next     []string
}

// warnings returns the texts of the warnings, one a line.
func (s status) warnings() string {
	var texts []string
	for _, w := range s.Warnings {
		texts = append(texts, w.Text)
	}
	return strings.Join(texts, "\n")
}

// status runs "status --json", which has to exit with the given code and to have all the
// keys of the contract.
func (m *machine) status(t *testing.T, code int) status {
	t.Helper()
	text := m.must(t, code, "status", "--json").Stdout
	var keys map[string]json.RawMessage
	if err := json.Unmarshal([]byte(text), &keys); err != nil {
		t.Fatalf("status --json: %v\n%s", err, text)
	}
	has := func(where string, keys map[string]json.RawMessage, want ...string) {
		t.Helper()
		for _, k := range want {
			if _, ok := keys[k]; !ok {
				t.Errorf("status --json lacks the key %s%s", where, k)
			}
		}
	}
	has("", keys, "schema", "version", "state", "conditions", "profile", "backend", "ssh", "interfaces", "open", "listening", "forwarded",
		"families", "drift", "foreign", "persisted", "service", "last_verified", "pending", "unlock", "conflicts", "warnings", "next")
	for key, want := range map[string][]string{
		"profile": {"name", "source", "reason"}, "backend": {"name", "reason"},
		"ssh":      {"ports", "mode", "allow", "source", "confirm_by"},
		"families": {"ipv4", "ipv6"}, "service": {"registered", "enabled", "active"},
	} {
		var inner map[string]json.RawMessage
		if err := json.Unmarshal(keys[key], &inner); err != nil {
			t.Errorf("status --json: %s is no object: %s", key, keys[key])
		}
		has(key+".", inner, want...)
	}
	for key, want := range map[string][]string{
		"interfaces": {"name", "zone", "addresses", "default_route"},
		"open":       {"name", "proto", "ports", "zone", "from", "source"},
		"listening":  {"proto", "port", "process", "reachable", "open_command"},
		"drift":      {"family", "chain", "kind", "want", "got"},
		"foreign":    {"family", "chain", "rule", "effect"},
		"persisted":  {"path", "ok"},
		"forwarded":  {"family", "proto", "port", "on", "to", "by", "program"},
		"warnings":   {"code", "severity", "text", "fix"},
		"conditions": nil, "conflicts": nil, "next": nil,
	} {
		if want == nil {
			if !strings.HasPrefix(string(keys[key]), "[") {
				t.Errorf("status --json: %s is no list: %s", key, keys[key])
			}
			continue
		}
		var list []map[string]json.RawMessage
		if err := json.Unmarshal(keys[key], &list); err != nil || list == nil {
			t.Errorf("status --json: %s is no list of objects: %s", key, keys[key])
		}
		for _, inner := range list {
			has(key+".", inner, want...)
		}
	}
	var s status
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		t.Fatalf("status --json: %v\n%s", err, text)
	}
	return s
}

// TestStatus checks a machine in each of its states.
func TestStatus(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		if s := m.status(t, exitNotBootstrapped); s.State != "not-bootstrapped" || len(s.Next) == 0 {
			t.Errorf("before bootstrap: %+v", s)
		}
		m.must(t, exitNotBootstrapped, "status")
		m.must(t, exitNotBootstrapped, "verify")
		m.must(t, exitNotBootstrapped, "plan", "--exit-code")
		m.must(t, exitNotBootstrapped, "apply")

		m.bootstrap(t)
		s := m.status(t, exitOK)
		if s.State != "protected" || s.Profile.Name != "web+mail" || s.SSH.Mode != "pinned" ||
			!slices.Equal(s.SSH.Allow, []string{m.Client.V4.String(), m.Client.V6.String()}) ||
			s.Families[ipv4] != "protected" || s.Families[ipv6] != "protected" || len(s.Drift)+len(s.Foreign) != 0 {
			t.Errorf("after bootstrap: %+v", s)
		}
		text := m.must(t, exitOK, "status").Stdout
		says(t, text, "protected", "web+mail", m.Client.V4.String(), m.Client.V6.String(), "8080", "eth0")
		wantScreen(t, text)
		first, _, _ := strings.Cut(text, "\n")
		says(t, first, "protected")

		m.remove(t, ipv4, "INPUT", "loopback")
		if s := m.status(t, exitDrift); s.State != "drifted" || s.Families[ipv4] != "drifted" || s.Families[ipv6] != "protected" {
			t.Errorf("with a rule removed: %+v", s)
		}
		wantScreen(t, m.must(t, exitDrift, "status").Stdout)
		m.must(t, exitOK, "verify", "--repair")

		if !m.netlink {
			acceptedByOthers(t, m)
		}
		m.by(t, byTakeAway, families()...)
		if s := m.status(t, exitDrift); s.State != "unprotected" {
			t.Errorf("with all rules removed: state %q", s.State)
		}
		m.must(t, exitOK, "verify", "--repair")
		m.must(t, exitOK, "status")
	})
}

// acceptedByOthers adds another program's rules that accept packets before ours. They have
// an effect in iptables alone: in nf_tables, our table drops what they accept.
func acceptedByOthers(t *testing.T, m *machine) {
	t.Helper()
	// Another program's rule that accepts everything is no drift, but worse.
	m.iptables(t, ipv4, "-I", "INPUT", "1", "-j", "ACCEPT")
	m.wantReach(t, m.Server.V4, 8080, true, true)
	if s := m.status(t, exitDrift); s.State != "unprotected" || s.Families[ipv4] != "unprotected" || s.Families[ipv6] != "protected" || len(s.Foreign) != 1 {
		t.Errorf("with another program's ACCEPT of everything: %+v", s)
	}
	first, _, _ := strings.Cut(m.must(t, exitDrift, "status").Stdout, "\n")
	says(t, first, "unprotected")
	wantListening(t, m.status(t, exitDrift), 8080, true)
	m.iptables(t, ipv4, "-D", "INPUT", "1")
	wantListening(t, m.status(t, exitOK), 8080, false)
	for _, rule := range []string{"-p tcp --dport 8080", "-p tcp -m multiport --dports 443,8000:8090", "-s " + m.Client.V4.String()} {
		m.iptables(t, ipv4, append(append([]string{"-I", "INPUT"}, strings.Fields(rule)...), "-j", "ACCEPT")...)
		s := m.status(t, exitDrift)
		wantListening(t, s, 8080, true)
		if says(t, s.Why, "8080/tcp (", "INPUT -"); s.State != "exposed" {
			t.Errorf("with %s: %s", rule, s.State)
		}
		m.iptables(t, ipv4, "-D", "INPUT", "1")
	}
	m.iptables(t, ipv4, "-I", "INPUT", "-p", "tcp", "--dport", "8081", "-j", "ACCEPT")
	wantListening(t, m.status(t, exitDrift), 8080, false)
	m.iptables(t, ipv4, "-D", "INPUT", "1")
}

// TestStatusReachable checks that status claims nothing wrong about open but unreachable
// listeners, or without a readable desired state.
func TestStatusReachable(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 5432)
		m.bootstrap(t)
		m.must(t, exitOK, "open", "5432/tcp", "--on", "private")
		m.wantReach(t, m.Server.V4, 5432, false, false)
		s := m.status(t, exitOK)
		wantListening(t, s, 5432, false)
		wantListening(t, s, 80, true)
		wantListening(t, s, 22, true)
		says(t, s.warnings(), "no private interface exists; 5432/tcp will open when one appears")

		m.write(t, "/var/lib/basicfw/state.json", "{", 0o600)
		s = m.status(t, exitDrift)
		for _, l := range s.Listening {
			if l.Reachable == nil || *l.Reachable != (l.Port != 5432) || l.OpenCommand != "" {
				t.Errorf("the desired state cannot be read, and port %d: %+v", l.Port, l)
			}
		}
		text := m.must(t, exitDrift, "status").Stdout
		if strings.Contains(text, "open it") || strings.Contains(text, "configuration") {
			t.Errorf("status claims to know the configuration:\n%s", text)
		}
		wantScreen(t, text)
		if len(s.Next) == 0 {
			t.Fatal("status names no next command")
		}
		m.must(t, exitOK, strings.Fields(strings.TrimPrefix(s.Next[0], "basicfw-agent "))...)
		s = m.status(t, exitOK)
		wantListening(t, s, 80, true)
		if !slices.Equal(s.Conditions, []string{"protected"}) {
			t.Errorf("conditions after %q: %q", s.Next, s.Conditions)
		}
	})
}

// wantListening fails unless a listener is shown as reachable or not, and a reachable one
// without a command that opens it.
func wantListening(t *testing.T, s status, port uint16, reachable bool) {
	t.Helper()
	for _, l := range s.Listening {
		if l.Proto == "tcp" && l.Port == port {
			if l.Reachable == nil || *l.Reachable != reachable || reachable && l.OpenCommand != "" {
				t.Errorf("port %d: %+v, want it to be reachable: %v", port, l, reachable)
			}
			return
		}
	}
	t.Errorf("nothing listens on port %d: %v", port, s.Listening)
}

// wantScreen fails if a text does not fit a terminal of 80 x 24.
func wantScreen(t *testing.T, text string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) > 24 {
		t.Errorf("%d lines do not fit 24:\n%s", len(lines), text)
	}
	for _, l := range lines {
		if n := len([]rune(l)); n > 80 {
			t.Errorf("%d columns do not fit 80: %s", n, l)
		}
	}
}

// TestRenderAndPlan prints what would be loaded, and changes nothing.
func TestRenderAndPlan(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.write(t, "/etc/basicfw/agent.ini", "[agent]\nprofile = web+mail\n[ssh]\nclient_ip = "+m.Client.String()+"\n", 0o640)
		before := m.everything(t)
		rendered := map[string]string{}
		for _, family := range families() {
			if m.netlink {
				rendered[family] = m.must(t, exitOK, "render", "--family", family, "--format", "nftables").Stdout
				if r := m.Host.Run(t, lab.Command{Args: []string{"nft", "-c", "-f", "-"}, Stdin: rendered[family]}); r.Code != 0 {
					t.Errorf("nft: %s", r.Stderr)
				}
				continue
			}
			rendered[family] = m.must(t, exitOK, "render", "--family", family).Stdout
			m.load(t, family, rendered[family], "--test")
		}
		m.must(t, exitOK, "bootstrap", "--no-service", "--dry-run")
		same(t, "after render and a dry run", before, m.everything(t))

		m.must(t, exitOK, "bootstrap", "--no-service")
		if m.netlink {
			// Loading the rendered text with nft gives the same table.
			both := m.must(t, exitOK, "render", "--format", "nftables").Stdout
			now := m.table(t)
			m.nft(t, "add table inet basicfw; delete table inet basicfw\n"+both)
			same(t, "what was rendered and what was loaded", now, m.table(t))
			m.must(t, exitOK, "verify")
		}
		for _, family := range families() {
			if m.netlink {
				for _, other := range families() {
					if there := strings.Contains(rendered[family], "chain "+m.chain(other, "INPUT")); there != (other == family) {
						t.Errorf("rendered for %s, has a chain of %s: %v", family, other, there)
					}
				}
				continue
			}
			input, forward, _ := strings.Cut(strings.Join(clean(rendered[family]), "\n"), "\n*mangle\n")
			same(t, "what was rendered and what was loaded", input, strings.ReplaceAll(strings.Join(m.filter(t, family), "\n"), "-p igmp", "-p 2"))
			for _, line := range strings.Split(forward, "\n") {
				if !strings.Contains(m.rules(t), line+"\n") {
					t.Errorf("rendered, but not loaded: %s", line)
				}
			}
		}
		m.must(t, exitOK, "plan", "--exit-code")

		m.write(t, "/etc/basicfw/agent.ini", "[agent]\nprofile = web+mail\n[ssh]\nclient_ip = "+m.Client.String()+"\n"+
			"[open]\ndb = 5432/tcp from "+m.Stranger.V4.String()+"\n", 0o640)
		before = m.everything(t)
		r := m.must(t, exitDrift, "plan", "--exit-code")
		says(t, r.Stdout, "basicfw-db", "5432")
		m.must(t, exitOK, "plan")
		same(t, "after plan", before, m.everything(t))

		m.Host.Listen(t, 5432)
		m.must(t, exitOK, "apply")
		m.wantReach(t, m.Server.V4, 5432, false, true)
		m.wantReach(t, m.Server.V6, 5432, false, false)
		m.must(t, exitOK, "plan", "--exit-code")
		before = m.everything(t)
		r = m.must(t, exitOK, "apply")
		same(t, "after an apply without changes", before, m.everything(t))
		says(t, r.Stdout, "nothing")

		// An address that no rule depends on is no change.
		m.Host.MustRun(t, "ip", "addr", "add", "192.0.2.77/32", "dev", "eth0")
		if r := m.must(t, exitOK, "plan", "--exit-code"); r.Stdout != "nothing would change: profile web+mail\n" {
			t.Errorf("after another address: plan prints %q", r.Stdout)
		}
		m.must(t, exitOK, "apply")
		m.must(t, exitOK, "plan", "--exit-code")
	})
}

// TestNoClientKnown bootstraps without any client: SSH stays open, with a warning.
func TestNoClientKnown(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		r := m.must(t, exitOK, "bootstrap", "--profile", "web-only", "--no-service")
		says(t, r.Stdout+r.Stderr, "ssh allow")
		for _, to := range m.Server.Both() {
			m.wantReach(t, to, 22, true, true)
			m.wantReach(t, to, 8080, false, false)
		}
		if s := m.status(t, exitOK); s.SSH.Mode != "limited" || len(s.Warnings) == 0 || len(s.Next) == 0 {
			t.Errorf("status: %+v", s)
		}
		// The limit is per source: one that exceeds it does not block another.
		to := m.Server.V4
		lab.Poll(t, "the stranger to be over the limit", func() bool {
			return m.Outsider.Reach(m.Stranger.V4, to, 22, lab.Brief) != nil
		})
		if err := m.Outsider.Reach(m.Client.V4, to, 22, lab.Patient); err != nil {
			t.Errorf("another source is blocked, too: %v", err)
		}
	})
}

// TestMeanwhile runs status and verify continuously while commands change the rules: a
// change under way is no drift.
func TestMeanwhile(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 8 {
				for _, words := range [][]string{{"open", "8080/tcp"}, {"close", "8080/tcp"}} {
					if r := m.agent(t, words...); r.Code != exitOK {
						t.Errorf("%v: exit code %d: %s", words, r.Code, r.Stderr)
					}
				}
			}
		}()
		for rounds := 0; ; rounds++ {
			for _, words := range [][]string{{"status"}, {"verify"}} {
				if r := m.agent(t, words...); r.Code != exitOK {
					t.Errorf("%v during a change: exit code %d\n%s%s", words, r.Code, r.Stdout, r.Stderr)
				}
			}
			select {
			case <-done:
				if rounds < 1 {
					t.Errorf("only %d rounds", rounds)
				}
				return
			default:
			}
		}
	})
}
