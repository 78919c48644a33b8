package agent

import "time"

// How often something is repaired that is undone again, before it takes two to
// fight: so many times within a minute, and then once after each pause, which
// doubles.
const (
	fightRepairs  = 5
	fightWithin   = time.Minute
	fightFirst    = 10 * time.Second
	fightLongest  = 10 * time.Minute
	fightOverWhen = time.Minute // without anything to repair, and without a pause
)

// fight keeps us from repairing for ever what somebody else undoes.
type fight struct {
	repairs []time.Time   // of the last minute
	pause   time.Duration // how long the last pause was; zero is peace
	until   time.Time     // when it ends
	tried   bool          // something was repaired since
	last    time.Time     // when something was last found to be repaired
}

// drifted tells whether what was found at a time is to be repaired. It begins a
// pause where that would be once too often.
func (f *fight) drifted(now time.Time) (repair, paused bool) {
	f.last = now
	if now.Before(f.until) {
		return false, false
	}
	for len(f.repairs) > 0 && now.Sub(f.repairs[0]) >= fightWithin {
		f.repairs = f.repairs[1:]
	}
	if f.pause == 0 && len(f.repairs) >= fightRepairs || f.tried {
		f.rest(now)
		return false, true
	}
	f.tried = f.pause > 0
	f.repairs = append(f.repairs, now)
	return true, false
}

// rest begins a pause.
func (f *fight) rest(now time.Time) {
	f.pause = min(max(2*f.pause, fightFirst), fightLongest)
	f.until, f.tried = now.Add(f.pause), false
}

// quiet notes that nothing was to be repaired, and tells whether that ends a
// fight.
func (f *fight) quiet(now time.Time) (over bool) {
	if f.pause == 0 || now.Sub(f.last) < fightOverWhen || now.Sub(f.until) < fightOverWhen {
		return false
	}
	*f = fight{}
	return true
}

// paused tells whether nothing is repaired at a time.
func (f *fight) paused(now time.Time) bool { return now.Before(f.until) }
