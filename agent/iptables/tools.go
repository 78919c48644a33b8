package iptables

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// lockFile is where the legacy programs lock (iptables/xshared.h, XT_LOCK_NAME).
const lockFile = "/run/xtables.lock"

// tools is what is to be known about the programs.
type tools struct {
	version [3]int
	text    string
	nft     bool
}

func (t tools) String() string {
	if t.nft {
		return "iptables " + t.text + " (nf_tables)"
	}
	return "iptables " + t.text + " (legacy)"
}

func (t tools) atLeast(major, minor, patch int) bool {
	return slices.Compare(t.version[:], []int{major, minor, patch}) >= 0
}

var versionLine = regexp.MustCompile(`v(\d+(?:\.\d+)*)(?: \((nf_tables|legacy)\))?`)

// tools tells the version and the variant from the headers of what was read,
// or from the program itself: where a kernel without any table gave no header,
// and for 1.8.0 to 1.8.7, whose headers do not say which variant it is.
func (b *Backend) tools(ctx context.Context, snap snapshot) (tools, error) {
	for _, f := range b.families {
		if d := snap[f]; d.version != "" {
			t := newTools(d.version, d.nft)
			if t.nft || !t.atLeast(1, 8, 0) || t.atLeast(1, 8, 8) {
				return t, nil
			}
		}
	}
	res, err := b.run(ctx, system.Command{Name: "iptables", Args: []string{"--version"}})
	if err != nil {
		return tools{}, fmt.Errorf("asking for its version: %w", err)
	}
	m := versionLine.FindSubmatch(res.Stdout)
	if m == nil {
		return tools{}, fmt.Errorf("iptables --version prints no version, but %.80q", res.Stdout)
	}
	return newTools(string(m[1]), string(m[2]) == "nf_tables"), nil
}

func newTools(version string, nft bool) tools {
	t := tools{text: version, nft: nft}
	for i, part := range strings.SplitN(version, ".", 3) {
		t.version[i], _ = strconv.Atoi(part)
	}
	return t
}

// restore loads a file into one family, as one transaction. An error names
// the line that the kernel or the program refused.
//
// The lock: the nft variant has none and needs none. Legacy programs take one
// since 1.4.20; iptables-restore itself does since 1.6.2, and in the packages
// of EL7 that brought that back to 1.4.21. Where it does not, two restores at a
// time lose one of the two (clearlinux/distribution#1058), so we take the lock
// for it.
func (b *Backend) restore(ctx context.Context, t tools, f firewall.Family, lines []string) error {
	name := program(f, "-restore")
	args := []string{"--noflush"}
	if !t.nft && t.atLeast(1, 4, 20) {
		waits := t.atLeast(1, 6, 2)
		if !waits {
			var err error
			if waits, err = b.restoreWaits(ctx, name); err != nil {
				return err
			}
		}
		if waits {
			args = append(args, fmt.Sprintf("--wait=%d", int(b.lockWait.Seconds())))
		} else {
			unlock, err := b.lock(ctx)
			if err != nil {
				return err
			}
			defer unlock()
		}
	}
	return b.explain(ctx, name, args, lines, b.try(ctx, name, args, lines))
}

// commitTries is how often a table is handed to the kernel before its refusal
// counts.
const commitTries = 10

// try runs a restore. The legacy kernel refuses a table whose number of rules
// is not what the program read (EAGAIN; linux/net/netfilter/x_tables.c,
// xt_replace_table), of which the program says no more than that COMMIT failed.
// Programs that take no lock, or another one, make that happen; so it is tried
// again.
func (b *Backend) try(ctx context.Context, name string, args, lines []string) error {
	for n := 1; ; n++ {
		_, err := b.run(ctx, system.Command{Name: name, Args: args,
			Stdin: []byte(strings.Join(lines, "\n") + "\n"), Timeout: b.lockWait + 20*time.Second})
		if n == commitTries || refusedLine(lines, err) != commit {
			return err
		}
	}
}

// lock takes the lock for a program that does not. As they were released, 1.4.20
// and 1.4.21 lock an abstract socket instead of the file; we do not, because
// every user of the machine can hold that one, and so keep our rules out.
func (b *Backend) lock(ctx context.Context) (unlock func(), err error) {
	wait, cancel := context.WithTimeout(ctx, b.lockWait)
	defer cancel()
	unlock, err = b.sys.Lock(wait, lockFile, "")
	if err != nil && wait.Err() != nil && ctx.Err() == nil {
		return nil, &lockError{b.lockWait, err}
	}
	return unlock, err
}

// lockError says that the lock could not be had.
type lockError struct {
	wait time.Duration
	err  error
}

func (e *lockError) Error() string {
	return fmt.Sprintf("another program held the xtables lock (%s) for more than %v: %v", lockFile, e.wait, e.err)
}

// Temporary tells that it may be had later.
func (e *lockError) Temporary() bool { return true }

func (e *lockError) Unwrap() error { return e.err }

// restoreWaits asks an iptables-restore of before 1.6.2 whether it knows
// --wait all the same. One that does not complains, and goes on.
func (b *Backend) restoreWaits(ctx context.Context, name string) (bool, error) {
	res, err := b.run(ctx, system.Command{Name: name, Args: []string{"--wait=1", "--noflush", "--test"}})
	if err != nil {
		return false, err
	}
	return !bytes.Contains(res.Stderr, []byte("option")), nil
}

// failedLine finds the line in a complaint: "line 5 failed", or since 1.8
// "line 5: RULE_APPEND failed" and "Error occurred at line: 5".
var failedLine = regexp.MustCompile(`line:? (\d+)`)

// busyChain finds the chain that the nft variant cannot delete; up to 1.8.7 it
// blames another line for that.
var busyChain = regexp.MustCompile(`CHAIN_(?:USER_)?DEL failed \(Device or resource busy\): chain (\S+)`)

// refusedLine gives the line that a failed restore complains of, or "".
func refusedLine(lines []string, err error) string {
	var exit *system.ExitError
	if !errors.As(err, &exit) {
		return ""
	}
	m := failedLine.FindStringSubmatch(exit.Stderr)
	if m == nil {
		return ""
	}
	n, err := strconv.Atoi(m[1])
	if err != nil || n < 1 || n > len(lines) {
		return ""
	}
	return lines[n-1]
}

// explain adds to a failed restore which rule it was.
func (b *Backend) explain(ctx context.Context, name string, args, lines []string, err error) error {
	var exit *system.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if strings.Contains(exit.Stderr, "xtables lock") {
		return &lockError{b.lockWait, err}
	}
	bad := refusedLine(lines, err)
	if m := busyChain.FindStringSubmatch(exit.Stderr); m != nil {
		bad = "-X " + m[1]
	}
	if chain, ok := strings.CutPrefix(bad, "-X "); ok {
		err = fmt.Errorf("a rule of another chain jumps to %s: delete that rule (\"%s | grep -w %s\" shows it) and run this again: %w",
			chain, strings.Replace(name, "-restore", "-save", 1), chain, err)
	}
	if bad == commit {
		// The legacy kernel refuses the table as a whole, and nft up to 1.8.7
		// blames the end for what the kernel refused. Each rule by itself,
		// in a chain that nothing jumps to, tells which one it means.
		bad = b.suspect(ctx, name, args, lines)
	}
	if bad == "" || bad == commit {
		return err
	}
	return &lineError{bad, err}
}

// lineError says which line of a file was refused.
type lineError struct {
	line string
	err  error
}

func (e *lineError) Error() string { return fmt.Sprintf("%q: %v", e.line, e.err) }

func (e *lineError) Unwrap() error { return e.err }

// suspect finds the first rule that the kernel refuses by itself. It tries each
// in a chain that nothing jumps to, and removes that chain again.
func (b *Backend) suspect(ctx context.Context, name string, args, lines []string) string {
	const probe = firewall.ChainPrefix + "PROBE"
	// An empty chain to begin with: a rule that was taken before goes with it.
	with := func(line string) error {
		return b.try(ctx, name, args, []string{"*" + filter, ":" + probe + " - [0:0]", line, commit})
	}
	for _, l := range lines {
		words := strings.SplitN(l, " ", 3)
		if words[0] != "-A" || len(words) < 3 || isOurs(target(words[2])) {
			continue
		}
		if err := with("-A " + probe + " " + words[2]); err != nil {
			with("-X " + probe)
			return l
		}
	}
	with("-X " + probe)
	return ""
}
