package daemon

import (
	"testing"
	"time"
)

// Another program undoes each repair at once: a check every second finds drift. The
// backoff limits the repairs and ends once there is no drift.
func TestBackoffLimitsRepairs(t *testing.T) {
	var b backoff
	start := time.Now()
	repairs := map[int]int{} // by minute
	var pauses []time.Duration
	for s := range 3600 {
		repair, paused := b.drifted(start.Add(time.Duration(s) * time.Second))
		if repair {
			repairs[s/60]++
		}
		if paused {
			pauses = append(pauses, b.pause)
		}
	}
	if repairs[0] < backoffRepairs || repairs[0] > backoffRepairs+3 {
		t.Errorf("%d repairs in the first minute", repairs[0])
	}
	all := 0
	for _, n := range repairs {
		all += n
	}
	if all > backoffRepairs+12 {
		t.Errorf("%d repairs in an hour", all)
	}
	for i, p := range pauses {
		if want := min(backoffFirst<<i, backoffLongest); p != want {
			t.Errorf("pause %d is %v, want %v", i, p, want)
		}
	}

	now := b.until
	if repair, _ := b.drifted(now); !repair {
		t.Error("no repair when the pause is over")
	}
	for s := 1; s < 60; s++ {
		if b.quiet(now.Add(time.Duration(s) * time.Second)) {
			t.Fatalf("over after %d seconds", s)
		}
	}
	if now = now.Add(time.Minute); !b.quiet(now) || b.quiet(now) {
		t.Error("not over, once, after a minute")
	}
	for i := range backoffRepairs {
		if repair, _ := b.drifted(now); !repair {
			t.Errorf("repair %d after the backoff is not made", i)
		}
	}
}

// Infrequent changes are repaired each time.
func TestBackoffSparesRareChanges(t *testing.T) {
	var b backoff
	now := time.Now()
	for i := range 100 {
		if repair, _ := b.drifted(now.Add(time.Duration(i) * 15 * time.Second)); !repair {
			t.Fatalf("change %d in %d quarters of a minute is not repaired", i, i)
		}
	}
}

// A check follows events once they pause, or after a limit.
func TestDebounceWaitsForQuiet(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(1000000 + ms)) }
	for _, tt := range []struct {
		name   string
		events []int // ms
		due    int
	}{
		{"one", []int{0}, 250},
		{"a burst", []int{0, 10, 200}, 450},
		{"without end", []int{0, 200, 400, 600, 800, 990}, 1000},
	} {
		var d debounce
		if !d.due(settleLimit).IsZero() {
			t.Errorf("%s: due without events", tt.name)
		}
		for _, n := range tt.events {
			d.event(at(n))
		}
		if got := d.due(settleLimit); !got.Equal(at(tt.due)) {
			t.Errorf("%s: due at %v, want %v", tt.name, got.Sub(at(0)), at(tt.due).Sub(at(0)))
		}
	}
}
