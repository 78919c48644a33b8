package exposure

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"
)

// IPSet is a set that the match "set" of iptables looks up.
type IPSet struct {
	Type    string   // as ipset calls it: "hash:net,port"
	Family  string   // "ip" or "ip6"; "" for both
	Members []string // the sets of a list
	Size    int      // how many elements will be added, if known
	groups  map[setKey]*setGroup
	odd     bool // exceptions depend on two networks
}

// IPSetElement is an element of a set. Which fields it has depends on the type.
type IPSetElement struct {
	Net, Second netip.Prefix
	Proto       uint8
	Port        uint16 // of ICMP, 256 * type + code
	Interface   string // with a "*" at its end for any suffix
	NoMatch     bool   // an exception from wider networks
}

// setKey is what elements have in common apart from their first network.
type setKey struct {
	second netip.Prefix
	proto  uint8
	port   uint16
	device string
}

type setGroup struct {
	setKey
	lastPort         uint16 // of several consecutive ones
	networks, except Sources
}

// Add adds an element.
func (s *IPSet) Add(e IPSetElement) {
	if s.groups == nil {
		s.groups = map[setKey]*setGroup{}
	}
	s.odd = s.odd || e.NoMatch && e.Second.IsValid()
	k := setKey{e.Second, e.Proto, e.Port, e.Interface}
	g := s.groups[k]
	if g == nil {
		g = &setGroup{setKey: k, lastPort: k.port}
		s.groups[k] = g
		if k == (setKey{}) { // all of them will be in this group
			g.networks = make(Sources, 0, s.Size)
		}
	}
	switch {
	case !e.Net.IsValid():
	case e.NoMatch:
		g.except = append(g.except, Range{e.Net.Masked().Addr(), last(e.Net)})
	default:
		g.networks = append(g.networks, Range{e.Net.Masked().Addr(), last(e.Net)})
	}
}

// ResolveSets puts the contents of sets into the matches of tables. get returns a set.
// Matches with other sets, and with options that are not modelled, stay unknown.
func ResolveSets(tables []Table, get func(name string) (IPSet, error)) {
	r := setResolver{get: get, known: map[string]bool{}, sets: map[string]IPSet{}, changing: map[string]bool{}}
	type use struct {
		match  *Match
		family string
	}
	var uses []use
	for _, t := range tables {
		for _, c := range t.Chains {
			for i := range c.Rules {
				r.findChanges(c.Rules[i].Text)
				for j := range c.Rules[i].Matches {
					if m := &c.Rules[i].Matches[j]; strings.HasPrefix(m.Text, "-m set ") {
						uses = append(uses, use{m, t.Family})
					}
				}
			}
		}
	}
	for _, u := range uses {
		*u.match = r.resolve(*u.match, u.family)
	}
}

// findChanges records the sets to which a rule adds packets, or from which it deletes them.
func (r *setResolver) findChanges(rule string) {
	if !strings.Contains(rule, "-j SET ") {
		return
	}
	words := strings.Fields(rule)
	for i, w := range words[:len(words)-1] {
		if w == "--add-set" || w == "--del-set" {
			r.changing[words[i+1]] = true
		}
	}
}

type setResolver struct {
	get      func(name string) (IPSet, error)
	known    map[string]bool // whether sets could be read
	sets     map[string]IPSet
	changing map[string]bool // the sets that packets change
}

func (r *setResolver) read(name string) (IPSet, bool) {
	if _, ok := r.known[name]; !ok {
		s, err := r.get(name)
		r.sets[name], r.known[name] = s, err == nil
	}
	return r.sets[name], r.known[name]
}

// resolve returns the match for one whose text is "-m set [!] --match-set NAME src,dst".
func (r *setResolver) resolve(m Match, family string) Match {
	words := strings.Fields(m.Text)[2:]
	not := len(words) > 0 && words[0] == "!"
	if not {
		words = words[1:]
	}
	if len(words) < 3 || words[0] != "--match-set" {
		return m
	}
	for _, w := range words[3:] {
		if w != "!" && w != "--update-counters" && w != "--update-subcounters" {
			return m
		}
	}
	name := words[1]
	if r.changing[name] {
		m.Field = Sometimes
		return m
	}
	out, ok := r.lookup(name, strings.Split(words[2], ","), family, m.Text)
	if !ok {
		return m
	}
	out.Not = not
	return out
}

// lookup returns the match for a set. A match that is not modelled has the given text.
func (r *setResolver) lookup(name string, directions []string, family, text string) (Match, bool) {
	s, ok := r.read(name)
	if !ok {
		return Match{}, false
	}
	if s.Type == "list:set" {
		out := Match{Field: Any}
		for _, member := range s.Members {
			m, ok := r.lookup(member, directions, family, text)
			if !ok {
				m = Match{Field: Unknown, Text: text}
			}
			out.Of = append(out.Of, []Match{m})
		}
		return out, true
	}
	_, types, _ := strings.Cut(s.Type, ":")
	dims := strings.Split(types, ",")
	for _, d := range dims {
		if !slices.Contains([]string{"ip", "net", "port", "iface"}, d) {
			return Match{Field: Unknown, Text: text + " (" + s.Type + ")"}, true
		}
	}
	if len(directions) < len(dims) || s.Family != "" && s.Family != family { // ip_set_test in ip_set_core.c
		return never, true
	}
	return s.match(dims, directions)
}

// sorted returns the groups of a set. Groups with consecutive ports are merged.
func (s IPSet) sorted() (out []setGroup) {
	for _, g := range s.groups {
		one := *g
		one.networks, one.except = one.addresses(), nil
		out = append(out, one)
	}
	slices.SortFunc(out, func(a, b setGroup) int {
		return cmp.Or(a.second.Addr().Compare(b.second.Addr()), cmp.Compare(a.second.Bits(), b.second.Bits()),
			cmp.Compare(a.proto, b.proto), cmp.Compare(a.device, b.device), cmp.Compare(a.port, b.port))
	})
	joined := out[:0]
	for _, g := range out {
		if n := len(joined) - 1; n >= 0 && joined[n].lastPort+1 == g.port && joined[n].second == g.second && joined[n].proto == g.proto &&
			joined[n].device == g.device && slices.Equal(joined[n].networks, g.networks) {
			joined[n].lastPort = g.port
			continue
		}
		joined = append(joined, g)
	}
	return joined
}

// match returns the match for the elements of a set, or false if it is not modelled.
func (s IPSet) match(dims, directions []string) (Match, bool) {
	if s.odd {
		return Match{}, false
	}
	groups := s.sorted()
	out := Match{Field: Any}
	for _, g := range groups {
		var list []Match
		networks := g.networks
		for i, d := range dims {
			source := directions[i] == "src"
			switch d {
			case "ip", "net":
				m := Match{Field: Destination, Addrs: networks}
				if source {
					m.Field = Source
				}
				list = append(list, m)
				if g.second.IsValid() {
					networks = Of(g.second)
				}
			case "port":
				list = append(list, g.ports(s.Type == "bitmap:port", source)...)
			case "iface":
				m := Match{Field: OutInterface, Names: []string{g.device}}
				if source {
					m.Field = Interface
				}
				list = append(list, m)
			}
		}
		if len(groups) == 1 && len(list) == 1 {
			return list[0], true
		}
		out.Of = append(out.Of, list)
	}
	return out, true
}

// ports returns the matches for the port of a group (ip_set_get_ip4_port in
// ip_set_getport.c). A bitmap has ports of TCP and UDP.
func (g setGroup) ports(bitmap, source bool) []Match {
	number := []Span{{uint32(g.port), uint32(g.lastPort)}}
	proto := Match{Field: Protocol, Numbers: []Span{{uint32(g.proto), uint32(g.proto)}}}
	m := Match{Field: DestinationPort, Numbers: number}
	if source {
		m.Field = SourcePort
	}
	switch g.proto {
	case 6, 17, 132, 136:
		return []Match{proto, m}
	case 1, 58:
		return []Match{proto, {Field: ICMPType, Numbers: number}}
	}
	switch {
	case bitmap:
		proto.Numbers = []Span{{6, 6}, {17, 17}}
		return []Match{proto, m}
	case g.port != 0:
		return []Match{never}
	}
	return []Match{proto}
}

// addresses returns the addresses of a group. The longest network that contains an
// address decides.
func (g *setGroup) addresses() (out Sources) {
	if len(g.except) == 0 {
		return Union(g.networks)
	}
	byBits := map[int][2]Sources{}
	for which, list := range [2]Sources{g.networks, g.except} {
		for _, r := range list {
			bits := Sources{r}.Networks()[0].Bits()
			of := byBits[bits]
			of[which] = append(of[which], r)
			byBits[bits] = of
		}
	}
	for _, bits := range slices.Sorted(maps.Keys(byBits)) {
		out = Union(out, Union(byBits[bits][0])).Without(Union(byBits[bits][1]))
	}
	return out
}
