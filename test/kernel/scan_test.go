package kernel_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// listenOnTwentyPorts listens on SSH's port, the profile's and others.
func (m *machine) listenOnTwentyPorts(t *testing.T) {
	t.Helper()
	m.Host.Listen(t, 22, 25, 80, 110, 143, 443, 465, 993, 995,
		21, 23, 53, 111, 587, 3306, 5432, 6379, 8080, 11211, 31337)
}

func webAndMail() []uint16 { return []uint16{25, 80, 110, 143, 443, 465, 993, 995} }

// TestOpenPorts scans all ports from the client and from a stranger.
func TestOpenPorts(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.listenOnTwentyPorts(t)
		m.bootstrap(t)
		for _, to := range m.Server.Both() {
			m.wantScan(t, m.Client.Like(to), to, append(webAndMail(), 22))
			m.wantScan(t, m.Stranger.Like(to), to, webAndMail())
		}
	})
}

// wantScan fails unless nmap finds exactly the wanted open ports, and no other port
// answers.
func (m *machine) wantScan(t *testing.T, from, to netip.Addr, open []uint16) {
	t.Helper()
	want := map[uint16]lab.Port{0: {State: "filtered", Reason: "no-response"}}
	for _, p := range open {
		want[p] = lab.Port{State: "open", Reason: "syn-ack"}
	}
	got := m.Outsider.Nmap(t, from, to, "-")
	for port, p := range got {
		if p != want[port] {
			t.Errorf("from %v to %v: port %d is %v, want %v", from, to, port, p, want[port])
		}
	}
	for port, p := range want {
		if _, ok := got[port]; !ok {
			t.Errorf("from %v to %v: port %d is missing, want %v", from, to, port, p)
		}
	}
}

// TestScanKinds runs every kind of scan of nmap. None may tell more than a plain connect
// does: whether a port of the profile has a listener.
func TestScanKinds(t *testing.T) {
	const (
		openPort   = 80   // of the profile, with a listener
		closedPort = 443  // of the profile, without a listener
		hidden     = 8080 // not of the profile, with a listener
		nothing    = 8081 // not of the profile, without a listener
		ssh        = 22   // with a listener; not for strangers
	)
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, openPort, hidden, ssh)
		m.bootstrap(t)
		ports := []uint16{openPort, closedPort, hidden, nothing, ssh}
		for _, to := range m.Server.Both() {
			from := m.Stranger.Like(to)
			for _, kind := range [][]string{
				{"-sT"}, {"-sS"}, {"-sF"}, {"-sN"}, {"-sX"}, {"-sA"}, {"-sW"}, {"-sM"},
				{"-sS", "--scanflags", "SYNFIN"}, {"-sS", "--scanflags", "SYNRST"}, {"-sS", "--scanflags", "URGPSH"},
				{"-sF", "--scanflags", "URGPSH"},
			} {
				connects := kind[0] == "-sT" || kind[0] == "-sS" && len(kind) == 1
				for port, p := range m.Outsider.Nmap(t, from, to, lab.Ports(ports...), kind...) {
					switch {
					case connects && port == openPort:
						if p.State != "open" {
							t.Errorf("nmap %v of %v: port %d is %v, want open", kind, to, port, p)
						}
					case connects && port == closedPort:
						if p.State != "closed" {
							t.Errorf("nmap %v of %v: port %d is %v, want closed", kind, to, port, p)
						}
					case !p.Silent():
						t.Errorf("nmap %v of %v: port %d is %v, want no answer", kind, to, port, p)
					}
				}
			}
		}
	})
}

// TestFlags sends all 256 combinations of TCP flags. Only a packet that begins a connection
// may get an answer, and only from a port of the profile.
func TestFlags(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.bootstrap(t)
		for _, to := range m.Server.Both() {
			answers := m.Outsider.Flags(t, m.Stranger.Like(to), to, 80, 443, 22, 8080, 8081)
			for port, byFlags := range answers {
				profile := port == 80 || port == 443
				for flags, answer := range byFlags {
					if !profile || flags&(lab.FIN|lab.SYN|lab.RST|lab.ACK) != lab.SYN {
						t.Errorf("port %d of %v answers flags %#02x with %#02x", port, to, flags, answer)
					}
				}
			}
			if got := answers[80][lab.SYN]; got != lab.SYN|lab.ACK {
				t.Errorf("port 80 of %v answers SYN with %#02x", to, got)
			}
			if got := answers[443][lab.SYN]; got != lab.RST|lab.ACK {
				t.Errorf("port 443 of %v answers SYN with %#02x", to, got)
			}
		}
	})
}

// TestServices opens ports by the settings, for some sources and on some interfaces.
func TestServices(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.write(t, "/etc/basicfw/agent.ini", `[agent]
profile = mine
[ssh]
client_ip = `+m.Client.String()+`
[open]
for-one  = 5000/tcp from `+m.Client.V4.String()+`
for-two  = 5001/tcp from 203.0.113.0/24, `+m.Client.V4.String()+`, 2001:db8:0:2::/64
public   = 5002/tcp on public
private  = 5003/tcp on private
by-name  = 5004/tcp on eth0
by-glob  = 5005/tcp on eth*
other    = 5006/tcp on eth1
range    = 5010-5012/tcp
`, 0o640)
		m.write(t, "/etc/basicfw/profiles.d/mine.ini", "[profile]\nname = mine\nextends = web-only\nping = no\n[open]\nalt = 8080/tcp\n", 0o644)
		m.Host.Listen(t, 22, 80, 443, 25, 8080, 5000, 5001, 5002, 5003, 5004, 5005, 5006, 5009, 5010, 5012, 5013)
		m.must(t, exitOK, "bootstrap", "--no-service")
		all := []uint16{80, 443, 8080, 5002, 5004, 5005, 5010, 5012}
		for _, c := range []struct {
			from, to netip.Addr
			open     []uint16
		}{
			{m.Client.V4, m.Server.V4, append([]uint16{22, 5000, 5001}, all...)},
			{m.Client.V6, m.Server.V6, append([]uint16{22}, all...)},
			{m.Stranger.V4, m.Server.V4, all},
			{m.Stranger.V6, m.Server.V6, append([]uint16{5001}, all...)},
		} {
			var open []uint16
			for port, p := range m.Outsider.Nmap(t, c.from, c.to, "1-10000") {
				if p.State == "open" {
					open = append(open, port)
				}
			}
			slices.Sort(open)
			slices.Sort(c.open)
			if !slices.Equal(open, c.open) {
				t.Errorf("from %v to %v: open are %v, want %v", c.from, c.to, open, c.open)
			}
		}
		for _, to := range m.Server.Both() {
			if m.ping(t, m.Stranger.Like(to), to) {
				t.Errorf("%v answers a ping", to)
			}
		}
	})
}

// ping reports whether an echo request is answered.
func (m *machine) ping(t *testing.T, from, to netip.Addr) bool {
	t.Helper()
	args := []string{"nmap", "-n", "-sn", "-PE", "--disable-arp-ping", "--max-retries", "1", "-e", "eth0", "-S", from.String()}
	if to.Is6() {
		args = append(args, "-6")
	}
	return strings.Contains(m.Outsider.MustRun(t, append(args, to.String())...), "Host is up")
}

// TestHostItself checks what has to work on a closed host: its own services on loopback,
// outgoing connections, ping, and neighbour discovery.
func TestHostItself(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 80, 8080)
		m.Outsider.Listen(t, 4444)
		m.bootstrap(t)
		for _, server := range m.Server.Both() {
			loopback := lab.Addrs{V4: netip.MustParseAddr("127.0.0.1"), V6: netip.MustParseAddr("::1")}.Like(server)
			for _, to := range []netip.Addr{loopback, server} {
				if err := m.Host.Reach(to, to, 8080, lab.Patient); err != nil {
					t.Errorf("the host does not reach itself: %v", err)
				}
			}
			for _, n := range []*lab.Namespace{m.Host, m.Outsider} {
				n.MustRun(t, "ip", "neigh", "flush", "dev", "eth0")
			}
			if err := m.Host.Reach(server, m.Stranger.Like(server), 4444, lab.Patient); err != nil {
				t.Errorf("the host cannot connect to the stranger: %v", err)
			}
			for _, n := range []*lab.Namespace{m.Host, m.Outsider} {
				n.MustRun(t, "ip", "neigh", "flush", "dev", "eth0")
			}
			if err := m.Outsider.Reach(m.Client.Like(server), server, 80, lab.Patient); err != nil {
				t.Errorf("a neighbour does not find the host: %v", err)
			}
			if !m.ping(t, m.Stranger.Like(server), server) {
				t.Errorf("%v answers no ping", server)
			}
		}
	})
}

// TestSSHPort configures another port of sshd, and then changes it.
func TestSSHPort(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 2200, 2222)
		m.write(t, "/etc/ssh/sshd_config", "# sshd\nPort 2222\n", 0o600)
		m.bootstrap(t)
		m.wantReach(t, m.Server.V4, 2222, true, false)
		m.wantReach(t, m.Server.V6, 22, false, false)
		m.must(t, exitOK, "verify")

		m.write(t, "/etc/ssh/sshd_config", "Port 2200\n", 0o600)
		m.must(t, exitDrift, "verify")
		m.must(t, exitOK, "verify", "--repair")
		m.wantReach(t, m.Server.V6, 2200, true, false)
		m.must(t, exitOK, "verify")

		m.write(t, "/etc/ssh/sshd_config", "Port 80\n", 0o600)
		// sshd wins over the profile.
		r := m.must(t, exitOK, "bootstrap", "--no-service")
		says(t, r.Stderr, "http = 80/tcp does not open port 80, where sshd listens", "basicfw-agent close http")
		m.wantReach(t, m.Server.V4, 80, true, false)
	})
}

// stock returns the rules of a distribution's own firewall.
func stock() map[string]string {
	return map[string]string{
		ipv4: `*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p icmp -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -p tcp -m state --state NEW -m tcp --dport 22 -j ACCEPT
-A INPUT -j REJECT --reject-with icmp-host-prohibited
-A FORWARD -j REJECT --reject-with icmp-host-prohibited
COMMIT
`,
		ipv6: `*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p ipv6-icmp -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -p tcp -m state --state NEW -m tcp --dport 22 -j ACCEPT
-A INPUT -d fe80::/64 -p udp -m udp --dport 546 -m state --state NEW -j ACCEPT
-A INPUT -j REJECT --reject-with icmp6-adm-prohibited
-A FORWARD -j REJECT --reject-with icmp6-adm-prohibited
COMMIT
`,
	}
}

// stocked loads the distribution's own firewall, and persists it.
func (m *machine) stocked(t *testing.T) {
	t.Helper()
	for family, text := range stock() {
		m.load(t, family, text)
		m.write(t, rulesFile(family), "# sample configuration for "+tables(family)+" service\n"+text, 0o600)
	}
}

// TestStockRules starts with the distribution's own rules in INPUT. TestBesideStock does so
// over netlink, with working iptables programs.
func TestStockRules(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.stocked(t)
		before := m.everything(t)
		m.bootstrap(t)
		for _, to := range m.Server.Both() {
			m.wantReach(t, to, 22, true, false)
			m.wantReach(t, to, 80, true, true)
			m.wantReach(t, to, 8080, false, false)
		}
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "uninstall")
		same(t, "after uninstall", before, m.everything(t))
	})
}

// wantReach fails unless a port answers the client and the stranger as wanted.
func (m *machine) wantReach(t *testing.T, to netip.Addr, port uint16, client, stranger bool) {
	t.Helper()
	for _, who := range []struct {
		name string
		from netip.Addr
		want bool
	}{{"the client", m.Client.Like(to), client}, {"a stranger", m.Stranger.Like(to), stranger}} {
		wait := lab.Brief
		if who.want {
			wait = lab.Patient
		}
		if err := m.Outsider.Reach(who.from, to, port, wait); (err == nil) != who.want {
			t.Errorf("port %d of %v from %s: want answer %v, got: %v", port, to, who.name, who.want, err)
		}
	}
}
