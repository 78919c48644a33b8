package host

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// closed is a minimal firewall with conntrack. The ICMPv6 rule is for neighbour
// discovery.
const closed = `*filter
:INPUT DROP [0:0]
-A INPUT -p ipv6-icmp -j ACCEPT
-A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT
COMMIT
`

// load loads the closed rules for IPv4 or IPv6 into the namespace.
func (ns *namespace) load(t *testing.T, family, variant string) {
	t.Helper()
	program := map[string]string{"ipv4": "iptables-", "ipv6": "ip6tables-"}[family] + variant + "-restore"
	rules := closed
	if family == "ipv4" {
		rules = strings.Replace(closed, "ipv6-icmp", "icmp", 1)
	}
	ns.restore(t, program, rules)
}

func (ns *namespace) restore(t *testing.T, program, rules string) {
	t.Helper()
	lab.Need(t, program)
	var err error
	ns.do(func() {
		_, err = (&system.System{}).Run(context.Background(), system.Command{Name: program, Stdin: []byte(rules)})
	})
	if err != nil {
		t.Fatal(err)
	}
}

// session is both ends of a TCP connection.
type session struct{ host, peer net.Conn }

// open opens a session between two namespaces and sends data in both directions.
func open(t *testing.T, server, client *namespace, address string) (atServer, atClient net.Conn) {
	t.Helper()
	var l net.Listener
	server.must(t, func() (err error) { l, err = net.Listen("tcp", address); return err })
	defer l.Close()
	client.must(t, func() (err error) {
		atClient, err = net.DialTimeout("tcp", l.Addr().String(), 5*time.Second)
		return err
	})
	atServer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { atServer.Close(); atClient.Close() })
	carries(t, atClient, atServer, 1)
	carries(t, atServer, atClient, 1)
	return atServer, atClient
}

// carries fails the test unless n bytes arrive.
func carries(t *testing.T, from, to net.Conn, n int) {
	t.Helper()
	if err := carry(from, to, n, 10*time.Second); err != nil {
		t.Fatalf("%d bytes from %s to %s: %v", n, from.LocalAddr(), to.LocalAddr(), err)
	}
}

func carry(from, to net.Conn, n int, limit time.Duration) error {
	from.SetDeadline(time.Now().Add(limit))
	to.SetDeadline(time.Now().Add(limit))
	sent := make(chan error, 1)
	go func() {
		_, err := from.Write(make([]byte, n))
		sent <- err
	}()
	_, err := io.CopyN(io.Discard, to, int64(n))
	if err != nil {
		return err
	}
	return <-sent
}

// large is more than any unscaled TCP window, which must not limit an adopted
// connection.
const large = 8 << 20

func TestOpenSessionsContinue(t *testing.T) {
	for _, variant := range []string{"nft", "legacy"} {
		for _, family := range []struct{ name, host, peer string }{
			{"ipv4", "192.0.2.1:7000", "192.0.2.2:7000"},
			{"ipv6", "[2001:db8::1]:7000", "[2001:db8::2]:7000"},
		} {
			for _, dialled := range []string{"peer", "host"} {
				t.Run(family.name+" dialled by "+dialled+" "+variant, func(t *testing.T) {
					host, peer := newNamespace(t), newNamespace(t)
					host.join(t, peer)
					var sessions []session
					for range 6 {
						var s session
						if dialled == "peer" {
							s.host, s.peer = open(t, host, peer, family.host)
						} else {
							s.peer, s.host = open(t, peer, host, family.peer)
						}
						sessions = append(sessions, s)
					}
					adopt(t, host, len(sessions))
					host.load(t, family.name, variant)
					for _, s := range sessions {
						carries(t, s.peer, s.host, large)
						carries(t, s.host, s.peer, large)
					}
					adopt(t, host, 0)
				})
			}
		}
	}
}

// A server that listens on [::] has IPv4 sessions on IPv6 sockets.
func TestOpenSessionsOfDualStackListenerContinue(t *testing.T) {
	host, peer := newNamespace(t), newNamespace(t)
	host.join(t, peer)
	var l net.Listener
	host.must(t, func() (err error) { l, err = net.Listen("tcp", "[::]:7000"); return err })
	defer l.Close()
	var s session
	peer.must(t, func() (err error) { s.peer, err = net.Dial("tcp", "192.0.2.1:7000"); return err })
	defer s.peer.Close()
	var err error
	if s.host, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	defer s.host.Close()
	adopt(t, host, 1)
	host.load(t, "ipv4", "nft")
	carries(t, s.peer, s.host, large)
}

func TestLocalSessionsContinue(t *testing.T) {
	for family, address := range map[string]string{"ipv4": "127.0.0.1:7000", "ipv6": "[::1]:7000"} {
		t.Run(family, func(t *testing.T) {
			host := newNamespace(t)
			server, client := open(t, host, host, address)
			// Both ends are here: one connection.
			adopt(t, host, 1)
			host.load(t, family, "nft")
			carries(t, client, server, large)
			carries(t, server, client, large)
		})
	}
}

// A session that is closed in one direction still carries data in the other.
func TestHalfClosedSessionsContinue(t *testing.T) {
	for _, closes := range []string{"host", "peer"} {
		t.Run("closed by "+closes, func(t *testing.T) {
			host, peer := newNamespace(t), newNamespace(t)
			host.join(t, peer)
			var s session
			s.host, s.peer = open(t, host, peer, "192.0.2.1:7000")
			from, to := s.peer, s.host
			if closes == "peer" {
				from, to = s.host, s.peer
			}
			if err := to.(*net.TCPConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := from.Read(make([]byte, 1)); err != io.EOF {
				t.Fatal("the end did not arrive:", err)
			}
			adopt(t, host, 1)
			host.load(t, "ipv4", "nft")
			carries(t, from, to, large)
		})
	}
}

// Rules that were flushed and are loaded again find three kinds of connections:
// opened before the rules, with them, and after the flush.
func TestOpenSessionsSurviveFlush(t *testing.T) {
	for _, variant := range []string{"nft", "legacy"} {
		t.Run(variant, func(t *testing.T) {
			host, peer := newNamespace(t), newNamespace(t)
			host.join(t, peer)
			var sessions []session
			add := func(address string) {
				var s session
				s.peer, s.host = open(t, peer, host, address)
				sessions = append(sessions, s)
			}
			add("192.0.2.2:7000")
			adopt(t, host, 1)
			host.load(t, "ipv4", variant)
			add("192.0.2.2:7001")
			host.restore(t, "iptables-"+variant+"-restore", "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n")
			add("192.0.2.2:7002")
			for _, s := range sessions {
				carries(t, s.peer, s.host, large)
				carries(t, s.host, s.peer, large)
			}
			adopt(t, host, 1)
			host.load(t, "ipv4", variant)
			for _, s := range sessions {
				carries(t, s.peer, s.host, large)
				carries(t, s.host, s.peer, large)
			}
		})
	}
}

// Without Adopt the other tests must fail.
func TestUnknownSessionsStall(t *testing.T) {
	host, peer := newNamespace(t), newNamespace(t)
	host.join(t, peer)
	var s session
	s.host, s.peer = open(t, host, peer, "192.0.2.1:7000")
	host.load(t, "ipv4", "nft")
	if err := carry(s.peer, s.host, 1, 300*time.Millisecond); err == nil {
		t.Fatal("a session without a conntrack entry carried data that the peer sent first")
	}
}

// An existing entry may have NAT: it does not change.
func TestAdoptKeepsEntries(t *testing.T) {
	host, peer := newNamespace(t), newNamespace(t)
	host.join(t, peer)
	host.load(t, "ipv4", "nft")
	_, s := open(t, peer, host, "192.0.2.2:7000")
	entry := func() *netlink.ConntrackFlow {
		var flows []*netlink.ConntrackFlow
		host.must(t, func() (err error) {
			flows, err = netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
			return err
		})
		if len(flows) != 1 {
			t.Fatalf("%d entries, want 1: %v", len(flows), flows)
		}
		return flows[0]
	}
	flow := entry()
	const timeout = 1000
	flow.TimeOut = timeout
	host.must(t, func() error {
		return netlink.ConntrackUpdate(netlink.ConntrackTable, netlink.FAMILY_V4, flow)
	})
	adopt(t, host, 0)
	if got := entry().TimeOut; got > timeout {
		t.Errorf("the timeout of %v became %d s", s.LocalAddr(), got)
	}
}

func TestAdoptNothing(t *testing.T) { adopt(t, newNamespace(t), 0) }

func adopt(t *testing.T, ns *namespace, want int) {
	t.Helper()
	ns.must(t, func() error {
		n, err := ConntrackTable{}.Adopt()
		if err == nil && n != want {
			t.Errorf("adopted %d sessions, want %d", n, want)
		}
		return err
	})
}
