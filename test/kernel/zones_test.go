package kernel_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// private adds an interface to the machine that is on a private network with the outsider,
// and returns the addresses of both.
func (m *machine) private(t *testing.T, name string) (here, there netip.Addr) {
	t.Helper()
	m.Host.MustRun(t, "ip", "link", "add", name, "link", "eth0", "type", "macvlan", "mode", "bridge")
	// Only the interface itself answers for its address.
	m.Host.MustRun(t, "sysctl", "-q", "net.ipv4.conf.all.arp_ignore=1")
	m.Host.MustRun(t, "ip", "addr", "add", "10.7.0.1/24", "dev", name)
	m.Host.MustRun(t, "ip", "link", "set", name, "up")
	m.Outsider.MustRun(t, "ip", "addr", "add", "10.7.0.2/24", "dev", "eth0")
	return netip.MustParseAddr("10.7.0.1"), netip.MustParseAddr("10.7.0.2")
}

// TestZonesFromSettings checks that changed names of interfaces take effect by apply alone,
// whatever else happens on the machine.
func TestZonesFromSettings(t *testing.T) {
	on(t, []string{"nft", "netlink"}, func(t *testing.T, m *machine) {
		const before, after = "[open]\ndb = 5432/tcp on private\n", "[open]\ndb = 5432/tcp on private\n[interfaces]\nprivate = eth0, eth7\n"
		m.Host.Listen(t, 5432)
		m.write(t, agentINI, before, 0o640)
		m.bootstrap(t)
		s := m.serve(t)
		m.write(t, agentINI, after, 0o640)
		open := map[string]string{"5432/tcp": everybody}
		closed := map[string]string{"5432/tcp": nobody}
		happens := func() {
			t.Helper()
			m.Host.MustRun(t, "ip", "link", "add", "more", "type", "bridge")
			m.Host.MustRun(t, "ip", "link", "del", "more")
			m.must(t, exitOK, "unlock", "--for", "10m")
			m.must(t, exitOK, "lock")
			m.settle(t)
		}
		happens()
		m.wantOpen(t, closed)
		if st := m.status(t, exitOK); st.State != "protected" {
			t.Errorf("status with settings that were not applied: %s", st.State)
		}
		m.must(t, exitDrift, "plan", "--exit-code")

		m.must(t, exitOK, "apply", "--confirm", "5s")
		m.wantOpen(t, open)
		lab.Poll(t, "the rollback", func() bool { return m.reached("5432/tcp", everybody, lab.Brief) == "" })
		happens()
		m.wantOpen(t, closed)

		r := m.must(t, exitOK, "apply")
		says(t, r.Stderr, "private = eth7", "no such interface")
		happens()
		m.wantOpen(t, open)
		says(t, m.must(t, exitOK, "status").Stdout, "private = eth7", "no such interface")
		s.Stop(t)
	})
}

// TestZonesAreKept checks that what the network sends closes ports, and never opens any.
func TestZonesAreKept(t *testing.T) {
	on(t, []string{"nft", "netlink"}, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 5432)
		here, there := m.private(t, "lan0")
		reached := func() bool { return m.Outsider.Reach(there, here, 5432, lab.Brief) == nil }
		m.write(t, agentINI, "[open]\ndb = 5432/tcp on private\n", 0o640)
		m.bootstrap(t)
		s := m.serve(t)
		if !reached() {
			t.Fatal("the port is not open on the private network")
		}
		// A router advertises itself there, and stops.
		m.Host.MustRun(t, "ip", "route", "add", "default", "via", "10.7.0.2", "metric", "500")
		lab.Poll(t, "the port to be closed", func() bool { return !reached() })
		m.Host.MustRun(t, "ip", "route", "del", "default", "via", "10.7.0.2", "metric", "500")
		m.settle(t)
		m.must(t, exitOK, "open", "8080/tcp")
		if reached() {
			t.Error("the port is open again without a command")
		}
		m.must(t, exitOK, "apply", "--redetect", "--force")
		if !reached() {
			t.Error("the port is not open after --redetect")
		}
		// A new name changes nothing; another card under the old name gets nothing.
		m.Host.MustRun(t, "ip", "link", "set", "lan0", "down")
		m.Host.MustRun(t, "ip", "link", "set", "lan0", "name", "lan1")
		m.Host.MustRun(t, "ip", "link", "set", "lan1", "up")
		lab.Poll(t, "the port to be open under the new name", reached)
		s.Stop(t)
	})
}

// TestTrustedKeepsToTheKind checks that a container cannot make a trusted interface by its
// name.
func TestTrustedKeepsToTheKind(t *testing.T) {
	on(t, []string{"nft", "netlink"}, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 5432)
		m.write(t, agentINI, "[interfaces]\ntrusted = wg*\n", 0o640)
		m.Host.MustRun(t, "ip", "link", "add", "wg0", "type", "bridge")
		m.bootstrap(t)
		s := m.serve(t)
		if !m.hasRule(t, m.from("wg0"), "basicfw-trusted") {
			t.Error("wg0 is not trusted")
		}
		m.Wire(t, "wg9")
		for _, of := range []struct {
			n    *lab.Namespace
			cidr string
		}{{m.Host, "10.9.0.1/24"}, {m.Outsider, "10.9.0.2/24"}} {
			of.n.MustRun(t, "ip", "addr", "add", of.cidr, "dev", "wg9")
			of.n.MustRun(t, "ip", "link", "set", "wg9", "up")
		}
		m.Host.MustRun(t, "ip", "link", "add", "wg1", "type", "bridge")
		lab.Poll(t, "wg1 to be trusted", func() bool { return m.hasRule(t, m.from("wg1"), "basicfw-trusted") })
		if m.Outsider.Reach(netip.MustParseAddr("10.9.0.2"), netip.MustParseAddr("10.9.0.1"), 5432, lab.Brief) == nil {
			t.Error("a veth is trusted because of its name")
		}
		m.must(t, exitOK, "apply")
		if m.hasRule(t, m.from("wg9"), "basicfw-trusted") {
			t.Error("a veth is trusted after apply")
		}
		m.must(t, exitOK, "selftest")
		s.Stop(t)

		// An upgrade renames an interface that the settings name.
		m.write(t, agentINI, "[interfaces]\ntrusted = wg0\n", 0o640)
		m.must(t, exitOK, "apply")
		const absent = "trusted = wg0 in [interfaces]: no such interface exists"
		if text := m.must(t, exitOK, "status").Stdout; strings.Contains(text, absent) {
			t.Errorf("wg0 exists: %s", text)
		}
		m.Host.MustRun(t, "ip", "link", "set", "wg0", "down")
		m.Host.MustRun(t, "ip", "link", "set", "wg0", "name", "vpn0")
		says(t, m.must(t, exitOK, "status").Stdout, absent)
	})
}
