package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"testing"
	"time"
)

// The time that the outsider waits for an answer, which takes well below a millisecond
// here: long if one is expected, as the machine may be busy, short if none is.
const (
	Patient = 10 * time.Second
	Brief   = 500 * time.Millisecond
)

// Listen serves TCP ports on all addresses of both families. Each client gets a greeting,
// and then an echo of what it sends.
func (n *Namespace) Listen(t testing.TB, ports ...uint16) {
	t.Helper()
	for _, port := range ports {
		for _, network := range []string{"tcp4", "tcp6"} {
			n.listen(t, network, "", port)
		}
	}
}

// ListenOn is Listen for one port of one address.
func (n *Namespace) ListenOn(t testing.TB, address netip.Addr, port uint16) {
	t.Helper()
	n.listen(t, "tcp", address.String(), port)
}

func (n *Namespace) listen(t testing.TB, network, address string, port uint16) {
	t.Helper()
	n.serve(t, network, address, port, port)
}

// serve greets the clients of a port with the port that they dial.
func (n *Namespace) serve(t testing.TB, network, address string, port, dialled uint16) {
	t.Helper()
	var l net.Listener
	err := n.Do(func() (err error) {
		l, err = net.Listen(network, net.JoinHostPort(address, strconv.Itoa(int(port))))
		return err
	})
	if err != nil {
		t.Fatalf("listening: %v", err)
	}
	t.Cleanup(func() { l.Close() })
	go serve(l, dialled)
}

func serve(l net.Listener, port uint16) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			fmt.Fprint(c, greeting(port))
			io.Copy(c, c)
		}()
	}
}

func greeting(port uint16) string { return fmt.Sprintf("port %d\n", port) }

// Session is an open TCP connection to one of Listen's ports.
type Session struct {
	c net.Conn
	r *bufio.Reader
}

// Dial connects from an address of the namespace, and waits for the greeting.
func (n *Namespace) Dial(from, to netip.Addr, port uint16, wait time.Duration) (*Session, error) {
	d := net.Dialer{
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)),
		Timeout:   wait,
		KeepAlive: -1, // probes would be traffic of a silent session
	}
	s := &Session{}
	err := n.Do(func() (err error) {
		s.c, err = d.Dial("tcp", netip.AddrPortFrom(to, port).String())
		return err
	})
	if err != nil {
		return nil, err
	}
	s.r = bufio.NewReader(s.c)
	if err := s.hear(greeting(port), wait); err != nil {
		s.c.Close()
		return nil, fmt.Errorf("port %d: %w", port, err)
	}
	return s, nil
}

// errOther reports that another port than the dialled one answers.
var errOther = errors.New("redirected")

// Talk sends a line and waits for its echo.
func (s *Session) Talk() error { return s.Say(time.Now().String()) }

// Say is Talk with a given line.
func (s *Session) Say(line string) error { return s.SayWithin(line, Patient) }

// SayWithin is Say, and waits no longer for the echo.
func (s *Session) SayWithin(line string, wait time.Duration) error {
	word := line + "\n"
	if _, err := io.WriteString(s.c, word); err != nil {
		return err
	}
	return s.hear(word, wait)
}

func (s *Session) hear(want string, wait time.Duration) error {
	if err := s.c.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	got, err := s.r.ReadString('\n')
	if err != nil {
		return err
	}
	if got != want {
		return fmt.Errorf("%w: heard %q, not %q", errOther, got, want)
	}
	return nil
}

// Close ends the session.
func (s *Session) Close() { s.c.Close() }

// Reach returns nil if the port's listener answers a connection.
func (n *Namespace) Reach(from, to netip.Addr, port uint16, wait time.Duration) error {
	s, err := n.Dial(from, to, port, wait)
	if err == nil {
		s.Close()
	}
	if errors.Is(err, errOther) {
		err = nil
	}
	return err
}

// ListenUDP serves UDP ports on all addresses of both families, and echoes each datagram.
func (n *Namespace) ListenUDP(t testing.TB, ports ...uint16) {
	t.Helper()
	for _, port := range ports {
		for _, network := range []string{"udp4", "udp6"} {
			var c net.PacketConn
			err := n.Do(func() (err error) {
				c, err = net.ListenPacket(network, fmt.Sprintf(":%d", port))
				return err
			})
			if err != nil {
				t.Fatalf("listening: %v", err)
			}
			t.Cleanup(func() { c.Close() })
			go echo(c)
		}
	}
}

func echo(c net.PacketConn) {
	buf := make([]byte, 1500)
	for {
		n, from, err := c.ReadFrom(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err == nil {
			c.WriteTo(buf[:n], from)
		}
	}
}

// ReachUDP is Reach for one of ListenUDP's ports.
func (n *Namespace) ReachUDP(from, to netip.Addr, port uint16, wait time.Duration) error {
	// A new source port each time: a datagram of an answered exchange would pass a firewall
	// as established.
	d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(from, 0))}
	var c net.Conn
	err := n.Do(func() (err error) {
		c, err = d.Dial("udp", netip.AddrPortFrom(to, port).String())
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	// A datagram may get lost, so it is sent again.
	const again = 200 * time.Millisecond
	word := time.Now().String()
	buf := make([]byte, 1500)
	for end := time.Now().Add(wait); ; {
		if _, err = io.WriteString(c, word); err != nil {
			return err
		}
		if err = c.SetReadDeadline(time.Now().Add(min(again, time.Until(end)))); err != nil {
			return err
		}
		var size int
		if size, err = c.Read(buf); err == nil {
			if got := string(buf[:size]); got != word {
				return fmt.Errorf("port %d: heard %q, not %q", port, got, word)
			}
			return nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(end) {
			return fmt.Errorf("port %d: %w", port, err)
		}
	}
}
