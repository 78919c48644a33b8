package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// app is what the commands share.
type app struct {
	stdout   io.Writer // what does not show is replaced
	terminal io.Writer // stdout as it is
	log      *logrus.Logger
	root     string
	config   string
	logLevel string
	sys      *system.System
}

func newRoot(stdout, stderr io.Writer, step system.Step) *cobra.Command {
	a := &app{stdout: printable{stdout}, terminal: stdout, log: logrus.New()}
	a.log.SetOutput(stderr)
	root := &cobra.Command{
		Use:   "basicfw-agent",
		Short: "Close a server at its first boot, and keep it closed",
		Long: `basicfw-agent closes a server: only the ports of a profile stay open, SSH only
for the one who made the machine, on IPv4 and IPv6, after every reboot.

  basicfw-agent bootstrap --profile web-only --client-ip 203.0.113.9
  basicfw-agent status

Settings are in /etc/basicfw/agent.ini, profiles in /etc/basicfw/profiles.d.
Exit codes: 0 fine; 1 it failed, and the rules are what they were before;
2 wrong usage or settings; 3 the machine differs from what was decided;
4 not bootstrapped.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Version:       version,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			a.sys = &system.System{Root: a.root, Step: step}
			return a.setUpLog()
		},
		RunE: func(cmd *cobra.Command, args []string) error { return cmd.Help() },
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			meant := ""
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				meant = fmt.Sprintf(" did you mean %q?", near[0])
			}
			return usageError{fmt.Errorf("unknown command %q:%s see \"basicfw-agent --help\"", args[0], meant)}
		},
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.SetVersionTemplate("{{.Version}}\n")
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), ".FlagUsages", ".FlagUsagesWrapped 80"))
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w: see \"%s --help\"", err, cmd.CommandPath())}
	})
	flags := root.PersistentFlags()
	flags.StringVar(&a.root, "root", "", "put this directory before every path below /etc, /var, /run and /usr (for tests)")
	flags.StringVar(&a.config, "config", "", "settings file (default /etc/basicfw/agent.ini)")
	flags.StringVar(&a.logLevel, "log-level", "", "error, warn, info, debug or trace (default warn; for run, what the settings say)")
	completeFiles(root, "config", "root")
	a.completeFlags(root, map[string]completer{"log-level": func() []string { return []string{"error", "warn", "info", "debug", "trace"} }})
	root.AddCommand(a.bootstrapCmd(), a.applyCmd(), a.planCmd(), a.verifyCmd(), a.statusCmd(), a.renderCmd(),
		a.openCmd(), a.closeCmd(), a.sshCmd(), a.unlockCmd(), a.lockCmd(), a.confirmCmd(), a.expireCmd(),
		a.profileCmd(), a.userDataCmd(), a.runCmd(), a.uninstallCmd(), a.versionCmd(), a.selftestCmd(),
		a.packageCmd(), a.erasedCmd(), a.prepareCmd(), a.rehearseCmd(), a.selftestTwinCmd())
	return root
}

// setUpLog sends logs to standard error.
func (a *app) setUpLog() error {
	level := logrus.WarnLevel
	if a.logLevel != "" {
		var err error
		if level, err = logrus.ParseLevel(a.logLevel); err != nil {
			return usageError{fmt.Errorf("--log-level %q: want error, warn, info, debug or trace", a.logLevel)}
		}
	}
	a.log.SetLevel(level)
	a.log.SetFormatter(plainFormatter{})
	return nil
}

// noArgs is cobra.NoArgs with our exit code.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s takes no argument, but was given %q", cmd.CommandPath(), args[0])}
	}
	return nil
}

// exactArgs is cobra.ExactArgs(1) with our exit code.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usageError{fmt.Errorf("%s wants one argument, %s, but was given %d", cmd.CommandPath(), what, len(args))}
		}
		return nil
	}
}

// forRoot is the body of a command that only root may run.
func (a *app) forRoot(do func(context.Context, *wiring) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		if os.Geteuid() != 0 {
			return fmt.Errorf("%s: only root can do this: run it with sudo", cmd.CommandPath())
		}
		w, err := a.wire()
		if err != nil {
			return err
		}
		return do(cmd.Context(), w)
	}
}

// alone is forRoot of a command that makes a change: one at a time.
func (a *app) alone(do func(context.Context, *wiring) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		return a.forRoot(func(ctx context.Context, w *wiring) error {
			lockCtx, cancel := context.WithTimeout(ctx, lockWait)
			defer cancel()
			unlock, err := w.agent.Store.Lock(lockCtx, cmd.Name())
			if err != nil {
				return err
			}
			defer unlock()
			return do(ctx, w)
		})(cmd, args)
	}
}

// lockWait is how long a command waits for another change to end.
const lockWait = 60 * time.Second
