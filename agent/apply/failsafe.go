package apply

import (
	"context"
	"errors"
	"fmt"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// Recover returns the desired state for a step that must not fail because the state
// cannot be read: the state, otherwise its copy, which then replaces the state,
// otherwise the failsafe state, which is never saved. The error is [store.ErrNone] on
// a machine that was not bootstrapped.
func (a *Applier) Recover() (store.State, error) {
	st, err := a.Store.Load()
	if err == nil || errors.Is(err, store.ErrNone) {
		return st, err
	}
	a.Log.WithError(err).Warnf("the desired state cannot be read; using %s", store.CopyFile)
	if err := a.UseCopy(); err != nil {
		a.Log.Warn(err)
	}
	if st, err = a.Store.Load(); err != nil {
		a.Log.WithError(err).Warn("the desired state is replaced by the failsafe rules: no port but SSH is open, until a bootstrap")
		return a.Failsafe(err)
	}
	return st, nil
}

// UseCopy restores a lost or unreadable state from its copy, and makes the store read the copy
// if that fails.
func (a *Applier) UseCopy() error {
	defer a.Store.UseCopy()
	if _, err := a.Store.Restore(); err != nil {
		return fmt.Errorf("restoring %s from its copy: %w", store.StateFile, err)
	}
	return nil
}

// PrepareRepair repairs what a repair of the rules reads: it restores a lost or
// unreadable state, and rolls back a pending change that has expired or cannot be
// read. The rules can be repaired despite an error.
func (a *Applier) PrepareRepair(ctx context.Context) error {
	err := a.UseCopy()
	if _, e := a.Expire(ctx); e != nil {
		err = errors.Join(err, fmt.Errorf("rolling back the pending change: %w", e))
	}
	return err
}

// Failsafe returns the failsafe state, with cause as its reason: the baseline, SSH
// from any address with a rate limit, and no other port. If it is saved, it is held;
// see [store.Store.Hold].
func (a *Applier) Failsafe(cause error) (store.State, error) {
	sshPorts, why, _, err := a.Ports()
	if err != nil || len(sshPorts) == 0 {
		sshPorts, why = []uint16{22}, []string{"22: the default, because sshd's ports are unknown"}
	}
	st := store.State{Schema: store.Schema, Version: a.Version, Failsafe: cause.Error(), SSHPorts: why, Held: true,
		Desired: firewall.Failsafe(sshPorts),
		Profile: store.Choice{Name: "failsafe", Source: "failsafe", Reason: cause.Error()},
		Backend: store.Choice{Name: backend.Iptables, Source: "failsafe", Reason: "default of the failsafe rules"},
		Client:  store.Client{Source: "none", Reason: "the failsafe rules accept SSH from any address"},
	}
	if before, err := a.Store.Load(); err == nil && before.Backend.Name != "" {
		st.Backend = before.Backend // it may be the administrator's choice
	} else if err != nil && a.System.Exists(TableFile) {
		st.Backend.Name = backend.Nftables
	}
	st.Ruleset, err = firewall.Compile(st.Desired)
	return st, err
}
