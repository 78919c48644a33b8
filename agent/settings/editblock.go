package settings

import (
	"cmp"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
)

// ListDir is the directory of lists that were passed to commands. Each file is named
// after its list.
const ListDir = "/var/lib/basicfw/lists"

// BlockedName is the name of the list of networks that were blocked without one.
const BlockedName = "blocked"

// BlockRequest is what to block: networks, or the text of a list.
type BlockRequest struct {
	Name     string // "" is BlockedName
	Networks []netip.Prefix
	Text     []byte // nil is none
	From     string // the file with the text, as the administrator wrote it
	Entries  int    // of the text
}

// NewList is the content of a file that a command writes.
type NewList struct {
	Text   []byte
	From   string // the file that it is a copy of
	Remove bool   // the file must not exist
}

// Block blocks networks until a time, or permanently if it is zero.
func (e Editor) Block(r BlockRequest, end time.Time) (Edit, error) {
	var out Edit
	only := r.Name
	r.Name = cmp.Or(r.Name, BlockedName)
	b := Block{Name: r.Name, Until: end}
	i := slices.IndexFunc(e.Settings.Blocks, func(o Block) bool { return o.Name == r.Name })
	if i >= 0 {
		b.Entries = e.liveEntries(e.Settings.Blocks[i])
	}
	if r.Text != nil {
		b.File, b.Entries = path.Join(ListDir, r.Name), nil
		if i >= 0 && e.Settings.Blocks[i].File != b.File {
			return out, e.taken(e.Settings.Blocks[i])
		}
		out.Lists = map[string]NewList{b.File: {Text: r.Text, From: r.From}}
		out.change("block", r.Name, b.String())
		what := "1 network is"
		if r.Entries > 1 {
			what = fmt.Sprintf("%d networks are", r.Entries)
		}
		out.say("%s blocked%s: block.%s", what, untilWords(end), r.Name)
		return out, nil
	}
	if i >= 0 && e.Settings.Blocks[i].File != "" {
		return out, e.taken(e.Settings.Blocks[i])
	}
	b.Until = time.Time{}
	for _, p := range r.Networks {
		if by, list, ok := e.blockedBy(only, p, end); ok {
			out.say("nothing changed: %s is already blocked%s (block.%s in %s)", firewall.FormatPrefix(p), asPart(p, by), list.Name, list.Source)
			continue
		}
		b.Entries = slices.DeleteFunc(b.Entries, func(t firewall.TimedSource) bool { return t.From == p })
		b.Entries = append(b.Entries, firewall.TimedSource{From: p, Until: end})
		out.say("%s is blocked%s", firewall.FormatPrefix(p), untilWords(end))
	}
	if i < 0 || b.String() != e.Settings.Blocks[i].String() {
		if len(b.Entries) > 0 {
			out.change("block", r.Name, b.String())
		}
	}
	return out, nil
}

func (e Editor) taken(b Block) error {
	return hint.Wrap(fmt.Errorf("--name %s: %s has another list of this name: %s", b.Name, b.Source, b), "choose another name, or unblock that list first")
}

func untilWords(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return " until " + firewall.FormatTime(t)
}

func asPart(p, of netip.Prefix) string {
	if p == of {
		return ""
	}
	return " as part of " + of.String()
}

// blockedBy returns the entry that blocks p at least until a time. It searches one
// list, or all if the name is empty.
func (e Editor) blockedBy(only string, p netip.Prefix, end time.Time) (netip.Prefix, Block, bool) {
	for _, b := range e.Settings.Blocks {
		for _, t := range e.liveEntries(b) {
			if (only == "" || only == b.Name) && t.From.Bits() <= p.Bits() && t.From.Contains(p.Addr()) && (t.Until.IsZero() || !end.IsZero() && !t.Until.Before(end)) {
				return t.From, b, true
			}
		}
	}
	return netip.Prefix{}, Block{}, false
}

// liveEntries returns the entries of a list that have not expired.
func (e Editor) liveEntries(b Block) []firewall.TimedSource {
	return e.left(firewall.Desired{SSH: firewall.SSH{Timed: slices.Clone(b.Entries)}}).SSH.Timed
}

// Unblock removes a list, or networks from it; with an empty name, from all lists.
func (e Editor) Unblock(list string, networks []netip.Prefix) (Edit, error) {
	if len(networks) == 0 {
		return e.unblockList(list)
	}
	var out Edit
	left := map[string][]firewall.TimedSource{}
	for _, b := range e.Settings.Blocks {
		left[b.Name] = e.liveEntries(b)
	}
	for _, p := range networks {
		found := false
		for name, entries := range left {
			if list != "" && list != name {
				continue
			}
			kept := slices.DeleteFunc(slices.Clone(entries), func(t firewall.TimedSource) bool { return t.From == p })
			if len(kept) < len(entries) {
				left[name], found = kept, true
			}
		}
		if found {
			where := ""
			if list != "" {
				where = " by the list " + list
			}
			out.say("%s is no longer blocked%s", firewall.FormatPrefix(p), where)
			continue
		}
		if by, list, ok := e.blockedBy(list, p, e.Now.Time); ok {
			return out, hint.Wrap(fmt.Errorf("%s is blocked as part of %s (block.%s in %s)", firewall.FormatPrefix(p), by, list.Name, list.Source), "basicfw-agent unblock %s", by)
		}
		for _, b := range e.Blocked {
			if b.File != "" && (list == "" || list == b.Name) && slices.ContainsFunc(b.Networks, func(n netip.Prefix) bool { return n.Overlaps(p) }) {
				return out, hint.Wrap(fmt.Errorf("%s is blocked by the list %s, %s", firewall.FormatPrefix(p), b.Name, b.File), "edit the file, or run: basicfw-agent unblock %s", b.Name)
			}
		}
		out.say("nothing changed: %s is not blocked", firewall.FormatPrefix(p))
	}
	for _, b := range e.Settings.Blocks {
		if b.File != "" || len(left[b.Name]) == len(e.liveEntries(b)) {
			continue
		}
		if b.Entries = left[b.Name]; len(b.Entries) == 0 {
			e.dropList(&out, b)
		} else {
			out.change("block", b.Name, b.String())
		}
	}
	return out, nil
}

func (e Editor) unblockList(name string) (Edit, error) {
	var out Edit
	i := slices.IndexFunc(e.Settings.Blocks, func(b Block) bool { return b.Name == name })
	if i < 0 {
		return out, hint.Wrap(fmt.Errorf("%s: neither an address nor the name of a list", firewall.Quote(name)), "basicfw-agent block list")
	}
	b := e.Settings.Blocks[i]
	e.dropList(&out, b)
	if strings.HasPrefix(b.File, ListDir+"/") {
		out.Lists = map[string]NewList{b.File: {Remove: true}}
	}
	out.say("the list %s is no longer blocked", name)
	return out, nil
}

// dropList removes a list. A list in agent.ini is overridden.
func (e Editor) dropList(out *Edit, b Block) {
	if e.local("block."+b.Name) && !slices.Contains(e.Settings.BlocksBeneath, b.Name) {
		out.change("block", b.Name, "")
		return
	}
	out.change("block", b.Name, None)
}

// pruneBlocks adds the removal of expired entries.
func (e Editor) pruneBlocks(out *Edit) {
	for _, b := range e.Settings.Blocks {
		gone := !b.Until.IsZero() && len(e.left(firewall.Desired{SSH: firewall.SSH{Timed: []firewall.TimedSource{{Until: b.Until}}}}).SSH.Timed) == 0
		live := e.liveEntries(b)
		switch {
		case !e.local("block." + b.Name):
		case gone || b.File == "" && len(live) == 0:
			e.dropList(out, b)
		case len(live) < len(b.Entries):
			b.Entries = live
			out.change("block", b.Name, b.String())
		}
	}
}
