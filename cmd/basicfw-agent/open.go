//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/settings"
)

func (a *app) openCmd() *cobra.Command {
	var name, on, rate, duration string
	var from []string
	cmd := &cobra.Command{
		Use:   "open PORT[-PORT]/tcp|udp|sctp | NAME | PROTOCOL",
		Short: "Open a port, permanently or for a limited time",
		Long: `Open a port immediately and at every boot, with an entry in [open] of
/etc/basicfw/local.ini. With --for, the port closes when the time expires. The
kernel enforces that, also across a reboot and without the service. Opening an
open port changes nothing; a different --limit or --for changes the entry. NAME
is a name in /etc/services. PROTOCOL is ah, esp, gre, ipip, ipv6, ospf, vrrp, or
"proto N" with its number.`,
		Example: `  basicfw-agent open 8080/tcp
  basicfw-agent open 5432/tcp --from 10.0.0.0/8 --on private --name db
  basicfw-agent open 8443/tcp --limit 50/second
  basicfw-agent open vrrp --on private
  basicfw-agent open 9000/udp --for 1h`,
		Args: oneArg("a port such as 8080/tcp or 40000-40100/udp, or a protocol such as vrrp"),
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		ports, err := settings.ParsePort(a.system(), args[0])
		if err != nil {
			return usageError{err}
		}
		want := firewall.Service{Name: name, Proto: ports[0].Proto, Ports: ports[0].Ports}
		if want.On, want.From, err = peers(on, from); err != nil {
			return err
		}
		if cmd.Flags().Changed("name") {
			if err := firewall.CheckServiceName(name); err != nil {
				return usageError{fmt.Errorf("--name: %w", err)}
			}
		}
		if cmd.Flags().Changed("limit") {
			if want.Limit, err = firewall.ParseRate(rate); err != nil {
				return usageError{fmt.Errorf("--limit: %w", err)}
			}
		}
		length, err := parseFor(cmd, duration)
		if err != nil {
			return err
		}
		err = a.forRoot(a.editPort(want.Proto, want.Ports, func(ctx context.Context, machine *agent.Agent) (agent.Edited, error) {
			return machine.Open(ctx, want, length)
		}))(cmd, args)
		for _, p := range ports[1:] {
			if text := firewall.FormatPorts(p.Ports, p.Proto); err == nil {
				fmt.Fprintf(a.stdout, "note: %s is also %s, which this does not open; to open it: basicfw-agent open %s\n", args[0], text, text)
			}
		}
		return err
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the entry, its rules and counters (default such as tcp-8080)")
	cmd.Flags().StringSliceVar(&from, "from", nil, "allowed sources: addresses and CIDRs, separated by commas (default any)")
	cmd.Flags().StringVar(&on, "on", "", "any, public, private, virtual, or the name of an interface (default any)")
	cmd.Flags().StringVar(&rate, "limit", "", "new connections from each source, such as 50/second (default no limit)")
	cmd.Flags().StringVar(&duration, "for", "", "close after this time, such as 90m, 8h or 7d (default never)")
	a.completeFlags(cmd, map[string]completer{"on": a.zoneNames, "for": durations, "limit": rates})
	cmd.ValidArgsFunction = noFiles(func() []string { return append(a.closedListeners(), firewall.ProtocolNames()...) })
	return cmd
}

func (a *app) closeCmd() *cobra.Command {
	var r settings.CloseRequest
	var from []string
	cmd := &cobra.Command{
		Use:   "close PORT[-PORT]/tcp|udp|sctp | NAME | PROTOCOL",
		Short: "Close a port that open opened, or a port of the profile",
		Long: `Close a port, or a service by its name. An entry that "open" added is removed
from /etc/basicfw/local.ini. A service of the profile or of agent.ini is
overridden there with NAME = closed; "open" removes that entry again.`,
		Example: `  basicfw-agent close 8080/tcp
  basicfw-agent close 5432/tcp --from 10.0.0.0/8
  basicfw-agent close http`,
		Args: oneArg("a port such as 8080/tcp, or a service's name"),
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		var err error
		// A name has no "/". Without a "/" and without a letter, it was meant as a port.
		if word := args[0]; !strings.Contains(word, "/") && strings.ContainsAny(word, "abcdefghijklmnopqrstuvwxyz") && firewall.CheckServiceName(word) == nil {
			if r.Name != "" && r.Name != word {
				return usageError{fmt.Errorf("close %s --name %s: conflicting names", word, firewall.Quote(r.Name))}
			}
			r.Name = word
			r.Or, _ = settings.ParsePort(a.system(), word) // what else it may be
		} else if r.Ports, r.Proto, err = firewall.ParsePorts(word); err != nil {
			switch {
			case word == "ssh":
				err = hint.Wrap(errors.New("ssh: close does not change who may log in"), "basicfw-agent ssh remove ADDRESS")
			case !strings.ContainsAny(word, "0123456789"):
				err = fmt.Errorf("%s: want a port such as 8080/tcp, or the name of a service as shown by status", firewall.Quote(word))
			}
			return usageError{err}
		}
		if r.On, r.From, err = peers(r.On, from); err != nil {
			return err
		}
		if !cmd.Flags().Changed("on") {
			r.On = ""
		}
		return a.forRoot(a.editPort(r.Proto, r.Ports, func(ctx context.Context, machine *agent.Agent) (agent.Edited, error) {
			return machine.Close(ctx, r)
		}))(cmd, args)
	}
	cmd.Flags().StringVar(&r.Name, "name", "", "only the entry with this name")
	cmd.Flags().StringSliceVar(&from, "from", nil, "only the entry with these sources, as written in the settings")
	cmd.Flags().StringVar(&r.On, "on", "", "only what is open on this zone or interface")
	a.completeFlags(cmd, map[string]completer{"on": a.zoneNames, "name": a.serviceNames})
	cmd.ValidArgsFunction = noFiles(a.openPorts)
	return cmd
}

// peers parses --on and --from.
func peers(on string, from []string) (string, []netip.Prefix, error) {
	if on == "" {
		on = string(firewall.AnyZone)
	}
	if err := firewall.CheckOn(on); err != nil {
		return "", nil, usageError{fmt.Errorf("--on: %w", err)}
	}
	var list []netip.Prefix
	for _, word := range from {
		p, err := firewall.ParseNetwork(word)
		if err != nil {
			return "", nil, usageError{fmt.Errorf("--from: %w", err)}
		}
		if !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	return on, list, nil
}

// edit returns a command body that changes the settings with do and prints the result.
func (a *app) edit(do func(context.Context, *agent.Agent) (agent.Edited, error)) func(context.Context, *agent.Agent) error {
	return func(ctx context.Context, machine *agent.Agent) error {
		res, err := do(ctx, machine)
		if err == nil {
			a.showEdited(res)
		}
		return err
	}
}

// editPort is edit for a port. It also prints a note if the port is forwarded past
// this firewall, because it is then open regardless of the settings.
func (a *app) editPort(proto firewall.Proto, ports firewall.PortRange, do func(context.Context, *agent.Agent) (agent.Edited, error)) func(context.Context, *agent.Agent) error {
	return func(ctx context.Context, machine *agent.Agent) error {
		if err := a.edit(do)(ctx, machine); err != nil || ports.IsZero() {
			return err
		}
		s, err := machine.Situation(ctx)
		for _, b := range s.Forwarded(s.Report()) {
			if !b.Local && !b.Held && (b.Proto == string(proto) || b.Proto == firewall.AnyPort) && b.Span().Overlaps(ports) {
				fmt.Fprintf(a.stdout, "note: %s bypasses this firewall: it is open whatever the settings say, until it is no longer forwarded\n", forwardedLine(b))
			}
		}
		return err
	}
}

func (a *app) showEdited(res agent.Edited) {
	for _, s := range res.Said {
		fmt.Fprintln(a.stdout, s)
	}
	if len(res.Changes) == 0 {
		return
	}
	if slices.ContainsFunc(res.Changes, func(c settings.Change) bool { return c.Value != "" }) {
		fmt.Fprintf(a.stdout, "  written to %s\n", res.Path)
	}
	if slices.ContainsFunc(res.Changes, func(c settings.Change) bool { return c.Section == "ssh" }) {
		fmt.Fprintf(a.stdout, "  ssh: %s\n", sshSentence(res.State))
		for _, f := range res.State.Desired.SSH.BlockedFamilies() {
			fmt.Fprintf(a.stdout, "  SSH over %s is blocked: no %[1]s address is allowed\n", map[firewall.Family]string{firewall.IPv4: "IPv4", firewall.IPv6: "IPv6"}[f])
		}
		a.hintIPv4(res.State)
	}
	if res.Others {
		fmt.Fprintln(a.stdout, "  other pending changes of the settings also took effect")
	}
	a.warnLockout(res.Lockout)
}

// parseFor parses --for. It returns zero, which is permanent, if the flag is not set.
func parseFor(cmd *cobra.Command, text string) (time.Duration, error) {
	if !cmd.Flags().Changed("for") {
		return 0, nil
	}
	d, err := firewall.ParseDuration(cmp.Or(text, "none"))
	if err != nil {
		return 0, usageError{fmt.Errorf("--for: %w", err)}
	}
	return d, nil
}
