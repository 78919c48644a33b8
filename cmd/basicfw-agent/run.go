package main

import (
	"context"
	"runtime/debug"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hostnet"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/system"
)

func (a *app) runCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "What the service runs: load, verify, repair, report",
		Long: `Load the rules that were applied last, read them back, repair what differs, and
tell the service manager that the machine is closed. Then watch: repair what
others change, and follow interfaces and sshd. The service runs this; it ends
with SIGTERM and leaves the rules.`,
		Args: noArgs,
		RunE: a.forRoot(func(ctx context.Context, w *wiring) error {
			// The journal has times and colours by itself.
			a.log.SetFormatter(&logrus.TextFormatter{DisableTimestamp: true, DisableColors: true})
			s, err := settings.Load(a.sys, a.config)
			if err != nil {
				a.log.WithError(err).Warn("the settings are wrong; the rules that were applied last are enforced")
			}
			if a.logLevel == "" {
				if level, err := logrus.ParseLevel(s.LogLevel); err == nil {
					a.log.SetLevel(level)
				}
			}
			follow := func() {
				if now, err := settings.Load(a.sys, a.config); err == nil {
					s = now
				}
			}
			commandLine, err := a.sys.ReadLimited("/proc/cmdline", 64<<10)
			if err != nil {
				a.log.WithError(err).Warn("what the boot loader says is not known")
			}
			debug.SetGCPercent(serviceGCPercent)
			w.agent.Rehearse = nil // the sandbox allows no namespace
			return w.agent.Run(ctx, agent.RunOptions{
				CommandLine: string(commandLine),
				Ports:       w.ports,
				Look:        func() ([]firewall.Interface, error) { return w.look(s) },
				Instance:    w.instance,
				Changed:     follow,
				Prune:       func() (*agent.Change, error) { return a.prune(w) },
				Ready: func(status string) {
					notify(a.log, "READY=1\nSTATUS="+system.Printable(status))
					// What it took to get here is not needed any more.
					debug.FreeOSMemory()
				},
				Say:    a.sys.Say,
				Watch:  a.watch,
				Shells: w.shells,
				Every:  time.Minute,
				Facts: func() agent.Facts {
					facts, err := w.lookAt(s, true)
					if err != nil {
						a.log.WithError(err).Warn("not all of the status is known")
					}
					return facts
				},
			})
		}),
	}
}

// watch begins to tell of what may concern the rules. What cannot be watched is
// found at the next look.
func (a *app) watch(ctx context.Context, tell func()) {
	for _, start := range []func(context.Context, func()) error{
		nftables.Watch,
		hostnet.Watch,
		func(ctx context.Context, tell func()) error { return a.sys.WatchDirs(ctx, tell, watchedDirs()...) },
	} {
		if err := start(ctx, tell); err != nil {
			a.log.WithError(err).Warn("this is looked at only once a minute")
		}
	}
}

// watchedDirs hold the persisted rules, what says where sshd listens, and our
// own unit.
func watchedDirs() []string {
	return []string{"/etc/sysconfig", "/etc/iptables", "/etc/nftables", "/etc/ssh", "/etc/ssh/sshd_config.d",
		"/etc/systemd/system", "/etc/systemd/system/ssh.socket.d", "/etc/systemd/system/sshd.socket.d", "/etc/systemd/system/sysinit.target.wants"}
}
