package kernel_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// onBeside runs a test on machines whose administrator chose nftables while
// iptables works and may hold other programs' rules.
func onBeside(t *testing.T, test func(t *testing.T, m *machine)) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.write(t, agentINI, "[agent]\nbackend = nftables\n", 0o640)
		test(t, m)
	})
}

// TestBesideStock starts with the distribution's own iptables rules. The REJECT
// at the end of its INPUT would refuse whatever we accept.
func TestBesideStock(t *testing.T) {
	onBeside(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.stocked(t)
		before := m.everything(t)
		m.bootstrap(t)
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
		for _, family := range families() {
			lines := m.filter(t, family)
			if i := slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "-A INPUT") || strings.Contains(l, "BASICFW") }); i >= 0 {
				t.Errorf("%s: iptables still has %q", family, lines[i])
			}
			if !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, "-A FORWARD -j REJECT") }) {
				t.Errorf("%s: the rule in FORWARD was removed:\n%s", family, strings.Join(lines, "\n"))
			}
		}
		m.must(t, exitOK, "verify")
		if s := m.status(t, exitOK); s.State != "protected" || len(s.Foreign) > 0 {
			t.Errorf("status: %+v", s)
		}

		// A boot loads what remains of the distribution's files.
		m.reboot(t)
		for _, family := range families() {
			m.load(t, family, m.read(t, rulesFile(family)))
		}
		s := m.serve(t)
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
		s.Stop(t)
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "uninstall")
		same(t, "after uninstall", before, m.everything(t))
	})
}

// TestBesideAccept adds an ACCEPT of everything to iptables. Our table still
// closes the machine, and status says so.
func TestBesideAccept(t *testing.T) {
	onBeside(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.bootstrap(t)
		for _, family := range families() {
			m.iptables(t, family, "-I", "INPUT", "-j", "ACCEPT")
		}
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
		s := m.status(t, exitOK)
		if s.State != "protected" || s.Families[ipv4] != "protected" || s.Families[ipv6] != "protected" || len(s.Drift) > 0 || len(s.Foreign) != 2 {
			t.Errorf("status: %+v", s)
		}
		for _, f := range s.Foreign {
			says(t, f.Effect, "opens nothing")
		}
		wantListening(t, s, 8080, false)
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "verify", "--repair")
		for _, family := range families() { // the rules are not ours to remove
			if !slices.Contains(m.filter(t, family), "-A INPUT -j ACCEPT") {
				t.Errorf("%s: another program's rule is gone", family)
			}
		}
	})
}

// TestBesideReject appends a REJECT of everything to iptables' INPUT: no port
// answers any more. Status names the rule and the command that removes it.
func TestBesideReject(t *testing.T) {
	onBeside(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80)
		m.bootstrap(t)
		for _, family := range families() {
			m.iptables(t, family, "-A", "INPUT", "-j", "REJECT")
		}
		m.wantOpen(t, map[string]string{"80/tcp": nobody})
		// The rule belongs to another program; it is no drift.
		s := m.status(t, exitDrift)
		if !slices.Equal(s.Conditions, []string{"blocked"}) {
			t.Errorf("conditions %q", s.Conditions)
		}
		for _, family := range families() {
			if !named(s.warnings(), []string{family, "-j REJECT", "drops everything"}) {
				t.Errorf("%s: no warning about it: %q", family, s.Warnings)
			}
		}
		text := m.must(t, exitDrift, "status").Stdout
		wantScreen(t, text)
		says(t, text, "warning      ipv4: ", "next         iptables -D INPUT -j REJECT")
		wantListening(t, s, 80, false)
		says(t, m.must(t, exitOK, "verify").Stdout, "-j REJECT", "no port answers")
		ran := 0
		for _, command := range s.Next {
			if strings.Contains(command, "tables -D INPUT ") {
				m.Host.MustRun(t, "sh", "-c", "PATH=/usr/local/sbin:$PATH; "+command)
				ran++
			}
		}
		if ran != 2 {
			t.Errorf("next is %q, want the commands that remove the rules", s.Next)
		}
		m.wantOpen(t, map[string]string{"80/tcp": everybody})
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "status")
	})
}

// TestBesidePolicy sets the policy of iptables' INPUT to DROP. The policy is ours
// to set, and is restored.
func TestBesidePolicy(t *testing.T) {
	onBeside(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80)
		m.bootstrap(t)
		rules := m.rules(t)
		m.iptables(t, ipv4, "-P", "INPUT", "DROP")
		m.wantReach(t, m.Server.V4, 80, false, false)
		if r := m.must(t, exitDrift, "verify"); !named(r.Stdout, []string{ipv4, "INPUT", "policy DROP"}) {
			t.Errorf("verify does not name the policy: %s", r.Stdout)
		}
		m.must(t, exitDrift, "status")
		m.must(t, exitOK, "verify", "--repair")
		same(t, "rules after the repair", rules, m.rules(t))
		m.wantOpen(t, map[string]string{"80/tcp": everybody})
		m.must(t, exitOK, "verify")

		s := m.quiet(t)
		for _, family := range families() {
			m.iptables(t, family, "-P", "INPUT", "DROP")
		}
		// The kernel reports no changes of legacy tables.
		m.back(t, map[string]time.Duration{"nft": repaired, "legacy": repairedLate}[m.variant()], "the policies, with the service", rules)
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody})
		s.Stop(t)
	})
}

// TestBesideOverridden adds a VPN's chain that accepts what arrives over the tunnel. With
// nftables that opens nothing, and a hint says how to open it.
func TestBesideOverridden(t *testing.T) {
	onBeside(t, func(t *testing.T, m *machine) {
		for _, family := range families() {
			m.load(t, family, foreign(family))
		}
		before := m.rules(t)
		m.bootstrap(t)
		same(t, "other programs' rules", withoutOurs(before), withoutOurs(m.rules(t)))
		const hint = `"trusted = tailscale0"`
		says(t, m.status(t, exitOK).warnings(), "ts-input", hint)
		m.write(t, agentINI, "[agent]\nbackend = nftables\n[interfaces]\ntrusted = tailscale0\n", 0o640)
		m.must(t, exitOK, "apply")
		if s := m.status(t, exitOK); strings.Contains(s.warnings(), "ts-input") || s.State != "protected" {
			t.Errorf("with the interface trusted: state %q, warnings %q", s.State, s.Warnings)
		}
		m.must(t, exitOK, "uninstall")
		same(t, "rules after uninstall", before, m.rules(t))
	})
}

// prober sends to ports from an address of the outsider without pause.
type prober struct {
	sent, answers atomic.Int64
	stop          func()
}

// probe starts a prober for a UDP and a TCP port of the server, in both families.
func (m *machine) probe(t *testing.T, udp, tcp uint16) *prober {
	t.Helper()
	p := &prober{}
	var wg sync.WaitGroup
	var ended atomic.Bool
	p.stop = sync.OnceFunc(func() { ended.Store(true); wg.Wait() })
	t.Cleanup(p.stop)
	for _, to := range m.Server.Both() {
		from := m.Stranger.Like(to)
		var c net.Conn
		err := m.Outsider.Do(func() (err error) {
			d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
			c, err = d.Dial("udp", netip.AddrPortFrom(to, udp).String())
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		wg.Add(3)
		go func() { // a datagram every 200 microseconds
			defer wg.Done()
			defer c.Close()
			tick := time.NewTicker(200 * time.Microsecond)
			defer tick.Stop()
			for ; !ended.Load(); <-tick.C {
				// An ICMP error is reported by the next write.
				if _, err := c.Write([]byte("?")); err == nil {
					p.sent.Add(1)
				} else if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) {
					p.answers.Add(1)
				}
			}
		}()
		go func() {
			defer wg.Done()
			buf := make([]byte, 10)
			for !ended.Load() {
				if n, err := c.Read(buf); n > 0 || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) {
					p.answers.Add(1)
				}
			}
		}()
		go func() {
			defer wg.Done()
			for !ended.Load() {
				p.sent.Add(1)
				// A refused connection is an answer, too.
				if err := m.Outsider.Reach(from, to, tcp, lab.Brief/4); err == nil || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) {
					p.answers.Add(1)
				}
			}
		}()
	}
	lab.Poll(t, "the prober to send", func() bool { return p.sent.Load() > 50 })
	return p
}

// TestBesideSwitch switches the backend back and forth while SSH sessions are
// open and a prober looks for a moment in which a closed port answers.
func TestBesideSwitch(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		const closed = 8080
		m.Host.Listen(t, 22, 80, closed)
		m.Host.ListenUDP(t, 9000)
		m.stocked(t)
		before := m.everything(t)
		bare := map[string][]string{} // iptables with an empty INPUT and none of our rules
		for _, family := range families() {
			bare[family] = slices.DeleteFunc(m.filter(t, family), func(l string) bool { return strings.HasPrefix(l, "-A INPUT ") })
		}
		to := func(backend string) {
			t.Helper()
			m.must(t, exitOK, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service", "--no-selftest", "--backend", backend)
			if s := m.status(t, exitOK); s.Backend.Name != backend || s.State != "protected" {
				t.Errorf("switched to %s: %+v", backend, s.Backend)
			}
			m.must(t, exitOK, "verify")
			m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
		}
		to("iptables")
		rules, kept := m.rules(t), m.tree(t, false, "etc/sysconfig")
		p := m.probe(t, 9000, closed)
		var sessions []*lab.Session
		for _, a := range m.Server.Both() {
			s, err := m.Outsider.Dial(m.Client.Like(a), a, 22, lab.Patient)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			sessions = append(sessions, s)
		}
		for range 3 {
			to("nftables")
			for _, family := range families() {
				if got := m.filter(t, family); !slices.Equal(got, bare[family]) {
					t.Errorf("%s: iptables differs:%s", family, difference(strings.Join(bare[family], "\n"), strings.Join(got, "\n")))
				}
			}
			// A rule of INPUT that drops does not return at a boot either.
			for _, family := range families() {
				text := m.read(t, rulesFile(family))
				if strings.Contains(text, "BASICFW") || strings.Contains(text, "-A INPUT") || strings.Contains(text, ":INPUT DROP") || !strings.Contains(text, "# sample configuration") {
					t.Errorf("%s: the iptables file is\n%s", family, text)
				}
			}
			to("iptables")
			same(t, "rules", rules, m.rules(t))
			same(t, "iptables files", kept, m.tree(t, false, "etc/sysconfig"))
			if m.table(t) != "" || m.exists(t, tableFile) {
				t.Errorf("left in nf_tables: %q, and in /etc: %s", m.table(t), m.tree(t, false, "etc"))
			}
			for _, s := range sessions {
				if err := s.Talk(); err != nil {
					t.Errorf("a session opened before: %v", err)
				}
			}
		}
		to("nftables")
		sent := p.sent.Load()
		p.stop()
		if n := p.answers.Load(); n > 0 {
			t.Errorf("of %d probes of closed ports %d were answered", sent, n)
		}
		t.Logf("%d probes", sent)
		m.must(t, exitOK, "uninstall")
		if err := os.RemoveAll(filepath.Join(m.root, "run/xtables.lock")); err != nil {
			t.Fatal(err)
		}
		same(t, "after uninstall", before, m.everything(t))
	})
}
