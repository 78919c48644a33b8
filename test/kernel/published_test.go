package kernel_test

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// publish adds rules as Docker does: of iptables, or native ones. Each port of the host is
// forwarded to one of the container.
func (m *machine) publish(t *testing.T, to lab.Addrs, ports map[uint16]uint16) {
	t.Helper()
	for i, family := range families() {
		address := to.Both()[i]
		var rules, native []string
		for port, at := range ports {
			target := netip.AddrPortFrom(address, at)
			rules = append(rules, fmt.Sprintf("-A DOCKER ! -i docker0 -p tcp -m tcp --dport %d -j DNAT --to-destination %v", port, target))
			native = append(native, fmt.Sprintf("fib daddr type local iifname != docker0 tcp dport %d dnat to %v", port, target))
		}
		if m.netlink {
			table := "table " + []string{"ip", "ip6"}[i] + " docker-bridges"
			m.nft(t, "add "+table+"; delete "+table+"; "+table+" {\nchain pre {\ntype nat hook prerouting priority dstnat\n"+strings.Join(native, "\n")+
				"\n}\nchain post {\ntype nat hook postrouting priority srcnat\noifname eth0 masquerade\n}\n}")
			continue
		}
		m.load(t, family, "*nat\n:PREROUTING ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n"+
			"-A POSTROUTING -o eth0 -j MASQUERADE\n"+strings.Join(rules, "\n")+"\nCOMMIT\n")
	}
}

// TestPublished publishes ports of a container as Docker does. Strangers reach those that
// the profile opens, counted by the published port.
func TestPublished(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		guest, at := m.Guest(t)
		m.Host.Listen(t, 22, 80)
		m.Outsider.Listen(t, 7)
		guest.Listen(t, 5432)
		guest.ListenAs(t, 80, 8080)
		guest.ListenAs(t, 444, 443)
		guest.Listen(t, 9999)
		for _, to := range m.Server.Both() { // a route of the neighbours to the container's network
			network := at.Like(to)
			m.Outsider.MustRun(t, "ip", "route", "add", network.String(), "via", to.String())
		}
		m.publish(t, at, map[uint16]uint16{5432: 5432, 8080: 80, 443: 444})
		before := m.rules(t)
		// want checks who reaches the published ports, and that the container reaches others.
		want := func(when string, db, client, stranger bool) {
			t.Helper()
			t.Log(when)
			var all sync.WaitGroup
			reach := func(to netip.Addr, port uint16, client, stranger bool) {
				all.Add(1)
				go func() {
					defer all.Done()
					m.wantReach(t, to, port, client, stranger)
				}()
			}
			for _, to := range m.Server.Both() {
				reach(to, 443, true, true)
				reach(to, 5432, db, db)
				reach(to, 8080, client, stranger)
				direct := at.Like(to)
				reach(direct, 5432, db, db)
				reach(direct, 9999, true, true) // which is not published
				if err := guest.Reach(direct, m.Client.Like(to), 7, lab.Patient); err != nil {
					t.Errorf("from the container %v: %v", direct, err)
				}
			}
			all.Wait()
		}
		want("before bootstrap", true, true, true)
		const closed = "published by Docker: closed; open it: basicfw-agent"
		says(t, m.bootstrap(t).Stdout, "5432/tcp "+closed+" open 5432/tcp\n", "8080/tcp "+closed+" open 8080/tcp\n")
		want("after bootstrap", false, false, false)
		m.must(t, exitOK, "verify")
		says(t, m.must(t, exitOK, "status").Stdout, "protected: profile web+mail on IPv4 and IPv6\n", "5432/tcp "+closed)

		session, err := m.Outsider.Dial(m.Stranger.V4, m.Server.V4, 443, lab.Patient)
		if err != nil {
			t.Fatal(err)
		}
		defer session.Close()
		for i, from := range m.Client.Both() {
			m.must(t, exitOK, "open", "8080/tcp", "--name", fmt.Sprint("web", i), "--from", from.String())
		}
		want("open to the client", false, true, false)
		screen := m.must(t, exitOK, "status").Stdout
		says(t, screen, "protected: profile web+mail on IPv4 and IPv6\n", "ipv4 8080/tcp to 172.17.0.2:80 by Docker")
		if strings.Contains(screen, "8080/tcp "+closed) {
			t.Errorf("8080/tcp is open to the client:\n%s", screen)
		}

		away := hand{"-t mangle -F; -t mangle -X", "delete chain inet basicfw forward"}
		m.by(t, away, families()[:1]...)
		if !m.netlink {
			m.by(t, away, families()[1:]...)
		}
		want("without the rules for forwarded packets", true, true, true)
		says(t, m.must(t, exitDrift, "verify").Stdout, m.drifted())
		m.must(t, exitOK, "verify", "--repair")
		want("after a repair", false, true, false)

		t.Log("with the persisted files only")
		m.by(t, hand{byTakeAway.iptables + "; " + away.iptables, byTakeAway.nft}, families()...)
		m.loadKept(t, m)
		want("with the persisted files only", false, true, false)
		m.must(t, exitOK, "verify")

		m.must(t, exitOK, "close", "https")
		if err := session.Talk(); err != nil {
			t.Errorf("an open session to a port that is closed now: %v", err)
		}
		m.must(t, exitOK, "unlock", "--all")
		for _, to := range m.Server.Both() {
			m.wantReach(t, to, 5432, true, true)
		}
		m.must(t, exitOK, "lock")
		m.must(t, exitOK, "uninstall")
		want("after uninstall", true, true, true)
		same(t, "the rules after uninstall", before, m.rules(t))
	})
}

// TestPublishedLater publishes a port while the service runs: it closes the direct route to
// the container, too.
func TestPublishedLater(t *testing.T) {
	on(t, variants[:1], func(t *testing.T, m *machine) {
		guest, at := m.Guest(t)
		guest.Listen(t, 5432)
		m.Outsider.MustRun(t, "ip", "route", "add", at.V4.String(), "via", m.Server.V4.String())
		m.bootstrap(t)
		m.wantReach(t, at.V4, 5432, true, true)
		m.serve(t)
		m.publish(t, at, map[uint16]uint16{5432: 5432})
		lab.Poll(t, "the direct route to be closed", func() bool { return m.Outsider.Reach(m.Stranger.V4, at.V4, 5432, lab.Brief) != nil })
		m.wantReach(t, m.Server.V4, 5432, false, false)
		if !m.hasRule(t, "basicfw-direct") {
			t.Error("no rule closes it")
		}
	})
}

// drifted names the chain for forwarded packets in a line about drift.
func (m *machine) drifted() string {
	if m.netlink {
		return "forward: missing: the chain"
	}
	return "mangle FORWARD: missing: -j BASICFW-FORWARD"
}
