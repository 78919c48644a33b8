package iptables

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// lockFile is where the legacy programs lock (iptables/xshared.h, XT_LOCK_NAME).
const lockFile = "/run/xtables.lock"

// Backend loads rulesets with the iptables programs.
type Backend struct {
	sys      *system.System
	families []firewall.Family
	// lockWait bounds how long a load waits for another program to let go of
	// the xtables lock, in whole seconds.
	lockWait time.Duration
}

// New gives a backend for the families that the kernel has.
func New(sys *system.System, families []firewall.Family) *Backend {
	return &Backend{sys: sys, families: families, lockWait: 10 * time.Second}
}

// MissingError says that an iptables program is not on this machine.
type MissingError struct{ err *system.NotFoundError }

func (e *MissingError) Error() string {
	return fmt.Sprintf("%v: install iptables (\"dnf install iptables\", or \"apt-get install iptables\") and run this again", e.err)
}

func (e *MissingError) Unwrap() error { return e.err }

// snapshot is both families' rules as they were read at one time.
type snapshot map[firewall.Family]dump

// program gives the name of a family's program: iptables-save, ip6tables-restore.
func program(f firewall.Family, suffix string) string {
	if f == firewall.IPv4 {
		return "iptables" + suffix
	}
	return "ip6tables" + suffix
}

func (b *Backend) run(ctx context.Context, c system.Command) (system.Result, error) {
	res, err := b.sys.Run(ctx, c)
	var missing *system.NotFoundError
	if errors.As(err, &missing) {
		return res, &MissingError{missing}
	}
	return res, err
}

// read takes both families' rules, at the same time.
func (b *Backend) read(ctx context.Context) (snapshot, error) {
	dumps := make([]dump, len(b.families))
	errs := make([]error, len(b.families))
	var wg sync.WaitGroup
	for i, f := range b.families {
		wg.Add(1)
		go func() {
			defer wg.Done()
			name := program(f, "-save")
			res, err := b.run(ctx, system.Command{Name: name})
			if err == nil {
				dumps[i], err = parse(res.Stdout)
			}
			if err != nil {
				errs[i] = fmt.Errorf("reading the %v rules with %s: %w", f, name, err)
			}
		}()
	}
	wg.Wait()
	snap := snapshot{}
	for i, f := range b.families {
		var missing *MissingError
		if errors.As(errs[i], &missing) {
			return nil, missing // one is enough said
		}
		snap[f] = dumps[i]
	}
	return snap, errors.Join(errs...)
}

// Inspect reads the kernel's rules and compares them with want.
func (b *Backend) Inspect(ctx context.Context, want firewall.Ruleset) (firewall.Inspection, error) {
	snap, err := b.read(ctx)
	if err != nil {
		return firewall.Inspection{}, err
	}
	in := inspect(snap, b.families, texts(want))
	t, err := b.tools(ctx, snap)
	if err != nil {
		return firewall.Inspection{}, err
	}
	in.Backend = t.String()
	if t.nft {
		in.Warnings = b.legacyBeside()
	}
	return in, nil
}

// legacyBeside says where iptables-legacy has rules while we use the nft
// variant: those are two sets of rules, and both decide. The kernel lists the
// legacy tables of this network namespace in /proc/net/ip_tables_names.
func (b *Backend) legacyBeside() []string {
	var out []string
	for _, f := range b.families {
		path := "/proc/net/ip_tables_names"
		if f == firewall.IPv6 {
			path = "/proc/net/ip6_tables_names"
		}
		data, err := b.sys.ReadLimited(path, 4096)
		if tables := strings.Fields(string(data)); err == nil && slices.Contains(tables, filter) {
			out = append(out, fmt.Sprintf("iptables-legacy has %v rules too, and both decide: see %s", f, program(f, "-legacy-save")))
		}
	}
	return out
}

// inspect is Inspect without the reading.
func inspect(snap snapshot, families []firewall.Family, want map[firewall.Family][]chain) firewall.Inspection {
	in := firewall.Inspection{Snapshot: snap}
	for _, f := range families {
		d := snap[f]
		t := d.table(filter)
		in.Present = in.Present || len(t.ours()) > 0
		in.Drift = append(in.Drift, drift(f, t, want[f])...)
		in.Bypass = append(in.Bypass, bypass(f, d.table("nat"))...)
		before := in.Before.Family(f)
		before.Input, before.Output = t.policy(input), t.policy(output)
		behind, jumps := false, false
		var stay []string
		for _, r := range t.chain(input).Rules {
			behind = behind || r == jump
			jumps = jumps || r == jump
			if !decides(r) {
				if !jumpsToUs(r) {
					stay = append(stay, r)
				}
				continue
			}
			before.Removed, before.Places = append(before.Removed, r), append(before.Places, len(stay))
			in.Foreign = append(in.Foreign, foreign(f, r, behind))
			if admits(r) == everything {
				in.Open = append(in.Open, firewall.Finding{Family: f, Next: program(f, "") + " -D INPUT " + r,
					Why: fmt.Sprintf("%q in INPUT accepts new connections to every port", r)})
			}
		}
		before.Stayed = checksum(stay)
		for _, c := range t.ours() {
			wanted := chainOf(want[f], c.Name).Rules
			for _, r := range c.Rules {
				if admits(r) == everything && !slices.Contains(wanted, r) {
					in.Open = append(in.Open, firewall.Finding{Family: f, Why: fmt.Sprintf("%q in %s accepts new connections to every port", r, c.Name)})
				}
			}
		}
		switch {
		case before.Input == firewall.Accept:
			in.Open = append(in.Open, firewall.Finding{Family: f, Why: "INPUT's policy is ACCEPT: every port that listens is open"})
		case !jumps || len(t.chain(firewall.InputChain).Rules) == 0:
			in.Shut = append(in.Shut, firewall.Finding{Family: f, Why: "our rules are gone and INPUT drops all: no port answers, SSH neither"})
		}
		for _, m := range managers(t) {
			if !slices.Contains(in.Managers, m) {
				in.Managers = append(in.Managers, m)
			}
		}
	}
	return in
}

// chainOf gives the chain of a name, or an empty one.
func chainOf(list []chain, name string) chain {
	for _, c := range list {
		if c.Name == name {
			return c
		}
	}
	return chain{}
}

// drift compares one family's filter table with the chains that are wanted.
func drift(f firewall.Family, t table, want []chain) []firewall.Drift {
	var out []firewall.Drift
	family := f.String()
	add := func(chain, kind, want, got string) {
		out = append(out, firewall.Drift{Family: family, Chain: chain, Kind: kind, Want: want, Got: got})
	}
	for _, p := range []struct{ chain, policy string }{{input, firewall.Drop}, {output, firewall.Accept}} {
		if got := t.policy(p.chain); got != p.policy {
			add(p.chain, firewall.Altered, "policy "+p.policy, "policy "+got)
		}
	}
	got := t.chain(input).Rules
	wanted := wantInput(got, false)
	if !slices.Equal(got, wanted) {
		jumps, others := 0, 0
		for _, r := range got {
			switch {
			case r == jump:
				jumps++
			case jumpsToUs(r):
				others++
				add(input, firewall.Extra, "", r)
			}
		}
		switch {
		case jumps == 0:
			add(input, firewall.Missing, jump, "")
		case jumps > 1:
			add(input, firewall.Extra, "", fmt.Sprintf("%s, %d times", jump, jumps))
		case others == 0:
			add(input, firewall.Altered, fmt.Sprintf("%s as rule %d", jump, slices.Index(wanted, jump)+1),
				fmt.Sprintf("%s as rule %d", jump, slices.Index(got, jump)+1))
		}
	}
	for _, c := range want {
		live := t.chain(c.Name)
		if live.Name == "" {
			add(c.Name, firewall.Missing, "the chain", "")
		}
		out = append(out, firewall.Lines(family, c.Name, c.Rules, live.Rules)...)
	}
	for _, c := range t.ours() {
		if !slices.ContainsFunc(want, func(w chain) bool { return w.Name == c.Name }) {
			add(c.Name, firewall.Extra, "", "the chain")
		}
	}
	return out
}

// wantInput is how INPUT should be, given what is in it: others' rules in their
// order, and our jump behind them. A rule that turns everything away would
// leave nothing for a jump behind it, and us shut out; so the jump goes before
// the first such rule. With clear the rules that decide by themselves are left
// out.
func wantInput(got []string, clear bool) []string {
	var want []string
	place := -1
	for _, r := range got {
		if jumpsToUs(r) || clear && decides(r) {
			continue
		}
		if place < 0 && closes(r) {
			place = len(want)
		}
		want = append(want, r)
	}
	if place < 0 {
		place = len(want)
	}
	return slices.Insert(want, place, jump)
}

// closes tells whether a rule turns every packet away.
func closes(rule string) bool {
	if !decides(rule) || target(rule) == "ACCEPT" {
		return false
	}
	words, _ := split(rule)
	return words[0] == "-j" || words[0] == "-m" && len(words) > 4 && words[1] == "comment" && words[4] == "-j"
}

// managers names the other firewall programs whose chains are in a table.
func managers(t table) []string {
	var out []string
	for _, m := range []struct{ name, chain string }{
		{"ufw", "ufw-before-input"}, {"ufw", "ufw6-before-input"},
		{"firewalld", "INPUT_direct"}, {"firewalld", "INPUT_ZONES"},
		{"shorewall", "shorewall"}, {"shorewall", "net-fw"}, {"shorewall", "net2fw"},
	} {
		if t.chain(m.chain).Name != "" && !slices.Contains(out, m.name) {
			out = append(out, m.name)
		}
	}
	return out
}

// bypass lists the ports that the nat table forwards past INPUT.
func bypass(f firewall.Family, nat table) []firewall.Bypass {
	var out []firewall.Bypass
	for _, c := range nat.Chains {
		if c.Name == output {
			continue
		}
		for _, r := range c.Rules {
			if target(r) != "DNAT" { // REDIRECT comes back to INPUT, under its new port
				continue
			}
			out = append(out, firewall.Bypass{Family: f.String(), Proto: cmp.Or(option(r, "-p"), "any"), Port: cmp.Or(option(r, "--dport", "--dports"), "any"),
				To: option(r, "--to-destination"), By: "nat " + c.Name})
		}
	}
	return out
}

// Load makes the kernel's rules be want: one transaction a family, read back
// and compared. Where anything fails, both families are as was says they were.
// With clear, the rules of others in INPUT that decide by themselves are taken
// out.
func (b *Backend) Load(ctx context.Context, want firewall.Ruleset, was firewall.Inspection, clear bool) error {
	if err := want.Check(); err != nil {
		return err
	}
	return b.load(ctx, texts(want), was, clear)
}

// LoadFiles is Load of the rules that persisted files hold. Only our part of
// them is taken; it is an error for a file not to have it.
func (b *Backend) LoadFiles(ctx context.Context, files map[firewall.Family][]byte, was firewall.Inspection) error {
	want := map[firewall.Family][]chain{}
	for _, f := range b.families {
		d, err := parse(files[f])
		if err != nil {
			return fmt.Errorf("the persisted %v rules: %w", f, err)
		}
		want[f] = d.table(filter).ours()
		if len(want[f]) == 0 || want[f][0].Name != firewall.InputChain || len(want[f][0].Rules) == 0 {
			return fmt.Errorf("the persisted %v rules have no chain %s", f, firewall.InputChain)
		}
	}
	return b.load(ctx, want, was, false)
}

// texts are a ruleset's chains as iptables-save prints them.
func texts(r firewall.Ruleset) map[firewall.Family][]chain {
	out := map[firewall.Family][]chain{}
	for _, f := range firewall.Families {
		for _, c := range r.Chains(f) {
			out[f] = append(out[f], chain{Name: c.Name, Policy: "-", Rules: specs(f, c)})
		}
	}
	return out
}

func (b *Backend) load(ctx context.Context, want map[firewall.Family][]chain, was firewall.Inspection, clear bool) error {
	snap := was.Snapshot.(snapshot)
	t, err := b.tools(ctx, snap)
	if err != nil {
		return err
	}
	for i, f := range b.families {
		old := snap[f].table(filter)
		if err := b.change(ctx, t, f, old, func(anew bool) []string { return loadLines(old, want[f], clear, anew) }); err != nil {
			err = fmt.Errorf("loading the %v rules: %w", f, err)
			if i > 0 {
				err = b.back(ctx, was, firewall.Before{}, err)
			}
			return err
		}
	}
	now, err := b.read(ctx)
	if err != nil {
		return b.back(ctx, was, firewall.Before{}, fmt.Errorf("reading back what was loaded: %w", err))
	}
	if in := inspect(now, b.families, want); len(in.Drift) > 0 {
		return b.back(ctx, was, firewall.Before{}, fmt.Errorf("the kernel does not hold what was loaded: %v", in.Drift[0]))
	}
	return nil
}

// back gives the rules back as they were, for the sake of err. Of added, the
// rules that were put into INPUT since go too.
func (b *Backend) back(ctx context.Context, was firewall.Inspection, added firewall.Before, err error) error {
	// The way back must not be cut short by what ended the way there.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if e := b.revert(ctx, was, added); e != nil {
		return fmt.Errorf("%w; and the former rules could not be brought back: %w", err, e)
	}
	return err
}

// change loads lines, which take single rules out of INPUT; where that is
// refused, it loads those that write INPUT anew. Some matches, "recent" among
// them, are not found again by what iptables-save prints of them, and the nft
// variant of 1.8.2 stumbles over what stands behind a deletion. But a rule may
// also be refused because another program took it out since INPUT was read as
// it is in old; then all stays as it is, so that none of its work is undone.
func (b *Backend) change(ctx context.Context, t tools, f firewall.Family, old table, lines func(anew bool) []string) error {
	text := lines(false)
	err := b.restore(ctx, t, f, text)
	var refused *system.ExitError
	var locked *lockError
	deletes := slices.ContainsFunc(text, func(l string) bool { return strings.HasPrefix(l, "-D ") })
	if !errors.As(err, &refused) || errors.As(err, &locked) || !deletes {
		return err
	}
	now, readErr := b.read(ctx)
	if readErr != nil || !slices.Equal(now[f].table(filter).chain(input).Rules, old.chain(input).Rules) {
		return err
	}
	return b.restore(ctx, t, f, lines(true))
}

// loadLines is the file that takes a filter table from what it is to what is
// wanted, for iptables-restore --noflush. With anew, INPUT is emptied and filled
// again, else it is changed rule by rule.
func loadLines(t table, want []chain, clear, anew bool) []string {
	lines := []string{"*" + filter, ":INPUT DROP [0:0]", ":OUTPUT ACCEPT [0:0]"}
	var stale []string
	for _, c := range want {
		lines = append(lines, ":"+c.Name+" - [0:0]")
	}
	for _, c := range t.ours() {
		if !slices.ContainsFunc(want, func(w chain) bool { return w.Name == c.Name }) {
			lines = append(lines, ":"+c.Name+" - [0:0]")
			stale = append(stale, "-X "+c.Name)
		}
	}
	got := t.chain(input).Rules
	if wanted := wantInput(got, clear); !slices.Equal(got, wanted) {
		lines = append(lines, inputLines(got, wanted, anew)...)
	}
	for _, c := range want {
		for _, r := range c.Rules {
			lines = append(lines, "-A "+c.Name+" "+r)
		}
	}
	return append(append(lines, stale...), commit)
}

// inputLines take INPUT from got to wanted. Rules go by what they say, not by
// their number: another program may have changed INPUT since it was read, and
// then this fails whole rather than take out another's.
func inputLines(got, wanted []string, anew bool) []string {
	var lines []string
	if anew {
		lines = append(lines, "-F INPUT")
		for _, r := range wanted {
			lines = append(lines, "-A INPUT "+r)
		}
		return lines
	}
	for _, r := range got {
		if jumpsToUs(r) || !slices.Contains(wanted, r) {
			lines = append(lines, "-D INPUT "+r)
		}
	}
	if place := slices.Index(wanted, jump); place < len(wanted)-1 {
		return append(lines, fmt.Sprintf("-I INPUT %d %s", place+1, jump))
	}
	return append(lines, "-A INPUT "+jump)
}

// Revert gives both families back as was says they were: our chains, INPUT and
// the policies. What others changed elsewhere meanwhile stays.
func (b *Backend) Revert(ctx context.Context, was firewall.Inspection) error {
	return b.revert(ctx, was, firewall.Before{})
}

func (b *Backend) revert(ctx context.Context, was firewall.Inspection, added firewall.Before) error {
	snap := was.Snapshot.(snapshot)
	t, err := b.tools(ctx, snap)
	if err != nil {
		return err
	}
	now, err := b.read(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range b.families {
		if sameParts(now[f].table(filter), snap[f].table(filter)) {
			continue
		}
		lines := revertLines(now[f].table(filter), snap[f].table(filter), added.Family(f).Removed)
		if err := b.restore(ctx, t, f, lines); err != nil {
			errs = append(errs, fmt.Errorf("bringing back the %v rules: %w", f, err))
		}
	}
	return errors.Join(errs...)
}

// sameParts tells whether two tables are the same in what Load changes.
func sameParts(a, b table) bool {
	same := func(x, y chain) bool { return x.Name == y.Name && slices.Equal(x.Rules, y.Rules) }
	return a.policy(input) == b.policy(input) && a.policy(output) == b.policy(output) &&
		slices.Equal(a.chain(input).Rules, b.chain(input).Rules) && slices.EqualFunc(a.ours(), b.ours(), same)
}

// revertLines takes a filter table back from now to was, less what we added to
// INPUT since.
func revertLines(now, was table, added []string) []string {
	lines := []string{"*" + filter,
		fmt.Sprintf(":INPUT %s [0:0]", was.policy(input)), fmt.Sprintf(":OUTPUT %s [0:0]", was.policy(output))}
	var stale []string
	for _, c := range was.ours() {
		lines = append(lines, ":"+c.Name+" - [0:0]")
	}
	for _, c := range now.ours() {
		if was.chain(c.Name).Name == "" {
			lines = append(lines, ":"+c.Name+" - [0:0]")
			stale = append(stale, "-X "+c.Name)
		}
	}
	if got, want := now.chain(input).Rules, was.chain(input).Rules; !slices.Equal(got, want) {
		lines = append(lines, "-F INPUT")
		for _, r := range got { // what others put there meanwhile
			if !jumpsToUs(r) && !slices.Contains(want, r) && !slices.Contains(added, r) {
				lines = append(lines, "-A INPUT "+r)
			}
		}
		for _, r := range want {
			lines = append(lines, "-A INPUT "+r)
		}
	}
	for _, c := range was.ours() {
		for _, r := range c.Rules {
			lines = append(lines, "-A "+c.Name+" "+r)
		}
	}
	return append(append(lines, stale...), commit)
}

// Remove takes our part out of the kernel: our chains and the jump go, the
// rules that Load took out return behind the rules that are there now, and the
// policies are as before.
func (b *Backend) Remove(ctx context.Context, before firewall.Before) error {
	snap, err := b.read(ctx)
	if err != nil {
		return err
	}
	t, err := b.tools(ctx, snap)
	if err != nil {
		return err
	}
	was := firewall.Inspection{Snapshot: snap}
	for i, f := range b.families {
		old := snap[f].table(filter)
		if err := b.change(ctx, t, f, old, func(anew bool) []string { return removeLines(old, *before.Family(f), anew) }); err != nil {
			err = fmt.Errorf("taking out the %v rules: %w", f, err)
			if i > 0 {
				err = b.back(ctx, was, before, err)
			}
			return err
		}
	}
	now, err := b.read(ctx)
	if err != nil {
		return b.back(ctx, was, before, err)
	}
	for _, f := range b.families {
		if left := now[f].table(filter).ours(); len(left) > 0 {
			return b.back(ctx, was, before, fmt.Errorf("%v: chain %s is still there", f, left[0].Name))
		}
	}
	return nil
}

func removeLines(t table, before firewall.FamilyBefore, anew bool) []string {
	lines := []string{"*" + filter,
		fmt.Sprintf(":INPUT %s [0:0]", cmp.Or(before.Input, firewall.Accept)), fmt.Sprintf(":OUTPUT %s [0:0]", cmp.Or(before.Output, firewall.Accept))}
	for _, c := range t.ours() {
		lines = append(lines, ":"+c.Name+" - [0:0]")
	}
	lines = append(lines, returned(t.chain(input).Rules, before, anew)...)
	for _, c := range t.ours() {
		lines = append(lines, "-X "+c.Name)
	}
	return append(lines, commit)
}

// returned gives INPUT back the rules that were taken out of it. Where others'
// rules are what they were, all is in the former order again; where they are
// not, the rules return behind those that are there now. With anew, INPUT is
// emptied and filled again in any case.
func returned(got []string, before firewall.FamilyBefore, anew bool) []string {
	var others, lines, all []string
	for _, r := range got {
		if jumpsToUs(r) {
			lines = append(lines, "-D INPUT "+r)
		} else {
			others = append(others, r)
		}
	}
	same := len(before.Removed) > 0 && len(before.Places) == len(before.Removed) && checksum(others) == before.Stayed
	if same && before.Places[0] < len(others) {
		anew = true
		for i := 0; i <= len(others); i++ {
			for j, r := range before.Removed {
				if before.Places[j] == i {
					all = append(all, r)
				}
			}
			if i < len(others) {
				all = append(all, others[i])
			}
		}
	} else {
		all = slices.Clone(others)
		for _, r := range before.Removed {
			if !slices.Contains(others, r) {
				all = append(all, r)
			}
		}
	}
	if anew {
		lines, others = []string{"-F INPUT"}, nil
	}
	for _, r := range all[len(others):] {
		lines = append(lines, "-A INPUT "+r)
	}
	return lines
}

func checksum(rules []string) string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte(strings.Join(rules, "\n"))))
}

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
	return b.explain(ctx, t, name, args, lines, b.try(ctx, t, name, args, lines))
}

// commitTries is how often a table is handed to the kernel before its refusal
// counts.
const commitTries = 10

// try runs a restore. The legacy kernel refuses a table whose number of rules
// is not what the program read (EAGAIN; linux/net/netfilter/x_tables.c,
// xt_replace_table), of which the program says no more than that COMMIT failed.
// Programs that take no lock, or another one, make that happen; so it is tried
// again.
func (b *Backend) try(ctx context.Context, t tools, name string, args, lines []string) error {
	for n := 1; ; n++ {
		_, err := b.run(ctx, system.Command{Name: name, Args: args,
			Stdin: []byte(strings.Join(lines, "\n") + "\n"), Timeout: b.lockWait + 20*time.Second})
		if t.nft || n == commitTries || refusedLine(lines, err) != commit {
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
	unlock, err = b.sys.Lock(wait, lockFile)
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
func (b *Backend) explain(ctx context.Context, t tools, name string, args, lines []string, err error) error {
	var exit *system.ExitError
	if !errors.As(err, &exit) {
		return err
	}
	if strings.Contains(exit.Stderr, "xtables lock") {
		return &lockError{b.lockWait, err}
	}
	bad := refusedLine(lines, err)
	if bad == commit {
		// The legacy kernel refuses the table as a whole, and nft up to 1.8.7
		// blames the end for what the kernel refused. Each rule by itself,
		// in a chain that nothing jumps to, tells which one it means.
		bad = b.suspect(ctx, t, name, args, lines)
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
func (b *Backend) suspect(ctx context.Context, t tools, name string, args, lines []string) string {
	const probe = firewall.ChainPrefix + "PROBE"
	// An empty chain to begin with: a rule that was taken before goes with it.
	with := func(line string) error {
		return b.try(ctx, t, name, args, []string{"*" + filter, ":" + probe + " - [0:0]", line, commit})
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
