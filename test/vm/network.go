package vm

import (
	"bufio"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// Wire is a network of a machine and an outsider. The outsider has several addresses: the
// allowed client on the machine's own network, a stranger behind its default route, and the
// router. All are from the documentation ranges (RFC 5737, RFC 3849).
type Wire struct {
	Outsider                  *lab.Namespace
	Machine, Client, Stranger lab.Addrs
	Router                    lab.Addrs
	Device, MAC               string
}

// NewWire makes a network that lasts as long as the test.
func NewWire(t testing.TB) *Wire {
	t.Helper()
	w := &Wire{
		Outsider: lab.NewNamespace(t),
		Machine:  lab.Addrs{V4: netip.MustParseAddr("192.0.2.1"), V6: netip.MustParseAddr("2001:db8:0:1::1")},
		Client:   lab.Addrs{V4: netip.MustParseAddr("192.0.2.10"), V6: netip.MustParseAddr("2001:db8:0:1::10")},
		Stranger: lab.Addrs{V4: netip.MustParseAddr("198.51.100.20"), V6: netip.MustParseAddr("2001:db8:0:2::20")},
		Router:   lab.Addrs{V4: netip.MustParseAddr("192.0.2.254"), V6: netip.MustParseAddr("2001:db8:0:1::fe")},
		Device:   "tap0",
		MAC:      "02:00:00:00:02:01",
	}
	lines := []string{
		"tuntap add dev " + w.Device + " mode tap",
		fmt.Sprintf("addr add %s/24 dev %s", w.Router.V4, w.Device),
		fmt.Sprintf("addr add %s/64 dev %s nodad", w.Router.V6, w.Device),
		fmt.Sprintf("addr add %s/24 dev %s", w.Client.V4, w.Device),
		fmt.Sprintf("addr add %s/64 dev %s nodad", w.Client.V6, w.Device),
		fmt.Sprintf("addr add %s/32 dev %s", w.Stranger.V4, w.Device),
		fmt.Sprintf("addr add %s/128 dev %s nodad", w.Stranger.V6, w.Device),
		"link set " + w.Device + " up",
	}
	r := w.Outsider.Run(t, lab.Command{Args: []string{"ip", "-batch", "-"}, Stdin: strings.Join(lines, "\n") + "\n"})
	if r.Code != 0 {
		t.Fatalf("setting up the wire: %s", r.Stderr)
	}
	w.Know(t)
	return w
}

// Know adds the machine's hardware address to the outsider's neighbour table. Resolving it
// takes a second between tries, in which a probe would miss what happens during a boot.
func (w *Wire) Know(t testing.TB) {
	t.Helper()
	for _, a := range w.Machine.Both() {
		w.Outsider.MustRun(t, "ip", "neigh", "replace", a.String(), "lladdr", w.MAC, "nud", "permanent", "dev", w.Device)
	}
}

// Forget makes the outsider resolve the machine's hardware address again.
func (w *Wire) Forget(t testing.TB) {
	t.Helper()
	for _, a := range w.Machine.Both() {
		w.Outsider.MustRun(t, "ip", "neigh", "del", a.String(), "dev", w.Device)
	}
}

// Download is a file server on the wire.
type Download struct {
	URL  string
	file atomic.Pointer[string]
}

// Serve starts a server that offers no file yet.
func (w *Wire) Serve(t testing.TB) *Download {
	t.Helper()
	d := &Download{URL: fmt.Sprintf("http://%s/basicfw-agent.rpm", w.Router.V4)}
	w.serve(t, w.Router.V4, func(rw http.ResponseWriter, r *http.Request) {
		if file := d.file.Load(); file != nil {
			http.ServeFile(rw, r, *file)
		} else {
			http.Error(rw, "nothing here yet", http.StatusServiceUnavailable)
		}
	})
	return d
}

// serve starts a web server at an address of the outsider until the test ends.
func (w *Wire) serve(t testing.TB, at netip.Addr, handle http.HandlerFunc) {
	t.Helper()
	var l net.Listener
	err := w.Outsider.Do(func() (err error) {
		l, err = net.Listen("tcp", netip.AddrPortFrom(at, 80).String())
		return err
	})
	if err != nil {
		t.Fatalf("serving at %v: %v", at, err)
	}
	t.Cleanup(func() { l.Close() })
	go http.Serve(l, handle)
}

// Offer sets the file that the URL returns from now on.
func (d *Download) Offer(file string) { d.file.Store(&file) }

// Session is an open connection to a port of the machine.
type Session struct {
	net.Conn
	r *bufio.Reader
}

// Dial connects to a port of the machine from an address of the wire, and waits for the
// first line, which has to begin with want.
func (w *Wire) Dial(from, to netip.Addr, port uint16, want string, limit time.Duration) (*Session, error) {
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: limit}
	s := &Session{}
	err := w.Outsider.Do(func() (err error) {
		s.Conn, err = d.Dial("tcp", netip.AddrPortFrom(to, port).String())
		return err
	})
	if err != nil {
		return nil, err
	}
	s.r = bufio.NewReader(s)
	if err := s.hear(want, limit); err != nil {
		s.Close()
		return nil, fmt.Errorf("reading the greeting of port %d: %w", port, err)
	}
	return s, nil
}

// Talk sends a line to one of the guest's listeners, and waits for its echo.
func (s *Session) Talk(limit time.Duration) error {
	word := time.Now().String() + "\n"
	if _, err := s.Write([]byte(word)); err != nil {
		return err
	}
	return s.hear(word, limit)
}

func (s *Session) hear(want string, limit time.Duration) error {
	if err := s.SetReadDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	line, err := s.r.ReadString('\n')
	if err == nil && !strings.HasPrefix(line, want) {
		err = fmt.Errorf("heard %q, not %q", line, want)
	}
	return err
}
