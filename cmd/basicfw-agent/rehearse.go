package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/twin"
)

// rehearsal is what is tried out.
type rehearsal struct {
	Backend string           `json:"backend"`
	Ruleset firewall.Ruleset `json:"ruleset"`
}

// rehearse has another run of this program load rules in a network namespace of
// its own, with the same backend, on this very kernel: "iptables-restore --test"
// takes what the kernel then refuses.
func (a *app) rehearse(ctx context.Context, backend string, rules firewall.Ruleset) error {
	_, err := a.elsewhere(ctx, "rehearse", rehearsal{backend, rules})
	return err
}

// elsewhereLimit bounds what is done elsewhere. It takes a fraction of a second, but
// loading may have to wait for another program that loads rules.
const elsewhereLimit = 30 * time.Second

// elsewhere has this program run one of its commands in a network namespace of its
// own: all of it is there then, with the programs that it runs. The command reads
// the request as JSON, and what it prints comes back. The error is what the
// command said, or agent.ErrNoRehearsal where there can be no such namespace.
func (a *app) elsewhere(ctx context.Context, command string, request any) ([]byte, error) {
	data, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	args := []string{command}
	if a.root != "" {
		args = []string{"--root", a.root, command}
	}
	res, err := a.sys.Run(ctx, system.Command{Name: system.Self, Args: args, Stdin: data, Namespace: true, Timeout: elsewhereLimit})
	var exit *system.ExitError
	if errors.As(err, &exit) {
		if exit.Stderr != "" && !errors.Is(err, context.DeadlineExceeded) {
			err = &saidError{strings.TrimPrefix(exit.Stderr, "basicfw-agent: "), exit.Code == exitTemporary}
		}
		return nil, err
	}
	for _, no := range []error{syscall.EPERM, syscall.EINVAL, syscall.ENOSPC, syscall.ENOSYS, syscall.EUSERS} {
		if errors.Is(err, no) { // it was not even started
			return nil, fmt.Errorf("%w: %w", agent.ErrNoRehearsal, no)
		}
	}
	return res.Stdout, err
}

// saidError is what another run of this program said.
type saidError struct {
	text      string
	temporary bool
}

func (e *saidError) Error() string   { return e.text }
func (e *saidError) Temporary() bool { return e.temporary }

// rehearseCmd is the other run. It is not for people.
func (a *app) rehearseCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "rehearse",
		Short:  "Load rules in this network namespace, which is nobody's",
		Hidden: true,
		Args:   noArgs,
		RunE: a.forRoot(func(ctx context.Context, w *wiring) error {
			var r rehearsal
			if err := json.NewDecoder(os.Stdin).Decode(&r); err != nil {
				return usageError{fmt.Errorf("reading what to try out from standard input: %w: this is for the program itself", err)}
			}
			if err := twin.Unused(); err != nil {
				return err
			}
			kernel := w.agent.Kernel(r.Backend)
			in, err := kernel.Inspect(ctx, r.Ruleset)
			if err != nil {
				return err
			}
			err = kernel.Load(ctx, r.Ruleset, in, false)
			var passes interface{ Temporary() bool }
			if errors.As(err, &passes) && passes.Temporary() {
				fmt.Fprintln(os.Stderr, err)
				return &silentError{exitTemporary}
			}
			return err
		}),
	}
}
