package kernel_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// brokenPrograms lists ways in which iptables can fail.
var brokenPrograms = []struct {
	name     string
	programs string
	script   string // "": no program at all
	words    []string
	// blind is set if the loaded rules cannot be read. The failsafe rules may be
	// active then, which is better than none.
	blind bool
}{
	{"missing", iptablesPrograms, "", []string{"install iptables"}, false},
	{"missing for IPv6", "ip6tables ip6tables-save ip6tables-restore", "", []string{"install iptables"}, false},
	{"fails", iptablesPrograms, "exit 1", []string{"exit status 1"}, false},
	{"fails for IPv6", "ip6tables-restore", "cat >/dev/null; exit 1", []string{"ipv6", "exit status 1"}, false},
	{"reports success and does nothing", "iptables-restore ip6tables-restore", "cat >/dev/null", []string{"differ from those that were loaded"}, false},
	{"prints nothing", "iptables-save ip6tables-save", "exit 0", []string{"differ from those that were loaded"}, true},
}

// breakPrograms replaces some of the machine's iptables programs by a script, or
// removes them.
func (m *machine) breakPrograms(t *testing.T, names, script string) {
	t.Helper()
	for _, name := range strings.Fields(names) {
		if err := os.Remove(filepath.Join(m.bin, name)); err != nil {
			t.Fatal(err)
		}
		if script != "" {
			m.put(t, name, script)
		}
	}
}

// TestBrokenIptablesAtBoot boots a machine with a broken iptables that the
// administrator insists on. The guard, which needs no iptables, closes the
// machine. The service reports the cause, never reports readiness, and does not
// crash. systemd restarts it; once iptables works, it loads the desired state.
func TestBrokenIptablesAtBoot(t *testing.T) {
	for _, c := range brokenPrograms {
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			onBoth(t, func(t *testing.T, m *machine) {
				m.insist(t)
				m.Host.Listen(t, 22, 80, 8080)
				m.bootstrap(t)
				rules := m.rules(t)
				m.reboot(t)
				m.breakPrograms(t, c.programs, c.script)
				cmd := m.command("run")
				cmd.Env[0] = "PATH=/usr/local/sbin" // the broken programs
				s := m.startService(t, cmd)
				r := s.Wait(t)
				if r.Code != exitFailed || strings.Contains(r.Stderr, "goroutine ") {
					t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
				}
				says(t, r.Stderr, c.words...)
				if err := s.notices.SetReadDeadline(time.Now()); err != nil {
					t.Fatal(err)
				}
				if n, _, err := s.notices.ReadFrom(make([]byte, 4096)); err == nil {
					t.Errorf("the service manager received a notice of %d bytes", n)
				}
				// What was closed is still closed, and no allowed client is locked out.
				web := everybody
				if c.blind {
					web = nobody
				}
				m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": web, "8080/tcp": nobody})
				says(t, r.Stderr, "only the nftables table basicfw-guard closes this machine")
				m.heal(t)
				if text := m.rules(t); strings.Contains(text, "BASICFW") && !c.blind {
					t.Errorf("some of the rules are loaded:\n%s", text)
				}
				m.serve(t).Stop(t)
				same(t, "rules once iptables is back", rules, m.rules(t))
				if tables := m.Host.MustRun(t, "nft", "list", "tables"); strings.Contains(tables, "basicfw-guard") {
					t.Errorf("the guard is still there: %s", tables)
				}
			})
		})
	}
}

// TestBrokenIptablesFallsBack uses `backend = auto` on a machine with a broken iptables, at
// first boot and at a later one. The rules are in nf_tables, status says why, and they stay
// there until the administrator runs apply --redetect.
func TestBrokenIptablesFallsBack(t *testing.T) {
	for _, c := range brokenPrograms {
		if c.blind {
			continue
		}
		t.Run(strings.ReplaceAll(c.name, " ", "-"), func(t *testing.T) {
			onBoth(t, func(t *testing.T, m *machine) {
				m.Host.Listen(t, 22, 80, 8080)
				open := map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody}
				before := m.everything(t)
				run := func(args ...string) lab.Result {
					t.Helper()
					cmd := m.command(args...)
					cmd.Env[0] = "PATH=/usr/local/sbin"
					return m.Host.Run(t, cmd)
				}
				over := func(when string) {
					t.Helper()
					r := run("status", "--json")
					var s status
					if err := json.Unmarshal([]byte(r.Stdout), &s); err != nil {
						t.Fatalf("%v\n%s%s", err, r.Stdout, r.Stderr)
					}
					if s.State != "protected" || s.Backend.Name != "nftables" || !strings.Contains(s.Backend.Reason, "iptables") && !strings.Contains(s.Backend.Reason, "ip6tables") {
						t.Errorf("%s: %+v", when, s)
					}
					if text := m.rules(t); strings.Contains(text, "BASICFW") {
						t.Errorf("%s, iptables has our rules:\n%s", when, text)
					}
					m.wantOpen(t, open)
				}
				m.breakPrograms(t, c.programs, c.script)
				if r := run("bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service"); r.Code != exitOK {
					t.Fatalf("bootstrap: %s%s", r.Stdout, r.Stderr)
				}
				over("at first boot")
				m.heal(t)
				m.must(t, exitOK, "verify")
				over("once iptables is back")
				m.must(t, exitOK, "apply", "--redetect")
				if s := m.status(t, exitOK); s.Backend.Name != "iptables" || m.table(t) != "" {
					t.Errorf("after --redetect: %+v\n%s", s.Backend, m.table(t))
				}
				m.wantOpen(t, open)

				m.reboot(t)
				m.breakPrograms(t, c.programs, c.script)
				cmd := m.command("run")
				cmd.Env[0] = "PATH=/usr/local/sbin"
				s := m.serveWith(t, cmd)
				over("at a later boot")
				if r := s.Stop(t); !strings.Contains(r.Stderr, "loading the rules into nftables") {
					t.Errorf("the journal does not say why:\n%s", r.Stderr)
				}
				m.heal(t)
				m.must(t, exitOK, "uninstall")
				same(t, "after uninstall", before, m.everything(t))
			})
		})
	}
}

// put replaces a program of the machine by a shell script.
func (m *machine) put(t *testing.T, name, script string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(m.bin, name), []byte("#!/bin/sh\nPATH=/usr/bin:/bin\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

// heal restores the machine's iptables programs.
func (m *machine) heal(t *testing.T) {
	t.Helper()
	for _, name := range strings.Fields(iptablesPrograms) {
		if err := os.RemoveAll(filepath.Join(m.bin, name)); err != nil {
			t.Fatal(err)
		}
		m.link(t, name)
	}
}

// TestIptablesHangs boots a machine whose iptables never ends. It is killed after a deadline,
// and the guard closes the machine until iptables works again.
func TestIptablesHangs(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	m.insist(t)
	m.bootstrap(t)
	rules := m.rules(t)
	m.reboot(t)
	for _, name := range []string{"iptables-save", "ip6tables-save"} {
		if err := os.Remove(filepath.Join(m.bin, name)); err != nil {
			t.Fatal(err)
		}
		m.put(t, name, "exec sleep 600")
	}
	s := m.startService(t, m.command("run"))
	err := s.ready()
	if err != nil { // twice the deadline may be longer
		err = s.ready()
	}
	if err != nil {
		t.Fatal(err)
	}
	m.Host.Listen(t, 22, 80, 8080)
	m.wantReach(t, m.Server.V4, 80, true, true)
	m.wantReach(t, m.Server.V4, 22, true, false)
	m.wantReach(t, m.Server.V4, 8080, false, false)
	m.heal(t)
	by(t, time.Now().Add(2*time.Minute), "the rules to be back", func() bool { return m.rules(t) == rules })
	says(t, s.Stop(t).Stderr, "iptables-save", "not finished after", "closed by table basicfw-guard")
}

// TestIptablesBackWhileRunning breaks and restores the programs while the service
// runs.
func TestIptablesBackWhileRunning(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	m.bootstrap(t)
	rules := m.rules(t)
	m.reboot(t)
	s := m.serve(t)
	same(t, "rules after a boot", rules, m.rules(t))
	for _, family := range families() {
		if err := os.Remove(filepath.Join(m.bin, tables(family)+"-restore")); err != nil {
			t.Fatal(err)
		}
		m.put(t, tables(family)+"-restore", "exit 1")
	}
	m.iptables(t, ipv4, "-F")
	// Both its own events and those of another program's change make it check.
	lab.Poll(t, "the service to report the failed repair", func() bool {
		m.iptables(t, ipv4, "-N", "other")
		m.iptables(t, ipv4, "-X", "other")
		data, _ := os.ReadFile(filepath.Join(m.root, "run/basicfw-agent/status.json"))
		return strings.Contains(string(data), `"drifted"`) || strings.Contains(string(data), `"unprotected"`)
	})
	m.heal(t)
	lab.Poll(t, "the rules to come back", func() bool {
		m.iptables(t, ipv4, "-N", "other")
		m.iptables(t, ipv4, "-X", "other")
		return m.rules(t) == rules
	})
	if r := s.Stop(t); r.Code != exitOK {
		t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// TestAnotherRestores runs each operation while another program restores its own chains and
// tables a hundred times a second. Every operation completes, and no rule of either is
// lost.
func TestAnotherRestores(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		const theirs = "*filter\n:f2b-sshd - [0:0]\n-A f2b-sshd -s 203.0.113.77/32 -j REJECT --reject-with icmp-port-unreachable\n-A f2b-sshd -j RETURN\nCOMMIT\n" +
			"*nat\n:other - [0:0]\n-A other -p tcp -m tcp --dport 8443 -j RETURN\nCOMMIT\n"
		const set = "table inet theirs {\n}\ndelete table inet theirs\ntable inet theirs {\n\tchain x {\n\t\ttcp dport 8443 accept\n\t}\n}\n"
		m.load(t, ipv4, theirs, "--noflush")
		m.iptables(t, ipv4, "-I", "INPUT", "-p", "tcp", "-m", "tcp", "--dport", "22", "-j", "f2b-sshd")
		before := m.rules(t)
		ctx, cancel := context.WithCancel(context.Background())
		var loads atomic.Int64
		var failed error
		done := make(chan struct{})
		t.Cleanup(func() { cancel(); <-done })
		go func() {
			defer close(done)
			defer cancel()
			tick := time.NewTicker(10 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
				}
				for _, c := range []lab.Command{
					{Args: []string{m.multi, "iptables-restore", "--noflush", "-w"}, Stdin: theirs},
					{Args: []string{"nft", "-f", "-"}, Stdin: set},
				} {
					if r := m.Host.Run(t, c); r.Code != 0 {
						failed = fmt.Errorf("%v: %s", c.Args, r.Stderr)
						return
					}
				}
				loads.Add(1)
			}
		}()
		look := func(when string) {
			t.Helper()
			text := m.rules(t) + m.Host.MustRun(t, "nft", "list", "ruleset")
			for _, want := range []string{"-A f2b-sshd -s 203.0.113.77/32", "-A INPUT -p tcp -m tcp --dport 22 -j f2b-sshd",
				"-A other -p tcp -m tcp --dport 8443 -j RETURN", "table inet theirs"} {
				if !strings.Contains(text, want) {
					t.Errorf("after %s, %q is lost", when, want)
				}
			}
		}
		during := func(args ...string) {
			t.Helper()
			n := loads.Load()
			m.must(t, exitOK, args...)
			look(strings.Join(args, " "))
			lab.Poll(t, "the other program to continue", func() bool { return loads.Load() > n || ctx.Err() != nil })
		}
		bootstrap := []string{"bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service"}
		for range 3 {
			during(bootstrap...)
			during("verify")
			m.write(t, "/etc/basicfw/agent.ini", "[open]\nx = 8081/tcp\n", 0o640)
			during("apply")
			m.by(t, byFlushOurs, families()...)
			during("verify", "--repair")
			during("unlock")
			during("lock")
			during("verify")
			if err := os.Remove(filepath.Join(m.root, "etc/basicfw/agent.ini")); err != nil {
				t.Fatal(err)
			}
			during("apply", "--confirm", "1h")
			m.killWaiting(t)
			during("confirm")
			during("verify")
			during("uninstall")
		}
		cancel()
		if <-done; failed != nil {
			t.Error(failed)
		}
		same(t, "rules in the end", before, m.rules(t))
		t.Logf("the other program restored %d times", loads.Load())
	})
}
