//go:build linux

// Command basicfw-agent closes a server at its first boot, keeps it closed across
// reboots, and reports its status.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/agent/verify"
	"github.com/basicfw/basicfw-agent/bootstrap"
)

// version is set by the build: -ldflags "-X main.version=1.2.3".
var version = "0.0.0-dev"

// Exit codes, as documented in the manual.
const (
	exitFailed          = 1 // the rules are unchanged
	exitUsage           = 2 // invalid usage or settings
	exitDrift           = 3
	exitNotBootstrapped = 4
	exitPerhaps         = 5 // explain: depends on what is not modelled
)

func main() {
	if code, ended := system.Supervise(os.Stderr); ended {
		os.Exit(code)
	}
	// Most commands end before their garbage fills 16 MB, four times Go's minimum heap,
	// so collecting it earlier is wasted work. The service overrides this.
	debug.SetGCPercent(400)
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr, nil))
}

// run is the program. A test may pass step to intercept its steps.
func run(args []string, stdout, stderr io.Writer, step system.Step) int {
	err := newRoot(args, stdout, stderr, step).Execute()
	if err == nil {
		return 0
	}
	if !errors.As(err, new(*silentError)) {
		for _, line := range strings.Split(err.Error(), "\n") {
			fmt.Fprintf(stderr, "basicfw-agent: %s\n", system.Printable(line))
		}
		if h := hint.Of(err); h != "" {
			fmt.Fprintf(stderr, "hint: %s\n", system.Printable(h))
		}
	}
	return exitCode(err)
}

// usageError is a wrong flag, argument or command.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// silentError ends the program with an exit code and prints nothing more.
type silentError struct{ code int }

func (e *silentError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

func exitCode(err error) int {
	var (
		silent  *silentError
		usage   usageError
		refused *agent.UsageError
		wrong   settings.Errors
		invalid *bootstrap.InvalidError
		partial *verify.PartialError
	)
	switch {
	case errors.As(err, &silent):
		return silent.code
	case errors.As(err, &usage), errors.As(err, &refused), errors.As(err, &wrong), errors.As(err, &invalid):
		return exitUsage
	case errors.As(err, &partial):
		return exitDrift
	case errors.Is(err, store.ErrNone):
		return exitNotBootstrapped
	}
	return exitFailed
}

func (a *app) runCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Run as the service: load, verify, repair and report",
		Long: `Load the last applied rules, read them back, repair any drift, and notify the
service manager that the machine is closed. Then keep running: repair what other
programs change, and follow changes of interfaces and of sshd. The service runs
this command. It ends on SIGTERM and leaves the rules loaded.`,
		Args: noArgs,
		RunE: a.forRoot(func(ctx context.Context, machine *agent.Agent) error {
			// The journal adds timestamps and colours.
			a.log.SetFormatter(&logrus.TextFormatter{DisableTimestamp: true, DisableColors: true})
			s, err := settings.Load(a.sys, a.config)
			if err != nil {
				a.log.WithError(err).Warn("the settings are invalid; enforcing the last applied rules")
			}
			if a.logLevel == "" {
				if level, err := logrus.ParseLevel(s.LogLevel); err == nil {
					a.log.SetLevel(level)
				}
			}
			// Go's minimum heap is then 1 MB. The service is mostly idle, and needs less
			// than that between two checks.
			debug.SetGCPercent(25)
			// A huge page is 2 MB, of which the heap needs a part. An old kernel refuses this,
			// which costs only memory.
			_ = unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0)
			return machine.Run(ctx, s, func(status string) {
				if _, err := daemon.SdNotify(false, "READY=1\nSTATUS="+system.Printable(status)); err != nil {
					a.log.WithError(err).Warn("cannot notify the service manager")
				}
				// Startup needed memory that is no longer used.
				debug.FreeOSMemory()
			})
		}),
	}
}

func (a *app) versionCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  noArgs,
		RunE: func(*cobra.Command, []string) error {
			_, err := fmt.Fprintln(a.stdout, version)
			return err
		},
	}
}
