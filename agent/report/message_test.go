package report

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// TestMessage checks that there is a login message only while something needs attention, and
// that it contains no client address.
func TestMessage(t *testing.T) {
	client := netip.MustParsePrefix("192.0.2.9/32")
	for _, tt := range []struct {
		name   string
		change func(*Input)
		want   []string // pieces of its lines; none is no message
	}{
		{"protected", func(*Input) {}, nil},
		{"not bootstrapped", func(in *Input) { *in = Input{Err: store.ErrNone} }, nil},
		{"no client is known", func(in *Input) {
			in.State.Desired.SSH, in.State.Client.Source = firewall.SSH{Mode: firewall.SSHLimited}, "none"
		}, []string{"SSH is open to any address. Run: basicfw-agent ssh allow me"}},
		{"the settings allow any address", func(in *Input) {
			in.State.Desired.SSH, in.State.Client.Source = firewall.SSH{Mode: firewall.SSHLimited}, "any"
		}, nil},
		{"probation", func(in *Input) {
			in.State.Desired.SSH.Probation = &firewall.Probation{Window: firewall.Window{Until: in.Now.Time.Add(time.Hour)}}
		}, []string{"unless the detected client logs in with a new session. Run: basicfw-agent confirm"}},
		{"blocked", func(in *Input) { in.State.Desired.SSH.Allow = nil }, []string{"SSH is blocked for every address"}},
		{"failsafe", func(in *Input) {
			in.State.Failsafe = "client_ip is 192.0.2.9"
			in.State.Desired.SSH, in.State.Client.Source = firewall.SSH{Mode: firewall.SSHLimited}, "none"
		}, []string{"failsafe: SSH is open to any address, limited; your settings are not loaded. Run: basicfw-agent bootstrap"}},
		{"drifted", func(in *Input) {
			in.Drift = []firewall.Drift{{Chain: "x", Kind: firewall.Extra, Got: "-s 192.0.2.9 -j ACCEPT"}}
			in.RepairPaused = []string{"repairs do not last\x1b[31m"}
		}, []string{"drifted: the rules differ from the configuration. Run: basicfw-agent status", "repairs of the rules fail or do not last. Run: basicfw-agent status"}},
		{"unprotected and unlocked", func(in *Input) {
			in.Inspection.Exposed = []backend.Finding{{Family: firewall.IPv4, Why: "-s 192.0.2.9"}}
			in.Drift = []firewall.Drift{{Chain: "x", Kind: firewall.Missing}}
			in.State.Desired.Unlock = &firewall.Unlock{From: []netip.Prefix{client}, Window: firewall.Window{Until: in.Now.Time.Add(time.Hour)}}
		}, []string{"unprotected: ports are open that should be closed. Run: basicfw-agent status", "unlocked: more is open until 2026-03-01T13:00:00Z. Run: basicfw-agent lock"}},
		{"forwarded", func(in *Input) {
			beside(t, in, "nat", "-A PREROUTING -j DOCKER\n-A DOCKER -p tcp -m tcp --dport 5432 -j DNAT --to-destination 172.17.0.2:5432")
		}, []string{"5432/tcp is published by Docker, bypassing this firewall. Run: basicfw-agent status"}},
		{"exposed and blocked", func(in *Input) {
			beside(t, in, "filter", "-A INPUT -s 192.0.2.9/32 -p tcp -m tcp --dport 8080 -j ACCEPT")
			beside(t, in, "raw", "-A PREROUTING -p tcp -m tcp --dport 80 -j DROP")
		}, []string{"exposed: other rules open ports that your settings do not. Run: basicfw-agent status", "blocked: other rules drop what your settings allow. Run: basicfw-agent status"}},
		{"open within a limit", func(in *Input) {
			beside(t, in, "filter", "-A INPUT -p tcp -m tcp --dport 8080 -m limit --limit 3/min -j ACCEPT")
		}, nil},
	} {
		in := ordinary(t)
		in.State.Client = store.Client{Source: "named", Reason: "why", Allow: []netip.Prefix{client}}
		in.State.Desired.SSH.Allow = []netip.Prefix{client}
		tt.change(&in)
		got := New(in).Message()
		lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
		if got == "" {
			lines = nil
		}
		if len(lines) != len(tt.want) || strings.Contains(got, "192.0.2.9") {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
			continue
		}
		for i, want := range tt.want {
			if !strings.HasPrefix(lines[i], "basicfw: ") || !strings.Contains(lines[i], want) {
				t.Errorf("%s: %q, want %q", tt.name, lines[i], want)
			}
		}
	}
}
