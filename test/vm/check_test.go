//go:build vm

package vm

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
	"github.com/basicfw/basicfw-agent/test/vm/wire"
)

// message is the login message until the machine is closed.
const message = "/etc/motd.d/basicfw-bootstrap"

// hidden are listening ports of no profile, which the prober probes through every boot.
var hidden = []uint16{3306, 8080}

// Timeouts. An emulated machine that is busy answers late.
const (
	answerLimit = 30 * time.Second // for a port that has to answer
	silence     = 3 * time.Second  // of a port that must not
)

// site is the network of one machine, with its allowed clients.
type site struct {
	wire       *Wire
	download   *Download
	prober     *Prober
	key        string // file of the SSH key that may log in
	network    string // the unit that brings up the machine's interface
	backend    backend
	datasource Datasource
	anyone     bool // SSH is open to any address, not to the client alone
}

// newSite makes a site whose prober probes the hidden ports and others.
func newSite(t *testing.T, b built, ports ...uint16) *site {
	t.Helper()
	w := NewWire(t)
	s := &site{wire: w, download: w.Serve(t), key: t.TempDir() + "/key", network: b.network, datasource: b.datasource, backend: b.backend}
	s.prober = Probe(t, w, append(ports, hidden...)...)
	run(t, time.Minute, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", s.key)
	return s
}

// start starts the machine and waits until its first boot is finished.
func (s *site) start(t *testing.T, image Image, userData string) *Machine {
	t.Helper()
	m := Start(t, image, s.wire, s.datasource(s.wire, t, Instance{Key: read(t, s.key+".pub"), UserData: userData}))
	m.WaitBoot(t, "")
	t.Logf("%s", m.Must(t, "uname -r; dpkg-query -W systemd cloud-init rpm openssh-server; dpkg-query -W iptables 2>&1 || :"))
	return m
}

func (s *site) dial(t *testing.T, from, to netip.Addr, port uint16) *Session {
	t.Helper()
	c, err := s.wire.Dial(from, to, port, greeting(port), answerLimit)
	if err != nil {
		t.Fatalf("from %v to %v port %d: %v", from, to, port, err)
	}
	return c
}

func greeting(port uint16) string {
	if port == 22 {
		return "SSH-2.0-"
	}
	return wire.Greeting(strconv.Itoa(int(port)))
}

// accepted returns the prober's connections that were accepted.
func (s *site) accepted(since time.Time, ports ...uint16) []Answer {
	return slices.DeleteFunc(s.prober.Answers(since, ports...), func(a Answer) bool { return a.Reset })
}

// checkSilent checks that the prober got no answer from closed ports since then, not even a
// refusal.
func (s *site) checkSilent(t *testing.T, since time.Time) {
	t.Helper()
	closed := hidden
	if !s.anyone {
		closed = append([]uint16{22}, hidden...)
	}
	if a := s.prober.Answers(since, closed...); len(a) > 0 {
		t.Errorf("closed ports answered the prober %d times, first %v and last %v", len(a), a[0], a[len(a)-1])
	}
}

// checkBoot checks what has to hold at each boot of a closed machine.
func (s *site) checkBoot(t *testing.T, m *Machine, since time.Time) {
	t.Helper()
	units := []string{"systemd-networkd", s.network}
	if m.cloudInit {
		units = append(units, "cloud-init-local")
		s.checkCloudInit(t, m)
	}
	s.checkSilent(t, since)
	if out, _ := m.Run(t, "journalctl -b --no-pager | grep -i 'ordering cycle'"); out != "" {
		t.Errorf("the journal has an ordering cycle:\n%s", out)
	}
	ready := moment(t, m, "basicfw-agent", "ActiveEnter")
	if listening := moment(t, m, "lab-listen", "ActiveEnter"); listening > ready {
		t.Errorf("the listeners were ready at %d us, after the firewall at %d us: the prober's silence proves less", listening, ready)
	}
	for _, unit := range units {
		if began := moment(t, m, unit, "InactiveExit"); began < ready {
			t.Errorf("%s began at %d us, before the firewall was ready at %d us", unit, began, ready)
		}
	}
	if out := m.Must(t, "cat /run/lab-rules"); strings.Count(out, s.backend.table) != s.backend.tables {
		t.Errorf("the rules loaded before the network:\n%s", out)
	}
	// The kernel logs nothing about links; networkd logs each that comes up.
	out := m.Must(t, "journalctl -b -o json --output-fields=MESSAGE -u systemd-networkd | grep ': Link UP' | grep -v '\"lo: '")
	for _, line := range strings.Split(strings.TrimSpace(out), "\n") {
		var entry struct {
			Message string `json:"MESSAGE"`
			Moment  string `json:"__MONOTONIC_TIMESTAMP"`
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			t.Fatalf("reading the journal: %v\n%s", err, line)
		}
		if us, err := strconv.Atoi(entry.Moment); err != nil || us < ready {
			t.Errorf("%q at %s us, before the firewall was ready at %d us", entry.Message, entry.Moment, ready)
		}
	}
}

// moment returns when a unit began (InactiveExit) or became active (ActiveEnter) in this
// boot, in microseconds since the kernel started.
func moment(t *testing.T, m *Machine, unit, property string) int {
	t.Helper()
	out := strings.TrimSpace(m.Must(t, "systemctl show --value -p "+property+"TimestampMonotonic "+unit))
	us, err := strconv.Atoi(out)
	if err != nil || us == 0 {
		t.Fatalf("%s of %s is %q: %v", property, unit, out, err)
	}
	return us
}

// checkCloudInit checks that cloud-init has finished without errors.
func (s *site) checkCloudInit(t *testing.T, m *Machine) {
	t.Helper()
	if out, code := m.Run(t, "cloud-init status --wait --long"); code != 0 || !strings.Contains(out, "status: done") {
		t.Errorf("cloud-init status: exit code %d\n%s", code, out)
	}
	if out := m.Must(t, "systemctl list-jobs --no-legend"); out != "" && !strings.Contains(out, "No jobs") {
		t.Errorf("jobs are still waiting: %s", out)
	}
}

// checkSchema checks that cloud-init accepts user-data.
func checkSchema(t *testing.T, m *Machine, file string) {
	t.Helper()
	// Before cloud-init 22.2 the command was among the developer commands.
	out, code := m.Run(t, `schema=schema
		cloud-init schema --help >/dev/null 2>&1 || schema='devel schema'
		cloud-init $schema --config-file `+file+`; rc=$?; grep 'Invalid cloud-config' /var/log/cloud-init.log; exit $rc`)
	if code != 0 || strings.Contains(out, "Invalid") || strings.Contains(out, "deprecat") {
		t.Errorf("cloud-init schema of %s: exit code %d\n%s", file, code, out)
	}
}

// checkProtected checks which ports are reachable and what status reports.
func (s *site) checkProtected(t *testing.T, m *Machine, open []uint16) {
	t.Helper()
	since := time.Now()
	s.checkReach(t, open)
	s.checkLogin(t)
	s.checkSilent(t, since)
	for _, to := range s.wire.Machine.Both() {
		if !slices.ContainsFunc(s.accepted(since, 80), func(a Answer) bool { return a.From.Addr() == to }) {
			t.Errorf("%v port 80 did not answer the prober: its silence proves nothing", to)
		}
	}

	out, code := m.Run(t, "basicfw-agent status --json")
	var status struct {
		State   string
		SSH     struct{ Mode string }
		Backend struct{ Name, Reason string }
		Service struct{ Registered, Enabled, Active bool }
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil || code != 0 || status.State != "protected" {
		t.Errorf("basicfw-agent status: exit code %d, %v\n%s", code, err, out)
	}
	if want := map[bool]string{false: "pinned", true: "limited"}[s.anyone]; status.SSH.Mode != want {
		t.Errorf("ssh.mode is %q, not %q", status.SSH.Mode, want)
	}
	if b := s.backend; status.Backend.Name != b.name || !strings.Contains(status.Backend.Reason, b.why) {
		t.Errorf("backend is %+v, want %s because of %q", status.Backend, b.name, b.why)
	}
	if !status.Service.Registered || !status.Service.Enabled || !status.Service.Active {
		t.Errorf("service is %+v", status.Service)
	}
	if out, code := m.Run(t, "basicfw-agent verify"); code != 0 {
		t.Errorf("basicfw-agent verify: exit code %d\n%s", code, out)
	}
	if n := flows(t, m); n < 65536 {
		t.Errorf("the conntrack table has only %d entries", n)
	}
	if out, code := m.Run(t, "rpm -V basicfw-agent"); code != 0 || out != "" {
		t.Errorf("rpm -V: exit code %d\n%s", code, out)
	}
}

// flows returns the size of the conntrack table.
func flows(t *testing.T, m *Machine) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(m.Must(t, "cat /proc/sys/net/netfilter/nf_conntrack_max")))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// checkReach connects to each listening port over both families, as the client and as a
// stranger.
func (s *site) checkReach(t *testing.T, open []uint16) {
	t.Helper()
	var all sync.WaitGroup
	for _, to := range s.wire.Machine.Both() {
		for _, from := range []netip.Addr{s.wire.Client.Like(to), s.wire.Stranger.Like(to)} {
			for _, port := range append([]uint16{22}, ListenPorts...) {
				want := slices.Contains(open, port) || port == 22 && (s.anyone || from == s.wire.Client.Like(to))
				all.Add(1)
				go func() {
					defer all.Done()
					limit := silence
					if want {
						limit = answerLimit
					}
					c, err := s.wire.Dial(from, to, port, greeting(port), limit)
					if err == nil {
						c.Close()
					}
					switch timeout, _ := err.(net.Error); {
					case want && err != nil:
						t.Errorf("from %v: port %d of %v does not answer: %v", from, port, to, err)
					case !want && err == nil:
						t.Errorf("from %v: port %d of %v answers", from, port, to)
					case !want && (timeout == nil || !timeout.Timeout()):
						t.Errorf("from %v: port %d of %v is not silent: %v", from, port, to, err)
					}
				}()
			}
		}
	}
	all.Wait()
}

// checkLogin logs in over SSH as the client.
func (s *site) checkLogin(t *testing.T) {
	t.Helper()
	for _, to := range s.wire.Machine.Both() {
		if out, code := s.login(t, s.wire.Client.Like(to), "echo logged in", time.Minute); code != 0 || !strings.Contains(out, "logged in\n") {
			t.Errorf("logging in to %v over SSH: exit code %d\n%s", to, code, out)
		}
	}
}

// login runs a command over SSH from an address, and returns its output and exit code.
func (s *site) login(t *testing.T, from netip.Addr, command string, limit time.Duration) (string, int) {
	t.Helper()
	r := s.wire.Outsider.Run(t, lab.Command{Args: append([]string{"ssh"}, s.ssh(from, limit, command)...)})
	return r.Stdout + r.Stderr, r.Code
}

// ssh returns the arguments of ssh for a login from an address.
func (s *site) ssh(from netip.Addr, limit time.Duration, more ...string) []string {
	return append([]string{"-i", s.key, "-b", from.String(), "-F", "none",
		"-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null",
		"-o", fmt.Sprintf("ConnectTimeout=%d", limit/time.Second), "debian@" + s.wire.Machine.Like(from).String()}, more...)
}

func read(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// sum returns a file's SHA-256 in hexadecimal.
func sum(t *testing.T, file string) string {
	t.Helper()
	h := sha256.Sum256([]byte(read(t, file)))
	return hex.EncodeToString(h[:])
}
