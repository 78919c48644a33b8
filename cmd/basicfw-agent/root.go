//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// app is the state that all commands share.
type app struct {
	stdout   io.Writer // replaces unprintable characters
	terminal io.Writer // stdout, unfiltered
	log      *logrus.Logger
	root     string
	config   string
	logLevel string
	sys      *system.System
}

// commands are the commands of the program, with their builders.
var commands = []struct {
	name  string
	build func(*app) *cobra.Command
}{
	{"bootstrap", (*app).bootstrapCmd},
	{"apply", (*app).applyCmd},
	{"plan", (*app).planCmd},
	{"verify", (*app).verifyCmd},
	{"status", (*app).statusCmd},
	{"exposure", (*app).exposureCmd},
	{"explain", (*app).explainCmd},
	{"render", (*app).renderCmd},
	{"open", (*app).openCmd},
	{"close", (*app).closeCmd},
	{"block", (*app).blockCmd},
	{"unblock", (*app).unblockCmd},
	{"ssh", (*app).sshCmd},
	{"unlock", (*app).unlockCmd},
	{"lock", (*app).lockCmd},
	{"confirm", (*app).confirmCmd},
	{"expire", hidden("expire", "Roll back the pending change when its time expires", (*agent.Agent).ExpirePending)},
	{"profile", (*app).profileCmd},
	{"user-data", (*app).userDataCmd},
	{"run", (*app).runCmd},
	{"uninstall", (*app).uninstallCmd},
	{"version", (*app).versionCmd},
	{"selftest", (*app).selftestCmd},
	{"package-upgraded", hidden("package-upgraded", "Refresh the service after an upgrade of the package", (*agent.Agent).Upgraded)},
	{"package-erased", (*app).erasedCmd},
	{"prepare", hidden("prepare", "Load the kernel modules that the service will need", (*agent.Agent).Prepare)}, // its sandbox forbids it
	{"rehearse", (*app).rehearseCmd},
	{"selftest-netsim", (*app).selftestNetsimCmd},
}

// newRoot returns the root command for a call with args. Only the commands that args
// name are built. If args name none, all are: help and completion need them.
func newRoot(args []string, stdout, stderr io.Writer, step system.Step) *cobra.Command {
	a := &app{stdout: printable{stdout}, terminal: stdout, log: logrus.New()}
	a.log.SetOutput(stderr)
	root := &cobra.Command{
		Use:   "basicfw-agent",
		Short: "Close a server at its first boot, and keep it closed",
		Long: `basicfw-agent closes a server. Only the ports of a profile are open, and SSH
only to the provisioning client, on IPv4 and IPv6, at every boot.

  basicfw-agent bootstrap --profile web-only --client-ip 203.0.113.9
  basicfw-agent status

Settings are in /etc/basicfw/agent.ini, profiles in /etc/basicfw/profiles.d.
Exit codes: 0 success; 1 failure, and the rules are unchanged; 2 invalid usage
or settings; 3 the machine differs from its desired state; 4 not bootstrapped.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			a.sys = &system.System{Root: a.root, Step: step}
			return a.setUpLog()
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if asked, _ := cmd.Flags().GetBool("version"); asked {
				_, err := fmt.Fprintln(stdout, version)
				return err
			}
			return cmd.Help()
		},
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			meant := ""
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				meant = fmt.Sprintf("did you mean %q? ", near[0])
			}
			return usageError{hint.Wrap(fmt.Errorf("unknown command %q", args[0]), "%ssee \"basicfw-agent --help\"", meant)}
		},
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.SetUsageFunc(usage)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{hint.Wrap(err, "see \"%s --help\"", cmd.CommandPath())}
	})
	root.Flags().BoolP("version", "v", false, "version for basicfw-agent")
	flags := root.PersistentFlags()
	flags.StringVar(&a.root, "root", "", "prefix all paths below /etc, /var, /run and /usr with this directory (for tests)")
	flags.StringVar(&a.config, "config", "", "settings file (default /etc/basicfw/agent.ini)")
	flags.StringVar(&a.logLevel, "log-level", "", "error, warn, info, debug or trace (default warn; for run, as configured)")
	for _, name := range []string{"config", "root"} {
		if err := root.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(nil, cobra.ShellCompDirectiveDefault)); err != nil {
			panic(err) // there is no such flag: a bug
		}
	}
	a.completeFlags(root, map[string]completer{"log-level": func() []string { return []string{"error", "warn", "info", "debug", "trace"} }})
	add := func(named bool) {
		for _, c := range commands {
			if slices.Contains(args, c.name) == named {
				root.AddCommand(c.build(a))
			}
		}
	}
	add(true)
	if called, _, _ := root.Find(args); called == root {
		add(false)
	} else {
		root.CompletionOptions.DisableDefaultCmd = true
	}
	root.SetArgs(args)
	return root
}

// usage prints the usage of a command, in 80 columns. It uses no template of cobra:
// text/template calls methods by name, which prevents the linker from omitting unused ones.
func usage(cmd *cobra.Command) error {
	var b strings.Builder
	b.WriteString("Usage:")
	if cmd.Runnable() {
		b.WriteString("\n  " + cmd.UseLine())
	}
	subcommands := cmd.HasAvailableSubCommands()
	if subcommands {
		b.WriteString("\n  " + cmd.CommandPath() + " [command]")
	}
	if cmd.HasExample() {
		b.WriteString("\n\nExamples:\n" + cmd.Example)
	}
	if subcommands {
		b.WriteString("\n\nAvailable Commands:")
		for _, sub := range cmd.Commands() {
			if sub.IsAvailableCommand() || sub.Name() == "help" {
				fmt.Fprintf(&b, "\n  %-*s %s", sub.NamePadding(), sub.Name(), sub.Short)
			}
		}
	}
	if cmd.HasAvailableLocalFlags() {
		b.WriteString("\n\nFlags:\n" + strings.TrimRight(cmd.LocalFlags().FlagUsagesWrapped(80), " \n"))
	}
	if cmd.HasAvailableInheritedFlags() {
		b.WriteString("\n\nGlobal Flags:\n" + strings.TrimRight(cmd.InheritedFlags().FlagUsagesWrapped(80), " \n"))
	}
	if subcommands {
		fmt.Fprintf(&b, "\n\nUse \"%s [command] --help\" for help on a command.", cmd.CommandPath())
	}
	_, err := fmt.Fprintln(cmd.OutOrStderr(), b.String())
	return err
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

// printable is a writer that replaces unprintable characters, so that text from files,
// processes or the network cannot control a terminal. No write may end within a character.
type printable struct{ w io.Writer }

func (p printable) Write(text []byte) (int, error) {
	lines := strings.Split(string(text), "\n")
	for i, line := range lines {
		cells := strings.Split(line, "\t")
		for j, cell := range cells {
			cells[j] = system.Printable(cell)
		}
		lines[i] = strings.Join(cells, "\t")
	}
	if _, err := io.WriteString(p.w, strings.Join(lines, "\n")); err != nil {
		return 0, err
	}
	return len(text), nil
}

// plainFormatter formats log entries as one line each: "warning: what: why". The service
// logs to the journal instead, with named fields.
type plainFormatter struct{}

func (plainFormatter) Format(e *logrus.Entry) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s: %s", e.Level, e.Message)
	if err, ok := e.Data[logrus.ErrorKey]; ok {
		fmt.Fprintf(&b, ": %v", err)
	}
	for _, name := range slices.Sorted(maps.Keys(e.Data)) {
		if name != logrus.ErrorKey {
			fmt.Fprintf(&b, " %s=%v", name, e.Data[name])
		}
	}
	return []byte(system.Printable(b.String()) + "\n"), nil
}

// group returns a command that only has subcommands, which want lists.
func group(name, short, want string, below ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: name, Short: short, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageError{fmt.Errorf("unknown command %q: want %s", args[0], want)}
		}
		return cmd.Help()
	}}
	cmd.AddCommand(below...)
	return cmd
}

// shortPath returns the path of a command without the program's name, which errors begin with.
func shortPath(cmd *cobra.Command) string {
	return strings.TrimPrefix(cmd.CommandPath(), "basicfw-agent ")
}

// noArgs is cobra.NoArgs with our exit code.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageError{fmt.Errorf("%s accepts no arguments, got %q", shortPath(cmd), args[0])}
	}
	return nil
}

// oneArg is cobra.ExactArgs(1) with our exit code.
func oneArg(what string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usageError{fmt.Errorf("%s requires one argument (%s), got %d", shortPath(cmd), what, len(args))}
		}
		return nil
	}
}

// printJSON prints a value as indented JSON.
func (a *app) printJSON(value any) error {
	data, err := json.MarshalIndent(value, "", "  ")
	if err == nil {
		_, err = a.terminal.Write(append(system.PrintableJSON(data), '\n'))
	}
	return err
}

// readOnly returns the body of a command that requires root. A signal ends it at once,
// so the command must change nothing that would have to be undone.
func (a *app) readOnly(do func(context.Context, *agent.Agent) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		if os.Geteuid() != 0 {
			return hint.Wrap(fmt.Errorf("%s requires root", shortPath(cmd)), "run it with sudo")
		}
		machine, err := agent.New(a.sys, a.config, version, a.log)
		if err != nil {
			return err
		}
		return do(cmd.Context(), machine)
	}
}

// forRoot is readOnly for a command that changes something. A signal cancels its context,
// and the command undoes its change before it ends. nohup(1) ignores SIGHUP.
func (a *app) forRoot(do func(context.Context, *agent.Agent) error) func(*cobra.Command, []string) error {
	return a.readOnly(func(ctx context.Context, machine *agent.Agent) error {
		signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
		if !signal.Ignored(syscall.SIGHUP) {
			signals = append(signals, syscall.SIGHUP)
		}
		ctx, stop := signal.NotifyContext(ctx, signals...)
		defer stop()
		return do(ctx, machine)
	})
}
