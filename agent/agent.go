// Package agent brings a machine to what was decided for it, all or nothing;
// tells how it stands; and gives it back.
package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Kernel is where rules take effect.
type Kernel interface {
	// Inspect compares what there is with want.
	Inspect(ctx context.Context, want firewall.Ruleset) (firewall.Inspection, error)
	// Load makes it want, in both families or in none. With clear, others'
	// rules in INPUT that decide by themselves are taken out.
	Load(ctx context.Context, want firewall.Ruleset, was firewall.Inspection, clear bool) error
	// LoadFiles is Load of what persisted files hold.
	LoadFiles(ctx context.Context, files map[firewall.Family][]byte, was firewall.Inspection) error
	// Yield sets INPUT's policy to ACCEPT, while something else filters.
	Yield(ctx context.Context) error
	// Revert takes back what Load did, or what Remove did with before.
	Revert(ctx context.Context, was firewall.Inspection, before firewall.Before) error
	// Remove takes out our part and gives back what Load took out.
	Remove(ctx context.Context, before firewall.Before) error
}

// RulesFiles knows the files that hold rules over a boot.
type RulesFiles interface {
	Persisted(existing []byte, r firewall.Ruleset, f firewall.Family) ([]byte, error)
	Unpersisted(current, original []byte) ([]byte, error)
	// Aside is a file without our part, and without what drops by itself; nil is
	// that nothing is left.
	Aside(existing []byte) ([]byte, error)
}

// TableRules knows the file that holds nf_tables' rules over a boot.
type TableRules interface {
	Persisted(r firewall.Ruleset, families []firewall.Family) []byte
	Parse(data []byte) (firewall.Ruleset, error)
}

// Service is the agent's own entry in the machine's service manager.
type Service interface {
	Install() error
	Uninstall() error
	Start() error // does not wait
	Status() (ServiceStatus, error)
}

// ServiceStatus is how the service manager sees the service.
type ServiceStatus struct {
	Registered bool `json:"registered"` // known to the service manager
	Enabled    bool `json:"enabled"`    // started at boot
	Active     bool `json:"active"`     // running now
}

// Conntrack is the kernel's table of connections.
type Conntrack interface {
	// Grow makes the table large enough and tells how large it was.
	Grow(ctx context.Context) (before store.Conntrack, err error)
	// Set gives it a size back.
	Set(store.Conntrack) error
	// Adopt makes every established TCP connection of this host known to the
	// table, so that it lives on when rules ask for its state.
	Adopt() (n int, err error)
}

// Agent is one machine's firewall. Every method that changes something wants
// its caller to hold the store's lock.
type Agent struct {
	System    *system.System
	Kernel    func(backend string) Kernel // Kernels.For
	Rules     RulesFiles
	Table     TableRules
	Store     *store.Store
	Service   Service
	Conntrack Conntrack
	Managers  Managers
	Guard     Guard
	Log       logrus.FieldLogger
	Version   string
	Families  []firewall.Family // that the kernel has
	Now       func() time.Time
	// Boot names this boot and tells how long ago it began.
	Boot func() (name string, uptime time.Duration, err error)
	// Rehearse, where set, loads rules where they have no effect, with a backend,
	// to find out whether this kernel takes them. The error is ErrNoRehearsal
	// where that cannot be had.
	Rehearse func(ctx context.Context, backend string, rules firewall.Ruleset) error
}

// ErrNoRehearsal says that rules cannot be tried out on this machine.
var ErrNoRehearsal = errors.New("this machine allows no network namespace in which the rules could be tried out first")

// Moment is now.
func (a *Agent) Moment() firewall.Moment {
	m := firewall.Moment{Time: a.Now()}
	if name, uptime, err := a.Boot(); err == nil {
		m.Boot, m.Uptime = name, uptime
	}
	return m
}

// Change is a file that belongs to a change of the rules: it is written with
// them, or not at all.
type Change struct {
	Path string
	Data []byte
	Mode fs.FileMode
	// Remove is set where the file goes.
	Remove bool
	family string // whose rules are in it, if one family's
	broken error  // why what is there cannot be kept
}

// Options say how far Converge goes.
type Options struct {
	// Previous is the state as it is on disk, where that was read already.
	Previous *store.State
	// Clear takes out others' rules in INPUT that decide by themselves, as
	// bootstrap does, once.
	Clear bool
	// Service registers and starts the service.
	Service bool
	// Files are written with the rules.
	Files []Change
	// Record are further files to give back at uninstall.
	Record []string
	// Check, where set, may refuse a change before it begins.
	Check func(firewall.Inspection) error
	// TakeOver stops other programs that manage the firewall, for good. Without
	// it they are left alone.
	TakeOver bool
	// Refuse refuses to change anything beside one of them.
	Refuse bool
	// Choose takes the other backend where the one that nobody asked for does not
	// work. It is for when a backend is decided on, not for every failure later.
	Choose bool
	// Prove, where set, may refuse a change once all of it is made: it is taken
	// back then.
	Prove func(ctx context.Context, st store.State) error
}

// Outcome is what Converge found and did.
type Outcome struct {
	Inspection firewall.Inspection // of before the change
	Files      []string            // files that were written or had to be
	Gone       []string            // files that went or had to go
	Adopted    int                 // connections that live on by it
	Removed    []firewall.Foreign  // others' rules that it took out
	Others     []firewall.Manager  // other managers that it stopped
	Registered bool                // the service was not, or not as it should be
	Changed    bool
	State      store.State // what was to be, with the backend that it came to
}

// Assess tells what Converge would change.
func (a *Agent) Assess(ctx context.Context, next store.State, o Options) (out Outcome, err error) {
	err = a.either(&next, o, func() error {
		p, err := a.prepare(ctx, next, o)
		if err == nil && p.load {
			err = a.rehearse(ctx, next)
		}
		out = p.Outcome
		return err
	})
	out.State = next
	return out, err
}

// either does something that needs a backend; where the one that nobody asked for
// does not work, with the other one. The error is then the first one's: that is
// what there is to be mended.
func (a *Agent) either(next *store.State, o Options, do func() error) error {
	err := do()
	other, ok := alternative(*next, err)
	if !ok || !o.Choose {
		return err
	}
	a.Log.Info(other.Backend.Reason + "; nf_tables is tried instead")
	first := *next
	*next = other
	if e := do(); e != nil {
		*next = first
		return fmt.Errorf("%w; nor does nf_tables: %w", err, e)
	}
	return nil
}

// alternative is a state with the other backend, where it is for us to choose one
// and iptables has failed.
func alternative(st store.State, err error) (store.State, bool) {
	var load *LoadError
	var passes interface{ Temporary() bool }
	if !errors.As(err, &load) || errors.As(err, &passes) && passes.Temporary() || st.Backend.Name != Iptables || st.Backend.Source != "detected" && st.Backend.Source != "failsafe" {
		return st, false
	}
	why := strings.ReplaceAll(load.Error(), "\n", "; ")
	st.Backend.Name, st.Backend.Reason = Nftables, "iptables does not work here: "+why
	if missing := new(system.NotFoundError); errors.As(err, &missing) {
		st.Backend.Reason = fmt.Sprintf("there is no %s on this machine", missing.Name)
	}
	return st, true
}

// rehearse finds out whether this kernel takes the rules of a state.
func (a *Agent) rehearse(ctx context.Context, st store.State) error {
	if a.Rehearse == nil {
		return nil
	}
	err := a.Rehearse(ctx, st.Backend.Name, st.Ruleset)
	if errors.Is(err, ErrNoRehearsal) {
		a.Log.Warn(err)
		return nil
	}
	if err != nil {
		return &LoadError{fmt.Errorf("trying out the rules: %w", err)}
	}
	return nil
}

// prepared is a change that has been looked at and not begun.
type prepared struct {
	Outcome
	options  Options // with what follows from the change
	load     bool
	files    []Change
	original store.Original
	first    bool           // nothing was recorded before
	recorded bool           // original is as it is on disk
	before   store.Original // as it is on disk, where it is
	previous *store.State
	guard    bool // one is up that was left behind
}

func (a *Agent) prepare(ctx context.Context, next store.State, o Options) (prepared, error) {
	var p prepared
	in, err := a.Kernel(next.Backend.Name).Inspect(ctx, next.Ruleset)
	if err != nil {
		return p, &LoadError{err}
	}
	p.Inspection = in
	if p.previous = o.Previous; p.previous == nil {
		switch st, err := a.Store.Load(); {
		case err == nil:
			p.previous = &st
		case !errors.Is(err, store.ErrNone):
			a.Log.WithError(err).Warn("the former state cannot be used and is replaced")
		}
	}
	if p.previous != nil {
		// What others have in INPUT may mean nothing to one backend, and all to the
		// other.
		was := p.previous.Backend.Name
		o.Clear = o.Clear || was != "" && was != next.Backend.Name
	}
	p.options = o
	p.load = len(in.Drift) > 0 || o.Clear && len(in.Foreign) > 0
	if o.TakeOver || o.Refuse {
		if p.Others, err = a.Managers.Find(in.Managers); err != nil {
			return p, fmt.Errorf("looking for other firewalls: %w", err)
		}
	}
	p.load = p.load || o.TakeOver && len(p.Others) > 0
	p.guard = a.Guard.Up()

	rules, err := a.persisted(next)
	if err != nil {
		return p, err
	}
	for _, c := range append(rules, o.Files...) {
		if c.broken != nil {
			a.Log.WithError(c.broken).Warnf("%s holds no rules that can be kept and is replaced", c.Path)
		}
		same, err := a.same(c)
		if err != nil {
			return p, err
		}
		if !same {
			p.files = append(p.files, c)
			if c.Remove {
				p.Gone = append(p.Gone, c.Path)
			} else {
				p.Outcome.Files = append(p.Outcome.Files, c.Path)
			}
		}
	}

	p.original, err = a.Store.LoadOriginal()
	switch {
	case errors.Is(err, store.ErrNone):
		p.first = true
		if p.original, err = a.record(in, o); err != nil {
			return p, err
		}
	case err != nil && (p.previous == nil || o.Clear || o.TakeOver && len(p.Others) > 0):
		return p, fmt.Errorf("what was there before bootstrap is recorded, but cannot be read: %w", err)
	case err != nil: // nothing is to be added to it
		a.Log.WithError(err).Warn("what was there before bootstrap cannot be read, and could not be given back")
		p.recorded = true
	default:
		p.before = p.original
		p.before.Managers = slices.Clone(p.original.Managers)
		p.recorded = !a.addRemoved(&p.original, in, o)
	}
	p.Registered = a.serviceMissing(o)
	p.Changed = p.load || p.guard || len(p.files) > 0 || p.previous == nil || p.Registered || !sameDecision(*p.previous, next)
	return p, nil
}

// sameDecision tells whether two states differ in nothing but when, and from
// what evidence, they were written.
func sameDecision(a, b store.State) bool {
	for _, s := range []*store.State{&a, &b} {
		s.Schema, s.Version, s.Bootstrapped, s.LastVerified = 0, "", time.Time{}, time.Time{}
		s.RescueArgument = ""
		s.SSHPorts, s.Allowed = nil, nil // reasons; ports and networks themselves are in Desired
	}
	return reflect.DeepEqual(a, b)
}

func (a *Agent) serviceMissing(o Options) bool {
	if !o.Service {
		return false
	}
	st, err := a.Service.Status()
	return err != nil || !st.Registered || !st.Enabled
}

// record notes how things are before the first change.
func (a *Agent) record(in firewall.Inspection, o Options) (store.Original, error) {
	org := store.Original{Rules: in.Before}
	if !o.Clear {
		for _, f := range firewall.Families {
			org.Rules.Family(f).Removed, org.Rules.Family(f).Places = nil, nil
		}
	}
	paths := append(slices.Clone(o.Record), MessageFile, IssueFile, issueLink, TableFile)
	for _, f := range firewall.Families {
		paths = append(paths, a.RulesPath(f))
	}
	for _, path := range paths {
		file, err := a.snapshot(path)
		if err != nil {
			return org, fmt.Errorf("recording %s: %w", path, err)
		}
		org.Files = append(org.Files, file)
		if dir := filepath.Dir(path); !a.System.Exists(dir) && !slices.Contains(org.Dirs, dir) {
			org.Dirs = append(org.Dirs, dir)
		}
	}
	return org, nil
}

// snapshot is a file as it is now.
func (a *Agent) snapshot(path string) (store.File, error) {
	file := store.File{Path: path}
	fi, err := a.System.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return file, nil
	}
	if err != nil {
		return file, err
	}
	file.Existed, file.Mode = true, fi.Mode().Perm()
	switch {
	case fi.Mode()&fs.ModeSymlink != 0:
		if file.Link, err = a.System.Readlink(path); err != nil {
			return file, err
		}
		if file.Data, err = a.System.ReadLimited(path, maxRules); errors.Is(err, fs.ErrNotExist) {
			err = nil // it leads nowhere
		}
	case fi.Mode().IsRegular():
		file.Data, err = a.System.ReadLimited(path, maxRules)
	default:
		err = fmt.Errorf("it is not a plain file, but %v: move it away and run this again", fi.Mode())
	}
	return file, err
}

// putBack makes a file what it was.
func (a *Agent) putBack(file store.File) error {
	switch {
	case !file.Existed:
		return a.System.Remove(file.Path)
	case file.Link != "":
		return a.System.Symlink(file.Link, file.Path)
	}
	return a.put(Change{Path: file.Path, Data: file.Data, Mode: file.Mode})
}

// addRemoved adds rules that a later Clear takes out to those of the first.
func (a *Agent) addRemoved(org *store.Original, in firewall.Inspection, o Options) (changed bool) {
	if !o.Clear {
		return false
	}
	for _, f := range firewall.Families {
		if more := in.Before.Family(f).Removed; len(more) > 0 {
			to := org.Rules.Family(f)
			to.Removed, to.Places = append(to.Removed, more...), nil
			changed = true
		}
	}
	return changed
}

// maxRules bounds a file of rules that is read.
const maxRules = 64 << 20

// RulesPath is where the rules of a family are kept over a boot: where
// iptables-services reads them, or where there is no /etc/sysconfig, where
// netfilter-persistent does.
func (a *Agent) RulesPath(f firewall.Family) string {
	// One that cannot be looked at is there: rules that are written elsewhere would
	// be read by nobody.
	if fi, err := a.System.Stat("/etc/sysconfig"); err == nil && fi.IsDir() || err != nil && a.System.Exists("/etc/sysconfig") {
		if f == firewall.IPv4 {
			return "/etc/sysconfig/iptables"
		}
		return "/etc/sysconfig/ip6tables"
	}
	return "/etc/iptables/rules.v" + strconv.Itoa(int(f))
}

// TableFile is where the rules of nf_tables are kept over a boot, for people and
// for nft -f.
const TableFile = "/etc/nftables/basicfw.nft"

// persisted gives the files that hold a state's rules over a boot, and those that
// hold none any more. One that is there and no rules file at all is replaced: the
// record of before has it.
func (a *Agent) persisted(st store.State) ([]Change, error) {
	if st.Backend.Name == Nftables {
		return a.persistedTable(st.Ruleset)
	}
	var out []Change
	for _, f := range firewall.Families {
		path := a.RulesPath(f)
		existing, err := a.System.ReadLimited(path, maxRules)
		// A directory in its place can be named. It is not replaced: writing fails.
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.EISDIR) {
			return nil, err
		}
		data, err := a.Rules.Persisted(existing, st.Ruleset, f)
		broken := err
		if broken != nil {
			if data, err = a.Rules.Persisted(nil, st.Ruleset, f); err != nil {
				return nil, err
			}
		}
		out = append(out, Change{Path: path, Data: data, Mode: 0o600, family: f.String(), broken: broken})
	}
	return append(out, Change{Path: TableFile, Remove: true}), nil
}

// persistedTable is persisted where the rules are in a table of nf_tables. A file
// of iptables' must have none of ours, and nothing that drops before they have
// been asked.
func (a *Agent) persistedTable(r firewall.Ruleset) ([]Change, error) {
	out := []Change{{Path: TableFile, Data: a.Table.Persisted(r, a.Families), Mode: 0o600}}
	for _, f := range firewall.Families {
		path := a.RulesPath(f)
		existing, err := a.System.ReadLimited(path, maxRules)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		data, err := a.Rules.Aside(existing)
		if err != nil || bytes.Equal(data, existing) {
			continue // nothing of ours, nor of iptables': not for us to touch
		}
		out = append(out, Change{Path: path, Data: data, Mode: 0o600, Remove: data == nil, family: f.String()})
	}
	return out, nil
}

// same tells whether a file already is as a change would make it.
func (a *Agent) same(c Change) (bool, error) {
	fi, err := a.System.Lstat(c.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return c.Remove, nil
	}
	if err != nil || c.Remove {
		return false, err
	}
	if system.CheckOwner(fi) != nil || fi.Mode().Perm() != c.Mode || fi.Size() != int64(len(c.Data)) {
		return false, nil
	}
	data, err := a.System.ReadFile(c.Path)
	return bytes.Equal(data, c.Data), err
}

// Converge makes the machine what next says: the rules in the kernel, the files
// that keep them, the state and the service. Where any of it fails, all of it
// is as it was before. Where nothing differs, nothing is touched.
func (a *Agent) Converge(ctx context.Context, next store.State, o Options) (out Outcome, err error) {
	err = a.either(&next, o, func() (err error) {
		out, err = a.converge(ctx, next, o)
		return err
	})
	out.State = next
	return out, err
}

func (a *Agent) converge(ctx context.Context, next store.State, o Options) (out Outcome, err error) {
	p, err := a.prepare(ctx, next, o)
	if err != nil || !p.Changed {
		return p.Outcome, err
	}
	out, o = p.Outcome, p.options
	if o.Check != nil {
		if err := o.Check(p.Inspection); err != nil {
			return out, err
		}
	}
	if len(p.Others) > 0 && o.Refuse {
		return out, &ConflictError{Names: Names(p.Others)}
	}
	if p.load {
		if err := a.rehearse(ctx, next); err != nil {
			return out, err
		}
	}
	others, err := a.recordOthers(ctx, &p, o)
	if err != nil {
		return out, err
	}
	kernel := a.Kernel(next.Backend.Name)
	var undo []func() error
	guarded := false
	defer func() {
		if err == nil {
			return
		}
		back := false
		for i := len(undo) - 1; i >= 0; i-- {
			if e := undo[i](); e != nil {
				back, err = true, fmt.Errorf("%w; and on the way back: %w", err, e)
			}
		}
		if !guarded {
			return
		}
		// Where the way back has failed, nobody knows what else closes the machine.
		if back {
			err = fmt.Errorf("%w; the machine is kept closed by table %s until \"basicfw-agent bootstrap\" succeeds", err, GuardTable)
		} else if e := a.Guard.Lower(); e != nil {
			err = fmt.Errorf("%w; and on the way back: %w", err, e)
		}
	}()

	if p.load {
		size, err := a.Conntrack.Grow(ctx)
		if err != nil {
			a.Log.WithError(err).Warn("the kernel's table of connections could not be enlarged")
		} else if p.first {
			p.original.Conntrack = size
			undo = append(undo, func() error { return a.Conntrack.Set(size) })
		}
	}
	if !p.recorded {
		undo = append(undo, func() error {
			if p.first {
				return a.Store.Forget(true)
			}
			return a.Store.SaveOriginal(p.before)
		})
		if err := a.Store.SaveOriginal(p.original); err != nil {
			return out, fmt.Errorf("recording what is there: %w", err)
		}
	}
	// The service can write below this directory, but not make it: to it the
	// rest of /etc is read-only.
	if dir := filepath.Dir(MessageFile); p.first && !a.System.Exists(dir) {
		undo = append(undo, func() error { return a.System.RemoveDir(dir) })
		if err := a.System.MkdirAll(dir, 0o755); err != nil {
			return out, err
		}
	}
	if o.Clear {
		out.Removed = p.Inspection.Foreign
	}
	if p.load {
		if out.Adopted, err = a.Conntrack.Adopt(); err != nil {
			a.Log.WithError(err).Warn("sessions that are open now may have to be opened again")
		}
		if len(others) > 0 {
			if guarded, err = a.raise(next.Ruleset, others); err != nil {
				return out, err
			}
		}
		if err := kernel.Load(ctx, next.Ruleset, p.Inspection, o.Clear); err != nil {
			return out, &LoadError{err}
		}
		undo = append(undo, func() error { return kernel.Revert(context.WithoutCancel(ctx), p.Inspection, firewall.Before{}) })
		a.beginProbation(&next, p.previous)
	}
	for _, c := range p.files {
		was, err := a.snapshot(c.Path)
		if err != nil {
			return out, fmt.Errorf("%s: %w", c.Path, err)
		}
		if dir := filepath.Dir(c.Path); !a.System.Exists(dir) {
			undo = append(undo, func() error { return a.System.RemoveDir(dir) })
		}
		undo = append(undo, func() error { return a.putBack(was) })
		if err := a.put(c); err != nil {
			return out, err
		}
	}
	next.Version, next.LastVerified = a.Version, a.Now()
	if next.Bootstrapped.IsZero() {
		next.Bootstrapped = next.LastVerified
	}
	if !p.first || p.previous != nil {
		// To the letter: it may be of a newer version, or not for us to read.
		for _, path := range []string{store.StateFile, store.PendingFile} {
			was, err := a.snapshot(path)
			if err != nil {
				return out, fmt.Errorf("%s: %w", path, err)
			}
			undo = append(undo, func() error { return a.putBack(was) })
		}
	}
	if err := a.Store.Save(next); err != nil {
		return out, fmt.Errorf("keeping the state: %w", err)
	}
	if err := a.Store.RemovePending(); err != nil { // one of another boot, or this very change
		return out, err
	}
	start := func() error { return nil }
	if o.Service {
		if start, err = a.register(&undo); err != nil {
			return out, err
		}
	}
	if len(others) > 0 {
		// Last: from here on a boot has our rules, also after a power cut.
		if err := a.takeOver(ctx, kernel, next.Ruleset, p.Inspection, others, guarded, o, &undo); err != nil {
			return out, &TakeOverError{Names(p.Others), err}
		}
	}
	if o.Prove != nil {
		if err := o.Prove(ctx, next); err != nil {
			return out, &LoadError{err}
		}
	}
	if err := start(); err != nil {
		return out, err
	}
	if guarded || p.guard {
		if err := a.Guard.Lower(); err != nil {
			return out, err
		}
		// A service that ran before has seen the guard. Now it looks again.
		if err := a.Store.Save(next); err != nil {
			a.Log.WithError(err).Warn("the status for monitoring may be out of date for a while")
		}
	}
	return out, nil
}

// LoadError says that the kernel did not take the rules.
type LoadError struct{ err error }

func (e *LoadError) Error() string { return e.err.Error() }
func (e *LoadError) Unwrap() error { return e.err }

// register sees that the service is registered; start that it runs, once the
// rules are what they are to be: what it mends would get in the way.
func (a *Agent) register(undo *[]func() error) (start func() error, err error) {
	was, _ := a.Service.Status() // one that is not known is registered anew
	if !was.Registered {
		*undo = append(*undo, a.Service.Uninstall)
	}
	if !was.Registered || !was.Enabled {
		if err := a.Service.Install(); err != nil {
			return nil, fmt.Errorf("registering the service: %w", err)
		}
	}
	return func() error {
		if was.Active {
			return nil
		}
		if err := a.Service.Start(); err != nil {
			return fmt.Errorf("starting the service: %w", err)
		}
		return nil
	}, nil
}

func (a *Agent) put(c Change) error {
	if c.Remove {
		return a.System.Remove(c.Path)
	}
	dir := filepath.Dir(c.Path)
	if !a.System.Exists(dir) {
		if err := a.System.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return a.System.WriteFile(c.Path, c.Data, c.Mode)
}

// lines takes a text apart for a comparison.
func lines(data []byte) []string {
	return strings.Split(strings.TrimRight(string(data), "\n"), "\n")
}
