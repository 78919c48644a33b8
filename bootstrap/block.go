//go:build linux

package bootstrap

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/lists"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Blocker computes the lists of blocked networks from the settings.
type Blocker struct {
	System *system.System
	Exempt []host.Exempt // the networks that are never blocked
	Caller netip.Addr    // of the SSH session, if there is one
	// Force accepts allowed SSH sources in lists.
	Force bool
	// NewList is the content of files that are not written yet.
	NewList map[string]settings.NewList
}

// NewBlocker returns the Blocker of a host, for the caller's session and the settings.
func NewBlocker(sys *system.System, h host.Host, session *host.Session, s settings.Settings) Blocker {
	b := Blocker{System: sys, Exempt: h.Exempt(sys), Force: s.ForceBlocks, NewList: s.NewList}
	if session != nil {
		b.Caller = session.Addr
	}
	return b
}

// entry is a network of a list.
type entry struct {
	netip.Prefix
	until time.Time
	line  int // in its file; 0 if it is not from a file
}

// maxShown is the maximum number of warnings about one list.
const maxShown = 5

// set sets the lists of a desired state. previous is the last state, if there is one.
func (b Blocker) set(d *firewall.Desired, list []settings.Block, previous *firewall.Desired) (warnings []string, err error) {
	if previous == nil {
		previous = &firewall.Desired{}
	}
	d.Blocks, warnings, err = b.Blocks(list, d.SSH, previous.Blocks)
	return warnings, err
}

// Blocks returns the lists for a desired state. previous are the lists of the last
// one. It is an error if the lists in the settings contain an allowed SSH source, or
// if a list cannot be read and was not read before.
func (b Blocker) Blocks(list []settings.Block, ssh firewall.SSH, previous []firewall.Block) (out []firewall.Block, warnings []string, err error) {
	var errs []error
	for _, s := range list {
		var last []firewall.Block
		for _, p := range previous {
			if p.Name == s.Name {
				last = append(last, p)
			}
		}
		blocks, more, err := b.one(s, ssh, last)
		if n := len(more); n > maxShown {
			more = append(more[:maxShown], fmt.Sprintf("block.%s: and %d more warnings", s.Name, n-maxShown))
		}
		out, warnings = append(out, blocks...), append(warnings, more...)
		if err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		err = &BlockError{errors.Join(errs...)}
	}
	return out, warnings, err
}

// BlockError is the error for lists that cannot be blocked.
type BlockError struct{ error }

func (e *BlockError) Unwrap() error { return e.error }

// Blockable returns the networks that are not exempt, and warns about the others. It
// keeps those with an allowed SSH source, which Blocks refuses.
func (b Blocker) Blockable(list []netip.Prefix, ssh firewall.SSH, warn func(...any)) (out []netip.Prefix) {
	for _, p := range list {
		source, _ := b.contains(p, ssh)
		if x, ok := host.Contradicts(b.Exempt, p); ok && !(x.Soft && (b.Force || source.IsValid())) {
			warn(fmt.Sprintf("%s is not blocked: %s %s", firewall.FormatPrefix(p), firewall.FormatPrefix(x.Prefix), x.Why))
			continue
		}
		out = append(out, p)
	}
	return out
}

// ListFiles returns the changes of files for lists, by their path.
func ListFiles(lists map[string]settings.NewList) (out []files.Change) {
	for path, l := range lists {
		out = append(out, files.Change{Path: path, Data: l.Text, Mode: 0o600, Remove: l.Remove})
	}
	return out
}

func (b Blocker) one(s settings.Block, ssh firewall.SSH, last []firewall.Block) (out []firewall.Block, warnings []string, err error) {
	var entries []entry
	if s.File == "" {
		for _, e := range s.Entries {
			entries = append(entries, entry{e.From, e.Until, 0})
		}
	} else if entries, warnings, err = b.read(s); err != nil {
		if i := slices.IndexFunc(last, func(p firewall.Block) bool { return p.File == s.File }); i >= 0 {
			last[i].Until, last[i].Source = s.Until, s.Source
			return last[i : i+1], []string{fmt.Sprintf("block.%s (%s): %v: its last content stays in effect", s.Name, s.Source, err)}, nil
		}
		return nil, nil, fmt.Errorf("%s: %w", settings.Label(s.Source, "block."+s.Name), err)
	}
	var forced []netip.Prefix
	for _, p := range last {
		forced = append(forced, p.Forced...)
	}
	_, isNew := b.NewList[s.File]
	c := chosen{Blocker: b, list: s, forced: forced, refuse: s.File == "" || isNew, warnings: warnings, networks: map[time.Time][]netip.Prefix{}}
	for _, e := range entries {
		c.add(e, ssh)
	}
	for _, until := range c.untils {
		networks := firewall.SubtractPrefixes(firewall.MergePrefixes(c.networks[until]), c.without())
		if len(networks) > 0 {
			out = append(out, firewall.Block{Name: s.Name, Networks: networks, File: s.File, Forced: c.used, Until: until, Source: s.Source})
		}
	}
	if s.File != "" && len(out) == 0 { // changes of the file are followed
		out = append(out, firewall.Block{Name: s.Name, File: s.File, Until: s.Until, Source: s.Source, Forced: forced})
	}
	return out, c.warnings, errors.Join(c.errs...)
}

func (b Blocker) read(s settings.Block) (entries []entry, warnings []string, err error) {
	var list []lists.Entry
	var problems []lists.Problem
	if l, ok := b.NewList[s.File]; ok {
		list, problems, err = lists.Parse(l.Text)
	} else {
		list, problems, err = lists.Read(b.System, s.File)
	}
	for _, p := range problems {
		warnings = append(warnings, fmt.Sprintf("%s:%d: %v: the line has no effect", b.shown(s.File), p.Line, p.Err))
	}
	entries = make([]entry, len(list))
	for i, e := range list {
		entries[i] = entry{e.Prefix, s.Until, e.Line}
	}
	return entries, warnings, err
}

// shown returns the name of a file for messages.
func (b Blocker) shown(path string) string { return cmp.Or(b.NewList[path].From, path) }

// chosen is the entries of one list that are in effect.
type chosen struct {
	Blocker
	list     settings.Block
	forced   []netip.Prefix // before
	refuse   bool           // an allowed SSH source is an error
	used     []netip.Prefix // forced now
	networks map[time.Time][]netip.Prefix
	untils   []time.Time
	warnings []string
	errs     []error
}

func (c *chosen) isForced(p netip.Prefix) bool {
	if !c.Force && !slices.Contains(c.forced, p) {
		return false
	}
	if !slices.Contains(c.used, p) {
		c.used = append(c.used, p)
	}
	return true
}

// without returns the networks that are not blocked although entries contain them.
func (c *chosen) without() (out []netip.Prefix) {
	for _, e := range c.Exempt {
		if !e.Soft || !slices.Contains(c.used, e.Prefix) {
			out = append(out, e.Prefix)
		}
	}
	return out
}

// about returns the text of a warning or an error about an entry.
func (c *chosen) about(e entry, format string, args ...any) string {
	where := settings.Label(c.list.Source, "block."+c.list.Name)
	if e.line > 0 {
		where = fmt.Sprintf("%s:%d", c.shown(c.list.File), e.line)
	}
	return fmt.Sprintf("%s: %s "+format, append([]any{where, firewall.FormatPrefix(e.Prefix)}, args...)...)
}

func (c *chosen) add(e entry, ssh firewall.SSH) {
	if p, why := c.contains(e.Prefix, ssh); p.IsValid() && !c.isForced(p) {
		if c.refuse {
			c.errs = append(c.errs, hint.Wrap(errors.New(c.about(e, "%s", why)), "leave it out, or use --force"))
		} else {
			c.warnings = append(c.warnings, c.about(e, "%s: the entry has no effect", why))
		}
		return
	}
	for _, x := range c.Exempt {
		if !x.Overlaps(e.Prefix) || x.Soft && c.isForced(x.Prefix) {
			continue
		}
		if x.Bits() <= e.Bits() {
			c.warnings = append(c.warnings, c.about(e, "is not blocked: %s %s", firewall.FormatPrefix(x.Prefix), x.Why))
			return
		}
		c.warnings = append(c.warnings, c.about(e, "is blocked without %s, which %s", firewall.FormatPrefix(x.Prefix), x.Why))
	}
	if !slices.ContainsFunc(c.untils, e.until.Equal) {
		c.untils = append(c.untils, e.until)
	}
	c.networks[e.until] = append(c.networks[e.until], e.Prefix)
}

// contains returns what a network must not contain without force, and why.
func (b Blocker) contains(p netip.Prefix, ssh firewall.SSH) (netip.Prefix, string) {
	if p.Bits() == 0 {
		return p, "contains every address"
	}
	if a := b.Caller; a.IsValid() && p.Contains(a) {
		return netip.PrefixFrom(a, a.BitLen()), fmt.Sprintf("contains the address of your SSH session, %v", a)
	}
	for _, s := range ssh.Sources() {
		if s.From.Bits() >= p.Bits() && p.Contains(s.From.Addr()) {
			if s.From == p {
				return p, "is an allowed SSH source"
			}
			return s.From, fmt.Sprintf("contains the allowed SSH source %s", firewall.FormatPrefix(s.From))
		}
	}
	return netip.Prefix{}, ""
}
