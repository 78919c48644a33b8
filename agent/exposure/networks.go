package exposure

import (
	"encoding/binary"
	"encoding/json"
	"math"
	"math/bits"
	"net/netip"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// MarshalJSON returns the networks in CIDR form, and addresses without a prefix length.
func (s Sources) MarshalJSON() ([]byte, error) {
	return json.Marshal(firewall.FormatPrefixes(s.Networks()))
}

// Networks returns the fewest networks that have the same addresses.
func (s Sources) Networks() []netip.Prefix {
	var out []netip.Prefix
	for _, r := range s {
		for a := r.First; ; {
			n := netip.PrefixFrom(a, a.BitLen())
			for n.Bits() > 0 {
				wider := netip.PrefixFrom(a, n.Bits()-1)
				if wider.Masked().Addr() != a || last(wider).Compare(r.Last) > 0 {
					break
				}
				n = wider
			}
			out = append(out, n)
			end := last(n)
			if end == r.Last {
				break
			}
			a = end.Next()
		}
	}
	return out
}

// size returns the number of addresses.
func (s Sources) size() (n float64) {
	for _, r := range s {
		a, b := r.First.As16(), r.Last.As16()
		low, borrow := bits.Sub64(binary.BigEndian.Uint64(b[8:]), binary.BigEndian.Uint64(a[8:]), 0)
		high, _ := bits.Sub64(binary.BigEndian.Uint64(b[:8]), binary.BigEndian.Uint64(a[:8]), borrow)
		n += math.Ldexp(float64(high), 64) + float64(low) + 1
	}
	return n
}
