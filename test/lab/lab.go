// Package lab is a small network to test a firewall in: a server and an
// outsider, each in a network namespace of its own, joined by one wire, over
// IPv4 and IPv6. The outsider is two people: the client who may log in and a
// stranger. What is open is decided by what the outsider can reach.
package lab

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// Addrs are somebody's addresses, one for each family.
type Addrs struct{ V4, V6 netip.Addr }

// Both lists the addresses.
func (a Addrs) Both() []netip.Addr { return []netip.Addr{a.V4, a.V6} }

// Like gives the address of the family of o.
func (a Addrs) Like(o netip.Addr) netip.Addr {
	if o.Is4() {
		return a.V4
	}
	return a.V6
}

// String gives both addresses, as the command line takes them.
func (a Addrs) String() string { return a.V4.String() + "," + a.V6.String() }

// Lab is the two namespaces and the addresses in them, all from the ranges
// for documentation (RFC 5737, RFC 3849). The client is on the server's own
// network, the stranger behind its default route.
type Lab struct {
	Host, Outsider           *Namespace
	Server, Client, Stranger Addrs
}

// New makes a lab that lasts as long as the test.
func New(t testing.TB) *Lab {
	t.Helper()
	Need(t, "ip")
	l := &Lab{
		Host:     NewNamespace(t),
		Outsider: NewNamespace(t),
		Server:   Addrs{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8:0:1::1")},
		Client:   Addrs{netip.MustParseAddr("192.0.2.10"), netip.MustParseAddr("2001:db8:0:1::10")},
		Stranger: Addrs{netip.MustParseAddr("198.51.100.20"), netip.MustParseAddr("2001:db8:0:2::20")},
	}
	l.Wire(t, "eth0")
	batch := func(n *Namespace, lines ...string) {
		t.Helper()
		r := n.Run(t, Command{Args: []string{"ip", "-batch", "-"}, Stdin: strings.Join(lines, "\n") + "\n"})
		if r.Code != 0 {
			t.Fatalf("wiring the lab: %s", r.Stderr)
		}
	}
	batch(l.Outsider,
		"addr add 192.0.2.254/24 dev eth0",
		"addr add 2001:db8:0:1::fe/64 dev eth0 nodad",
		fmt.Sprintf("addr add %s/24 dev eth0", l.Client.V4),
		fmt.Sprintf("addr add %s/64 dev eth0 nodad", l.Client.V6),
		fmt.Sprintf("addr add %s/32 dev eth0", l.Stranger.V4),
		fmt.Sprintf("addr add %s/128 dev eth0 nodad", l.Stranger.V6),
		"link set eth0 up")
	batch(l.Host,
		fmt.Sprintf("addr add %s/24 dev eth0", l.Server.V4),
		fmt.Sprintf("addr add %s/64 dev eth0 nodad", l.Server.V6),
		"link set eth0 up",
		"route add default via 192.0.2.254",
		"route add default via 2001:db8:0:1::fe dev eth0")
	for _, n := range []*Namespace{l.Host, l.Outsider} {
		n.waitUp(t)
	}
	return l
}

// Wire joins the host and the outsider by a wire, with an interface of a name at
// each end.
func (l *Lab) Wire(t testing.TB, name string) {
	t.Helper()
	// ip takes a path for the name of a namespace.
	peer := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), l.Outsider.net.Fd())
	l.Host.MustRun(t, "ip", "link", "add", name, "type", "veth", "peer", "name", name, "netns", peer)
}

// waitUp waits until the kernel sends over eth0: it drops packets silently
// between "link set up" and the news that there is a carrier.
func (n *Namespace) waitUp(t testing.TB) {
	t.Helper()
	Poll(t, "eth0 to be up", func() bool {
		state := ""
		n.Do(func() error {
			data, err := os.ReadFile("/sys/class/net/eth0/operstate")
			state = strings.TrimSpace(string(data))
			return err
		})
		return state == "up"
	})
}

// Poll waits until done says true, and fails the test if it never does.
func Poll(t testing.TB, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(15 * time.Second); !done(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for %s", what)
		}
	}
}

// Need skips a test that lacks root or a program, and says which. It fails it
// where CI is set: there nothing may go untested.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		skip(t, "root, to make namespaces")
	}
	NeedTools(t, programs...)
}

// NeedTools is Need of a test that needs no root.
func NeedTools(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		_, err := exec.LookPath(p)
		if strings.Contains(p, "/") { // a file, that may be no program
			_, err = os.Stat(p)
		}
		if err != nil {
			skip(t, p)
		}
	}
}

func skip(t testing.TB, missing string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("this test needs %s", missing)
	}
	t.Skipf("this test needs %s", missing)
}
