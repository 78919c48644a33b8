package firewall

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// BlockChain holds the rules for blocked sources.
const BlockChain = ChainPrefix + "BLOCK"

// blockComment is the comment of the rules that lead to those of the lists, whose own
// comments are blockComment, "-" and the list's name.
const blockComment = "basicfw-block"

// MaxBlocked is the maximum number of networks of all lists together, after
// overlapping and adjacent ones were merged. The state and its copy contain them.
const MaxBlocked = 250_000

// Block is a list of networks whose packets are dropped on public interfaces, except for
// replies to connections of this host.
type Block struct {
	// Name is as a service's, but may be a reserved one.
	Name string `json:"name"`
	// Networks are in order, and none contains or completes another: see [MergePrefixes].
	Networks Prefixes `json:"networks,omitempty"`
	// File is the file from which they were read.
	File string `json:"file,omitempty"`
	// Forced are networks that are blocked only because the administrator insisted.
	Forced []netip.Prefix `json:"forced,omitempty"`
	// Until is when the entry expires, in whole seconds of UTC; zero is never.
	Until time.Time `json:"until,omitzero"`
	// Source is where the list is configured. It has no effect on rules.
	Source string `json:"source,omitempty"`
}

// Networks is a list of networks of one family that a rule matches. They are in
// order, and none contains another. Rulesets with the same name have the same list.
type Networks struct {
	Name string   `json:"name"` // of the kernel's set
	List Prefixes `json:"list"`
}

// Prefixes is a list of networks, which is one string in JSON: it takes a second to
// read a hundred thousand strings.
type Prefixes []netip.Prefix

// MarshalText returns the networks, separated by spaces.
func (l Prefixes) MarshalText() ([]byte, error) {
	b := make([]byte, 0, 20*len(l))
	for i, p := range l {
		if i > 0 {
			b = append(b, ' ')
		}
		b = p.AppendTo(b)
	}
	return b, nil
}

// UnmarshalText parses what MarshalText returns.
func (l *Prefixes) UnmarshalText(text []byte) error {
	words := strings.Fields(string(text))
	*l = make(Prefixes, len(words))
	for i, w := range words {
		p, err := netip.ParsePrefix(w)
		if err != nil {
			return err
		}
		(*l)[i] = p
	}
	return nil
}

// Contains reports whether an address is in one of the networks.
func (n Networks) Contains(a netip.Addr) bool {
	_, ok := within(n.List, netip.PrefixFrom(a, a.BitLen()))
	return ok
}

// within returns the network of a sorted list without overlaps that contains p.
func within(list []netip.Prefix, p netip.Prefix) (netip.Prefix, bool) {
	i, found := slices.BinarySearchFunc(list, p.Addr(), func(n netip.Prefix, a netip.Addr) int { return n.Addr().Compare(a) })
	if !found {
		i--
	}
	if i >= 0 && list[i].Bits() <= p.Bits() && list[i].Contains(p.Addr()) {
		return list[i], true
	}
	return netip.Prefix{}, false
}

// CheckBlockName returns an error if the name of a list is invalid.
func CheckBlockName(name string) error {
	if name == "" || len(name) > 20 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("list name %s: want 1 to 20 of a-z, 0-9 and \"-\"", Quote(name))
	}
	return nil
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), a.Bits()-b.Bits())
}

// MergePrefixes returns the fewest networks with the same addresses, in order, IPv4 first.
func MergePrefixes(list []netip.Prefix) []netip.Prefix {
	list = slices.Clone(list)
	slices.SortFunc(list, comparePrefixes)
	out := list[:0]
	for _, p := range list {
		if n := len(out); n > 0 && out[n-1].Bits() <= p.Bits() && out[n-1].Contains(p.Addr()) {
			continue
		}
		// Two halves of a network are that network.
		for n := len(out); n > 0 && p.Bits() > 0 && out[n-1].Bits() == p.Bits(); n = len(out) {
			whole := netip.PrefixFrom(p.Addr(), p.Bits()-1).Masked()
			if out[n-1].Addr() != whole.Addr() {
				break
			}
			p, out = whole, out[:n-1]
		}
		out = append(out, p)
	}
	return slices.Clip(out)
}

// SubtractPrefixes returns the networks of a list as MergePrefixes returns it without the
// addresses of another one.
func SubtractPrefixes(list, minus []netip.Prefix) []netip.Prefix {
	minus = MergePrefixes(minus)
	var out []netip.Prefix
	for _, p := range list {
		out = appendWithout(out, p, minus)
	}
	return out
}

func appendWithout(out []netip.Prefix, p netip.Prefix, others []netip.Prefix) []netip.Prefix {
	if _, ok := within(others, p); ok {
		return out
	}
	// The first that could be a part of p.
	i, _ := slices.BinarySearchFunc(others, p.Addr(), func(n netip.Prefix, a netip.Addr) int { return n.Addr().Compare(a) })
	if i == len(others) || !p.Contains(others[i].Addr()) {
		return append(out, p)
	}
	low, high := halves(p)
	return appendWithout(appendWithout(out, low, others), high, others)
}

// halves returns the two halves of a network of several addresses.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	b := p.Addr().AsSlice()
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	second, _ := netip.AddrFromSlice(b)
	return netip.PrefixFrom(p.Addr(), p.Bits()+1), netip.PrefixFrom(second, p.Bits()+1)
}

// Blocked returns the entry that blocks an address, if one does.
func (d Desired) Blocked(a netip.Addr) (Block, bool) {
	i := slices.IndexFunc(d.Blocks, func(b Block) bool { return Networks{List: b.Networks}.Contains(a.Unmap()) })
	if i < 0 {
		return Block{}, false
	}
	return d.Blocks[i], true
}

// block returns the jumps of row 1a, one for each public interface.
func (c *compiler) block() (rules []Rule) {
	list := c.blocked()
	if len(list) == 0 {
		return nil
	}
	for _, name := range c.d.InterfacesOf(string(PublicZone)) {
		rules = append(rules, Rule{In: name, Comment: blockComment, Target: BlockChain})
	}
	if len(rules) > 0 {
		c.extra = append(c.extra, Chain{Name: BlockChain, Rules: list})
	}
	return rules
}

// blocked returns the rules for packets in INPUT. What an unlock admits is not dropped.
func (c *compiler) blocked() []Rule {
	list := c.drops()
	if len(list) == 0 {
		return nil
	}
	return append(c.unlockBlocked(), list...)
}

// drops returns the rules that drop packets of blocked sources. Other packets return,
// and so do replies to connections that this host or a container opened.
func (c *compiler) drops() []Rule {
	if len(c.d.Blocks) == 0 {
		return nil
	}
	rules := []Rule{{State: StateReply, Comment: blockComment, Target: Return}}
	names := map[string]int{}
	for _, b := range c.d.Blocks {
		own := c.own(b.Networks)
		if len(own) == 0 {
			continue
		}
		comment, name := blockComment+"-"+b.Name, "block-"+b.Name
		if names[name]++; names[name] > 1 {
			name = fmt.Sprintf("%s-%d", name, names[name])
		}
		rules = append(rules, Rule{Sources: &Networks{Name: name, List: own}, Until: b.Until, Comment: comment, Target: Drop})
	}
	return rules
}

// unlockBlocked returns the rules that let SSH sources of an unlock bypass the blocks.
func (c *compiler) unlockBlocked() (rules []Rule) {
	u := c.d.Unlock
	if u == nil || u.All {
		return nil
	}
	sources := []netip.Prefix{{}}
	if len(u.From) > 0 {
		sources = c.own(u.From)
	}
	ports := slices.Clone(c.d.SSH.Ports)
	slices.Sort(ports)
	for _, port := range slices.Compact(ports) {
		for _, p := range sources {
			rules = append(rules, Rule{Src: p, Proto: TCP, DstPort: Port(port), Until: u.Until, Comment: unlockComment, Target: Return})
		}
	}
	return rules
}

// isBlock reports whether a rule is one of row 1a.
func (r Rule) isBlock() bool {
	return r.Target == BlockChain || r.Comment == blockComment || r.Sources != nil
}

// check returns an error for a list that cannot be loaded. A nil list is valid.
func (n *Networks) check(f Family) error {
	if n == nil {
		return nil
	}
	if !isWord(n.Name, 30) || len(n.List) == 0 {
		return fmt.Errorf("list %q: invalid name, or no network", n.Name)
	}
	for i, p := range n.List {
		if FamilyOf(p) != f || p.Masked() != p || p.Addr().Zone() != "" || p.Addr().Is4In6() ||
			i > 0 && (n.List[i-1].Addr().Compare(p.Addr()) >= 0 || n.List[i-1].Contains(p.Addr())) {
			return fmt.Errorf("list %q: network %q is invalid in %v", n.Name, p, f)
		}
	}
	return nil
}
