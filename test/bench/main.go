// Command bench times the program as whole processes in a network namespace of
// its own, each figure beside the floor that it is measured against, in turns,
// so that a machine whose speed drifts is fair to both. It prints medians.
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/basicfw/basicfw-agent/agent/system"
)

func main() {
	runs := flag.Int("n", 21, "runs of each command")
	idle := flag.Duration("idle", 0, "also let the service idle for this long, and tell its memory and how often it woke")
	flag.Parse()
	if flag.NArg() != 1 {
		fmt.Fprintln(os.Stderr, "usage: bench [-n RUNS] [-idle 10m] BINARY")
		os.Exit(2)
	}
	if err := run(flag.Arg(0), *runs, *idle); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// lab is a namespace, and a root directory for the program's files.
type lab struct {
	sys           *system.System
	ns, dir, root string
	binary        string
}

func (l *lab) in(stdin []byte, name string, args ...string) ([]byte, error) {
	res, err := l.sys.Run(context.Background(), system.Command{Name: "ip",
		Args: append([]string{"netns", "exec", l.ns, name}, args...), Stdin: stdin})
	return res.Stdout, err
}

func (l *lab) agent(args ...string) error {
	_, err := l.in(nil, l.binary, append([]string{"--root", l.root}, args...)...)
	return err
}

// open makes the machine one that was never bootstrapped.
func (l *lab) open() error {
	for _, t := range []string{"iptables", "ip6tables"} {
		for _, args := range [][]string{{"-P", "INPUT", "ACCEPT"}, {"-F"}, {"-X"}} {
			if _, err := l.in(nil, t, args...); err != nil {
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
	l := &lab{sys: &system.System{}, ns: fmt.Sprintf("basicfw-bench-%d", os.Getpid()), dir: dir, root: filepath.Join(dir, "root"), binary: binary}
	if _, err := l.sys.Run(context.Background(), system.Command{Name: "ip", Args: []string{"netns", "add", l.ns}}); err != nil {
		return err
	}
	defer l.sys.Run(context.Background(), system.Command{Name: "ip", Args: []string{"netns", "del", l.ns}})

	bootstrap := func() error {
		return l.agent("bootstrap", "--profile", "web+mail", "--client-ip", "203.0.113.9", "--no-service")
	}
	if err := l.open(); err != nil {
		return err
	}
	if err := bootstrap(); err != nil {
		return err
	}
	for _, name := range []string{"iptables", "ip6tables"} {
		data, err := os.ReadFile(filepath.Join(l.root, "etc/sysconfig", name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	// The floors are one process after another, in one entry into the
	// namespace, as ours is one.
	script := func(text string) func() (time.Duration, error) {
		return func() (time.Duration, error) {
			return timed(func() error { _, err := l.in(nil, "sh", "-ec", "cd "+dir+"; "+text); return err })
		}
	}
	saves := script("iptables-save >out; ip6tables-save >out")
	floor := script("iptables-restore <iptables; ip6tables-restore <ip6tables; iptables-save >out; ip6tables-save >out")
	ini := filepath.Join(l.root, "etc/basicfw/agent.ini")
	flip := 0
	rows := []struct {
		name    string
		floor   func() (time.Duration, error)
		of      string
		prepare func() error
		subject func() error
		factor  float64
	}{
		{"bootstrap", floor, "2 restores, 2 saves", l.open, bootstrap, 2},
		{"apply, one service more or less", floor, "2 restores, 2 saves", func() error {
			flip++
			text := "[open]\n"
			if flip%2 == 0 {
				text += "extra = 8080/tcp\n"
			}
			return os.WriteFile(ini, []byte(text), 0o600)
		}, func() error { return l.agent("apply") }, 2},
		{"apply, nothing changed", saves, "2 saves", nil, func() error { return l.agent("apply") }, 1},
		{"verify", saves, "2 saves", nil, func() error { return l.agent("verify") }, 1},
		{"status", saves, "2 saves", nil, func() error { return l.agent("status") }, 1},
	}
	fmt.Printf("%-34s %10s %10s %10s  %s\n", "median of "+strconv.Itoa(runs), "floor ms", "ours ms", "limit ms", "")
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
		limit := time.Duration(r.factor*float64(f)) + 10*time.Millisecond
		verdict := "within"
		if o > limit {
			verdict = "OVER"
		}
		fmt.Printf("%-34s %10.1f %10.1f %10.1f  %s (%g x %s + 10 ms)\n", r.name, ms(f), ms(o), ms(limit), verdict, r.factor, r.of)
	}
	if err := size(binary); err != nil {
		return err
	}
	if idle > 0 {
		return l.idle(idle)
	}
	return nil
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
	proc, err := os.StartProcess("/usr/bin/env", []string{"env", "ip", "netns", "exec", l.ns, l.binary, "--root", l.root, "run"},
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
