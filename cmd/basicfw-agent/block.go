//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/lists"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

func (a *app) blockCmd() *cobra.Command {
	var name, duration string
	var force bool
	cmd := &cobra.Command{
		Use:   "block ADDRESS|CIDR... | FILE | -",
		Short: "Block addresses, networks, or a list of them",
		Long: `Drop all packets of addresses or networks that arrive on public interfaces,
immediately and at every boot. Open sessions stall. Replies to connections of
this host pass. With --for, the kernel ends the block, also across a reboot.

A list has one address or CIDR on each line, and comments after "#" or ";". It is
read once, and kept in /var/lib/basicfw/lists; "-" is standard input. A file that
changes is followed with file:/PATH in [block] of /etc/basicfw/agent.ini.

What this host needs is never blocked: loopback, link-local and multicast
addresses, its own addresses and networks, gateways and DNS resolvers. Allowed
SSH sources and your SSH client address are refused unless --force is given.`,
		Example: `  basicfw-agent block 203.0.113.7
  basicfw-agent block 198.51.100.0/24 2001:db8:7::/48 --for 1d
  basicfw-agent block bad.txt --name bad
  basicfw-agent block list`,
		Args: someArgs("an address, a network, a file, or -"),
	}
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		r, err := blockRequest(args, os.Stdin)
		if err != nil {
			return err
		}
		if cmd.Flags().Changed("name") {
			if err := firewall.CheckBlockName(name); err != nil {
				return usageError{fmt.Errorf("--name: %w", err)}
			}
			r.Name = name
		}
		length, err := parseFor(cmd, duration)
		if err != nil {
			return err
		}
		return a.forRoot(a.edit(func(ctx context.Context, machine *agent.Agent) (agent.Edited, error) {
			return machine.Block(ctx, r, length, force)
		}))(cmd, args)
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the list (default blocked, or from the file's name)")
	cmd.Flags().StringVar(&duration, "for", "", "unblock after this time, such as 90m, 8h or 7d (default never)")
	cmd.Flags().BoolVar(&force, "force", false, "also block allowed SSH sources, networks of this host, and 0.0.0.0/0")
	a.completeFlags(cmd, map[string]completer{"for": durations, "name": a.listNames})
	cmd.AddCommand(a.blockListCmd())
	return cmd
}

// blockRequest parses the arguments of block: networks, or one list.
func blockRequest(args []string, stdin io.Reader) (r settings.BlockRequest, err error) {
	for _, word := range args {
		p, err := firewall.ParseNetwork(word)
		if err == nil {
			r.Networks = append(r.Networks, p)
			continue
		}
		isFile := word == "-"
		if _, e := (&system.System{}).Lstat(word); e == nil {
			isFile = true
		}
		if !isFile {
			if strings.ContainsRune(word, os.PathSeparator) && !strings.ContainsAny(word[:1], "0123456789") {
				err = fmt.Errorf("%s: no such file", firewall.Quote(word))
			}
			return r, usageError{err}
		}
		if len(args) > 1 {
			return r, usageError{fmt.Errorf("%s is a list: want only one list, or addresses and networks", firewall.Quote(word))}
		}
		return listRequest(word, stdin)
	}
	return r, nil
}

// listRequest reads a list, as typed.
func listRequest(path string, stdin io.Reader) (r settings.BlockRequest, err error) {
	sys := &system.System{}
	r.From, r.Name = path, listName(path)
	if path == "-" {
		r.From, r.Name = "standard input", "list"
		if r.Text, err = io.ReadAll(io.LimitReader(stdin, lists.MaxSize+1)); err == nil && len(r.Text) > lists.MaxSize {
			err = fmt.Errorf("standard input is larger than %d bytes", lists.MaxSize)
		}
	} else if fi, e := sys.Stat(path); e != nil {
		err = e
	} else if !fi.Mode().IsRegular() {
		err = fmt.Errorf("%s: not a regular file (%v)", firewall.Quote(path), fi.Mode())
	} else {
		r.Text, err = sys.ReadLimited(path, lists.MaxSize)
	}
	if err != nil {
		return r, usageError{err}
	}
	entries, problems, err := lists.Parse(r.Text)
	switch {
	case err != nil:
		return r, usageError{fmt.Errorf("%s: %w", firewall.Quote(r.From), err)}
	case len(entries) == 0 && len(problems) > 0:
		return r, usageError{fmt.Errorf("%s:%d: %w", r.From, problems[0].Line, problems[0].Err)}
	case len(entries) == 0:
		return r, usageError{fmt.Errorf("%s contains no address", firewall.Quote(r.From))}
	}
	r.Entries = len(entries)
	return r, nil
}

// listName returns the name of a list, derived from the name of its file.
func listName(path string) string {
	base := strings.ToLower(filepath.Base(path))
	base, _, _ = strings.Cut(base, ".")
	name := strings.Trim(strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return '-'
	}, base), "-")
	name = strings.TrimRight(name[:min(len(name), 20)], "-")
	if name == "" || name == settings.BlockedName {
		return "list"
	}
	return name
}

func (a *app) unblockCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "unblock ADDRESS|CIDR... | NAME",
		Short: "Remove addresses, networks or a list from the blocked ones",
		Long: `Remove addresses or networks that "basicfw-agent block list" shows, or a list by
its name. A list of agent.ini is overridden in local.ini with NAME = none.`,
		Example: `  basicfw-agent unblock 203.0.113.7
  basicfw-agent unblock bad`,
		Args: someArgs("an address, a network, or the name of a list"),
	}
	var list string
	cmd.RunE = func(_ *cobra.Command, args []string) error {
		if err := firewall.CheckBlockName(list); list != "" && err != nil {
			return usageError{fmt.Errorf("--name: %w", err)}
		}
		var networks []netip.Prefix
		for _, word := range args {
			p, err := firewall.ParseNetwork(word)
			switch {
			case err == nil:
				networks = append(networks, p)
			case len(args) == 1 && list == "" && firewall.CheckBlockName(word) == nil:
				list = word
			case firewall.CheckBlockName(word) == nil:
				return usageError{errors.New("unblock: want one list, or addresses and networks")}
			default:
				return usageError{err}
			}
		}
		return a.forRoot(a.edit(func(ctx context.Context, machine *agent.Agent) (agent.Edited, error) {
			return machine.Unblock(ctx, list, networks)
		}))(cmd, args)
	}
	cmd.Flags().StringVar(&list, "name", "", "remove them from this list only (default from all lists)")
	a.completeFlags(cmd, map[string]completer{"name": a.listNames})
	cmd.ValidArgsFunction = noFiles(a.blockedWords)
	return cmd
}

func (a *app) blockListCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the blocked networks, until when, and where they are configured",
		Args:  noArgs,
		RunE: a.forRoot(func(_ context.Context, machine *agent.Agent) error {
			st, err := machine.State()
			if err != nil {
				return err
			}
			m := machine.Moment()
			tab := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
			blocks := st.At(m).Desired.Blocks
			for _, b := range blocks {
				when := "always"
				if !b.Until.IsZero() {
					when = fmt.Sprintf("until %s, for %s", firewall.FormatTime(b.Until), left(b.Until, m.Time))
				}
				row := func(what string) {
					fmt.Fprintf(tab, "%s\t%s\t%s\t%s\n", what, when, b.Name, system.Printable(b.Source))
				}
				if b.File != "" {
					row(fmt.Sprintf("%d networks of %s", len(b.Networks), system.Printable(b.File)))
					continue
				}
				for _, p := range b.Networks {
					row(firewall.FormatPrefix(p))
				}
			}
			if len(blocks) == 0 {
				fmt.Fprintln(a.stdout, "nothing is blocked")
			}
			return tab.Flush()
		}),
	}
}

// listNames returns the names of the lists, if the caller may read the state.
func (a *app) listNames() (names []string) {
	st, err := store.New(a.system()).Load()
	if err != nil {
		return nil
	}
	for _, b := range st.Desired.Blocks {
		if !slices.Contains(names, b.Name) {
			names = append(names, b.Name)
		}
	}
	return names
}

// maxWords limits the addresses that are completed.
const maxWords = 100

// blockedWords returns the arguments that unblock accepts.
func (a *app) blockedWords() []string {
	words := a.listNames()
	st, err := store.New(a.system()).Load()
	if err != nil {
		return nil
	}
	for _, b := range st.Desired.Blocks {
		if b.File == "" {
			for _, p := range b.Networks[:min(len(b.Networks), maxWords)] {
				words = append(words, firewall.FormatPrefix(p)+"\t"+b.Name)
			}
		}
	}
	return words
}

// blockLine returns the number of blocked networks, and the names of their lists.
func blockLine(list []report.BlockStatus) string {
	var names []string
	n := 0
	for _, b := range list {
		if n += b.Networks; !slices.Contains(names, b.Name) {
			names = append(names, b.Name)
		}
	}
	if n == 1 {
		return "1 network: " + strings.Join(names, ", ")
	}
	return fmt.Sprintf("%d networks: %s", n, strings.Join(names, ", "))
}
