package agent

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// What was open for a while goes from the rules, from the state and from the
// settings when it has ended, and not before.
func TestLookClearsWhatEnded(t *testing.T) {
	const local = "/etc/basicfw/local.ini"
	for _, broken := range []bool{false, true} {
		b := newBench(t)
		begin := time.Now().UTC().Truncate(time.Second)
		now := begin
		b.agent.Now = func() time.Time { return now }
		b.write(t, local, "with it")
		st := decided(t, "192.0.2.9/32")
		end := begin.Add(time.Minute)
		st.Desired.Open = []firewall.Service{{Name: "x", Proto: firewall.TCP, Ports: firewall.Port(8080), On: "any", Until: end}}
		st.Desired.SSH.Timed = []firewall.TimedSource{{From: netip.MustParsePrefix("192.0.2.10/32"), Until: end.Add(time.Hour)}}
		st.Allowed = []store.Allowed{{From: netip.MustParsePrefix("192.0.2.10/32"), Until: end.Add(time.Hour), Reason: "test"}}
		var err error
		if st.Ruleset, err = firewall.Compile(st.Desired); err != nil {
			t.Fatal(err)
		}
		if _, err := b.agent.Converge(context.Background(), st, options()); err != nil {
			t.Fatal(err)
		}
		b.write(t, local, "with it")
		o := RunOptions{Ports: noPorts, Instance: func() string { return "" }, Look: func() ([]firewall.Interface, error) { return nil, nil },
			Prune: func() (*Change, error) {
				if broken {
					return nil, errors.New("a typing mistake")
				}
				return &Change{Path: local, Data: []byte("without it"), Mode: 0o600}, nil
			}}
		for _, c := range []struct {
			after       time.Duration
			changed     bool
			open, timed int
			settings    string
		}{
			{0, false, 1, 1, "with it"},
			{time.Minute, false, 1, 1, "with it"},
			{time.Minute + time.Second, true, 0, 1, "without it"},
			{time.Minute + 2*time.Second, false, 0, 1, "without it"},
			{2 * time.Hour, true, 0, 0, "without it"},
		} {
			now = begin.Add(c.after)
			changed, err := look(b.agent, o)
			if err != nil || changed != c.changed {
				t.Errorf("after %v: changed %v, %v", c.after, changed, err)
			}
			st, err := b.agent.Store.Load()
			if err != nil {
				t.Fatal(err)
			}
			if len(st.Desired.Open) != c.open || len(st.Desired.SSH.Timed) != c.timed || len(st.Allowed) != c.timed {
				t.Errorf("after %v: %v, %v, %v", c.after, st.Desired.Open, st.Desired.SSH.Timed, st.Allowed)
			}
			if rules, err := firewall.Compile(st.Desired); err != nil || !b.kernel.rules.Equal(rules) {
				t.Errorf("after %v: the kernel has other rules, %v", c.after, err)
			}
			want := c.settings
			if broken {
				want = "with it"
			}
			if data, _ := os.ReadFile(b.root + local); string(data) != want {
				t.Errorf("after %v: the settings are %q, want %q", c.after, data, want)
			}
		}
	}
}

// The login message is there only while something needs the owner.
func TestMessage(t *testing.T) {
	pinned := SSHStatus{Mode: "pinned", Allow: []string{"192.0.2.9"}, Source: "named"}
	for _, tt := range []struct {
		name   string
		status Status
		want   []string // what its lines say; none is no message
	}{
		{"protected", Status{State: Protected, SSH: pinned}, nil},
		{"not bootstrapped", Status{State: NotBootstrapped, SSH: SSHStatus{Mode: "unlocked"}}, nil},
		{"nobody is known", Status{State: Protected, SSH: SSHStatus{Mode: "limited", Source: "none"}}, []string{"basicfw-agent ssh allow me"}},
		{"any is what the owner wants", Status{State: Protected, SSH: SSHStatus{Mode: "limited", Source: "any"}}, nil},
		{"nobody", Status{State: Protected, SSH: SSHStatus{Mode: "pinned", Source: "settings"}}, []string{"SSH is for nobody"}},
		{"failsafe", Status{State: FailsafeState, Why: "because", SSH: pinned}, []string{"because. Run: basicfw-agent bootstrap"}},
		{"drifted", Status{State: Drifted, Why: "because\x1b[31m", SSH: pinned}, []string{"because?[31m. Run: basicfw-agent status"}},
		{"forwarded", Status{State: Protected, SSH: pinned, Bypass: []firewall.Bypass{
			{Family: "ipv4", Proto: "tcp", Port: "5432", Program: "Docker"}, {Family: "ipv6", Proto: "tcp", Port: "5432", Program: "Docker"}}},
			[]string{"5432/tcp is published by Docker past this firewall"}},
	} {
		got := tt.status.message()
		lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
		if got == "" {
			lines = nil
		}
		if len(lines) != len(tt.want) {
			t.Errorf("%s: %q", tt.name, got)
			continue
		}
		for i, want := range tt.want {
			if !strings.HasPrefix(lines[i], "basicfw: ") || !strings.Contains(lines[i], want) {
				t.Errorf("%s: %q, want %q", tt.name, lines[i], want)
			}
		}
	}
}

// Announce puts the message where it belongs and takes it away again, and
// writes only what is new. Uninstall leaves neither it nor its directory.
func TestAnnounce(t *testing.T) {
	b := newBench(t)
	st := decided(t, "192.0.2.9/32")
	if _, err := b.agent.Converge(context.Background(), st, options()); err != nil {
		t.Fatal(err)
	}
	b.write(t, reloadFile, "")
	if err := b.agent.linkIssue(); err != nil {
		t.Fatal(err)
	}
	open := st
	open.Client.Source, open.Desired.SSH = "none", firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHLimited}
	for _, c := range []struct {
		st      store.State
		there   bool
		changes bool
	}{{st, false, true}, {st, false, false}, {open, true, true}, {open, true, false}, {st, false, true}, {open, true, true}} {
		before := len(b.steps)
		if err := b.agent.Announce(c.st, Facts{}, firewall.Inspection{}); err != nil {
			t.Fatal(err)
		}
		if there := b.agent.System.Exists(MessageFile); there != c.there || len(b.steps) > before != c.changes {
			t.Errorf("there %v, want %v; %q", there, c.there, b.steps[before:])
		}
		// The console says who may come in, to root's eyes only.
		issue, err := os.ReadFile(b.root + IssueFile)
		if says := strings.Contains(string(issue), "SSH is for 192.0.2.9 only") && strings.Contains(string(issue), "basicfw-agent unlock"); says == c.there {
			t.Errorf("the console says %q, %v", issue, err)
		}
		if target, err := os.Readlink(b.root + issueLink); target != IssueFile {
			t.Errorf("beside /etc/issue there is %q, %v", target, err)
		}
		if fi, err := os.Stat(b.root + IssueFile); err == nil && fi.Mode() != 0o600 {
			t.Errorf("the console's text is %v", fi.Mode())
		}
	}
	if err := b.agent.Uninstall(context.Background()); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"/etc/motd.d", "/run/issue.d", "/etc/issue.d"} {
		if b.agent.System.Exists(dir) {
			t.Errorf("something is left in %s", dir)
		}
	}
}
