package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// Uninstall gives the machine back as it was before bootstrap. It is a merge,
// not a snapshot: what others changed meanwhile stays. The error is
// store.ErrNone where there was nothing to give back.
//
// Where it fails, all is as it was before it, but for what other managers do.
func (a *Agent) Uninstall(ctx context.Context) (err error) {
	org, err := a.Store.LoadOriginal()
	none := errors.Is(err, store.ErrNone)
	if err != nil && !none {
		return fmt.Errorf("reading what was there before: %w", err)
	}
	kernel, in, err := a.find(ctx)
	if err != nil {
		return err
	}
	if none {
		if !in.Present {
			return store.ErrNone
		}
		for _, f := range firewall.Families { // our part of them is known all the same
			org.Files = append(org.Files, store.File{Path: a.RulesPath(f)})
		}
	}
	// The service first, so that it repairs nothing meanwhile; the record of
	// what was there behind all that it is for, so that a failure can be followed
	// by another try.
	was, err := a.Service.Status()
	if err != nil {
		return err
	}
	var undo []func() error
	defer func() {
		if err == nil {
			return
		}
		for i := len(undo) - 1; i >= 0; i-- {
			if e := undo[i](); e != nil {
				err = fmt.Errorf("%w; and on the way back: %w", err, e)
			}
		}
	}()
	if was.Registered {
		undo = append(undo, func() error { return errors.Join(a.Service.Install(), a.Service.Start()) })
	}
	if err := a.Service.Uninstall(); err != nil {
		return fmt.Errorf("removing the service: %w", err)
	}
	if err := a.giveBackOthers(ctx, &org); err != nil {
		return err
	}
	for _, path := range []string{MessageFile, IssueFile, issueLink, TableFile} {
		if org.File(path) == nil { // a record of version 0.1, or none
			org.Files = append(org.Files, store.File{Path: path})
		}
	}
	for _, file := range org.Files {
		now, err := a.snapshot(file.Path)
		if err == nil {
			undo = append(undo, func() error { return a.putBack(now) })
			err = a.giveBack(file, now)
		}
		if err != nil {
			return fmt.Errorf("giving back %s: %w", file.Path, err)
		}
	}
	if err := a.System.Touch(reloadFile); err != nil {
		a.Log.WithError(err).Info("the consoles may show for a while who could come in")
	}
	for _, dir := range org.Dirs {
		if !a.System.Exists(dir) {
			continue
		}
		undo = append(undo, func() error {
			if a.System.Exists(dir) {
				return nil
			}
			return a.System.MkdirAll(dir, 0o755)
		})
		if err := a.System.RemoveDir(dir); err != nil {
			return err
		}
	}
	if err := kernel.Remove(ctx, org.Rules); err != nil {
		return err
	}
	undo = append(undo, func() error { return kernel.Revert(context.WithoutCancel(ctx), in, org.Rules) })
	if err := a.Guard.Lower(); err != nil {
		return err
	}
	// The lock is the last to go: a service that still runs must find the state
	// gone once it has it.
	if err := a.Store.Forget(true); err != nil {
		return err
	}
	if org.Conntrack.Max > 0 {
		if err := a.Conntrack.Set(org.Conntrack); err != nil {
			a.Log.WithError(err).Warn("the kernel's table of connections keeps its size")
		}
	}
	if err := a.System.RemoveAll(store.RunDir); err != nil {
		a.Log.WithError(err).Warnf("%s stays until the next boot", store.RunDir)
	}
	return nil
}

// giveBack makes a file what it was, less what others changed in it since. It
// may have been given back before, by a run that was cut short.
func (a *Agent) giveBack(file, now store.File) error {
	if reflect.DeepEqual(file, now) {
		return nil
	}
	current := now.Data
	if f, ok := a.rulesFamily(file.Path); ok && !a.unchanged(f, file, current) {
		data, err := a.Rules.Unpersisted(current, file.Data)
		if err != nil {
			a.Log.WithError(err).Warnf("%s is no file of rules any more; it becomes what it was before bootstrap", file.Path)
		} else {
			file.Data, file.Link = data, ""
			if len(data) > 0 && !file.Existed {
				file.Existed, file.Mode = true, 0o600
			}
		}
	}
	return a.putBack(file)
}

func (a *Agent) rulesFamily(path string) (firewall.Family, bool) {
	for _, f := range firewall.Families {
		if a.RulesPath(f) == path {
			return f, true
		}
	}
	return 0, false
}

// unchanged tells whether a file of rules is still what we made of the
// original, so that the original can come back to the letter.
func (a *Agent) unchanged(f firewall.Family, file store.File, current []byte) bool {
	if len(current) == 0 {
		return true
	}
	made, err := a.Rules.Persisted(file.Data, firewall.Ruleset{}, f)
	if err != nil {
		return true
	}
	// Whatever the rules were: without them both are the same.
	rest, err := a.Rules.Unpersisted(made, file.Data)
	left, e := a.Rules.Unpersisted(current, file.Data)
	return err == nil && e == nil && bytes.Equal(rest, left)
}
