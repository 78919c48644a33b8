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
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// lockFile is the lock file of the legacy programs (iptables/xshared.h, XT_LOCK_NAME).
const lockFile = "/run/xtables.lock"

// zone makes versions before 1.4.11 read and print times as UTC. They use the time
// zone of the process and an uninitialised tm_isdst (netfilter commits b1319cc0,
// 8ad33a34). Therefore this zone has UTC as its daylight saving time, too.
const zone = "TZ=UTC0UTC0"

// tools is the version and variant of the programs.
type tools struct {
	number [3]int
	text   string
	nft    bool
}

func (t tools) String() string {
	if t.nft {
		return "iptables " + t.text + " (nf_tables)"
	}
	return "iptables " + t.text + " (legacy)"
}

func (t tools) atLeast(major, minor, patch int) bool {
	return slices.Compare(t.number[:], []int{major, minor, patch}) >= 0
}

// tools returns the version and variant from the headers of a snapshot. It runs the
// program if there is no header, as with a kernel without tables, and for 1.8.0 to
// 1.8.7, whose headers do not name the variant.
func (b *Backend) tools(ctx context.Context, snap snapshot) (t tools, err error) {
	defer func() { b.known = t }()
	for _, f := range b.families {
		if d := snap[f]; d.version != "" {
			t = newTools(d.version, d.nft)
			if t.nft || !t.atLeast(1, 8, 0) || t.atLeast(1, 8, 8) {
				return t, nil
			}
		}
	}
	if b.held && b.known.text != "" {
		return b.known, nil
	}
	res, err := b.run(ctx, system.Command{Name: "iptables", Args: []string{"--version"}})
	if err != nil {
		return tools{}, fmt.Errorf("reading the version of iptables: %w", err)
	}
	if t = parseTools(string(res.Stdout)); t.text == "" {
		return t, fmt.Errorf("iptables --version printed no version, but %.80q", res.Stdout)
	}
	return t, nil
}

// parseTools parses the output of "iptables --version"; text is "" without a version.
func parseTools(line string) tools { return newTools(version(line)) }

// version is the reverse of parseTools.
func (t tools) version() string {
	switch {
	case t.text == "":
		return ""
	case t.nft:
		return "v" + t.text + " (nf_tables)"
	}
	return "v" + t.text
}

func newTools(version string, nft bool) tools {
	t := tools{text: version, nft: nft}
	for i, part := range strings.SplitN(version, ".", 3) {
		t.number[i], _ = strconv.Atoi(part)
	}
	return t
}

// restore loads a file into one family, as one transaction. An error names the line
// that the kernel or the program refused.
//
// The nft variant needs no lock. Legacy programs take one since 1.4.20, but
// iptables-restore only since 1.6.2, and in EL7's packages, which backported that to
// 1.4.21. Otherwise one of two simultaneous restores is lost
// (clearlinux/distribution#1058), so we take the lock for it.
func (b *Backend) restore(ctx context.Context, t tools, f firewall.Family, lines []string) error {
	b.last = nil
	name := program(f, "-restore")
	if !t.atLeast(1, 4, 11) {
		lines = inUTC(lines)
	}
	args := []string{"--noflush"}
	if !t.nft && t.atLeast(1, 4, 20) {
		waits, err := b.restoreWaits(ctx, t, name)
		if err != nil {
			return err
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

// inUTC makes the kernel compare the times of our rules with UTC, which is what
// versions from 1.4.11 on do. Before, the default was the kernel's time zone.
func inUTC(lines []string) []string {
	out := slices.Clone(lines)
	for i, line := range out {
		if before, after, ok := strings.Cut(line, " --datestop "); ok && strings.HasPrefix(line, "-A "+firewall.ChainPrefix) {
			end, rest, _ := strings.Cut(after, " ")
			rest, other := strings.CutPrefix(rest, "--kerneltz ") // as parse reads it
			out[i] = before + " --datestop " + end + map[bool]string{true: " ", false: " --utc "}[other] + rest
		}
	}
	return out
}

// commitTries is how often loading a table is tried.
const commitTries = 10

// try runs a restore. The legacy kernel refuses a table if the number of rules has
// changed since the program read it (EAGAIN; linux/net/netfilter/x_tables.c,
// xt_replace_table). The program then only reports that COMMIT failed. Programs that
// take no lock, or another one, cause this, so it is retried.
func (b *Backend) try(ctx context.Context, name string, args, lines []string) error {
	for n := 1; ; n++ {
		_, err := b.run(ctx, system.Command{Name: name, Args: args,
			Stdin: []byte(strings.Join(lines, "\n") + "\n"), Timeout: b.lockWait + 20*time.Second})
		if n == commitTries || refusedLine(lines, err) != commit {
			return err
		}
	}
}

// lock takes the lock for a program that does not take it. Unpatched 1.4.20 and
// 1.4.21 lock an abstract socket instead of the file. We do not lock that socket: any
// user can hold it, and so block our rules.
func (b *Backend) lock(ctx context.Context) (unlock func(), err error) {
	wait, cancel := context.WithTimeout(ctx, b.lockWait)
	defer cancel()
	unlock, err = b.sys.Lock(wait, lockFile, "")
	if err != nil && wait.Err() != nil && ctx.Err() == nil {
		return nil, &lockError{b.lockWait, err}
	}
	return unlock, err
}

type lockError struct {
	wait time.Duration
	err  error
}

func (e *lockError) Error() string {
	return fmt.Sprintf("another program held the xtables lock (%s) for more than %s: %v", lockFile, firewall.FormatDuration(e.wait), e.err)
}

// Temporary reports that a retry may succeed.
func (e *lockError) Temporary() bool { return true }

func (e *lockError) Unwrap() error { return e.err }

// restoreWaits reports whether iptables-restore supports --wait. A version before
// 1.6.2 is run to find out: without support it prints an error and continues.
func (b *Backend) restoreWaits(ctx context.Context, t tools, name string) (bool, error) {
	if t.atLeast(1, 6, 2) {
		return true, nil
	}
	res, err := b.run(ctx, system.Command{Name: name, Args: []string{"--wait=1", "--noflush", "--test"}})
	if err != nil {
		return false, err
	}
	return !bytes.Contains(res.Stderr, []byte("option")), nil
}

// failedLine matches the line number in an error: "line 5 failed", or since 1.8
// "line 5: RULE_APPEND failed" and "Error occurred at line: 5".
const failedLine = `line:? (\d+)`

// busyChain matches the chain that the nft variant cannot delete; up to 1.8.7 the
// error names another line.
const busyChain = `CHAIN_(?:USER_)?DEL failed \(Device or resource busy\): chain (\S+)`

// refusedLine returns the line that the error of a failed restore names, or "".
func refusedLine(lines []string, err error) string {
	var exit *system.ExitError
	if !errors.As(err, &exit) {
		return ""
	}
	if m := regexp.MustCompile(failedLine).FindStringSubmatch(exit.Stderr); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil && 1 <= n && n <= len(lines) {
			return lines[n-1]
		}
	}
	return ""
}

// explain adds the refused rule to the error of a failed restore.
func (b *Backend) explain(ctx context.Context, name string, args, lines []string, err error) error {
	var exit *system.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if strings.Contains(exit.Stderr, "xtables lock") {
		return &lockError{b.lockWait, err}
	}
	bad := refusedLine(lines, err)
	if m := regexp.MustCompile(busyChain).FindStringSubmatch(exit.Stderr); m != nil {
		bad = "-X " + m[1]
	}
	if chain, ok := strings.CutPrefix(bad, "-X "); ok {
		err = hint.Wrap(fmt.Errorf("a rule of another chain jumps to %s: %w", chain, err), "delete that rule (\"%s | grep -w %s\" shows it), then repeat the command",
			strings.Replace(name, "-restore", "-save", 1), chain)
	}
	if bad == commit {
		// The legacy kernel refuses the table as a whole, and nft up to 1.8.7 names
		// the last line. Loading each rule alone, in an unused chain, finds the
		// refused one.
		bad = b.suspect(ctx, name, args, lines)
	}
	if bad == "" || bad == commit {
		return err
	}
	return fmt.Errorf("%q: %w", bad, err)
}

// suspect returns the first rule that the kernel refuses on its own. It tries each in
// an unused chain, and then removes that chain.
func (b *Backend) suspect(ctx context.Context, name string, args, lines []string) string {
	const probe = firewall.ChainPrefix + "PROBE"
	// Declaring the chain empties it of a rule that was accepted before.
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
