package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// editSettings has a command change local.ini and brings what follows into
// effect: both or neither.
func (a *app) editSettings(ctx context.Context, w *wiring, force bool, what func(settings.Editor) (settings.Edit, error)) error {
	service, err := a.bootstrapped(w)
	if err != nil {
		return err
	}
	s, err := settings.Load(a.sys, a.config)
	if err != nil {
		return err
	}
	now, previous, _, err := a.decide(w, s, convergeRequest{})
	if err != nil {
		return err
	}
	editor := a.editor(w, s)
	editor.Profile, editor.Clients, editor.SSHPorts = now.Desired.Profile, now.Client.Allow, now.Desired.SSH.Ports
	editor.Unsure = agent.Detected(now)
	edit, err := what(editor)
	switch {
	case errors.Is(err, settings.ErrLast), errors.Is(err, errNoSession):
		return err
	case err != nil:
		return usageError{err}
	case len(edit.Changes) == 0:
		a.sayAll(edit.Said)
		return nil
	}
	local, err := a.localChange(withPruned(edit.Changes, editor.Prune()))
	if err != nil {
		return err
	}
	if s, err = settings.LoadEdited(a.sys, a.config, local.Data); err != nil {
		return err
	}
	return a.converge(ctx, w, s, convergeRequest{local: local, previous: previous, service: service, force: force, show: func(st store.State) {
		a.sayAll(edit.Said)
		if slices.ContainsFunc(edit.Changes, func(c settings.Change) bool { return c.Value != "" }) {
			fmt.Fprintf(a.stdout, "  written to %s\n", local.Path)
		}
		if touchesSSH(edit.Changes) {
			fmt.Fprintf(a.stdout, "  ssh is on %s\n", sshSentence(st))
			for _, f := range st.Desired.SSH.Nobodys() {
				fmt.Fprintf(a.stdout, "  ssh over %v is for nobody: no address of that family is allowed\n", f)
			}
		}
		if previous == nil || !now.Ruleset.Equal(previous.At(w.agent.Moment()).Ruleset) {
			fmt.Fprintln(a.stdout, "  what else had changed since the last apply is in effect now, too")
		}
	}})
}

// editor is what knows how to change the settings.
func (a *app) editor(w *wiring, s settings.Settings) settings.Editor {
	return settings.Editor{Settings: s, Local: a.localPath(), Now: w.agent.Now()}
}

// prune is local.ini without what has ended; nil is as it is.
func (a *app) prune(w *wiring) (*agent.Change, error) {
	s, err := settings.Load(a.sys, a.config)
	if err != nil {
		return nil, err
	}
	return a.localChange(a.editor(w, s).Prune())
}

// withPruned adds the changes that only clean up to those that were asked for.
func withPruned(asked, pruned []settings.Change) []settings.Change {
	for _, p := range pruned {
		if !slices.ContainsFunc(asked, func(c settings.Change) bool { return c.Section == p.Section && c.Key == p.Key }) {
			asked = append(asked, p)
		}
	}
	return asked
}

func touchesSSH(changes []settings.Change) bool {
	return slices.ContainsFunc(changes, func(c settings.Change) bool { return c.Section == "ssh" })
}

func (a *app) sayAll(sentences []string) {
	for _, s := range sentences {
		fmt.Fprintln(a.stdout, s)
	}
}

// ends gives when something ends that is to last for a time; no time is never.
func (w *wiring) ends(duration string) (time.Time, error) {
	if duration == "" {
		return time.Time{}, nil
	}
	d, err := firewall.ParseFor(duration)
	if err != nil {
		return time.Time{}, usageError{fmt.Errorf("--for: %w", err)}
	}
	// Whole seconds are all that the kernel counts.
	end := w.agent.Now().Add(d).UTC().Truncate(time.Second)
	if err := firewall.CheckTime(end); err != nil {
		return time.Time{}, fmt.Errorf("--for %s: %w", duration, err)
	}
	return end, nil
}
