package twin

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

// Fate is what became of a packet.
type Fate int

// What can become of a packet.
const (
	Lost    Fate = iota // it did not even arrive, which is the fault of no rule
	Dropped             // it arrived, and did not pass INPUT
	Passed
)

// watched are the protocols that are listened for: those that rules know, and one
// that none does.
var watched = map[firewall.Family][]firewall.Proto{
	firewall.IPv4: {firewall.TCP, firewall.UDP, firewall.ICMP, OtherProto},
	firewall.IPv6: {firewall.TCP, firewall.UDP, firewall.ICMPv6, OtherProto},
}

// OtherProto is a protocol that no rule and no kernel knows ("any private
// encryption scheme").
const OtherProto firewall.Proto = "99"

const (
	// batch is how many packets are sent before it is looked what became of
	// them. They have to fit a socket's buffer of the size that the kernel gives,
	// which is 200 KiB, with what the twin answers, at a KiB for each.
	batch = 40
	// arrival is how long a packet may take. It is microseconds.
	arrival = 10 * time.Second

	etherHeader = 14
	// etherMark is the type of a frame that is for experiments (IEEE 802, 9.2.4):
	// no IP, so nothing filters it.
	etherMark = 0x88b5
	tagSize   = 8
)

// listen opens what tells which packets arrive, and which pass.
func (t *Twin) listen(families []firewall.Family) (err error) {
	// A raw socket gets what is delivered to this host, which is behind INPUT
	// (raw(7); net/ipv4/ip_input.c, net/ipv6/ip6_input.c).
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
			t.passed = append(t.passed, fd)
		}
	}
	t.tap, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(bigEndian(unix.ETH_P_ALL)))
	if err != nil {
		return fmt.Errorf("opening a packet socket: %w", err)
	}
	// Before Linux 4.20 those that go out are there as well, to be passed over.
	unix.SetsockoptInt(t.tap, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1)
	unix.SetsockoptInt(t.tap, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 1<<20)
	return nil
}

func domain(f firewall.Family) int {
	if f == firewall.IPv4 {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// bigEndian is htons of a small number.
func bigEndian(n uint16) uint16 {
	var b [2]byte
	binary.BigEndian.PutUint16(b[:], n)
	return binary.NativeEndian.Uint16(b[:])
}

// openPort opens the outsider's end of a wire.
func openPort(index int) (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	// Where it can be, past the queue: see awaitWires.
	unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_QDISC_BYPASS, 1)
	if err := unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: index}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// openLocal opens what sends whole packets out of an interface. What goes to lo
// goes there by its address.
func openLocal(f firewall.Family, name string) (int, error) {
	fd, err := unix.Socket(domain(f), unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return -1, err
	}
	if name != "lo" {
		err = unix.BindToDevice(fd, name)
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// Send sends packets, in their order, and tells what became of each. Where one
// is a part of something, that happens first: the twin begins what it is to be
// a reply to, or related to. On a machine that is too busy for any to arrive it is
// an error.
func (t *Twin) Send(packets []firewall.Packet) ([]Fate, error) {
	fates := make([]Fate, len(packets))
	for i := 0; i < len(packets); i += batch {
		end := min(i+batch, len(packets))
		if err := t.sendBatch(packets[i:end], fates[i:end]); err != nil {
			return nil, err
		}
	}
	return fates, nil
}

func (t *Twin) sendBatch(packets []firewall.Packet, fates []Fate) error {
	first := t.sent
	var via port
	for _, via = range t.ports {
		break
	}
	err := onOneCPU(func() error {
		for _, p := range packets {
			if err := t.send(p); err != nil {
				return fmt.Errorf("sending a packet of %s from %v to %v on %s: %w", p.Proto, p.Src, p.Dst, p.In, err)
			}
		}
		return t.mark(via)
	})
	if err != nil {
		return err
	}
	err = t.readTap(t.sent-1, arrival, func(n int) {
		if n -= first; n >= 0 && n < len(fates) {
			fates[n] = Dropped
		}
	})
	if err != nil {
		return err
	}
	for _, fd := range t.passed {
		if err := t.readAll(fd, func(data []byte, _ unix.Sockaddr) {
			if n, ok := t.tagged(data); ok && n >= first && n-first < len(fates) {
				fates[n-first] = Passed
			}
		}); err != nil {
			return fmt.Errorf("reading what passed: %w", err)
		}
	}
	return nil
}

// onOneCPU runs f on one processor. The kernel takes in frames in their order
// on each, so that once the last has arrived, all have been decided about.
func onOneCPU(f func() error) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return fmt.Errorf("asking for the processors: %w", err)
	}
	var one unix.CPUSet
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("choosing a processor: %w", err)
	}
	defer unix.SchedSetaffinity(0, &all)
	return f()
}

func (t *Twin) tag(n int) []byte {
	return binary.BigEndian.AppendUint32(t.magic[:len(t.magic):len(t.magic)], uint32(n))
}

// tagged gives the number of one of our packets.
func (t *Twin) tagged(data []byte) (int, bool) {
	if len(data) < tagSize {
		return 0, false
	}
	tag := data[len(data)-tagSize:]
	return int(binary.BigEndian.Uint32(tag[4:])), bytes.Equal(tag[:4], t.magic[:])
}

func (t *Twin) send(p firewall.Packet) error {
	n := t.sent
	t.sent++
	w, err := encode(p, n, t.tag(n))
	if err != nil {
		return err
	}
	if w.before != nil {
		if err := t.sendLocal(p.In, p.Src, w.before); err != nil {
			return fmt.Errorf("beginning it: %w", err)
		}
	}
	if p.In == "lo" {
		return t.sendLocal("lo", p.Dst, w.packet)
	}
	port, ok := t.ports[p.In]
	if !ok {
		return fmt.Errorf("the twin has no such interface")
	}
	kind := uint16(unix.ETH_P_IP)
	if p.Src.Is6() {
		kind = unix.ETH_P_IPV6
	}
	return port.send(hardware(p, port.mac), kind, w.packet)
}

// send sends an Ethernet frame, from an address that is nobody's.
func (p port) send(to []byte, kind uint16, payload []byte) error {
	frame := make([]byte, 0, etherHeader+len(payload))
	frame = append(frame, to...)
	frame = append(frame, 0x02, 0, 0, 0, 0, 1)
	frame = binary.BigEndian.AppendUint16(frame, kind)
	_, err := unix.Write(p.fd, append(frame, payload...))
	return err
}

func (t *Twin) sendLocal(name string, to netip.Addr, packet []byte) error {
	if to.Is4() {
		return unix.Sendto(t.local[local{firewall.IPv4, name}], packet, 0, &unix.SockaddrInet4{Addr: to.As4()})
	}
	return unix.Sendto(t.local[local{firewall.IPv6, name}], packet, 0, &unix.SockaddrInet6{Addr: to.As16()})
}

// mark sends a frame that the tap will see as the last.
func (t *Twin) mark(p port) error {
	n := t.sent
	t.sent++
	return p.send(p.mac, etherMark, t.tag(n))
}

// errLate says that what was sent did not arrive in time.
var errLate = errors.New("what was sent does not arrive")

// readTap tells the numbers of the packets that arrived, until a mark or a later
// one, for which it waits so long.
func (t *Twin) readTap(mark int, wait time.Duration, arrived func(n int)) error {
	for end := time.Now().Add(wait); ; {
		over := false
		if err := t.readAll(t.tap, func(data []byte, from unix.Sockaddr) {
			if ll, ok := from.(*unix.SockaddrLinklayer); ok && ll.Pkttype == unix.PACKET_OUTGOING {
				return
			}
			if n, ok := t.tagged(data); ok {
				arrived(n)
				over = over || n >= mark
			}
		}); err != nil {
			return fmt.Errorf("reading what arrived: %w", err)
		}
		if over {
			return nil
		}
		left := time.Until(end)
		if left <= 0 {
			return fmt.Errorf("%w within %v", errLate, wait)
		}
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(t.tap), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("waiting for what was sent: %w", err)
		}
	}
}

// readAll reads all that is there.
func (t *Twin) readAll(fd int, each func(data []byte, from unix.Sockaddr)) error {
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
