package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
)

func (a *app) openCmd() *cobra.Command {
	var name, on, duration string
	var from []string
	cmd := &cobra.Command{
		Use:   "open PORT[-PORT]/tcp|udp",
		Short: "Open a port, now and from now on, or for a while",
		Long: `Open a port, at once and at every further boot: an entry in [open] of
/etc/basicfw/local.ini. With --for it closes by itself when the time is over: the
kernel sees to that, also across a reboot, and whether the service runs or not.
Opened a second time, nothing changes; with another --for, the end moves.`,
		Example: `  basicfw-agent open 8080/tcp
  basicfw-agent open 5432/tcp --from 10.0.0.0/8 --on private --name db
  basicfw-agent open 9000/udp --for 1h`,
		Args: oneArg("a port such as 8080/tcp or 40000-40100/udp"),
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		ports, proto, err := firewall.ParsePorts(args[0])
		if err != nil {
			return usageError{err}
		}
		want := firewall.Service{Name: name, Proto: proto, Ports: ports}
		if want.On, want.From, err = peers(on, from); err != nil {
			return err
		}
		if cmd.Flags().Changed("name") {
			if err := firewall.CheckServiceName(name); err != nil {
				return usageError{fmt.Errorf("--name: %w", err)}
			}
		}
		if cmd.Flags().Changed("for") && duration == "" {
			duration = "none"
		}
		return a.alone(func(ctx context.Context, w *wiring) error {
			if want.Until, err = w.ends(duration); err != nil {
				return err
			}
			err := a.editSettings(ctx, w, false, func(e settings.Editor) (settings.Edit, error) {
				edit, err := e.Open(want)
				if len(edit.Changes) > 0 && len(whereNow(w.found.Interfaces, want.On)) == 0 {
					a.log.Warnf("--on %s: no interface is that now; %s is open on it when it comes", want.On, args[0])
				}
				return edit, err
			})
			return a.andForwarded(ctx, w, err, proto, ports)
		})(cmd, args)
	}
	cmd.Flags().StringVar(&name, "name", "", "what the rules, counters and the entry are called (default such as tcp-8080)")
	cmd.Flags().StringSliceVar(&from, "from", nil, "who may reach it: addresses and CIDRs, separated by commas (default anybody)")
	cmd.Flags().StringVar(&on, "on", "", "where: any, public, private, virtual, or an interface's name (default any)")
	cmd.Flags().StringVar(&duration, "for", "", "for how long, such as 90m, 8h or 7d (default for good)")
	a.completeFlags(cmd, map[string]completer{"on": a.zoneNames, "for": durations})
	cmd.ValidArgsFunction = noFiles(a.closedListeners)
	return cmd
}

func (a *app) closeCmd() *cobra.Command {
	var r settings.CloseRequest
	var from []string
	cmd := &cobra.Command{
		Use:   "close PORT[-PORT]/tcp|udp | NAME",
		Short: "Close what open has opened, or a port of the profile",
		Long: `Close a port, or a service by its name. What "open" gave goes from
/etc/basicfw/local.ini. A service of the profile, or of the owner's agent.ini,
is overridden there: NAME = closed. "open" takes that back.`,
		Example: `  basicfw-agent close 8080/tcp
  basicfw-agent close 5432/tcp --from 10.0.0.0/8
  basicfw-agent close http`,
		Args: oneArg("a port such as 8080/tcp, or a service's name"),
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		var err error
		// A name has no "/", and what has neither a "/" nor a letter was meant
		// to be a port.
		if word := args[0]; !strings.Contains(word, "/") && strings.ContainsAny(word, "abcdefghijklmnopqrstuvwxyz") && firewall.CheckServiceName(word) == nil {
			if r.Name != "" && r.Name != word {
				return usageError{fmt.Errorf("close %s --name %s: want one name", word, firewall.Quote(r.Name))}
			}
			r.Name = word
		} else if r.Ports, r.Proto, err = firewall.ParsePorts(word); err != nil {
			switch {
			case word == "ssh":
				err = errors.New("ssh: \"basicfw-agent ssh remove ADDRESS\" takes away who may log in")
			case !strings.ContainsAny(word, "0123456789"):
				err = fmt.Errorf("%s: want a port such as 8080/tcp, or the name of a service as status shows it", firewall.Quote(word))
			}
			return usageError{err}
		}
		if r.On, r.From, err = peers(r.On, from); err != nil {
			return err
		}
		if !cmd.Flags().Changed("on") {
			r.On = ""
		}
		return a.alone(func(ctx context.Context, w *wiring) error {
			err := a.editSettings(ctx, w, false, func(e settings.Editor) (settings.Edit, error) { return e.Close(r) })
			return a.andForwarded(ctx, w, err, r.Proto, r.Ports)
		})(cmd, args)
	}
	cmd.Flags().StringVar(&r.Name, "name", "", "only what is called so")
	cmd.Flags().StringSliceVar(&from, "from", nil, "only for these sources, as they stand in the settings")
	cmd.Flags().StringVar(&r.On, "on", "", "only what is open on this zone or interface")
	a.completeFlags(cmd, map[string]completer{"on": a.zoneNames, "name": a.serviceNames})
	cmd.ValidArgsFunction = noFiles(a.openPorts)
	return cmd
}

// andForwarded adds to a success that a port is forwarded past us, so that it
// is open whatever was said here.
func (a *app) andForwarded(ctx context.Context, w *wiring, err error, proto firewall.Proto, ports firewall.PortRange) error {
	if err != nil || ports.IsZero() {
		return err
	}
	list, err := w.agent.Forwarded(ctx, w.found)
	if err != nil {
		return err
	}
	for _, b := range list {
		if (b.Proto == string(proto) || b.Proto == firewall.AnyPort) && b.Span().Overlaps(ports) {
			fmt.Fprintf(a.stdout, "note: %s past this firewall: it is open whatever is decided here, and closed where it is forwarded\n", bypassLine(b))
		}
	}
	return nil
}

// peers reads --on and --from.
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

// whereNow gives the interfaces that there are of those that "on" means; for
// any there is always one.
func whereNow(there []firewall.Interface, on string) []string {
	d := firewall.Desired{Interfaces: there}
	return slices.DeleteFunc(d.InterfacesOf(on), func(name string) bool {
		return name != "" && !slices.ContainsFunc(there, func(i firewall.Interface) bool { return firewall.MatchInterface(name, i.Name) })
	})
}
