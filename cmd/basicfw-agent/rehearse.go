package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

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
	data, err := json.Marshal(rehearsal{backend, rules})
	if err != nil {
		return err
	}
	_, err = a.sys.Run(ctx, system.Command{Name: system.Self, Args: a.again("rehearse"), Stdin: data, Namespace: true})
	return withoutRun(err)
}

// again are the arguments with which this program runs itself.
func (a *app) again(args ...string) []string {
	if a.root != "" {
		args = append([]string{"--root", a.root}, args...)
	}
	return args
}

// withoutRun is the error of another run of this program, as it said it; or that
// there can be none in a namespace of its own.
func withoutRun(err error) error {
	var exit *system.ExitError
	if errors.As(err, &exit) {
		text := strings.TrimPrefix(exit.Stderr, "basicfw-agent: ")
		if text == "" {
			return err
		}
		return &saidError{text, exit.Code == exitTemporary}
	}
	for _, no := range []error{syscall.EPERM, syscall.EINVAL, syscall.ENOSPC, syscall.ENOSYS, syscall.EUSERS} {
		if errors.Is(err, no) {
			return fmt.Errorf("%w: %w", agent.ErrNoRehearsal, no)
		}
	}
	return err
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
			data, err := io.ReadAll(os.Stdin)
			if err != nil {
				return err
			}
			var r rehearsal
			if err := json.NewDecoder(bytes.NewReader(data)).Decode(&r); err != nil {
				return fmt.Errorf("reading what to try out: %w", err)
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
