package kernel_test

import (
	"slices"
	"strings"
	"testing"
)

// TestHazards checks the warnings of status about what other programs do that a stateful
// firewall does not expect. Each scene stays until the end.
func TestHazards(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 443, 6443)
		m.bootstrap(t)
		if w := m.status(t, exitOK).Warnings; len(w) > 0 {
			t.Fatalf("before: %q", w)
		}
		want := []string{}
		warned := func(code, text, fix string) {
			t.Helper()
			want = append(want, code)
			s := m.status(t, exitOK)
			codes := []string{}
			for _, w := range s.Warnings {
				if w.Code == "backend" { // iptables does not work
					continue
				}
				codes = append(codes, w.Code)
				if w.Code == code && (!strings.Contains(w.Text, text) || w.Fix != fix) {
					t.Errorf("%+v, want %q and %q", w, text, fix)
				}
			}
			if slices.Sort(want); !slices.Equal(slices.Sorted(slices.Values(codes)), want) {
				t.Errorf("%q, want %q", codes, want)
			}
		}
		for _, family := range families() {
			m.iptables(t, family, strings.Fields("-t raw -A PREROUTING -p tcp --dport 80 -j CT --notrack")...)
			m.iptables(t, family, strings.Fields("-t raw -A OUTPUT -p tcp --sport 80 -j CT --notrack")...)
		}
		m.wantReach(t, m.Server.V4, 80, true, true)
		warned("port-untracked", "80/tcp is exempt from conntrack", "remove this rule unless the server is busy")

		m.must(t, exitOK, "open", "9000/tcp")
		for _, family := range families() {
			m.iptables(t, family, strings.Fields("-t nat -A PREROUTING -p tcp --dport 9000 -j REDIRECT --to-ports 9000")...)
		}
		m.wantReach(t, m.Server.V4, 9000, false, false)
		warned("redirect-unanswered", "9000/tcp is redirected to port 9000, where nothing listens", "start the server, or remove the rule in nat PREROUTING")

		m.Host.MustRun(t, "ip", "link", "add", "cni0", "type", "bridge")
		m.Host.MustRun(t, "ip", "addr", "add", "10.42.0.1/24", "dev", "cni0")
		m.Host.MustRun(t, "ip", "link", "set", "cni0", "up")
		const fix = "basicfw-agent open 6443/tcp --on cni0"
		warned("cluster-api", "pods on cni0", fix)
		m.must(t, exitOK, strings.Fields(fix)[1:]...)
		if s := m.status(t, exitOK); strings.Contains(s.warnings(), "pods on cni0") {
			t.Errorf("%s: %q", fix, s.Warnings)
		}

		m.Host.MustRun(t, "ip", "link", "add", "eth9", "type", "veth", "peer", "name", "peer9")
		m.Host.MustRun(t, "ip", "addr", "add", "198.51.100.1/24", "dev", "eth9")
		m.Host.MustRun(t, "ip", "link", "set", "peer9", "up")
		m.Host.MustRun(t, "ip", "link", "set", "eth9", "up")
		m.Host.MustRun(t, "sysctl", "-qw", "net.ipv4.conf.eth9.rp_filter=1")
		s := m.status(t, exitOK)
		for _, w := range s.Warnings {
			if w.Code == "reply-route" {
				m.Host.MustRun(t, strings.Fields(w.Fix)...)
				return
			}
		}
		t.Errorf("no reply-route: %q", s.Warnings)
	})
}
