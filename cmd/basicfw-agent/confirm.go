package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
)

func (a *app) confirmCmd() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "confirm",
		Short: "Keep the change, or the client, that waits for a confirmation",
		Long: `Keep the change that "basicfw-agent apply --confirm" has loaded. Where none waits,
keep SSH pinned to the client that bootstrap detected. Log in anew and type it
there: a session that is older than the change lives on by itself and proves
nothing, so it is refused in one, unless forced.`,
		Args: noArgs,
		RunE: a.alone(func(ctx context.Context, w *wiring) error {
			if _, err := a.bootstrapped(w); err != nil {
				return err
			}
			p, err := w.agent.Pending()
			if err != nil {
				return err
			}
			if p == nil {
				return a.confirmClient(ctx, w, force)
			}
			if !force {
				if err := a.proves(w, *p); err != nil {
					return err
				}
			}
			st, err := w.agent.Confirm(ctx)
			if err != nil {
				return err
			}
			fmt.Fprintf(a.stdout, "confirmed: profile %s stays\n", st.Profile.Name)
			a.announce(w, st, firewall.Inspection{})
			return nil
		}),
	}
	cmd.Flags().BoolVar(&force, "force", false, "also from a session that proves nothing")
	return cmd
}

// confirmClient keeps SSH pinned to the client that was detected.
func (a *app) confirmClient(ctx context.Context, w *wiring, force bool) error {
	st, err := w.state()
	if err != nil {
		return err
	}
	m := w.agent.Moment()
	if st = st.At(m); !agent.Detected(st) {
		return explainNothingPending(w)
	}
	by := "confirm --force"
	if !force {
		if by, err = a.provesClient(w, st); err != nil {
			return err
		}
	}
	if st, err = w.agent.ConfirmClient(ctx, by); err != nil {
		return err
	}
	fmt.Fprintf(a.stdout, "confirmed: SSH stays for %s\n", strings.Join(agent.SSHOf(st).Allow, ", "))
	a.announce(w, st, firewall.Inspection{})
	return nil
}

// provesClient tells by what the caller's session proves that the client which
// was detected is the owner's: it comes from there, or from the console.
func (a *app) provesClient(w *wiring, st store.State) (by string, err error) {
	s, _ := settings.Load(a.sys, a.config)
	facts, err := w.facts(s, false)
	if err != nil {
		return "", err
	}
	switch session := facts.Session; {
	case session == nil:
		return "confirm, at the console", nil
	case agent.Proves(*session, st, w.agent.Moment()):
		return "confirm, in a session from there", nil
	case agent.FromClient(*session, st):
		return "", errors.New("this session is older than the rules and proves nothing: log in anew and confirm there, or use --force")
	default:
		return "", fmt.Errorf("you come from %s, and the client that was detected is %s: to let yourself in, \"basicfw-agent ssh allow me\"; to keep that client all the same, use --force",
			session.From, strings.Join(firewall.FormatPrefixes(st.Client.Allow), ", "))
	}
}

// explainNothingPending says what became of the last change, if that is known.
func explainNothingPending(w *wiring) error {
	if st, err := w.agent.Store.Load(); err == nil && st.TakenBack != "" {
		return fmt.Errorf("%w: %s", agent.ErrNothingPending, st.TakenBack)
	}
	return fmt.Errorf("%w: \"basicfw-agent apply --confirm 5m\" makes one", agent.ErrNothingPending)
}

// proves tells why the caller's session does not prove that the change lets its
// owner in; nil where it does, or where the caller is at the console.
func (a *app) proves(w *wiring, p store.Pending) error {
	s, _ := settings.Load(a.sys, a.config)
	facts, err := w.facts(s, false)
	if err != nil {
		return err
	}
	session := facts.Session
	if session == nil {
		return nil
	}
	if session.Began < p.Window.Began {
		return errors.New("this session is older than the change and proves nothing: log in anew and confirm there, or use --force")
	}
	ssh := p.State.Desired.SSH
	if _, may := ssh.AllowedBy(session.From); !may && ssh.Mode == firewall.SSHPinned {
		return fmt.Errorf("you come from %s, which could not log in by the new rules: let the change go, or use --force", session.From)
	}
	return nil
}

// tryFor has rules for a time, unless they are confirmed.
func (a *app) tryFor(ctx context.Context, w *wiring, st store.State, length time.Duration, o agent.Options) error {
	out, err := w.agent.Try(ctx, st, length, o)
	if err != nil {
		return explainPending(w, err)
	}
	if !out.Changed {
		a.showOutcome(st, out)
		return nil
	}
	// The service does this too, but it may not be there.
	if err := a.watchPending(); err != nil {
		return errors.Join(err, w.agent.TakeBack(ctx, "nothing would have brought back the former rules"))
	}
	out.Files = nil
	a.showOutcome(st, out)
	fmt.Fprintf(a.stdout, "the former rules come back in %v, and at a reboot, unless you log in anew and run: basicfw-agent confirm\n", length)
	a.announce(w, st, out.Inspection)
	return nil
}

// explainPending adds to ErrPending what can be done.
func explainPending(w *wiring, err error) error {
	p, e := w.agent.Pending()
	if !errors.Is(err, agent.ErrPending) || e != nil || p == nil {
		return err
	}
	return fmt.Errorf("%w until %s, and this would be another: run \"basicfw-agent confirm\", or wait until the former rules are back", err, firewall.FormatTime(p.Window.Until))
}

// refusePending keeps a change from going over one that waits.
func refusePending(w *wiring) error {
	p, err := w.agent.Pending()
	if err != nil || p == nil {
		return err
	}
	return explainPending(w, agent.ErrPending)
}

// watchPending starts this program once more, to wait for the end of the change.
func (a *app) watchPending() error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := []string{"expire"}
	if a.root != "" {
		args = append([]string{"--root", a.root}, args...)
	}
	return a.sys.Detach(self, args...)
}

// expireCmd waits for the end of a change that nobody confirms.
func (a *app) expireCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "expire",
		Short:  "Take back the change that waits, when its time is over",
		Hidden: true,
		Args:   noArgs,
		RunE: a.forRoot(func(ctx context.Context, w *wiring) error {
			for {
				p, err := w.agent.Pending()
				if err != nil || p == nil {
					break
				}
				// Its last second is a part of it. The clock may be set meanwhile.
				m := w.agent.Moment()
				left := p.Window.End(m).Add(time.Second).Sub(m.Time)
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(min(max(left, 10*time.Millisecond), time.Minute)):
				}
			}
			unlock, err := w.agent.Store.Lock(ctx, "expire")
			if err != nil {
				return err
			}
			defer unlock()
			// A disk that is full, another program at the same tables: there is
			// nobody else to try again.
			for tries := 0; tries < 60; tries++ {
				if err = w.agent.Expire(ctx); err == nil {
					break
				}
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(time.Second):
				}
			}
			if err != nil {
				return err
			}
			if st, err := w.agent.Store.Load(); err == nil && st.TakenBack != "" {
				a.announce(w, st, firewall.Inspection{})
			}
			return nil
		}),
	}
}
