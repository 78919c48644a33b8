// Command bench times the program as whole processes in a network namespace of
// its own, each figure beside the floor that it is measured against, in turns,
// so that a machine whose speed drifts is fair to both. It prints medians.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"net"
	"os"
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
	idle := flag.Duration("idle", 0, "also let the service idle for this long, and tell its memory and how often it woke")
	flooding := flag.Bool("flood", false, "send packets, and tell what one costs (for this program itself)")
	inside := flag.Bool("inside", false, "measure in the network namespace that this runs in (for this program itself)")
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

// begin starts this program anew in a network namespace of its own, which what it
// measures then need not be led into. It returns only where that fails.
func begin() error {
	runtime.LockOSThread() // the namespace is a thread's, until exec
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	return os.NewSyscallError("exec", unix.Exec("/proc/self/exe", append([]string{os.Args[0], "-inside"}, os.Args[1:]...), os.Environ()))
}

// lab is a root directory for the program's files, in this network namespace.
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

// open makes the machine one that was never bootstrapped.
func (l *lab) open() error {
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

// row is one figure: ours, beside what it is measured against.
type row struct {
	name    string
	floor   func() (time.Duration, error)
	of      string
	prepare func() error
	subject func() error
	factor  float64
	plus    time.Duration
}

// print times rows, each in turns with its floor.
func print(title string, runs int, rows []row) error {
	fmt.Printf("%-34s %10s %10s %10s  %s\n", title, "floor ms", "ours ms", "limit ms", "medians of "+strconv.Itoa(runs))
	for _, r := range rows {
		var floors, ours []time.Duration
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
			o, err := timed(r.subject)
			if err != nil {
				return fmt.Errorf("%s: %w", r.name, err)
			}
			if i > 0 { // the first warms up
				floors, ours = append(floors, f), append(ours, o)
			}
		}
		f, o := median(floors), median(ours)
		limit := time.Duration(r.factor*float64(f)) + r.plus
		verdict := "within"
		if o > limit {
			verdict = "OVER"
		}
		fmt.Printf("%-34s %10.1f %10.1f %10.1f  %s (%g x %s + %g ms)\n", r.name, ms(f), ms(o), ms(limit), verdict, r.factor, r.of, ms(r.plus))
	}
	return nil
}

// program times one.
func (l *lab) program(name string, args ...string) func() (time.Duration, error) {
	return func() (time.Duration, error) {
		return timed(func() error { return l.run(name, args...) })
	}
}

// script times programs one after another.
func (l *lab) script(text string) func() (time.Duration, error) {
	return l.program("sh", "-ec", "cd "+l.dir+"; "+text)
}

const extra = "extra = 8080/tcp\n"

// settings writes settings with some services besides the profile's.
func (l *lab) settings(services string) error {
	return os.WriteFile(filepath.Join(l.root, "etc/basicfw/agent.ini"), []byte("[open]\n"+services), 0o600)
}

// flip adds a service to the settings, and takes it away the next time.
func (l *lab) flip() func() error {
	there := true
	return func() error {
		if there = !there; there {
			return l.settings(extra)
		}
		return l.settings("")
	}
}

// from has some services applied, and others in the settings.
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

// iptables times the backend of that name beside its own programs.
func (l *lab) iptables(runs int) error {
	if err := l.open(); err != nil {
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
	return print("iptables", runs, []row{
		{"bootstrap", floor, restores, l.open, func() error { return l.bootstrap("--no-rehearsal") }, 2, 10 * time.Millisecond},
		{"apply, one service more or less", floor, restores, l.flip(), func() error { return l.agent("apply", "--no-rehearsal") }, 2, 10 * time.Millisecond},
		{"the same, rehearsed", floor, restores, l.flip(), func() error { return l.agent("apply") }, 3, 20 * time.Millisecond},
		{"apply, nothing changed", saves, "2 saves", nil, func() error { return l.agent("apply") }, 1, 10 * time.Millisecond},
		{"verify", saves, "2 saves", nil, func() error { return l.agent("verify") }, 1, 10 * time.Millisecond},
		{"status", saves, "2 saves", nil, func() error { return l.agent("status") }, 1, 10 * time.Millisecond},
	})
}

// netlink times the backend that needs no program beside nft.
func (l *lab) netlink(runs int) error {
	if err := l.open(); err != nil {
		return err
	}
	// As on a machine where iptables never was: its tables would be looked at.
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
	none := func() (time.Duration, error) { return 0, nil }
	return print("nftables", runs, []row{
		{"apply, one service more", load, "nft -f", l.from("", extra), apply, 0.5, 0},
		{"apply, one service less", load, "nft -f", l.from(extra, ""), apply, 0.5, 0},
		{"the same, rehearsed", load, "nft -f", l.flip(), func() error { return l.agent("apply") }, 1, 20 * time.Millisecond},
		{"verify", list, "nft list", nil, func() error { return l.agent("verify") }, 1, 5 * time.Millisecond},
		{"status", list, "nft list", nil, func() error { return l.agent("status") }, 1, 5 * time.Millisecond},
		{"apply, 10000 networks in one from", none, "nothing", l.from("", many), apply, 0, time.Second},
	})
}

// networks are some, the last of which is the client's.
func networks(n int) string {
	var list []string
	for i := range n - 1 {
		list = append(list, fmt.Sprintf("100.%d.%d.%d/32", 64+i>>14, i>>6&255, i<<2&255))
	}
	return strings.Join(append(list, "192.0.2.2/32"), ", ")
}

// packets times what a packet costs that a list of networks is asked about: a
// flood over a wire, whose sender does the receiver's work too.
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

// flood sends packets of one connection that is never answered, and so stays new,
// and prints how many nanoseconds one takes.
func flood() error {
	c, err := net.Dial("udp", "192.0.2.1:7")
	if err != nil {
		return err
	}
	defer c.Close()
	const packets = 200000
	send := func() {
		for range packets {
			c.Write([]byte("x")) // that nobody listens is told in between
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

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
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
	fmt.Printf("%-34s %10s %10.1f %10.1f  MB, %s\n", "binary", "", float64(len(data))/1e6, 12.0, static)
	return nil
}

// idle runs the service for a while and tells its memory and how often its
// threads were given the processor without asking to give it up: a thread that
// wakes goes to sleep again by itself, which counts as one voluntary switch.
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

// usage gives a process's voluntary context switches and resident megabytes.
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
