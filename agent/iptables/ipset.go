package iptables

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Lists that are too long for one rule per network become sets of ipset. A set's name
// encodes its content (setName), so a changed list is a new set, and the change of
// the rules that use it remains one transaction.

// ipsetTimeout is the time limit for ipset. A million networks take ten seconds.
const ipsetTimeout = time.Minute

// listSet is the set for a list.
type listSet struct {
	name   string
	family firewall.Family
	list   []netip.Prefix
}

// setsOf returns the sets that a ruleset needs.
func setsOf(r firewall.Ruleset, families []firewall.Family) (out []listSet) {
	for _, f := range families {
		for _, c := range r.Chains(f) {
			for _, rule := range expand(c.Rules) {
				if rule.Sources == nil {
					continue
				}
				name := setName(f, rule.Sources)
				if !slices.ContainsFunc(out, func(s listSet) bool { return s.name == name }) {
					out = append(out, listSet{name, f, rule.Sources.List})
				}
			}
		}
	}
	return out
}

// isSet reports whether one of our sets could have a name.
func isSet(name string) bool {
	return strings.HasPrefix(name, "basicfw4-") || strings.HasPrefix(name, "basicfw6-")
}

func (b *Backend) ipset(ctx context.Context, stdin string, args ...string) (string, error) {
	res, err := b.sys.Run(ctx, system.Command{Name: "ipset", Args: args, Stdin: []byte(stdin), Timeout: ipsetTimeout})
	return string(res.Stdout), err
}

// entries returns the number of entries of each of our sets.
func (b *Backend) entries(ctx context.Context) (map[string]int, error) {
	text, err := b.ipset(ctx, "", "list", "-terse")
	if err != nil {
		return nil, err
	}
	out := map[string]int{}
	name := ""
	for _, line := range strings.Split(text, "\n") {
		key, value, _ := strings.Cut(line, ": ")
		switch key {
		case "Name":
			name = value
		case "Number of entries":
			if n, err := strconv.Atoi(strings.TrimSpace(value)); err == nil && isSet(name) {
				out[name] = n
			}
		}
	}
	return out, nil
}

// createSets creates the sets that do not exist or have other entries, and removes those
// that neither the present nor the next rules use.
func (b *Backend) createSets(ctx context.Context, want []listSet, now snapshot) error {
	if len(want) == 0 && !usesSets(now) {
		return nil
	}
	have, err := b.entries(ctx)
	var missing *system.NotFoundError
	if errors.As(err, &missing) {
		return hint.Wrap(fmt.Errorf("[block] has more than %d networks: iptables needs ipset for them, which is not installed", maxNetworks),
			"install ipset, or set \"backend = nftables\" in [agent]: nftables stores them in one set")
	}
	if err != nil {
		return hint.Wrap(fmt.Errorf("reading the sets of ipset: %w", err), "set \"backend = nftables\" in [agent]: nftables needs no ipset")
	}
	var text strings.Builder
	for name := range have {
		if !slices.ContainsFunc(want, func(s listSet) bool { return s.name == name }) && !uses(now, name) {
			fmt.Fprintf(&text, "destroy %s\n", name)
		}
	}
	for _, s := range want {
		n, exists := have[s.name]
		if exists && n == len(s.list) {
			continue
		}
		s.write(&text, exists)
	}
	if text.Len() == 0 {
		return nil
	}
	if _, err := b.ipset(ctx, text.String(), "restore", "-exist"); err != nil {
		return hint.Wrap(fmt.Errorf("creating the sets of blocked networks: %w", err), "set \"backend = nftables\" in [agent]: nftables needs no ipset")
	}
	return nil
}

// write writes the lines that create a set, or replace its content. An interrupted
// run leaves a set with another name.
func (s listSet) write(text *strings.Builder, exists bool) {
	const other = "basicfw-new"
	size := max(1024, len(s.list))
	fmt.Fprintf(text, "create %s%d hash:net family %s hashsize %d maxelem %d\nflush %[1]s%[2]d\n", other, s.family, firewall.ByFamily(s.family, "inet", "inet6"), size, size)
	for _, p := range s.list {
		fmt.Fprintf(text, "add %s%d %s\n", other, s.family, p)
	}
	if exists {
		fmt.Fprintf(text, "swap %s%d %s\ndestroy %[1]s%[2]d\n", other, s.family, s.name)
	} else {
		fmt.Fprintf(text, "rename %s%d %s\n", other, s.family, s.name)
	}
}

// uses reports whether one of our rules uses a set.
func uses(now snapshot, name string) bool {
	for _, d := range now {
		for _, c := range slices.Concat(d.table(filter).ours(), d.table(mangle).ours()) {
			if slices.ContainsFunc(c.Rules, func(r string) bool { return strings.Contains(r, "--match-set "+name) }) {
				return true
			}
		}
	}
	return false
}

func usesSets(now snapshot) bool { return uses(now, "basicfw") }

// setDrift compares the sets with the lists. The rules that use them are compared separately.
func (b *Backend) setDrift(ctx context.Context, want []listSet) (out []firewall.Drift) {
	if len(want) == 0 {
		return nil
	}
	have, err := b.entries(ctx)
	for _, s := range want {
		d := firewall.Drift{Family: s.family.String(), Chain: "set " + s.name, Kind: firewall.Altered, Want: fmt.Sprintf("%d networks", len(s.list))}
		n, exists := have[s.name]
		switch {
		case exists && n == len(s.list):
			continue
		case err != nil:
			d.Kind, d.Want = firewall.Missing, fmt.Sprintf("the set (%v)", err)
		case !exists:
			d.Kind, d.Want = firewall.Missing, "the set"
		default:
			d.Got = fmt.Sprintf("%d networks", n)
		}
		out = append(out, d)
	}
	return out
}

// removeSets removes our sets once no rule uses them, and keeps their content for restoreSets.
func (b *Backend) removeSets(ctx context.Context, was snapshot) error {
	if !usesSets(was) {
		return nil
	}
	have, err := b.entries(ctx)
	if err != nil {
		return fmt.Errorf("reading the sets of ipset: %w", err)
	}
	for name := range have {
		text, err := b.ipset(ctx, "", "save", name)
		if err == nil {
			b.removed += text
			_, err = b.ipset(ctx, "", "destroy", name)
		}
		if err != nil {
			return fmt.Errorf("removing the set %s: %w", name, err)
		}
	}
	return nil
}

// restoreSets creates the sets again that removeSets removed.
func (b *Backend) restoreSets(ctx context.Context) error {
	if b.removed == "" {
		return nil
	}
	_, err := b.ipset(ctx, b.removed, "restore", "-exist")
	if err == nil {
		b.removed = ""
	}
	return err
}
