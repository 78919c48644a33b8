package netsim

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Fate is the result for a packet.
type Fate int

// The results for a packet.
const (
	Lost    Fate = iota // it did not arrive, for a reason other than the rules
	Dropped             // it arrived, but did not pass the input hook
	Passed
)

// watched are the protocols to receive: those with rules, and one without.
var watched = map[firewall.Family][]firewall.Proto{
	firewall.IPv4: append([]firewall.Proto{firewall.TCP, firewall.UDP, firewall.ICMP, firewall.IGMP}, Others...),
	firewall.IPv6: append([]firewall.Proto{firewall.TCP, firewall.UDP, firewall.ICMPv6}, Others...),
}

// Others are the other protocols that packets can have.
var Others = []firewall.Proto{firewall.SCTP, "47", "50", "89", "112", OtherProto}

// OtherProto is a protocol for which neither rules nor kernels have support ("any
// private encryption scheme").
const OtherProto firewall.Proto = "99"

const (
	// batch is how many packets are sent before their results are read. With the
	// answers, at a KiB each, they must fit in a socket's 200 KiB.
	batch = 40
	// arrival limits the time for a packet, which usually takes microseconds.
	arrival = 10 * time.Second

	etherHeader = 14
	// etherMark is an experimental frame type (IEEE 802, 9.2.4): not IP, so never
	// filtered.
	etherMark = 0x88b5
	tagSize   = 8
)

// listen opens the sockets that receive the packets that arrive and that pass.
func (c *Copy) listen(families []firewall.Family) (err error) {
	// A raw socket receives packets delivered to this host, after the input hook (raw(7);
	// net/ipv4/ip_input.c, net/ipv6/ip6_input.c).
	for _, f := range families {
		for _, proto := range watched[f] {
			n, err := number(proto)
			if err != nil {
				return err
			}
			fd, err := unix.Socket(domain(f), unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(n))
			if err != nil {
				return fmt.Errorf("opening a raw socket: %w", err)
			}
			c.passed = append(c.passed, fd)
		}
	}
	c.tap, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(bigEndian(unix.ETH_P_ALL)))
	if err != nil {
		return fmt.Errorf("opening a packet socket: %w", err)
	}
	// Before Linux 4.20 the socket also receives outgoing packets, which are skipped.
	unix.SetsockoptInt(c.tap, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	unix.SetsockoptInt(c.tap, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<20)
	return nil
}

func domain(f firewall.Family) int { return firewall.ByFamily(f, unix.AF_INET, unix.AF_INET6) }

// bigEndian returns a number in network byte order (htons).
func bigEndian(n uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], n)
	return binary.NativeEndian.Uint16(b[:])
}

// openPort opens the peer's end of a wire.
func openPort(index int) (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	// Bypasses the queue if supported: see awaitWires.
	unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1)
	return orClose(fd, unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: index}))
}

// openLocal opens a socket that sends complete packets on an interface. Packets on lo
// need only their address.
func openLocal(f firewall.Family, name string) (int, error) {
	fd, err := unix.Socket(domain(f), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return -1, err
	}
	if name != "lo" {
		err = unix.BindToDevice(fd, name)
	}
	return orClose(fd, err)
}

// orClose returns fd, or closes it if err is set.
func orClose(fd int, err error) (int, error) {
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Send sends packets in order and returns the result for each. The copy first opens the
// connections that replies and related packets belong to. It is an error if a batch does
// not arrive.
func (c *Copy) Send(packets []firewall.Packet) ([]Fate, error) {
	fates := make([]Fate, len(packets))
	for i := 0; i < len(packets); i += batch {
		end := min(i+batch, len(packets))
		if err := c.sendBatch(packets[i:end], fates[i:end]); err != nil {
			return nil, err
		}
	}
	return fates, nil
}

func (c *Copy) sendBatch(packets []firewall.Packet, fates []Fate) error {
	first := c.sent
	var via port
	for _, via = range c.ports {
		break
	}
	err := onOneCPU(func() error {
		for _, p := range packets {
			if err := c.send(p); err != nil {
				return fmt.Errorf("sending a packet of %s from %v to %v on %s: %w", p.Proto, p.Src, p.Dst, p.In, err)
			}
		}
		return c.mark(via)
	})
	if err != nil {
		return err
	}
	err = c.readTap(c.sent-1, arrival, func(n int) {
		if n -= first; n >= 0 && n < len(fates) {
			fates[n] = Dropped
		}
	})
	if err != nil {
		return err
	}
	for _, fd := range c.passed {
		if err := c.readAll(fd, func(data []byte, _ unix.Sockaddr) {
			if n, ok := c.tagged(data); ok && n >= first && n-first < len(fates) {
				fates[n-first] = Passed
			}
		}); err != nil {
			return fmt.Errorf("reading passed packets: %w", err)
		}
	}
	return nil
}

// onOneCPU runs f on one CPU. On each CPU the kernel processes frames in order: when the
// last has arrived, all have been filtered.
func onOneCPU(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return fmt.Errorf("reading the CPU affinity: %w", err)
	}
	var one unix.CPUSet
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("setting the CPU affinity: %w", err)
	}
	defer unix.SchedSetaffinity(0, &all)
	return f()
}

func (c *Copy) tag(n int) []byte {
	return binary.BigEndian.AppendUint32(c.magic[:len(c.magic):len(c.magic)], uint32(n))
}

// tagged returns the number of a packet, if it is one of ours.
func (c *Copy) tagged(data []byte) (int, bool) {
	if len(data) < tagSize {
		return 0, false
	}
	tag := data[len(data)-tagSize:]
	return int(binary.BigEndian.Uint32(tag[4:])), bytes.Equal(tag[:4], c.magic[:])
}

func (c *Copy) send(p firewall.Packet) error {
	n := c.sent
	c.sent++
	w, err := encode(p, n, c.tag(n))
	if err != nil {
		return err
	}
	if w.before != nil {
		if err := c.sendLocal(p.In, p.Src, w.before); err != nil {
			return fmt.Errorf("sending the packet before it: %w", err)
		}
	}
	if p.In == "lo" {
		return c.sendLocal("lo", p.Dst, w.packet)
	}
	port, ok := c.ports[p.In]
	if !ok {
		return errors.New("no such interface in the copy")
	}
	kind := firewall.ByFamily[uint16](p.Family(), unix.ETH_P_IP, unix.ETH_P_IPV6)
	return port.send(hardware(p, port.mac), kind, w.packet)
}

// send sends an Ethernet frame from an unused address.
func (p port) send(to []byte, kind uint16, payload []byte) error {
	frame := make([]byte, 0, etherHeader+len(payload))
	frame = append(frame, to...)
	frame = append(frame, 0x02, 0, 0, 0, 0, 1)
	frame = binary.BigEndian.AppendUint16(frame, kind)
	_, err := unix.Write(p.fd, append(frame, payload...))
	return err
}

func (c *Copy) sendLocal(name string, to netip.Addr, packet []byte) error {
	if to.Is4() {
		return unix.Sendto(c.local[local{firewall.IPv4, name}], packet, 0, &unix.SockaddrInet4{Addr: to.As4()})
	}
	return unix.Sendto(c.local[local{firewall.IPv6, name}], packet, 0, &unix.SockaddrInet6{Addr: to.As16()})
}

// mark sends a frame that the tap receives last.
func (c *Copy) mark(p port) error {
	n := c.sent
	c.sent++
	return p.send(p.mac, etherMark, c.tag(n))
}

// errLate reports that a packet did not arrive in time.
var errLate = errors.New("packets did not arrive")

// readTap calls arrived with the numbers of packets, until that of a mark or a later one.
// It waits for at most wait.
func (c *Copy) readTap(mark int, wait time.Duration, arrived func(n int)) error {
	for end := time.Now().Add(wait); ; {
		over := false
		if err := c.readAll(c.tap, func(data []byte, from unix.Sockaddr) {
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
				return
			}
			if n, ok := c.tagged(data); ok {
				arrived(n)
				over = over || n >= mark
			}
		}); err != nil {
			return fmt.Errorf("reading arrived packets: %w", err)
		}
		if over {
			return nil
		}
		left := time.Until(end)
		if left <= 0 {
			return fmt.Errorf("%w within %v", errLate, wait)
		}
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(c.tap), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("waiting for packets: %w", err)
		}
	}
}

// readAll reads all available packets.
func (c *Copy) readAll(fd int, each func(data []byte, from unix.Sockaddr)) error {
	buf := make([]byte, 4096)
	for {
		n, from, err := unix.Recvfrom(fd, buf, 0)
		switch err {
		case nil:
			each(buf[:n], from)
		case unix.EINTR:
		case unix.EAGAIN:
			return nil
		default:
			return err
		}
	}
}
