// Package netsim makes a copy of this host's network with the same interfaces and
// addresses. A peer at the other end of each interface sends real packets. The copy
// detects which of them pass the input hook, regardless of what filters there.
//
// The copy is in the network namespace of the process, which should be a temporary one,
// and the peer in a second one without processes. Both end with the process.
package netsim

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// ImpossibleError reports that this machine does not allow such networks (a container
// without the privilege, a kernel without veth). It says nothing about the rules.
type ImpossibleError struct{ Why error }

func (e *ImpossibleError) Error() string {
	return fmt.Sprintf("cannot copy this machine's network: %v", e.Why)
}

func (e *ImpossibleError) Unwrap() error { return e.Why }

// Copy is a copy of a network. It is for one goroutine at a time.
type Copy struct {
	ports map[string]port
	local map[local]int // sockets for the copy's own packets, by family and interface
	// passed receive each packet of a protocol that passed the input hook, and tap
	// receives each packet that arrived.
	passed []int
	tap    int
	magic  [4]byte // marks the packets of this copy
	sent   int
	done   bool
}

// port is the peer's end of a wire.
type port struct {
	fd  int
	mac net.HardwareAddr // of the copy's end
}

type local struct {
	family firewall.Family
	name   string
}

// readyWait limits the time until the kernel accepts packets to all addresses. It
// usually takes milliseconds.
const readyWait = 10 * time.Second

// New creates a copy with lo and interfaces, with their names and addresses, each also
// with LinkLocal. It returns once packets arrive at all addresses. The error is an
// *ImpossibleError, or ErrInUse.
func New(sys *system.System, families []firewall.Family, interfaces []firewall.Interface) (*Copy, error) {
	c := &Copy{ports: map[string]port{}, local: map[local]int{}, tap: -1}
	if err := c.build(sys, families, interfaces); err != nil {
		c.Close()
		if !errors.Is(err, ErrInUse) {
			err = &ImpossibleError{err}
		}
		return nil, err
	}
	return c, nil
}

func (c *Copy) build(sys *system.System, families []firewall.Family, interfaces []firewall.Interface) error {
	binary.NativeEndian.PutUint32(c.magic[:], rand.Uint32())
	inside, err := host.OpenLinks()
	if err != nil {
		return err
	}
	defer inside.Close()
	if err := free(inside); err != nil {
		return err
	}
	if err := quiet(sys, families); err != nil {
		return err
	}
	if err := inside.Raise("lo"); err != nil {
		return err
	}
	if err := onThread(func() error { return c.wire(sys, inside, families, interfaces) }); err != nil {
		return err
	}
	for i, x := range interfaces {
		if err := address(inside, families, x, i); err != nil {
			return err
		}
	}
	if err := c.listen(families); err != nil {
		return err
	}
	for _, f := range families {
		for _, x := range append([]firewall.Interface{{Name: "lo"}}, interfaces...) {
			fd, err := openLocal(f, x.Name)
			if err != nil {
				return fmt.Errorf("opening a raw socket for %s: %w", x.Name, err)
			}
			c.local[local{f, x.Name}] = fd
		}
	}
	if err := c.awaitWires(); err != nil {
		return err
	}
	return c.awaitAddresses(families, interfaces)
}

// ErrInUse reports that a network namespace is in use.
var ErrInUse = errors.New("this network namespace is in use: nothing was changed")

// Unused returns ErrInUse, with the evidence, if this process's network namespace is in
// use.
func Unused() error {
	links, err := host.OpenLinks()
	if err != nil {
		return err
	}
	defer links.Close()
	return free(links)
}

func free(links *host.Links) error {
	name, err := links.Used()
	if err == nil && name != "" {
		err = fmt.Errorf("%s is up: %w", name, ErrInUse)
	}
	return err
}

// quiet sets kernel parameters so that no packet is dropped before the input hook. A
// new namespace inherits those of IPv4 from the first one (devconf_inherit_init_net).
func quiet(sys *system.System, families []firewall.Family) error {
	for _, f := range families {
		settings := firewall.ByFamily(f, []string{"all/rp_filter=0", "default/rp_filter=0", "all/log_martians=0",
			"default/log_martians=0", "default/accept_local=1", "default/route_localnet=1"},
			[]string{"all/disable_ipv6=0", "default/disable_ipv6=0", "default/accept_dad=0", "default/accept_ra=0"})
		for _, s := range settings {
			key, value, _ := strings.Cut(s, "=")
			if err := sys.WriteKernel(fmt.Sprintf("/proc/sys/net/%v/conf/%s", f, key), value); err != nil {
				return err
			}
		}
	}
	return nil
}

// firstIndex is the index of the copy's first interface, above all of the peer's.
const firstIndex = 1000

// wire creates a namespace for the peer, and the wires that lead there from inside. The
// thread ends with it; the peer's sockets keep the namespace.
func (c *Copy) wire(sys *system.System, inside *host.Links, families []firewall.Family, interfaces []firewall.Interface) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("creating a network namespace: %w", err)
	}
	if slices.Contains(families, firewall.IPv6) { // the peer sends nothing by itself
		if err := sys.WriteKernel("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"); err != nil {
			return err
		}
	}
	outside, err := host.OpenLinks()
	if err != nil {
		return err
	}
	defer outside.Close()
	for i, x := range interfaces {
		far := "to" + strconv.Itoa(i)
		if err := inside.Rename(x.Name, "own"+strconv.Itoa(i)); err != nil { // the kernel's
			return err
		}
		// If both ends of a link have the same index, the kernel reports its carrier to
		// IPv6 with a delay (linkwatch_urgent_event).
		if err := inside.AddWire(x.Name, firstIndex+i, far, unix.Gettid()); err != nil {
			return err
		}
		// Nothing answers ARP. After some seconds the kernel would send an ICMP error for
		// each waiting packet, which filled the sockets' buffers on a slow machine.
		if err := inside.DisableARP(x.Name); err != nil {
			return err
		}
		_, near, err := inside.Identity(x.Name)
		if err != nil {
			return err
		}
		if err := outside.Raise(far); err != nil {
			return fmt.Errorf("the other end of %s: %w", x.Name, err)
		}
		index, _, err := outside.Identity(far)
		if err != nil {
			return fmt.Errorf("the other end of %s: %w", x.Name, err)
		}
		fd, err := openPort(index)
		if err != nil {
			return fmt.Errorf("opening a packet socket for %s: %w", x.Name, err)
		}
		c.ports[x.Name] = port{fd, near}
	}
	return nil
}

// address adds an interface's addresses and a default route.
func address(links *host.Links, families []firewall.Family, x firewall.Interface, i int) error {
	for _, f := range families {
		addresses := x.Addresses
		if f == firewall.IPv6 { // instead of the kernel's
			addresses = append(addresses[:len(addresses):len(addresses)], netip.PrefixFrom(LinkLocal, 64))
		}
		if err := links.AddAddresses(x.Name, f, addresses); err != nil {
			return err
		}
	}
	if err := links.Raise(x.Name); err != nil {
		return err
	}
	for _, f := range families {
		if err := links.AddDefaultRoute(x.Name, f, i+1); err != nil {
			return err
		}
	}
	return nil
}

// awaitWires waits until a frame arrives on each interface, usually at once. Before Linux
// 3.14, which adds PACKET_QDISC_BYPASS, a new interface's queue first drops all frames
// (linkwatch).
func (c *Copy) awaitWires() error {
	const again = 20 * time.Millisecond
	for name, p := range c.ports {
		for end := time.Now().Add(readyWait); ; {
			if err := c.mark(p); err != nil {
				return fmt.Errorf("sending to %s: %w", name, err)
			}
			err := c.readTap(c.sent-1, again, func(int) {})
			if err == nil {
				break
			}
			if !errors.Is(err, errLate) || time.Now().After(end) {
				return fmt.Errorf("interface %s: %w", name, err)
			}
		}
	}
	return nil
}

// awaitAddresses waits until a packet to each address passes: the kernel sets up a new
// interface asynchronously, and does not report the end.
func (c *Copy) awaitAddresses(families []firewall.Family, interfaces []firewall.Interface) error {
	var waiting []firewall.Packet
	for _, f := range families {
		for _, x := range interfaces {
			for _, a := range x.Addresses {
				if firewall.FamilyOf(a) == f {
					waiting = append(waiting, hello(x.Name, a.Addr()))
				}
			}
			if f == firewall.IPv6 {
				waiting = append(waiting, hello(x.Name, LinkLocal), hello(x.Name, netip.MustParseAddr("ff02::1")))
			}
		}
	}
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(readyWait); ; <-tick.C {
		fates, err := c.Send(waiting)
		if err != nil {
			return err
		}
		var left []firewall.Packet
		for i, fate := range fates {
			if fate != Passed {
				left = append(left, waiting[i])
			}
		}
		if waiting = left; len(waiting) == 0 {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("after %v the kernel accepts no packets to %v on %s", readyWait, waiting[0].Dst, waiting[0].In)
		}
	}
}

// hello returns a packet from a neighbour to an address.
func hello(in string, to netip.Addr) firewall.Packet {
	from := netip.MustParseAddr("192.0.2.99")
	if to.Is6() {
		from = netip.MustParseAddr("fe80::99")
	}
	return firewall.Packet{In: in, Src: from, Dst: to, Proto: firewall.UDP, DstPort: 9, State: firewall.TrackedNew, HopLimit: 64}
}

// Close closes the copy's sockets.
func (c *Copy) Close() {
	if c.done {
		return
	}
	c.done = true
	for _, p := range c.ports {
		unix.Close(p.fd)
	}
	for _, fd := range slices.AppendSeq(append(c.passed, c.tap), maps.Values(c.local)) {
		unix.Close(fd)
	}
}

// onThread runs f on a thread that ends with it, because its goroutine ends locked. It
// is not the first thread, whose network /proc shows to all, and which cannot end.
func onThread(f func() error) error {
	done := make(chan error)
	free := make(chan struct{})
	defer close(free)
	var run func()
	run = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			go run()
			<-free // until then no other goroutine runs on this thread
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}
	go run()
	return <-done
}
