package firewall

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

func prefixes(text string) (out []netip.Prefix) {
	for _, w := range strings.Fields(text) {
		out = append(out, netip.MustParsePrefix(w))
	}
	return out
}

func words(list []netip.Prefix) string { return strings.Trim(fmt.Sprint(list), "[]") }

func TestMergePrefixes(t *testing.T) {
	for _, x := range []struct{ list, minus, want string }{
		{"", "", ""},
		{"10.0.0.0/25 10.0.0.128/25 10.0.1.0/24", "", "10.0.0.0/23"},
		{"10.0.0.0/8 10.1.2.3/32 10.0.0.0/8", "", "10.0.0.0/8"},
		{"10.0.0.1/32 10.0.0.2/32", "", "10.0.0.1/32 10.0.0.2/32"},
		{"2001:db8::/33 192.0.2.1/32 2001:db8:8000::/33", "", "192.0.2.1/32 2001:db8::/32"},
		{"0.0.0.0/1 128.0.0.0/1", "", "0.0.0.0/0"},
		{"10.0.0.0/30", "10.0.0.1/32", "10.0.0.0/32 10.0.0.2/31"},
		{"10.0.0.0/24 10.0.2.0/24", "10.0.0.0/16", ""},
		{"10.0.0.0/24", "10.0.1.0/24 ::/0", "10.0.0.0/24"},
	} {
		if got := words(SubtractPrefixes(MergePrefixes(prefixes(x.list)), prefixes(x.minus))); got != x.want {
			t.Errorf("%s without %s: %s, want %s", x.list, x.minus, got, x.want)
		}
	}
}

// TestPrefixesRandom compares the sets of addresses one by one.
func TestPrefixesRandom(t *testing.T) {
	for range 300 {
		random := func(n int) (out []netip.Prefix) {
			for range rand.IntN(n) {
				out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(rand.IntN(256))}), 24+rand.IntN(9)).Masked())
			}
			return out
		}
		in := func(list []netip.Prefix, a netip.Addr) bool {
			return slices.ContainsFunc(list, func(p netip.Prefix) bool { return p.Contains(a) })
		}
		list, minus := random(20), random(5)
		got := Networks{List: SubtractPrefixes(MergePrefixes(list), minus)}
		for i := range 256 {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(i)})
			if want := in(list, a) && !in(minus, a); got.Contains(a) != want {
				t.Fatalf("%v without %v is %v: contains %v %v", list, minus, got.List, a, !want)
			}
		}
	}
}

func TestBlockRules(t *testing.T) {
	now := time.Unix(1_800_000_000, 0).UTC()
	d := Failsafe([]uint16{22})
	d.Interfaces = []Interface{{Name: "eth0", Zone: PublicZone}, {Name: "eth1", Zone: PrivateZone}}
	d.Blocks = []Block{{Name: "bad", Networks: prefixes("203.0.113.0/24 2001:db8::/32")},
		{Name: "bad", Networks: prefixes("198.51.100.7/32"), Until: now.Add(time.Hour)}}
	r, err := Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	packet := func(from, on string, change ...func(*Packet)) Packet {
		p := Packet{In: on, Src: netip.MustParseAddr(from), Dst: netip.MustParseAddr("192.0.2.1"), Proto: TCP, DstPort: 22, Flags: uint8(SYN), State: TrackedNew}
		if p.Src.Is6() {
			p.Dst = netip.MustParseAddr("2001:db8:1::1")
		}
		for _, c := range change {
			c(&p)
		}
		return p
	}
	established := func(p *Packet) { p.State = TrackedEstablished }
	reply := func(p *Packet) { p.State, p.Reply = TrackedEstablished, true }
	untracked := func(p *Packet) { p.State = Untracked }
	for _, x := range []struct {
		name string
		p    Packet
		now  time.Time
		by   string
	}{
		{"blocked", packet("203.0.113.7", "eth0"), now, "basicfw-block-bad"},
		{"blocked, IPv6", packet("2001:db8::7", "eth0"), now, "basicfw-block-bad"},
		{"open session", packet("203.0.113.7", "eth0", established), now, "basicfw-block-bad"},
		{"untracked", packet("203.0.113.7", "eth0", untracked), now, "basicfw-block-bad"},
		{"reply", packet("203.0.113.7", "eth0", reply), now, "basicfw-established"},
		{"private", packet("203.0.113.7", "eth1"), now, "basicfw-ssh-limit"},
		{"other", packet("198.51.100.8", "eth0"), now, "basicfw-ssh-limit"},
		{"for a time", packet("198.51.100.7", "eth0"), now, "basicfw-block-bad"},
		{"after it", packet("198.51.100.7", "eth0"), now.Add(2 * time.Hour), "basicfw-ssh-limit"},
	} {
		if got := r.Decide(x.p, x.now); got.By != x.by {
			t.Errorf("%s: %+v, want %s", x.name, got, x.by)
		}
	}
	// What expires is removed without compiling, as other parts.
	m := Moment{Time: now.Add(2 * time.Hour)}
	for _, d := range []Desired{d, func() Desired { d := d; d.Blocks = d.Blocks[1:]; return d }()} {
		r, err := Compile(d)
		if err != nil {
			t.Fatal(err)
		}
		left, err := Compile(d.At(m))
		if err != nil {
			t.Fatal(err)
		}
		if got := r.Of(d.At(m)); !got.Equal(left) {
			t.Errorf("after the end:\n%+v\nwant\n%+v", got, left)
		}
	}
	data, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	var again Desired
	if err := json.Unmarshal(data, &again); err != nil {
		t.Fatal(err)
	}
	if r2, err := Compile(again); err != nil || !r2.Equal(r) {
		t.Errorf("read from JSON: %v\n%s", err, data)
	}
	// An unlock passes the blocks.
	d.Unlock = &Unlock{Window: Window{Since: now, Until: now.Add(time.Hour)}}
	if r, err = Compile(d); err != nil {
		t.Fatal(err)
	}
	if got := r.Decide(packet("203.0.113.7", "eth0"), now); !got.Accepted {
		t.Errorf("unlocked: %+v", got)
	}
}
