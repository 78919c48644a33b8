package lab

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// How long the outsider waits for an answer, which takes well below a
// millisecond here: on a busy machine too where one is to come, and not longer
// than need be where none is.
const (
	Patient = 10 * time.Second
	Brief   = 500 * time.Millisecond
)

// Listen serves TCP ports on all addresses of both families. Whoever connects
// is greeted, and then hears what he says.
func (n *Namespace) Listen(t testing.TB, ports ...uint16) {
	t.Helper()
	for _, port := range ports {
		for _, network := range []string{"tcp4", "tcp6"} {
			var l net.Listener
			err := n.Do(func() (err error) {
				l, err = net.Listen(network, fmt.Sprintf(":%d", port))
				return err
			})
			if err != nil {
				t.Fatalf("listening: %v", err)
			}
			t.Cleanup(func() { l.Close() })
			go serve(l, port)
		}
	}
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

// Dial connects from an address of the namespace, and waits to be greeted.
func (n *Namespace) Dial(from, to netip.Addr, port uint16, wait time.Duration) (*Session, error) {
	d := net.Dialer{
		LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)),
		Timeout:   wait,
		KeepAlive: -1, // probes would speak for a session that is to be silent
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

// Talk says something and waits to hear it.
func (s *Session) Talk() error {
	word := time.Now().String() + "\n"
	if _, err := io.WriteString(s.c, word); err != nil {
		return err
	}
	return s.hear(word, Patient)
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
		return fmt.Errorf("heard %q, not %q", got, want)
	}
	return nil
}

// Close ends the session.
func (s *Session) Close() { s.c.Close() }

// Reach tells whether a connection is answered by the port's listener.
func (n *Namespace) Reach(from, to netip.Addr, port uint16, wait time.Duration) error {
	s, err := n.Dial(from, to, port, wait)
	if err == nil {
		s.Close()
	}
	return err
}

// ListenUDP serves UDP ports on all addresses of both families. Whoever says
// something hears it.
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
	// A port of its own each time: what belongs to an answered exchange passes
	// a firewall by that alone.
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
	// A datagram may get lost, so it is said again meanwhile.
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
