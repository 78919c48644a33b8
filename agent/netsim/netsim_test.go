package netsim_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/netsim"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

func prefixes(list ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, p := range list {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

// build creates a copy with two interfaces in a new namespace.
func build(t *testing.T) (*lab.Namespace, *netsim.Copy) {
	t.Helper()
	lab.Need(t)
	n := lab.NewNamespace(t)
	var sim *netsim.Copy
	if err := n.Do(func() (err error) {
		sim, err = netsim.New(&system.System{}, firewall.Families[:], []firewall.Interface{
			{Name: "eth0", Addresses: prefixes("192.0.2.1/24", "2001:db8::1/64")},
			{Name: "eth1.7", Addresses: prefixes("10.0.0.1/32")},
		})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(sim.Close)
	return n, sim
}

// packets returns one packet of each kind that rules can distinguish.
func packets() []firewall.Packet {
	var list []firewall.Packet
	for _, in := range []string{"eth0", "eth1.7", "lo"} {
		for _, x := range []struct {
			from, to string
			icmp     firewall.Proto
			types    []uint8
		}{
			{"198.51.100.7", "192.0.2.1", firewall.ICMP, []uint8{0, 3, 5, 8, 11, 12, 13}},
			{"2001:db8:9::7", "2001:db8::1", firewall.ICMPv6, []uint8{1, 2, 3, 4, 128, 129, 130, 133, 134, 135, 136, 137, 143}},
		} {
			p := firewall.Packet{In: in, Src: netip.MustParseAddr(x.from), Dst: netip.MustParseAddr(x.to), DstPort: 80, HopLimit: 255}
			if in == "lo" {
				p.Src = p.Dst
			}
			add := func(p firewall.Packet) {
				if p.State == "" {
					p.State = netsim.Unprovoked(p)
				}
				list = append(list, p)
			}
			for flags := range 256 {
				q := p
				q.Proto, q.Flags = firewall.TCP, uint8(flags)
				add(q)
			}
			for _, kind := range x.types {
				q := p
				q.Proto, q.ICMPType = x.icmp, kind
				add(q)
			}
			p.Proto = firewall.UDP
			add(p)
			p.Proto = netsim.OtherProto
			add(p)
			if p.Src.Is4() {
				q := p
				q.Proto = firewall.IGMP
				add(q)
			}
			if in == "lo" {
				continue
			}
			p.Proto, p.State = firewall.UDP, firewall.TrackedInvalid
			add(p)
			p.DstType, p.Dst, p.State = firewall.Multicast, netip.MustParseAddr("ff02::1"), firewall.TrackedNew
			if p.Src.Is4() {
				p.Dst = netip.MustParseAddr("224.0.0.1")
				add(p)
				p.DstType, p.Dst = firewall.Broadcast, netip.MustParseAddr("255.255.255.255")
				add(p)
				p.Src, p.Dst, p.DstType = netip.MustParseAddr("198.51.100.7"), netip.MustParseAddr("127.0.0.1"), ""
				add(p)
				p.Src, p.Dst = p.Dst, netip.MustParseAddr("192.0.2.1")
			}
			add(p)
		}
	}
	return list
}

func fates(t *testing.T, sim *netsim.Copy, list []firewall.Packet) []netsim.Fate {
	t.Helper()
	got, err := sim.Send(list)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// TestSend proves with known rules that packets are reported as passed or dropped
// correctly.
func TestSend(t *testing.T) {
	t.Parallel()
	for _, multi := range []string{"xtables-nft-multi", "xtables-legacy-multi"} {
		t.Run(multi, func(t *testing.T) {
			t.Parallel()
			lab.Need(t, multi)
			n, sim := build(t)
			list := packets()
			for i, fate := range fates(t, sim, list) {
				if fate != netsim.Passed {
					t.Errorf("without rules: %d: %+v", fate, list[i])
				}
			}
			rules := func(args ...string) {
				t.Helper()
				for _, tables := range []string{"iptables", "ip6tables"} {
					n.MustRun(t, append([]string{multi, tables}, args...)...)
				}
			}
			rules("-P", "INPUT", "DROP")
			for i, fate := range fates(t, sim, list) {
				if fate != netsim.Dropped {
					t.Errorf("want all dropped: %d: %+v", fate, list[i])
				}
			}
			// Each state separately.
			for _, state := range []firewall.Tracked{firewall.TrackedNew, firewall.TrackedInvalid, firewall.Untracked} {
				rules("-F", "INPUT")
				rules("-A", "INPUT", "-m", "conntrack", "--ctstate", string(state), "-j", "ACCEPT")
				for i, fate := range fates(t, sim, list) {
					if (fate == netsim.Passed) != (list[i].State == state) {
						t.Errorf("want all but %s dropped: %d: %+v", state, fate, list[i])
					}
				}
			}
		})
	}
}

// TestStates sends packets of connections from the copy.
func TestStates(t *testing.T) {
	t.Parallel()
	lab.Need(t, "xtables-nft-multi")
	n, sim := build(t)
	var list []firewall.Packet
	for _, x := range []struct {
		from, to       string
		icmp           firewall.Proto
		reply, problem uint8
	}{{"198.51.100.7", "192.0.2.1", firewall.ICMP, 0, 3}, {"2001:db8:9::7", "2001:db8::1", firewall.ICMPv6, 129, 2}} {
		p := firewall.Packet{In: "eth0", Src: netip.MustParseAddr(x.from), Dst: netip.MustParseAddr(x.to), SrcPort: 443, DstPort: 50000, HopLimit: 64}
		add := func(proto firewall.Proto, flags firewall.TCPFlags, icmp uint8, state firewall.Tracked) {
			q := p
			q.Proto, q.Flags, q.ICMPType, q.State = proto, uint8(flags), icmp, state
			list = append(list, q)
		}
		add(firewall.TCP, firewall.SYN|firewall.ACK, 0, firewall.TrackedEstablished)
		add(firewall.UDP, 0, 0, firewall.TrackedEstablished)
		add(x.icmp, 0, x.reply, firewall.TrackedEstablished)
		add(x.icmp, 0, x.problem, firewall.TrackedRelated)
	}
	tables := func(args ...string) {
		for _, tables := range []string{"iptables", "ip6tables"} {
			n.MustRun(t, append([]string{"xtables-nft-multi", tables}, args...)...)
		}
	}
	tables("-P", "INPUT", "DROP")
	for _, state := range []firewall.Tracked{firewall.TrackedEstablished, firewall.TrackedRelated} {
		tables("-F", "INPUT")
		tables("-A", "INPUT", "-m", "conntrack", "--ctstate", string(state), "-j", "ACCEPT")
		for i, fate := range fates(t, sim, list) {
			// The second time it is a reply in the same connection, which still exists.
			if (fate == netsim.Passed) != (list[i].State == state) {
				t.Errorf("want all but %s dropped: %d: %+v", state, fate, list[i])
			}
		}
	}
	bad := list[0]
	bad.State = firewall.TrackedNew
	if _, err := sim.Send([]firewall.Packet{bad}); err == nil || !strings.Contains(err.Error(), "NEW") {
		t.Errorf("a new SYN and ACK: %v", err)
	}
	bad = list[0]
	bad.In = "eth9"
	if _, err := sim.Send([]firewall.Packet{bad}); err == nil || !strings.Contains(err.Error(), "eth9") {
		t.Errorf("on a missing interface: %v", err)
	}
}

// TestInUse does not change a network in use, and uses the names of the kernel's links.
func TestInUse(t *testing.T) {
	t.Parallel()
	lab.Need(t, "ip")
	n := lab.NewNamespace(t)
	n.MustRun(t, "ip", "link", "add", "sit7", "type", "veth", "peer", "name", "sit8")
	make := func() error {
		return n.Do(func() error {
			sim, err := netsim.New(&system.System{}, firewall.Families[:], []firewall.Interface{{Name: "sit7"}})
			if err == nil {
				sim.Close()
			}
			return err
		})
	}
	n.MustRun(t, "ip", "link", "set", "sit7", "up")
	before := n.MustRun(t, "ip", "addr")
	if err := make(); !errors.Is(err, netsim.ErrInUse) {
		t.Errorf("%v", err)
	}
	if after := n.MustRun(t, "ip", "addr"); after != before {
		t.Errorf("it became\n%s", after)
	}
	n.MustRun(t, "ip", "link", "set", "sit7", "down")
	if err := make(); err != nil {
		t.Errorf("%v", err)
	}
	// A name that no interface can have.
	err := lab.NewNamespace(t).Do(func() error {
		_, err := netsim.New(&system.System{}, firewall.Families[:], []firewall.Interface{{Name: "longer than fifteen"}})
		return err
	})
	var impossible *netsim.ImpossibleError
	if !errors.As(err, &impossible) || !errors.Is(err, unix.ERANGE) {
		t.Errorf("%v", err)
	}
}

// TestAnswers makes the copy answer many missing hosts. No answer may wait for address
// resolution: the kernel's ICMP errors some seconds later would fill the sockets' buffers.
func TestAnswers(t *testing.T) {
	t.Parallel()
	lab.Need(t, "ip")
	n, sim := build(t)
	var list []firewall.Packet
	for _, p := range []firewall.Packet{
		{Src: netip.MustParseAddr("198.51.100.1"), Dst: netip.MustParseAddr("192.0.2.1")},
		{Src: netip.MustParseAddr("2001:db8:9::1"), Dst: netip.MustParseAddr("2001:db8::1")},
	} {
		p.In, p.Proto, p.Flags, p.DstPort, p.State, p.HopLimit = "eth0", firewall.TCP, uint8(firewall.SYN), 80, firewall.TrackedNew, 64
		for range 20 {
			p.Src = p.Src.Next()
			list = append(list, p)
		}
	}
	fates(t, sim, list)
	if waited := n.MustRun(t, "ip", "neigh", "show", "nud", "incomplete", "nud", "failed"); waited != "" {
		t.Errorf("addresses being resolved:\n%s", waited)
	}
	// They were answered.
	if noarp := n.MustRun(t, "ip", "neigh", "show", "nud", "noarp"); !strings.Contains(noarp, list[0].Src.String()+" ") || !strings.Contains(noarp, list[len(list)-1].Src.String()+" ") {
		t.Errorf("no answer to one of them:\n%s", noarp)
	}
}
