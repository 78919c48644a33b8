package lab

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
)

// Guest adds a container to the server: a namespace behind the bridge docker0, with the
// addresses that Docker would give it, and IPv4 and IPv6 forwarding.
func (l *Lab) Guest(t testing.TB) (guest *Namespace, at Addrs) {
	t.Helper()
	guest = NewNamespace(t)
	at = Addrs{netip.MustParseAddr("172.17.0.2"), netip.MustParseAddr("fd00:d0c::2")}
	peer := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), guest.net.Fd())
	for _, line := range []string{
		"link add docker0 type bridge", "link add veth0 type veth peer name eth0 netns " + peer, "link set veth0 master docker0",
		"addr add 172.17.0.1/16 dev docker0", "addr add fd00:d0c::1/64 dev docker0 nodad", "link set docker0 up", "link set veth0 up",
	} {
		l.Host.MustRun(t, append([]string{"ip"}, strings.Fields(line)...)...)
	}
	for _, line := range []string{"addr add 172.17.0.2/16 dev eth0", "addr add fd00:d0c::2/64 dev eth0 nodad", "link set eth0 up",
		"route add default via 172.17.0.1", "route add default via fd00:d0c::1"} {
		guest.MustRun(t, append([]string{"ip"}, strings.Fields(line)...)...)
	}
	guest.waitUp(t)
	if err := l.Host.Do(func() error {
		for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
			if err := os.WriteFile(path, []byte("1"), 0); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return guest, at
}

// ListenAs is Listen for a port whose clients dial another one.
func (n *Namespace) ListenAs(t testing.TB, port, dialled uint16) {
	t.Helper()
	n.serve(t, "tcp", "", port, dialled)
}
