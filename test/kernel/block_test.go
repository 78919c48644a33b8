package kernel_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// stalls fails unless a session no longer gets answers.
func stalls(t *testing.T, what string, s *lab.Session) {
	t.Helper()
	if err := s.SayWithin("still there?", lab.Brief); err == nil {
		t.Errorf("%s goes on", what)
	}
}

// TestBlock blocks the stranger, whose open session stalls. Replies to connections of the
// server pass, and the client is not affected.
func TestBlock(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 80)
		m.Outsider.Listen(t, 7)
		m.bootstrap(t)
		rules := func() string { return m.rules(t) + m.kept(t) + m.read(t, localINI) }
		before := rules()
		for _, to := range m.Server.Both() {
			stranger := m.Stranger.Like(to)
			s, err := m.Outsider.Dial(stranger, to, 80, lab.Patient)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			client, err := m.Outsider.Dial(m.Client.Like(to), to, 80, lab.Patient)
			if err != nil {
				t.Fatal(err)
			}
			defer client.Close()
			own, err := m.Host.Dial(to, stranger, 7, lab.Patient)
			if err != nil {
				t.Fatal(err)
			}
			defer own.Close()
			r := m.must(t, exitOK, "block", stranger.String())
			says(t, r.Stdout, stranger.String()+" is blocked", "local.ini")
			stalls(t, "the stranger's session", s)
			if err := client.Talk(); err != nil {
				t.Errorf("the client's session: %v", err)
			}
			if err := own.Talk(); err != nil {
				t.Errorf("the server's own session: %v", err)
			}
			if err := m.Host.Reach(to, stranger, 7, lab.Patient); err != nil {
				t.Errorf("a new connection of the server: %v", err)
			}
		}
		m.wantOpen(t, map[string]string{"80/tcp": "client4 client6"})
		says(t, m.must(t, exitOK, "block", m.Stranger.V4.String()).Stdout, "nothing changed", "already blocked")
		says(t, m.must(t, exitOK, "block", "list").Stdout, m.Stranger.V4.String(), m.Stranger.V6.String(), "always")
		if s := m.status(t, exitOK); s.State != "protected" {
			t.Errorf("the state is %s", s.State)
		}
		says(t, m.must(t, exitDrift, "explain", "--from", m.Stranger.V4.String(), "--to", "80/tcp").Stdout, ": drop (/etc/basicfw/local.", "dropped")
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "block", "198.18.0.0/15", "212.0.0.0/6", "2000::/4", "--name", "wide", "--force")
		says(t, m.must(t, exitOK, "selftest").Stdout, "blocked sources")
		m.must(t, exitOK, "unblock", "wide")
		for _, f := range families() {
			if !strings.Contains(m.keptOf(f)+m.read(t, m.keptOf(f)), m.Stranger.V4.String()) && f == ipv4 {
				t.Errorf("the persisted file does not block %v", m.Stranger.V4)
			}
		}
		// What another program removes is drift.
		loaded := m.rules(t)
		m.remove(t, ipv4, "BLOCK", "block-blocked")
		m.must(t, exitDrift, "verify")
		m.must(t, exitOK, "verify", "--repair")
		same(t, "after the repair", loaded, m.rules(t))

		m.must(t, exitOK, "unblock", m.Stranger.V4.String(), m.Stranger.V6.String())
		m.wantOpen(t, map[string]string{"80/tcp": everybody})
		same(t, "after unblock", before, rules())
		m.must(t, exitOK, "block", m.Stranger.V4.String())
		m.must(t, exitOK, "uninstall")
		if text := m.rules(t); strings.Contains(strings.ToLower(text), "basicfw") {
			t.Errorf("after uninstall:\n%s", text)
		}
	})
}

// TestBlockRefused names what must not be blocked. It is refused, or left out with a
// warning, and nothing changes.
func TestBlockRefused(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80)
		m.bootstrap(t)
		m.write(t, "/etc/resolv.conf", "nameserver 198.51.100.53\n", 0o644)
		client := m.Client.V4.String()
		m.write(t, "/var/bad", "# bad ones\n203.0.113.0/24\n\n192.0.2.0/28 ; the client's\n", 0o644)
		before := m.everything(t)
		bad := m.root + "/var/bad"
		for _, x := range []struct {
			arg  string
			code int
			says []string
		}{
			{client, exitFailed, []string{client, "is an allowed SSH source", "--force"}},
			{"192.0.2.0/24", exitFailed, []string{"contains the allowed SSH source " + client, "--force"}},
			{"0.0.0.0/0", exitFailed, []string{"contains every address", "--force"}},
			{bad, exitFailed, []string{bad + ":4", client, "--force"}},
			{"127.0.0.1", exitOK, []string{"is loopback"}},
			{"fe80::/64", exitOK, []string{"is link-local"}},
			{"224.0.0.251", exitOK, []string{"is multicast"}},
			{m.Server.V4.String(), exitOK, []string{"of this host"}},
			{"192.0.2.254", exitOK, []string{"gateway"}},
			{"192.0.2.77", exitOK, []string{"is a network of this host"}},
			{"198.51.100.53", exitOK, []string{"is a DNS resolver"}},
			{"203.0.113.300", exitUsage, []string{"is not an address"}},
			{"203.0.113.7/24", exitUsage, []string{"host bits"}},
			{"/nowhere/list", exitUsage, []string{"no such file"}},
			{"/dev", exitUsage, []string{"not a regular file"}},
			{"/dev/null", exitUsage, []string{"not a regular file"}},
		} {
			r := m.must(t, x.code, "block", x.arg)
			says(t, r.Stderr, x.says...)
			same(t, "after block "+x.arg, before, m.everything(t))
		}
		// Forced, the SSH source is blocked, and stays so.
		s, err := m.Outsider.Dial(m.Client.V4, m.Server.V4, 22, lab.Patient)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		m.must(t, exitOK, "block", client, "--force")
		stalls(t, "the client's session", s)
		m.must(t, exitOK, "open", "8080/tcp")
		stalls(t, "the client's session, after another change,", s)
		m.must(t, exitOK, "unblock", client)
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6"})
	})
}

// TestBlockFor blocks for a time, which the kernel ends.
func TestBlockFor(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 80)
		m.bootstrap(t)
		end := beforeEnd(t, func(length string) time.Time {
			m.must(t, exitOK, "block", m.Stranger.V4.String(), "--for", length)
			return until(t, m.read(t, localINI))
		}, func() error {
			const others = "client4 client6 stranger6"
			if got := m.reached("80/tcp", others, time.Second); got != others {
				return fmt.Errorf("port 80 is reached by %q", got)
			}
			return nil
		})
		waitFor(t, end)
		m.wantOpen(t, map[string]string{"80/tcp": everybody})
		m.must(t, exitOK, "block", "203.0.113.9")
		if strings.Contains(m.read(t, localINI), m.Stranger.V4.String()) {
			t.Error("the expired entry stays in local.ini")
		}
	})
}

// TestBlockLists blocks lists of the settings and of files: plain rules in iptables as long
// as there are few.
func TestBlockLists(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 80)
		m.bootstrap(t)
		var text strings.Builder
		for i := range 400 {
			fmt.Fprintf(&text, "10.%d.%d.0/25\n", i>>8, i&255)
		}
		m.write(t, "/etc/basicfw/list", text.String()+"nonsense\n"+m.Stranger.V6.String()+"\n"+m.Client.V4.String()+"\n", 0o644)
		m.write(t, agentINI, "[block]\nbad = file:/etc/basicfw/list\nother = 203.0.113.0/24, "+m.Stranger.V4.String()+"\n", 0o640)
		r := m.must(t, exitOK, "apply")
		says(t, r.Stderr, "/etc/basicfw/list:401", "nonsense", "/etc/basicfw/list:403", "the entry has no effect")
		m.wantOpen(t, map[string]string{"80/tcp": "client4 client6"})
		want := 400 * 2 // in filter and in mangle
		if m.netlink {
			want = 400 // as one set
		}
		if n := strings.Count(m.rules(t), "/25"); n != want {
			t.Errorf("%d networks are loaded, want %d", n, want)
		}
		m.must(t, exitOK, "verify")
		says(t, m.must(t, exitOK, "block", "list").Stdout, "401 networks of /etc/basicfw/list", "203.0.113.0/24")
		m.must(t, exitOK, "unblock", "other")
		m.wantOpen(t, map[string]string{"80/tcp": "client4 client6 stranger4"})
		says(t, m.read(t, localINI), "other = none")
		m.must(t, exitOK, "selftest")
	})
}

// TestBlockFollowed changes a list while the service runs. Other settings that changed take
// no effect.
func TestBlockFollowed(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 80, 8080)
		const list = "/srv/lists/bad"
		path := m.root + list
		m.write(t, list, "203.0.113.7\n", 0o644)
		m.write(t, agentINI, "[block]\nbad = file:"+path+"\n", 0o640)
		m.bootstrap(t)
		m.startService(t, m.command("run"))
		m.write(t, agentINI, "[block]\nbad = file:"+path+"\n[open]\nother = 8080/tcp\n", 0o640)
		blocked := func(text, want string) {
			t.Helper()
			m.write(t, list, text, 0o644)
			lab.Poll(t, "the list to be followed", func() bool {
				return m.reached("80/tcp", want, lab.Brief) == want
			})
		}
		both := m.Stranger.V4.String() + "\n" + m.Stranger.V6.String() + "\n"
		blocked(both, "client4 client6")
		blocked("nonsense\n"+m.Client.V4.String()+"\n"+m.Stranger.V4.String()+"\n", "client4 client6 stranger6")
		blocked("# nothing\n", everybody)
		blocked(both, "client4 client6")
		// A list that is gone stays in effect.
		m.Host.MustRun(t, "mv", path, path+".old")
		m.Host.MustRun(t, "mkfifo", path)
		m.wantOpen(t, map[string]string{"80/tcp": "client4 client6", "8080/tcp": nobody})
	})
}

// TestBlockMany blocks 100,000 networks with nftables, in one set.
func TestBlockMany(t *testing.T) {
	on(t, variants[2:], func(t *testing.T, m *machine) {
		m.Host.Listen(t, 80)
		m.bootstrap(t)
		var text strings.Builder
		for i := range 100_000 { // with gaps, so that they do not merge
			fmt.Fprintf(&text, "%d.%d.%d.%d/30\n", 20+i>>16, i>>8&255, i&255, i%31*8)
		}
		text.WriteString(m.Stranger.String())
		m.write(t, "/var/many", strings.ReplaceAll(text.String(), ",", "\n"), 0o644)
		begin := time.Now()
		m.must(t, exitOK, "block", m.root+"/var/many")
		t.Logf("block: %v", time.Since(begin))
		m.wantOpen(t, map[string]string{"80/tcp": "client4 client6"})
		for _, args := range [][]string{{"verify"}, {"status"}, {"open", "81/tcp"}, {"exposure"}, {"block", "203.0.113.9"}} {
			begin = time.Now()
			m.must(t, exitOK, args...)
			t.Logf("%v: %v", args, time.Since(begin))
		}
		m.nft(t, "flush set inet basicfw ipv4-block-many")
		m.must(t, exitDrift, "verify")
		begin = time.Now()
		m.must(t, exitOK, "verify", "--repair")
		t.Logf("repair: %v", time.Since(begin))
		m.wantOpen(t, map[string]string{"80/tcp": "client4 client6"})
		begin = time.Now()
		m.must(t, exitOK, "unblock", "many")
		t.Logf("unblock: %v", time.Since(begin))
		m.wantOpen(t, map[string]string{"80/tcp": everybody})
	})
}

// TestBlockSets blocks more networks than iptables may have rules for. They are a set of
// ipset, which no persisted file names. Without ipset, the list is refused.
func TestBlockSets(t *testing.T) {
	onBoth(t, func(t *testing.T, m *machine) {
		lab.NeedTools(t, "ipset")
		m.Host.Listen(t, 80)
		m.write(t, agentINI, "[agent]\nbackend = iptables\n", 0o640)
		m.bootstrap(t)
		ipset := func(args ...string) string { return m.Host.MustRun(t, append([]string{"ipset"}, args...)...) }
		list := func(n int) {
			var text strings.Builder
			for i := range n {
				fmt.Fprintf(&text, "10.%d.%d.0/25\n", i>>8, i&255)
			}
			m.write(t, "/var/many", text.String()+strings.ReplaceAll(m.Stranger.String(), ",", "\n")+"\n", 0o644)
		}
		list(2000)
		m.must(t, exitOK, "block", m.root+"/var/many")
		m.wantOpen(t, map[string]string{"80/tcp": "client4 client6"})
		set := strings.Fields(ipset("list", "-n"))
		if len(set) != 1 {
			t.Fatalf("sets %v", set)
		}
		if text := m.kept(t); strings.Contains(text, "match-set") || !strings.Contains(text, "# basicfw-agent: the 2001 networks of block-many") {
			t.Errorf("the persisted files:\n%s", text)
		}
		m.must(t, exitOK, "verify")
		if s := m.status(t, exitOK); s.State != "protected" {
			t.Errorf("the state is %s", s.State)
		}
		m.must(t, exitOK, "open", "81/tcp")
		ipset("flush", set[0])
		m.must(t, exitDrift, "verify")
		m.must(t, exitOK, "verify", "--repair")
		m.wantOpen(t, map[string]string{"80/tcp": "client4 client6"})
		list(1000)
		m.must(t, exitOK, "block", m.root+"/var/many")
		m.must(t, exitOK, "block", "203.0.113.9")
		if now := strings.Fields(ipset("list", "-n")); len(now) != 1 || now[0] == set[0] {
			t.Errorf("sets %v", now)
		}
		m.must(t, exitOK, "unblock", "many")
		m.wantOpen(t, map[string]string{"80/tcp": everybody})
		m.must(t, exitOK, "block", m.root+"/var/many")
		m.must(t, exitOK, "uninstall")
		if now := ipset("list", "-n"); now != "" {
			t.Errorf("after uninstall, sets %s", now)
		}

		m.write(t, agentINI, "[agent]\nbackend = iptables\n", 0o640)
		m.bootstrap(t)
		m.broken(t, "ipset")
		before := m.everything(t)
		r := m.must(t, exitFailed, "block", m.root+"/var/many")
		says(t, r.Stderr, "ipset", "backend = nftables")
		same(t, "after the refusal", before, m.everything(t))
	})
}
