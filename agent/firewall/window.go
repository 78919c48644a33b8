package firewall

import "time"

// Moment is a point of time, by the clock and by what no change of the clock
// moves.
type Moment struct {
	Time   time.Time
	Boot   string // names this boot; "" is not known
	Uptime time.Duration
}

// Window is a span of time.
type Window struct {
	Since time.Time `json:"since"`
	Until time.Time `json:"until"` // in whole seconds of UTC
	// Boot names the boot in which it began, Began is how long that had been up
	// then, and Ends how long it will have been up at the end.
	Boot  string        `json:"boot,omitempty"`
	Began time.Duration `json:"began,omitempty"`
	Ends  time.Duration `json:"ends,omitempty"`
}

// NewWindow is the time from a moment on.
func NewWindow(m Moment, length time.Duration) Window {
	w := Window{Since: m.Time.UTC().Truncate(time.Second), Until: m.Time.Add(length).UTC().Truncate(time.Second)}
	if m.Boot != "" {
		w.Boot, w.Began, w.Ends = m.Boot, m.Uptime, m.Uptime+length
	}
	return w
}

// Over tells whether a span has ended. Within one boot it is also held to the
// time that really went by. A clock that stands before its beginning was set
// back by nobody knows how much.
func (w Window) Over(m Moment) bool {
	return over(w.Until, m.Time) || m.Time.Before(w.Since) || w.Boot != "" && w.Boot == m.Boot && m.Uptime > w.Ends
}

// End is when a span ends, as a moment sees it.
func (w Window) End(m Moment) time.Time {
	if w.Boot != "" && w.Boot == m.Boot {
		if t := m.Time.Add(w.Ends - m.Uptime); t.Before(w.Until) {
			return t
		}
	}
	return w.Until
}
