//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/trial"
)

// hidden returns the builder of an internal command, which the package's scriptlets,
// the service or the program itself runs.
func hidden(use, short string, do func(*agent.Agent, context.Context) error) func(*app) *cobra.Command {
	return func(a *app) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Hidden: true, Args: noArgs,
			RunE: a.forRoot(func(ctx context.Context, machine *agent.Agent) error { return do(machine, ctx) })}
	}
}

// erasedCmd is uninstall for the package's scriptlet. rpm 6, and rpm 4.20 with its
// plugin unshare, run scriptlets in a separate network namespace (macro
// __transaction_unshare_nonet). There are no rules there, so uninstall would succeed
// and remove nothing. The rules to remove are in the namespace of the calling rpm.
func (a *app) erasedCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "package-erased PID",
		Short:  "Uninstall in the network namespace of the process that erases the package",
		Hidden: true,
		Args:   oneArg("a process ID"),
		RunE: func(_ *cobra.Command, args []string) error {
			pid, err := strconv.Atoi(args[0])
			if err != nil {
				return usageError{fmt.Errorf("%q is not a process ID", args[0])}
			}
			command := []string{"uninstall"}
			if a.root != "" {
				command = append(command, "--root", a.root)
			}
			return system.Reexec(pid, command...)
		},
	}
}

// trialCmd is the child's side of a trial, in an otherwise unused network namespace.
// The request comes from standard input.
func (a *app) trialCmd(use, short string, do func(context.Context, trial.Runner, trial.Request) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Hidden: true, Args: noArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		var request trial.Request
		err := json.NewDecoder(cmd.InOrStdin()).Decode(&request)
		if err == nil {
			err = request.Ruleset.Check()
		}
		if err != nil {
			return usageError{fmt.Errorf("reading the request of this internal command from standard input: %w", err)}
		}
		return a.forRoot(func(ctx context.Context, machine *agent.Agent) error { return do(ctx, machine.Trial(), request) })(cmd, nil)
	}}
}

func (a *app) rehearseCmd() *cobra.Command {
	const short = "Load rules in this otherwise unused network namespace"
	return a.trialCmd("rehearse", short, func(ctx context.Context, runner trial.Runner, request trial.Request) error {
		err := runner.RunRehearsal(ctx, request)
		var passes interface{ Temporary() bool }
		var mismatch *backend.MismatchError
		code := 0
		switch {
		case errors.As(err, &passes) && passes.Temporary():
			code = trial.ExitTemporary
		case errors.As(err, &mismatch):
			code = trial.ExitMismatch
		default:
			return err
		}
		fmt.Fprintln(os.Stderr, err)
		return &silentError{code}
	})
}

func (a *app) selftestNetsimCmd() *cobra.Command {
	const short = "Test rules in this otherwise unused network namespace"
	return a.trialCmd("selftest-netsim", short, func(ctx context.Context, runner trial.Runner, request trial.Request) error {
		answer, err := runner.RunSelftest(ctx, request)
		if err != nil {
			return err
		}
		return json.NewEncoder(a.terminal).Encode(answer)
	})
}
