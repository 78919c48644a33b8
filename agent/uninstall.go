package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// Uninstall gives the machine back as it was before bootstrap. It is a merge,
// not a snapshot: what others changed meanwhile stays. The error is
// store.ErrNone where there was nothing to give back.
func (a *Agent) Uninstall(ctx context.Context) error {
	org, err := a.Store.LoadOriginal()
	none := errors.Is(err, store.ErrNone)
	if err != nil && !none {
		return fmt.Errorf("reading what was there before: %w", err)
	}
	if none {
		in, err := a.Kernel.Inspect(ctx, firewall.Ruleset{})
		if err != nil {
			return err
		}
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
	was, _ := a.Service.Status()
	if err := a.Service.Uninstall(); err != nil {
		return fmt.Errorf("removing the service: %w", err)
	}
	err = a.giveBackOthers(ctx, &org)
	if err == nil {
		err = a.Kernel.Remove(ctx, org.Rules)
	}
	if err == nil {
		err = a.Guard.Lower()
	}
	if err != nil {
		if was.Registered {
			err = errors.Join(err, a.Service.Install(), a.Service.Start())
		}
		return err
	}
	for _, path := range []string{MessageFile, IssueFile, issueLink} {
		if org.File(path) == nil { // a record of version 0.1, or none
			org.Files = append(org.Files, store.File{Path: path})
		}
	}
	for _, file := range org.Files {
		if err := a.giveBack(file); err != nil {
			return fmt.Errorf("giving back %s: %w", file.Path, err)
		}
	}
	if err := a.System.Touch(reloadFile); err != nil {
		a.Log.WithError(err).Info("the consoles may show for a while who could come in")
	}
	for _, dir := range org.Dirs {
		if err := a.System.RemoveDir(dir); err != nil {
			return err
		}
	}
	if org.Conntrack.Max > 0 {
		if err := a.Conntrack.Set(org.Conntrack); err != nil {
			a.Log.WithError(err).Warn("the kernel's table of connections keeps its size")
		}
	}
	// The lock is the last to go: a service that still runs must find the state
	// gone once it has it.
	if err := a.Store.Forget(true); err != nil {
		return err
	}
	return a.System.RemoveAll(store.RunDir)
}

// giveBack makes a file what it was, less what others changed in it since.
func (a *Agent) giveBack(file store.File) error {
	current, err := a.System.ReadLimited(file.Path, maxRules)
	if errors.Is(err, fs.ErrNotExist) {
		current, err = nil, nil
	}
	if err != nil {
		return err
	}
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
	st, err := a.Store.Load()
	if err != nil {
		return false
	}
	ours, err := a.Rules.Persisted(file.Data, st.Ruleset, f)
	return err != nil || string(ours) == string(current)
}
