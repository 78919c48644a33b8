package kernel_test

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// selftestReport is what selftest --json prints.
type selftestReport struct {
	Agrees  bool
	Backend string
	Rows    []struct{ Family, Kind, What, From, On, Expected, Rules, Rule, Seen string }
}

// selftest runs "selftest --json" and returns its output.
func (m *machine) selftest(t *testing.T, code int) selftestReport {
	t.Helper()
	var report selftestReport
	r := m.must(t, code, "selftest", "--json")
	if err := json.Unmarshal([]byte(r.Stdout), &report); err != nil {
		t.Fatalf("%v\n%s", err, r.Stdout)
	}
	if report.Agrees != (code == exitOK) {
		t.Errorf("exit code %d, and agrees is %v", code, report.Agrees)
	}
	return report
}

// differing returns the rows that differ.
func (r selftestReport) differing() []string {
	var list []string
	for _, row := range r.Rows {
		if row.Seen != row.Expected || row.Rules != row.Expected {
			list = append(list, fmt.Sprintf("%s %s: %s, from %s on %s: expected %s, seen %s", row.Family, row.Kind, row.What, row.From, row.On, row.Expected, row.Seen))
		}
	}
	return list
}

// network returns what a selftest must not change of the machine's network: its links,
// addresses, routes, and all kernel parameters.
func (m *machine) network(t *testing.T) string {
	t.Helper()
	lab.Poll(t, "addresses that are no longer tentative", func() bool {
		return !strings.Contains(m.Host.MustRun(t, "ip", "-o", "addr"), " tentative")
	})
	var b strings.Builder
	for _, what := range []string{"link", "addr", "route show table all", "-6 route show table all"} {
		b.WriteString(m.Host.MustRun(t, append([]string{"ip", "-o"}, strings.Fields(what)...)...))
	}
	err := m.Host.Do(func() error {
		return filepath.WalkDir("/proc/sys/net", func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || strings.HasSuffix(path, "nf_conntrack_count") {
				return err
			}
			if data, err := os.ReadFile(path); err == nil { // some are write-only
				fmt.Fprintf(&b, "%s = %s", path, data)
			}
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// selftestBy returns a word of the backend that selftest prints.
func (m *machine) selftestBy() string {
	switch {
	case m.netlink:
		return "netlink"
	case m.multi == "xtables-legacy-multi":
		return "(legacy)"
	}
	return "(nf_tables)"
}

// TestSelftest tests the rules of a machine, which stays unchanged.
func TestSelftest(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		m.settle(t)
		rules, network := m.everything(t), m.network(t)
		start := time.Now()
		r := m.must(t, exitOK, "selftest")
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("it took %v", took)
		}
		says(t, r.Stdout, "open ports", "scans", "behaved as expected", m.selftestBy())
		if r.Stderr != "" {
			t.Errorf("stderr: %q", r.Stderr)
		}
		report := m.selftest(t, exitOK)
		if list := report.differing(); len(list) > 0 {
			t.Errorf("%q", list)
		}
		same(t, "rules and files", rules, m.everything(t))
		same(t, "the network", network, m.network(t))

		seen := map[string]bool{}
		for _, row := range report.Rows {
			seen[fmt.Sprintf("%s %s %s", row.Family, row.What, row.Seen)] = true
			if row.Kind == "SSH" && strings.HasPrefix(row.What, "22/tcp") {
				if _, client := map[string]bool{m.Client.V4.String(): true, m.Client.V6.String(): true}[row.From]; client != (row.Seen == "passes") {
					t.Errorf("SSH from %s: %s", row.From, row.Seen)
				}
			}
		}
		for _, family := range families() {
			for _, port := range webAndMail() {
				if !tried(seen, fmt.Sprintf("%s %d/tcp (", family, port), " passes") {
					t.Errorf("%s: port %d was not tested", family, port)
				}
			}
			for _, want := range []string{"8080/tcp dropped", "161/udp dropped", "null to 80/tcp dropped", "XMAS to 22/tcp dropped", "FIN,ACK to 80/tcp dropped",
				"packet too big, known connection passes", "from 443/tcp passes", "echo request passes"} {
				if !seen[family+" "+want] {
					t.Errorf("%s: not tested: %s", family, want)
				}
			}
		}
	})
}

func tried(seen map[string]bool, begin, end string) bool {
	for s := range seen {
		if strings.HasPrefix(s, begin) && strings.HasSuffix(s, end) {
			return true
		}
	}
	return false
}

// TestSelftestBefore tests what bootstrap would load.
func TestSelftestBefore(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.write(t, "/etc/basicfw/agent.ini", "[agent]\nprofile = web-only\n[ssh]\nallow = 203.0.113.0/24\n[interfaces]\ntrusted = wg0\n"+
			"[open]\ndb = 5432/tcp on eth7 from 10.0.0.0/8\nmedia = 40000-40100/udp from 198.51.100.0/24, 2001:db8::/32\n", 0o640)
		before := m.everything(t)
		report := m.selftest(t, exitOK)
		same(t, "the machine", before, m.everything(t))
		seen := map[string]bool{}
		for _, row := range report.Rows {
			seen[strings.Join([]string{row.What, row.On, row.Seen}, " ")] = true
		}
		for _, want := range []string{"5432/tcp (db) eth7 passes", "5432/tcp (db) eth0 dropped", "8080/tcp wg0 passes", "40100/udp (media) eth0 passes"} {
			if !seen[want] {
				t.Errorf("not tested: %s", want)
			}
		}
	})
}

// TestSelftestDiffers checks that rules that differ from the desired state are found.
func TestSelftestDiffers(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		const state = "/var/lib/basicfw/state.json"
		good := m.read(t, state)
		for _, alter := range []struct {
			what, comment string
			change        func(rule map[string]any)
			row           string
		}{
			{"XMAS passes", "basicfw-xmas", func(r map[string]any) { r["target"] = "ACCEPT" }, "scans: XMAS to 80/tcp"},
			{"another port", "basicfw-https", func(r map[string]any) { r["dst_port"] = map[string]any{"first": 444, "last": 444} }, "443/tcp (https)"},
			{"SSH open to any address", "basicfw-ssh-drop", func(r map[string]any) { r["target"] = "ACCEPT" }, "SSH: 22/tcp"},
			{"no replies", "basicfw-established", func(r map[string]any) { r["target"] = "DROP" }, "replies: from 443/tcp"},
			{"no neighbours", "basicfw-nd", func(r map[string]any) { r["hop_limit"] = 7 }, "neighbours: neighbour solicitation"},
			{"no hop limit", "basicfw-nd", func(r map[string]any) { delete(r, "hop_limit") }, "neighbours: neighbour solicitation from behind a router"},
			{"spoofed packets", "basicfw-spoofed-loopback", func(r map[string]any) { r["in"] = "eth9" }, "spoofed loopback: from it, to 80/tcp"},
			{"packets to loopback", "basicfw-spoofed-loopback", func(r map[string]any) { r["in"] = "eth9" }, "spoofed loopback: to it, at 80/tcp"},
			{"no IGMP", "basicfw-igmp", func(r map[string]any) { r["target"] = "DROP" }, "broadcast, multicast: IGMP query"},
			{"redirects", "basicfw-established", func(r map[string]any) { r["state"] = "RELATED,ESTABLISHED" }, "other ICMP: redirect, known connection"},
			{"no DHCP", "basicfw-dhcp", func(r map[string]any) { r["target"] = "DROP" }, "DHCP: answer"},
		} {
			m.write(t, state, alterRules(t, good, alter.comment, alter.change), 0o600)
			r := m.must(t, exitDrift, "selftest")
			if !strings.Contains(r.Stdout, " "+alter.row+", from ") {
				t.Errorf("%s: it does not name %q:\n%s", alter.what, alter.row, r.Stdout)
			}
			if len(m.selftest(t, exitDrift).differing()) == 0 {
				t.Errorf("%s: no row differs", alter.what)
			}
		}
		m.write(t, state, good, 0o600)
		m.must(t, exitOK, "selftest")
	})
}

// TestSelftestLoads makes the program that loads the rules add a rule, or do nothing.
func TestSelftestLoads(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		restore := func(script string) {
			t.Helper()
			for _, name := range []string{"iptables", "ip6tables"} {
				path := filepath.Join(m.bin, name+"-restore")
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				text := "#!/bin/sh\n" + strings.NewReplacer("MULTI", m.multi, "TABLES", name).Replace(script)
				if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
		// Another program's rule: what is loaded is right, but does not decide.
		restore("MULTI TABLES-restore \"$@\" && MULTI TABLES -I INPUT -p tcp --dport 23 -j ACCEPT\n")
		r := m.must(t, exitDrift, "selftest")
		says(t, r.Stdout, "differs: ipv4 23/tcp, from", "differs: ipv6 23/tcp, from", "expected: dropped, seen: passes (the rules say: dropped, by policy)")
		restore("cat >/dev/null\n")
		oneLine(t, m.must(t, exitFailed, "selftest").Stderr, "trying the rules", "differ from those that were loaded")
	})
}

// alterRules changes each rule with a comment in a state.
func alterRules(t *testing.T, state, comment string, change func(rule map[string]any)) string {
	t.Helper()
	var st map[string]any
	if err := json.Unmarshal([]byte(state), &st); err != nil {
		t.Fatal(err)
	}
	changed := 0
	for _, chains := range st["ruleset"].(map[string]any) {
		for _, c := range chains.([]any) {
			for _, r := range c.(map[string]any)["rules"].([]any) {
				rule := r.(map[string]any)
				if rule["comment"] == comment {
					change(rule)
					changed++
				}
			}
		}
	}
	if changed == 0 {
		t.Fatalf("no rule is called %s", comment)
	}
	data, err := json.Marshal(st)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// TestSelftestRefuses checks that a selftest that cannot run reports the cause in one line.
func TestSelftestRefuses(t *testing.T) {
	t.Parallel()
	lab.Need(t, "setpriv")
	m := newMachine(t, "nft")
	oneLine(t, m.must(t, exitUsage, "selftest", "now").Stderr, "accepts no arguments")
	for _, input := range []string{"", "{", `{"ruleset":{"ipv4":[]}}`, `{"desired":7}`} {
		c := m.command("selftest-netsim")
		c.Stdin = input
		if r := m.Host.Run(t, c); r.Code != exitUsage || r.Stdout != "" || !strings.Contains(r.Stderr, "the request") {
			t.Errorf("%q: exit code %d, %q", input, r.Code, r.Stderr)
		}
	}
	// The internal command, run by hand in the machine's own namespace.
	m.bootstrap(t)
	before := m.network(t) + m.everything(t)
	var request map[string]any
	if err := json.Unmarshal([]byte(m.read(t, "/var/lib/basicfw/state.json")), &request); err != nil {
		t.Fatal(err)
	}
	request["backend"], request["families"] = "iptables", []int{4, 6}
	data, err := json.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	c := m.command("selftest-netsim")
	c.Stdin = string(data)
	if r := m.Host.Run(t, c); r.Code != exitFailed || !strings.Contains(r.Stderr, "namespace is in use") {
		t.Errorf("exit code %d: %s", r.Code, r.Stderr)
	}
	same(t, "the machine", before, m.network(t)+m.everything(t))
	// Root without the right to make namespaces, as in a container.
	c = m.command("selftest")
	c.Args = append([]string{"setpriv", "--bounding-set", "-sys_admin"}, c.Args...)
	r := m.Host.Run(t, c)
	if r.Code != exitFailed {
		t.Errorf("exit code %d", r.Code)
	}
	oneLine(t, r.Stderr, "cannot copy this machine's network", "operation not permitted")
	nobody := m.command("selftest")
	nobody.UID = 65534
	if r := m.Host.Run(t, nobody); r.Code != exitFailed || !strings.Contains(r.Stderr, "requires root") {
		t.Errorf("exit code %d: %s", r.Code, r.Stderr)
	}
	// A kernel without IPv6.
	m.noIPv6 = true
	for _, row := range m.selftest(t, exitOK).Rows {
		if row.Family != ipv4 {
			t.Errorf("%+v", row)
		}
	}
}
