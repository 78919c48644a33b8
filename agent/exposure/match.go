package exposure

import (
	"slices"
	"strings"
)

// selection is a set of sources; all is every source.
type selection struct {
	all bool
	set Sources
}

func (s selection) none() bool { return !s.all && len(s.set) == 0 }

func (s selection) of(from Sources) Sources {
	if s.all {
		return from
	}
	return from.Both(s.set)
}

func (s selection) not(from Sources) Sources {
	if s.all {
		return nil
	}
	return from.Without(s.set)
}

func (s selection) and(o selection) selection {
	switch {
	case s.all:
		return o
	case o.all:
		return s
	}
	return selection{set: s.set.Both(o.set)}
}

func (s selection) or(o selection) selection {
	if s.all || o.all {
		return selection{all: true}
	}
	return selection{set: Union(s.set, o.set)}
}

// complement returns the other sources of p's family.
func (s selection) complement(p *Packet) selection {
	if s.none() {
		return selection{all: true}
	}
	return selection{set: s.not(All(p.Dst))}
}

// conjunction returns the sources from which a packet surely matches all of a list, and
// those from which it surely or perhaps does, with the reasons for the difference.
func conjunction(list []Match, p *Packet) (yes, possible selection, why []string) {
	yes, possible = selection{all: true}, selection{all: true}
	for i := range list {
		y, n, reasons := list[i].sources(p)
		if yes, possible = yes.and(y), possible.and(n); possible.none() {
			return selection{}, selection{}, nil
		}
		why = append(why, reasons...)
	}
	return yes, possible, why
}

// sources returns what conjunction does, for one match.
func (m *Match) sources(p *Packet) (yes, possible selection, why []string) {
	switch m.Field {
	case Unknown, Sometimes:
		return selection{}, selection{all: true}, []string{m.Text}
	case Destination, DestinationPort, Mark:
		switch {
		case p.vague && m.Field != Mark:
			return selection{}, selection{all: true}, []string{"the new destination"}
		case p.marked && m.Field == Mark:
			return selection{}, selection{all: true}, []string{"the mark"}
		}
		yes.all = m.matches(p)
		possible = yes
	case OriginalDestination, OriginalPort:
		if p.Untracked || p.early { // no match, even if negated (xt_conntrack.c, nft_ct.c)
			return selection{}, selection{}, nil
		}
		yes.all = m.matches(p)
		possible = yes
	case OutInterface:
		if p.Out == "?" {
			return selection{}, selection{all: true}, []string{"the route to " + p.Dst.String()}
		}
		yes.all = m.matches(p)
		possible = yes
	case SourcePort:
		if p.SrcPort == 0 { // the client's choice
			return selection{}, selection{all: true}, []string{"the source port"}
		}
		yes.all = m.matches(p)
		possible = yes
	case Source:
		yes = selection{set: m.Addrs}
		possible = yes
	case Any:
		for _, list := range m.Of {
			y, n, reasons := conjunction(list, p)
			yes, possible, why = yes.or(y), possible.or(n), append(why, reasons...)
		}
	default:
		yes.all = m.matches(p)
		possible = yes
	}
	if m.Not {
		yes, possible = possible.complement(p), yes.complement(p)
	}
	return yes, possible, why
}

// matches reports whether a packet matches, for a field that does not depend on sources.
func (m *Match) matches(p *Packet) bool {
	number := func(n uint32) bool {
		return slices.ContainsFunc(m.Numbers, func(s Span) bool { return s.First <= n && n <= s.Last })
	}
	// Ports exist only in some protocols, and ICMP types in two.
	ports := p.Proto == 6 || p.Proto == 17 || p.Proto == 132 || p.Proto == 33 || p.Proto == 136
	switch m.Field {
	case Interface:
		return named(m.Names, p.In)
	case OutInterface:
		return named(m.Names, p.Out)
	case Destination:
		return m.Addrs.Contains(p.Dst)
	case OriginalDestination:
		if p.Translated {
			return m.Addrs.Contains(p.OrigDst)
		}
		return m.Addrs.Contains(p.Dst)
	case Protocol:
		return number(uint32(p.Proto))
	case SourcePort:
		return ports && number(uint32(p.SrcPort))
	case DestinationPort:
		return ports && number(uint32(p.DstPort))
	case OriginalPort:
		if p.Translated {
			return number(uint32(p.OrigPort))
		}
		return number(uint32(p.DstPort))
	case ICMPType:
		return (p.Proto == 1 || p.Proto == 58) && number(uint32(p.ICMPType))
	case TCPFlags:
		return p.Proto == 6 && number(uint32(p.TCPFlags)&m.Mask)
	case Mark:
		return number(p.Mark & m.Mask)
	case DestinationType:
		return slices.Contains(m.Names, p.DstType)
	case State:
		state := "NEW"
		switch {
		case p.Untracked:
			state = "UNTRACKED"
		case p.early:
			state = "INVALID"
		}
		// The kernel does not count a translation to the same destination.
		moved := p.Translated && (p.vague || p.OrigDst != p.Dst || p.OrigPort != p.DstPort)
		return slices.Contains(m.Names, state) || moved && slices.Contains(m.Names, "DNAT")
	}
	return false
}

// named reports whether an interface has one of the names.
func named(names []string, is string) bool {
	return slices.ContainsFunc(names, func(name string) bool {
		prefix, any := strings.CutSuffix(name, "*")
		return is == name || any && strings.HasPrefix(is, prefix)
	})
}
