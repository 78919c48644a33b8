package apply

import (
	"context"
	"errors"
	"fmt"
	"reflect"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/motd"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// Uninstall removes the rules and files of this program and restores the firewall
// from before bootstrap. Later changes by other programs are kept. The error is
// [store.ErrNone] if nothing is installed. A failed Uninstall is rolled back, except
// for what other firewall managers do.
func (a *Applier) Uninstall(ctx context.Context) error {
	org, err := a.Store.LoadBackup()
	none := errors.Is(err, store.ErrNone)
	if err != nil && !none {
		return fmt.Errorf("reading the backup from before bootstrap: %w", err)
	}
	// In a chroot, the kernel filters for another system.
	var kernel backend.Backend
	var in backend.Inspection
	if !a.OtherKernel() {
		if kernel, in, err = a.Find(ctx); err != nil {
			return err
		}
	}
	if none {
		if !in.Present && !a.System.Exists(store.StateFile) && !a.System.Exists(store.CopyFile) {
			return store.ErrNone
		}
		a.Log.Warn(backupLost)
		org = a.unrecorded()
	}
	u := &uninstall{Applier: a, org: org}
	if err := u.run(ctx, kernel, in); err != nil {
		_, err = u.rollback(err)
		return err
	}
	if kernel != nil && org.Conntrack.Max > 0 {
		if err := a.Conntrack.Set(org.Conntrack); err != nil {
			a.Log.WithError(err).Warn("the previous size of the conntrack table could not be restored")
		}
	}
	if err := a.System.RemoveAll(store.RunDir); err != nil {
		a.Log.WithError(err).Warnf("%s could not be removed and stays until the next boot", store.RunDir)
	}
	return nil
}

// uninstall is an Uninstall in progress.
type uninstall struct {
	*Applier
	transaction
	org store.Backup
}

func (u *uninstall) run(ctx context.Context, kernel backend.Backend, in backend.Inspection) error {
	was, err := u.Service.Status()
	if err != nil {
		return err
	}
	// Remove the copy of the state first: after an interruption, no boot may take an
	// uninstalled machine for one that has lost /var.
	second, err := files.Snapshot(u.System, store.CopyFile)
	if err != nil {
		return fmt.Errorf("%s: %w", store.CopyFile, err)
	}
	if err := u.do(u.Store.RemoveCopy, func() error { return second.Restore(u.System) }); err != nil {
		return err
	}
	// Then the service, so that it repairs nothing. The backup is removed last, so that
	// a failed uninstall can be repeated.
	if was.Registered {
		u.onRollback(func() error { return errors.Join(u.Service.Install(), u.Service.Start()) })
	}
	if err := u.Service.Uninstall(); err != nil {
		return fmt.Errorf("removing the service: %w", err)
	}
	if err := u.restoreManagers(ctx); err != nil {
		return err
	}
	if err := u.restoreFiles(); err != nil {
		return err
	}
	if kernel != nil {
		if err := kernel.Remove(ctx, u.org.Rules); err != nil {
			return err
		}
		u.onRollback(func() error { return in.Snapshot.Restore(context.WithoutCancel(ctx), u.org.Rules) })
		if err := u.Guard.Lower(); err != nil {
			return err
		}
	}
	// The lock is removed after the state: a service that still runs must find no state
	// once it holds the lock.
	return u.Store.Forget()
}

// restoreFiles restores the files and directories.
func (u *uninstall) restoreFiles() error {
	for _, path := range ownFiles {
		if u.org.File(path) == nil { // a backup of version 0.1, or none
			u.org.Files = append(u.org.Files, files.File{Path: path})
		}
	}
	for _, was := range u.org.Files {
		now, err := files.Snapshot(u.System, was.Path)
		// Removing a missing file removes what a killed command left of it.
		if err == nil && (!was.Existed || !reflect.DeepEqual(was, now)) {
			restored, lost := u.Files.restored(was, now)
			if lost != nil {
				u.Log.WithError(lost).Warnf("%s has no valid rules any more and is restored from the backup", was.Path)
			}
			err = u.do(func() error { return restored.Restore(u.System) }, func() error { return now.Restore(u.System) })
		}
		if err != nil {
			return fmt.Errorf("restoring %s: %w", was.Path, err)
		}
	}
	if err := motd.Reload(u.System); err != nil {
		u.Log.WithError(err).Info("the consoles may still show the login message")
	}
	for _, dir := range u.org.Dirs {
		if !u.System.Exists(dir) {
			continue
		}
		err := u.do(func() error { return u.System.RemoveDir(dir) }, func() error {
			if u.System.Exists(dir) {
				return nil
			}
			return u.System.MkdirAll(dir, 0o755)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// restoreManagers restores other managers while our rules are still loaded, so that
// nothing is open in between. If one was uninstalled since, the policy that relied on
// its rules is not restored: it would lock the administrator out.
func (u *uninstall) restoreManagers(ctx context.Context) error {
	for _, m := range u.org.Conflicts {
		gone, err := u.Conflicts.Restore(ctx, m, false)
		if err != nil {
			return fmt.Errorf("restoring %s: %w", m.Name, err)
		}
		if !gone {
			continue
		}
		u.Log.Warnf("%s was uninstalled after bootstrap and cannot be restored", m.Name)
		for _, f := range firewall.Families {
			old := u.org.Rules.Family(f)
			old.Input, old.Output, old.Removed, old.Places = firewall.Accept, firewall.Accept, nil, nil
		}
	}
	return nil
}
