package iptables

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Backend loads rulesets through the iptables programs.
type Backend struct {
	sys      *system.System
	families []firewall.Family
	// lockWait is how long a load waits for another program to release the
	// xtables lock, in whole seconds.
	lockWait time.Duration
	// Misprinted, if set, reports whether the nft variant's text of a family leaves out
	// matches of rules in INPUT.
	Misprinted func(f firewall.Family, text []byte) (bool, error)
	// known is the last known version of the programs.
	known tools
	// If held is set, last is the last snapshot, or nil after a change, and hung the error of
	// a program that did not end: it is not run again.
	held bool
	last snapshot
	hung error
	// removed are the sets that Remove removed, as ipset saves them.
	removed string
}

// New returns a backend for the kernel's families.
func New(sys *system.System, families []firewall.Family) *Backend {
	return &Backend{sys: sys, families: families, lockWait: 10 * time.Second}
}

// Hold makes Inspect use the last snapshot until release is called. After a change by
// this backend it reads again, unless the change was read back. The version of the
// programs is read only once. Changes by another program are not seen until release:
// use it only if none are expected. Within another Hold it has no effect.
func (b *Backend) Hold() (release func()) {
	if b.held {
		return func() {}
	}
	b.held, b.last, b.known = true, nil, tools{}
	return func() { b.held, b.last, b.hung = false, nil, nil }
}

// HoldEmpty is Hold for a network namespace known to have no rules. version is the
// Version of another backend with the same programs.
func (b *Backend) HoldEmpty(version string) {
	b.Hold()
	b.known, b.last = parseTools(version), snapshot{}
	for _, f := range b.families {
		b.last[f] = dump{}
	}
}

// Version returns the version as the programs print it, or "" if it was not read yet.
func (b *Backend) Version() string { return b.known.version() }

// MissingError is the error for an iptables program that is not installed.
type MissingError struct{ err *system.NotFoundError }

func (e *MissingError) Error() string { return e.err.Error() }
func (e *MissingError) Unwrap() error { return e.err }

// IncompatibleError is the error for a table filter with rules that iptables cannot
// print: other programs added them over nf_tables. What iptables prints then differs
// from the rules in the kernel.
type IncompatibleError struct{ Family firewall.Family }

func (e *IncompatibleError) Error() string {
	return fmt.Sprintf("table %s filter has rules that %s cannot print: \"nft list table %[1]s filter\" shows them", firewall.ByFamily(e.Family, "ip", "ip6"), program(e.Family, "-save"))
}

func incompatible(f firewall.Family) error {
	return hint.Wrap(&IncompatibleError{f}, "set \"backend = nftables\" in [agent], then run: basicfw-agent apply")
}

// misprinted reports whether iptables-save prints a terminal rule of another program
// in INPUT incorrectly. It reads the kernel's rules only if there are such rules.
func (b *Backend) misprinted(f firewall.Family, d dump) bool {
	e := effectsOf(d.table(filter))
	if b.Misprinted == nil || !d.nft || !slices.ContainsFunc(e.chain(input).Rules, e.decides) {
		return false
	}
	wrong, err := b.Misprinted(f, d.text)
	return wrong && err == nil
}

// Permanent reports that another attempt fails, too.
func (e *IncompatibleError) Permanent() bool { return true }

// hinted returns the error with a hint.
func (e *MissingError) hinted() error {
	return hint.Wrap(e, "install iptables (\"dnf install iptables\" or \"apt-get install iptables\")")
}

// There reports whether the iptables programs are installed.
func (b *Backend) There() bool {
	_, err := b.sys.LookPath(program(firewall.IPv4, "-save"))
	return err == nil
}

// LegacyInUse reports whether the legacy variant has any table in this network
// namespace. It runs no program.
func (b *Backend) LegacyInUse() bool {
	return slices.ContainsFunc(firewall.Families[:], func(f firewall.Family) bool { return len(b.legacyTables(f)) > 0 })
}

// legacyTables returns the names of the legacy variant's tables in this network
// namespace, or none if the kernel's list cannot be read.
func (b *Backend) legacyTables(f firewall.Family) []string {
	data, err := b.sys.ReadLimited("/proc/net/"+firewall.ByFamily(f, "ip_tables_names", "ip6_tables_names"), 4096)
	if err != nil {
		return nil
	}
	return strings.Fields(string(data))
}

// Prepare makes the legacy variant load the kernel's table modules: if a table is
// named, it runs modprobe, which not every process that loads rules may do. The nft
// variant is not run: the kernel loads its modules.
func (b *Backend) Prepare(ctx context.Context) error {
	var errs []error
	for _, f := range b.families {
		name := program(f, "-save")
		if path, err := b.sys.LookPath(name); err == nil && isNft(path) {
			continue
		}
		_, err := b.run(ctx, system.Command{Name: name, Args: []string{"-t", filter}})
		if err == nil { // if mangle is needed but does not exist, loading the rules fails
			_, _ = b.run(ctx, system.Command{Name: name, Args: []string{"-t", mangle}})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("preparing the %v tables: %w", f, err))
		}
	}
	return inOneLine(errs)
}

// isNft reports whether a program is of the nft variant, whose programs are all links
// to one file since 1.8.0.
func isNft(path string) bool {
	file, err := filepath.EvalSymlinks(path)
	return err == nil && filepath.Base(file) == "xtables-nft-multi"
}

// inOneLine joins the errors of the families to a single line.
func inOneLine(errs []error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) < 2 {
		return errors.Join(errs...)
	}
	return fmt.Errorf("%w; %w", errs[0], errs[1])
}

// snapshot is the rules of both families at one time.
type snapshot map[firewall.Family]dump

// seen is a snapshot and the backend that read it.
type seen struct {
	b    *Backend
	snap snapshot
}

// program returns the name of a family's program: iptables-save, ip6tables-restore.
func program(f firewall.Family, suffix string) string {
	return firewall.ByFamily(f, "iptables", "ip6tables") + suffix
}

func (b *Backend) run(ctx context.Context, c system.Command) (system.Result, error) {
	c.Env = []string{zone}
	res, err := b.sys.Run(ctx, c)
	var missing *system.NotFoundError
	if errors.As(err, &missing) {
		return res, (&MissingError{missing}).hinted()
	}
	return res, err
}

// read reads the rules of both families in parallel. With an [*IncompatibleError] it also
// returns the tables that could be read.
func (b *Backend) read(ctx context.Context) (snapshot, error) {
	if b.hung != nil {
		return nil, b.hung
	}
	dumps := make([]dump, len(b.families))
	errs := make([]error, len(b.families))
	var wg sync.WaitGroup
	read := func(i int) {
		defer wg.Done()
		f := b.families[i]
		name := program(f, "-save")
		res, err := b.run(ctx, system.Command{Name: name})
		if err == nil {
			dumps[i], err = parse(res.Stdout)
		}
		if err == nil && dumps[i].incompatible {
			errs[i] = incompatible(f)
			return
		}
		if err != nil {
			errs[i] = fmt.Errorf("reading the %v rules with %s: %w", f, name, err)
		}
	}
	wg.Add(len(b.families))
	for i := range b.families[1:] {
		go read(i + 1)
	}
	read(0) // in this goroutine, whose stack has already grown
	wg.Wait()
	snap := snapshot{}
	for i, f := range b.families {
		if errs[i] == nil && b.misprinted(f, dumps[i]) {
			errs[i] = incompatible(f)
		}
		var missing *MissingError
		if errors.As(errs[i], &missing) {
			return nil, missing.hinted() // one is enough
		}
		snap[f] = dumps[i]
	}
	if err := inOneLine(errs); err != nil {
		if b.held && errors.Is(err, context.DeadlineExceeded) {
			b.hung = err
		}
		return snap, err
	}
	if b.held {
		b.last = snap
	}
	return snap, nil
}

// current returns the held snapshot, or reads one.
func (b *Backend) current(ctx context.Context) (snapshot, error) {
	if b.last != nil {
		return b.last, nil
	}
	return b.read(ctx)
}

// Inspect reads the kernel's rules and compares them with want.
func (b *Backend) Inspect(ctx context.Context, want firewall.Ruleset) (backend.Inspection, error) {
	snap, err := b.current(ctx)
	if err != nil {
		return backend.Inspection{}, err
	}
	in := inspect(snap, b.families, texts(want))
	in.Drift = append(in.Drift, b.setDrift(ctx, setsOf(want, b.families))...)
	t, err := b.tools(ctx, snap)
	if err != nil {
		return backend.Inspection{}, err
	}
	in.Backend, in.Snapshot = t.String(), seen{b, snap}
	if t.nft {
		in.Warnings = b.legacyWarnings()
	}
	return in, nil
}

// legacyWarnings returns a warning for each family with iptables-legacy rules, if we
// use the nft variant: both sets of rules apply.
func (b *Backend) legacyWarnings() []string {
	var out []string
	for _, f := range b.families {
		if slices.Contains(b.legacyTables(f), filter) {
			out = append(out, fmt.Sprintf("iptables-legacy also has %v rules, and both sets apply: see %s", f, program(f, "-legacy-save")))
		}
	}
	return out
}

// Load loads want in one transaction per family, reads it back and compares it. If
// anything fails, both families are rolled back. With clear, other programs'
// terminal rules are removed from INPUT.
func (s seen) Load(ctx context.Context, want firewall.Ruleset, clear bool) error {
	if err := want.Check(); err != nil {
		return err
	}
	if err := checkNetworks(want); err != nil {
		return err
	}
	b, chains := s.b, texts(want)
	t, err := b.tools(ctx, s.snap)
	if err != nil {
		return err
	}
	// Before 1.4.11, the match conntrack has no ranges of ports.
	if !t.atLeast(1, 4, 11) && has(want, func(r firewall.Rule) bool { return r.Dialled && r.DstPort.First != r.DstPort.Last }) {
		return hint.Wrap(fmt.Errorf("%v does not support ranges of published ports, which need 1.4.11", t), "open each port by itself, or set \"published = leave\" in [containers]")
	}
	if err := b.createSets(ctx, setsOf(want, b.families), s.snap); err != nil {
		return err
	}
	for i, f := range b.families {
		old := s.snap[f].table(filter)
		more := forwardLines(s.snap[f].table(mangle), chains[f].forward)
		if err := b.change(ctx, t, f, old, func(rewrite bool) []string { return append(loadLines(old, chains[f].input, clear, rewrite), more...) }); err != nil {
			err = fmt.Errorf("loading the %v rules: %w", f, err)
			if strings.Contains(err.Error(), "`"+mangle+"'") {
				err = hint.Wrap(err, "if this kernel has no table mangle, set \"published = leave\" in [containers]")
			}
			if i > 0 || len(more) > 0 { // the tables are loaded one after the other
				err = b.rollBack(ctx, s.snap, backend.Backup{}, err)
			}
			return err
		}
	}
	now, err := b.read(ctx)
	if err != nil {
		return b.rollBack(ctx, s.snap, backend.Backup{}, fmt.Errorf("reading back the loaded rules: %w", err))
	}
	drift := append(inspect(now, b.families, chains).Drift, b.setDrift(ctx, setsOf(want, b.families))...)
	if len(drift) > 0 {
		return b.rollBack(ctx, s.snap, backend.Backup{}, loadError(drift[0], now))
	}
	return nil
}

// has reports whether a ruleset has a rule for which is returns true.
func has(r firewall.Ruleset, is func(firewall.Rule) bool) bool {
	return slices.ContainsFunc(slices.Concat(r.IPv4, r.IPv6), func(c firewall.Chain) bool { return slices.ContainsFunc(c.Rules, is) })
}

// maxNetworks is the maximum number of networks in a list. Each becomes a rule,
// against which every packet that reaches it is compared.
const maxNetworks = 500

// checkNetworks returns an error if a list is longer.
func checkNetworks(r firewall.Ruleset) error {
	for _, f := range firewall.Families {
		for _, c := range r.Chains(f) {
			networks := map[string]int{}
			for _, rule := range c.Rules {
				if rule.Src.IsValid() {
					networks[rule.Comment]++
				}
				if networks[rule.Comment] > maxNetworks {
					return hint.Wrap(fmt.Errorf("%s is open to more than %d networks, and iptables needs a rule for each", strings.TrimPrefix(rule.Comment, "basicfw-"), maxNetworks),
						"set \"backend = nftables\" in [agent]: nftables stores them in one set")
				}
			}
		}
	}
	return nil
}

// loadError returns the error for rules that were read back differently. If none of
// our chains exists although the program reported success, iptables does not work on
// this machine. Otherwise the difference may be an unknown spelling.
func loadError(first firewall.Drift, now snapshot) error {
	mismatch := &backend.MismatchError{First: first}
	for f, d := range now {
		if len(d.table(filter).ours()) == 0 { // mangle is loaded after it
			return fmt.Errorf("%s reported success but loaded nothing: %s", program(f, "-restore"), mismatch.Error())
		}
	}
	return mismatch
}

// rollBack restores the rules of a snapshot after err, and returns err. It also
// removes the rules of added that were since restored to INPUT.
func (b *Backend) rollBack(ctx context.Context, was snapshot, added backend.Backup, err error) error {
	// The end of the caller's context must not interrupt the rollback.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if e := (seen{b, was}).Restore(ctx, added); e != nil {
		return fmt.Errorf("%w; and restoring the previous rules failed: %w", err, e)
	}
	return err
}

// change loads lines that delete single rules of INPUT. If that is refused, it loads
// the lines that rewrite INPUT. Some matches, such as "recent", cannot be deleted by
// the text that iptables-save prints, and the nft variant of 1.8.2 fails on lines after
// a deletion. A deletion is also refused if another program removed the rule since
// INPUT was read. Then nothing is changed, so that no other change is undone.
func (b *Backend) change(ctx context.Context, t tools, f firewall.Family, old table, lines func(rewrite bool) []string) error {
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

// Restore restores our chains, INPUT and the policies in both families. Later changes that
// other programs made elsewhere are kept. The rules of added that Remove restored are removed.
func (s seen) Restore(ctx context.Context, added backend.Backup) error {
	b, snap := s.b, s.snap
	t, err := b.tools(ctx, snap)
	if err != nil {
		return err
	}
	now, err := b.read(ctx)
	if err != nil {
		return err
	}
	errs := []error{b.restoreSets(ctx)}
	for _, f := range b.families {
		same := sameForward(now[f].table(mangle), snap[f].table(mangle))
		if same && sameParts(now[f].table(filter), snap[f].table(filter)) {
			continue
		}
		lines := revertLines(now[f].table(filter), snap[f].table(filter), added.Family(f).Removed)
		if !same {
			lines = append(lines, forwardLines(now[f].table(mangle), snap[f].table(mangle).ours())...)
		}
		if err := b.restore(ctx, t, f, lines); err != nil {
			errs = append(errs, fmt.Errorf("restoring the %v rules: %w", f, err))
		}
	}
	return inOneLine(errs)
}

// Yield sets INPUT's policy to ACCEPT and changes nothing else, while the guard filters.
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

// Remove removes our chains and the jump. It restores the policies and, after the
// present rules, the rules that Load removed.
func (b *Backend) Remove(ctx context.Context, before backend.Backup) error {
	snap, err := b.read(ctx)
	if err != nil {
		return err
	}
	t, err := b.tools(ctx, snap)
	if err != nil {
		return err
	}
	for i, f := range b.families {
		old := snap[f].table(filter)
		more := forwardLines(snap[f].table(mangle), nil)
		if err := b.change(ctx, t, f, old, func(rewrite bool) []string { return append(removeLines(old, *before.Family(f), rewrite), more...) }); err != nil {
			err = fmt.Errorf("removing the %v rules: %w", f, err)
			if i > 0 || len(more) > 0 {
				err = b.rollBack(ctx, snap, before, err)
			}
			return err
		}
	}
	now, err := b.read(ctx)
	if err != nil {
		return b.rollBack(ctx, snap, before, err)
	}
	for _, f := range b.families {
		if left := append(now[f].table(filter).ours(), now[f].table(mangle).ours()...); len(left) > 0 {
			return b.rollBack(ctx, snap, before, fmt.Errorf("%v: chain %s still exists", f, left[0].Name))
		}
	}
	if err := b.removeSets(ctx, snap); err != nil {
		return b.rollBack(ctx, snap, before, err)
	}
	return nil
}
