package vm

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// probeEvery is the time between two probes, which take turns over the targets.
const probeEvery = 2 * time.Millisecond

// Answer is a TCP packet that came back from a port.
type Answer struct {
	At    time.Time
	From  netip.AddrPort
	Reset bool // a refusal; otherwise the port is open
}

// String describes the answer.
func (a Answer) String() string {
	return fmt.Sprintf("%s %s %s", a.At.Format("15:04:05.000"), a.From,
		map[bool]string{true: "refused", false: "accepted"}[a.Reset])
}

// Prober sends the first packet of a TCP connection again and again, whether the machine
// runs or not, and records the answers. It uses raw sockets without timeouts: it never
// waits, and late answers count.
type Prober struct {
	mu      sync.Mutex
	answers []Answer
}

// Probe probes the ports of the machine from the stranger's addresses, in
// both families, until the test ends.
func Probe(t testing.TB, w *Wire, ports ...uint16) *Prober {
	t.Helper()
	p := &Prober{}
	stop := make(chan struct{})
	var running sync.WaitGroup
	var conns []net.PacketConn
	for i, network := range []string{"ip4:tcp", "ip6:tcp"} {
		from, to := w.Stranger.Both()[i], w.Machine.Both()[i]
		var c net.PacketConn
		err := w.Outsider.Do(func() (err error) {
			c, err = net.ListenPacket(network, from.String())
			return err
		})
		if err != nil {
			t.Fatalf("opening a raw socket: %v", err)
		}
		conns = append(conns, c)
		running.Add(2)
		go func() {
			defer running.Done()
			p.send(c, from, to, ports, stop)
		}()
		go func() {
			defer running.Done()
			p.receive(c, to, ports)
		}()
	}
	t.Cleanup(func() {
		close(stop)
		for _, c := range conns {
			c.Close()
		}
		running.Wait()
	})
	return p
}

func (p *Prober) send(c net.PacketConn, from, to netip.Addr, ports []uint16, stop chan struct{}) {
	tick := time.NewTicker(probeEvery * 2) // each family has a sender
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		// An error means that the network is down at the moment.
		c.WriteTo(syn(from, to, uint16(20000+i%40000), ports[i%len(ports)]), &net.IPAddr{IP: to.AsSlice()})
	}
}

func (p *Prober) receive(c net.PacketConn, to netip.Addr, ports []uint16) {
	probed := map[uint16]bool{}
	for _, port := range ports {
		probed[port] = true
	}
	buf := make([]byte, 1500)
	for {
		n, _, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		port := binary.BigEndian.Uint16(buf)
		dest := binary.BigEndian.Uint16(buf[2:])
		if n < 20 || !probed[port] || dest < 20000 || dest >= 60000 {
			continue
		}
		const rst = 1 << 2
		p.mu.Lock()
		p.answers = append(p.answers, Answer{time.Now(), netip.AddrPortFrom(to, port), buf[13]&rst != 0})
		p.mu.Unlock()
	}
}

// Answers returns the answers of ports since then.
func (p *Prober) Answers(since time.Time, ports ...uint16) []Answer {
	p.mu.Lock()
	defer p.mu.Unlock()
	var found []Answer
	for _, a := range p.answers {
		for _, port := range ports {
			if a.From.Port() == port && !a.At.Before(since) {
				found = append(found, a)
			}
		}
	}
	return found
}

// syn returns the first packet of a TCP connection (RFC 9293, 3.1).
func syn(from, to netip.Addr, source, dest uint16) []byte {
	seg := make([]byte, 20)
	binary.BigEndian.PutUint16(seg, source)
	binary.BigEndian.PutUint16(seg[2:], dest)
	binary.BigEndian.PutUint32(seg[4:], uint32(source)<<16)
	seg[12] = 5 << 4 // length of the header in words
	seg[13] = 1 << 1 // SYN
	binary.BigEndian.PutUint16(seg[14:], 1024)
	sum := uint32(len(seg) + 6) // the pseudo header's length and protocol
	for _, part := range [][]byte{from.AsSlice(), to.AsSlice(), seg} {
		for i := 0; i < len(part); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(part[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(seg[16:], ^uint16(sum))
	return seg
}
