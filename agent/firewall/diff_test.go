package firewall

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"
)

// commonLength returns the length of a longest common subsequence, by its definition.
func commonLength(a, b []byte) int {
	row := make([]int, len(b)+1)
	for i := range a {
		last := slices.Clone(row)
		for j := range b {
			if a[i] == b[j] {
				row[j+1] = last[j] + 1
			} else {
				row[j+1] = max(last[j+1], row[j])
			}
		}
	}
	return row[len(b)]
}

// checkHunks checks that the hunks of two lists are in order and disjoint, that they
// turn one list into the other, and that no shorter ones exist.
func checkHunks(t *testing.T, from, to []byte) {
	t.Helper()
	hunks := Hunks(from, to)
	var made []byte
	changes, at := 0, 0
	for i, h := range hunks {
		if h.FromEnd < h.From || h.ToEnd < h.To || h.FromEnd-h.From+h.ToEnd-h.To == 0 || h.From < at || i > 0 && h.From == at {
			t.Fatalf("%q to %q: hunk %d of %v", from, to, i, hunks)
		}
		made = append(append(made, from[at:h.From]...), to[h.To:h.ToEnd]...)
		if len(made) != h.ToEnd {
			t.Fatalf("%q to %q: hunk %d of %v is misplaced", from, to, i, hunks)
		}
		changes += h.FromEnd - h.From + h.ToEnd - h.To
		at = h.FromEnd
	}
	made = append(made, from[at:]...)
	if want := len(from) + len(to) - 2*commonLength(from, to); !slices.Equal(made, to) || changes != want {
		t.Fatalf("%q to %q: %v result in %q, with %d changes, want %d", from, to, hunks, made, changes, want)
	}
}

func TestHunks(t *testing.T) {
	// Every pair of lists of up to five elements of three kinds.
	lists := [][]byte{nil}
	for i := 0; i < len(lists) && len(lists[i]) < 5; i++ {
		for c := byte('a'); c <= 'c'; c++ {
			lists = append(lists, append(slices.Clone(lists[i]), c))
		}
	}
	for _, from := range lists {
		for _, to := range lists {
			checkHunks(t, from, to)
		}
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 20000 {
		kinds := 1 + random.IntN(12)
		list := func() []byte {
			out := make([]byte, random.IntN(40))
			for i := range out {
				out[i] = 'a' + byte(random.IntN(kinds))
			}
			return out
		}
		checkHunks(t, list(), list())
	}
}

// numberedLines returns count different lines.
func numberedLines(what string, count int) []string {
	lines := make([]string, count)
	for i := range lines {
		lines[i] = fmt.Sprintf("%s %d", what, i)
	}
	return lines
}

// A long list of networks that was replaced is compared line by line, with little memory.
func TestLinesMemory(t *testing.T) {
	want, got := numberedLines("want", 4000), numberedLines("got", 4000)
	reversed := slices.Clone(want)
	slices.Reverse(reversed)
	for _, tt := range []struct {
		what  string
		got   []string
		count int
	}{
		{"entirely different lists", got, 4000},
		{"the same lines in reverse order", reversed, 2*4000 - 2},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		drifts := Lines("ipv4", "set", want, tt.got)
		runtime.ReadMemStats(&after)
		if len(drifts) != tt.count {
			t.Errorf("%s: %d drifts, want %d", tt.what, len(drifts), tt.count)
		}
		if got, most := after.TotalAlloc-before.TotalAlloc, uint64(20<<20); got > most {
			t.Errorf("%s: %d bytes allocated, want at most %d", tt.what, got, most)
		}
	}
}

func BenchmarkLines(b *testing.B) {
	want := numberedLines("want", 8000)
	reversed := slices.Clone(want)
	slices.Reverse(reversed)
	edges := slices.Clone(want)
	edges[10], edges[7990] = "x", "y"
	for name, got := range map[string][]string{"different": numberedLines("got", 8000), "reversed": reversed, "two": edges} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				Lines("ipv4", "set", want, got)
			}
		})
	}
}
