package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/basicfw/basicfw-agent/agent/apply"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/lease"
	"github.com/basicfw/basicfw-agent/agent/proof"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/bootstrap"
)

// Edited is the result of a change of the settings.
type Edited struct {
	Result
	settings.Edit
	Others bool   // other pending changes of the settings also took effect
	Path   string // the file that was written; "" if none was
}

// Open opens a service, temporarily or permanently.
func (a *Agent) Open(ctx context.Context, want firewall.Service, length time.Duration) (Edited, error) {
	return a.edit(ctx, "open", false, length, func(e settings.Editor, until time.Time) (settings.Edit, error) {
		want.Until = until
		edit, err := e.Open(want)
		if len(edit.Changes) > 0 && !(firewall.Desired{Interfaces: a.found.Interfaces}).Exists(want.On) {
			a.Log.Warnf("no %s interface exists; %s will open when one appears", want.On, firewall.FormatPorts(want.Ports, want.Proto))
		}
		return edit, err
	})
}

// Close closes services.
func (a *Agent) Close(ctx context.Context, r settings.CloseRequest) (Edited, error) {
	return a.edit(ctx, "close", false, 0, func(e settings.Editor, _ time.Time) (settings.Edit, error) { return e.Close(r) })
}

// Block blocks networks on public interfaces, temporarily or permanently.
func (a *Agent) Block(ctx context.Context, r settings.BlockRequest, length time.Duration, force bool) (Edited, error) {
	res, err := a.edit(ctx, "block", force, length, func(e settings.Editor, until time.Time) (settings.Edit, error) {
		r.Networks = bootstrap.NewBlocker(a.System, a.host, a.found.Session, settings.Settings{ForceBlocks: force}).Blockable(r.Networks, e.SSH, a.Log.Warn)
		return e.Block(r, until)
	})
	if refused := new(bootstrap.BlockError); errors.As(err, &refused) {
		err = refused // the settings are valid
	}
	return res, err
}

// Unblock removes a list, or networks of lists.
func (a *Agent) Unblock(ctx context.Context, list string, networks []netip.Prefix) (Edited, error) {
	return a.edit(ctx, "unblock", false, 0, func(e settings.Editor, _ time.Time) (settings.Edit, error) { return e.Unblock(list, networks) })
}

// Who is a list of addresses and networks. With Me, it includes the caller's address.
type Who struct {
	Addresses []netip.Prefix
	Me        bool
}

// ErrNoSession reports that the caller's address is unknown.
var ErrNoSession = errors.New("cannot determine your SSH client address")

func (a *Agent) resolve(w Who) ([]netip.Prefix, error) {
	if !w.Me {
		return w.Addresses, nil
	}
	if a.found.Session == nil {
		return nil, hint.Wrap(ErrNoSession, "specify it instead of \"me\"")
	}
	return append(w.Addresses, a.found.Session.Prefix), nil
}

// AllowSSH allows sources to log in over SSH, temporarily or permanently.
func (a *Agent) AllowSSH(ctx context.Context, w Who, length time.Duration, force bool) (Edited, error) {
	return a.edit(ctx, "allow", force, length, func(e settings.Editor, until time.Time) (settings.Edit, error) {
		if err := a.host.CheckAllNamed(w.Addresses, a.Log.Warn); err != nil {
			return settings.Edit{}, err
		}
		who, err := a.resolve(w)
		if err != nil {
			return settings.Edit{}, err
		}
		return e.Allow(who, until), nil
	})
}

// RemoveSSH removes sources that may log in over SSH.
func (a *Agent) RemoveSSH(ctx context.Context, w Who, force bool) (Edited, error) {
	return a.edit(ctx, "remove", force, 0, func(e settings.Editor, _ time.Time) (settings.Edit, error) {
		who, err := a.resolve(w)
		if err != nil {
			return settings.Edit{}, err
		}
		return e.Remove(who, force)
	})
}

// edit changes local.ini with what and applies the result, as one transaction. Entries
// that it adds expire after length; zero is never.
func (a *Agent) edit(ctx context.Context, command string, force bool, length time.Duration, what func(settings.Editor, time.Time) (settings.Edit, error)) (res Edited, err error) {
	unlock, err := a.lock(ctx, command, lockWait)
	if err != nil {
		return res, err
	}
	defer unlock()
	a.kernel.Hold() // until the command ends, so that [Agent.Forwarded] reads nothing again
	until, err := firewall.EndAfter(a.Moment().Time, length)
	if err != nil {
		return res, err
	}
	previous, err := a.State()
	if err != nil {
		return res, err
	}
	s, err := settings.Load(a.System, a.config)
	if err != nil {
		return res, err
	}
	now, last, _, err := a.decide(ctx, s, false)
	var overlap *firewall.SSHPortError // "close" removes the conflict
	var blocks *bootstrap.BlockError   // "unblock" removes the conflict
	if err != nil && !errors.As(err, &overlap) && !errors.As(err, &blocks) {
		return res, err
	}
	ssh := now.Desired.SSH
	editor := settings.Editor{Settings: s, Local: a.localPath(), Now: a.Moment(), Timers: previous.Desired.Timers,
		Profile: now.Desired.Profile, Clients: now.Client.Allow, SSHPorts: ssh.Ports, Blocked: previous.Desired.Blocks, SSH: ssh,
		Unsure: lease.Detected(now), SSHOpen: ssh.Mode == firewall.SSHLimited, Listed: ssh.File}
	res.Edit, err = what(editor, until)
	switch {
	case errors.Is(err, settings.ErrLast), errors.Is(err, ErrNoSession):
		return res, err
	case err != nil:
		return res, &UsageError{err}
	case len(res.Changes) == 0:
		return res, nil
	}
	local, err := bootstrap.ChangeLocal(a.System, a.config, editor.WithPruned(res.Changes))
	if err != nil {
		return res, err
	}
	if s, err = settings.LoadEdited(a.System, a.config, local.Data); err != nil {
		return res, err
	}
	s.NewList = res.Lists
	res.Result, err = a.change(ctx, s, Request{Force: force}, job{files: append(bootstrap.ListFiles(res.Lists), *local), service: previous.Service})
	res.Others = last == nil || !now.SameRules(last.At(a.Moment()))
	res.Path = local.Path
	return res, err
}

// Confirm keeps the pending change or, if there is none, the detected client. Without
// force, the caller's session must prove that the administrator can log in.
func (a *Agent) Confirm(ctx context.Context, force bool) (st store.State, client bool, err error) {
	unlock, err := a.lock(ctx, "confirm", lockWait)
	if err != nil {
		return st, false, err
	}
	defer unlock()
	if st, err = a.State(); err != nil {
		return st, false, err
	}
	p, err := a.Pending()
	if err != nil {
		return st, false, err
	}
	session, err := a.session()
	if err != nil {
		return st, false, err
	}
	if p == nil {
		var by string
		if by, err = lease.ProveClient(session, st.At(a.Moment()), a.Moment(), force); err == nil {
			st, _, err = a.Change(ctx, lease.ConfirmClient{By: by})
		}
	} else if err = lease.Prove(session, *p, force); err == nil {
		st, err = a.Applier.Confirm(ctx)
	}
	if err == nil {
		a.announce(ctx, st)
	}
	return st, p == nil, err
}

// session returns the caller's SSH session; nil if there is none.
func (a *Agent) session() (*host.Session, error) {
	s, _ := settings.Load(a.System, a.config)
	facts, err := a.facts(s, false)
	return facts.Session, err
}

// tryFor applies rules that are rolled back after length unless they are confirmed.
func (a *Agent) tryFor(ctx context.Context, st store.State, length time.Duration, o apply.Options) (apply.Outcome, error) {
	o.Watch = func() error { // the service also rolls back, but may not be running
		self, err := os.Executable()
		if err != nil {
			return err
		}
		return a.System.Detach(self, system.Again(a.System.Root, "expire")...)
	}
	out, err := a.Try(ctx, st, length, o)
	if err == nil && out.Changed {
		out.Written, out.Removed = nil, nil // not until it is confirmed
	}
	return out, err
}

// ExpirePending waits until the pending change expires, and rolls it back unless it was
// confirmed.
func (a *Agent) ExpirePending(ctx context.Context) error {
	if err := a.ExpireWhenDue(ctx); err != nil {
		return err
	}
	if st, err := a.Store.Load(); err == nil && st.RolledBack != "" {
		a.announce(ctx, st)
	}
	return nil
}

// Unlock temporarily opens SSH to some sources, or to any address if there are none.
// With all, nothing is filtered.
func (a *Agent) Unlock(ctx context.Context, from []netip.Prefix, length time.Duration, all bool) (*firewall.Unlock, error) {
	unlock, err := a.lock(ctx, "unlock", lockWait)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if a.host, err = host.Detect(); err != nil {
		return nil, err
	}
	a.found.Interfaces = a.host.Interfaces
	if err := a.host.CheckAllNamed(from, a.Log.Warn); err != nil {
		return nil, &UsageError{fmt.Errorf("--from: %w", err)}
	}
	st, err := a.changeUnlock(ctx, lease.Unlock{From: from, All: all, Length: length})
	return st.Desired.Unlock, err
}

// EndUnlock ends an unlock. unlocked reports whether there was one.
func (a *Agent) EndUnlock(ctx context.Context) (unlocked bool, lockout *lease.LockoutError, err error) {
	unlock, err := a.lock(ctx, "lock", lockWait)
	if err != nil {
		return false, nil, err
	}
	defer unlock()
	st, err := a.State()
	unlocked = st.At(a.Moment()).Desired.Unlock != nil
	if err != nil || st.Desired.Unlock != nil || st.Held { // held: the disk has another state
		if st, err = a.changeUnlock(ctx, lease.Lock{}); err != nil {
			return unlocked, nil, err
		}
	}
	if _, err := a.session(); unlocked && err == nil {
		lockout = lease.Lockout(a.found.Session, st)
	}
	return unlocked, lockout, nil
}

func (a *Agent) changeUnlock(ctx context.Context, e lease.Event) (store.State, error) {
	if st, err := a.State(); errors.Is(err, store.ErrNone) { // any other state is recovered
		return st, err
	}
	st, _, err := a.Change(ctx, e)
	if err == nil {
		a.announce(ctx, st)
		(&proof.Proof{Live: a.Live, Facts: a.found, Families: a.Families, Next: st, Now: a.Moment(), Log: a.Log}).Warn(ctx)
	}
	return st, err
}
