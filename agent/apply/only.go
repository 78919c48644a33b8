package apply

import (
	"context"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// LoadOnly closes a machine on which nothing can be saved, not even the lock: it
// loads the rules of next and writes no file. They are lost at a reboot. If our rules
// already close the machine, they are left unchanged. Unlike LoadOnly,
// [Applier.ApplyOrHold] needs the lock, and /run for the state.
func (a *Applier) LoadOnly(ctx context.Context, next store.State, o Options) error {
	_, err := a.withFallback(next, o, func(next store.State) (Outcome, error) {
		in, err := a.Backend(next.Backend.Name).Inspect(ctx, next.Ruleset)
		if err == nil && (!in.Present || len(in.Exposed) > 0) {
			a.Adopt()
			err = in.Snapshot.Load(ctx, next.Ruleset, o.Clear)
		}
		if err != nil {
			err = &backend.Error{Err: err}
		}
		return Outcome{}, err
	})
	return err
}
