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

// brokenPrograms are ways in which iptables does not do what it should.
var brokenPrograms = []struct {
	name     string
	programs string
	script   string // "" is no program at all
	words    []string
	// blind is set where nobody can see what is loaded: the failsafe rules
	// may stand then, which is better than none.
	blind bool
}{
	{"missing", iptablesPrograms, "", []string{"install iptables"}, false},
	{"missing for IPv6", "ip6tables ip6tables-save ip6tables-restore", "", []string{"install iptables"}, false},
	{"fails", iptablesPrograms, "exit 1", []string{"exit status 1"}, false},
	{"fails for IPv6", "ip6tables-restore", "cat >/dev/null; exit 1", []string{"ipv6", "exit status 1"}, false},
	{"says that all is well and does nothing", "iptables-restore ip6tables-restore", "cat >/dev/null", []string{"does not hold what was loaded"}, false},
	{"prints nothing", "iptables-save ip6tables-save", "exit 0", []string{"does not hold what was loaded"}, true},
}

// breakPrograms has some of the machine's iptables programs be a script, or gone,
// and gives the PATH in which that is so.
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

// TestBrokenIptablesAtBoot boots a machine whose iptables does not do what it
// should, and whose owner wants no other. The guard closes it then, which needs
// none; the service says so, does not tell the service manager that it is ready, and does not crash; and it
// enforces what was decided at its next start once the program is back, which
// systemd tries again and again.
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
				cmd.Env[0] = "PATH=/usr/local/sbin" // where those are
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
					t.Errorf("the service manager was told something, of %d bytes", n)
				}
				// All is closed that was, and nobody is shut out who was in.
				web := everybody
				if c.blind {
					web = nobody
				}
				m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": web, "8080/tcp": nobody})
				says(t, r.Stderr, "only table basicfw-guard of nf_tables closes this machine")
				m.heal(t)
				if text := m.rules(t); strings.Contains(text, "BASICFW") && !c.blind {
					t.Errorf("a part of the rules stands:\n%s", text)
				}
				m.serve(t).Stop(t)
				same(t, "rules once iptables is back", rules, m.rules(t))
				if tables := m.Host.MustRun(t, "nft", "list", "tables"); strings.Contains(tables, "basicfw-guard") {
					t.Errorf("the guard is left: %s", tables)
				}
			})
		})
	}
}

// TestBrokenIptablesGoesOver has auto choose at first boot, and at a later one, on
// a machine whose iptables does not do what it should: the rules are in nf_tables,
// which says why, and stay there until somebody has it decided anew.
func TestBrokenIptablesGoesOver(t *testing.T) {
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
						t.Errorf("%s, iptables has rules of ours:\n%s", when, text)
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
					t.Errorf("decided anew: %+v\n%s", s.Backend, m.table(t))
				}
				m.wantOpen(t, open)

				m.reboot(t)
				m.breakPrograms(t, c.programs, c.script)
				cmd := m.command("run")
				cmd.Env[0] = "PATH=/usr/local/sbin"
				s := m.serveWith(t, cmd)
				over("at a later boot")
				if r := s.Stop(t); !strings.Contains(r.Stderr, "the rules are loaded into nf_tables") {
					t.Errorf("the journal has not why:\n%s", r.Stderr)
				}
				m.heal(t)
				m.must(t, exitOK, "uninstall")
				same(t, "after uninstall", before, m.everything(t))
			})
		})
	}
}

// put makes a program of the machine a shell script.
func (m *machine) put(t *testing.T, name, script string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(m.bin, name), []byte("#!/bin/sh\nPATH=/usr/bin:/bin\n"+script+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
}

// heal gives the machine its iptables programs back.
func (m *machine) heal(t *testing.T) {
	t.Helper()
	for _, name := range strings.Fields(iptablesPrograms) {
		if err := os.RemoveAll(filepath.Join(m.bin, name)); err != nil {
			t.Fatal(err)
		}
		m.link(t, name)
	}
}

// TestIptablesHangs boots a machine whose iptables never ends: the program is
// killed after a while, and the service says so.
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
	r := m.startService(t, m.command("run")).Wait(t)
	if r.Code != exitFailed {
		t.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	says(t, r.Stderr, "iptables-save", "no end within")
	m.heal(t)
	m.serve(t).Stop(t)
	same(t, "rules once iptables is back", rules, m.rules(t))
}

// TestIptablesBackWhileRunning has the programs go and come back while the
// service runs.
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
	// Its own news, and those of a write beside it, make it look.
	lab.Poll(t, "the service to say that it cannot", func() bool {
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

// TestAnotherRestores has a second program restore its own chains and tables a
// hundred times a second, while each operation runs: all of them complete,
// nothing of either is lost.
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
			lab.Poll(t, "the other to go on", func() bool { return loads.Load() > n || ctx.Err() != nil })
		}
		bootstrap := []string{"bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service"}
		for range 3 {
			during(bootstrap...)
			during("verify")
			m.write(t, "/etc/basicfw/agent.ini", "[open]\nx = 8081/tcp\n", 0o640)
			during("apply")
			for _, family := range families() {
				m.iptables(t, family, "-F", "BASICFW-INPUT")
			}
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
		t.Logf("the other restored %d times", loads.Load())
	})
}
