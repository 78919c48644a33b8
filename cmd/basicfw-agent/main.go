// Command basicfw-agent closes a server at its first boot, keeps it closed over
// every further one, and tells how it stands.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/bootstrap"
)

// version is set by the build: -ldflags "-X main.version=1.2.3".
var version = "0.0.0-dev"

// Exit codes, as the manual promises them.
const (
	exitFailed          = 1 // and the rules are what they were before
	exitUsage           = 2 // wrong usage or settings
	exitDrift           = 3
	exitNotBootstrapped = 4
	// exitTemporary is what another run of this program tells it: what failed may
	// not fail later (sysexits.h, EX_TEMPFAIL).
	exitTemporary = 75
)

func main() {
	// Most commands have ended before their garbage fills 16 MB, four times Go's least
	// heap, and have better to do than to look for it. The service takes that back.
	debug.SetGCPercent(4 * serviceGCPercent)
	os.Exit(run(os.Args[1:], os.Stdout, os.Stderr, nil))
}

// serviceGCPercent is Go's own default.
const serviceGCPercent = 100

// run is the program; a test may do its steps.
func run(args []string, stdout, stderr io.Writer, step system.Step) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := newRoot(stdout, stderr, step)
	root.SetArgs(args)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	code := exitCode(err)
	var silent *silentError
	if !errors.As(err, &silent) {
		for _, line := range strings.Split(err.Error(), "\n") {
			fmt.Fprintf(stderr, "basicfw-agent: %s\n", system.Printable(line))
		}
	}
	return code
}

// usageError is the user's to mend: a wrong flag, argument or command.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// silentError ends the program with a code; what there was to say was said.
type silentError struct{ code int }

func (e *silentError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

func exitCode(err error) int {
	var (
		silent  *silentError
		usage   usageError
		wrong   settings.Errors
		invalid *bootstrap.InvalidError
	)
	switch {
	case errors.As(err, &silent):
		return silent.code
	case errors.As(err, &usage), errors.As(err, &wrong), errors.As(err, &invalid):
		return exitUsage
	case errors.Is(err, store.ErrNone):
		return exitNotBootstrapped
	}
	return exitFailed
}
