package firewall

import (
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// Compiling the remaining desired state and filtering the compiled rules remove
// expired rules alike.
func TestAt(t *testing.T) {
	now := time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)
	nets := []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("198.51.100.0/24"), netip.MustParsePrefix("2001:db8::/32")}
	d := Desired{
		Profile: Profile{Name: "p", Services: []Service{{Name: "http", Proto: TCP, Ports: Port(80), On: "any"}}},
		Open: []Service{
			{Name: "stays", Proto: TCP, Ports: Port(81), On: "any", From: nets},
			{Name: "short", Proto: TCP, Ports: Port(82), On: "any", From: nets, Until: now.Add(time.Minute)},
			{Name: "long", Proto: UDP, Ports: Port(83), On: "any", Until: now.Add(time.Hour)},
		},
		SSH: SSH{Ports: []uint16{22}, Mode: SSHPinned, Allow: nets[:1], Timed: []TimedSource{
			{nets[1], now.Add(time.Minute)}, {nets[2], now.Add(2 * time.Hour)}}},
	}
	rules, err := Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		at    time.Duration
		names []string
		timed int
		ends  time.Duration
	}{
		{0, []string{"http", "stays", "short", "long"}, 2, time.Minute},
		{time.Minute, []string{"http", "stays", "short", "long"}, 2, time.Minute}, // its last second
		{time.Minute + time.Second, []string{"http", "stays", "long"}, 1, time.Hour},
		{90 * time.Minute, []string{"http", "stays"}, 1, 2 * time.Hour},
		{24 * time.Hour, []string{"http", "stays"}, 0, 0},
	} {
		left := d.At(Moment{Time: now.Add(c.at)})
		var names []string
		for _, s := range left.Services() {
			names = append(names, s.Name)
		}
		if !cmp.Equal(names, c.names) || len(left.SSH.Timed) != c.timed {
			t.Errorf("after %v: %q, %v", c.at, names, left.SSH.Timed)
		}
		if ends := left.Ends(Moment{Time: now.Add(c.at)}); c.ends == 0 != ends.IsZero() || c.ends > 0 && !ends.Equal(now.Add(c.ends)) {
			t.Errorf("after %v: the next expiry is %v", c.at, ends)
		}
		want, err := Compile(left)
		if err != nil {
			t.Fatal(err)
		}
		if got := rules.Of(left); !got.Equal(want) {
			t.Errorf("after %v (-compiled +left):\n%s", c.at, cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{})))
		}
	}
}

func TestParseTime(t *testing.T) {
	for _, text := range []string{"", "tomorrow", "2026-11-24", "2026-11-24T18:00:00", "2026-11-24T18:00:00+01:00", "2026-11-24T18:00:00.5Z",
		"1969-12-31T23:59:59Z", "2038-01-19T03:14:07Z", "9999-01-01T00:00:00Z"} {
		if got, err := ParseTime(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
	for _, text := range []string{"2026-11-24T18:00:00Z", "2038-01-19T03:14:06Z"} {
		if got, err := ParseTime(text); err != nil || FormatTime(got) != text {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
}

func TestParseDuration(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"1s": time.Second, "90m": 90 * time.Minute, "8h": 8 * time.Hour, "1h30m": 90 * time.Minute, "7d": 7 * 24 * time.Hour,
		"1d12h": 36 * time.Hour, "30d": 30 * 24 * time.Hour, "720h": 30 * 24 * time.Hour,
	} {
		if got, err := ParseDuration(text); err != nil || got != want {
			t.Errorf("%q: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "0", "0s", "none", "-1h", "+1h", "1d-1h", "31d", "1y", "8760h", "999999999999d", "d", "1", "500ms", "7days", "1d ", "9999999h"} {
		if got, err := ParseDuration(text); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestFormatDuration(t *testing.T) {
	for d, want := range map[time.Duration]string{
		0: "0s", 400 * time.Millisecond: "0s", 15 * time.Minute: "15m", 90 * time.Minute: "1h30m", 7 * 24 * time.Hour: "7d",
		30 * 24 * time.Hour: "30d", 36*time.Hour + time.Second: "1d12h1s", 9*time.Minute + 59*time.Second + 600*time.Millisecond: "10m",
	} {
		if got := FormatDuration(d); got != want {
			t.Errorf("%v: %q, want %q", d, got, want)
		} else if read, err := ParseDuration(got); d >= time.Second && (err != nil || read != d.Round(time.Second)) {
			t.Errorf("%q: %v, %v", got, read, err)
		}
	}
}

func TestParseServiceUntil(t *testing.T) {
	for _, text := range []string{"9000/udp until 2026-11-24T18:00:00Z", "9000/tcp on private from 10.0.0.0/8, 192.0.2.1 until 2026-11-24T18:00:00Z"} {
		if s, err := ParseService("x", text); err != nil || s.String() != text || s.Until.IsZero() {
			t.Errorf("%q: %q, %v", text, s, err)
		}
	}
	for _, text := range []string{"9000/udp until", "9000/udp until soon", "until 2026-11-24T18:00:00Z", "9000/tcp from until 2026-11-24T18:00:00Z",
		"9000/udp until 2026-11-24T18:00:00Z from 10.0.0.0/8"} {
		if s, err := ParseService("x", text); err == nil {
			t.Errorf("%q: %v", text, s)
		}
	}
}

// An unlock expires by uptime in the boot in which it began, regardless of clock changes, and
// by the clock after that.
func TestUnlockEnds(t *testing.T) {
	begin := time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)
	u := &Unlock{Window: NewWindow(Moment{Time: begin, Boot: "a", Uptime: time.Hour}, 15*time.Minute)}
	d := Desired{Profile: Profile{Name: "p"}, SSH: SSH{Ports: []uint16{22}, Mode: SSHPinned, Nobody: true}, Unlock: u}
	for _, tt := range []struct {
		what   string
		clock  time.Duration // since the beginning
		boot   string
		uptime time.Duration
		open   bool
	}{
		{"beginning", 0, "a", time.Hour, true},
		{"last second", 15 * time.Minute, "a", time.Hour + 15*time.Minute, true},
		{"expired", 15*time.Minute + time.Second, "a", time.Hour + 15*time.Minute + time.Second, false},
		{"the clock was set back", time.Minute, "a", time.Hour + 16*time.Minute, false},
		{"the clock was set back before its beginning", -time.Minute, "a", time.Hour + time.Minute, true},
		{"the clock was set forward", time.Hour, "a", time.Hour + time.Minute, true},
		{"another boot", 5 * time.Minute, "b", time.Minute, true},
		{"another boot, later", 16 * time.Minute, "b", time.Minute, false},
		{"another boot with a long uptime", 5 * time.Minute, "b", 2 * time.Hour, true},
		{"another boot with the clock in the past", -time.Hour, "b", time.Minute, false},
		{"only the clock is known", 5 * time.Minute, "", 0, true},
	} {
		m := Moment{Time: begin.Add(tt.clock), Boot: tt.boot, Uptime: tt.uptime}
		if open := d.At(m).Unlock != nil; open != tt.open {
			t.Errorf("%s: open is %v", tt.what, open)
		}
	}
	// By the clock as it shows then.
	if ends := d.Ends(Moment{Time: begin.Add(-time.Hour), Boot: "a", Uptime: time.Hour + 5*time.Minute}); !ends.Equal(begin.Add(-50 * time.Minute)) {
		t.Errorf("with the clock set back it ends at %v", ends)
	}
	if ends := d.Ends(Moment{Time: begin, Boot: "b"}); !ends.Equal(u.Until) {
		t.Errorf("in another boot it ends at %v", ends)
	}

	locked := d
	locked.Unlock = nil
	want, err := Compile(locked)
	if err != nil {
		t.Fatal(err)
	}
	for _, all := range []bool{false, true} {
		u.All = all
		rules, err := Compile(d)
		if err != nil {
			t.Fatal(err)
		}
		if rules.Equal(want) || !rules.Locked().Equal(want) {
			t.Errorf("all %v: the rules without the unlock differ from those never unlocked", all)
		}
	}
}

// A probation expires like an unlock, and then SSH is open to any address: by its own
// rules, by newly compiled ones and, if the clock is wrong, by rules whose begin time
// is removed.
func TestProbationEnds(t *testing.T) {
	begin := time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)
	p := &Probation{Window: NewWindow(Moment{Time: begin, Boot: "a", Uptime: time.Hour}, 30*time.Minute)}
	d := base()
	d.SSH.Probation = p
	rules, err := Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		what   string
		clock  time.Duration // since the beginning
		uptime time.Duration
		over   bool
		mode   SSHMode
	}{
		{"beginning", 0, time.Hour, false, SSHPinned},
		{"last second", 30 * time.Minute, 90 * time.Minute, false, SSHPinned},
		{"expired", 30*time.Minute + time.Second, 90*time.Minute + time.Second, true, SSHLimited},
		{"the clock was set back", time.Minute, 91 * time.Minute, true, SSHLimited},
		{"the clock was set back before its beginning", -time.Minute, time.Hour + time.Minute, false, SSHPinned},
		{"the clock was set forward", time.Hour, time.Hour + time.Minute, false, SSHPinned},
	} {
		m := Moment{Time: begin.Add(tt.clock), Boot: "a", Uptime: tt.uptime}
		now := d.At(m)
		if over := now.SSH.Probation == nil; over != tt.over || now.SSH.Mode != tt.mode {
			t.Errorf("%s: over is %v, SSH is %s", tt.what, over, now.SSH.Mode)
		}
		want, err := Compile(now)
		if err != nil {
			t.Fatal(err)
		}
		if left := rules.Of(now); !left.Equal(want) {
			t.Errorf("%s (-compiled +left):\n%s", tt.what, cmp.Diff(want, left, cmpopts.EquateComparable(netip.Prefix{})))
		}
	}
	if ends := d.Ends(Moment{Time: begin, Boot: "a", Uptime: time.Hour}); !ends.Equal(p.Until) {
		t.Errorf("it ends at %v", ends)
	}

	// Without a rule that opens SSH, the rules equal those of pinned SSH.
	p.NoRule = true
	silent, err := Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	pinned, err := Compile(base())
	if err != nil || !silent.Equal(pinned) || rules.Equal(pinned) {
		t.Errorf("without a rule: %v (-pinned +silent):\n%s", err, cmp.Diff(pinned, silent, cmpopts.EquateComparable(netip.Prefix{})))
	}
}
