package exposure

import (
	"net/netip"
	"slices"
)

// Range is a range of addresses of one family, with both ends.
type Range struct{ First, Last netip.Addr }

// Sources is a set of addresses of one family: ranges in order, with gaps between them.
type Sources []Range

// All returns every address of the family of an address.
func All(like netip.Addr) Sources {
	if like.Is4() {
		return Of(netip.PrefixFrom(netip.IPv4Unspecified(), 0))
	}
	return Of(netip.PrefixFrom(netip.IPv6Unspecified(), 0))
}

// Of returns the addresses of networks of one family.
func Of(networks ...netip.Prefix) Sources {
	var out Sources
	for _, n := range networks {
		out = append(out, Range{n.Masked().Addr(), last(n)})
	}
	return Union(out)
}

func last(n netip.Prefix) netip.Addr {
	b := n.Addr().AsSlice()
	for i := range b {
		switch bits := n.Bits() - 8*i; {
		case bits <= 0:
			b[i] = 0xff
		case bits < 8:
			b[i] |= 0xff >> bits
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Union returns the addresses of several sets, whose ranges may overlap.
func Union(sets ...Sources) Sources {
	sets = slices.DeleteFunc(slices.Clone(sets), func(s Sources) bool { return len(s) == 0 })
	if len(sets) == 1 && sets[0].normal() {
		return sets[0]
	}
	all := slices.Concat(sets...)
	slices.SortFunc(all, func(a, b Range) int { return a.First.Compare(b.First) })
	out := all[:0]
	for _, r := range all {
		if n := len(out); n > 0 && (r.First.Compare(out[n-1].Last) <= 0 || out[n-1].Last.Next() == r.First) {
			if r.Last.Compare(out[n-1].Last) > 0 {
				out[n-1].Last = r.Last
			}
			continue
		}
		out = append(out, r)
	}
	return out
}

// normal reports whether the ranges are in order, with gaps between them.
func (s Sources) normal() bool {
	for i := 1; i < len(s); i++ {
		if next := s[i-1].Last.Next(); !next.IsValid() || s[i].First.Compare(next) <= 0 {
			return false
		}
	}
	return true
}

// Both returns the addresses that are in both sets.
func (s Sources) Both(other Sources) Sources {
	switch {
	case len(s) == 1:
		return other.within(s[0])
	case len(other) == 1:
		return s.within(other[0])
	}
	var out Sources
	for i, j := 0, 0; i < len(s) && j < len(other); {
		first, end := s[i].First, s[i].Last
		if other[j].First.Compare(first) > 0 {
			first = other[j].First
		}
		if other[j].Last.Compare(end) < 0 {
			end = other[j].Last
		}
		if first.Compare(end) <= 0 {
			out = append(out, Range{first, end})
		}
		if s[i].Last.Compare(other[j].Last) < 0 {
			i++
		} else {
			j++
		}
	}
	return out
}

// within returns the addresses that are in a range. The result may share memory with s.
func (s Sources) within(r Range) Sources {
	from, _ := slices.BinarySearchFunc(s, r.First, func(one Range, a netip.Addr) int { return one.Last.Compare(a) })
	to, found := slices.BinarySearchFunc(s, r.Last, func(one Range, a netip.Addr) int { return one.First.Compare(a) })
	if found {
		to++
	}
	if from >= to {
		return nil
	}
	out := s[from:to:to]
	if first, end := out[0].First, out[len(out)-1].Last; first.Compare(r.First) < 0 || end.Compare(r.Last) > 0 {
		out = slices.Clone(out)
		if first.Compare(r.First) < 0 {
			out[0].First = r.First
		}
		if end.Compare(r.Last) > 0 {
			out[len(out)-1].Last = r.Last
		}
	}
	return out
}

// Without returns the addresses of s that are not in the other set.
func (s Sources) Without(other Sources) Sources {
	if len(s) == 0 || len(other) == 0 {
		return s
	}
	gaps := make(Sources, 0, len(other)+1)
	next, open := All(s[0].First)[0].First, true
	end := All(s[0].First)[0].Last
	for _, r := range other {
		if next.Compare(r.First) < 0 {
			gaps = append(gaps, Range{next, r.First.Prev()})
		}
		if open = r.Last != end; open {
			next = r.Last.Next()
		}
	}
	if open {
		gaps = append(gaps, Range{next, end})
	}
	return s.Both(gaps)
}

// Contains reports whether an address is in the set.
func (s Sources) Contains(a netip.Addr) bool {
	i, found := slices.BinarySearchFunc(s, a, func(r Range, a netip.Addr) int {
		if r.Last.Compare(a) < 0 {
			return -1
		}
		if r.First.Compare(a) > 0 {
			return 1
		}
		return 0
	})
	return found && i < len(s)
}
