package firewall

import (
	"slices"
	"time"
)

// Moment is a point in time, by the wall clock and by the uptime, which clock changes
// do not affect.
type Moment struct {
	Time   time.Time
	Boot   string // identifies the boot; "" is unknown
	Uptime time.Duration
}

// Window is a period of time.
type Window struct {
	Since time.Time `json:"since"`
	Until time.Time `json:"until"` // in whole seconds of UTC
	// Boot identifies the boot in which the window began. Began and Ends are the
	// uptime at its beginning and end.
	Boot  string        `json:"boot,omitempty"`
	Began time.Duration `json:"began,omitempty"`
	Ends  time.Duration `json:"ends,omitempty"`
}

// NewWindow returns the window of a length that begins at a moment.
func NewWindow(m Moment, length time.Duration) Window {
	w := Window{Since: m.Time.UTC().Truncate(time.Second), Until: m.Time.Add(length).UTC().Truncate(time.Second)}
	if m.Boot != "" {
		w.Boot, w.Began, w.Ends = m.Boot, m.Uptime, m.Uptime+length
	}
	return w
}

// here reports whether a window began in the boot of a moment. If so, uptime decides
// when it ends, otherwise the clock.
func (w Window) here(m Moment) bool { return w.Boot != "" && w.Boot == m.Boot }

// Over reports whether a window has ended. If the clock decides, the window is also
// over if the clock is before its beginning: how far the clock was set back is unknown.
func (w Window) Over(m Moment) bool {
	if w.here(m) {
		return m.Uptime > w.Ends
	}
	return over(w.Until, m.Time) || m.Time.Before(w.Since)
}

// End returns when a window ends, by the clock as it shows at a moment.
func (w Window) End(m Moment) time.Time {
	if w.here(m) {
		return m.Time.Add(w.Ends - m.Uptime)
	}
	return w.Until
}

// clockSlack is the amount by which the clock may be slewed before rules with a time
// are changed.
const clockSlack = 2 * time.Second

// retimed returns w with its times by the clock as it shows at a moment, if the clock was
// set since.
func (w Window) retimed(m Moment) Window {
	end := w.End(m)
	if step := end.Sub(w.Until); step.Abs() <= clockSlack {
		return w
	}
	if end = end.UTC().Truncate(time.Second); CheckTime(end) == nil {
		if !w.Since.IsZero() {
			w.Since = w.Since.Add(end.Sub(w.Until))
		}
		w.Until = end
	}
	return w
}

// Timer is the end of a temporary service or source by uptime, in the boot in which it was
// first applied.
type Timer struct {
	For    time.Time `json:"for"` // Until of the service or source
	Window           // Until is when its rules end, by the clock as it was set last
}

// Start returns d with the timers of its temporary services and sources. Those of previous,
// which may be nil, continue. A service or source that is in previous without a timer gets none.
func (d Desired) Start(previous *Desired, m Moment) Desired {
	d.Timers = nil
	for _, until := range d.untils() {
		if d.timer(until) != nil {
			continue
		}
		if previous != nil {
			if t := previous.timer(until); t != nil {
				d.Timers = append(d.Timers, *t)
				continue
			}
			if slices.ContainsFunc(previous.untils(), until.Equal) {
				continue
			}
		}
		if left := until.Sub(m.Time); m.Boot != "" && left > 0 {
			d.Timers = append(d.Timers, Timer{until, Window{Until: until, Boot: m.Boot, Began: m.Uptime, Ends: m.Uptime + left}})
		}
	}
	return d
}

// untils returns when temporary services and sources end.
func (d Desired) untils() (out []time.Time) {
	for _, s := range d.Open {
		if !s.Until.IsZero() {
			out = append(out, s.Until)
		}
	}
	for _, t := range d.SSH.Timed {
		out = append(out, t.Until)
	}
	for _, b := range d.Blocks {
		if !b.Until.IsZero() {
			out = append(out, b.Until)
		}
	}
	return out
}

// timer returns the timer of what ends at a time, or nil.
func (d Desired) timer(until time.Time) *Timer {
	if i := slices.IndexFunc(d.Timers, func(t Timer) bool { return t.For.Equal(until) }); i >= 0 {
		return &d.Timers[i]
	}
	return nil
}

// RuleEnd returns when the rules of a service or source end, by the clock.
func (d Desired) RuleEnd(until time.Time) time.Time {
	if t := d.timer(until); t != nil {
		return t.Until
	}
	return until
}

// ends returns when rules end or begin, by a name of the purpose of the rules.
func (d Desired) ends() map[string]time.Time {
	out := map[string]time.Time{}
	for _, until := range d.untils() {
		out[FormatTime(until)] = d.RuleEnd(until)
	}
	if u := d.Unlock; u != nil {
		out["unlock"] = u.Until
	}
	if p := d.SSH.Probation; p != nil {
		out["probation"] = p.Until
	}
	return out
}

// Retimed returns d with the ends of this boot by the clock as it shows at a moment, and a
// map from the old times in its rules to the new ones. Timers of another boot are dropped.
func (d Desired) Retimed(m Moment) (Desired, map[time.Time]time.Time) {
	if m.Boot == "" {
		return d, nil
	}
	was := d.ends()
	d.Timers = without(d.Timers, func(t Timer) bool { return !t.here(m) })
	for i := range d.Timers { // of a new list
		d.Timers[i].Window = d.Timers[i].retimed(m)
	}
	if u := d.Unlock; u != nil {
		now := *u
		now.Window = u.retimed(m)
		d.Unlock = &now
	}
	if p := d.SSH.Probation; p != nil {
		now := *p
		now.Window = p.retimed(m)
		d.SSH.Probation = &now
	}
	moved := map[time.Time]time.Time{}
	for what, end := range d.ends() {
		if !end.Equal(was[what]) {
			moved[was[what].UTC()] = end
		}
	}
	return d, moved
}
