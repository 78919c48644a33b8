package kernel_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// scene is what another program does to a machine that is protected: commands of iptables
// (in both families) or nft, and what status has to say then.
type scene struct {
	name, iptables, nft string
	state               string // of status
	says                string // why
	// The reachability of a port from the client, and from others.
	port             uint16
	client, stranger bool
}

// opening scenes have an effect on a machine whose rules are in iptables.
var opening = []scene{
	{"a chain that accepts", "-N OTHER;-A OTHER -p tcp -m multiport --dports 22,8080 -j ACCEPT;-I INPUT -j OTHER", "",
		"exposed", "filter OTHER -p tcp -m multiport --dports 22,8080 -j ACCEPT", 8080, true, true},
	{"a chain that accepts SSH", "-N OTHER;-A OTHER -p tcp -m tcp --dport 22 -j ACCEPT;-I INPUT -j OTHER", "", "exposed", "22/tcp", 22, true, true},
	{"a chain that accepts on one interface", "-N OTHER;-A OTHER -i tailscale0 -j ACCEPT;-I INPUT -j OTHER", "", "protected", "", 8080, false, false},
	{"a chain that accepts within a limit", "-N OTHER;-A OTHER -p tcp --dport 8080 -m limit --limit 9/sec --limit-burst 9 -j ACCEPT;-I INPUT -j OTHER", "",
		"protected", "", 8080, true, true},
}

// closing scenes have an effect on every machine.
var closing = []scene{
	{"a native chain", "", "add table inet other; add chain inet other in { type filter hook input priority -10; }; add rule inet other in tcp dport 443 drop",
		"blocked", "nft inet other in tcp dport 443 drop", 443, false, false},
	{"a native policy", "", "add table inet other; add chain inet other in { type filter hook input priority 10; policy drop; }; add rule inet other in tcp dport { 22, 80 } accept",
		"blocked", "nft inet other in policy DROP", 443, false, false},
	{"a dormant table", "", "add table inet other { flags dormant; }; add chain inet other in { type filter hook input priority -10; policy drop; }",
		"protected", "", 443, true, true},
	{"ingress", "", "add table netdev other; add chain netdev other in { type filter hook ingress device eth0 priority 0; }; add rule netdev other in tcp dport 443 drop",
		"blocked", "nft netdev other in", 443, false, false},
	{"prerouting", "", "add table inet other; add chain inet other pre { type filter hook prerouting priority -300; }; add rule inet other pre tcp dport 443 drop",
		"blocked", "nft inet other pre", 443, false, false},
	{"raw PREROUTING", "-t raw -I PREROUTING -p tcp -m tcp --dport 443 -j DROP", "", "blocked", "raw PREROUTING", 443, false, false},
	{"mangle PREROUTING", "-t mangle -I PREROUTING -p tcp -m tcp --dport 443 -j DROP", "", "blocked", "mangle PREROUTING", 443, false, false},
	{"mangle INPUT", "-t mangle -I INPUT -p tcp -m tcp --dport 443 -j DROP", "", "blocked", "mangle INPUT", 443, false, false},
	{"security INPUT", "-t security -I INPUT -p tcp -m tcp --dport 443 -j DROP", "", "blocked", "security INPUT", 443, false, false},
	{"the only SSH client", "-t mangle -I INPUT -p tcp -m tcp --dport 22 -j DROP", "", "blocked", "22/tcp is blocked for", 22, false, false},
	{"a ban", "", "add table inet other; add set inet other bad { type ipv4_addr; flags interval; elements = { 203.0.113.0/24 }; }; " +
		"add chain inet other in { type filter hook input priority -10; }; add rule inet other in ip saddr @bad drop", "protected", "", 443, true, true},
	{"a redirect to a closed port", "-t nat -A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080", "",
		"blocked", "nat PREROUTING", 80, false, false},
	{"a redirect to an open port", "-t nat -A PREROUTING -p tcp -m tcp --dport 9999 -j REDIRECT --to-ports 443", "",
		"exposed", "9999/tcp is open", 9999, true, true},
}

// TestOtherRules adds rules of other programs to a machine that is protected. Status says
// what packets say.
func TestOtherRules(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 443, 8080)
		m.bootstrap(t)
		scenes := closing
		if !m.netlink {
			scenes = append(scenes[:len(scenes):len(scenes)], opening...)
		}
		for _, s := range scenes {
			t.Run(s.name, func(t *testing.T) {
				m.play(t, s)
			})
		}
	})
}

// play adds the rules of a scene, checks them, and removes them.
func (m *machine) play(t *testing.T, s scene) {
	if s.nft != "" {
		for _, command := range strings.Split(s.nft, "; add ") {
			m.nft(t, "add "+strings.TrimPrefix(command, "add "))
		}
	}
	for _, family := range families() {
		for _, rule := range strings.Split(s.iptables, ";") {
			if rule != "" {
				m.iptables(t, family, strings.Fields(rule)...)
			}
		}
	}
	for _, to := range m.Server.Both() {
		m.wantReach(t, to, s.port, s.client, s.stranger)
	}
	code := exitDrift
	if s.state == "protected" {
		code = exitOK
	}
	st := m.status(t, code)
	if st.State != s.state || !strings.Contains(st.Why, s.says) {
		t.Errorf("%s: %q, want %s with %q", st.State, st.Why, s.state, s.says)
	}
	m.must(t, exitOK, "verify") // our rules are as they should be
	wantScreen(t, m.must(t, code, "status").Stdout)
	if s.nft != "" {
		m.nft(t, "delete table "+strings.Join(strings.Fields(s.nft)[2:4], " "))
	}
	for _, family := range families() {
		rules := strings.Split(s.iptables, ";")
		for i := len(rules) - 1; i >= 0 && rules[0] != ""; i-- {
			rule := strings.NewReplacer("-A ", "-D ", "-I ", "-D ", "-N ", "-X ").Replace(rules[i])
			if strings.HasPrefix(rules[i], "-N ") {
				m.iptables(t, family, "-F", strings.Fields(rule)[1])
			}
			m.iptables(t, family, strings.Fields(rule)...)
		}
	}
	if st := m.status(t, exitOK); st.State != "protected" {
		t.Errorf("after it: %s, %s", st.State, st.Why)
	}
}

// TestIPSet adds a rule of another program that accepts the sources of a set, with an
// exception, and one that drops those of a list.
func TestIPSet(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		lab.Need(t, "ipset")
		m.Host.Listen(t, 22, 80, 443, 8080)
		m.bootstrap(t)
		sets := ""
		for i, to := range m.Server.Both() {
			client, stranger := m.Client.Both()[i], m.Stranger.Both()[i]
			inet := map[bool]string{true: "inet", false: "inet6"}[to.Is4()]
			sets += fmt.Sprintf("create good%[1]d hash:net,port family %[2]s\nadd good%[1]d %[3]s,tcp:8080\ncreate bad%[1]d hash:net family %[2]s\nadd bad%[1]d %[4]s\nadd bad%[1]d %[5]s nomatch\n"+
				"create bads%[1]d list:set\nadd bads%[1]d bad%[1]d\n", i, inet, stranger, netip.PrefixFrom(stranger, to.BitLen()-8).Masked(), client)
		}
		if r := m.Host.Run(t, lab.Command{Args: []string{"ipset", "restore"}, Stdin: sets}); r.Code != 0 {
			t.Fatalf("ipset: %s\n%s", r.Stderr, sets)
		}
		for i, family := range families() {
			m.iptables(t, family, strings.Fields(fmt.Sprintf("-I INPUT -p tcp -m set --match-set good%d src,dst -j ACCEPT", i))...)
			m.iptables(t, family, strings.Fields(fmt.Sprintf("-I INPUT -p tcp -m multiport --dports 80,443 -m set --match-set bads%d src -j DROP", i))...)
		}
		for _, to := range m.Server.Both() {
			m.wantReach(t, to, 8080, false, true)
			m.wantReach(t, to, 80, true, false)
		}
		st := m.status(t, exitDrift)
		if st.State != "exposed" || !strings.Contains(st.Why, "8080/tcp") || !strings.Contains(st.Why, m.Stranger.V4.String()) || strings.Contains(st.Why, "perhaps") {
			t.Errorf("%s: %q", st.State, st.Why)
		}
		for _, from := range []struct {
			addr netip.Addr
			code int
		}{{m.Client.V4, exitOK}, {m.Stranger.V4, exitDrift}, {m.Client.V6, exitOK}, {m.Stranger.V6, exitDrift}} {
			says(t, m.must(t, from.code, "explain", "--from", from.addr.String(), "--to", "80/tcp").Stdout, "INPUT")
		}
	})
}

// TestRefusedForOtherRules checks that a change is refused, and everything is as before, if
// together with a rule of another program it would close what the settings open.
func TestRefusedForOtherRules(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 443, 8080)
		for _, family := range families() {
			m.iptables(t, family, strings.Fields("-t nat -A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080")...)
		}
		before, files := m.rules(t), m.tree(t, false, "etc", "var")
		r := m.must(t, exitFailed, "bootstrap", "--no-service", "--client-ip", m.Client.V4.String())
		says(t, r.Stderr, "80/tcp is blocked for any address", "nat PREROUTING", "hint: remove this rule")
		same(t, "the rules", before, m.rules(t))
		same(t, "the files", files, m.tree(t, false, "etc", "var"))
		m.must(t, exitOK, "bootstrap", "--no-service", "--client-ip", m.Client.V4.String(), "--force")
		if s := m.status(t, exitDrift); s.State != "blocked" {
			t.Errorf("forced: %s", s.State)
		}
		m.must(t, exitOK, "open", "8080/tcp")
		m.wantReach(t, m.Server.V4, 80, true, true)
		if s := m.status(t, exitOK); s.State != "protected" {
			t.Errorf("with 8080 open: %s, %s", s.State, s.Why)
		}
		// It is not made worse by a change elsewhere.
		m.must(t, exitOK, "close", "https")
		// Another program opens what the settings close: only a warning.
		says(t, m.must(t, exitFailed, "close", "8080/tcp").Stderr, "80/tcp is blocked")
		m.wantReach(t, m.Server.V4, 80, true, true)
	})
}

// TestAssertions checks that a change which breaks an entry of [test] is refused and undone.
func TestAssertions(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 443, 5432)
		client := m.Client.V4.String()
		m.settings(t, "[test]\nallow = "+client+" -> 22/tcp, any -> 443/tcp\ndeny = any -> 5432/tcp\n")
		m.must(t, exitOK, "bootstrap", "--no-service", "--client-ip", client)
		m.wantReach(t, m.Server.V4, 443, true, true)
		before, files, counted := m.rules(t), m.tree(t, false, "etc", "var"), m.counted(t, "https")
		for _, refused := range [][]string{
			{"open", "5432/tcp", "[test] deny = any -> 5432/tcp"},
			{"open", "5000-6000/tcp", "[test] deny = any -> 5432/tcp"},
			{"open", "5432/tcp", "--from", "192.0.2.0/24", "5432/tcp is open to 192.0.2.0/24"},
			{"close", "https", "[test] allow = any -> 443/tcp"},
		} {
			last := len(refused) - 1
			says(t, m.must(t, exitFailed, refused[:last]...).Stderr, refused[last], "hint: ")
			same(t, "the rules", before, m.rules(t))
			same(t, "the counter", counted, m.counted(t, "https")) // nothing was loaded and undone
			same(t, "the files", files, m.tree(t, false, "etc", "var"))
		}
		m.must(t, exitOK, "open", "8080/tcp")
		m.settings(t, "[test]\ndeny = any -> 80/tcp\n")
		says(t, m.must(t, exitFailed, "plan").Stderr, "[test] deny = any -> 80/tcp", "80/tcp is open to any address")
		m.settings(t, "[open]\nmine = 5432/tcp\n[test]\ndeny = any -> 5432/tcp\n")
		r := m.must(t, exitFailed, "plan", "--exit-code")
		says(t, r.Stderr, "[test] deny = any -> 5432/tcp")
		says(t, r.Stdout, "basicfw-mine")
		m.settings(t, "[test]\ndeny = any -> 80/tcp\n")
		says(t, m.must(t, exitFailed, "apply").Stderr, "[test] deny = any -> 80/tcp", "80/tcp is open to any address")
		m.settings(t, "[test]\nallow = 1.2.3.4 -> 99999/tcp\ndeny = any, 80/tcp\n")
		says(t, m.must(t, exitUsage, "apply").Stderr, ": test.deny: \"any\": want SOURCE -> PORT/PROTO", ": test.allow: \"99999/tcp\": ports are 1 to 65535")
	})
}

// counted returns one of our IPv4 rules with its counter.
func (m *machine) counted(t *testing.T, name string) string {
	t.Helper()
	rules := m.Host.MustRun(t, "nft", "list", "ruleset")
	if !m.netlink {
		rules = m.Host.MustRun(t, m.multi, "iptables-save", "-c")
	}
	for _, l := range strings.Split(rules, "\n") {
		if strings.Contains(l, m.comment(name)) {
			return l
		}
	}
	t.Fatalf("no rule %s", name)
	return ""
}

// TestUnlockNamesRules checks that unlock names the rule of another program that still drops
// what it opens.
func TestUnlockNamesRules(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22)
		m.bootstrap(t)
		for _, family := range families() {
			m.iptables(t, family, strings.Fields("-t mangle -A INPUT -p tcp -m tcp --dport 22 -j DROP")...)
		}
		for _, args := range [][]string{{"unlock", "--from", m.Stranger.V4.String()}, {"unlock"}, {"unlock", "--all"}} {
			r := m.must(t, exitOK, args...)
			says(t, r.Stderr, "warning: 22/tcp is blocked for ", "mangle INPUT")
			m.wantReach(t, m.Server.V4, 22, false, false)
		}
		m.must(t, exitOK, "lock")
	})
}
