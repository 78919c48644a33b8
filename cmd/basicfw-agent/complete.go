package main

import (
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hostnet"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/profiles"
)

// completer gives words for the shell to complete, each with a description
// behind a tab if it needs one. What cannot be read, without root for example,
// gives no words and no error: a person is in the middle of a line.
type completer func() []string

// noFiles completes arguments with words, and never with files.
func noFiles(words completer) func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return func(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		list := words()
		return slices.DeleteFunc(list, func(w string) bool { return slices.Contains(args, w) }), cobra.ShellCompDirectiveNoFileComp
	}
}

// completeFlags completes the values of flags.
func (a *app) completeFlags(cmd *cobra.Command, flags map[string]completer) {
	for name, words := range flags {
		if err := cmd.RegisterFlagCompletionFunc(name, noFiles(words)); err != nil {
			panic(err) // there is no such flag: a mistake of ours
		}
	}
}

// completeFiles completes the values of flags with files.
func completeFiles(cmd *cobra.Command, flags ...string) {
	for _, name := range flags {
		err := cmd.RegisterFlagCompletionFunc(name, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault
		})
		if err != nil {
			panic(err) // there is no such flag: a mistake of ours
		}
	}
}

// system is the machine's files. While a line is completed, no command has
// begun yet.
func (a *app) system() *system.System { return &system.System{Root: a.root} }

func durations() []string { return []string{"30m", "1h", "8h", "1d", "7d"} }

func (a *app) profileNames() []string {
	set, err := profiles.Load(a.system())
	if err != nil {
		return []string{settings.Auto, profiles.WebOnly, profiles.WebMail}
	}
	words := []string{settings.Auto + "\tby what listens"}
	for _, p := range set.List() {
		words = append(words, p.Name+"\t"+p.Title)
	}
	return words
}

func (a *app) zoneNames() []string {
	words := []string{"any", "public", "private", "virtual"}
	host, err := hostnet.Detect(nil, nil)
	if err != nil {
		return words
	}
	for _, i := range host.Interfaces {
		if i.Zone != firewall.LoopbackZone {
			words = append(words, fmt.Sprintf("%s\t%s", i.Name, i.Zone))
		}
	}
	return words
}

// services are those that are open, as far as that may be known to who asks:
// the state is root's, the settings' profiles are everybody's.
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

// openPorts are what close can be given: names and ports.
func (a *app) openPorts() []string {
	words := a.serviceNames()
	for _, s := range a.services() {
		words = append(words, fmt.Sprintf("%s/%s\t%s", s.Ports, s.Proto, s.Name))
	}
	return words
}

// closedListeners are ports that something listens on and nobody outside
// reaches.
func (a *app) closedListeners() []string {
	listening, _, err := hostnet.Sockets()
	if err != nil {
		return nil
	}
	st, _ := store.New(a.system()).Load()
	var words []string
	for _, l := range listeners(listening, nil) {
		if !st.Desired.Reachable(l.Proto, l.Port) {
			words = append(words, fmt.Sprintf("%d/%s", l.Port, l.Proto))
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
