package firewall

import (
	"fmt"
	"slices"
)

// Kinds of Drift.
const (
	Missing = "missing" // desired and not present
	Extra   = "extra"   // present and not desired
	Altered = "altered" // present in another form or at another position
)

// Drift is one difference between the desired and the actual state.
type Drift struct {
	Family string `json:"family"` // "ipv4", "ipv6", or "" if it has none
	Chain  string `json:"chain"`  // a chain, or the path of a file
	Kind   string `json:"kind"`
	Want   string `json:"want"`
	Got    string `json:"got"`
}

// String returns the drift as one line of text.
func (d Drift) String() string {
	where := d.Chain
	if d.Family != "" {
		where = d.Family + " " + d.Chain
	}
	switch d.Kind {
	case Missing:
		return fmt.Sprintf("%s: missing: %s", where, d.Want)
	case Extra:
		return fmt.Sprintf("%s: extra: %s", where, d.Got)
	}
	return fmt.Sprintf("%s: altered: %s, want %s", where, d.Got, d.Want)
}

// Foreign is a rule of another program or the administrator that accepts or drops
// packets to this host.
type Foreign struct {
	Family string `json:"family"`
	Chain  string `json:"chain"`
	Rule   string `json:"rule"`
	Effect string `json:"effect"`
}

// Lines compares two lists of lines. It returns a shortest list of drifts, in
// order, that turns got into want. A line that replaces another is one Altered.
func Lines(family, chain string, want, got []string) []Drift {
	var drifts []Drift
	for _, h := range Hunks(got, want) {
		extra, missing := got[h.From:h.FromEnd], want[h.To:h.ToEnd]
		for i := range max(len(extra), len(missing)) {
			d := Drift{Family: family, Chain: chain, Kind: Altered}
			if i < len(extra) {
				d.Got = extra[i]
			} else {
				d.Kind = Missing
			}
			if i < len(missing) {
				d.Want = missing[i]
			} else {
				d.Kind = Extra
			}
			drifts = append(drifts, d)
		}
	}
	return drifts
}

// Hunk is a difference between two lists: from[From:FromEnd] is replaced by
// to[To:ToEnd]. Either may be empty.
type Hunk struct{ From, FromEnd, To, ToEnd int }

// Hunks returns the differences between two lists, in order, with as few removals
// and insertions as possible. Memory is proportional to the lengths, and time to the
// lengths times the number of differences (E. W. Myers, An O(ND) Difference Algorithm
// and Its Variations, 1986).
func Hunks[T comparable](from, to []T) []Hunk {
	if slices.Equal(from, to) {
		return nil
	}
	numbers := map[T]int{}
	numbered := func(list []T) []int {
		out := make([]int, len(list))
		for i, v := range list {
			if _, ok := numbers[v]; !ok {
				numbers[v] = len(numbers)
			}
			out[i] = numbers[v]
		}
		return out
	}
	room := len(from) + len(to) + 3
	c := common{forward: make([]int, room), backward: make([]int, room)}
	c.find(numbered(from), numbered(to), 0, 0)

	var hunks []Hunk
	var h Hunk
	for _, p := range append(c.found, [2]int{len(from), len(to)}) {
		if h.FromEnd, h.ToEnd = p[0], p[1]; h.From < h.FromEnd || h.To < h.ToEnd {
			hunks = append(hunks, h)
		}
		h = Hunk{From: p[0] + 1, To: p[1] + 1}
	}
	return hunks
}

// common is a search for a longest common subsequence.
type common struct {
	found             [][2]int // the positions of its elements in both lists
	forward, backward []int    // buffers for middle
}

// find appends a longest common subsequence of two lists, which begin at positions i
// and j, to c.found.
func (c *common) find(a, b []int, i, j int) {
	for ; len(a) > 0 && len(b) > 0 && a[0] == b[0]; i, j = i+1, j+1 {
		c.found = append(c.found, [2]int{i, j})
		a, b = a[1:], b[1:]
	}
	n, m := len(a), len(b)
	for n > 0 && m > 0 && a[n-1] == b[m-1] {
		n, m = n-1, m-1
	}
	if n > 0 && m > 0 {
		x, y := c.middle(a[:n], b[:m])
		c.find(a[:x], b[:y], i, j)
		c.find(a[x:n], b[y:m], i+x, j+y)
	}
	for ; n < len(a); n, m = n+1, m+1 {
		c.found = append(c.found, [2]int{i + n, j + m})
	}
}

// middle returns the midpoint of a shortest path from the beginning of both lists to
// their end. A step to x+1 removes an element of a, and a step to y+1 inserts one of b.
// A step to both keeps an element and is free. Paths are extended from both ends, one
// step at a time, until two meet. The lists begin and end with different elements, so
// the point is neither end.
func (c *common) middle(a, b []int) (x, y int) {
	n, m := len(a), len(b)
	// The furthest x reached on each diagonal x-y is at index x-y+zero.
	zero, last := m+1, n+m+1
	f, fLow, fHigh := c.forward, zero, zero
	r, rLow, rHigh := c.backward, n+1, n+1
	f[fLow], r[rLow] = 0, n
	for {
		fLow, fHigh = widen(f, fLow, fHigh, last, -1)
		for k := fLow; k <= fHigh; k += 2 {
			x := max(f[k-1]+1, f[k+1])
			for x < n && x-k+zero < m && a[x] == b[x-k+zero] {
				x++
			}
			f[k] = x
			if (n-m)%2 != 0 && rLow <= k && k <= rHigh && r[k] <= x {
				return x, x - k + zero
			}
		}
		rLow, rHigh = widen(r, rLow, rHigh, last, n+1)
		for k := rLow; k <= rHigh; k += 2 {
			x := min(r[k-1], r[k+1]-1)
			for x > 0 && x-k+zero > 0 && a[x-1] == b[x-k+zero-1] {
				x--
			}
			r[k] = x
			if (n-m)%2 == 0 && fLow <= k && k <= fHigh && x <= f[k] {
				return x, x - k + zero
			}
		}
	}
}

// widen returns the diagonals that one more step reaches, from 1 to last, and
// marks the adjacent ones as not reached.
func widen(reached []int, low, high, last, not int) (int, int) {
	if low > 1 {
		low--
		reached[low-1] = not
	} else {
		low++
	}
	if high < last {
		high++
		reached[high+1] = not
	} else {
		high--
	}
	return low, high
}
