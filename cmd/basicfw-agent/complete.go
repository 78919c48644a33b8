//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/profiles"
)

// completer returns words for the shell to complete, each with an optional description
// after a tab. What cannot be read, for example without root, yields no words and no
// error: the user is in the middle of a line.
type completer func() []string

// noFiles completes arguments with words, and never with files.
func noFiles(words completer) func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		return slices.DeleteFunc(words(), func(w string) bool { return slices.Contains(args, w) }), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFlags completes the values of flags.
func (a *app) completeFlags(cmd *cobra.Command, flags map[string]completer) {
	for name, words := range flags {
		if err := cmd.RegisterFlagCompletionFunc(name, noFiles(words)); err != nil {
			panic(err) // there is no such flag: a bug
		}
	}
}

// system is the system during completion, before any command has set app.sys.
func (a *app) system() *system.System { return &system.System{Root: a.root} }

func durations() []string { return []string{"30m", "1h", "8h", "1d", "7d"} }

func rates() []string { return []string{"5/second", "50/second", "30/minute"} }

func (a *app) profileNames() []string {
	set, err := profiles.Load(a.system())
	if err != nil {
		return []string{settings.Auto, profiles.WebOnly, profiles.WebMail}
	}
	words := []string{settings.Auto + "\tchosen by listening sockets"}
	for _, p := range set.List() {
		words = append(words, p.Name+"\t"+p.Title)
	}
	return words
}

func (a *app) zoneNames() []string {
	return append([]string{"any", "public", "private", "virtual"}, a.interfaceNames()...)
}

func (a *app) interfaceNames() []string {
	host, err := host.Detect()
	if err != nil {
		return nil
	}
	var words []string
	for _, i := range host.Interfaces {
		if i.Zone != firewall.LoopbackZone {
			words = append(words, fmt.Sprintf("%s\t%s", i.Name, i.Zone))
		}
	}
	return words
}

// services returns the open services as far as the caller may read them: only root
// may read the state, but everyone may read settings and profiles.
func (a *app) services() []firewall.Service {
	if st, err := store.New(a.system()).Load(); err == nil {
		return st.Desired.Services()
	}
	s, _ := settings.Load(a.system(), a.config)
	d := firewall.Desired{Open: s.Open, Closed: s.Closed}
	if set, err := profiles.Load(a.system()); err == nil {
		d.Profile, _, _ = set.Get(s.Profile)
	}
	return d.Services()
}

func (a *app) serviceNames() []string {
	var words []string
	for _, s := range a.services() {
		words = append(words, s.Name+"\t"+s.String())
	}
	return words
}

// openPorts returns the arguments that close accepts: names and ports.
func (a *app) openPorts() []string {
	words := a.serviceNames()
	for _, s := range a.services() {
		words = append(words, firewall.FormatPorts(s.Ports, s.Proto)+"\t"+s.Name)
	}
	return words
}

// closedListeners returns the ports of listeners that are not reachable from outside.
func (a *app) closedListeners() []string {
	silent := logrus.New()
	silent.SetOutput(io.Discard)
	machine, err := agent.New(a.system(), a.config, version, silent)
	if err != nil {
		return nil
	}
	situation, err := machine.Situation(context.Background())
	if err != nil {
		return nil
	}
	situation.Interfaces = slices.DeleteFunc(slices.Clone(situation.Interfaces), func(i firewall.Interface) bool { return i.Zone == firewall.TrustedZone })
	return closedIn(situation)
}

// closedIn returns the ports of listeners that no packet reaches.
func closedIn(situation exposure.Situation) (words []string) {
	open := map[string]bool{}
	of := func(proto firewall.Proto, port uint16) string { return fmt.Sprintf("%d/%s", port, proto) }
	for _, e := range situation.Report().Exposure {
		if e.Verdict != exposure.Closed {
			open[of(e.Proto, e.Port)] = true
		}
	}
	for _, p := range situation.Ports {
		if word := of(p.Proto, p.Number); p.Process != "" && !open[word] && !slices.Contains(words, word+"\t"+p.Process) {
			words = append(words, word+"\t"+p.Process)
		}
	}
	return words
}

func (a *app) allowedAddresses() []string {
	st, err := store.New(a.system()).Load()
	if err != nil {
		return nil
	}
	var words []string
	for _, p := range st.Desired.SSH.Allow {
		words = append(words, firewall.FormatPrefix(p))
	}
	for _, t := range st.Desired.SSH.Timed {
		words = append(words, firewall.FormatPrefix(t.From)+"\tuntil "+firewall.FormatTime(t.Until))
	}
	return words
}
