package firewall

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// maxTime is the last second that the kernel's time match counts to: its dates
// have 32 bits, of which iptables uses 31, and takes the largest for "no end".
const maxTime = 1<<31 - 2

// MaxTime is the last second that a rule can begin or end in.
var MaxTime = time.Unix(maxTime, 0).UTC()

// timeForm is how times are written: RFC 3339 in UTC.
const timeForm = "2006-01-02T15:04:05Z"

// FormatTime writes a time as ParseTime reads it.
func FormatTime(t time.Time) string { return t.UTC().Format(timeForm) }

// ParseTime reads when something ends, to the second. Times are of UTC, so that
// a change of the machine's time zone moves none.
func ParseTime(text string) (time.Time, error) {
	t, err := time.Parse(timeForm, text)
	if err != nil {
		return time.Time{}, fmt.Errorf("%s: want a time in UTC such as %s", Quote(text), timeForm)
	}
	return t, CheckTime(t)
}

// CheckTime says why the kernel cannot count to a time, or nil.
func CheckTime(t time.Time) error {
	if s := t.Unix(); s < 1 || s > maxTime || t.Nanosecond() != 0 || t.Location() != time.UTC {
		return fmt.Errorf("%s: want a time in whole seconds from 1970 to %s", t.Format(time.RFC3339Nano), FormatTime(MaxTime))
	}
	return nil
}

// over tells whether what ends at a time has ended. The kernel's match includes
// the last second (xt_time.c), and so does this.
func over(until, now time.Time) bool { return !until.IsZero() && now.Unix() > until.Unix() }

// At gives d without what has ended by a moment. Rules of what has ended match
// nothing any more, so it means the same from then on.
func (d Desired) At(m Moment) Desired {
	d.Open = without(d.Open, func(s Service) bool { return over(s.Until, m.Time) })
	d.SSH = d.SSH.At(m.Time)
	if p := d.SSH.Probation; p != nil && p.Over(m) {
		d.SSH.Mode, d.SSH.Probation = SSHLimited, nil
	}
	if d.Unlock != nil && d.Unlock.Over(m) {
		d.Unlock = nil
	}
	return d
}

// At gives s without what has ended by a time.
func (s SSH) At(now time.Time) SSH {
	s.Timed = without(s.Timed, func(t TimedSource) bool { return over(t.Until, now) })
	return s
}

// without is a new list without some; where none is left it is nil, as an
// absent list is once it was in JSON.
func without[T any](list []T, drop func(T) bool) []T {
	var left []T
	for _, v := range list {
		if !drop(v) {
			left = append(left, v)
		}
	}
	return left
}

// Ends gives when the next thing of d ends, as a moment sees it; zero is never.
func (d Desired) Ends(m Moment) time.Time {
	var first time.Time
	earlier := func(t time.Time) {
		if !t.IsZero() && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	for _, s := range d.Open {
		earlier(s.Until)
	}
	for _, t := range d.SSH.Timed {
		earlier(t.Until)
	}
	if p := d.SSH.Probation; p != nil {
		earlier(p.End(m))
	}
	if u := d.Unlock; u != nil {
		earlier(u.End(m))
	}
	return first
}

// At gives r without the rules that have ended by a time, and without the
// chains that only they led to; what has begun, it has without its beginning.
// It is what Compile makes of Desired.At.
func (r Ruleset) At(now time.Time) Ruleset {
	return r.without(func(rule Rule) bool { return over(rule.Until, now) }).begun(func(rule Rule) bool { return over(rule.Since, now) })
}

// Begun gives r with all that was to begin at a time, begun.
func (r Ruleset) Begun() Ruleset { return r.begun(func(Rule) bool { return true }) }

// begun gives r without the beginnings of some rules.
func (r Ruleset) begun(has func(Rule) bool) Ruleset {
	begun := func(chains []Chain) []Chain {
		chains = slices.Clone(chains)
		for i := range chains {
			rules := slices.Clone(chains[i].Rules)
			for j, rule := range rules {
				if has(rule) {
					rules[j].Since = time.Time{}
				}
			}
			chains[i].Rules = rules
		}
		return chains
	}
	return Ruleset{IPv4: begun(r.IPv4), IPv6: begun(r.IPv6)}
}

// Locked gives r without the rules of an unlocking.
func (r Ruleset) Locked() Ruleset {
	return r.without(func(rule Rule) bool { return rule.Comment == unlockComment })
}

func (r Ruleset) without(drop func(Rule) bool) Ruleset {
	left := func(chains []Chain) []Chain {
		var out []Chain
		gone := map[string]bool{}
		for _, c := range chains {
			kept := Chain{Name: c.Name}
			for _, rule := range c.Rules {
				if drop(rule) {
					gone[rule.Target] = true
				} else {
					kept.Rules = append(kept.Rules, rule)
				}
			}
			out = append(out, kept)
		}
		return without(out, func(c Chain) bool {
			return gone[c.Name] && !slices.ContainsFunc(out, func(o Chain) bool {
				return slices.ContainsFunc(o.Rules, func(r Rule) bool { return r.Target == c.Name })
			})
		})
	}
	return Ruleset{IPv4: left(r.IPv4), IPv6: left(r.IPv6)}
}

// ParseFor reads how long something is to last: "90m", "8h", "7d", in one or
// several units, from a second to thirty days.
func ParseFor(text string) (time.Duration, error) {
	const day = 24 * time.Hour
	var days time.Duration
	rest := text
	if number, behind, found := strings.Cut(text, "d"); found && isNumber(number) && len(number) < 4 {
		for _, c := range number {
			days = days*10 + time.Duration(c-'0')
		}
		rest = behind
		if rest == "" {
			rest = "0s"
		}
	}
	d, err := time.ParseDuration(rest)
	if err == nil {
		d += days * day
	}
	if err != nil || rest[0] == '-' || rest[0] == '+' || d < time.Second || d > 30*day {
		return 0, fmt.Errorf("%s: want a time from 1s to 30d, such as 90m, 8h or 7d", Quote(text))
	}
	return d, nil
}
