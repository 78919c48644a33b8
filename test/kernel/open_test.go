package kernel_test

import (
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

const (
	agentINI = "/etc/basicfw/agent.ini"
	localINI = "/etc/basicfw/local.ini"
)

// The addresses that reach a port: the client's and the stranger's, over both families.
const (
	everybody = "client4 client6 stranger4 stranger6"
	nobody    = ""
)

// reached returns the addresses that get an answer from a port ("80/tcp"). Those in want
// have wait to get it.
func (m *machine) reached(port, want string, wait time.Duration) string {
	number, proto, _ := strings.Cut(port, "/")
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil {
		panic(err)
	}
	reach := m.Outsider.Reach
	if proto == "udp" {
		reach = m.Outsider.ReachUDP
	}
	tries := []struct {
		name     string
		from, to netip.Addr
	}{
		{"client4", m.Client.V4, m.Server.V4},
		{"client6", m.Client.V6, m.Server.V6},
		{"stranger4", m.Stranger.V4, m.Server.V4},
		{"stranger6", m.Stranger.V6, m.Server.V6},
	}
	answered := make([]string, len(tries))
	var wg sync.WaitGroup
	for i, try := range tries {
		wg.Add(1)
		go func() {
			defer wg.Done()
			wait := wait
			if !slices.Contains(strings.Fields(want), try.name) {
				wait = lab.Brief
			}
			err := reach(try.from, try.to, uint16(n), wait)
			// A listener that is not the lab's has another greeting.
			if err == nil || strings.Contains(err.Error(), "heard") {
				answered[i] = try.name
			}
		}()
	}
	wg.Wait()
	return strings.Join(slices.DeleteFunc(answered, func(s string) bool { return s == "" }), " ")
}

// wantOpen fails unless exactly the wanted addresses reach the ports.
func (m *machine) wantOpen(t *testing.T, want map[string]string) {
	t.Helper()
	var wg sync.WaitGroup
	got := make(chan string, len(want))
	for port, who := range want {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if answered := m.reached(port, who, lab.Patient); answered != who {
				got <- fmt.Sprintf("%s: reached by %q, want %q", port, answered, who)
			}
		}()
	}
	wg.Wait()
	close(got)
	for msg := range got {
		t.Error(msg)
	}
}

// setting returns the value of a key in a settings file, "" if it is missing.
func setting(text, section, key string) string {
	in := ""
	for _, line := range strings.Split(text, "\n") {
		if i := strings.IndexAny(line, ";#"); i >= 0 {
			line = line[:i]
		}
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			in = strings.Trim(line, "[]")
			continue
		}
		if name, value, ok := strings.Cut(line, "="); ok && in == section && strings.TrimSpace(name) == key {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// wantSetting fails unless a key of local.ini has the value. An address may be written as a
// network of one.
func (m *machine) wantSetting(t *testing.T, section, key, want string) {
	t.Helper()
	got := setting(m.read(t, localINI), section, key)
	if regexp.MustCompile(`/(32|128)\b`).ReplaceAllString(got, "") != want {
		t.Errorf("local.ini has %s.%s = %q, want %q", section, key, got, want)
	}
}

// until returns the end time of a setting, "... until TIME".
func until(t *testing.T, value string) time.Time {
	t.Helper()
	_, text, _ := strings.Cut(value, "until ")
	text, _, _ = strings.Cut(text, ",")
	text, _, _ = strings.Cut(text, "\n")
	end, err := time.Parse("2006-01-02T15:04:05Z", strings.TrimSpace(text))
	if err != nil {
		t.Fatalf("no end in %q: %v", value, err)
	}
	return end
}

// settled returns the rules and the settings, which a change and its reverse leave
// unchanged. The state holds times and may differ.
func (m *machine) settled(t *testing.T) string {
	t.Helper()
	return m.rules(t) + "\n" + m.tree(t, false, "etc")
}

// untouched runs a command that has nothing to do. No file may be written and no rule
// loaded. Port 80, which has to be open, is visited before: the counters of a loaded rule
// start from zero.
func (m *machine) untouched(t *testing.T, args ...string) lab.Result {
	t.Helper()
	for _, to := range m.Server.Both() {
		if err := m.Outsider.Reach(m.Stranger.Like(to), to, 80, lab.Patient); err != nil {
			t.Fatal(err)
		}
	}
	look := func() string {
		t.Helper()
		s := m.rules(t) + "\n" + m.tree(t, true, "etc", "var")
		for _, family := range families() {
			count := m.count(t, family, "http")
			if count == "[0:0]" {
				t.Fatalf("%s: a visit to port 80 is not counted", family)
			}
			s += "\n" + family + ": the counter of port 80 is " + count
		}
		return s
	}
	before := look()
	r := m.agent(t, args...)
	if r.Code != exitOK || !strings.HasPrefix(r.Stdout, "nothing changed") {
		t.Errorf("%v: exit code %d, want %d and \"nothing changed\" first\nstdout: %s\nstderr: %s", args, r.Code, exitOK, r.Stdout, r.Stderr)
	}
	same(t, fmt.Sprintf("after %v, which has nothing to do", args), before, look())
	return r
}

// refused runs a command that has to fail with one line and perhaps a hint, which have all
// the words, and change nothing.
func (m *machine) refused(t *testing.T, code int, args []string, words ...string) {
	t.Helper()
	before := m.everything(t)
	r := m.agent(t, args...)
	if r.Code != code {
		t.Errorf("%q: exit code %d, want %d\nstdout: %s\nstderr: %s", args, r.Code, code, r.Stdout, r.Stderr)
	}
	oneLine(t, r.Stderr, words...)
	same(t, fmt.Sprintf("after the refused %q", args), before, m.everything(t))
}

// openNames returns the services that status lists as open.
func (s status) openNames() []string {
	var names []string
	for _, o := range s.Open {
		names = append(names, o.Name)
	}
	return names
}

// TestOpen opens ports in every supported way, and closes them again.
func TestOpen(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 5432, 7000, 7001, 7002, 7003, 8080)
		m.Host.ListenUDP(t, 9000, 40050)
		m.bootstrap(t)
		before := m.settled(t)
		steps := []struct {
			args        string
			port, who   string
			name, value string // in local.ini
			warning     string
			close       string
		}{
			{args: "8080/tcp", port: "8080/tcp", who: everybody, name: "tcp-8080", value: "8080/tcp", close: "8080/tcp"},
			{args: "5432/tcp --from 192.0.2.0/24 --name db", port: "5432/tcp", who: "client4",
				name: "db", value: "5432/tcp from 192.0.2.0/24", close: "db"},
			{args: "7000/tcp --on public --name pub", port: "7000/tcp", who: everybody,
				name: "pub", value: "7000/tcp on public", close: "7000/tcp --on public"},
			{args: "7001/tcp --on private", port: "7001/tcp", who: nobody, // no such interface exists
				name: "tcp-7001", value: "7001/tcp on private", warning: "private", close: "tcp-7001"},
			{args: "7002/tcp --on eth0 --from 2001:db8:0:2::/64,198.51.100.20", port: "7002/tcp", who: "stranger4 stranger6",
				name: "tcp-7002", value: "7002/tcp on eth0 from 2001:db8:0:2::/64, 198.51.100.20", close: "7002/tcp"},
			{args: "7003/tcp --on eth7", port: "7003/tcp", who: nobody, // it may appear
				name: "tcp-7003", value: "7003/tcp on eth7", warning: "eth7", close: "7003/tcp"},
			{args: "9000/udp", port: "9000/udp", who: everybody, name: "udp-9000", value: "9000/udp", close: "9000/udp"},
			{args: "40000-40100/udp", port: "40050/udp", who: everybody,
				name: "udp-40000-40100", value: "40000-40100/udp", close: "40000-40100/udp"},
		}
		closed, open := map[string]string{"80/tcp": everybody}, map[string]string{"80/tcp": everybody}
		for _, s := range steps {
			closed[s.port], open[s.port] = nobody, s.who
		}
		m.wantOpen(t, closed)
		for _, s := range steps {
			args := append([]string{"open"}, strings.Fields(s.args)...)
			r := m.must(t, exitOK, args...)
			says(t, r.Stdout, args[1], localINI)
			if s.warning == "" && r.Stderr != "" {
				t.Errorf("%s: on stderr: %s", s.args, r.Stderr)
			} else if s.warning != "" {
				oneLine(t, r.Stderr, s.warning)
			}
			m.wantSetting(t, "open", s.name, s.value)
			m.untouched(t, args...)
		}
		m.wantOpen(t, open)
		for _, to := range m.Server.Both() {
			want := append(webAndMail(), 7000, 7002, 8080)
			for port, p := range m.Outsider.Nmap(t, m.Stranger.Like(to), to, "1-10000") {
				if port != 0 && !slices.Contains(want, port) || port == 0 && !p.Silent() {
					t.Errorf("a stranger's scan of %v finds port %d %v", to, port, p)
				}
			}
		}
		s := m.status(t, exitOK)
		for _, step := range steps {
			i := slices.Index(s.openNames(), step.name)
			if i < 0 {
				t.Errorf("status does not have %s as open: %v", step.name, s.openNames())
				continue
			}
			if o := s.Open[i]; !strings.HasPrefix(o.Source, localINI+":") || o.Ports+"/"+o.Proto != strings.Fields(step.value)[0] {
				t.Errorf("status has for %s: %+v", step.name, o)
			}
		}
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "plan", "--exit-code")
		m.must(t, exitOK, "apply")
		m.wantOpen(t, map[string]string{"8080/tcp": everybody, "5432/tcp": "client4"})

		for _, s := range steps {
			args := append([]string{"close"}, strings.Fields(s.close)...)
			if r := m.must(t, exitOK, args...); r.Stdout == "" || r.Stderr != "" {
				t.Errorf("%v: prints %q and %q", args, r.Stdout, r.Stderr)
			}
		}
		same(t, "rules and settings after closing all", before, m.settled(t))
		m.wantOpen(t, closed)
		m.untouched(t, "close", "8080/tcp")
	})
}

// TestOpenOverlapping opens ports that overlap with what is already open.
func TestOpenOverlapping(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 80, 5432)
		m.bootstrap(t)
		before := m.settled(t)
		do := func(command string) lab.Result {
			t.Helper()
			return m.must(t, exitOK, strings.Fields(command)...)
		}
		nothing := func(command string, words ...string) {
			t.Helper()
			says(t, m.untouched(t, strings.Fields(command)...).Stdout, words...)
		}

		// An end, another one, none: in the kernel and in the files.
		rules := func() string {
			return m.rules(t) + m.kept(t)
		}
		for _, hours := range []time.Duration{1, 2} {
			from := time.Now().Add(hours * time.Hour)
			do(fmt.Sprintf("open 8081/tcp --for %dh", hours))
			to := time.Now().Add(hours * time.Hour)
			value := setting(m.read(t, localINI), "open", "tcp-8081")
			end := until(t, value)
			if end.Before(from.Add(-time.Second)) || end.After(to.Add(time.Second)) || !strings.HasPrefix(value, "8081/tcp until ") {
				t.Errorf("open for %d hours from %v: local.ini has %q", hours, from.Add(-hours*time.Hour).UTC(), value)
			}
			// In the kernel and in the files, of both families, for INPUT and what is published.
			if n := m.timed(rules()); n != 8 || strings.Count(rules(), m.ends(end)) != 8 {
				t.Errorf("want the end in all rules and files:\n%s", rules())
			}
		}
		if n := strings.Count(m.read(t, localINI), "8081"); n != 2 { // name and value
			t.Errorf("local.ini after the end was changed:\n%s", m.read(t, localINI))
		}
		// The kernel's clock is UTC, whatever the caller's time zone.
		c := m.command("open", "8081/tcp", "--for", "3h")
		c.Env = append(c.Env, "TZ=Asia/Kolkata")
		if r := m.Host.Run(t, c); r.Code != exitOK {
			t.Fatal(r.Stderr)
		}
		end := until(t, setting(m.read(t, localINI), "open", "tcp-8081"))
		if in := time.Until(end); in < 2*time.Hour || in > 3*time.Hour || strings.Count(rules(), m.ends(end)) != 8 {
			t.Errorf("the end is in %v:\n%s", in, rules())
		}
		m.must(t, exitOK, "verify")
		do("open 8081/tcp")
		m.wantSetting(t, "open", "tcp-8081", "8081/tcp")
		if m.timed(rules()) > 0 {
			t.Errorf("opened without an end, the rules have one:\n%s", rules())
		}
		nothing("open 8081/tcp")

		// A wider service is already open.
		do("open 40000-40100/tcp")
		nothing("open 40050/tcp", "40000-40100")
		nothing("open 80/tcp", "http")
		nothing("open 80/tcp --from 203.0.113.9", "http")
		nothing("open 80/tcp --on eth0", "http")
		nothing("open 80/tcp --for 1h", "http")
		// The existing one is temporary, the new one permanent.
		do("open 8082/tcp --for 1h")
		do("open 8082/tcp --from 203.0.113.9 --name later")
		m.wantSetting(t, "open", "later", "8082/tcp from 203.0.113.9")
		do("close 8082/tcp")
		m.wantSetting(t, "open", "later", "")
		m.wantSetting(t, "open", "tcp-8082", "")

		// Names.
		m.refused(t, exitUsage, []string{"open", "8085/tcp", "--name", "http"}, "http", "80/tcp")
		m.refused(t, exitUsage, []string{"open", "8085/tcp", "--name", "tcp-8081"}, "tcp-8081", "8081/tcp")
		do("open 8443/tcp --name tcp-9999")
		do("open 9999/tcp")
		m.wantSetting(t, "open", "tcp-9999", "8443/tcp")
		m.wantSetting(t, "open", "tcp-9999-2", "9999/tcp")

		// Sources of one port, one by one.
		client, stranger := m.Client.V4.String(), m.Stranger.V4.String()
		do("open 5432/tcp --from " + client)
		do("open 5432/tcp --from " + stranger)
		m.wantOpen(t, map[string]string{"5432/tcp": "client4 stranger4"})
		do("close 5432/tcp --from " + client)
		m.wantOpen(t, map[string]string{"5432/tcp": "stranger4"})
		nothing("close 5432/tcp --from " + client)
		do("close 5432/tcp --from " + stranger)
		if text := m.read(t, localINI); strings.Contains(text, "5432") {
			t.Errorf("the entry should be removed with its last source:\n%s", text)
		}
		do("open 5433/tcp --name two --from " + client + "," + stranger)
		do("close 5433/tcp --from " + client)
		m.wantSetting(t, "open", "two", "5433/tcp from "+stranger)
		do("close 5433/tcp --from " + stranger)
		m.wantSetting(t, "open", "two", "")

		// Zones of one port.
		do("open 7000/tcp --on public --name a7")
		do("open 7000/tcp --on private --name b7")
		do("close 7000/tcp --on private")
		m.wantSetting(t, "open", "a7", "7000/tcp on public")
		m.wantSetting(t, "open", "b7", "")
		do("open 7000/tcp --on private --name b7")
		do("close 7000/tcp --name b7")
		m.wantSetting(t, "open", "a7", "7000/tcp on public")
		m.wantSetting(t, "open", "b7", "")
		do("open 7000/tcp --on private --name b7")
		do("close 7000/tcp")
		m.wantSetting(t, "open", "a7", "")
		m.wantSetting(t, "open", "b7", "")

		m.refused(t, exitUsage, []string{"close", "40050/tcp"}, "40000-40100")
		nothing("close 40000-40100/udp")
		nothing("close 31337/tcp")

		for _, port := range []string{"8081/tcp", "40000-40100/tcp", "8443/tcp", "9999/tcp"} {
			do("close " + port)
		}
		same(t, "rules and settings after closing all", before, m.settled(t))
	})
}

// beforeEnd starts something temporary and checks it before its end. If a busy machine
// leaves no time for that, the duration is doubled.
func beforeEnd(t *testing.T, start func(length string) (end time.Time), look func() error) (end time.Time) {
	t.Helper()
	for length := 2 * time.Second; ; length *= 2 {
		end := start(length.String())
		err := look()
		if time.Now().Before(end) || length > 20*time.Second {
			if err != nil {
				t.Errorf("before the end: %v", err)
			}
			return end
		}
	}
}

// waitFor waits until an end has passed for the kernel, too: it counts whole seconds, the
// last one included.
func waitFor(t *testing.T, end time.Time) {
	t.Helper()
	over := end.Add(time.Second + 50*time.Millisecond)
	if wait := time.Until(over); wait > 30*time.Second {
		t.Fatalf("the end is in %v", wait)
	}
	lab.Poll(t, "the end", func() bool { return time.Now().After(over) })
}

// restart is a boot that loads the persisted files only.
func (m *machine) restart(t *testing.T) {
	t.Helper()
	m.reboot(t)
	m.loadKept(t, m)
}

// TestOpenFor opens ports for a limited time. They have to close without a service, also
// after a boot in between.
func TestOpenFor(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		ports := map[string]string{"8080/tcp": everybody, "9000/udp": everybody, "5432/tcp": "client4"}
		closed := map[string]string{"80/tcp": everybody}
		m.Host.Listen(t, 80, 8080, 5432)
		m.Host.ListenUDP(t, 9000)
		m.bootstrap(t)
		before := m.rules(t)
		for port := range ports {
			closed[port] = nobody
		}
		m.wantOpen(t, closed)

		look := func() error {
			for _, port := range slices.Sorted(maps.Keys(ports)) {
				if got := m.reached(port, ports[port], time.Second); got != ports[port] {
					return fmt.Errorf("%s is reached by %q, want %q", port, got, ports[port])
				}
			}
			return nil
		}
		end := beforeEnd(t, func(length string) time.Time {
			m.must(t, exitOK, "open", "9000/udp", "--for", length)
			m.must(t, exitOK, "open", "5432/tcp", "--for", length, "--name", "db", "--from", "192.0.2.0/24")
			// It starts last, and ends no sooner than the others.
			says(t, m.must(t, exitOK, "open", "8080/tcp", "--for", length).Stdout, "8080/tcp", localINI)
			first := setting(m.read(t, localINI), "open", "udp-9000")
			if first == "" { // a later command has removed it
				return time.Time{}
			}
			return until(t, first)
		}, func() error {
			if err := look(); err != nil {
				return err
			}
			m.restart(t)
			if err := look(); err != nil {
				return fmt.Errorf("after a boot: %w", err)
			}
			return nil
		})
		for _, name := range []string{"udp-9000", "db", "tcp-8080"} {
			if e := until(t, setting(m.read(t, localINI), "open", name)); e.After(end) {
				end = e
			}
		}
		waitFor(t, end)
		over := func(when string) {
			t.Helper()
			m.wantOpen(t, closed)
			s := m.status(t, exitOK)
			if s.State != "protected" || len(s.Drift) != 0 {
				t.Errorf("%s: state %q, drift %v", when, s.State, s.Drift)
			}
			for _, name := range []string{"tcp-8080", "udp-9000", "db"} {
				if slices.Contains(s.openNames(), name) {
					t.Errorf("%s: status has %s as open", when, name)
				}
			}
			if text := m.must(t, exitOK, "status").Stdout; regexp.MustCompile(`(?m)^open .*(8080|9000|5432)`).MatchString(text) {
				t.Errorf("%s: status prints them as open:\n%s", when, text)
			}
			m.must(t, exitOK, "verify")
		}
		over("after the end")
		m.restart(t)
		over("after the end and a boot")

		// An expired entry does not prevent the same one.
		m.must(t, exitOK, "open", "5432/tcp", "--for", "1h", "--name", "db", "--from", "192.0.2.0/24")
		m.must(t, exitOK, "close", "db")
		m.must(t, exitOK, "open", "8080/tcp")
		m.wantSetting(t, "open", "tcp-8080", "8080/tcp")
		m.wantOpen(t, map[string]string{"8080/tcp": everybody})
		m.must(t, exitOK, "close", "8080/tcp")
		// The next command that writes removes expired entries.
		m.must(t, exitOK, "open", "8081/tcp")
		for _, name := range []string{"tcp-8080", "udp-9000", "db"} {
			m.wantSetting(t, "open", name, "")
		}
		m.must(t, exitOK, "close", "8081/tcp")
		same(t, "rules after a command has removed expired entries", before, m.rules(t))
		m.must(t, exitOK, "verify")
	})
}

// TestCloseProfile closes services of the profile and of the administrator's settings, and
// opens them again.
func TestCloseProfile(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		const own = "; ours\n[open]\n; the database\ndb = 5432/tcp from 192.0.2.0/24\nalt = 8080/tcp ; of the shop\n"
		m.write(t, agentINI, own, 0o640)
		m.Host.Listen(t, 22, 25, 80, 443, 5432, 8080)
		m.bootstrap(t)
		before, owner := m.settled(t), m.tree(t, true, "etc/basicfw/agent.ini")
		open := map[string]string{"25/tcp": everybody, "80/tcp": everybody, "443/tcp": everybody, "5432/tcp": "client4", "8080/tcp": everybody}
		m.wantOpen(t, open)

		for _, c := range []struct {
			close, name, port string
			words             []string
		}{
			{"80/tcp", "http", "80/tcp", []string{"http", "profile web-only"}},
			{"smtp", "smtp", "25/tcp", []string{"smtp", "profile web+mail"}},
			{"5432/tcp", "db", "5432/tcp", []string{"db", agentINI}},
			{"alt", "alt", "8080/tcp", []string{"alt", agentINI}},
		} {
			says(t, m.must(t, exitOK, "close", c.close).Stdout, c.words...)
			m.wantSetting(t, "open", c.name, "closed")
			open[c.port] = nobody
		}
		m.wantOpen(t, open)
		s := m.status(t, exitOK)
		for _, name := range []string{"http", "smtp", "db", "alt"} {
			if slices.Contains(s.openNames(), name) {
				t.Errorf("status has %s as open", name)
			}
		}
		if !slices.Contains(s.openNames(), "https") {
			t.Errorf("status does not have https as open: %v", s.openNames())
		}
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "plan", "--exit-code")
		// Again, by port and by name.
		rules, files := m.rules(t), m.tree(t, true, "etc", "var")
		for _, what := range []string{"80/tcp", "http", "25/tcp", "db", "8080/tcp"} {
			if r := m.must(t, exitOK, "close", what); !strings.HasPrefix(r.Stdout, "nothing changed") {
				t.Errorf("close %s again prints %q", what, r.Stdout)
			}
		}
		same(t, "rules after closing again", rules, m.rules(t))
		same(t, "files after closing again", files, m.tree(t, true, "etc", "var"))
		m.restart(t)
		m.wantOpen(t, map[string]string{"80/tcp": nobody, "443/tcp": everybody})

		for _, port := range []string{"80/tcp", "25/tcp", "8080/tcp"} {
			m.must(t, exitOK, "open", port)
		}
		m.must(t, exitOK, "open", "5432/tcp", "--from", "192.0.2.0/24")
		for _, name := range []string{"http", "smtp", "alt", "db"} {
			m.wantSetting(t, "open", name, "")
		}
		same(t, "rules and settings after opening all again", before, m.settled(t))
		same(t, "the administrator's file", owner, m.tree(t, true, "etc/basicfw/agent.ini"))
		m.wantOpen(t, map[string]string{"80/tcp": everybody, "25/tcp": everybody, "8080/tcp": everybody, "5432/tcp": "client4"})

		// Opened again, but differently.
		m.must(t, exitOK, "close", "80/tcp")
		m.must(t, exitOK, "open", "80/tcp", "--from", m.Client.V4.String())
		m.must(t, exitOK, "close", "db")
		m.must(t, exitOK, "open", "5432/tcp")
		m.wantOpen(t, map[string]string{"80/tcp": "client4", "5432/tcp": everybody})
	})
}

// handWritten is a local.ini that is maintained by hand.
const handWritten = `; What this shop adds.
[open]  ; ports
shop = 8443/tcp ; the checkout
# the database
db   =   5432/tcp from 192.0.2.0/24, 203.0.113.0/24	; two offices

[ssh] # who
; the office first
allow = client, 203.0.113.50  ; home
client_ip = 192.0.2.10, 2001:db8:0:1::10 ; me

; and the profile
[agent]
profile = web+mail
; the end
`

// TestHandWritten runs commands that change a hand-written file. Everything else has to
// stay exactly as it was.
func TestHandWritten(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	m.write(t, localINI, handWritten, 0o600)
	m.must(t, exitOK, "bootstrap", "--no-service")
	same(t, "local.ini after bootstrap", handWritten, m.read(t, localINI))
	rules := m.rules(t)

	const allow = "allow = client, 203.0.113.50  ; home"
	for _, c := range []struct {
		command   string
		gone, new string // patterns of lines
	}{
		{"open 8080/tcp", "", `^tcp-8080 = 8080/tcp$`},
		{"close 8080/tcp", `^tcp-8080 = 8080/tcp$`, ""},
		{"open 8081/tcp --for 1h", "", `^tcp-8081 = 8081/tcp until \S+Z$`},
		{"open 8081/tcp --for 2h", `^tcp-8081 = 8081/tcp until \S+Z$`, `^tcp-8081 = 8081/tcp until \S+Z$`},
		{"close tcp-8081", `^tcp-8081 = 8081/tcp until \S+Z$`, ""},
		{"close 80/tcp", "", `^http = closed$`},
		{"open 80/tcp", `^http = closed$`, ""},
		{"ssh allow 203.0.113.60", `^allow = client, 203\.0\.113\.50  ; home$`, `^allow = client, 203\.0\.113\.50, 203\.0\.113\.60\s+; home$`},
		{"ssh remove 203.0.113.60", `^allow = client, 203\.0\.113\.50, 203\.0\.113\.60\s+; home$`, `^` + regexp.QuoteMeta(allow) + `$`},
	} {
		before := m.read(t, localINI)
		m.must(t, exitOK, strings.Fields(c.command)...)
		onlyLines(t, c.command, before, m.read(t, localINI), c.gone, c.new)
	}
	same(t, "local.ini after all commands", handWritten, m.read(t, localINI))
	same(t, "rules after all commands", rules, m.rules(t))

	m.must(t, exitOK, "close", "5432/tcp", "--from", "203.0.113.0/24")
	before := strings.Split(handWritten, "\n")
	got := strings.Split(m.read(t, localINI), "\n")
	if len(got) != len(before) || !regexp.MustCompile(`^db\s+=\s+5432/tcp from 192\.0\.2\.0/24\s+; two offices$`).MatchString(got[4]) {
		t.Errorf("local.ini after a source was removed:%s", difference(handWritten, strings.Join(got, "\n")))
	} else {
		before[4], got[4] = "", ""
		same(t, "other lines of local.ini", strings.Join(before, "\n"), strings.Join(got, "\n"))
	}
	m.must(t, exitOK, "close", "5432/tcp")
	want := slices.Delete(strings.Split(handWritten, "\n"), 4, 5)
	same(t, "local.ini after the entry was removed", strings.Join(want, "\n"), m.read(t, localINI))
}

// onlyLines fails if a text changed in more than one removed and one added line. Both are
// given by patterns; "" is none.
func onlyLines(t *testing.T, what, before, after, gone, new string) {
	t.Helper()
	old, now := strings.Split(before, "\n"), strings.Split(after, "\n")
	for len(old) > 0 && len(now) > 0 && old[0] == now[0] {
		old, now = old[1:], now[1:]
	}
	for len(old) > 0 && len(now) > 0 && old[len(old)-1] == now[len(now)-1] {
		old, now = old[:len(old)-1], now[:len(now)-1]
	}
	is := func(lines []string, pattern string) bool {
		return pattern == "" && len(lines) == 0 ||
			pattern != "" && len(lines) == 1 && regexp.MustCompile(pattern).MatchString(lines[0])
	}
	if !is(old, gone) || !is(now, new) {
		t.Errorf("%s: local.ini lost %q and got %q; want %q and %q", what, old, now, gone, new)
	}
}

// TestOpenRefused runs commands with invalid arguments.
func TestOpenRefused(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	for _, command := range []string{"open 8080/tcp", "close 8080/tcp", "close http", "ssh allow 203.0.113.50", "ssh remove 203.0.113.50", "ssh list"} {
		m.refused(t, exitNotBootstrapped, strings.Fields(command), "bootstrap")
	}
	m.bootstrap(t)
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"open"}, []string{"8080/tcp"}},
		{[]string{"open", "8080"}, []string{"8080/tcp"}},
		{[]string{"open", "40000:40100"}, []string{"40000-40100/tcp"}},
		{[]string{"open", "0/tcp"}, []string{"0/tcp"}},
		{[]string{"open", "70000/tcp"}, []string{"70000"}},
		{[]string{"open", "200-100/tcp"}, []string{"200-100"}},
		{[]string{"open", "80/dccp"}, []string{"dccp"}},
		{[]string{"open", "8080/tcp -j ACCEPT"}, nil},
		{[]string{"open", "8080/tcp\n[agent]\nprofile = web-only"}, nil},
		{[]string{"open", "8080/tcp from 203.0.113.9"}, nil},
		{[]string{"open", "22/tcp"}, []string{"22", "ssh allow"}},
		{[]string{"open", "20-30/tcp"}, []string{"22", "ssh allow"}},
		{[]string{"open", "22/tcp", "--from", "203.0.113.9"}, []string{"ssh allow"}},
		{[]string{"open", "8080/tcp", "--on", "dmz"}, []string{"dmz"}},
		{[]string{"open", "8080/tcp", "--on", "-j"}, nil},
		{[]string{"open", "8080/tcp", "--on", "eth0 from 203.0.113.9"}, nil},
		{[]string{"open", "8080/tcp", "--on", "an-interface-of-more-letters"}, nil},
		{[]string{"open", "8080/tcp", "--name", "A B"}, []string{"A B"}},
		{[]string{"open", "8080/tcp", "--name", "Shop"}, []string{"Shop"}},
		{[]string{"open", "8080/tcp", "--name", "ssh-drop"}, []string{"ssh-drop"}},
		{[]string{"open", "8080/tcp", "--name", "a-name-of-21-letters-"}, nil},
		{[]string{"open", "8080/tcp", "--name", "x = 1/tcp\ny"}, nil},
		{[]string{"open", "8080/tcp", "--from", "198.51.100.7/24"}, []string{"198.51.100.0/24"}},
		{[]string{"open", "8080/tcp", "--from", "office.example.com"}, []string{"office.example.com"}},
		{[]string{"open", "8080/tcp", "--from", "203.0.113.9 until 2030-01-01T00:00:00Z"}, nil},
		{[]string{"open", "8080/tcp", "--from", "203.0.113.9;x"}, nil},
		{[]string{"open", "8080/tcp", "--for"}, []string{"--for"}},
		{[]string{"open", "8080/tcp", "--for", "none"}, []string{"none"}},
		{[]string{"open", "8080/tcp", "--for", "0"}, nil},
		{[]string{"open", "8080/tcp", "--for", "0s"}, nil},
		{[]string{"open", "8080/tcp", "--for", "1y"}, []string{"1y"}},
		{[]string{"open", "8080/tcp", "--for", "400d"}, []string{"400d"}},
		{[]string{"open", "8080/tcp", "--for", "31d"}, []string{"31d"}},
		{[]string{"open", "8080/tcp", "--for", "721h"}, []string{"721h"}},
		{[]string{"open", "8080/tcp", "--for", "-1h"}, nil},
		{[]string{"open", "8080/tcp", "--for", "500ms"}, nil},
		{[]string{"open", "8080/tcp", "--for", "99999999999999999999h"}, nil},
		{[]string{"open", "8080/tcp", "--for", "8"}, nil},
		{[]string{"open", "8080/tcp", "--for", "soon"}, []string{"soon"}},
		{[]string{"close"}, nil},
		{[]string{"close", "22/tcp"}, []string{"22", "ssh remove"}},
		{[]string{"close", "40000:40100"}, []string{"40000-40100/tcp"}},
		{[]string{"close", "70000/tcp"}, []string{"70000"}},
		{[]string{"close", "8080/tcp", "--from", "198.51.100.7/24"}, []string{"198.51.100.0/24"}},
	} {
		m.refused(t, exitUsage, c.args, c.words...)
	}

	// With an error in a settings file.
	right := m.read(t, localINI)
	commands := []string{"open 8080/tcp", "close 80/tcp", "close 8080/tcp", "ssh allow 203.0.113.50", "ssh remove 192.0.2.10"}
	line := strings.Count(right, "\n") + 2
	m.write(t, localINI, right+"[open]\na = 8080\n", 0o600)
	for _, command := range commands {
		m.refused(t, exitUsage, strings.Fields(command), fmt.Sprintf("local.ini:%d", line), "8080/tcp")
	}
	m.write(t, localINI, right, 0o600)
	m.write(t, agentINI, "; ours\n[agnet]\n", 0o640)
	for _, command := range commands {
		m.refused(t, exitUsage, strings.Fields(command), "agent.ini:2", "agnet")
	}
	m.write(t, agentINI, "", 0o640)

	// As an unprivileged user.
	before := m.everything(t)
	for _, command := range append(commands, "ssh list") {
		c := m.command(strings.Fields(command)...)
		c.UID = 65534
		if r := m.Host.Run(t, c); r.Code != exitFailed {
			t.Errorf("%s: exit code %d\n%s%s", command, r.Code, r.Stdout, r.Stderr)
		} else {
			oneLine(t, r.Stderr, "root")
		}
	}
	same(t, "after the commands of an unprivileged user", before, m.everything(t))
	m.must(t, exitOK, "verify")
}

// TestOpenDiskFull leaves no space for what a command writes. Some of the files are written
// after the rules were loaded.
func TestOpenDiskFull(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.bootstrap(t)
		commands := []string{"open 8080/tcp", "open 8080/tcp --for 1h", "close 80/tcp", "ssh allow " + m.Stranger.V4.String(), "ssh remove " + m.Client.V4.String()}
		for _, dir := range []string{"etc/basicfw", "var/lib/basicfw", m.keptIn()} {
			dir := filepath.Join(m.root, dir)
			undo := m.Host.Full(t, dir)
			// These files exist in the namespace only.
			look := func() string {
				t.Helper()
				return m.everything(t) + m.Host.MustRun(t, "sh", "-c", `cd "$1" && find . -type f -printf '%p %m %i ' -exec sha256sum {} \; | sort`, "sh", dir)
			}
			before := look()
			for _, command := range commands {
				r := m.agent(t, strings.Fields(command)...)
				if r.Code != exitFailed {
					t.Errorf("%s, no space in %s: exit code %d\n%s%s", command, dir, r.Code, r.Stdout, r.Stderr)
				}
				oneLine(t, r.Stderr, "no space left")
				same(t, fmt.Sprintf("after %s, no space in %s", command, dir), before, look())
			}
			undo()
			m.must(t, exitOK, "verify")
		}
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody, "8080/tcp": nobody})
		m.must(t, exitOK, "open", "8080/tcp")
		m.wantOpen(t, map[string]string{"8080/tcp": everybody})
	})
}
