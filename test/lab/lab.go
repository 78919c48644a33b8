// Package lab is a small network to test a firewall in: a server and an outsider, each in a
// network namespace of its own, joined by one link, over IPv4 and IPv6. The outsider has
// two roles: the allowed client, and a stranger. What is open is what the outsider can
// reach.
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

// Addrs are the addresses of one host, one for each family.
type Addrs struct{ V4, V6 netip.Addr }

// Both lists the addresses.
func (a Addrs) Both() []netip.Addr { return []netip.Addr{a.V4, a.V6} }

// Like returns the address of the family of o.
func (a Addrs) Like(o netip.Addr) netip.Addr {
	if o.Is4() {
		return a.V4
	}
	return a.V6
}

// String returns both addresses as the command line accepts them.
func (a Addrs) String() string { return a.V4.String() + "," + a.V6.String() }

// Lab is the two namespaces and their addresses, all from the documentation ranges (RFC
// 5737, RFC 3849). The client is on the server's own network, the stranger behind its
// default route.
type Lab struct {
	Host, Outsider           *Namespace
	Server, Client, Stranger Addrs
}

// New makes a lab that lasts until the test ends.
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
			t.Fatalf("setting up the lab: %s", r.Stderr)
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

// Wire adds a link between the host and the outsider, with an interface of the given name
// at each end.
func (l *Lab) Wire(t testing.TB, name string) {
	t.Helper()
	// ip accepts a path as the name of a namespace.
	peer := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), l.Outsider.net.Fd())
	l.Host.MustRun(t, "ip", "link", "add", name, "type", "veth", "peer", "name", name, "netns", peer)
}

// waitUp waits until the kernel sends over eth0: it drops packets silently between "link
// set up" and the event that there is a carrier.
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

// Poll waits until done returns true, and fails the test if it never does.
func Poll(t testing.TB, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(15 * time.Second); !done(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("timeout waiting for %s", what)
		}
	}
}

// Need skips a test that lacks root or a program, and names what is missing. If CI is set
// it fails the test: nothing may go untested there.
func Need(t testing.TB, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "root, to make namespaces")
	}
	NeedTools(t, programs...)
}

// NeedTools is Need for a test that does not require root.
func NeedTools(t testing.TB, programs ...string) {
	t.Helper()
	for _, p := range programs {
		_, err := exec.LookPath(p)
		if strings.Contains(p, "/") { // a file, not necessarily a program
			_, err = os.Stat(p)
		}
		if err != nil {
			Skip(t, p)
		}
	}
}

// Skip skips a test that lacks something, and names it. If CI is set it fails the test.
func Skip(t testing.TB, missing string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("this test needs %s", missing)
	}
	t.Skipf("this test needs %s", missing)
}
