// Command bench measures the program as whole processes in a network namespace of its own:
// wall time, CPU time and minor page faults, including the programs that it runs. Each
// figure is measured in turns with its floor, so that a changing speed of the machine
// affects both. It prints medians.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/system"
)

func main() {
	runs := flag.Int("n", 21, "runs of each command")
	idle := flag.Duration("idle", 0, "also let the service idle for this long, and print its memory and context switches")
	flooding := flag.Bool("flood", false, "send packets and print the cost of one (internal)")
	inside := flag.Bool("inside", false, "measure in the current network namespace (internal)")
	flag.Parse()
	if *flooding {
		if err := flood(); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: bench [-n RUNS] [-idle 10m] BINARY")
		os.Exit(2)
	}
	if !*inside {
		fmt.Fprintln(os.Stderr, "bench:", begin())
		os.Exit(1)
	}
	if err := run(flag.Arg(0), *runs, *idle); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// begin executes this program again in a network namespace of its own, so that what it
// measures starts there. It returns only if that fails.
func begin() error {
	runtime.LockOSThread() // the namespace is a thread's, until exec
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	return os.NewSyscallError("exec", unix.Exec("/proc/self/exe", append([]string{os.Args[0], "-inside"}, os.Args[1:]...), os.Environ()))
}

// lab is a root directory for the program's files in this network namespace.
type lab struct {
	sys       *system.System
	dir, root string
	binary    string
}

// run runs a program.
func (l *lab) run(name string, args ...string) error {
	_, err := l.sys.Run(context.Background(), system.Command{Name: name, Args: args})
	return err
}

func (l *lab) agent(args ...string) error {
	return l.run(l.binary, append([]string{"--root", l.root}, args...)...)
}

// unprotect resets the machine to one that was never bootstrapped.
func (l *lab) unprotect() error {
	for _, t := range []string{"iptables", "ip6tables"} {
		for _, args := range [][]string{{"-P", "INPUT", "ACCEPT"}, {"-F"}, {"-X"}} {
			if err := l.run(t, args...); err != nil {
				return err
			}
		}
	}
	if err := os.RemoveAll(l.root); err != nil {
		return err
	}
	for _, d := range []string{"etc/sysconfig", "var/lib", "run", "usr"} {
		if err := os.MkdirAll(filepath.Join(l.root, d), 0o755); err != nil {
			return err
		}
	}
	return nil
}

func run(binary string, runs int, idle time.Duration) error {
	binary, err := filepath.Abs(binary)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l := &lab{sys: &system.System{}, dir: dir, root: filepath.Join(dir, "root"), binary: binary}

	if err := l.unprotect(); err != nil {
		return err
	}
	if err := l.start(runs); err != nil {
		return err
	}
	if err := l.iptables(runs); err != nil {
		return err
	}
	if err := l.netlink(runs); err != nil {
		return err
	}
	if err := l.packets(); err != nil {
		return err
	}
	if err := size(binary); err != nil {
		return err
	}
	if idle > 0 {
		return l.idle(idle)
	}
	return nil
}

// row is one measurement of the program and its floor.
type row struct {
	name    string
	floor   func() (cost, error)
	of      string
	prepare func() error
	subject func() error
	// factor and plus bound the subject's time: a multiple of the floor, and a constant. If
	// both are zero, there is no bound.
	factor float64
	plus   time.Duration
	// faults bounds its page faults as a multiple of the floor's. Zero is no bound.
	faults float64
}

// cost is the cost of a run of programs. In a virtual machine the wall time depends on the
// cost of a page fault; the number of faults does not.
type cost struct {
	wall, cpu time.Duration
	faults    int64 // minor ones
}

// measured returns the cost of the programs that f runs and waits for, including their
// children.
func measured(f func() error) (cost, error) {
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &before); err != nil {
		return cost{}, os.NewSyscallError("getrusage", err)
	}
	wall, err := timed(f)
	if e := unix.Getrusage(unix.RUSAGE_CHILDREN, &after); e != nil {
		return cost{}, os.NewSyscallError("getrusage", e)
	}
	cpu := func(u unix.Rusage) time.Duration { return time.Duration(u.Utime.Nano() + u.Stime.Nano()) }
	return cost{wall, cpu(after) - cpu(before), after.Minflt - before.Minflt}, err
}

// print measures rows, each in turns with its floor.
func print(title string, runs int, rows []row) error {
	fmt.Printf("%-34s %10s %10s %10s  %s\n", title, "floor", "ours", "limit", "medians of "+strconv.Itoa(runs))
	for _, r := range rows {
		var floors, ours []cost
		for i := range runs + 1 {
			f, err := r.floor()
			if err != nil {
				return err
			}
			if r.prepare != nil {
				if err := r.prepare(); err != nil {
					return err
				}
			}
			o, err := measured(r.subject)
			if err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			if i > 0 { // the first run warms up
				floors, ours = append(floors, f), append(ours, o)
			}
		}
		wall := func(c cost) float64 { return ms(c.wall) }
		cpu := func(c cost) float64 { return ms(c.cpu) }
		faults := func(c cost) float64 { return float64(c.faults) }
		r.line(r.name, "ms", median(floors, wall), median(ours, wall), r.factor, ms(r.plus))
		r.line("", "ms of CPU", median(floors, cpu), median(ours, cpu), 0, 0)
		r.line("", "faults", median(floors, faults), median(ours, faults), r.faults, 0)
	}
	return nil
}

// line prints one figure of a row, and whether it is within its limit, if it has one.
func (r row) line(name, unit string, floor, ours, factor, plus float64) {
	number := func(x float64) string {
		if unit == "faults" {
			return strconv.FormatFloat(x, 'f', 0, 64)
		}
		return strconv.FormatFloat(x, 'f', 1, 64)
	}
	limit, verdict := "", ""
	if bound := factor*floor + plus; bound > 0 {
		limit, verdict = number(bound), ", within"
		if ours > bound {
			verdict = ", OVER"
		}
		verdict += fmt.Sprintf(" (%g x %s", factor, r.of)
		if plus > 0 {
			verdict += fmt.Sprintf(" + %g %s", plus, unit)
		}
		verdict += ")"
	}
	fmt.Printf("%-34s %10s %10s %10s  %s%s\n", name, number(floor), number(ours), limit, unit, verdict)
}

// program measures one program.
func (l *lab) program(name string, args ...string) func() (cost, error) {
	return func() (cost, error) {
		return measured(func() error { return l.run(name, args...) })
	}
}

// script measures programs that run one after another.
func (l *lab) script(text string) func() (cost, error) {
	return l.program("sh", "-ec", "cd "+l.dir+"; "+text)
}

const extra = "extra = 8080/tcp\n"

// settings writes settings with services in addition to the profile's.
func (l *lab) settings(services string) error {
	return os.WriteFile(filepath.Join(l.root, "etc/basicfw/agent.ini"), []byte("[open]\n"+services), 0o600)
}

// flip adds a service to the settings, and removes it the next time.
func (l *lab) flip() func() error {
	there := true
	return func() error {
		if there = !there; there {
			return l.settings(extra)
		}
		return l.settings("")
	}
}

// from applies the services of before, and then writes those of after.
func (l *lab) from(before, after string) func() error {
	return func() error {
		if err := l.settings(before); err != nil {
			return err
		}
		if err := l.agent("apply", "--no-rehearsal"); err != nil {
			return err
		}
		return l.settings(after)
	}
}

func (l *lab) bootstrap(args ...string) error {
	return l.agent(append([]string{"bootstrap", "--profile", "web+mail", "--client-ip", "203.0.113.9", "--no-service", "--no-selftest"}, args...)...)
}

// start measures the startup of the program against a Go program that does nothing.
func (l *lab) start(runs int) error {
	empty := filepath.Join(l.dir, "empty")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", empty, "github.com/basicfw/basicfw-agent/test/bench/empty")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building an empty program: %w: %s", err, out)
	}
	return print("start", runs, []row{
		{name: "version", floor: l.program(empty), of: "an empty Go program", subject: func() error { return l.agent("version") }, faults: 2.3},
	})
}

// openPort and closePort open and close a port.
func (l *lab) openPort() error  { return l.agent("open", "9999/tcp") }
func (l *lab) closePort() error { return l.agent("close", "9999/tcp") }

// iptables measures the iptables backend against iptables' own programs.
func (l *lab) iptables(runs int) error {
	if err := l.unprotect(); err != nil {
		return err
	}
	if err := l.bootstrap(); err != nil {
		return err
	}
	for _, name := range []string{"iptables", "ip6tables"} {
		if err := copyFile(filepath.Join(l.root, "etc/sysconfig", name), filepath.Join(l.dir, name)); err != nil {
			return err
		}
	}
	saves := l.script("iptables-save >out; ip6tables-save >out")
	floor := l.script("iptables-restore <iptables; ip6tables-restore <ip6tables; iptables-save >out; ip6tables-save >out")
	const restores = "2 restores, 2 saves"
	apply := func() error { return l.agent("apply") }
	return print("iptables", runs, []row{
		{"bootstrap", floor, restores, l.unprotect, func() error { return l.bootstrap("--no-rehearsal") }, 2, 10 * time.Millisecond, 0},
		{"apply, one service more or less", floor, restores, l.flip(), func() error { return l.agent("apply", "--no-rehearsal") }, 2, 10 * time.Millisecond, 0},
		{"the same, rehearsed", floor, restores, l.flip(), apply, 3, 20 * time.Millisecond, 0},
		{"open, rehearsed", floor, restores, l.closePort, l.openPort, 0, 0, 4.3},
		{"apply, nothing changed", saves, "2 saves", nil, apply, 1, 10 * time.Millisecond, 0},
		{"verify", saves, "2 saves", nil, func() error { return l.agent("verify") }, 1, 10 * time.Millisecond, 2.4},
		{"status", saves, "2 saves", nil, func() error { return l.agent("status") }, 1, 10 * time.Millisecond, 2.4},
	})
}

// netlink measures the nftables backend, which runs no program, against nft.
func (l *lab) netlink(runs int) error {
	if err := l.unprotect(); err != nil {
		return err
	}
	// As on a machine that never had iptables: its tables would be read.
	for _, family := range []string{"ip", "ip6"} {
		if err := l.run("nft", "delete", "table", family, "filter"); err != nil {
			return err
		}
	}
	if err := l.bootstrap("--backend", "nftables"); err != nil {
		return err
	}
	table := filepath.Join(l.root, "etc/nftables/basicfw.nft")
	if err := copyFile(table, filepath.Join(l.dir, "nft")); err != nil {
		return err
	}
	load, list := l.program("nft", "-f", filepath.Join(l.dir, "nft")), l.program("nft", "list", "table", "inet", "basicfw")
	apply := func() error { return l.agent("apply", "--no-rehearsal") }
	many := "many = 7/udp from " + networks(10000) + "\n"
	none := func() (cost, error) { return cost{}, nil }
	return print("nftables", runs, []row{
		{"apply, one service more", load, "nft -f", l.from("", extra), apply, 0.5, 0, 0},
		{"apply, one service less", load, "nft -f", l.from(extra, ""), apply, 0.5, 0, 0},
		{"the same, rehearsed", load, "nft -f", l.flip(), func() error { return l.agent("apply") }, 1, 20 * time.Millisecond, 0},
		{"verify", list, "nft list", nil, func() error { return l.agent("verify") }, 1, 5 * time.Millisecond, 0},
		{"status", list, "nft list", nil, func() error { return l.agent("status") }, 1, 5 * time.Millisecond, 0},
		{"apply, 10000 networks in one from", none, "nothing", l.from("", many), apply, 0, time.Second, 0},
	})
}

// networks returns n networks, the last of which is the client's.
func networks(n int) string {
	var list []string
	for i := range n - 1 {
		list = append(list, fmt.Sprintf("100.%d.%d.%d/32", 64+i>>14, i>>6&255, i<<2&255))
	}
	return strings.Join(append(list, "192.0.2.2/32"), ", ")
}

// packets measures the cost of a packet that is looked up in a list of networks: a flood
// over a veth pair, whose sender also does the receiver's work.
func (l *lab) packets() error {
	for _, args := range [][]string{
		{"link", "add", "wire0", "type", "veth", "peer", "name", "wire1"}, {"addr", "add", "192.0.2.1/24", "dev", "wire0"}, {"link", "set", "wire0", "up"},
	} {
		if err := l.run("ip", args...); err != nil {
			return err
		}
	}
	out := fmt.Sprintf("basicfw-bench-%d", os.Getpid())
	if err := l.run("ip", "netns", "add", out); err != nil {
		return err
	}
	defer l.run("ip", "netns", "del", out)
	for _, args := range [][]string{
		{"link", "set", "wire1", "netns", out}, {"-n", out, "addr", "add", "192.0.2.2/24", "dev", "wire1"}, {"-n", out, "link", "set", "wire1", "up"},
	} {
		if err := l.run("ip", args...); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cost := map[int][]float64{}
	for range 7 {
		for _, n := range []int{1, 10000} {
			if err := l.settings("many = 7/udp from " + networks(n) + "\n"); err != nil {
				return err
			}
			if err := l.agent("apply", "--no-rehearsal"); err != nil {
				return err
			}
			res, err := l.sys.Run(context.Background(), system.Command{Name: "ip", Args: []string{"netns", "exec", out, self, "-flood"}})
			if err != nil {
				return err
			}
			ns, err := strconv.ParseFloat(strings.TrimSpace(string(res.Stdout)), 64)
			if err != nil {
				return err
			}
			cost[n] = append(cost[n], ns)
		}
	}
	for _, list := range cost {
		slices.Sort(list)
	}
	one, many := cost[1][3], cost[10000][3]
	verdict := "within"
	if many > 1.1*one {
		verdict = "OVER"
	}
	fmt.Printf("%-34s %10.0f %10.0f %10.0f  ns, %s (1.1 x the same of 1 network)\n", "a packet of one of 10000 networks", one, many, 1.1*one, verdict)
	return nil
}

// flood sends packets of one connection that is never answered, and so stays new, and
// prints the nanoseconds that one takes.
func flood() error {
	c, err := net.Dial("udp", "192.0.2.1:7")
	if err != nil {
		return err
	}
	defer c.Close()
	const packets = 200000
	send := func() {
		for range packets {
			c.Write([]byte("x")) // errors report that the port is closed
		}
	}
	send()
	took, _ := timed(func() error { send(); return nil })
	fmt.Println(float64(took.Nanoseconds()) / packets)
	return nil
}

func copyFile(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o600)
}

func timed(f func() error) (time.Duration, error) {
	start := time.Now()
	err := f()
	return time.Since(start), err
}

// median returns the median of one figure.
func median(costs []cost, figure func(cost) float64) float64 {
	var list []float64
	for _, c := range costs {
		list = append(list, figure(c))
	}
	slices.Sort(list)
	return list[len(list)/2]
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func size(binary string) error {
	data, err := os.ReadFile(binary)
	if err != nil {
		return err
	}
	static := "static"
	if bytes.Contains(data, []byte("/lib64/ld-linux-x86-64.so.2")) {
		static = "NOT static"
	}
	fmt.Printf("%-34s %10s %10.1f %10.1f  MB, %s\n", "binary", "", float64(len(data))/1e6, 9.2, static)
	return nil
}

// idle runs the service for d and prints its memory and the voluntary context switches of
// its threads. A thread that wakes up and sleeps again counts as one.
func (l *lab) idle(d time.Duration) error {
	proc, err := os.StartProcess(l.binary, []string{l.binary, "--root", l.root, "run"},
		&os.ProcAttr{Files: []*os.File{nil, nil, os.Stderr}})
	if err != nil {
		return err
	}
	defer proc.Wait()
	defer proc.Signal(syscall.SIGTERM)
	time.Sleep(10 * time.Second) // the start is not idle
	before, _, err := usage(proc.Pid)
	if err != nil {
		return err
	}
	time.Sleep(d)
	after, rss, err := usage(proc.Pid)
	if err != nil {
		return err
	}
	fmt.Printf("%-34s %10s %10.1f %10.1f  MB resident\n", "service after "+d.String(), "", rss, 15.0)
	fmt.Printf("%-34s %10s %10.1f %10s  switches a minute, over all threads\n", "", "", float64(after-before)/d.Minutes(), "")
	return nil
}

// usage returns a process's voluntary context switches and resident megabytes.
func usage(pid int) (switches int, rss float64, err error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for _, t := range tasks {
		data, err := os.ReadFile(t)
		if err != nil {
			continue // a thread that ended
		}
		for _, line := range strings.Split(string(data), "\n") {
			key, value, _ := strings.Cut(line, ":")
			n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
			switch key {
			case "voluntary_ctxt_switches":
				switches += n
			case "VmRSS":
				rss = float64(n) * 1024 / 1e6
			}
		}
	}
	return switches, rss, nil
}
