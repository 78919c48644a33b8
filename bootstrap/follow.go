//go:build linux

package bootstrap

import (
	"fmt"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Follower reads lists of blocked networks again when their files change.
type Follower struct {
	System *system.System
	Limit  int // the maximum number of networks
	Warn   func(...any)
	seen   map[string]string // by the path of a file, the content from which its list was made
}

// Blocks returns the lists of a desired state with the present content of their
// files. A list whose file cannot be used is left unchanged.
func (f *Follower) Blocks(d firewall.Desired) (out []firewall.Block) {
	if f.seen == nil {
		f.seen = map[string]string{}
	}
	total := 0
	for _, b := range d.Blocks {
		if b.File != "" {
			b = f.follow(b, d)
		}
		total += len(b.Networks)
		out = append(out, b)
	}
	if total > f.Limit {
		f.Warn(fmt.Sprintf("the lists in [block] have %d networks, more than %d: their last content stays in effect", total, f.Limit))
		return d.Blocks
	}
	return out
}

func (f *Follower) follow(b firewall.Block, d firewall.Desired) firewall.Block {
	of := fmt.Sprint(d.SSH.Sources(), b.Forced)
	for _, i := range d.Interfaces {
		of += fmt.Sprint(i.Addresses)
	}
	if fi, err := f.System.Stat(b.File); err == nil {
		of += fmt.Sprint(fi.ModTime().UnixNano(), fi.Size())
	}
	if f.seen[b.File] == of {
		return b
	}
	h, err := host.Detect()
	if err != nil {
		return b
	}
	f.seen[b.File] = of
	blocker := NewBlocker(f.System, h, nil, settings.Settings{})
	list, warnings, err := blocker.Blocks([]settings.Block{{Name: b.Name, File: b.File, Until: b.Until, Source: b.Source}}, d.SSH, []firewall.Block{b})
	for _, w := range warnings {
		f.Warn(w)
	}
	if err != nil || len(list) != 1 {
		return b
	}
	return list[0]
}
