package kernel_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// sequencesFor is how long TestSequences draws sequences for each variant, unless BASICFW_FOR
// says otherwise.
const sequencesFor = 2 * time.Minute

// TestSequences makes machines go through random sequences of commands, kills, flushes,
// interface and instance events, damaged files, and reboots. Each sequence has a seed of its
// own: BASICFW_SEED=N repeats that one, BASICFW_FOR=1h draws for longer.
//
// Whatever happens: no port opens that neither the old nor the new settings open; the client
// gets in, or status says what to do; a repair leaves what verify accepts; uninstall
// restores what was before.
func TestSequences(t *testing.T) {
	length, first, single := sequencesFor, uint64(time.Now().UnixNano()/1e6), false
	if text := os.Getenv("BASICFW_FOR"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatal(err)
		}
	}
	if text := os.Getenv("BASICFW_SEED"); text != "" {
		var err error
		if first, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("BASICFW_SEED is %q", text)
		}
		single = true
	}
	end := time.Now().Add(length)
	on(t, variants, func(t *testing.T, m *machine) {
		for seed := first; ; seed++ {
			ok := t.Run(fmt.Sprint(seed), func(t *testing.T) { newSequence(t, newMachine(t, m.variant()), seed).run() })
			if !ok {
				t.Fatalf("to repeat this sequence: BASICFW_SEED=%d go test ./test/kernel -run '^TestSequences$/^%s$'", seed, m.variant())
			}
			if single || time.Now().After(end) {
				return
			}
		}
	})
}

// The ports of a sequence. 80 is of the profile. A command may open one, an entry of
// agent.ini another, if it is applied, and nobody ever opens the last.
const (
	byProfile, byCommand, byFile, byNobody = "80/tcp", "8080/tcp", "8082/tcp", "9000/tcp"
)

// may is the set of what a property may be: after a killed command it may be either.
type may struct{ yes, no bool }

var (
	is     = may{yes: true}
	isNot  = may{no: true}
	either = may{true, true}
)

// sequence is a machine, and what is known about it.
type sequence struct {
	t   *testing.T
	m   *machine
	rnd *rand.Rand
	log []string // the steps, for the report of a failure

	flags   []string // of bootstrap
	service *service // nil if none is running
	started time.Time
	iface   string // an additional interface, or ""
	before  string // the machine before bootstrap

	bootstrapped may
	damaged      bool // the rules or files may differ from the desired state
	noBackup     bool
	foreign      bool // an interrupted uninstall may have restored the rule that opens byNobody
	opened       may  // byCommand
	stranger     may  // an allowed source of SSH
	unlocked     may
	all          bool // perhaps by unlock --all

	mu      sync.Mutex
	closed  bool // nothing may reach byNobody
	changes int  // of closed
	fault   string
}

func newSequence(t *testing.T, m *machine, seed uint64) *sequence {
	m.Host.Listen(t, 22, 80, 8080, 8082, 9000)
	return &sequence{t: t, m: m, rnd: rand.New(rand.NewPCG(seed, 0)), bootstrapped: isNot, opened: isNot, stranger: isNot, unlocked: isNot}
}

// run makes a sequence.
func (s *sequence) run() {
	t, m := s.t, s.m
	defer func() {
		if t.Failed() {
			t.Logf("the steps were:\n%s", strings.Join(s.log, "\n"))
		}
	}()
	s.flags = []string{"--profile", "web+mail", "--client-ip", m.Client.String()}
	if s.rnd.IntN(2) == 0 {
		s.flags = nil
	}
	s.settings("")
	if !m.netlink {
		for _, family := range families() {
			m.iptables(t, family, "-A", "INPUT", "-p", "tcp", "--dport", "9000", "-j", "ACCEPT")
		}
	}
	s.before = m.everything(t)
	failed := s.probe()
	for range 10 + s.rnd.IntN(15) {
		s.step()
		if failed() || t.Failed() {
			t.Error(s.fault)
			return
		}
	}
	s.end()
	if failed() {
		t.Error(s.fault)
	}
}

// probe lets a stranger try the closed port all the time. The result stops it and reports
// whether it was open when it must not be.
func (s *sequence) probe() (failed func() bool) {
	done := make(chan struct{})
	s.t.Cleanup(func() { close(done) })
	for _, to := range s.m.Server.Both() {
		go func() {
			for {
				select {
				case <-done:
					return
				case <-time.After(20 * time.Millisecond):
				}
				s.mu.Lock()
				closed, changes := s.closed, s.changes
				s.mu.Unlock()
				if !closed {
					continue
				}
				if s.m.Outsider.Reach(s.m.Stranger.Like(to), to, 9000, lab.Brief) == nil {
					s.mu.Lock()
					if s.changes == changes && s.fault == "" {
						s.fault = fmt.Sprintf("a stranger reached %v port 9000", to)
					}
					s.mu.Unlock()
				}
			}
		}()
	}
	return func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.fault != ""
	}
}

// close records whether the machine has to be closed from now on.
func (s *sequence) close(closed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed, s.changes = closed, s.changes+1
}

// step makes one random step and checks the machine.
func (s *sequence) step() {
	// All is drawn before, so that a seed is a sequence, however long its steps take.
	d := draw{kill: s.rnd.IntN(4) == 0, after: time.Duration(s.rnd.IntN(400)) * time.Millisecond, n: s.rnd.IntN(1 << 16)}
	steps := s.steps()
	var total int
	for _, st := range steps {
		total += st.weight
	}
	pick := s.rnd.IntN(total)
	for _, st := range steps {
		if pick -= st.weight; pick >= 0 {
			continue
		}
		s.note("%s (%d)", st.name, d.n)
		st.do(d)
		break
	}
	s.settle(d)
	s.look()
}

func (s *sequence) note(format string, args ...any) {
	s.log = append(s.log, fmt.Sprintf("%3d %s  ", len(s.log), time.Now().Format("05.000"))+fmt.Sprintf(format, args...))
}

// draw is what a step has drawn.
type draw struct {
	kill  bool
	after time.Duration // until the kill
	n     int           // for the step to choose by
}

// command runs the program, and perhaps kills it. The code is -1 if it was killed.
func (s *sequence) command(d draw, args ...string) lab.Result {
	s.t.Helper()
	p := s.m.start(s.t, args...)
	if d.kill {
		time.Sleep(d.after) // the kill comes at a drawn moment, and waits for nothing
		if err := p.Kill(); err != nil && err != os.ErrProcessDone {
			s.t.Error(err)
		}
	}
	r := p.End(s.t)
	s.note("    %s: %d %s", strings.Join(args, " "), r.Code, strings.TrimSpace(r.Stderr))
	if strings.Contains(r.Stderr, "goroutine ") || r.Code > exitNotBootstrapped || r.Code < 0 && !d.kill {
		s.t.Errorf("%v: exit code %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
	}
	if r.Code < 0 {
		s.damaged = true
	}
	return r
}

// change runs a command that makes a property want. On a machine without damage it must
// succeed.
func (s *sequence) change(d draw, property *may, want may, args ...string) {
	s.t.Helper()
	switch r := s.command(d, args...); {
	case r.Code == exitOK:
		*property = want
	case r.Code < 0:
		*property = may{property.yes || want.yes, property.no || want.no}
	case s.bootstrapped == is && !s.damaged:
		s.t.Errorf("%v: exit code %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
	}
}

// step is one kind of step.
type step struct {
	name   string
	weight int
	do     func(draw)
}

func (s *sequence) steps() []step {
	return []step{
		{"bootstrap", map[bool]int{true: 3, false: 40}[s.bootstrapped == is], s.bootstrap},
		{"open", 6, func(d draw) { s.change(d, &s.opened, is, "open", byCommand) }},
		{"close", 4, func(d draw) {
			if s.opened == is {
				s.change(d, &s.opened, isNot, "close", byCommand)
			}
		}},
		{"ssh allow", 4, func(d draw) { s.change(d, &s.stranger, is, "ssh", "allow", s.m.Stranger.String()) }},
		{"ssh remove", 3, func(d draw) {
			if s.stranger == is {
				s.change(d, &s.stranger, isNot, "ssh", "remove", s.m.Stranger.V4.String(), s.m.Stranger.V6.String())
			}
		}},
		{"unlock", 4, s.unlock},
		{"lock", 4, func(d draw) {
			was := s.all
			s.change(d, &s.unlocked, isNot, "lock")
			if s.all = s.all && s.unlocked.yes; was {
				s.close(!s.all && !s.foreign)
			}
		}},
		{"apply", 4, func(d draw) { s.command(d, "apply") }},
		{"apply --confirm", 4, s.pending},
		{"settings that are not applied", 4, s.edited},
		{"two at once", 3, s.both},
		{"service", 8, s.serve},
		{"flush", 8, s.flush},
		{"interface", 5, s.link},
		{"instance", 3, s.instance},
		{"files", 8, s.spoil},
		{"read-only", 3, s.readOnly},
		{"reboot", 4, s.reboot},
		{"verify --repair", 4, s.repair},
		{"uninstall", 2, s.uninstall},
	}
}

// settings writes the administrator's file. What the flags say is not in it.
func (s *sequence) settings(more string) {
	if s.flags == nil {
		s.m.settings(s.t, more)
		return
	}
	s.m.write(s.t, agentINI, more, 0o640)
}

func (s *sequence) bootstrap(d draw) {
	r := s.command(d, append([]string{"bootstrap", "--no-service", "--no-selftest"}, s.flags...)...)
	switch {
	case r.Code == exitOK:
		s.bootstrapped, s.damaged = is, false
		s.close(!s.all && !s.foreign)
	case r.Code < 0 && s.bootstrapped == isNot:
		s.bootstrapped = either
	case strings.Contains(r.Stderr, "verify --repair rolls the change back"): // its record is damaged
		s.repair(draw{})
	case r.Code > 0:
		s.t.Errorf("bootstrap: exit code %d\n%s", r.Code, r.Stderr)
	}
}

func (s *sequence) unlock(d draw) {
	args := [][]string{{"--for", "15m"}, {"--for", "15m", "--from", s.m.Stranger.V4.String()}, {"--for", "15m", "--all"}, {"--for", "3s"}}[d.n%4]
	all := d.n%4 == 2
	if all {
		s.close(false)
	}
	want := either
	if d.n%4 == 0 {
		want = is
	}
	s.change(d, &s.unlocked, want, append([]string{"unlock"}, args...)...)
	s.all = s.all || all && s.unlocked.yes
	if all && s.bootstrapped == is {
		s.close(!s.all && !s.foreign)
	}
}

// pending tries a change that opens one port and closes another, and mostly lets it expire.
func (s *sequence) pending(d draw) {
	if s.bootstrapped != is || s.damaged || s.all {
		return
	}
	s.settings("[open]\nhttp = closed\nx = 8082/tcp\n")
	r := s.command(d, "apply", "--confirm", "2s")
	if d.n%4 == 0 && r.Code == exitOK {
		if s.command(draw{}, "confirm", "--force").Code != exitOK {
			s.note("    too late")
		}
	}
	s.settings("")
	if d.n%4 == 0 {
		s.repair(draw{})
		if r := s.command(draw{}, "apply"); r.Code != exitOK {
			// The change may still be pending.
			lab.Poll(s.t, "the change to be over", func() bool { return s.command(draw{}, "apply").Code == exitOK })
		}
	}
	lab.Poll(s.t, "the change to be rolled back", func() bool {
		_, until := s.m.pendingUntil(s.t)
		return until.IsZero() && s.m.reached(byProfile, everybody, lab.Brief) == everybody && s.m.reached(byFile, nobody, lab.Brief) == nobody
	})
	if r.Code < 0 {
		s.repair(draw{})
	}
}

// edited edits the settings without applying them, and makes something else happen.
func (s *sequence) edited(d draw) {
	if s.bootstrapped != is {
		return
	}
	s.settings("[open]\nx = 8082/tcp\n")
	d.kill = false
	[]func(draw){s.link, s.reboot, s.flush, s.instance, s.serve, s.repair}[d.n%6](d)
	s.settle(d)
	s.look()
	s.settings("")
}

// both runs commands at once.
func (s *sequence) both(d draw) {
	if s.bootstrapped != is {
		return
	}
	var all []*lab.Process
	for _, args := range [][]string{{"open", byCommand}, {"close", byCommand}, {"verify", "--repair"}} {
		all = append(all, s.m.start(s.t, args...))
	}
	if d.kill {
		time.Sleep(d.after) // the kill comes at a drawn moment, and waits for nothing
		_ = all[d.n%3].Kill()
		s.damaged = true
	}
	for _, p := range all {
		r := p.End(s.t)
		s.note("    %d %s", r.Code, strings.TrimSpace(r.Stderr))
	}
	s.opened = either
}

// serve starts, stops or kills the service.
func (s *sequence) serve(d draw) {
	if s.bootstrapped != is {
		return
	}
	if s.service == nil {
		s.start()
		return
	}
	s.stop(d.n%3 > 0)
	if d.n%3 == 2 {
		s.start()
	}
}

// start starts the service, which loads the rules.
func (s *sequence) start() {
	s.note("    run")
	s.service, s.started = s.m.serve(s.t), time.Now()
	s.close(!s.all && !s.foreign)
	s.damaged = true // files, until it has repaired them
}

// end1 ends the service.
func (s *sequence) stop(kill bool) {
	if s.service == nil {
		return
	}
	s.note("    the service ends, killed: %v", kill)
	var r lab.Result
	if kill {
		if err := s.service.Kill(); err != nil {
			s.t.Error(err)
		}
		r = s.service.End(s.t)
	} else if r = s.service.Stop(s.t); r.Code != exitOK {
		s.t.Errorf("the service: exit code %d", r.Code)
	}
	s.note("%s", r.Stderr)
	s.service = nil
}

// flush damages the rules as another program does.
func (s *sequence) flush(d draw) {
	if s.bootstrapped != is {
		return
	}
	do := []hand{byFlush, byFlushOurs, byTakeAway, byPolicy}[d.n%4]
	of := [][]string{{ipv4}, {ipv6}, {ipv4, ipv6}}[d.n/4%3]
	s.note("    %s of %v", do.iptables, of)
	if d.n%4 >= 2 {
		s.close(false)
	}
	s.damaged = true
	for _, family := range of {
		if s.m.netlink {
			s.m.Host.Run(s.t, lab.Command{Args: []string{"nft", strings.ReplaceAll(do.nft, "FAMILY", family)}})
			continue
		}
		for _, args := range strings.Split(do.iptables, "; ") {
			s.m.Host.Run(s.t, lab.Command{Args: append([]string{s.m.multi, tables(family)}, strings.Fields(args)...)})
		}
	}
}

// link adds or removes an interface or the default route.
func (s *sequence) link(d draw) {
	ip := func(args ...string) { s.m.Host.MustRun(s.t, append([]string{"ip"}, args...)...) }
	switch {
	case d.n%4 == 0:
		ip("route", "del", "default")
		ip("route", "add", "default", "via", "192.0.2.254")
	case s.iface == "":
		s.iface = []string{"eth1", "br~1", "eth+", "wg0"}[d.n/4%4]
		s.note("    %s", s.iface)
		ip("link", "add", s.iface, "type", "veth", "peer", "name", "other")
		ip("addr", "add", []string{"10.99.0.1/24", "203.0.113.129/25"}[d.n/16%2], "dev", s.iface)
		ip("link", "set", s.iface, "up")
	default:
		ip("link", "del", s.iface)
		s.iface = ""
	}
}

// instance changes what cloud-init says about the instance.
func (s *sequence) instance(d draw) {
	s.m.write(s.t, "/run/cloud-init/.instance-id", []string{"iid-1\n", "iid-2\n", "iid-datasource-none\n", ""}[d.n%4], 0o644)
}

// spoil damages files. One of the two copies of the state is whole, except in one kind.
func (s *sequence) spoil(d draw) {
	if s.bootstrapped != is {
		return
	}
	if s.damaged {
		s.repair(draw{})
	}
	cut := func(path string) {
		data, _ := os.ReadFile(filepath.Join(s.m.root, path))
		s.m.write(s.t, path, string(data[:len(data)*(d.n/8%8)/8]), 0o600)
	}
	remove := func(path string) {
		if err := os.RemoveAll(filepath.Join(s.m.root, path)); err != nil {
			s.t.Error(err)
		}
	}
	s.note("    kind %d", d.n%8)
	s.damaged = true
	switch d.n % 8 {
	case 0:
		cut(stateFile)
	case 1:
		remove(stateFile)
	case 2:
		remove("/var/lib/basicfw")
		s.noBackup = true
	case 3:
		cut(copyFile)
	case 4:
		remove(copyFile)
	case 5:
		cut(stateFile)
		cut(copyFile)
		r := s.command(draw{}, "status")
		if r.Code == exitOK || !strings.Contains(r.Stdout+r.Stderr, "basicfw-agent") {
			s.t.Errorf("status of an unreadable state: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		s.close(false)
		s.unlocked, s.all = isNot, false // which only the state has
		s.bootstrap(draw{})
	case 6:
		s.m.write(s.t, pendingFile, "{", 0o600)
	case 7:
		for _, path := range s.m.persisted() {
			cut(path)
		}
	}
}

// readOnly runs a command while a directory is read-only.
func (s *sequence) readOnly(d draw) {
	if s.bootstrapped != is || s.service != nil {
		return
	}
	dir := []string{"etc", "var", "run"}[d.n%3]
	undo := s.m.Host.ReadOnly(s.t, filepath.Join(s.m.root, dir))
	s.damaged = true
	s.note("    %s", dir)
	d.kill = false
	switch d.n / 3 % 3 {
	case 0:
		s.change(d, &s.opened, is, "open", byCommand)
	case 1:
		s.change(d, &s.unlocked, either, "unlock", "--for", "3s")
	case 2:
		s.command(d, "verify", "--repair")
	}
	undo()
}

// reboot boots the machine, with the service.
func (s *sequence) reboot(d draw) {
	if s.bootstrapped != is {
		return
	}
	s.stop(d.n%2 == 0)
	s.close(false)
	s.m.reboot(s.t)
	if err := os.RemoveAll(filepath.Join(s.m.root, "run/basicfw-agent")); err != nil {
		s.t.Error(err)
	}
	s.start()
}

func (s *sequence) repair(d draw) {
	r := s.command(d, "verify", "--repair")
	switch {
	case r.Code == exitOK:
		s.repaired()
	case r.Code > 0 && s.bootstrapped == is:
		s.t.Errorf("verify --repair: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
}

// repaired records that nothing is damaged.
func (s *sequence) repaired() {
	s.damaged = false
	s.close(!s.all && !s.foreign)
}

func (s *sequence) uninstall(d draw) {
	if s.bootstrapped != is {
		return
	}
	s.stop(false) // as a service manager does
	s.close(false)
	switch r := s.command(d, "uninstall"); {
	case r.Code < 0:
		s.bootstrapped, s.foreign = either, !s.m.netlink
		s.opened.no, s.stranger.no, s.unlocked.no = true, true, true
	case r.Code > 0:
		s.t.Errorf("uninstall: exit code %d\n%s", r.Code, r.Stderr)
	default:
		s.removed()
	}
}

// removed checks the machine after uninstall.
func (s *sequence) removed() {
	s.bootstrapped, s.damaged = isNot, false
	s.unlocked, s.all, s.foreign = isNot, false, false
	if now := s.m.everything(s.t); s.noBackup { // local.ini stays, too: it may be from before bootstrap
		s.before, s.noBackup = now, false
	} else {
		s.opened, s.stranger = isNot, isNot
		same(s.t, "after uninstall", s.before, now)
	}
}

// settle waits until the service has repaired what is damaged, or repairs it.
func (s *sequence) settle(d draw) {
	if s.service != nil && time.Since(s.started) > 40*time.Second {
		s.stop(false) // the lab limits how long a program runs
	}
	if s.bootstrapped != is || !s.damaged || s.t.Failed() {
		return
	}
	if s.service != nil && s.m.multi != "xtables-legacy-multi" {
		end := time.Now().Add(repaired)
		for s.m.agent(s.t, "verify").Code != exitOK {
			if time.Now().After(end) {
				text := s.m.agent(s.t, "status").Stdout
				// A directory that is removed again is noticed only at the periodic check.
				if !strings.Contains(text, "next repair") && !strings.Contains(text, "is lost; its copy is") {
					s.t.Errorf("the service has not repaired the machine:\n%s", text)
				}
				s.note("    repairs are paused")
				s.repair(draw{})
				return
			}
		}
		s.repaired()
		return
	}
	if d.n%3 > 0 {
		s.repair(draw{})
	}
}

// look checks who reaches which port.
func (s *sequence) look() {
	if s.t.Failed() {
		return
	}
	m := s.m
	if s.damaged || s.bootstrapped != is {
		if got := m.reached("22/tcp", "client4 client6", time.Second); strings.Contains(got, "client4 client6") {
			return
		}
		r := s.command(draw{}, "status")
		if r.Code == exitOK && strings.HasPrefix(m.reached("22/tcp", "client4 client6", lab.Patient), "client4 client6") {
			return // the service has repaired it meanwhile
		}
		if r.Code == exitOK || !strings.Contains(r.Stdout, "basicfw-agent") {
			s.t.Errorf("the client does not get in, and status does not say why: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
		}
		return
	}
	if s.all {
		return
	}
	var wg sync.WaitGroup
	for port, want := range map[string]may{
		"22/tcp": {s.stranger.yes || s.unlocked.yes, s.stranger.no && s.unlocked.no}, byProfile: is, byCommand: s.opened, byFile: isNot,
	} {
		wg.Add(1)
		go func() {
			defer wg.Done()
			s.wantStranger(port, want)
		}()
	}
	wg.Wait()
	if s.t.Failed() {
		s.note("%s", s.m.agent(s.t, "status").Stdout)
	}
}

// wantStranger checks a port, at which the client may be too.
func (s *sequence) wantStranger(port string, want may) {
	who := everybody
	if want == isNot {
		who = nobody
		if port == "22/tcp" {
			who = "client4 client6"
		}
	}
	wait := lab.Patient
	if want == either {
		wait = lab.Brief
	}
	got := s.m.reached(port, who, wait)
	if port == "22/tcp" && want == either && slices.Contains([]string{"client4 client6", "client4 client6 stranger4", "client4 client6 stranger6"}, got) {
		return
	}
	if got != who && want != either {
		s.t.Errorf("%s: reached by %q, want %q", port, got, who)
	}
}

// end repairs the machine and uninstalls.
func (s *sequence) end() {
	s.note("end")
	if s.bootstrapped != is {
		s.bootstrap(draw{})
	}
	s.command(draw{}, "lock")
	s.unlocked, s.all = isNot, false
	s.repair(draw{})
	for _, args := range [][]string{{"verify"}, {"apply"}, {"verify"}} {
		if r := s.command(draw{}, args...); r.Code != exitOK {
			s.t.Errorf("%v: exit code %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
		}
	}
	// What the settings have is what is open.
	s.opened = isNot
	if s.m.exists(s.t, localINI) && setting(s.m.read(s.t, localINI), "open", "tcp-8080") == byCommand {
		s.opened = is
	}
	s.look()
	s.uninstall(draw{})
}
