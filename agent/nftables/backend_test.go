package nftables

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

var ctx = context.Background()

func prefixes(texts ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, t := range texts {
		out = append(out, netip.MustParsePrefix(t))
	}
	return out
}

// wishes are machines with all kinds of rules between them.
func wishes() map[string]firewall.Desired {
	client := lab.Addrs{V4: netip.MustParseAddr("192.0.2.10"), V6: netip.MustParseAddr("2001:db8::10")}
	every := all(client)
	every.SSH.Allow = append(every.SSH.Allow, prefixes("203.0.113.0/24", "10.0.0.0/9", "10.128.0.0/9", "2001:db8:1::/48", "fe80::/10", "255.255.255.255/32")...)
	every.SSH.Timed = []firewall.TimedSource{{From: netip.MustParsePrefix("198.51.100.0/24"), Until: time.Date(2031, 5, 1, 0, 0, 0, 0, time.UTC)}}
	every.SSH.Ports = []uint16{22, 2222}
	every.SSH.Limit = firewall.Rate{N: 30, Per: firewall.Minute}
	every.Interfaces = []firewall.Interface{{Name: "br-lan", Zone: firewall.VirtualZone, ServesGuests: true}}
	every.Open = []firewall.Service{
		{Name: "x", Proto: firewall.TCP, Ports: firewall.Port(8443), On: "any", Until: time.Date(2037, 1, 1, 0, 0, 0, 0, time.UTC)},
		{Name: "odd", Proto: firewall.UDP, Ports: firewall.Port(9), On: "any", From: prefixes("10.0.0.0/13")},
		{Name: "8080", Proto: firewall.TCP, Ports: firewall.Port(8080), On: "virtual"},
	}
	limited := firewall.Failsafe([]uint16{22})
	limited.SSH.Limit = firewall.Rate{N: 5, Per: firewall.Hour}
	unlocked := all(client)
	window := firewall.Window{Until: time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)}
	unlocked.Unlock = &firewall.Unlock{Window: window, From: prefixes("192.0.2.0/24", "198.51.100.7/32")}
	open := all(client)
	open.Unlock = &firewall.Unlock{Window: window, All: true}
	anybody := all(client)
	anybody.Unlock = &firewall.Unlock{Window: window}
	quiet := all(client)
	quiet.LogDrops, quiet.Profile.Ping, quiet.SSH = false, false, firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHPinned, Nobody: true}
	return map[string]firewall.Desired{"every": every, "failsafe": firewall.Failsafe([]uint16{22}), "limited": limited,
		"unlocked": unlocked, "unlock all": open, "unlock for anybody": anybody, "quiet": quiet}
}

// kernel is a backend in a namespace of its own.
type kernel struct {
	*lab.Namespace
	*Backend
}

func newKernel(t testing.TB) kernel {
	t.Helper()
	lab.Need(t, "ip", "nft")
	return kernel{lab.NewNamespace(t), New(&system.System{}, firewall.Families[:])}
}

func (k kernel) inspect(t testing.TB, want firewall.Ruleset) (in firewall.Inspection) {
	t.Helper()
	if err := k.Do(func() (err error) { in, err = k.Inspect(ctx, want); return err }); err != nil {
		t.Fatal(err)
	}
	return in
}

func (k kernel) load(t testing.TB, want firewall.Ruleset) {
	t.Helper()
	was := k.inspect(t, want)
	if err := k.Do(func() error { return k.Load(ctx, want, was) }); err != nil {
		t.Fatal(err)
	}
}

func (k kernel) list(t testing.TB) string {
	t.Helper()
	return k.MustRun(t, "nft", "list", "table", "inet", TableName)
}

// inSeconds writes the times that nft prints as they are rendered.
func inSeconds(t *testing.T, text string) string {
	t.Helper()
	for {
		i := strings.Index(text, "meta time ")
		for i >= 0 && !strings.Contains(text[i:i+15], `"`) {
			next := strings.Index(text[i+1:], "meta time ")
			if next < 0 {
				return text
			}
			i += 1 + next
		}
		if i < 0 {
			return text
		}
		from := i + strings.Index(text[i:], `"`)
		to := from + 1 + strings.Index(text[from+1:], `"`)
		when, err := time.ParseInLocation("2006-01-02 15:04:05", text[from+1:to], time.Local)
		if err != nil {
			t.Fatal(err)
		}
		text = text[:from] + fmt.Sprint(when.Unix()) + text[to+1:]
	}
}

// What is loaded over netlink is what is rendered; what nft loads of that is the
// same to the last byte, and to us no drift.
func TestRender(t *testing.T) {
	for name, d := range wishes() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rules := compiledRules(t, d)
			want := Render(rules, firewall.Families[:])
			ours, nfts := newKernel(t), newKernel(t)
			ours.load(t, rules)
			if diff := cmp.Diff(want, inSeconds(t, ours.list(t))); diff != "" {
				t.Errorf("loaded by us (-rendered +nft prints):\n%s", diff)
			}
			if r := nfts.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: want}); r.Code != 0 {
				t.Fatalf("nft: %s\n%s", r.Stderr, want)
			}
			if diff := cmp.Diff(want, inSeconds(t, nfts.list(t))); diff != "" {
				t.Errorf("loaded by nft (-rendered +nft prints):\n%s", diff)
			}
			for _, k := range []kernel{ours, nfts} {
				if in := k.inspect(t, rules); len(in.Drift)+len(in.Open)+len(in.Shut)+len(in.Flushed) > 0 {
					t.Errorf("found: %v %v %v %v", in.Drift, in.Open, in.Shut, in.Flushed)
				}
			}
		})
	}
}

// Whatever somebody does to the table is named, with where it leaves the machine.
func TestDrift(t *testing.T) {
	const table = "inet " + TableName
	for name, tt := range map[string]struct {
		nft        []string
		want       []string // some of the drift, as lines
		open, shut bool
		flushed    int
	}{
		"table deleted":     {[]string{"delete table " + table}, []string{"ipv4 input: missing: table inet basicfw", "ipv6 ipv6-input: missing: the chain"}, true, false, 2},
		"everything":        {[]string{"flush ruleset"}, []string{"ipv4 input: missing: table inet basicfw"}, true, false, 2},
		"table flushed":     {[]string{"flush table " + table}, []string{"ipv4 input: missing: meta nfproto vmap", "ipv6 ipv6-ssh: missing:"}, false, true, 2},
		"a chain flushed":   {[]string{"flush chain " + table + " ipv4-ssh"}, []string{"ipv4 ipv4-ssh: missing: counter drop comment \"basicfw-ssh-drop\""}, false, false, 0},
		"a rule added":      {[]string{"add rule " + table + " ipv4-input tcp dport 9999 accept"}, []string{"ipv4 ipv4-input: extra: tcp dport 9999 accept"}, false, false, 0},
		"all let in":        {[]string{"insert rule " + table + " ipv6-input counter accept"}, []string{"ipv6 ipv6-input: extra: counter accept"}, true, false, 0},
		"all let in first":  {[]string{"insert rule " + table + " input accept"}, []string{"ipv4 input: extra: accept", "ipv6 input: extra: accept"}, true, false, 0},
		"all of TCP let in": {[]string{"insert rule " + table + " ipv4-input ip protocol tcp accept"}, []string{"ipv4 ipv4-input: extra: meta nfproto ipv4 @1,72,8 0x06 accept"}, true, false, 0},
		"TCP let in first":  {[]string{"insert rule " + table + " input meta l4proto tcp ct state new counter accept"}, []string{"ipv6 input: extra: meta l4proto tcp ct state new"}, true, false, 0},
		"a family let in":   {[]string{"insert rule " + table + " ipv6-input meta nfproto ipv6 accept"}, []string{"ipv6 ipv6-input: extra: meta nfproto ipv6 accept"}, true, false, 0},
		"UDP let in":        {[]string{"insert rule " + table + " ipv6-input meta l4proto udp accept"}, []string{"ipv6 ipv6-input: extra: meta l4proto udp accept"}, false, false, 0},
		"what we do not know": {[]string{"insert rule " + table + " ipv4-input meta random & 1 == 0 ip saddr 192.0.2.7 accept"},
			[]string{"ipv4 ipv4-input: extra: meta key 24 0x00000000 ip saddr 192.0.2.7 accept"}, false, false, 0},
		"policy":         {[]string{"chain " + table + " input { policy accept; }"}, []string{"ipv4 input: altered: policy accept, want policy drop", "ipv6 input: altered"}, false, false, 0},
		"policy and end": {[]string{"chain " + table + " input { policy accept; }", "flush chain " + table + " input"}, []string{"ipv4 input: altered: policy accept"}, true, false, 0},
		"a family goes by": {[]string{"flush chain " + table + " input", "add rule " + table + " input meta nfproto vmap { ipv4 : jump ipv4-input, ipv6 : accept }", "add rule " + table + " input counter drop comment \"basicfw-drop\""},
			[]string{"ipv6 input: altered: ipv6 : accept, want ipv6 : jump ipv6-input"}, true, false, 0},
		"a family stops": {[]string{"flush chain " + table + " input", "add rule " + table + " input meta nfproto vmap { ipv4 : jump ipv4-input }", "add rule " + table + " input counter drop comment \"basicfw-drop\""},
			[]string{"ipv6 input: missing: ipv6 : jump ipv6-input"}, false, false, 0},
		"switched off":      {[]string{"add table " + table + " { flags dormant; }"}, []string{"ipv4 input: altered: flags dormant, want no flags"}, true, false, 0},
		"an address added":  {[]string{"add element " + table + " ipv4-ssh { 198.18.0.0/15 }"}, []string{"ipv4 set ipv4-ssh: extra: 198.18.0.0/15"}, false, false, 0},
		"an address gone":   {[]string{"delete element " + table + " ipv4-ssh { 203.0.113.0/24 }"}, []string{"ipv4 set ipv4-ssh: missing: 203.0.113.0/24"}, false, false, 0},
		"a range of them":   {[]string{"add element " + table + " ipv6-ssh { 2001:db9::1-2001:db9::7 }"}, []string{"ipv6 set ipv6-ssh: extra: 2001:db9::1-2001:db9::7"}, false, false, 0},
		"a chain added":     {[]string{"add chain " + table + " mine"}, []string{"mine: extra: the chain"}, false, false, 0},
		"a set added":       {[]string{"add set " + table + " mine { type ipv4_addr; }"}, []string{"mine: extra: the set"}, false, false, 0},
		"a source's packet": {[]string{"add element " + table + " bfw4p10s { 192.0.2.77 }"}, nil, false, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := newKernel(t)
			rules := compiledRules(t, wishes()["every"])
			k.load(t, rules)
			for _, line := range tt.nft {
				if r := k.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: line}); r.Code != 0 {
					t.Fatalf("nft %s: %s", line, r.Stderr)
				}
			}
			before := k.MustRun(t, "nft", "list", "ruleset")
			in := k.inspect(t, rules)
			var lines []string
			for _, d := range in.Drift {
				lines = append(lines, d.String())
			}
			for _, want := range tt.want {
				if !slices.ContainsFunc(lines, func(l string) bool { return strings.HasPrefix(l, want) }) {
					t.Errorf("no %q in:\n%s", want, strings.Join(lines, "\n"))
				}
			}
			if len(tt.want) == 0 && len(lines) > 0 {
				t.Errorf("named: %s", lines)
			}
			if len(in.Open) > 0 != tt.open || len(in.Shut) > 0 != tt.shut || len(in.Flushed) != tt.flushed {
				t.Errorf("open %v, shut %v, flushed %v", in.Open, in.Shut, in.Flushed)
			}
			k.load(t, rules)
			if in := k.inspect(t, rules); len(in.Drift) > 0 {
				t.Errorf("still: %v", in.Drift)
			}
			if err := k.Do(func() error { return k.Revert(ctx, in) }); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before, k.MustRun(t, "nft", "list", "ruleset")); diff != "" && name != "a source's packet" {
				t.Errorf("brought back (-before +now):\n%s", diff)
			}
		})
	}
}

// Ten thousand networks are loaded, read back, compared, rendered, and reverted.
func TestManySources(t *testing.T) {
	d := all(lab.Addrs{V4: netip.MustParseAddr("192.0.2.10"), V6: netip.MustParseAddr("2001:db8::10")})
	var from []netip.Prefix
	for i := range 10000 {
		from = append(from, netip.PrefixFrom(netip.AddrFrom4([4]byte{100, byte(i >> 8), byte(i), byte(i % 2 * 128)}), 25))
	}
	d.Open = []firewall.Service{{Name: "many", Proto: firewall.TCP, Ports: firewall.Port(7), On: "any", From: from}}
	rules := compiledRules(t, d)
	k := newKernel(t)
	k.load(t, rules)
	if n := strings.Count(k.list(t), "/25"); n != len(from)+1 { // and the one of "db"
		t.Errorf("%d networks", n)
	}
	in := k.inspect(t, rules)
	if len(in.Drift) > 0 {
		t.Errorf("%d drifts, the first %v", len(in.Drift), in.Drift[0])
	}
	before := k.list(t)
	k.load(t, compiledRules(t, firewall.Failsafe([]uint16{22})))
	if err := k.Do(func() error { return k.Revert(ctx, in) }); err != nil {
		t.Fatal(err)
	}
	if k.list(t) != before {
		t.Error("it did not come back as it was")
	}
}

// What the kernel refuses leaves all as it was, and says which rule it is.
func TestRefused(t *testing.T) {
	k := newKernel(t)
	rules := compiledRules(t, wishes()["every"])
	k.load(t, rules)
	before := k.list(t)
	bad := compiledRules(t, firewall.Failsafe([]uint16{22}))
	bad.IPv4[0].Rules[3].In = "" // a variable of the test's own
	c := compile(bad, firewall.Families[:])
	c.rules[5].exprs[0].name = "nonsense"
	err := k.Do(func() error { return k.commit("load", c.requests()) })
	var refused *refusedError
	if !errors.As(err, &refused) || !strings.Contains(err.Error(), "ipv4-input") {
		t.Errorf("%v", err)
	}
	if k.list(t) != before {
		t.Error("something changed")
	}
}

// From each to each: what stays is not touched, and what packets have put into a set
// is still there. Where the table was changed meanwhile it comes out right too.
func TestChange(t *testing.T) {
	all := wishes()
	for fromName, from := range all {
		t.Run(fromName, func(t *testing.T) {
			t.Parallel()
			k := newKernel(t)
			for toName, to := range all {
				for _, meanwhile := range []string{"", "insert rule inet basicfw ipv4-input accept", "delete table inet basicfw"} {
					a, b := compiledRules(t, from), compiledRules(t, to)
					k.load(t, a)
					was := k.inspect(t, b)
					var requests []request
					var ok bool
					if before := was.Snapshot.(snapshot); fromName != toName {
						requests, ok = before.requestsTo(compile(b, firewall.Families[:]).table)
						if !ok {
							t.Errorf("to %s: the table is made anew", toName)
						}
						for _, r := range requests {
							if strings.Contains(r.about, "basicfw-loopback") || strings.Contains(r.about, "basicfw-new-not-syn") {
								t.Errorf("to %s: %s", toName, r.about)
							}
						}
					}
					ping := from.Profile.Ping && to.Profile.Ping
					if ping && meanwhile == "" {
						k.MustRun(t, "nft", "add element inet basicfw bfw4p10s { 192.0.2.77 timeout 1h }")
					}
					if meanwhile != "" {
						k.MustRun(t, "nft", meanwhile)
					}
					if err := k.Do(func() error { return k.Load(ctx, b, was) }); err != nil {
						t.Fatalf("to %s: %v", toName, err)
					}
					if in := k.inspect(t, b); len(in.Drift) > 0 {
						t.Errorf("to %s: %v", toName, in.Drift)
					}
					list := k.list(t)
					if ping && meanwhile == "" && !strings.Contains(list, "192.0.2.77") {
						t.Errorf("to %s: a limit has forgotten its sources", toName)
					}
					lines := strings.Split(inSeconds(t, list), "\n")
					for _, want := range strings.Split(Render(b, firewall.Families[:]), "\n") {
						if strings.Contains(want, "comment") && !slices.Contains(lines, want) {
							t.Errorf("to %s: no %s", toName, want)
						}
					}
				}
			}
		})
	}
}

// However lists of networks change, by hand and by us, the set has what it should.
func TestChangeNetworks(t *testing.T) {
	k := newKernel(t)
	random := rand.New(rand.NewPCG(1, 2))
	list := func() []netip.Prefix {
		var out []netip.Prefix
		for range 2 + random.IntN(40) {
			// Many are neighbours, or within one another.
			bits := 24 + random.IntN(9)
			out = append(out, netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 0, byte(random.IntN(4)), byte(random.IntN(256))}), bits).Masked())
		}
		return append(out, prefixes("2001:db8::/32", "2001:db9::/32")...)
	}
	for n := range 200 {
		d := firewall.Failsafe([]uint16{22})
		d.SSH.Mode, d.SSH.Allow = firewall.SSHPinned, list()
		rules := compiledRules(t, d)
		if n == 0 {
			k.load(t, rules)
			continue
		}
		before := k.inspect(t, rules).Snapshot.(snapshot)
		requests, ok := before.requestsTo(compile(rules, firewall.Families[:]).table)
		if !ok {
			t.Fatalf("change %d: the table is made anew", n)
		}
		if err := k.Do(func() error { return k.commit("change", requests) }); err != nil {
			t.Fatalf("change %d: %v", n, err)
		}
		if in := k.inspect(t, rules); len(in.Drift) > 0 {
			t.Fatalf("change %d: %v", n, in.Drift)
		}
	}
}

// Sockets that are sent off do not pile up.
func TestSocketsClosed(t *testing.T) {
	k := newKernel(t)
	open := func() int {
		n := 0
		for _, line := range strings.Split(k.MustRun(t, "cat", "/proc/self/net/netlink"), "\n") {
			if f := strings.Fields(line); len(f) > 1 && f[1] == fmt.Sprint(unix.NETLINK_NETFILTER) {
				n++
			}
		}
		return n
	}
	files := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before, held := open(), files()
	for range 20 {
		k.load(t, compiledRules(t, wishes()["every"]))
		k.load(t, compiledRules(t, wishes()["failsafe"]))
	}
	lab.Poll(t, "all are closed", func() bool { return open() == before && files() <= held })
}
