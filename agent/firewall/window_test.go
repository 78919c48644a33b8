package firewall

import (
	"net/netip"
	"reflect"
	"testing"
	"time"
)

// In the boot in which they were applied, temporary services and sources end by uptime,
// whatever is done to the clock, and the rules follow the clock. After that the clock decides,
// once it can be trusted.
func TestTimers(t *testing.T) {
	begin := time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)
	until := begin.Add(time.Hour)
	d := Desired{Profile: Profile{Name: "p"},
		Open: []Service{{Name: "x", Proto: TCP, Ports: Port(82), On: "any", Until: until}},
		SSH:  SSH{Ports: []uint16{22}, Mode: SSHPinned, Nobody: true, Timed: []TimedSource{{netip.MustParsePrefix("192.0.2.9/32"), until}}}}
	d = d.Start(nil, Moment{Time: begin, Boot: "a", Uptime: time.Minute})
	rules, err := Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	const late = 2 * time.Hour // the clock can be trusted
	for _, tt := range []struct {
		what          string
		clock         time.Duration // since the beginning
		boot          string
		uptime        time.Duration
		open, settled bool
	}{
		{"beginning", 0, "a", time.Minute, true, true},
		{"end", time.Hour, "a", time.Hour + time.Minute, true, true},
		{"expired", time.Hour + time.Second, "a", time.Hour + time.Minute + time.Second, false, false},
		{"the clock was set back", -time.Hour, "a", 30 * time.Minute, true, true},
		{"the clock was set back, expired", -time.Hour, "a", time.Hour + 2*time.Minute, false, false},
		{"the clock was set forward", 24 * time.Hour, "a", 30 * time.Minute, true, true},
		{"another boot", 30 * time.Minute, "b", time.Minute, true, true},
		{"another boot, the clock is ahead", 24 * time.Hour, "b", time.Minute, false, true},
		{"another boot, expired", 24 * time.Hour, "b", late, false, false},
		{"only the clock is known", 24 * time.Hour, "", 0, false, false},
	} {
		m := Moment{Time: begin.Add(tt.clock), Boot: tt.boot, Uptime: tt.uptime}
		now, moved := d.Retimed(m)
		for name, left := range map[string]Desired{"At": now.At(m), "Settled": now.Settled(m)} {
			want := map[string]bool{"At": tt.open, "Settled": tt.settled}[name]
			if (len(left.Open) > 0) != want || (len(left.SSH.Timed) > 0) != want {
				t.Errorf("%s: %s leaves %v, %v", tt.what, name, left.Open, left.SSH.Timed)
			}
			compiled, err := Compile(left)
			if err != nil {
				t.Fatal(err)
			}
			if got := rules.Retimed(moved).Of(left); !got.Equal(compiled) {
				t.Errorf("%s: %s has other rules than the compiled ones", tt.what, name)
			}
		}
		if tt.boot == "a" && tt.open {
			if end, left := now.RuleEnd(until), time.Hour+time.Minute-tt.uptime; end.Sub(m.Time.Add(left)).Abs() > clockSlack {
				t.Errorf("%s: the rules end at %v, in %v of %v", tt.what, end, end.Sub(m.Time), left)
			}
			if again, moved := now.Retimed(m); len(moved) > 0 || !reflect.DeepEqual(again, now) {
				t.Errorf("%s: not the same again", tt.what)
			}
		}
	}
}

// A timer continues in a new desired state. What had none gets none: its time may be of
// another boot.
func TestTimersContinue(t *testing.T) {
	m := Moment{Time: time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC), Boot: "a", Uptime: time.Minute}
	service := func(name string, in time.Duration) Service { return Service{Name: name, Until: m.Time.Add(in)} }
	old := Desired{Open: []Service{service("old", time.Hour)}}
	first := Desired{Open: append(old.Open, service("x", 2*time.Hour))}.Start(&old, m)
	if len(first.Timers) != 1 || first.Timers[0].Ends != 2*time.Hour+time.Minute {
		t.Fatalf("%+v", first.Timers)
	}
	m.Uptime, m.Time = m.Uptime+time.Minute, m.Time.Add(24*time.Hour)
	next := Desired{Open: append(first.Open, service("y", 26*time.Hour))}.Start(&first, m)
	if len(next.Timers) != 2 || !reflect.DeepEqual(next.Timers[0], first.Timers[0]) || next.Timers[1].Ends != 26*time.Hour+2*time.Minute {
		t.Errorf("%+v", next.Timers)
	}
}
