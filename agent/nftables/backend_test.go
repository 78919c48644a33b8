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

	"github.com/basicfw/basicfw-agent/agent/backend"
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

// desiredStates returns desired states that together have every kind of rule.
func desiredStates() map[string]firewall.Desired {
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
	grammar := all(client)
	for i, text := range []string{"443/tcp limit 50/second", "53/udp on eth0 limit 600/minute", "5432/tcp from 10.0.0.0/8, 192.168.7.0/24, 2001:db8::/32, fd00::/8 limit 5/hour",
		"9-11/sctp", "vrrp", "ah from 192.0.2.7, 2001:db8::7", "proto 99 limit 10/second", "1701/udp via ipsec", "8081/tcp limit 6/second via ipsec"} {
		s, err := firewall.ParseService(fmt.Sprintf("s%d", i), text)
		if err != nil {
			panic(err)
		}
		grammar.Open = append(grammar.Open, s)
	}
	return map[string]firewall.Desired{"grammar": grammar, "every": every, "failsafe": firewall.Failsafe([]uint16{22}), "limited": limited,
		"unlocked": unlocked, "unlock all": open, "unlock for anybody": anybody, "quiet": quiet}
}

// kernel is a backend in its own namespace.
type kernel struct {
	*lab.Namespace
	*Backend
}

func newKernel(t testing.TB) kernel {
	t.Helper()
	lab.Need(t, "ip", "nft")
	return kernel{lab.NewNamespace(t), New(&system.System{}, firewall.Families[:])}
}

func (k kernel) inspect(t testing.TB, want firewall.Ruleset) (in backend.Inspection) {
	t.Helper()
	if err := k.Do(func() (err error) { in, err = k.Inspect(ctx, want); return err }); err != nil {
		t.Fatal(err)
	}
	return in
}

func (k kernel) load(t testing.TB, want firewall.Ruleset) {
	t.Helper()
	was := k.inspect(t, want)
	if err := k.Do(func() error { return was.Snapshot.Load(ctx, want, false) }); err != nil {
		t.Fatal(err)
	}
}

func (k kernel) list(t testing.TB) string {
	t.Helper()
	text := k.MustRun(t, "nft", "list", "table", "inet", TableName)
	// Names from /etc/protocols.
	return strings.NewReplacer("meta l4proto igmp", "meta l4proto 2", "meta l4proto vrrp", "meta l4proto 112", "meta l4proto ah", "meta l4proto 51").Replace(text)
}

// inSeconds converts the times that nft prints to the rendered form.
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

// The rules loaded over netlink equal the rendered file. The rules that nft loads from
// the file are identical, and are no drift.
func TestRender(t *testing.T) {
	for name, d := range desiredStates() {
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
				if in := k.inspect(t, rules); len(in.Drift)+len(in.Exposed)+len(in.LockedOut)+len(in.Flushed) > 0 {
					t.Errorf("found: %v %v %v %v", in.Drift, in.Exposed, in.LockedOut, in.Flushed)
				}
			}
		})
	}
}

// Every change of the table is reported, and whether it exposes or locks the machine.
func TestDrift(t *testing.T) {
	const table = "inet " + TableName
	for name, tt := range map[string]struct {
		nft                []string
		want               []string // some of the drift, as lines
		exposed, lockedOut bool
		flushed            int
	}{
		"table deleted":      {[]string{"delete table " + table}, []string{"ipv4 input: missing: table inet basicfw", "ipv6 ipv6-input: missing: the chain"}, true, false, 2},
		"everything":         {[]string{"flush ruleset"}, []string{"ipv4 input: missing: table inet basicfw"}, true, false, 2},
		"table flushed":      {[]string{"flush table " + table}, []string{"ipv4 input: missing: meta nfproto vmap", "ipv6 ipv6-ssh: missing:"}, false, true, 2},
		"a chain flushed":    {[]string{"flush chain " + table + " ipv4-ssh"}, []string{"ipv4 ipv4-ssh: missing: counter drop comment \"basicfw-ssh-drop\""}, false, false, 0},
		"a rule added":       {[]string{"add rule " + table + " ipv4-input tcp dport 9999 accept"}, []string{"ipv4 ipv4-input: extra: tcp dport 9999 accept"}, false, false, 0},
		"all accepted":       {[]string{"insert rule " + table + " ipv6-input counter accept"}, []string{"ipv6 ipv6-input: extra: counter accept"}, true, false, 0},
		"all accepted first": {[]string{"insert rule " + table + " input accept"}, []string{"ipv4 input: extra: accept", "ipv6 input: extra: accept"}, true, false, 0},
		"all TCP accepted":   {[]string{"insert rule " + table + " ipv4-input ip protocol tcp accept"}, []string{"ipv4 ipv4-input: extra: meta nfproto ipv4 @1,72,8 0x06 accept"}, true, false, 0},
		"TCP accepted first": {[]string{"insert rule " + table + " input meta l4proto tcp ct state new counter accept"}, []string{"ipv6 input: extra: meta l4proto tcp ct state new"}, true, false, 0},
		"a family accepted":  {[]string{"insert rule " + table + " ipv6-input meta nfproto ipv6 accept"}, []string{"ipv6 ipv6-input: extra: meta nfproto ipv6 accept"}, true, false, 0},
		"UDP accepted":       {[]string{"insert rule " + table + " ipv6-input meta l4proto udp accept"}, []string{"ipv6 ipv6-input: extra: meta l4proto udp accept"}, false, false, 0},
		"states": {[]string{"add rule " + table + " ipv4-ssh ct status & dnat == 0 ct state new,untracked drop"},
			[]string{"ipv4 ipv4-ssh: extra: ct status ! dnat ct state new,untracked drop"}, false, false, 0},
		"unknown match": {[]string{"insert rule " + table + " ipv4-input meta random & 1 == 0 ip saddr 192.0.2.7 accept"},
			[]string{"ipv4 ipv4-input: extra: meta key 24 0x00000000 ip saddr 192.0.2.7 accept"}, false, false, 0},
		"policy":               {[]string{"chain " + table + " input { policy accept; }"}, []string{"ipv4 input: altered: policy accept, want policy drop", "ipv6 input: altered"}, false, false, 0},
		"policy and last rule": {[]string{"chain " + table + " input { policy accept; }", "flush chain " + table + " input"}, []string{"ipv4 input: altered: policy accept"}, true, false, 0},
		"map accepts a family": {[]string{"flush chain " + table + " input", "add rule " + table + " input meta nfproto vmap { ipv4 : jump ipv4-input, ipv6 : accept }", "add rule " + table + " input counter drop comment \"basicfw-drop\""},
			[]string{"ipv6 input: altered: ipv6 : accept, want ipv6 : jump ipv6-input"}, true, false, 0},
		"map lacks a family": {[]string{"flush chain " + table + " input", "add rule " + table + " input meta nfproto vmap { ipv4 : jump ipv4-input }", "add rule " + table + " input counter drop comment \"basicfw-drop\""},
			[]string{"ipv6 input: missing: ipv6 : jump ipv6-input"}, false, false, 0},
		"dormant":            {[]string{"add table " + table + " { flags dormant; }"}, []string{"ipv4 input: altered: flags dormant, want no flags"}, true, false, 0},
		"an address added":   {[]string{"add element " + table + " ipv4-ssh { 198.18.0.0/15 }"}, []string{"ipv4 set ipv4-ssh: extra: 198.18.0.0/15"}, false, false, 0},
		"an address removed": {[]string{"delete element " + table + " ipv4-ssh { 203.0.113.0/24 }"}, []string{"ipv4 set ipv4-ssh: missing: 203.0.113.0/24"}, false, false, 0},
		"a range added":      {[]string{"add element " + table + " ipv6-ssh { 2001:db9::1-2001:db9::7 }"}, []string{"ipv6 set ipv6-ssh: extra: 2001:db9::1-2001:db9::7"}, false, false, 0},
		"a chain added":      {[]string{"add chain " + table + " mine"}, []string{"mine: extra: the chain"}, false, false, 0},
		"a set added":        {[]string{"add set " + table + " mine { type ipv4_addr; }"}, []string{"mine: extra: the set"}, false, false, 0},
		"a source's packet":  {[]string{"add element " + table + " bfw4p10s { 192.0.2.77 }"}, nil, false, false, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			k := newKernel(t)
			rules := compiledRules(t, desiredStates()["every"])
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
				t.Errorf("reported: %s", lines)
			}
			if len(in.Exposed) > 0 != tt.exposed || len(in.LockedOut) > 0 != tt.lockedOut || len(in.Flushed) != tt.flushed {
				t.Errorf("exposed %v, locked out %v, flushed %v", in.Exposed, in.LockedOut, in.Flushed)
			}
			k.load(t, rules)
			if in := k.inspect(t, rules); len(in.Drift) > 0 {
				t.Errorf("drift after the repair: %v", in.Drift)
			}
			if err := k.Do(func() error { return in.Snapshot.Restore(ctx, backend.Backup{}) }); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before, k.MustRun(t, "nft", "list", "ruleset")); diff != "" && name != "a source's packet" {
				t.Errorf("restored (-before +now):\n%s", diff)
			}
		})
	}
}

// Ten thousand networks are loaded, read back, compared, rendered and restored.
// TestChanges checks that the fingerprint of the rules differs after a change of any table,
// and only then.
func TestChanges(t *testing.T) {
	k := newKernel(t)
	before := k.inspect(t, firewall.Ruleset{}).Changes
	if after := k.inspect(t, firewall.Ruleset{}).Changes; after != before {
		t.Errorf("%q without a change, was %q", after, before)
	}
	k.MustRun(t, "nft", "add", "table", "ip6", "other")
	if after := k.inspect(t, firewall.Ruleset{}).Changes; after == before {
		t.Errorf("%q after a change", after)
	}
	want, err := firewall.Compile(desiredStates()["every"])
	if err != nil {
		t.Fatal(err)
	}
	k.load(t, want)
	before = k.inspect(t, want).Changes
	k.MustRun(t, "nft", "add", "chain", "ip6", "other", "c")
	if after := k.inspect(t, want).Changes; after == before {
		t.Errorf("%q after a change, with rules of ours", after)
	}
}

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
	if n := strings.Count(k.list(t), "/25"); n != len(from)+1 { // and one of "db"
		t.Errorf("%d networks", n)
	}
	in := k.inspect(t, rules)
	if len(in.Drift) > 0 {
		t.Errorf("%d drifts, the first %v", len(in.Drift), in.Drift[0])
	}
	before := k.list(t)
	k.load(t, compiledRules(t, firewall.Failsafe([]uint16{22})))
	if err := k.Do(func() error { return in.Snapshot.Restore(ctx, backend.Backup{}) }); err != nil {
		t.Fatal(err)
	}
	if k.list(t) != before {
		t.Error("the restored table differs")
	}
}

// A refused transaction changes nothing, and the error names the rule.
func TestRefused(t *testing.T) {
	k := newKernel(t)
	rules := compiledRules(t, desiredStates()["every"])
	k.load(t, rules)
	before := k.list(t)
	bad := compiledRules(t, firewall.Failsafe([]uint16{22}))
	bad.IPv4[0].Rules[3].In = "" // a copy of this test only
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

// Changing each desired state to each other keeps unchanged rules and the elements that
// packets added to sets. The result is also correct if the table was changed meanwhile.
func TestChange(t *testing.T) {
	all := desiredStates()
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
							t.Errorf("to %s: the table is recreated", toName)
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
					if err := k.Do(func() error { return was.Snapshot.Load(ctx, b, false) }); err != nil {
						t.Fatalf("to %s: %v", toName, err)
					}
					if in := k.inspect(t, b); len(in.Drift) > 0 {
						t.Errorf("to %s: %v", toName, in.Drift)
					}
					list := k.list(t)
					if ping && meanwhile == "" && !strings.Contains(list, "192.0.2.77") {
						t.Errorf("to %s: a rate limit lost its sources", toName)
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

// A set has the desired networks after every change of the list.
func TestChangeNetworks(t *testing.T) {
	k := newKernel(t)
	random := rand.New(rand.NewPCG(1, 2))
	list := func() []netip.Prefix {
		var out []netip.Prefix
		for range 2 + random.IntN(40) {
			// Many are adjacent or nested.
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
			t.Fatalf("change %d: the table is recreated", n)
		}
		if err := k.Do(func() error { return k.commit("change", requests) }); err != nil {
			t.Fatalf("change %d: %v", n, err)
		}
		if in := k.inspect(t, rules); len(in.Drift) > 0 {
			t.Fatalf("change %d: %v", n, in.Drift)
		}
	}
}

// Even in a long chain only the rules that differ are replaced.
func TestChangeLongChain(t *testing.T) {
	k := newKernel(t)
	d := firewall.Failsafe([]uint16{22})
	d.Published = firewall.PublishedLeave
	for port := range uint16(1500) {
		d.Open = append(d.Open, firewall.Service{Name: fmt.Sprintf("s%d", port), Proto: firewall.TCP, Ports: firewall.Port(1000 + port), On: "any"})
	}
	rules := compiledRules(t, d)
	k.load(t, rules)
	before := k.inspect(t, rules).Snapshot.(snapshot)
	for _, changed := range []int{1, 1500} {
		for i := range changed {
			d.Open[i].Proto = firewall.UDP
		}
		rules := compiledRules(t, d)
		requests, ok := before.requestsTo(compile(rules, firewall.Families[:]).table)
		if want := 4 * changed; !ok || len(requests) != want { // one removed and one inserted in each family
			t.Errorf("%d rules changed: %d requests, want %d (%v)", changed, len(requests), want, ok)
		}
		if changed == 1 {
			continue
		}
		if err := k.Do(func() error { return k.commit("change", requests) }); err != nil {
			t.Fatal(err)
		}
		if in := k.inspect(t, rules); len(in.Drift) > 0 {
			t.Errorf("%d rules changed: %d differ", changed, len(in.Drift))
		}
	}
}

// Sockets that are closed in the background do not accumulate.
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
		k.load(t, compiledRules(t, desiredStates()["every"]))
		k.load(t, compiledRules(t, desiredStates()["failsafe"]))
	}
	lab.Poll(t, "all are closed", func() bool { return open() == before && files() <= held })
}
