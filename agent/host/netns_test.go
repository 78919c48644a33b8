package host

import (
	"runtime"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// namespace is a test's own empty network namespace. It exists as long as the thread
// that created it.
type namespace struct {
	jobs chan func()
	tid  int
}

func newNamespace(t *testing.T) *namespace {
	t.Helper()
	lab.Need(t)
	ns := &namespace{jobs: make(chan func())}
	ended := make(chan struct{})
	ready := make(chan error)
	var live func()
	live = func() {
		runtime.LockOSThread()
		if ns.tid = syscall.Gettid(); ns.tid == syscall.Getpid() {
			// Not the first thread, whose namespace /proc/net shows to all threads.
			// While locked here, it cannot be chosen again.
			go live()
			<-ended
			runtime.UnlockOSThread()
			return
		}
		// Never unlocked: the thread, and the namespace, end with the goroutine.
		ready <- syscall.Unshare(syscall.CLONE_NEWNET)
		for job := range ns.jobs {
			job()
		}
	}
	go live()
	if err := <-ready; err != nil {
		t.Fatal("creating a network namespace:", err)
	}
	t.Cleanup(func() { close(ns.jobs); close(ended) })
	ns.up(t, "lo")
	return ns
}

// do runs f inside the namespace. A socket that f opens stays in it.
func (ns *namespace) do(f func()) {
	done := make(chan struct{})
	ns.jobs <- func() { defer close(done); f() }
	<-done
}

// must runs f inside the namespace and fails the test on an error.
func (ns *namespace) must(t *testing.T, f func() error) {
	t.Helper()
	var err error
	ns.do(func() { err = f() })
	if err != nil {
		t.Fatal(err)
	}
}

func (ns *namespace) add(t *testing.T, link netlink.Link) {
	t.Helper()
	ns.must(t, func() error { return netlink.LinkAdd(link) })
}

// up sets a link up and adds addresses to it.
func (ns *namespace) up(t *testing.T, name string, cidrs ...string) {
	t.Helper()
	ns.must(t, func() error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, c := range cidrs {
			addr, err := netlink.ParseAddr(c)
			if err != nil {
				return err
			}
			if addr.IP.To4() == nil {
				addr.Flags = syscall.IFA_F_NODAD // otherwise it is unusable for a second
			}
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(link)
	})
}

// index returns a link's index.
func (ns *namespace) index(t *testing.T, name string) (index int) {
	t.Helper()
	ns.must(t, func() error {
		link, err := netlink.LinkByName(name)
		if err == nil {
			index = link.Attrs().Index
		}
		return err
	})
	return index
}

// join connects two namespaces by a veth pair called eth0 in both:
// 192.0.2.1 and 2001:db8::1 here, 192.0.2.2 and 2001:db8::2 there.
func (ns *namespace) join(t *testing.T, other *namespace) {
	t.Helper()
	ns.add(t, &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: "eth0"},
		PeerName:      "eth0",
		PeerNamespace: netlink.NsPid(other.tid),
	})
	ns.up(t, "eth0", "192.0.2.1/24", "2001:db8::1/64")
	other.up(t, "eth0", "192.0.2.2/24", "2001:db8::2/64")
}
