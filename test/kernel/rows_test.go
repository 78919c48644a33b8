package kernel_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// sysctl sets a kernel parameter of a namespace's network.
func sysctl(t *testing.T, n *lab.Namespace, name, value string) {
	t.Helper()
	err := n.Do(func() error { return os.WriteFile("/proc/sys/net/"+name, []byte(value), 0o644) })
	if err != nil {
		t.Fatal(err)
	}
}

// exempt exempts what is sent to ports, and the answers, from connection tracking.
func (m *machine) exempt(t *testing.T, ports ...string) {
	t.Helper()
	text := "*raw\n"
	for _, p := range ports {
		port, proto, _ := strings.Cut(p, "/")
		text += fmt.Sprintf("-A PREROUTING -p %s -m %[1]s --dport %s -j CT --notrack\n-A OUTPUT -p %[1]s -m %[1]s --sport %[2]s -j CT --notrack\n", proto, port)
	}
	for _, family := range families() {
		m.load(t, family, text+"COMMIT\n", "--noflush")
	}
}

// TestUntracked exempts ports from connection tracking. Those of the settings and SSH are
// open, and no others.
func TestUntracked(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 443, 8080)
		m.Host.ListenUDP(t, 53, 54)
		m.exempt(t, "22/tcp", "80/tcp", "8080/tcp", "53/udp", "54/udp")
		m.bootstrap(t)
		m.must(t, exitOK, "open", "53/udp")
		for _, to := range m.Server.Both() {
			client, stranger := m.Client.Like(to), m.Stranger.Like(to)
			for _, x := range []struct {
				what string
				err  error
				open bool
			}{
				{"SSH from the client", m.Outsider.Reach(client, to, 22, lab.Patient), true},
				{"SSH from a stranger", m.Outsider.Reach(stranger, to, 22, lab.Brief), false},
				{"80/tcp", m.Outsider.Reach(stranger, to, 80, lab.Patient), true},
				{"443/tcp, which is tracked", m.Outsider.Reach(stranger, to, 443, lab.Patient), true},
				{"8080/tcp", m.Outsider.Reach(stranger, to, 8080, lab.Brief), false},
				{"53/udp", m.Outsider.ReachUDP(stranger, to, 53, lab.Patient), true},
				{"54/udp", m.Outsider.ReachUDP(stranger, to, 54, lab.Brief), false},
			} {
				if (x.err == nil) != x.open {
					t.Errorf("%s at %v: %v, want open %v", x.what, to, x.err, x.open)
				}
			}
		}
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "selftest")
	})
}

// TestUntrackedLimit opens SSH to any address, on a port that is exempt from connection
// tracking. The limit counts new connections, and not each packet.
func TestUntrackedLimit(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22)
		m.exempt(t, "22/tcp")
		m.write(t, "/etc/basicfw/agent.ini", "[ssh]\nallow = any\nlimit = 3/hour\n", 0o640)
		m.must(t, exitOK, "bootstrap", "--no-service", "--no-selftest")
		for _, to := range m.Server.Both() {
			from := m.Stranger.Like(to)
			s, err := m.Outsider.Dial(from, to, 22, lab.Patient)
			if err != nil {
				t.Fatalf("to %v: %v", to, err)
			}
			defer s.Close()
			for n := range 10 {
				if err := s.Talk(); err != nil {
					t.Fatalf("line %d to %v: %v", n, to, err)
				}
			}
			for range 2 {
				if err := m.Outsider.Reach(from, to, 22, lab.Patient); err != nil {
					t.Errorf("within the limit, at %v: %v", to, err)
				}
			}
			if m.Outsider.Reach(from, to, 22, lab.Brief) == nil {
				t.Errorf("the fourth connection to %v is accepted", to)
			}
		}
	})
}

// socket opens a socket in a namespace for the length of the test.
func socket(t *testing.T, n *lab.Namespace, domain, kind, proto int) int {
	t.Helper()
	fd := -1
	err := n.Do(func() (err error) {
		fd, err = unix.Socket(domain, kind|unix.SOCK_CLOEXEC, proto)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// received returns the first packet that a socket receives, or none.
func received(t *testing.T, fd int) []byte {
	t.Helper()
	wait := unix.NsecToTimeval(int64(2 * time.Second))
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, 2000)
	n, err := 0, error(unix.EINTR)
	for err == unix.EINTR {
		n, _, err = unix.Recvfrom(fd, data, 0)
	}
	if err == unix.EAGAIN {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	return data[:n]
}

// withChecksum sets the checksum at bytes 2 and 3 of an ICMP or IGMP message.
func withChecksum(message []byte) []byte {
	sum := uint32(0)
	for i := 0; i+1 < len(message); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(message[i:]))
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(message[2:], ^uint16(sum))
	return message
}

// TestIGMP sends an IGMP query, which passes if it is for a multicast group.
func TestIGMP(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		in := socket(t, m.Host, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_IGMP)
		out := socket(t, m.Outsider, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_IGMP)
		if err := unix.SetsockoptInet4Addr(out, unix.IPPROTO_IP, unix.IP_MULTICAST_IF, m.Client.V4.As4()); err != nil {
			t.Fatal(err)
		}
		query := withChecksum([]byte{0x11, 10, 0, 0, 0, 0, 0, 0})
		for _, to := range []netip.Addr{m.Server.V4, netip.MustParseAddr("224.0.0.1")} {
			if err := unix.Sendto(out, query, 0, &unix.SockaddrInet4{Addr: to.As4()}); err != nil {
				t.Fatal(err)
			}
		}
		if got := received(t, in); len(got) < 28 || !bytes.Equal(got[16:20], []byte{224, 0, 0, 1}) {
			t.Errorf("a query does not pass, or one to the host alone does: %x", got)
		}
	})
}

// TestDHCPv6 answers a DHCPv6 client from a global address.
func TestDHCPv6(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		var local string
		lab.Poll(t, "a link-local address", func() bool {
			line := m.Host.MustRun(t, "ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link")
			if _, rest, ok := strings.Cut(line, "inet6 "); ok && !strings.Contains(line, "tentative") {
				local, _, _ = strings.Cut(rest, "/")
			}
			return local != ""
		})
		in := socket(t, m.Host, unix.AF_INET6, unix.SOCK_DGRAM, 0)
		if err := unix.Bind(in, &unix.SockaddrInet6{Port: 546}); err != nil {
			t.Fatal(err)
		}
		out := socket(t, m.Outsider, unix.AF_INET6, unix.SOCK_DGRAM, 0)
		if err := unix.Bind(out, &unix.SockaddrInet6{Port: 547, Addr: m.Client.V6.As16()}); err != nil {
			t.Fatal(err)
		}
		var index int
		if err := m.Outsider.Do(func() error {
			eth0, err := net.InterfaceByName("eth0")
			if err == nil {
				index = eth0.Index
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		for _, to := range []netip.Addr{m.Server.V6, netip.MustParseAddr(local)} {
			if err := unix.Sendto(out, []byte(to.String()), 0, &unix.SockaddrInet6{Port: 546, Addr: to.As16(), ZoneId: uint32(index)}); err != nil {
				t.Fatal(err)
			}
		}
		if got := string(received(t, in)); got != local {
			t.Errorf("received %q, want the answer to %s", got, local)
		}
	})
}

// TestDHCP sends DHCP answers to the client's port over IPv4. One with the host's own address
// passes if that is leased, and one by broadcast always.
func TestDHCP(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		in := socket(t, m.Host, unix.AF_INET, unix.SOCK_DGRAM, 0)
		if err := unix.Bind(in, &unix.SockaddrInet4{Port: 68}); err != nil {
			t.Fatal(err)
		}
		out := socket(t, m.Outsider, unix.AF_INET, unix.SOCK_DGRAM, 0)
		for _, err := range []error{
			unix.SetsockoptInt(out, unix.SOL_SOCKET, unix.SO_BROADCAST, 1),
			unix.SetsockoptString(out, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, "eth0"),
			unix.Bind(out, &unix.SockaddrInet4{Port: 67, Addr: m.Client.V4.As4()}),
		} {
			if err != nil {
				t.Fatal(err)
			}
		}
		// receives returns which answer the client receives first, of one to each address.
		receives := func() string {
			t.Helper()
			for _, to := range []netip.Addr{m.Server.V4, netip.MustParseAddr("255.255.255.255")} {
				if err := unix.Sendto(out, []byte(to.String()), 0, &unix.SockaddrInet4{Port: 68, Addr: to.As4()}); err != nil {
					t.Fatal(err)
				}
			}
			first := string(received(t, in))
			if first == m.Server.V4.String() {
				received(t, in)
			}
			return first
		}
		m.bootstrap(t)
		if got := receives(); got != "255.255.255.255" {
			t.Errorf("at a permanent address: received %q first", got)
		}
		m.must(t, exitOK, "selftest")
		m.Host.MustRun(t, "ip", "addr", "change", m.Server.V4.String()+"/24", "dev", "eth0", "valid_lft", "3600", "preferred_lft", "3600")
		m.must(t, exitOK, "apply")
		if got := receives(); got != m.Server.V4.String() {
			t.Errorf("at a leased address: received %q first", got)
		}
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "selftest")
	})
}

// TestToLoopback sends packets to 127.0.0.1 from outside, where a kernel parameter lets them
// in. They reach a service there through a DNAT only, even if its port is open, and whether
// connections are tracked or not.
func TestToLoopback(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		local := netip.MustParseAddr("127.0.0.1")
		for _, n := range []*lab.Namespace{m.Host, m.Outsider} {
			sysctl(t, n, "ipv4/conf/all/route_localnet", "1")
			for _, i := range []string{"all", "eth0"} {
				sysctl(t, n, "ipv4/conf/"+i+"/rp_filter", "0")
			}
		}
		m.Outsider.MustRun(t, "ip", "addr", "del", "127.0.0.1/8", "dev", "lo")
		m.Outsider.MustRun(t, "ip", "route", "add", "127.0.0.1", "via", m.Server.V4.String(), "dev", "eth0")
		m.Host.ListenOn(t, local, 80)
		reach := func(to netip.Addr, wait time.Duration) error { return m.Outsider.Reach(m.Client.V4, to, 80, wait) }
		if err := reach(local, lab.Patient); err != nil {
			t.Fatalf("before bootstrap: %v", err)
		}
		m.load(t, ipv4, fmt.Sprintf("*nat\n-A PREROUTING -d %s -p tcp -m tcp --dport 80 -j DNAT --to-destination 127.0.0.1:80\nCOMMIT\n", m.Server.V4), "--noflush")
		m.bootstrap(t)
		if reach(local, lab.Brief) == nil {
			t.Error("the service on 127.0.0.1 is reached from outside")
		}
		if err := reach(m.Server.V4, lab.Patient); err != nil {
			t.Errorf("through DNAT: %v", err)
		}
		m.load(t, ipv4, "*raw\n-A PREROUTING -d 127.0.0.0/8 -i eth0 -j CT --notrack\n-A OUTPUT -s 127.0.0.0/8 -d 192.0.2.0/24 -j CT --notrack\nCOMMIT\n", "--noflush")
		if reach(local, lab.Brief) == nil {
			t.Error("without connection tracking, the service on 127.0.0.1 is reached from outside")
		}
		m.must(t, exitOK, "verify")
	})
}

// TestRelated sends ICMP errors about a connection of the host: a redirect does not pass,
// path MTU discovery works.
func TestRelated(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		// errorFrom returns a socket that sends ICMP messages from an address.
		errorFrom := func(domain, proto int, from unix.Sockaddr) int {
			fd := socket(t, m.Outsider, domain, unix.SOCK_RAW, proto)
			if err := unix.Bind(fd, from); err != nil {
				t.Fatal(err)
			}
			return fd
		}
		send := func(fd int, to unix.Sockaddr, message ...[]byte) {
			t.Helper()
			if err := unix.Sendto(fd, slices.Concat(message...), 0, to); err != nil {
				t.Fatal(err)
			}
		}
		raised := func(to netip.Addr) {
			t.Helper()
			lab.Poll(t, fmt.Sprintf("the path MTU to %v", to), func() bool {
				return strings.Contains(m.Host.MustRun(t, "ip", "route", "get", to.String()), "mtu 1300")
			})
		}
		const mtu = "\x00\x00\x05\x14"
		header := m.began(t, m.Client.V4)
		ipv4 := slices.Concat([]byte{0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0}, m.Server.V4.AsSlice(), m.Client.V4.AsSlice(), header)
		in := socket(t, m.Host, unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
		out, to := errorFrom(unix.AF_INET, unix.IPPROTO_ICMP, &unix.SockaddrInet4{Addr: m.Client.V4.As4()}), &unix.SockaddrInet4{Addr: m.Server.V4.As4()}
		send(out, to, withChecksum(slices.Concat([]byte{5, 1, 0, 0, 192, 0, 2, 254}, ipv4)))
		send(out, to, withChecksum(slices.Concat([]byte{3, 4, 0, 0}, []byte(mtu), ipv4)))
		if got := received(t, in); len(got) < 28 || got[20] != 3 {
			t.Errorf("a redirect passes, or path MTU does not: %x", got)
		}
		raised(m.Client.V4)

		header = m.began(t, m.Client.V6)
		out6, to6 := errorFrom(unix.AF_INET6, unix.IPPROTO_ICMPV6, &unix.SockaddrInet6{Addr: m.Client.V6.As16()}), &unix.SockaddrInet6{Addr: m.Server.V6.As16()}
		send(out6, to6, []byte{2, 0, 0, 0}, []byte(mtu), []byte{0x60, 0, 0, 0, 0, 8, 17, 64}, m.Server.V6.AsSlice(), m.Client.V6.AsSlice(), header)
		raised(m.Client.V6)
	})
}

// began sends a UDP datagram from the host, and returns its header.
func (m *machine) began(t *testing.T, to netip.Addr) []byte {
	t.Helper()
	header := []byte{0, 0, 0, 9, 0, 8, 0, 0}
	err := m.Host.Do(func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(to, 9).String())
		if err != nil {
			return err
		}
		t.Cleanup(func() { c.Close() })
		binary.BigEndian.PutUint16(header, c.LocalAddr().(*net.UDPAddr).AddrPort().Port())
		_, err = c.Write(nil)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return header
}

// TestHelper makes the kernel's FTP helper expect a connection to a port of the host. That
// opens no port.
func TestHelper(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 21, 40000)
		// Loaded before bootstrap, so that it is a rule of another program.
		r := m.Host.Run(t, lab.Command{Args: []string{m.multi, "iptables-restore", "--noflush"},
			Stdin: "*raw\n-A PREROUTING -p tcp -m tcp --dport 21 -j CT --helper ftp\nCOMMIT\n"})
		if r.Code != 0 {
			lab.Skip(t, "the kernel module nf_conntrack_ftp: "+r.Stderr)
		}
		m.bootstrap(t)
		m.must(t, exitOK, "open", "21/tcp")
		s, err := m.Outsider.Dial(m.Client.V4, m.Server.V4, 21, lab.Patient)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		// The echo is the answer to PASV, with the port 40000.
		if err := s.Say("227 Entering Passive Mode (192,0,2,1,156,64)"); err != nil {
			t.Fatal(err)
		}
		if err := m.Outsider.Reach(m.Client.V4, m.Server.V4, 40000, lab.Brief); err == nil {
			t.Error("the helper opens 40000/tcp")
		}
		m.must(t, exitOK, "open", "40000/tcp")
		if err := m.Outsider.Reach(m.Client.V4, m.Server.V4, 40000, lab.Patient); err != nil {
			t.Errorf("opened: %v", err)
		}
	})
}
