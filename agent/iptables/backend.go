package iptables

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

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

// There tells whether there are programs of iptables.
func (b *Backend) There() bool {
	_, err := b.sys.LookPath(program(firewall.IPv4, "-save"))
	return err == nil
}

// LegacyInUse tells whether the legacy variant has any table in this network
// namespace. It asks no program.
func (b *Backend) LegacyInUse() bool {
	for _, path := range []string{"/proc/net/ip_tables_names", "/proc/net/ip6_tables_names"} {
		if data, err := b.sys.ReadLimited(path, 4096); err == nil && len(data) > 0 {
			return true
		}
	}
	return false
}

// Prepare has the legacy variant load the kernel's tables. It asks modprobe for
// them itself, which not every process that reads and loads rules may do. It
// does not where no table is named.
func (b *Backend) Prepare(ctx context.Context) error {
	var errs []error
	for _, f := range b.families {
		_, err := b.run(ctx, system.Command{Name: program(f, "-save"), Args: []string{"-t", filter}})
		if err != nil {
			errs = append(errs, fmt.Errorf("preparing the %v tables: %w", f, err))
		}
	}
	return errors.Join(errs...)
}

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

// Load makes the kernel's rules be want: one transaction a family, read back
// and compared. Where anything fails, both families are as was says they were.
// With clear, the rules of others in INPUT that decide by themselves are taken
// out.
func (b *Backend) Load(ctx context.Context, want firewall.Ruleset, was firewall.Inspection, clear bool) error {
	if err := want.Check(); err != nil {
		return err
	}
	if err := few(want); err != nil {
		return err
	}
	return b.load(ctx, texts(want), was, clear)
}

// maxNetworks is how many networks one list may have here, where each is a rule
// and costs every packet that comes so far.
const maxNetworks = 500

// few refuses a ruleset with a longer list.
func few(r firewall.Ruleset) error {
	for _, f := range firewall.Families {
		for _, c := range r.Chains(f) {
			networks := map[string]int{}
			for _, rule := range c.Rules {
				if rule.Src.IsValid() {
					networks[rule.Comment]++
				}
				if networks[rule.Comment] > maxNetworks {
					return fmt.Errorf("%s has more than %d networks that may reach it, and iptables has a rule for each: the backend nftables takes them as one set (\"backend = nftables\" in [agent])",
						strings.TrimPrefix(rule.Comment, "basicfw-"), maxNetworks)
				}
			}
		}
	}
	return nil
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

func (b *Backend) load(ctx context.Context, want map[firewall.Family][]chain, was firewall.Inspection, clear bool) error {
	snap := was.Snapshot.(snapshot)
	t, err := b.tools(ctx, snap)
	if err != nil {
		return err
	}
	// Before 1.4.11 times are of the process's time zone, and off by the hour of
	// an uninitialised tm_isdst (netfilter's b1319cc0, 8ad33a34): no end at
	// all is better than one that nobody can count on.
	if !t.atLeast(1, 4, 11) && haveTimes(want) {
		return fmt.Errorf("%v cannot begin or end a rule at a time, 1.4.11 can: open it for good (without --for), and close it again", t)
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

// haveTimes tells whether a rule is to begin or end by itself.
func haveTimes(want map[firewall.Family][]chain) bool {
	for _, chains := range want {
		for _, c := range chains {
			if slices.ContainsFunc(c.Rules, func(r string) bool { return strings.Contains(r, "-m time ") }) {
				return true
			}
		}
	}
	return false
}

// back gives the rules back as they were, for the sake of err. Of added, the
// rules that were put into INPUT since go too.
func (b *Backend) back(ctx context.Context, was firewall.Inspection, added firewall.Before, err error) error {
	// The way back must not be cut short by what ended the way there.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if e := b.Revert(ctx, was, added); e != nil {
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

// Revert gives both families back as was says they were: our chains, INPUT and
// the policies. What others changed elsewhere meanwhile stays, but for what
// Remove gave back of before.
func (b *Backend) Revert(ctx context.Context, was firewall.Inspection, before firewall.Before) error {
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
		lines := revertLines(now[f].table(filter), snap[f].table(filter), before.Family(f).Removed)
		if err := b.restore(ctx, t, f, lines); err != nil {
			errs = append(errs, fmt.Errorf("bringing back the %v rules: %w", f, err))
		}
	}
	return errors.Join(errs...)
}

// Yield sets INPUT's policy to ACCEPT and leaves all else, for a moment in which
// something beside iptables filters.
func (b *Backend) Yield(ctx context.Context) error {
	snap, err := b.read(ctx)
	if err != nil {
		return err
	}
	t, err := b.tools(ctx, snap)
	if err != nil {
		return err
	}
	for _, f := range b.families {
		if err := b.restore(ctx, t, f, []string{"*" + filter, ":INPUT ACCEPT [0:0]", commit}); err != nil {
			return fmt.Errorf("setting the %v policy: %w", f, err)
		}
	}
	return nil
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
