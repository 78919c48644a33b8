package kernel_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// domainOf returns the domain of a socket for packets to an address.
func domainOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

func sockaddr(a netip.Addr) unix.Sockaddr {
	if a.Is4() {
		return &unix.SockaddrInet4{Addr: a.As4()}
	}
	return &unix.SockaddrInet6{Addr: a.As16()}
}

// raw reports whether a packet of an IP protocol reaches the host.
func (m *machine) raw(t *testing.T, from, to netip.Addr, proto int, body []byte, wait time.Duration) bool {
	t.Helper()
	open := func(n *lab.Namespace) (fd int) {
		t.Helper()
		if err := n.Do(func() (err error) {
			fd, err = unix.Socket(domainOf(to), unix.SOCK_RAW|unix.SOCK_CLOEXEC, proto)
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return fd
	}
	host, outsider := open(m.Host), open(m.Outsider)
	defer unix.Close(host)
	defer unix.Close(outsider)
	if err := unix.Bind(outsider, sockaddr(from)); err != nil {
		t.Fatal(err)
	}
	until := time.Now().Add(wait)
	tv := unix.NsecToTimeval(int64(100 * time.Millisecond))
	if err := unix.SetsockoptTimeval(host, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 2048)
	for time.Now().Before(until) {
		if err := unix.Sendto(outsider, body, 0, sockaddr(to)); err != nil {
			t.Fatal(err)
		}
		if _, _, err := unix.Recvfrom(host, buf, 0); err == nil {
			return true
		}
	}
	return false
}

// TestProtocols opens protocols other than TCP and UDP, and closes them again.
func TestProtocols(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80)
		m.write(t, agentINI, "", 0o644)
		m.bootstrap(t)
		before := m.settled(t)
		for _, step := range []struct {
			open, name, value, who string
			proto                  int
			close                  string
		}{
			{"vrrp", "vrrp", "vrrp", everybody, 112, "vrrp"},
			{"gre --from 192.0.2.0/24", "gre", "gre from 192.0.2.0/24", "client4", 47, "gre"},
			{"esp --on public", "esp", "esp on public", everybody, 50, "esp"},
			{"ospf --name routes", "routes", "ospf", everybody, 89, "ospf"},
		} {
			m.must(t, exitOK, append([]string{"open"}, strings.Fields(step.open)...)...)
			m.wantSetting(t, "open", step.name, step.value)
			m.untouched(t, append([]string{"open"}, strings.Fields(step.open)...)...)
			m.must(t, exitOK, "verify")
			for _, try := range []struct {
				name     string
				from, to netip.Addr
			}{{"client4", m.Client.V4, m.Server.V4}, {"client6", m.Client.V6, m.Server.V6}, {"stranger4", m.Stranger.V4, m.Server.V4}, {"stranger6", m.Stranger.V6, m.Server.V6}} {
				wait, want := lab.Brief, step.who == everybody || step.who == try.name
				if want {
					wait = lab.Patient
				}
				if got := m.raw(t, try.from, try.to, step.proto, make([]byte, 20), wait); got != want {
					t.Errorf("%s: %s gets through: %t, want %t", step.open, try.name, got, want)
				}
			}
			m.must(t, exitOK, "close", step.close)
			if m.raw(t, m.Client.V4, m.Server.V4, step.proto, make([]byte, 20), lab.Brief) {
				t.Errorf("%s: open after it was closed", step.open)
			}
		}
		m.must(t, exitOK, "open", "proto 112", "--on", "private")
		m.must(t, exitOK, "close", "proto 112")
		// Packets without IPsec do not get through.
		m.Host.ListenUDP(t, 1701)
		m.write(t, agentINI, "[open]\nl2tp = 1701/udp via ipsec\n", 0o644)
		m.must(t, exitOK, "apply")
		m.must(t, exitOK, "verify")
		m.wantOpen(t, map[string]string{"1701/udp": nobody, "80/tcp": everybody})
		if s := m.status(t, exitOK); s.State != "protected" {
			t.Errorf("with via ipsec: state %q", s.State)
		}
		m.write(t, agentINI, "[open]\nl2tp = 1701/udp\n", 0o644)
		m.must(t, exitOK, "apply")
		m.wantOpen(t, map[string]string{"1701/udp": everybody})
		m.write(t, agentINI, "", 0o644)
		m.must(t, exitOK, "apply")
		m.must(t, exitOK, "open", "9/sctp")
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "plan", "--exit-code")
		m.must(t, exitOK, "close", "9/sctp")
		same(t, "after all is closed again", before, m.settled(t))
	})
}

// TestServiceLimit exceeds the rate limit of a service: each source has its own, and no
// other service has.
func TestServiceLimit(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080, 8443)
		m.bootstrap(t)
		m.must(t, exitOK, "open", "8443/tcp", "--limit", "5/hour", "--name", "api")
		m.must(t, exitOK, "open", "8080/tcp", "--from", "192.0.2.0/24,2001:db8::/32,198.51.100.0/24", "--limit", "5/hour")
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "plan", "--exit-code")
		for _, port := range []uint16{8443, 8080} {
			for _, from := range []lab.Addrs{m.Stranger, m.Client} {
				for _, to := range m.Server.Both() {
					for i := range 6 {
						wait := lab.Patient
						if i == 5 {
							wait = lab.Brief
						}
						// A SYN that is sent again would count again.
						err := m.Outsider.Reach(from.Like(to), to, port, wait)
						if (err == nil) != (i < 5) {
							t.Errorf("connection %d from %v to port %d: %v", i+1, from.Like(to), port, err)
						}
					}
				}
			}
		}
		m.wantOpen(t, map[string]string{"80/tcp": everybody})
		if s := m.status(t, exitOK); s.State != "protected" {
			t.Errorf("state %q", s.State)
		}
		says(t, m.must(t, exitOK, "exposure").Stdout, "limited")
		// Another limit, and none, replace the first.
		m.must(t, exitOK, "open", "8443/tcp", "--limit", "50/second")
		m.wantSetting(t, "open", "api", "8443/tcp limit 50/second")
		m.must(t, exitOK, "open", "8443/tcp")
		m.wantSetting(t, "open", "api", "8443/tcp")
		m.wantOpen(t, map[string]string{"8443/tcp": everybody})
		m.must(t, exitOK, "open", "443/tcp", "--limit", "50/second") // of the profile
		m.wantSetting(t, "open", "https", "443/tcp limit 50/second")
		m.must(t, exitOK, "verify")
		for _, wrong := range []string{"5", "5/fortnight", "0/second", "7000/second", ""} {
			m.refused(t, exitUsage, []string{"open", "8443/tcp", "--limit", wrong}, fmt.Sprintf("--limit: %q", wrong))
		}
	})
}
