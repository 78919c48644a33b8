//go:build vm

package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// otherFirewall is another firewall manager, as packaged by Debian.
type otherFirewall struct {
	name   string // also of its unit
	setUp  string
	masked bool // its unit is masked, not only disabled
	byHand bool // its rules are loaded though its unit is inactive
	legacy bool // with iptables-legacy
	// rough is set if its own start and stop refuse connections for a moment, whatever else
	// is loaded.
	rough bool
}

// opened is the port that the other firewall opens.
const opened = 5432

// TestTakeOver takes over from other firewalls. What they close stays closed, and the
// allowed client gets in, at every moment of a takeover and of a failed one.
func TestTakeOver(t *testing.T) {
	lab.Need(t, "ip", "nft", "iptables-legacy", "mmdebstrap", "systemd-nspawn", "nsenter")
	cache, err := filepath.Abs("../../.cache/vm")
	if err != nil {
		t.Fatal(err)
	}
	root := BuildRoot(t, cache)
	agent := filepath.Join(t.TempDir(), "basicfw-agent")
	run(t, 10*time.Minute, "env", "CGO_ENABLED=0", "go", "build", "-o", agent, "github.com/basicfw/basicfw-agent/cmd/basicfw-agent")
	const firewalld = `
		firewall-offline-cmd -q --add-port=5432/tcp
		systemctl -q enable firewalld
		systemctl start firewalld
		until firewall-cmd -q --state; do sleep 0.1; done`
	const ufw = `
		systemctl -q enable ufw
		ufw allow 22/tcp
		ufw allow 5432/tcp
		ufw --force enable
		`
	for name, other := range map[string]otherFirewall{
		"firewalld": {name: "firewalld", setUp: firewalld, masked: true},
		"firewalld with iptables": {name: "firewalld", masked: true,
			setUp: "sed -i s/^FirewallBackend=.*/FirewallBackend=iptables/ /etc/firewalld/firewalld.conf" + firewalld},
		"ufw": {name: "ufw", setUp: ufw + "systemctl start ufw"},
		"shorewall": {name: "shorewall", rough: true, setUp: `
			for v in shorewall shorewall6; do
				cd /etc/$v
				echo "fw firewall\nnet ipv$(echo $v | tr -dc 6 | grep . || echo 4)" >zones
				echo "?FORMAT 2\nnet eth0" >interfaces
				echo "fw net ACCEPT\nnet all DROP\nall all REJECT" >policy
				echo "?SECTION NEW\nACCEPT net fw tcp 22,5432" >rules
				systemctl -q enable $v
				systemctl start $v
			done`},
		"ufw by hand, with iptables-legacy": {name: "ufw", byHand: true, legacy: true,
			setUp: "for p in iptables ip6tables; do update-alternatives --set $p /usr/sbin/$p-legacy >/dev/null; done" + ufw},
	} {
		t.Run(name, func(t *testing.T) { testTakeOver(t, root, agent, other) })
	}
}

func testTakeOver(t *testing.T, root, agent string, other otherFirewall) {
	l := lab.New(t)
	w := &Wire{Outsider: l.Outsider, Machine: l.Server, Client: l.Client, Stranger: l.Stranger}
	c := StartContainer(t, l, root)
	ports := append([]uint16{80, opened}, hidden...)
	l.Host.Listen(t, ports...)
	run(t, time.Minute, "install", "-m", "755", agent, c.root+"/usr/sbin/basicfw-agent")
	c.Must(t, other.setUp)
	prober := Probe(t, w, ports...)
	ssh := keepTrying(t, w, 22)
	steady := func(when string, since time.Time) {
		t.Helper()
		if a := prober.Answers(since, hidden...); len(a) > 0 {
			t.Errorf("%s: closed ports answered %d times, first %v and last %v", when, len(a), a[0], a[len(a)-1])
		}
		if tries, failed := ssh.since(t, since); len(failed) > 0 && !other.rough || len(failed) > tries/10 || tries < 4 {
			t.Errorf("%s: of %d attempts to reach sshd %d failed: %q", when, tries, len(failed), failed)
		}
	}
	// An answer from one port makes another port's silence meaningful.
	answers := func(open, closed uint16) {
		t.Helper()
		since := time.Now()
		for _, to := range l.Server.Both() {
			until(t, 10*time.Second, fmt.Sprintf("an answer from %v port %d", to, open), func() error {
				for _, a := range prober.Answers(since, open) {
					if a.From.Addr() == to && !a.Reset {
						return nil
					}
				}
				return errors.New("none")
			})
		}
		if a := prober.Answers(since, closed); len(a) > 0 {
			t.Errorf("port %d answers: %v", closed, a[0])
		}
	}
	before := look(t, c)
	up := before
	if other.byHand { // restoring its rules starts its unit
		up = strings.Replace(before, "enabled inactive ufw", "enabled active ufw", 1)
	}
	same := func(when string) {
		t.Helper()
		if now := look(t, c); now != before && now != up {
			t.Errorf("%s the machine is\n%s\nand was\n%s", when, now, before)
		}
		answers(opened, 80)
	}
	taken := func() {
		t.Helper()
		unit := "inactive\ndisabled\n"
		if other.masked {
			unit = "inactive\nmasked\n"
		}
		if out, _ := c.Run(t, "systemctl is-active "+other.name+"; systemctl is-enabled "+other.name); out != unit {
			t.Errorf("its unit is %q", out)
		}
		answers(80, opened)
		var status struct {
			State     string
			Conflicts []string
		}
		out := c.Must(t, "basicfw-agent verify >/dev/null 2>&1 && basicfw-agent status --json")
		if err := json.Unmarshal([]byte(out), &status); err != nil || status.State != "protected" || len(status.Conflicts) > 0 {
			t.Errorf("status: %v\n%s", err, out)
		}
		if out := c.Must(t, "nft list tables"); strings.Contains(out, "guard") || strings.Contains(out, "firewalld") {
			t.Errorf("tables of nftables: %s", out)
		}
	}
	bootstrap := "basicfw-agent bootstrap --or-failsafe --profile web-only --client-ip " + l.Client.String()
	fails := func(out string, code int, words string) {
		t.Helper()
		if code != 1 || !strings.Contains(out, words) || strings.Count(out, "\n")-strings.Count(out, "\nhint: ") != 1 {
			t.Errorf("bootstrap: exit code %d\n%s", code, out)
		}
	}

	t.Log("refused")
	since := time.Now()
	c.Must(t, `mkdir /etc/basicfw; printf '[agent]\non_conflict = refuse\n' >/etc/basicfw/agent.ini`)
	out, code := c.Run(t, bootstrap)
	fails(out, code, other.name)
	c.Must(t, "rm -r /etc/basicfw")
	same("after it was refused")
	if other.masked {
		c.Stop(t)
		l.Host.MustRun(t, "nft", "flush", "ruleset")
		c.Start(t)
		c.Must(t, "until firewall-cmd -q --state; do sleep 0.1; done")
		same("after a boot")
		since = time.Now()
	}
	if out := c.Must(t, "basicfw-agent bootstrap --profile web-only --dry-run"); !strings.Contains(out, "would stop and disable "+other.name+"\n") {
		t.Errorf("the plan does not name what is stopped:\n%s", out)
	}
	same("after the plan")
	steady("refused", since)

	t.Log("a second load that fails")
	since = time.Now()
	c.Must(t, `cat >/usr/local/sbin/iptables-restore <<'EOF'
#!/bin/sh
case " $* " in *--version*) exec /usr/sbin/iptables-restore "$@";; esac
echo >>/run/runs
[ "$(wc -l </run/runs)" != 3 ] || { cat >/dev/null; echo "iptables-restore: line 7 failed" >&2; exit 1; }
exec /usr/sbin/iptables-restore "$@"
EOF
		chmod 755 /usr/local/sbin/iptables-restore`)
	out, code = c.Run(t, "PATH=/usr/local/sbin:$PATH "+bootstrap)
	fails(out, code, "line 7 failed")
	c.Must(t, "rm /run/runs /usr/local/sbin/iptables-restore")
	same("after the failure")
	steady("the failure", since)

	t.Log("taken over")
	since = time.Now()
	if out := c.Must(t, bootstrap); !strings.Contains(out, other.name) {
		t.Errorf("bootstrap does not name what it stopped:\n%s", out)
	}
	taken()
	if out := c.Must(t, bootstrap); !strings.Contains(out, "nothing changed") {
		t.Errorf("a second bootstrap changes something:\n%s", out)
	}
	steady("the takeover", since)

	t.Log("the next boot")
	c.Stop(t)
	l.Host.MustRun(t, "nft", "flush", "ruleset")
	for _, program := range []string{"iptables-legacy", "ip6tables-legacy"} {
		if !other.legacy {
			break
		}
		for _, args := range []string{"-P INPUT ACCEPT", "-F", "-X"} {
			l.Host.MustRun(t, append([]string{program}, strings.Fields(args)...)...)
		}
	}
	c.Start(t)
	since = time.Now()
	taken()
	steady("after the boot", since)

	t.Log("uninstalled")
	since = time.Now()
	c.Must(t, "basicfw-agent uninstall")
	if a := prober.Answers(since, hidden...); len(a) > 0 {
		t.Errorf("while it was uninstalled closed ports answered %d times, first %v", len(a), a[0])
	}
	same("after uninstall")

	t.Log("wrong settings")
	since = time.Now()
	c.Must(t, `mkdir /etc/basicfw; printf '[agent]\nprofile = 7\ncolour = red\n' >/etc/basicfw/agent.ini`)
	// SSH is limited then, so only closed ports are checked.
	if out, code := c.Run(t, bootstrap); code != 2 || !strings.Contains(out, "closed by the failsafe rules") {
		t.Errorf("bootstrap: exit code %d\n%s", code, out)
	}
	if out, _ := c.Run(t, "systemctl is-active "+other.name); out != "inactive\n" {
		t.Errorf("its unit is %q", out)
	}
	if a := prober.Answers(since, hidden...); len(a) > 0 {
		t.Errorf("the failsafe: closed ports answered %d times, first %v", len(a), a[0])
	}
	c.Must(t, "basicfw-agent uninstall; rm -r /etc/basicfw")
	same("after the failsafe")
}

// look returns the state of units, files and rules. A table without rules counts as none.
func look(t *testing.T, c *Container) string {
	t.Helper()
	out, _ := c.Run(t, `for u in firewalld ufw shorewall shorewall6; do echo $(systemctl is-enabled $u; systemctl is-active $u) $u; done
		find /etc/systemd /etc/basicfw /var/lib/basicfw /etc/sysconfig /etc/motd.d 2>/dev/null | sort
		{ iptables-save; ip6tables-save; } 2>/dev/null | sed -e 's/\[.*\]//' -e '/^[#*]/d' -e '/^COMMIT/d' -e '/^:[A-Z]* ACCEPT/d'
		nft list table inet firewalld 2>/dev/null | sed 's/packets [0-9]* bytes [0-9]*//'`)
	return out
}

// attempts are connections made continuously.
type attempts struct {
	mu   sync.Mutex
	made []*attempt
}

type attempt struct {
	at   time.Time
	done bool
	err  error
}

// attemptLimit is less than the kernel's retransmission timeout: one lost packet is a
// failure.
const attemptLimit = 900 * time.Millisecond

// keepTrying connects to a port from the client's addresses every 50 ms, until
// the test ends.
func keepTrying(t *testing.T, w *Wire, port uint16) *attempts {
	t.Helper()
	a := &attempts{}
	stop := make(chan struct{})
	var all sync.WaitGroup
	t.Cleanup(func() { close(stop); all.Wait() })
	for i, to := range w.Machine.Both() {
		all.Add(1)
		go func() {
			defer all.Done()
			tick := time.NewTicker(50 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-stop:
					return
				case <-tick.C:
				}
				all.Add(1)
				go func() {
					defer all.Done()
					m := &attempt{at: time.Now()}
					a.mu.Lock()
					a.made = append(a.made, m)
					a.mu.Unlock()
					err := connect(w, w.Client.Both()[i], to, port)
					a.mu.Lock()
					defer a.mu.Unlock()
					m.done, m.err = true, err
				}()
			}
		}()
	}
	return a
}

func connect(w *Wire, from, to netip.Addr, port uint16) error {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: attemptLimit}
	var c net.Conn
	err := w.Outsider.Do(func() (err error) {
		c, err = d.Dial("tcp", netip.AddrPortFrom(to, port).String())
		return err
	})
	if err == nil {
		c.Close()
	}
	return err
}

// since returns the number of attempts started since then, and those that failed. It waits
// for the last of them.
func (a *attempts) since(t *testing.T, since time.Time) (n int, failed []string) {
	t.Helper()
	a.mu.Lock()
	made := a.made
	a.mu.Unlock()
	until(t, 20*attemptLimit, "the attempts to end", func() error {
		a.mu.Lock()
		defer a.mu.Unlock()
		for _, m := range made {
			if !m.done {
				return fmt.Errorf("the attempt of %v has not ended", m.at)
			}
		}
		return nil
	})
	for _, m := range made {
		if m.at.Before(since) {
			continue
		}
		n++
		if m.err != nil {
			failed = append(failed, fmt.Sprintf("%s %v", m.at.Format("15:04:05.000"), m.err))
		}
	}
	return n, failed
}
