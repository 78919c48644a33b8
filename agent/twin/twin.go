// Package twin is a copy of this host's network in a namespace of its own: the
// same interfaces and addresses, with an outsider at the other end of each, who
// sends real packets. It sees which of them pass INPUT, whatever it is that
// filters there.
//
// All of it is in the network namespace that the process is in, which should
// be a throwaway one, and in one more that no process is in. Everything is gone
// when the process has ended.
package twin

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hostnet"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Interface is one that the twin has besides lo.
type Interface struct {
	Name      string
	Addresses []netip.Prefix
}

// ImpossibleError says that a machine lets nobody make such networks: a
// container without the right to, a kernel without veth. It says nothing about
// any rules.
type ImpossibleError struct{ Why error }

func (e *ImpossibleError) Error() string {
	return fmt.Sprintf("no copy of this machine's network can be made here: %v", e.Why)
}

func (e *ImpossibleError) Unwrap() error { return e.Why }

// Twin is a copy of a network. It is for one goroutine at a time.
type Twin struct {
	ports map[string]port
	// local sends what the twin itself says: by family and interface.
	local map[local]int
	// passed get a copy of each packet of a protocol that passed INPUT, and tap
	// one of each that arrived.
	passed []int
	tap    int
	magic  [4]byte // marks the packets of this twin
	sent   int
	done   bool
}

// port is the outsider's end of a wire.
type port struct {
	fd  int
	mac net.HardwareAddr // of the twin's end
}

type local struct {
	family firewall.Family
	name   string
}

// readyWait is how long the kernel may take until it takes in packets to all
// addresses. It is milliseconds.
const readyWait = 10 * time.Second

// New makes the twin, with addresses of fe80::/64 besides those that are said.
// It comes back once packets arrive at all of them. The error is an
// *ImpossibleError, or ErrSomebodys.
func New(sys *system.System, families []firewall.Family, interfaces []Interface) (*Twin, error) {
	t := &Twin{ports: map[string]port{}, local: map[local]int{}, tap: -1}
	if err := t.build(sys, families, interfaces); err != nil {
		t.Close()
		if !errors.Is(err, ErrSomebodys) {
			err = &ImpossibleError{err}
		}
		return nil, err
	}
	return t, nil
}

func (t *Twin) build(sys *system.System, families []firewall.Family, interfaces []Interface) error {
	if _, err := rand.Read(t.magic[:]); err != nil {
		return err
	}
	inside, err := hostnet.OpenLinks()
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
	if err := onThread(func() error { return t.wire(sys, inside, families, interfaces) }); err != nil {
		return err
	}
	for i, x := range interfaces {
		if err := address(inside, families, x, i); err != nil {
			return err
		}
	}
	if err := t.listen(families); err != nil {
		return err
	}
	for _, f := range families {
		for _, name := range append([]string{"lo"}, names(interfaces)...) {
			fd, err := openLocal(f, name)
			if err != nil {
				return fmt.Errorf("opening a raw socket for %s: %w", name, err)
			}
			t.local[local{f, name}] = fd
		}
	}
	if err := t.awaitWires(); err != nil {
		return err
	}
	return t.awaitAddresses(families, interfaces)
}

// ErrSomebodys says that a network namespace is one that somebody uses.
var ErrSomebodys = errors.New("this network namespace is somebody's: nothing was changed")

// Unused is ErrSomebodys, with what says so, where the network namespace of this
// process is used.
func Unused() error {
	links, err := hostnet.OpenLinks()
	if err != nil {
		return err
	}
	defer links.Close()
	return free(links)
}

func free(links *hostnet.Links) error {
	name, err := links.Used()
	if err == nil && name != "" {
		err = fmt.Errorf("%s is up: %w", name, ErrSomebodys)
	}
	return err
}

func names(interfaces []Interface) []string {
	var list []string
	for _, x := range interfaces {
		list = append(list, x.Name)
	}
	return list
}

// quiet has the kernel leave to INPUT what it would decide before: a new
// namespace has the settings of the first one for IPv4 (devconf_inherit_init_net),
// and might drop spoofed packets, or such from elsewhere, by itself.
func quiet(sys *system.System, families []firewall.Family) error {
	for _, f := range families {
		settings := []struct{ key, value string }{
			{"ipv4/conf/all/rp_filter", "0"}, {"ipv4/conf/default/rp_filter", "0"},
			{"ipv4/conf/all/log_martians", "0"}, {"ipv4/conf/default/log_martians", "0"},
			{"ipv4/conf/default/accept_local", "1"}, {"ipv4/conf/default/route_localnet", "1"},
		}
		if f == firewall.IPv6 {
			settings = []struct{ key, value string }{
				{"ipv6/conf/all/disable_ipv6", "0"}, {"ipv6/conf/default/disable_ipv6", "0"},
				{"ipv6/conf/default/accept_dad", "0"}, {"ipv6/conf/default/accept_ra", "0"},
			}
		}
		for _, s := range settings {
			if err := sys.WriteKernel("/proc/sys/net/"+s.key, s.value); err != nil {
				return err
			}
		}
	}
	return nil
}

// firstIndex is the number of the twin's first interface, which no outsider's
// reaches.
const firstIndex = 1000

// wire makes a namespace for the outsider, and the wires that lead there. inside
// is of the twin's. The thread ends with it, and the namespace is kept by the
// outsider's sockets.
func (t *Twin) wire(sys *system.System, inside *hostnet.Links, families []firewall.Family, interfaces []Interface) error {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("making a network namespace: %w", err)
	}
	for _, f := range families {
		if f == firewall.IPv6 { // the outsider says nothing by itself
			if err := sys.WriteKernel("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"); err != nil {
				return err
			}
		}
	}
	outside, err := hostnet.OpenLinks()
	if err != nil {
		return err
	}
	defer outside.Close()
	for i, x := range interfaces {
		far := "to" + strconv.Itoa(i)
		if err := inside.Rename(x.Name, "own"+strconv.Itoa(i)); err != nil { // the kernel's
			return err
		}
		// The kernel takes its time to tell IPv6 of the carrier of a link whose
		// number is that of its other end: it seems to have none
		// (linkwatch_urgent_event).
		if err := inside.AddWire(x.Name, firstIndex+i, far, unix.Gettid()); err != nil {
			return err
		}
		// Nobody is there to say. After some seconds the kernel would give up, and
		// tell the twin so of each packet that waits: on a slow machine there was no
		// room left for what is looked for.
		if err := inside.AskNobody(x.Name); err != nil {
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
		t.ports[x.Name] = port{fd, near}
	}
	return nil
}

// address gives an interface its addresses, and a way to everybody.
func address(links *hostnet.Links, families []firewall.Family, x Interface, i int) error {
	for _, f := range families {
		addresses := x.Addresses
		if f == firewall.IPv6 { // in place of the kernel's
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

// awaitWires waits until a frame arrives on each interface. It does at once, but
// before Linux 3.14, which has no PACKET_QDISC_BYPASS, a new interface's queue
// drops all until the kernel has got around to it (linkwatch).
func (t *Twin) awaitWires() error {
	const again = 20 * time.Millisecond
	for name, p := range t.ports {
		for end := time.Now().Add(readyWait); ; {
			if err := t.mark(p); err != nil {
				return fmt.Errorf("sending to %s: %w", name, err)
			}
			err := t.readTap(t.sent-1, again, func(int) {})
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

// awaitAddresses waits until a packet to each address passes: the kernel
// finishes the work on a new interface later, and says so nowhere.
func (t *Twin) awaitAddresses(families []firewall.Family, interfaces []Interface) error {
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
		fates, err := t.Send(waiting)
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
			return fmt.Errorf("after %v the kernel takes in nothing to %v on %s", readyWait, waiting[0].Dst, waiting[0].In)
		}
	}
}

// hello is a packet from next door to an address.
func hello(in string, to netip.Addr) firewall.Packet {
	from := netip.MustParseAddr("192.0.2.99")
	if to.Is6() {
		from = netip.MustParseAddr("fe80::99")
	}
	return firewall.Packet{In: in, Src: from, Dst: to, Proto: firewall.UDP, DstPort: 9, State: firewall.TrackedNew, HopLimit: 64}
}

// Close ends the outsider.
func (t *Twin) Close() {
	if t.done {
		return
	}
	t.done = true
	for _, p := range t.ports {
		unix.Close(p.fd)
	}
	for _, fd := range t.local {
		unix.Close(fd)
	}
	for _, fd := range append(t.passed, t.tap) {
		unix.Close(fd)
	}
}

// onThread runs f on a thread that ends with it: a goroutine that ends locked
// takes its thread along. It is not the first thread, whose network /proc shows
// to all, and which cannot end.
func onThread(f func() error) error {
	done := make(chan error)
	free := make(chan struct{})
	defer close(free)
	var run func()
	run = func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			go run()
			<-free // until then nobody else is put on this one
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}
	go run()
	return <-done
}
