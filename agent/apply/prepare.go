package apply

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/motd"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// prepared is a change that was computed and has not begun.
type prepared struct {
	Outcome
	options  Options // including those that the change implies
	load     bool    // the rules in the kernel differ
	files    []files.Change
	previous *store.State

	original store.Backup // what uninstall restores
	first    bool         // there is no backup yet
	lost     bool         // the backup is lost
	recorded bool         // original equals the backup on disk
	before   store.Backup // the backup on disk, if any
}

func (a *Applier) prepare(ctx context.Context, next store.State, o Options) (prepared, error) {
	var p prepared
	in, err := a.Backend(next.Backend.Name).Inspect(ctx, next.Ruleset)
	if err != nil {
		return p, &backend.Error{Err: err}
	}
	p.Inspection = in
	if p.previous = o.Previous; p.previous == nil {
		switch st, err := a.Store.Load(); {
		case err == nil:
			p.previous = &st
		case !errors.Is(err, store.ErrNone):
			a.Log.WithError(err).Warn("the previous state cannot be used and is replaced")
		}
	}
	if p.previous != nil {
		// Other programs' rules in INPUT may have no effect on one backend and be
		// terminal for the other.
		was := p.previous.Backend.Name
		o.Clear = o.Clear || was != "" && was != next.Backend.Name
	}
	p.options = o
	if o.Clear {
		p.Removed = in.Foreign
	}
	p.load = len(in.Drift) > 0 || o.Clear && len(in.Foreign) > 0
	if o.TakeOver || o.Refuse {
		if p.Others, err = a.Conflicts.Find(in.Conflicts); err != nil {
			return p, fmt.Errorf("looking for other firewall managers: %w", err)
		}
	}
	p.load = p.load || o.TakeOver && len(p.Others) > 0
	p.Guarded = a.Guard.Up()
	if err := a.prepareFiles(&p, next); err != nil {
		return p, err
	}
	if p.recorded = next.Held; !next.Held {
		if err := a.prepareBackup(&p); err != nil {
			return p, err
		}
	}
	if o.Service {
		st, err := a.Service.Status()
		p.Registered = err != nil || !st.Registered || !st.Enabled
	}
	p.Changed = p.load || p.Guarded || len(p.files) > 0 || p.previous == nil || p.Registered || !Equivalent(*p.previous, next)
	return p, nil
}

// foresee checks the effect of the change before it begins. What remains after
// another manager is stopped cannot be predicted.
func (p *prepared) foresee(ctx context.Context) error {
	o := p.options
	switch {
	case o.Proof == nil:
		return nil
	case !p.load:
		return refused(o.Proof.Test(ctx))
	case o.TakeOver && len(p.Others) > 0:
		return refused(o.Proof.Begin(ctx, nil))
	}
	return refused(o.Proof.Begin(ctx, func(live, own exposure.Ruleset) exposure.Ruleset {
		return p.Inspection.Snapshot.Predict(ctx, live, own, o.Clear)
	}))
}

// prepareFiles finds the files that differ from their expected content.
func (a *Applier) prepareFiles(p *prepared, next store.State) error {
	if next.Held {
		return nil // for this boot only
	}
	rules, err := a.Files.Wanted(next)
	if err != nil {
		return err
	}
	var all []files.Change
	for _, f := range rules {
		if f.Broken != nil {
			a.Log.WithError(f.Broken).Warnf("%s has no valid rules and is replaced", f.Path)
		}
		all = append(all, f.Change)
	}
	for _, f := range append(all, p.options.Files...) {
		if same, err := f.Same(a.System); err != nil {
			return err
		} else if same {
			continue
		}
		p.files = append(p.files, f)
		if f.Remove {
			p.Deleted = append(p.Deleted, f.Path)
		} else {
			p.Written = append(p.Written, f.Path)
		}
	}
	return nil
}

// prepareBackup computes the backup.
func (a *Applier) prepareBackup(p *prepared) (err error) {
	in, o := p.Inspection, p.options
	p.original, err = a.Store.LoadBackup()
	switch {
	case errors.Is(err, store.ErrNone) && (in.Present || a.System.Exists(store.StateFile) || a.System.Exists(store.CopyFile)):
		// The present rules and files are ours, and not to be restored.
		a.Log.Warn(backupLost)
		p.lost, p.original = true, a.unrecorded()
		p.recorded = !addRemoved(&p.original, in, o)
	case errors.Is(err, store.ErrNone):
		p.first = true
		p.original, err = a.record(in, o)
		return err
	case err != nil && (p.previous == nil || o.Clear || o.TakeOver && len(p.Others) > 0):
		return fmt.Errorf("reading the backup from before bootstrap: %w", err)
	case err != nil: // nothing has to be added
		a.Log.WithError(err).Warn("the backup from before bootstrap cannot be read, and uninstall could not restore it")
		p.recorded = true
	default:
		p.before = p.original
		p.before.Conflicts = slices.Clone(p.original.Conflicts)
		p.recorded = !addRemoved(&p.original, in, o)
	}
	return nil
}

// record returns the backup of a machine before the first change.
func (a *Applier) record(in backend.Inspection, o Options) (store.Backup, error) {
	org := store.Backup{Rules: in.Backup}
	if !o.Clear {
		for _, f := range firewall.Families {
			org.Rules.Family(f).Removed, org.Rules.Family(f).Places = nil, nil
		}
	}
	paths := append(slices.Clone(o.Record), ownFiles...)
	for _, f := range firewall.Families {
		paths = append(paths, a.Files.Path(f))
	}
	for _, path := range paths {
		file, err := files.Snapshot(a.System, path)
		if err != nil {
			return org, fmt.Errorf("backing up %s: %w", path, err)
		}
		org.Files = append(org.Files, file)
	}
	for _, path := range append(paths, store.CopyFile) {
		if dir := filepath.Dir(path); !a.System.Exists(dir) && !slices.Contains(org.Dirs, dir) {
			org.Dirs = append(org.Dirs, dir)
		}
	}
	return org, nil
}

// ownFiles are the files that only this program writes.
var ownFiles = []string{motd.MessageFile, motd.IssueFile, motd.IssueLink, TableFile}

// backupLost warns of a lost backup.
const backupLost = "the backup from before bootstrap is lost: uninstall can remove basicfw-agent's rules, but not restore what bootstrap removed"

// unrecorded returns a replacement for a lost backup: our part of the persisted rules
// is recognised without it.
func (a *Applier) unrecorded() (org store.Backup) {
	for _, f := range firewall.Families {
		org.Files = append(org.Files, files.File{Path: a.Files.Path(f)})
	}
	return org
}

// addRemoved adds the rules that a later change with Clear removes to those that the
// first one removed.
func addRemoved(org *store.Backup, in backend.Inspection, o Options) (changed bool) {
	if !o.Clear {
		return false
	}
	for _, f := range firewall.Families {
		to := org.Rules.Family(f)
		more := slices.DeleteFunc(slices.Clone(in.Backup.Family(f).Removed), func(r string) bool {
			return slices.Contains(to.Removed, r) // an interrupted uninstall has restored it
		})
		if len(more) > 0 {
			to.Removed, to.Places = append(to.Removed, more...), nil
			changed = true
		}
	}
	return changed
}
