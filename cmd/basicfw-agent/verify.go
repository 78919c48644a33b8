package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent/store"
)

// noteWait is how long verify waits for another change before it does without
// noting anything.
const noteWait = 100 * time.Millisecond

// settleWait is how long a command that only looks waits for a change that is
// under way, before it tells what differs.
const settleWait = 5 * time.Second

func (a *app) verifyCmd() *cobra.Command {
	var repair bool
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Compare the machine with what was decided; exit 3 where it differs",
		Long: `Compare the rules in the kernel, the persisted files and the service with what
was decided, and name each difference. With --repair, mend them.`,
		Args: noArgs,
		RunE: a.forRoot(func(ctx context.Context, w *wiring) error {
			// To look does not need the lock. It is for noting that all is well,
			// and not waited for.
			wait := noteWait
			if repair {
				wait = lockWait
			}
			lockCtx, cancel := context.WithTimeout(ctx, wait)
			defer cancel()
			unlock, lockErr := w.agent.Store.Lock(lockCtx, "verify")
			if lockErr == nil {
				defer unlock()
			} else if repair {
				return lockErr
			}
			if _, err := a.bootstrapped(w); err != nil {
				return err
			}
			r, err := w.agent.Verify(ctx, w.ports)
			if err != nil {
				return err
			}
			if lockErr != nil && len(r.Drift) > 0 {
				// It may be the change that keeps us from the lock.
				lockCtx, cancel := context.WithTimeout(ctx, settleWait)
				defer cancel()
				if unlock, lockErr = w.agent.Store.Lock(lockCtx, "verify"); lockErr == nil {
					defer unlock()
					if r, err = w.agent.Verify(ctx, w.ports); err != nil {
						return err
					}
				}
			}
			for _, warning := range r.Warnings {
				a.log.Warn(warning)
			}
			for _, d := range r.Drift {
				fmt.Fprintln(a.stdout, d)
			}
			for _, f := range r.Inspection.Foreign {
				fmt.Fprintf(a.stdout, "note: %s %s: %s: %s\n", f.Family, f.Chain, f.Rule, f.Effect)
			}
			for _, o := range r.Inspection.Open {
				fmt.Fprintf(a.stdout, "open: %v: %s\n", o.Family, o.Why)
			}
			switch {
			case len(r.Drift) == 0 && len(r.Inspection.Open) > 0:
				// Others' rules are not ours to remove.
				fmt.Fprintf(a.stdout, "our rules are as decided, but others' open the machine; see \"basicfw-agent status\"\n")
				return &silentError{exitDrift}
			case len(r.Drift) == 0:
				fmt.Fprintf(a.stdout, "all is as decided: profile %s\n", r.State.Profile.Name)
				if lockErr == nil {
					lockErr = w.agent.Verified(r)
				}
				if lockErr != nil {
					a.log.WithError(lockErr).Warn("when this was verified could not be noted")
				}
				return nil
			case !repair:
				fmt.Fprintf(a.stdout, "%s; to repair: basicfw-agent verify --repair\n", count(len(r.Drift), "difference"))
				return &silentError{exitDrift}
			}
			out, err := w.agent.Mend(ctx, r)
			if err != nil {
				return err
			}
			a.announce(w, r.State, out.Inspection)
			fmt.Fprintf(a.stdout, "%s repaired\n", count(len(r.Drift), "difference"))
			return nil
		}),
	}
	cmd.Flags().BoolVar(&repair, "repair", false, "mend what differs")
	return cmd
}

// explainState makes a sentence for people of an error of reading the state.
func explainState(err error) error {
	if errors.Is(err, store.ErrNone) {
		return fmt.Errorf("this machine is %w: run \"basicfw-agent bootstrap\"", err)
	}
	if err != nil {
		return fmt.Errorf("%w: run \"basicfw-agent bootstrap\" to decide anew", err)
	}
	return nil
}
