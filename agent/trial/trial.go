// Package trial tries rules in a child process with its own network namespace: whether
// this kernel accepts them, and what they do to packets.
package trial

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/netsim"
	"github.com/basicfw/basicfw-agent/agent/selftest"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Runner runs trials.
type Runner struct {
	System   *system.System
	Backend  func(name string) backend.Backend
	Iptables *iptables.Backend // of the namespace, if that is iptables
}

// Request is a ruleset to try. The child process reads it from standard input.
type Request struct {
	selftest.Wanted
	Backend  string `json:"backend"`
	Iptables string `json:"iptables,omitempty"` // the version of its programs, if known
}

// Answer is the result of a selftest, as the child process prints it.
type Answer struct {
	selftest.Report
	Impossible string `json:"impossible,omitempty"` // why rules cannot be tried on this machine
}

// Exit codes of the child process.
const (
	ExitTemporary = 75 // the failure may be temporary (sysexits.h, EX_TEMPFAIL)
	ExitMismatch  = 76 // the kernel does not hold what was loaded
)

// childTimeout is much longer than a trial takes, because loading may have to wait for
// another program that loads rules, and a machine that boots may be very slow.
const childTimeout = 2 * time.Minute

// runChild runs a command of this program in a new network namespace, with t as JSON
// on standard input, and returns its standard output. The error is the child's own,
// or backend.ErrNoRehearsal if the namespace cannot be created.
func (r Runner) runChild(ctx context.Context, command string, t Request) ([]byte, error) {
	data, err := json.Marshal(t)
	if err != nil {
		return nil, err
	}
	res, err := r.System.Run(ctx, system.Command{Name: system.Self, Args: system.Again(r.System.Root, command), Stdin: data, Namespace: true, Timeout: childTimeout})
	var exit *system.ExitError
	if errors.As(err, &exit) {
		if exit.Stderr != "" && !errors.Is(err, context.DeadlineExceeded) {
			cause, remedy, hinted := strings.Cut(strings.TrimPrefix(exit.Stderr, "basicfw-agent: "), " hint: ")
			err = &childError{cause, exit.Code}
			if hinted {
				err = hint.Wrap(err, "%s", remedy)
			}
		}
		return nil, err
	}
	for _, no := range []error{syscall.EPERM, syscall.EINVAL, syscall.ENOSPC, syscall.ENOSYS, syscall.EUSERS} {
		if errors.Is(err, no) { // the child did not start
			return nil, fmt.Errorf("%w: %w", backend.ErrNoRehearsal, no)
		}
	}
	return res.Stdout, err
}

// childError is the error that the child process reported, and its exit code.
type childError struct {
	text string
	code int
}

func (e *childError) Error() string   { return e.text }
func (e *childError) Temporary() bool { return e.code == ExitTemporary }

// As converts e to a *backend.MismatchError if the child process found one.
func (e *childError) As(target any) bool {
	mismatch, ok := target.(**backend.MismatchError)
	if ok = ok && e.code == ExitMismatch; ok {
		*mismatch = &backend.MismatchError{}
	}
	return ok
}

// Rehearse loads rules in a child process, with the same backend and on the same
// kernel: "iptables-restore --test" accepts rules that the kernel then refuses.
func (r Runner) Rehearse(ctx context.Context, name string, rules firewall.Ruleset) error {
	_, err := r.runChild(ctx, "rehearse", Request{Wanted: selftest.Wanted{Ruleset: rules}, Backend: name, Iptables: r.Iptables.Version()})
	return err
}

// RunRehearsal is the child process of Rehearse: it loads rules in this namespace.
func (r Runner) RunRehearsal(ctx context.Context, t Request) error {
	if err := netsim.Unused(); err != nil {
		return err
	}
	r.Iptables.HoldEmpty(t.Iptables)
	in, err := r.Backend(t.Backend).Inspect(ctx, t.Ruleset)
	if err != nil {
		return err
	}
	return in.Snapshot.Load(ctx, t.Ruleset, false)
}

// Selftest tries the rules of a state with packets, in a copy of this machine's
// network. The error is a *netsim.ImpossibleError if that is not possible here.
func (r Runner) Selftest(ctx context.Context, st store.State, families []firewall.Family) (selftest.Report, error) {
	data, err := r.runChild(ctx, "selftest-netsim", Request{
		Wanted:  selftest.Wanted{Desired: st.Desired, Ruleset: st.Ruleset, Families: families},
		Backend: st.Backend.Name,
	})
	if errors.Is(err, backend.ErrNoRehearsal) || errors.Is(err, context.DeadlineExceeded) { // the machine was too busy
		err = &netsim.ImpossibleError{Why: err}
	}
	var answer Answer
	if err == nil {
		err = json.Unmarshal(data, &answer)
	}
	if err == nil && answer.Impossible != "" {
		err = &netsim.ImpossibleError{Why: errors.New(answer.Impossible)}
	}
	if err != nil {
		return selftest.Report{}, fmt.Errorf("trying the rules: %w", err)
	}
	return answer.Report, nil
}

// RunSelftest is the child process of Selftest: it tries rules in this namespace.
func (r Runner) RunSelftest(ctx context.Context, t Request) (Answer, error) {
	answer := Answer{Report: selftest.Report{Schema: selftest.Schema}}
	var err error
	answer.Rows, err = selftest.Run(ctx, r.System, t.Wanted, func(ctx context.Context) error {
		in, err := r.Backend(t.Backend).Inspect(ctx, t.Ruleset)
		if err != nil {
			return err
		}
		answer.Backend = in.Backend
		return in.Snapshot.Load(ctx, t.Ruleset, false)
	})
	var impossible *netsim.ImpossibleError
	if errors.As(err, &impossible) {
		answer.Impossible = impossible.Why.Error()
	} else if err != nil {
		return answer, err
	}
	answer.Agrees = !slices.ContainsFunc(answer.Rows, func(row selftest.Row) bool { return !row.Agrees() })
	return answer, nil
}
