package kernel_test

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

const (
	// repaired is the time for a repair if the kernel reports changes, beside other tests.
	// Alone, two seconds are enough: TestFollow.
	repaired = 12 * time.Second
	// repairedLate is the time if it does not.
	repairedLate = 70 * time.Second
)

// back waits until the rules are what they were, and logs how long it took.
func (m *machine) back(t *testing.T, within time.Duration, what, rules string) {
	t.Helper()
	start := time.Now()
	by(t, start.Add(within), what, func() bool { return m.rules(t) == rules })
	t.Logf("%s: repaired after %v", what, time.Since(start).Round(time.Millisecond))
	same(t, what, rules, m.rules(t))
}

// settle waits until no address is tentative.
func (m *machine) settle(t *testing.T) {
	t.Helper()
	lab.Poll(t, "the addresses to be settled", func() bool {
		return m.Host.MustRun(t, "ip", "-6", "addr", "show", "tentative") == ""
	})
}

// quiet starts the service and waits until it has no reason to check the rules: at first,
// the lab's own addresses are events, too.
func (m *machine) quiet(t *testing.T) *service {
	t.Helper()
	s := m.serve(t)
	m.settle(t)
	var note string
	since := time.Now()
	lab.Poll(t, "the service to rest", func() bool {
		if now := m.read(t, "/run/basicfw-agent/watch.json"); now != note {
			note, since = now, time.Now()
		}
		return time.Since(since) > 1500*time.Millisecond
	})
	return s
}

// repairDamages returns manual changes of a machine's rules, each with what the log has to
// say about it.
func repairDamages() []damage {
	each := func(do hand) func(t *testing.T, m *machine) {
		return func(t *testing.T, m *machine) { t.Helper(); m.by(t, do, families()...) }
	}
	return []damage{
		{name: "iptables -F; iptables -X", what: []string{"another program flushed the ipv4 and ipv6 rules"},
			do: each(hand{"-F; -X", byTakeAway.nft})},
		{name: "iptables -F", what: []string{"another program flushed the ipv4 and ipv6 rules"}, do: each(byFlush)},
		{name: "iptables -P INPUT ACCEPT", what: []string{"difference", "ipv6 INPUT", "policy accept"}, do: each(byPolicy)},
		{name: "a rule of IPv6 only", what: []string{"difference", "ipv6 ", "basicfw-invalid"}, do: func(t *testing.T, m *machine) {
			t.Helper()
			m.remove(t, ipv6, "INPUT", "invalid")
		}},
	}
}

// told lists the variants whose changes the kernel reports.
var told = []string{"nft", "netlink"}

// TestWatchRepairs damages the rules while the service runs, if the kernel reports it.
func TestWatchRepairs(t *testing.T) {
	for _, d := range repairDamages() {
		t.Run(strings.ReplaceAll(d.name, " ", "-"), func(t *testing.T) {
			on(t, told, func(t *testing.T, m *machine) {
				m.Host.Listen(t, 22, 80, 8080)
				m.bootstrap(t)
				rules := m.rules(t)
				s := m.quiet(t)
				var sessions []*lab.Session
				for _, to := range m.Server.Both() {
					session, err := m.Outsider.Dial(m.Client.Like(to), to, 22, lab.Patient)
					if err != nil {
						t.Fatal(err)
					}
					defer session.Close()
					sessions = append(sessions, session)
				}
				d.do(t, m)
				m.back(t, repaired, d.name, rules)
				for _, session := range sessions {
					if err := session.Talk(); err != nil {
						t.Errorf("a session opened before: %v", err)
					}
				}
				m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
				m.must(t, exitOK, "status")
				lab.Poll(t, "the status for monitoring to follow", func() bool { return m.public(t).State == "protected" })
				// The chains of the two variants have the same names but for their case.
				if r := s.Stop(t); !named(strings.ToLower(r.Stderr), lower(d.what)) {
					t.Errorf("no line with %q in the log:\n%s", d.what, r.Stderr)
				}
			})
		})
	}
}

func lower(words []string) []string {
	var out []string
	for _, w := range words {
		out = append(out, strings.ToLower(w))
	}
	return out
}

// TestWatchEachMinute makes changes that are not reported: the kernel reports none of
// legacy tables.
func TestWatchEachMinute(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "legacy")
	m.Host.Listen(t, 22, 80, 8080)
	m.bootstrap(t)
	rules := m.rules(t)
	s := m.quiet(t)
	damages := repairDamages()
	damages[3].do(t, m)
	damages[0].do(t, m)
	damages[2].do(t, m)
	m.back(t, repairedLate, "all at once", rules)
	m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
	says(t, s.Stop(t).Stderr, "flushed")
}

// TestWatchFiles changes the persisted files.
func TestWatchFiles(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		files := m.tree(t, false, m.keptIn())
		s := m.quiet(t)
		for _, name := range []string{"file removed", "policy altered in file"} {
			for _, d := range m.fileDamages() {
				if strings.HasSuffix(d.name, name) {
					d.do(t, m)
				}
			}
			whole := func() bool {
				for _, path := range m.persisted() {
					if !m.exists(t, path) {
						return false
					}
				}
				return m.tree(t, false, m.keptIn()) == files
			}
			by(t, time.Now().Add(repaired), name, whole)
		}
		says(t, s.Stop(t).Stderr, append([]string{"another program changed a persisted file"}, m.persisted()...)...)
	})
}

// TestWatchInterfaces adds and removes an interface in a zone on which a service is open.
func TestWatchInterfaces(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 5432)
		m.write(t, agentINI, "[interfaces]\nprivate = lan*\n[open]\ndb = 5432/tcp on private\n", 0o640)
		m.bootstrap(t)
		before := m.rules(t)
		s := m.quiet(t)
		office := lab.Addrs{V4: netip.MustParseAddr("10.7.0.1"), V6: netip.MustParseAddr("fd00:7::1")}
		guest := lab.Addrs{V4: netip.MustParseAddr("10.7.0.2"), V6: netip.MustParseAddr("fd00:7::2")}
		m.wantOpen(t, map[string]string{"5432/tcp": nobody})

		// A link of its own.
		m.Wire(t, "lan0")
		for _, end := range []struct {
			n *lab.Namespace
			a lab.Addrs
		}{{m.Outsider, guest}, {m.Host, office}} {
			end.n.MustRun(t, "ip", "addr", "add", end.a.V4.String()+"/24", "dev", "lan0")
			end.n.MustRun(t, "ip", "addr", "add", end.a.V6.String()+"/64", "dev", "lan0", "nodad")
			end.n.MustRun(t, "ip", "link", "set", "lan0", "up")
		}
		start := time.Now()
		by(t, start.Add(repaired), "the rules for the new interface", func() bool { return strings.Contains(m.rules(t), m.from("lan0")) })
		t.Logf("the rules have the interface after %v", time.Since(start).Round(time.Millisecond))
		for _, to := range office.Both() {
			if err := m.Outsider.Reach(guest.Like(to), to, 5432, lab.Patient); err != nil {
				t.Errorf("the service of the new interface: %v", err)
			}
			if err := m.Outsider.Reach(guest.Like(to), to, 22, lab.Brief); err == nil {
				t.Error("SSH is open on the new interface")
			}
		}
		m.wantOpen(t, map[string]string{"5432/tcp": nobody})
		m.must(t, exitOK, "verify")
		m.Host.MustRun(t, "ip", "link", "del", "lan0")
		m.back(t, repaired, "the interface was removed", before)
		s.Stop(t)
	})
}

// lookedSince waits until the service has verified the desired state.
func (m *machine) lookedSince(t *testing.T, when time.Time) {
	t.Helper()
	lab.Poll(t, "the service to verify", func() bool {
		var note struct{ Verified time.Time }
		data, err := os.ReadFile(filepath.Join(m.root, "run/basicfw-agent/watch.json"))
		return err == nil && json.Unmarshal(data, &note) == nil && note.Verified.After(when)
	})
}

// TestWatchTemporary damages temporary rules: they are repaired, not removed.
func TestWatchTemporary(t *testing.T) {
	on(t, told, testWatchTemporary)
}

func testWatchTemporary(t *testing.T, m *machine) {
	m.Host.Listen(t, 22, 80, 8080)
	m.settings(t, "")
	m.must(t, exitOK, "bootstrap", "--no-service")
	rules := m.rules(t)
	s := m.quiet(t)
	stays := func(what string) {
		t.Helper()
		start, now := time.Now(), m.rules(t)
		if now == rules {
			t.Fatalf("%s changes no rule", what)
		}
		m.lookedSince(t, start)
		same(t, what+", after a check", now, m.rules(t))
		m.by(t, byFlush, families()...)
		m.back(t, repaired, what+", flushed", now)
	}
	m.settings(t, "[open]\nx = 8080/tcp\n")
	m.must(t, exitOK, "apply", "--confirm", "8s")
	m.Host.MustRun(t, "pkill", "-KILL", "-f", program+" --root "+m.root+" expire")
	stays("a pending change")
	m.rolledBack(t, rules, "not confirmed within 8s")
	m.settings(t, "")

	m.must(t, exitOK, "unlock", "--all", "--for", "6s")
	stays("unlocked")
	lab.Poll(t, "the unlock to expire", func() bool { return m.rules(t) == rules })
	start := time.Now()
	m.lookedSince(t, start.Add(-time.Second))
	same(t, "in the end", rules, m.rules(t))
	m.must(t, exitOK, "verify")
	s.Stop(t)
}

// port22 matches a rule for that port, alone or among others.
var port22 = regexp.MustCompile(`dport (\{ )?(\d+, )*22[ ,]`)

// TestWatchSSHD moves sshd to another port. The new port is open before sshd listens on it,
// the old one as long as it does.
func TestWatchSSHD(t *testing.T) {
	on(t, told, testWatchSSHD)
}

func testWatchSSHD(t *testing.T, m *machine) {
	old := m.sshd(t)
	m.write(t, "/etc/ssh/sshd_config", "Include /etc/ssh/sshd_config.d/*.conf\nPort 22\n", 0o600)
	m.bootstrap(t)
	s := m.quiet(t)
	m.wantOpen(t, map[string]string{"22/tcp": "client4 client6"})
	m.write(t, "/etc/ssh/sshd_config.d/port.conf", "Port 2222\n", 0o600)
	start := time.Now()
	by(t, start.Add(repaired), "the rules for the port in a new file", func() bool { return strings.Contains(m.rules(t), "2222") })
	t.Logf("open after %v", time.Since(start).Round(time.Millisecond))
	m.write(t, "/etc/ssh/sshd_config", "Include /etc/ssh/sshd_config.d/*.conf\n", 0o600)
	m.lookedSince(t, time.Now())
	m.wantOpen(t, map[string]string{"22/tcp": "client4 client6"})
	old.stop()
	m.sshdOn(t, 2222)
	m.wantOpen(t, map[string]string{"2222/tcp": "client4 client6"})
	// Any event makes the service check.
	m.Host.MustRun(t, "ip", "link", "add", "d0", "type", "veth", "peer", "name", "d1")
	by(t, time.Now().Add(repaired), "the old port to be closed", func() bool { return !port22.MatchString(m.rules(t)) })
	m.wantOpen(t, map[string]string{"2222/tcp": "client4 client6"})
	m.must(t, exitOK, "verify")
	says(t, s.Stop(t).Stderr, "sshd listens on other ports")
}

// TestWatchBackoff runs a program that undoes each repair at once for some time.
func TestWatchBackoff(t *testing.T) {
	on(t, told, testWatchBackoff)
}

func testWatchBackoff(t *testing.T, m *machine) {
	m.Host.Listen(t, 22, 80, 8080)
	loads := filepath.Join(m.root, "usr/loads")
	m.bootstrap(t)
	rules := m.rules(t)
	harm, load := m.multi+" iptables -D INPUT -j BASICFW-INPUT", "x"
	if m.netlink {
		// The monitor reports which program made a change.
		harm, load = "nft flush chain inet basicfw ipv4-input", " ("+filepath.Base(program)+")"
		monitor := m.Host.Start(t, lab.Command{Args: []string{"sh", "-c", "exec nft monitor >" + loads}})
		defer monitor.End(t)
		defer monitor.Terminate()
	} else {
		m.wrap(t, "iptables-restore", "echo x >>"+loads+"\nexec $real \"$@\"")
	}
	s := m.quiet(t)
	other := m.Host.Start(t, lab.Command{Args: []string{"sh", "-c", "trap 'exit 0' TERM; while :; do " +
		harm + "; sleep 0.05; done 2>/dev/null"}})
	count := func() int {
		data, _ := os.ReadFile(loads)
		return strings.Count(string(data), load)
	}
	lab.Poll(t, "the service to back off", func() bool {
		data, err := os.ReadFile(filepath.Join(m.root, message))
		return err == nil && strings.Contains(string(data), "repairs of the rules fail or do not last")
	})
	before := count()
	// Five repairs, each of which may have to be rolled back.
	if before < 5 || before > 10 {
		t.Errorf("%d loads before it backs off", before)
	}
	st := m.status(t, exitDrift)
	if st.State != "drifted" {
		t.Errorf("state %q", st.State)
	}
	says(t, st.warnings(), "repairs of the rules fail or do not last", "next repair at")
	says(t, m.must(t, exitDrift, "status").Stdout, "do not last")
	if got := m.public(t); got.State != "drifted" || !strings.Contains(got.warnings(), "do not last") {
		t.Errorf("for monitoring: %q, %q", got.State, got.Warnings)
	}
	m.wantMessage(t, "while repairs are undone", "the rules differ", "repairs of the rules fail or do not last")

	other.Stop(t)
	if n := count(); n > before+2 {
		t.Errorf("%d more loads while it backed off", n-before)
	}
	lab.Poll(t, "the rules to come back", func() bool { return m.rules(t) == rules })
	m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
	lab.Poll(t, "the status for monitoring to follow", func() bool { return m.public(t).State == "protected" })
	m.must(t, exitOK, "status")
	m.wantMessage(t, "once repairs last")
	says(t, s.Stop(t).Stderr, "another program keeps modifying the rules")
}

// TestWatchChurn runs a program that changes its own chains a hundred times a second.
func TestWatchChurn(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	loads, looks := filepath.Join(m.root, "usr/loads"), filepath.Join(m.root, "usr/looks")
	m.bootstrap(t)
	rules := m.rules(t)
	m.wrap(t, "iptables-restore", "echo x >>"+loads+"\nexec $real \"$@\"")
	m.wrap(t, "iptables-save", "echo x >>"+looks+"\nexec $real \"$@\"")
	s := m.quiet(t)
	count := func(path string) int {
		data, _ := os.ReadFile(path)
		return strings.Count(string(data), "x")
	}
	before, start := count(looks), time.Now()
	m.Host.MustRun(t, "sh", "-c", "n=0; while [ $n -lt 300 ]; do "+m.multi+" iptables -N CHURN; "+
		m.multi+" iptables -A FORWARD -j CHURN; "+m.multi+" iptables -D FORWARD -j CHURN; "+m.multi+" iptables -X CHURN; n=$((n+1)); done")
	took := time.Since(start)
	if n := count(loads); n != 0 {
		t.Errorf("the rules were loaded %d times", n)
	}
	n := count(looks) - before
	t.Logf("%d checks in %v of 1200 changes", n, took.Round(time.Millisecond))
	if most := 4 + 2*int(took/time.Second); n > most {
		t.Errorf("%d checks within %v", n, took)
	}
	same(t, "rules", rules, m.rules(t))
	s.Stop(t)
}
