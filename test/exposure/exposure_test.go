// Package exposure_test holds the model of package agent/exposure against the kernel: it
// loads generated rules of several programs, sends packets, and compares.
package exposure_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/netsim"
	"github.com/basicfw/basicfw-agent/agent/nftables"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// request is what to load and to send. The last packets are sent one by one.
type request struct {
	Rules   rules
	Packets []firewall.Packet
	Single  int
}

// answer is the fate of each packet without rules and with them, the rules as the readers
// return them, and the rules whose counters each of the last packets moved.
type answer struct {
	Free, Fates []netsim.Fate
	Tables      []exposure.Table
	Moved       [][]string
}

// inNamespace is the argument that makes the test binary answer a request.
const inNamespace = "in-namespace"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == inNamespace {
		if err := respond(context.Background()); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// respond loads and sends in the current network namespace.
func respond(ctx context.Context) error {
	var q request
	if err := json.NewDecoder(os.Stdin).Decode(&q); err != nil {
		return err
	}
	sys := &system.System{}
	sim, err := netsim.New(sys, firewall.Families[:], interfaces)
	if err != nil {
		return err
	}
	defer sim.Close()
	var a answer
	free := slices.Clone(q.Packets)
	for i := range free { // other connections
		free[i].SrcPort = 0
	}
	if a.Free, err = sim.Send(free); err != nil {
		return err
	}
	if err := load(ctx, sys, q.Rules); err != nil {
		return err
	}
	if a.Tables, err = live(ctx, sys); err != nil {
		return err
	}
	all := len(q.Packets) - q.Single
	if a.Fates, err = sim.Send(q.Packets[:all]); err != nil {
		return err
	}
	before, err := counters(ctx, sys, q.Rules)
	if err != nil {
		return err
	}
	for i := range q.Single {
		fate, err := sim.Send(q.Packets[all+i : all+i+1])
		if err != nil {
			return err
		}
		after, err := counters(ctx, sys, q.Rules)
		if err != nil {
			return err
		}
		var moved []string
		for rule, n := range after {
			if n != before[rule] {
				moved = append(moved, rule)
			}
		}
		slices.Sort(moved)
		a.Fates, a.Moved, before = append(a.Fates, fate...), append(a.Moved, moved), after
	}
	return gob.NewEncoder(os.Stdout).Encode(a)
}

func load(ctx context.Context, sys *system.System, r rules) error {
	for _, c := range []system.Command{
		{Name: "ipset", Args: []string{"restore"}, Stdin: []byte(r.IPSets)},
		{Name: "iptables-nft-restore", Stdin: []byte(r.Save[0])}, {Name: "ip6tables-nft-restore", Stdin: []byte(r.Save[1])},
		{Name: "iptables-legacy-restore", Stdin: []byte(r.Legacy[0])}, {Name: "ip6tables-legacy-restore", Stdin: []byte(r.Legacy[1])},
		{Name: "nft", Args: []string{"-f", "-"}, Stdin: []byte(r.Nft)},
	} {
		if len(c.Stdin) == 0 {
			continue
		}
		if _, err := sys.Run(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// live returns the rules as the readers do.
func live(ctx context.Context, sys *system.System) ([]exposure.Table, error) {
	saved, err := iptables.New(sys, firewall.Families[:]).Live(ctx)
	if err != nil {
		return nil, err
	}
	return nftables.Live(saved, true)
}

var counter = regexp.MustCompile(`(?m)^\[(\d+):\d+\] .*--comment (r\d+)\b|counter packets (\d+) .*comment "(r\d+)"`)

// counters returns the packet counter of each rule, by its comment.
func counters(ctx context.Context, sys *system.System, r rules) (map[string]int, error) {
	all := map[string]int{}
	for _, c := range []struct{ rules, program, arg string }{
		{r.Save[0], "iptables-nft-save", "-c"}, {r.Save[1], "ip6tables-nft-save", "-c"},
		{r.Legacy[0], "iptables-legacy-save", "-c"}, {r.Legacy[1], "ip6tables-legacy-save", "-c"}, {r.Nft, "nft", "list ruleset"},
	} {
		if c.rules == "" {
			continue
		}
		res, err := sys.Run(ctx, system.Command{Name: c.program, Args: strings.Fields(c.arg)})
		if err != nil {
			return nil, err
		}
		for _, m := range counter.FindAllStringSubmatch(string(res.Stdout), -1) {
			n, err := strconv.Atoi(m[1] + m[3])
			if err != nil {
				return nil, err
			}
			all[m[2]+m[4]] = n
		}
	}
	return all, nil
}

// The numbers of rulesets and of packets for each, and of those sent one by one.
const (
	rulesets = 40
	drawn    = 400
	single   = 8
)

// TestKernel loads generated rules and sends packets: what the model knows is what the
// kernel does, and it knows almost everything.
func TestKernel(t *testing.T) {
	lab.Need(t, "iptables-nft-save", "iptables-legacy-save", "nft")
	first, count := uint64(0), uint64(rulesets)
	if text := os.Getenv("BASICFW_SEED"); text != "" { // one ruleset, or FIRST+COUNT
		seed, more, several := strings.Cut(text, "+")
		var err, err2 error
		if first, err = strconv.ParseUint(seed, 10, 64); several {
			count, err2 = strconv.ParseUint(more, 10, 64)
		} else {
			count = 1
		}
		if err != nil || err2 != nil {
			t.Fatalf("BASICFW_SEED is %q", text)
		}
	}
	var mu sync.Mutex
	perhaps, compared := 0, 0
	t.Run("rulesets", func(t *testing.T) {
		for n := first; n < first+count; n++ {
			t.Run(fmt.Sprint(n), func(t *testing.T) {
				t.Parallel()
				p, c := compare(t, n)
				if n%4 != 3 {
					mu.Lock()
					defer mu.Unlock()
					perhaps, compared = perhaps+p, compared+c
				}
			})
		}
	})
	t.Logf("seeds %d to %d: %d of %d packets perhaps pass", first, first+count-1, perhaps, compared)
	if perhaps*10 > compared {
		t.Errorf("%d of %d packets perhaps pass", perhaps, compared)
	}
}

// compare compares the fates of packets with the model, and returns for how many it does
// not know.
func compare(t *testing.T, seed uint64) (perhaps, compared int) {
	t.Helper()
	q := request{generate(seed), (&generator{Rand: rand.New(rand.NewPCG(19, seed))}).packets(drawn), single}
	data, err := json.Marshal(q)
	if err != nil {
		t.Fatal(err)
	}
	res, err := (&system.System{}).Run(context.Background(), system.Command{Name: system.Self, Args: []string{inNamespace}, Stdin: data, Namespace: true, Timeout: time.Minute})
	if err != nil {
		t.Fatalf("seed %d: %v\n%v", seed, err, q.Rules)
	}
	var a answer
	if err := gob.NewDecoder(bytes.NewReader(res.Stdout)).Decode(&a); err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
	live := exposure.Ruleset{Tables: a.Tables}
	wrong := 0
	fail := func(format string, args ...any) {
		if wrong++; wrong <= 3 {
			t.Errorf(format, args...)
		}
	}
	for i, p := range q.Packets {
		if a.Free[i] != netsim.Passed {
			continue
		}
		compared++
		passed := a.Fates[i] == netsim.Passed
		_, all := trace(live, p, exposure.All(p.Src), false)
		result, one := trace(live, p, exposure.Of(netip.PrefixFrom(p.Src, p.Src.BitLen())), true)
		if all == "perhaps" {
			perhaps++
		}
		known := map[string]bool{"yes": true, "no": false}
		if want, sure := known[all]; sure && want != passed {
			fail("seed %d: passed %v, but the model says %s: %+v\n%s", seed, passed, all, p, steps(result))
		}
		if all != one {
			fail("seed %d: of all sources %s, of this one %s: %+v\n%s", seed, all, one, p, steps(result))
		}
		if n := i - len(q.Packets) + single; n >= 0 {
			if problem := explained(result, a.Moved[n]); problem != "" {
				fail("seed %d: passed %v, %s: the counters of %v moved: %+v\n%s", seed, passed, problem, a.Moved[n], p, steps(result))
			}
		}
	}
	if wrong > 0 {
		t.Errorf("seed %d: %d differences with\n%v", seed, wrong, q.Rules)
	}
	return perhaps, compared
}

// trace traces a packet and returns whether it reaches this host from its source.
func trace(r exposure.Ruleset, p firewall.Packet, from exposure.Sources, record bool) (exposure.Result, string) {
	q := exposure.Packet{Family: p.Family(), In: p.In, Dst: p.Dst, DstType: "LOCAL", SrcPort: p.SrcPort, DstPort: p.DstPort, TCPFlags: p.Flags,
		Proto: map[firewall.Proto]uint8{firewall.ICMP: 1, firewall.TCP: 6, firewall.UDP: 17, firewall.ICMPv6: 58}[p.Proto], ICMPType: 256 * uint16(p.ICMPType)}
	result := r.Trace(q, from, exposure.Host{
		Type: func(a netip.Addr) string {
			if slices.ContainsFunc(interfaces, func(i firewall.Interface) bool {
				return slices.ContainsFunc(i.Addresses, func(own netip.Prefix) bool { return own.Addr() == a })
			}) {
				return "LOCAL"
			}
			return "UNICAST"
		},
		Redirect: func(in string, dst netip.Addr) netip.Addr {
			own := interfaces[slices.IndexFunc(interfaces, func(i firewall.Interface) bool { return i.Name == in })].Addresses
			return own[slices.IndexFunc(own, func(a netip.Prefix) bool { return a.Addr().Is4() == dst.Is4() })].Addr()
		},
	}, record)
	open := "no"
	for _, e := range result.Ends {
		switch {
		case e.Forwarded:
		case e.Sure.Contains(p.Src):
			open = "yes"
		case e.Perhaps.Contains(p.Src) && open == "no":
			open = "perhaps"
		}
	}
	return result, open
}

var comment = regexp.MustCompile(`\br\d+\b`)

// explained compares the steps of a trace with the rules whose counters moved: those of all
// sure steps do, and no others than those of steps. The rule that decides is one of them.
func explained(r exposure.Result, moved []string) string {
	var all []string
	for _, s := range r.Steps {
		rule := comment.FindString(s.By.Text)
		if s.By.Rule < 0 || s.By.Program == "nft" && !strings.Contains(s.By.Text, "counter") {
			continue
		}
		if all = append(all, rule); !s.Perhaps && !slices.Contains(moved, rule) {
			return fmt.Sprintf("%q does not match", s.By.Text)
		}
	}
	for _, rule := range moved {
		if !slices.Contains(all, rule) {
			return rule + " matches"
		}
	}
	return ""
}

func steps(r exposure.Result) string {
	var b strings.Builder
	for _, s := range r.Steps {
		fmt.Fprintf(&b, "  %s %s %s %s %s: %s", s.Hook, s.By.Program, s.By.Family, s.By.Table, s.By.Chain, s.By.Text)
		if s.Perhaps {
			fmt.Fprintf(&b, " (perhaps: %q)", s.Why)
		}
		b.WriteString("\n")
	}
	return b.String()
}
