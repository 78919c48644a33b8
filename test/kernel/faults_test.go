package kernel_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// breakable is the program with its steps controlled by a test: the same main(), built as a
// test (cmd/basicfw-agent/faults_test.go), so that no released binary has it.
var breakable = sync.OnceValues(func() (string, error) {
	path := filepath.Join(filepath.Dir(program), "breakable", "basicfw-agent")
	out, err := exec.Command("go", "test", "-c", "-o", path, "github.com/basicfw/basicfw-agent/cmd/basicfw-agent").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("building the breakable program: %w\n%s", err, out)
	}
	return path, nil
})

// operation is a change of a machine, to be broken at each of its steps.
type operation struct {
	name string
	// before prepares a new machine for the operation.
	before func(t *testing.T, m *machine)
	args   []string
	// again lists further exit codes allowed for the next run, if there was nothing left to
	// do.
	again []int
	// gone is set if the operation removes the program from the machine.
	gone bool
	// boots is set if the operation is the start of the service at boot.
	boots bool
	// intact checks what else must not be lost on the way.
	intact func(t *testing.T, m *machine) error
}

const trialLength = "1h"

func operations(m *machine) []operation {
	bootstrap := []string{"bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-selftest"}
	apply := []string{"apply"}
	if !m.netlink { // a rehearsal is one step, which one variant covers
		bootstrap, apply = append(bootstrap, "--no-rehearsal"), append(apply, "--no-rehearsal")
	}
	// The backend is named, so that no fault makes auto choose another.
	backend := "[agent]\nbackend = iptables\n"
	if m.netlink {
		backend = "[agent]\nbackend = nftables\n"
	}
	fresh := func(t *testing.T, m *machine) {
		t.Helper()
		m.write(t, "/etc/basicfw/agent.ini", backend, 0o640)
		for _, family := range families() {
			if !m.netlink {
				m.iptables(t, family, "-A", "INPUT", "-p", "tcp", "--dport", "22", "-j", "ACCEPT")
			}
		}
		m.write(t, rulesFile(ipv4), "*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\nCOMMIT\n", 0o640)
	}
	bootstrapped := func(t *testing.T, m *machine) {
		t.Helper()
		fresh(t, m)
		// A port in an included file.
		m.write(t, "/etc/ssh/sshd_config", "Include /etc/ssh/sshd_config.d/*.conf\nPort 22\n", 0o644)
		m.write(t, "/etc/ssh/sshd_config.d/port.conf", "Port 2222\n", 0o644)
		m.must(t, exitOK, bootstrap...)
	}
	edited := func(t *testing.T, m *machine) {
		t.Helper()
		bootstrapped(t, m)
		m.write(t, "/etc/basicfw/agent.ini", backend+"[open]\nsmtp = closed\nx = 8081/tcp\n", 0o640)
	}
	tried := func(length string) func(t *testing.T, m *machine) {
		return func(t *testing.T, m *machine) {
			t.Helper()
			edited(t, m)
			m.must(t, exitOK, append(slices.Clone(apply), "--confirm", length)...)
			m.killWaiting(t)
		}
	}
	const firewalld = "/etc/systemd/system/multi-user.target.wants/firewalld.service"
	return []operation{
		{name: "bootstrap", before: fresh, args: bootstrap},
		{name: "bootstrap, taking over", args: bootstrap,
			before: func(t *testing.T, m *machine) {
				t.Helper()
				fresh(t, m)
				m.symlink(t, "/usr/lib/systemd/system/firewalld.service", firewalld)
			},
			intact: func(t *testing.T, m *machine) error {
				if !m.exists(t, firewalld) && !m.exists(t, unitLink) {
					return fmt.Errorf("neither firewalld nor the service closes the machine at the next boot")
				}
				return nil
			}},
		{name: "apply", before: edited, args: apply},
		{name: "verify --repair", args: []string{"verify", "--repair"},
			before: func(t *testing.T, m *machine) {
				t.Helper()
				bootstrapped(t, m)
				m.reboot(t)
				if err := os.Remove(filepath.Join(m.root, m.persisted()[len(m.persisted())-1])); err != nil {
					t.Fatal(err)
				}
				if err := os.Remove(filepath.Join(m.root, unitLink)); err != nil {
					t.Fatal(err)
				}
			}},
		{name: "apply --confirm", before: edited, args: append(slices.Clone(apply), "--confirm", trialLength)},
		{name: "confirm", before: tried(trialLength), args: []string{"confirm"}, again: []int{exitFailed}},
		{name: "roll back", args: []string{"expire"},
			before: func(t *testing.T, m *machine) {
				t.Helper()
				tried("1s")(t, m)
				_, until := m.pendingUntil(t)
				waitFor(t, until.Add(time.Second))
			}},
		{name: "unlock", before: bootstrapped, args: []string{"unlock", "--for", "1h"}},
		{name: "lock", args: []string{"lock"}, before: func(t *testing.T, m *machine) {
			t.Helper()
			bootstrapped(t, m)
			m.must(t, exitOK, "unlock", "--for", "1h")
		}},
		{name: "boot", args: []string{"run"}, boots: true, before: func(t *testing.T, m *machine) {
			t.Helper()
			bootstrapped(t, m)
			m.reboot(t)
			if err := os.RemoveAll(filepath.Join(m.root, "run/basicfw-agent")); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "boot without var", args: []string{"run"}, boots: true, before: func(t *testing.T, m *machine) {
			t.Helper()
			bootstrapped(t, m)
			m.reboot(t)
			for _, dir := range []string{"run/basicfw-agent", "var/lib/basicfw"} {
				if err := os.RemoveAll(filepath.Join(m.root, dir)); err != nil {
					t.Fatal(err)
				}
			}
		}},
		{name: "uninstall", before: bootstrapped, args: []string{"uninstall"}, again: []int{exitNotBootstrapped}, gone: true},
	}
}

const unitLink = "/etc/systemd/system/sysinit.target.wants/basicfw-agent.service"

// symlink makes a symbolic link below the root.
func (m *machine) symlink(t *testing.T, target, path string) {
	t.Helper()
	path = filepath.Join(m.root, path)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}

// killWaiting kills the processes that wait to roll back a change. The test waits instead.
func (m *machine) killWaiting(t *testing.T) {
	t.Helper()
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		line, err := os.ReadFile("/proc/" + d.Name() + "/cmdline")
		if err == nil && strings.HasSuffix(string(line), "\x00--root\x00"+m.root+"\x00expire\x00") {
			var pid int
			fmt.Sscan(d.Name(), &pid)
			if p, err := os.FindProcess(pid); err == nil {
				p.Kill()
			}
		}
	}
}

// point is a state of a machine: its rules and its files.
type point struct {
	saved map[string]string // iptables-save, by family
	table string            // of nf_tables
	files map[string][]lab.Entry
	boot  string
}

// walk breaks one operation at each step on one machine.
type walk struct {
	*machine
	op    operation
	boots string // the file that names the boot
	start point
	// startKey describes start.
	startKey string
	guards   bool
	// What may be loaded: the rules before and after the operation, and those that a boot
	// makes of either.
	before, after, beforeBoot, afterBoot map[string]string
	afterFiles                           string
	probed                               map[string]error // by family and rules
	judged                               map[string]error // by the machine's state
	injected, survived                   int
	row                                  map[string]int
	all                                  int
}

// hows are the faults of a step that changes something. A step that only reads has fewer:
// killing the program there is killing it after the change before, and a full or read-only
// disk does not make it fail.
var (
	hows     = []string{"killed before", "killed after", "ENOSPC", "EIO", "EROFS", "EACCES"}
	lookHows = []string{"EIO", "EACCES"}
)

// TestFaults breaks every step of every operation once in every way: each operation on a
// file and each run of a program. After each fault, both families hold the complete old or
// new rules, which real packets confirm. The same holds after a boot, whether the service
// or the distribution loads the rules. The next run completes.
func TestFaults(t *testing.T) {
	lab.Need(t)
	if _, err := breakable(); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var table []string
	injected, survived := 0, 0
	t.Run("walk", func(t *testing.T) {
		for _, variant := range variants {
			for i, op := range operations(&machine{Lab: &lab.Lab{}}) {
				name := op.name
				t.Run(variant+"/"+strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
					t.Parallel()
					w := newWalk(t, variant, i)
					w.run(t)
					mu.Lock()
					defer mu.Unlock()
					injected, survived = injected+w.injected, survived+w.survived
					table = append(table, fmt.Sprintf("%-7s %-22s %4d steps  %v  injected %4d  survived %4d",
						variant, name, w.all, w.figures(), w.injected, w.survived))
				})
			}
		}
	})
	slices.Sort(table)
	t.Logf("fault walk:\n%s\ninjected %d, survived %d", strings.Join(table, "\n"), injected, survived)
}

func (w *walk) figures() string {
	var b strings.Builder
	for _, how := range hows {
		fmt.Fprintf(&b, " %s %d", strings.ReplaceAll(how, " ", "-"), w.row[how])
	}
	return strings.TrimSpace(b.String())
}

func newWalk(t *testing.T, variant string, i int) *walk {
	t.Helper()
	m := newMachine(t, variant)
	m.Host.Listen(t, 22, 8080)
	w := &walk{machine: m, op: operations(m)[i], boots: filepath.Join(t.TempDir(), "boot_id"),
		probed: map[string]error{}, judged: map[string]error{}, row: map[string]int{}}
	w.guards = strings.Contains(w.op.name, "taking over")
	w.nameBoot(t, "first")
	m.Host.Bind(t, w.boots, "/proc/sys/kernel/random/boot_id")
	t.Cleanup(func() { m.killWaiting(t) })
	return w
}

func (w *walk) nameBoot(t *testing.T, name string) {
	t.Helper()
	if err := os.WriteFile(w.boots, []byte(name+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

// run walks through the operation.
func (w *walk) run(t *testing.T) {
	w.op.before(t, w.machine)
	w.start, w.startKey = w.take(t), w.described(t)
	steps := w.unharmed(t)
	for _, step := range steps {
		kind, at, _ := strings.Cut(step, "\t")
		ways := hows
		if kind == "looks" {
			ways = lookHows
		}
		w.all++
		for _, how := range ways {
			err := w.inject(t, at, how)
			if errors.Is(err, errNotReached) && w.op.boots {
				continue // the step came after the boot
			}
			w.injected++
			w.row[how]++
			if err != nil {
				t.Errorf("%s: %s: %v", at, how, err)
				continue
			}
			w.survived++
		}
	}
}

// unharmed runs the operation without a fault: its result is the new rules.
func (w *walk) unharmed(t *testing.T) (steps []string) {
	t.Helper()
	w.before = w.families(t)
	w.boot(t, "unharmed, before")
	w.beforeBoot = w.families(t)
	w.put(t, w.start)
	r, steps := w.broken(t, "", "")
	if r.Code != exitOK {
		t.Fatalf("unharmed: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if len(steps) < 20 {
		t.Errorf("only %d steps", len(steps))
	}
	w.after = w.families(t)
	w.afterFiles = w.described(t)
	w.boot(t, "unharmed, after")
	w.afterBoot = w.families(t)
	w.put(t, w.start)
	return steps
}

// broken runs the operation with a fault at one of its steps, and lists the steps that it
// reached.
func (w *walk) broken(t *testing.T, at, how string) (lab.Result, []string) {
	t.Helper()
	path, err := breakable()
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(filepath.Dir(w.boots), "steps")
	if err := os.RemoveAll(list); err != nil {
		t.Fatal(err)
	}
	c := w.command(w.op.args...)
	c.Args[0] = path
	c.Env = append(c.Env, "FAULT_STEPS="+list, "FAULT_AT="+at, "FAULT_HOW="+how)
	read := func() []string {
		data, err := os.ReadFile(list)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
	}
	if !w.op.boots {
		r := w.Host.Start(t, c).End(t)
		w.endTrial(t)
		return r, read()
	}
	s := w.startService(t, c)
	ended := make(chan lab.Result, 1)
	go func() {
		ended <- s.End(t)
		s.notices.Close()
	}()
	var steps []string
	if s.ready() == nil {
		steps = read() // later steps are not part of the boot
		s.Terminate()
	}
	r := <-ended
	if steps == nil {
		steps = read()
		if r.Code == exitOK {
			r.Code = exitFailed // it never reported that it was ready
		}
	}
	return r, steps
}

// endTrial kills the process that waits for a confirmation, if there is one.
func (w *walk) endTrial(t *testing.T) {
	t.Helper()
	if w.op.name == "apply --confirm" {
		w.killWaiting(t)
	}
}

var errNotReached = errors.New("the step was not reached")

// inject runs the operation with a fault and checks the result.
func (w *walk) inject(t *testing.T, at, how string) error {
	t.Helper()
	moved := true
	defer func() {
		if moved {
			w.put(t, w.start)
		}
	}()
	r, steps := w.broken(t, at, how)
	if !slices.ContainsFunc(steps, func(s string) bool { return strings.HasSuffix(s, "\t"+at) }) {
		return errNotReached
	}
	now := w.families(t)
	if strings.Contains(r.Stderr, "goroutine ") {
		return fmt.Errorf("it crashed: %s", r.Stderr)
	}
	switch killed := strings.HasPrefix(how, "killed"); {
	case killed && r.Code != -1:
		return fmt.Errorf("exit code %d", r.Code)
	case killed:
	case w.op.boots && r.Code != exitOK:
		return fmt.Errorf("the machine is not closed: exit code %d\n%s", r.Code, r.Stderr)
	case r.Code == exitOK, r.Code == exitDrift && w.op.name == "verify --repair": // of the rules alone
		if diff := differs(w.after, now); diff != "" {
			return fmt.Errorf("exit code %d, and the rules are not the new ones: %s\n%s", r.Code, diff, r.Stderr)
		}
	case r.Code == exitFailed, r.Code == exitUsage: // settings that cannot be read
		if diff := differs(w.before, now); diff != "" {
			return fmt.Errorf("exit code %d, and the rules are not the old ones: %s\n%s", r.Code, diff, r.Stderr)
		}
		if r.Stderr == "" {
			return fmt.Errorf("it failed without a message")
		}
	default:
		return fmt.Errorf("exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	key := w.describe(t, now)
	err, ok := w.judged[key]
	if ok {
		moved = key != w.startKey
		return err
	}
	err = w.judge(t)
	w.judged[key] = err
	return err
}

// judge checks a machine as a fault has left it, boots it, and runs the operation again.
func (w *walk) judge(t *testing.T) error {
	t.Helper()
	if err := w.whole(t, w.before, w.after); err != nil {
		return err
	}
	if w.op.intact != nil {
		if err := w.op.intact(t, w.machine); err != nil {
			return err
		}
	}
	left := w.take(t)
	if err := w.next(t); err != nil {
		return err
	}
	w.put(t, left)
	// Without the service, the distribution's own may load our files.
	if err := w.filesWhole(t); err != nil {
		return err
	}
	w.put(t, left)
	if err := w.boot(t, "afterwards"); err != nil {
		return err
	}
	if err := w.whole(t, w.before, w.after, w.beforeBoot, w.afterBoot); err != nil {
		return fmt.Errorf("after a boot: %w", err)
	}
	if err := w.next(t); err != nil {
		return fmt.Errorf("after a boot: %w", err)
	}
	return nil
}

// next runs the operation again without a fault.
func (w *walk) next(t *testing.T) error {
	t.Helper()
	var r lab.Result
	if w.op.boots {
		r = w.serve(t).Stop(t)
	} else {
		r = w.agent(t, w.op.args...)
	}
	w.endTrial(t)
	if r.Code != exitOK && !slices.Contains(w.op.again, r.Code) {
		return fmt.Errorf("the next run: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	now := w.families(t)
	want := w.after
	if r.Code != exitOK { // nothing was left to do after the boot
		want = w.beforeBoot
		if w.op.gone {
			want = w.afterBoot
		}
		if differs(want, now) != "" {
			want = w.after
		}
	}
	if diff := differs(want, now); diff != "" {
		return fmt.Errorf("after the next run the rules are not the new ones: %s", diff)
	}
	if w.op.gone {
		// A run with nothing to do leaves its lock until the next boot.
		if err := os.RemoveAll(filepath.Join(w.root, "run/basicfw-agent")); err != nil {
			t.Fatal(err)
		}
		if now := w.describe(t, w.after); now != w.afterFiles {
			return fmt.Errorf("after the next run:%s", difference(w.afterFiles, now))
		}
		return nil
	}
	if r := w.agent(t, "verify"); r.Code != exitOK {
		return fmt.Errorf("after the next run, verify: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	return nil
}

// whole fails unless each family holds exactly one of several rulesets, and packets confirm
// it.
func (w *walk) whole(t *testing.T, sets ...map[string]string) error {
	t.Helper()
	for family, rules := range w.families(t) {
		guarded := w.guards && strings.Contains(w.Host.MustRun(t, "nft", "list", "tables"), "basicfw-guard")
		// While another firewall is stopped, only the guard drops.
		yielded := func(rules string) string { return strings.Replace(rules, ":INPUT DROP", ":INPUT ACCEPT", 1) }
		if !slices.ContainsFunc(sets, func(s map[string]string) bool {
			return s[family] == rules || guarded && yielded(s[family]) == rules
		}) {
			return fmt.Errorf("%s holds neither the old nor the new rules:%s", family, difference(sets[0][family], rules))
		}
		key := fmt.Sprint(family, guarded, rules)
		err, ok := w.probed[key]
		if !ok {
			err = w.probe(family, strings.Contains(rules, "-A INPUT -j BASICFW-INPUT") || strings.Contains(rules, "table inet basicfw"))
			w.probed[key] = err
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// probe checks that the allowed client reaches SSH, and that a port closed by both rulesets
// is closed.
func (w *walk) probe(family string, closed bool) error {
	to := w.Server.V4
	if family == ipv6 {
		to = w.Server.V6
	}
	if err := w.Outsider.Reach(w.Client.Like(to), to, 22, lab.Patient); err != nil {
		return fmt.Errorf("the client does not reach SSH over %s: %w", family, err)
	}
	if closed && w.Outsider.Reach(w.Stranger.Like(to), to, 8080, lab.Brief) == nil {
		return fmt.Errorf("port 8080 is open over %s", family)
	}
	return nil
}

// filesWhole loads the persisted files as the distribution's own service does.
func (w *walk) filesWhole(t *testing.T) error {
	t.Helper()
	w.reboot(t)
	table := filepath.Join(w.root, tableFile)
	closed := false
	if _, err := os.Stat(table); err == nil {
		closed = true
		if r := w.Host.Run(t, lab.Command{Args: []string{"nft", "-f", table}}); r.Code != 0 {
			return fmt.Errorf("%s cannot be loaded: %s", tableFile, r.Stderr)
		}
		for _, family := range families() {
			if err := w.probe(family, true); err != nil {
				return fmt.Errorf("with %s: %w", tableFile, err)
			}
		}
	}
	for _, family := range families() {
		data, err := os.ReadFile(filepath.Join(w.root, rulesFile(family)))
		if os.IsNotExist(err) {
			continue
		}
		if err != nil {
			return err
		}
		r := w.Host.Run(t, lab.Command{Args: []string{w.multi, tables(family) + "-restore"}, Stdin: string(data)})
		if r.Code != 0 {
			return fmt.Errorf("%s cannot be loaded: %s\n%s", rulesFile(family), r.Stderr, data)
		}
		if err := w.probe(family, closed || strings.Contains(string(data), "-A INPUT -j BASICFW-INPUT")); err != nil {
			return fmt.Errorf("with %s: %w", rulesFile(family), err)
		}
	}
	return nil
}

// boot boots the machine: nothing is in the kernel or in /run, and the service starts if it
// is enabled.
func (w *walk) boot(t *testing.T, name string) error {
	t.Helper()
	w.reboot(t)
	if w.guards {
		w.Host.Run(t, lab.Command{Args: []string{"nft", "delete", "table", "inet", "basicfw-guard"}})
	}
	w.nameBoot(t, name)
	w.empty(t, "run")
	if !w.exists(t, unitLink) {
		return nil
	}
	if _, err := os.Stat(filepath.Join(w.root, unitLink[:len("/etc/systemd/system")]+"/basicfw-agent.service")); err != nil {
		return nil // systemd finds no unit
	}
	s := w.serve(t)
	if r := s.Stop(t); r.Code != exitOK {
		return fmt.Errorf("the service: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	return nil
}

// empty removes what is in a directory of the root.
func (w *walk) empty(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(w.root, dir))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(w.root, dir, e.Name())); err != nil {
			t.Fatal(err)
		}
	}
}

// changing lists the directories that the program writes to.
var changing = []string{"etc", "var", "run"}

// take records the state of the machine.
func (w *walk) take(t *testing.T) point {
	t.Helper()
	p := point{saved: map[string]string{}, files: map[string][]lab.Entry{}}
	for _, family := range families() {
		if !w.netlink {
			p.saved[family] = w.Host.MustRun(t, w.multi, tables(family)+"-save")
		}
	}
	p.table = w.table(t)
	for _, dir := range changing {
		all, err := lab.ReadTree(filepath.Join(w.root, dir))
		if err != nil {
			t.Fatal(err)
		}
		p.files[dir] = all
	}
	data, err := os.ReadFile(w.boots)
	if err != nil {
		t.Fatal(err)
	}
	p.boot = strings.TrimSpace(string(data))
	return p
}

// put restores a recorded state.
func (w *walk) put(t *testing.T, p point) {
	t.Helper()
	for family, text := range p.saved {
		if !strings.Contains(text, "*mangle\n") { // it did not exist
			text += "*mangle\n:FORWARD ACCEPT [0:0]\nCOMMIT\n"
		}
		w.load(t, family, text)
	}
	if w.netlink {
		w.reboot(t)
		if r := w.Host.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: p.table}); r.Code != 0 {
			t.Fatalf("nft: %s\n%s", r.Stderr, p.table)
		}
	}
	if w.guards {
		w.Host.Run(t, lab.Command{Args: []string{"nft", "delete", "table", "inet", "basicfw-guard"}})
	}
	for _, dir := range changing {
		w.empty(t, dir)
		if err := lab.WriteTree(filepath.Join(w.root, dir), p.files[dir]); err != nil {
			t.Fatal(err)
		}
	}
	w.nameBoot(t, p.boot)
}

// What differs between two equal runs: times, and files that are not renamed yet. No
// program reads those, so their content does not count.
var (
	times     = regexp.MustCompile(`\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d| UTC)?|meta time (<|>=) \d+`)
	uptimes   = regexp.MustCompile(`(began|ends)\\": ?\d+`)
	temporary = regexp.MustCompile(`(?m)^(\S*/\.\S+)\.\d+\.(\d+|link) .*$`)
)

func timeless(text string) string {
	return temporary.ReplaceAllString(uptimes.ReplaceAllString(times.ReplaceAllString(text, "TIME"), "$1 N"), "$1.TEMP")
}

// families returns the rules that each family's packets pass: its filter table, or our
// table for both.
func (w *walk) families(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	if w.netlink {
		text := timeless(w.table(t))
		return map[string]string{ipv4: text, ipv6: text}
	}
	for _, family := range families() {
		lines := w.filter(t, family)
		if slices.IndexFunc(lines, func(l string) bool { return strings.HasPrefix(l, "-") || strings.HasSuffix(l, " DROP") }) < 0 {
			lines = nil // a missing table equals an empty one
		}
		out[family] = timeless(strings.Join(lines, "\n"))
	}
	return out
}

// described returns everything that the program may change.
func (w *walk) described(t *testing.T) string {
	t.Helper()
	return w.describe(t, w.families(t))
}

func (w *walk) describe(t *testing.T, rules map[string]string) string {
	t.Helper()
	text := rules[ipv4] + "\n" + rules[ipv6] + "\n" + timeless(w.tree(t, false, "etc", "var"))
	// Of /run only the names count: the lock file names its holder.
	all, err := lab.ReadTree(filepath.Join(w.root, "run"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if e.Path != "xtables.lock" { // iptables' own
			text += "/run/" + e.Path + "\n"
		}
	}
	if w.guards {
		text += w.Host.MustRun(t, "nft", "list", "tables")
	}
	return text
}

func differs(want, got map[string]string) string {
	for _, family := range families() {
		if want[family] != got[family] {
			return family + difference(want[family], got[family])
		}
	}
	return ""
}
