package meaning_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/netsim"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
	"github.com/basicfw/basicfw-agent/test/meaning"
)

// request is what to load with which backend, and what to send.
type request struct {
	Backend    string
	Programs   string // the directory of iptables
	Ruleset    firewall.Ruleset
	Interfaces []firewall.Interface
	Packets    []firewall.Packet
}

// answer is the fate of each packet, without rules and with them.
type answer struct{ Free, Fates []netsim.Fate }

// backends are what loads a ruleset; those of iptables are named after their multi-call
// binary.
var backends = []string{"xtables-nft-multi", "xtables-legacy-multi", "nftables"}

// inNamespace is the argument that makes the test binary answer a request.
const inNamespace = "in-namespace"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == inNamespace {
		if err := respond(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// respond loads and sends in the current network namespace.
func respond() error {
	var q request
	if err := json.NewDecoder(os.Stdin).Decode(&q); err != nil {
		return err
	}
	sys := &system.System{Programs: []string{q.Programs}}
	t, err := netsim.New(sys, firewall.Families[:], q.Interfaces)
	if err != nil {
		return err
	}
	defer t.Close()
	var a answer
	if a.Free, err = t.Send(q.Packets); err != nil {
		return err
	}
	if err := load(sys, q); err != nil {
		return err
	}
	if a.Fates, err = t.Send(q.Packets); err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(a)
}

func load(sys *system.System, q request) error {
	ctx := context.Background()
	if q.Backend == "nftables" {
		b := nftables.New(sys, firewall.Families[:])
		was, err := b.Inspect(ctx, q.Ruleset)
		if err != nil {
			return err
		}
		return was.Snapshot.Load(ctx, q.Ruleset, false)
	}
	b := iptables.New(sys, firewall.Families[:])
	was, err := b.Inspect(ctx, q.Ruleset)
	if err != nil {
		return err
	}
	return was.Snapshot.Load(ctx, q.Ruleset, false)
}

// programs returns a directory in which the names of iptables are one of its variants.
func programs(t *testing.T, backend string) string {
	t.Helper()
	dir := t.TempDir()
	if backend == "nftables" {
		return dir // empty: it needs no program
	}
	multi, err := exec.LookPath(backend)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, tables := range []string{"iptables", "ip6tables"} {
		for _, name := range []string{tables, tables + "-save", tables + "-restore"} {
			if err := os.Symlink(multi, filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

// ask loads and sends in a namespace of its own.
func ask(t *testing.T, q request) answer {
	t.Helper()
	data, err := json.Marshal(q)
	if err != nil {
		t.Fatal(err)
	}
	res, err := (&system.System{}).Run(context.Background(), system.Command{Name: system.Self, Args: []string{inNamespace}, Stdin: data, Namespace: true, Timeout: time.Minute})
	if err != nil {
		t.Fatalf("%s: %v", q.Backend, err)
	}
	var a answer
	if err := json.Unmarshal(res.Stdout, &a); err != nil {
		t.Fatalf("%s: %v: %.200s", q.Backend, err, res.Stdout)
	}
	return a
}

func need(t *testing.T) {
	t.Helper()
	lab.Need(t, slices.DeleteFunc(slices.Clone(backends), func(b string) bool { return b == "nftables" })...)
}

// The number of firewalls, enough for all of Settings to occur, and of random packets for
// each.
const (
	firewalls = 40
	drawn     = 1500
)

// TestOneMeaning loads generated firewalls with each backend and sends the same packets to
// each. The kernel has to do what the model says.
func TestOneMeaning(t *testing.T) {
	need(t)
	now := time.Now()
	occurs := map[string]int{}
	by := map[string]int{}
	dirs := map[string]string{}
	for _, b := range backends {
		dirs[b] = programs(t, b)
	}
	for n := range uint64(firewalls) {
		d, has := meaning.Generate(n, now)
		for _, s := range has {
			occurs[s]++
		}
		r, err := firewall.Compile(d)
		if err != nil {
			t.Fatalf("%d: %v", n, err)
		}
		packets := meaning.Packets(n, d, r, now, drawn)
		for _, p := range packets {
			v := r.Decide(p, now)
			by[fmt.Sprintf("%v %v %s", p.Family(), v.Accepted, v.By)]++
		}
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			t.Parallel()
			for _, b := range backends {
				a := ask(t, request{Backend: b, Programs: dirs[b], Ruleset: r, Interfaces: meaning.Interfaces(d), Packets: packets})
				compare(t, b, r, now, packets, a, has)
			}
		})
	}
	for _, s := range meaning.Settings {
		if occurs[s] < 2 {
			t.Errorf("%q occurs %d times", s, occurs[s])
		}
	}
	// Each rule of the baseline decides some packets.
	for _, rule := range []string{"loopback", "established", "trusted", "spoofed-loopback", "null", "new-not-syn", "xmas", "icmp-error", "invalid",
		"ping", "dhcp", "guest-dns", "guest-dhcp", "ssh", "ssh-limit", "ssh-drop", "unlock", "broadcast", "multicast", "nd", "mld", "igmp"} {
		for _, f := range firewall.Families {
			if (rule == "broadcast" || rule == "igmp") && f == firewall.IPv6 || (rule == "nd" || rule == "mld") && f == firewall.IPv4 {
				continue
			}
			if by[fmt.Sprintf("%v true basicfw-%s", f, rule)]+by[fmt.Sprintf("%v false basicfw-%s", f, rule)] < 5 {
				t.Errorf("%v: too few packets reach basicfw-%s", f, rule)
			}
		}
	}
}

// compare fails if the kernel does not do what the model says. What it drops without any
// rules is not compared.
func compare(t *testing.T, backend string, r firewall.Ruleset, now time.Time, packets []firewall.Packet, a answer, has []string) {
	t.Helper()
	differ, compared := 0, 0
	for i, p := range packets {
		v := r.Decide(p, now)
		if a.Free[i] != netsim.Passed && a.Fates[i] != netsim.Passed {
			continue
		}
		compared++
		if v.Accepted == (a.Fates[i] == netsim.Passed) {
			continue
		}
		if differ++; differ <= 5 {
			t.Errorf("%s: passed %v, and the model says %+v: %+v\nthe settings have %q", backend, a.Fates[i] == netsim.Passed, v, p, has)
		}
	}
	if differ > 5 {
		t.Errorf("%s: and %d more", backend, differ-5)
	}
	if compared < len(packets)*3/4 {
		t.Errorf("%s: only %d of %d packets reach INPUT", backend, compared, len(packets))
	}
}

// TestLimits exceeds the limits: each source has its own (IPv6: each /64), and the owner
// none.
func TestLimits(t *testing.T) {
	need(t)
	d := firewall.Desired{
		Profile: firewall.Profile{Name: "p", Ping: true},
		SSH: firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHLimited, Limit: firewall.Rate{N: 6, Per: firewall.Hour},
			Allow: []netip.Prefix{netip.MustParsePrefix("203.0.113.9/32"), netip.MustParsePrefix("2001:db8:1::9/128")}},
		LogDrops: true,
	}
	for port, from := range map[uint16]string{80: "", 8080: "", 8081: "198.51.100.0/24", 8082: "192.0.2.0/24, 198.51.100.0/24, 198.51.100.0/25, 2001:db8::/32"} {
		text := fmt.Sprintf("%d/tcp limit 6/hour", port)
		if from != "" {
			text = fmt.Sprintf("%d/tcp from %s limit 6/hour", port, from)
		}
		s, err := firewall.ParseService(fmt.Sprintf("s%d", port), text)
		if err != nil {
			t.Fatal(err)
		}
		d.Open = append(d.Open, s)
	}
	r, err := firewall.Compile(d)
	if err != nil {
		t.Fatal(err)
	}
	on := []firewall.Interface{{Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")}}}
	var packets []firewall.Packet
	var sources []string
	port := uint16(22)
	add := func(source string, proto firewall.Proto, addresses ...string) {
		for range 40 / len(addresses) {
			for _, a := range addresses {
				p := firewall.Packet{In: "eth0", Src: netip.MustParseAddr(a), Dst: on[0].Addresses[0].Addr(), Proto: proto, HopLimit: 64}
				if p.Src.Is6() {
					p.Dst = on[0].Addresses[1].Addr()
				}
				switch proto {
				case firewall.TCP:
					p.DstPort, p.Flags = port, uint8(firewall.SYN)
				case firewall.ICMP:
					p.ICMPType = 8
				case firewall.ICMPv6:
					p.ICMPType = 128
				}
				p.State = netsim.Unprovoked(p)
				packets, sources = append(packets, p), append(sources, source)
			}
		}
	}
	add("SSH, IPv4", firewall.TCP, "198.51.100.7")
	add("SSH, IPv4, another", firewall.TCP, "198.51.100.8")
	add("SSH, IPv4, the owner", firewall.TCP, "203.0.113.9")
	add("SSH, IPv6", firewall.TCP, "2001:db8:7::7", "2001:db8:7::8", "2001:db8:7:0:ffff::9")
	add("SSH, IPv6, another", firewall.TCP, "2001:db8:7:1::7")
	add("SSH, IPv6, the owner", firewall.TCP, "2001:db8:1::9")
	add("ping, IPv4", firewall.ICMP, "198.51.100.7")
	add("ping, IPv6", firewall.ICMPv6, "2001:db8:7::7", "2001:db8:7::8")
	for _, port = range []uint16{80, 8080, 8081, 8082} {
		add(fmt.Sprintf("%d, IPv4", port), firewall.TCP, "198.51.100.7")
		add(fmt.Sprintf("%d, IPv4, another", port), firewall.TCP, "198.51.100.8")
		if port != 8081 {
			add(fmt.Sprintf("%d, IPv6", port), firewall.TCP, "2001:db8:7::7", "2001:db8:7::8")
		}
	}
	for _, b := range backends {
		t.Run(b, func(t *testing.T) {
			start := time.Now()
			a := ask(t, request{Backend: b, Programs: programs(t, b), Ruleset: r, Interfaces: on, Packets: packets})
			took := time.Since(start)
			passed, sent := map[string]int{}, map[string]int{}
			for i, s := range sources {
				sent[s]++
				if a.Fates[i] == netsim.Passed {
					passed[s]++
				}
			}
			for s := range sent {
				least, most := 6, 6 // one more comes after ten minutes
				switch {
				case strings.HasSuffix(s, "owner"):
					least, most = sent[s], sent[s]
				case strings.HasPrefix(s, "ping"):
					least, most = 20, 20+int(took.Seconds()*10)+1
				}
				if passed[s] < least || passed[s] > most {
					t.Errorf("%s: %d of %d passed, want %d to %d", s, passed[s], sent[s], least, most)
				}
			}
		})
	}
}
