package firewall

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// maxTime is the last second that the kernel's time match supports: its dates have
// 32 bits, of which iptables uses 31. The largest value means "no end".
const maxTime = 1<<31 - 2

// MaxTime is the last second in which a rule can begin or end.
var MaxTime = time.Unix(maxTime, 0).UTC()

// timeForm is the format of times: RFC 3339 in UTC.
const timeForm = "2006-01-02T15:04:05Z"

// FormatTime returns a time in the format of ParseTime.
func FormatTime(t time.Time) string { return t.UTC().Format(timeForm) }

// ParseTime parses a time in whole seconds. Times are in UTC, so that they do not
// depend on the machine's time zone.
func ParseTime(text string) (time.Time, error) {
	t, err := time.Parse(timeForm, text)
	if err != nil {
		return time.Time{}, fmt.Errorf("%s: want a time in UTC such as %s", Quote(text), timeForm)
	}
	return t, CheckTime(t)
}

// CheckTime returns an error if the kernel does not support a time.
func CheckTime(t time.Time) error {
	if s := t.Unix(); s < 1 || s > maxTime || t.Nanosecond() != 0 || t.Location() != time.UTC {
		return fmt.Errorf("%s: want a time in whole seconds from 1970 to %s", t.Format(time.RFC3339Nano), FormatTime(MaxTime))
	}
	return nil
}

// EndAfter returns the end of a period that begins now, in whole seconds as the kernel
// counts. A length of zero is no end.
func EndAfter(now time.Time, length time.Duration) (time.Time, error) {
	if length == 0 {
		return time.Time{}, nil
	}
	end := now.Add(length).UTC().Truncate(time.Second)
	if err := CheckTime(end); err != nil {
		return time.Time{}, fmt.Errorf("--for %s: %w", FormatDuration(length), err)
	}
	return end, nil
}

// over reports whether an expiry time has passed. The last second is included, as in
// the kernel's match (xt_time.c).
func over(until, now time.Time) bool { return !until.IsZero() && now.Unix() > until.Unix() }

// At returns d without what has expired at a moment. Expired rules match nothing, so
// the meaning from then on is the same. In the boot in which a part began, uptime
// decides; in later boots, the clock does.
func (d Desired) At(m Moment) Desired { return d.at(m, true) }

// clockSettles is the uptime after which the clock is trusted: at boot it may be hours
// ahead or behind, until it is synchronized.
const clockSettles = time.Hour

// Settled is At, but only removes what has certainly expired: early in a boot, the
// clock alone is not sufficient.
func (d Desired) Settled(m Moment) Desired {
	return d.at(m, m.Boot == "" || m.Uptime >= clockSettles)
}

// at is At. The clock alone decides only if trusted.
func (d Desired) at(m Moment, trusted bool) Desired {
	past := func(until time.Time) bool {
		if t := d.timer(until); t != nil && t.here(m) {
			return t.Over(m)
		}
		return trusted && over(until, m.Time)
	}
	gone := func(w Window) bool { return (trusted || w.here(m)) && w.Over(m) }
	d.Open = without(d.Open, func(s Service) bool { return past(s.Until) })
	d.SSH.Timed = without(d.SSH.Timed, func(t TimedSource) bool { return past(t.Until) })
	d.Blocks = without(d.Blocks, func(b Block) bool { return past(b.Until) })
	if p := d.SSH.Probation; p != nil && gone(p.Window) {
		d.SSH.Mode, d.SSH.Probation = SSHLimited, nil
	}
	if d.Unlock != nil && gone(d.Unlock.Window) {
		d.Unlock = nil
	}
	left := d.untils()
	d.Timers = without(d.Timers, func(t Timer) bool { return !slices.ContainsFunc(left, t.For.Equal) })
	return d
}

// without returns a new list without some elements. An empty result is nil, as is an
// absent list that was read from JSON.
func without[T any](list []T, drop func(T) bool) []T {
	var left []T
	for _, v := range list {
		if !drop(v) {
			left = append(left, v)
		}
	}
	return left
}

// Ends returns when the next part of d expires, as seen from a moment; zero is never.
func (d Desired) Ends(m Moment) time.Time {
	var first time.Time
	earlier := func(t time.Time) {
		if !t.IsZero() && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	for _, until := range d.untils() {
		if t := d.timer(until); t != nil {
			until = t.End(m)
		}
		earlier(until)
	}
	if p := d.SSH.Probation; p != nil {
		earlier(p.End(m))
	}
	if u := d.Unlock; u != nil {
		earlier(u.End(m))
	}
	return first
}

// Of returns r, which was compiled from a predecessor of d, without what d no longer
// contains: rules with an end, the chains that only they used, and the begin times of
// a probation. The result equals the compiled d.
func (r Ruleset) Of(d Desired) Ruleset {
	timed := func(c Chain) bool {
		return slices.ContainsFunc(c.Rules, func(rule Rule) bool { return !rule.Until.IsZero() || !rule.Since.IsZero() })
	}
	if !slices.ContainsFunc(r.IPv4, timed) && !slices.ContainsFunc(r.IPv6, timed) {
		return r
	}
	var ends []time.Time
	for _, end := range d.ends() {
		ends = append(ends, end)
	}
	r = r.without(func(rule Rule) bool {
		return !rule.Until.IsZero() && !slices.ContainsFunc(ends, rule.Until.Equal) || rule.Comment == unlockComment && d.Unlock == nil || len(d.Blocks) == 0 && rule.isBlock()
	})
	if d.SSH.Probation == nil {
		r = r.Begun()
	}
	return r
}

// Retimed returns r with new begin and end times. moved maps each old time to its new one.
func (r Ruleset) Retimed(moved map[time.Time]time.Time) Ruleset {
	if len(moved) == 0 {
		return r
	}
	return r.each(func(rule Rule) Rule {
		for _, t := range []*time.Time{&rule.Since, &rule.Until} {
			if now, ok := moved[t.UTC()]; ok && !t.IsZero() {
				*t = now
			}
		}
		return rule
	})
}

// Begun returns r without begin times, so that all its rules are active.
func (r Ruleset) Begun() Ruleset {
	return r.each(func(rule Rule) Rule {
		rule.Since = time.Time{}
		return rule
	})
}

// each returns r with changed rules.
func (r Ruleset) each(change func(Rule) Rule) Ruleset {
	changed := func(chains []Chain) []Chain {
		chains = slices.Clone(chains)
		for i := range chains {
			rules := slices.Clone(chains[i].Rules)
			for j := range rules {
				rules[j] = change(rules[j])
			}
			chains[i].Rules = rules
		}
		return chains
	}
	return Ruleset{IPv4: changed(r.IPv4), IPv6: changed(r.IPv6)}
}

// Locked returns r without the rules of an unlock.
func (r Ruleset) Locked() Ruleset {
	return r.without(func(rule Rule) bool { return rule.Comment == unlockComment })
}

func (r Ruleset) without(drop func(Rule) bool) Ruleset {
	left := func(chains []Chain) []Chain {
		var out []Chain
		gone := map[string]bool{}
		for _, c := range chains {
			kept := c
			kept.Rules = nil
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

// day is the longest unit of durations.
const day = 24 * time.Hour

// ParseDuration parses a duration from 1s to 30d, in one or more units, the longest
// first: "90m", "8h", "1h30m", "7d".
func ParseDuration(text string) (time.Duration, error) {
	days, rest := 0, text
	if number, after, found := strings.Cut(text, "d"); found && isNumber(number) {
		days, _ = strconv.Atoi(number) // the largest int on overflow
		rest = cmp.Or(after, "0s")
	}
	d, err := time.ParseDuration(rest)
	d += time.Duration(min(days, 31)) * day
	if err != nil || rest[0] == '-' || rest[0] == '+' || d < time.Second || d > 30*day {
		return 0, fmt.Errorf("%s: want a time from 1s to 30d, such as 90m, 8h or 7d", Quote(text))
	}
	return d, nil
}

// FormatDuration returns a duration in the format of ParseDuration, rounded to seconds.
func FormatDuration(d time.Duration) string {
	d = d.Round(time.Second)
	text := ""
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{day, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if n := d / u.unit; n > 0 {
			text += fmt.Sprintf("%d%s", n, u.name)
			d -= n * u.unit
		}
	}
	return cmp.Or(text, "0s")
}
