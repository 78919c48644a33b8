package kernel_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// badInput is a set of files and the errors in them.
type badInput struct {
	name  string
	files map[string]string // by path below /etc/basicfw
	want  []string          // patterns, each of a line on stderr
	// client is set if only the client's address is wrong: the profile itself can be used
	// then.
	client bool
}

func badInputs() []badInput {
	agent := func(text string) map[string]string { return map[string]string{"agent.ini": text} }
	profile := func(text string) map[string]string {
		return map[string]string{
			"agent.ini":           "[agent]\nprofile = mine\n",
			"profiles.d/mine.ini": "[profile]\nname = mine\n" + text,
		}
	}
	return []badInput{
		{name: "unknown section", files: agent("[agent]\nprofile = web-only\n\n[agnet]\n"), want: []string{"agent.ini:4"}},
		{name: "unknown key", files: agent("[agent]\nprofil = web-only\n"), want: []string{"agent.ini:2"}},
		{name: "a key twice", files: agent("[agent]\nprofile = web-only\nprofile = web+mail\n"), want: []string{"agent.ini:3"}},
		{name: "a section twice with the key", files: agent("[agent]\nprofile = web-only\n[ssh]\n[agent]\nprofile = web+mail\n"), want: []string{"agent.ini:"}},
		{name: "no section", files: agent("profile = web-only\n"), want: []string{"agent.ini:1"}},
		{name: "no delimiter", files: agent("[agent]\nprofile web-only\n"), want: []string{"agent.ini:2"}},
		{name: "a colon as delimiter", files: agent("[ssh]\nclient_ip: 192.0.2.10\n"), want: []string{"agent.ini:2"}},
		{name: "garbage after a section", files: agent("[agent]junk\nprofile = web-only\n"), want: []string{"agent.ini:1"}},
		{name: "unknown profile", files: agent("[agent]\nprofile = web-and-mail\n"), want: []string{"web-and-mail"}},
		{name: "unknown backend", files: agent("[agent]\nbackend = pf\n"), want: []string{"agent.ini:2"}},
		{name: "unknown on_conflict", files: agent("[agent]\non_conflict = fight\n"), want: []string{"agent.ini:2"}},
		{name: "unknown log level", files: agent("[log]\nlevel = loud\ndrops = perhaps\n"), want: []string{"agent.ini:2", "agent.ini:3"}},
		{name: "bad limit", files: agent("[ssh]\nlimit = 30 per minute\nconfirm_within = soon\n"), want: []string{"agent.ini:2", "agent.ini:3"}},
		{name: "port 0", files: agent("[open]\na = 0/tcp\n"), want: []string{"agent.ini:2"}},
		{name: "port 70000", files: agent("[open]\na = 70000/tcp\n"), want: []string{"agent.ini:2"}},
		{name: "reversed range", files: agent("[open]\na = 200-100/tcp\n"), want: []string{"agent.ini:2"}},
		{name: "colon in a range", files: agent("[open]\na = 40000:40100\n"), want: []string{"agent.ini:2.*40000-40100/"}},
		{name: "no protocol", files: agent("[open]\na = 8080\n"), want: []string{"agent.ini:2.*8080/tcp"}},
		{name: "unknown protocol", files: agent("[open]\na = 80/dccp\n"), want: []string{"agent.ini:2"}},
		{name: "unknown zone", files: agent("[open]\na = 80/tcp on the moon\n"), want: []string{"agent.ini:2"}},
		{name: "host bits", files: agent("[open]\na = 80/tcp from 10.0.0.1/8\n"), want: []string{"agent.ini:2.*10.0.0.0/8"}},
		{name: "a name as source", files: agent("[open]\na = 80/tcp from office.example.com\n"), want: []string{"agent.ini:2.*office.example.com"}},
		{name: "a reserved name", files: agent("[open]\nssh-drop = 80/tcp\n"), want: []string{"agent.ini:2"}},
		{name: "a name with invalid characters", files: agent("[open]\nA B = 80/tcp\n"), want: []string{"agent.ini:2"}},
		{name: "sshd's port", files: agent("[open]\na = 22/tcp\n"), want: []string{"agent.ini:2.*22"}},
		{name: "sshd's port in a range", files: agent("[open]\na = 20-30/tcp\n"), want: []string{"agent.ini:2.*22"}},
		{name: "a rule in a value", files: agent("[open]\na = 80/tcp from 10.0.0.0/8 -j ACCEPT\n"), want: []string{"agent.ini:2"}},
		{name: "a quote", files: agent("[open]\na = 80/tcp on \"eth0\"\n"), want: []string{"agent.ini:2"}},
		{name: "ssh allow", files: agent("[ssh]\nallow = friends\n"), want: []string{"agent.ini:2"}},
		{name: "ssh ports", files: agent("[ssh]\nports = 22, 0\n"), want: []string{"agent.ini:2"}},
		{name: "NUL", files: agent("[agent]\nprofile = web-only\x00\n"), want: []string{"agent.ini:2"}},
		{name: "not UTF-8", files: agent("[agent]\n; caf\xe9\nprofile = web-only\n"), want: []string{"agent.ini:2"}},
		{name: "10 MB", files: agent("[agent]\nprofile = web-only\n" + strings.Repeat("; a comment of sixty-four letters, all told, and a line's end.\n", 10<<20/64)), want: []string{"agent.ini:.*(large|MB|bytes)"}},
		{name: "10 MB in a line", files: agent("[agent]\nprofile = " + strings.Repeat("x", 10<<20) + "\n"), want: []string{"agent.ini:"}},
		{name: "many errors, two files", files: map[string]string{
			"agent.ini": "[agent]\nprofil = x\nbackend = pf\n[open]\na = 0/tcp\nb = 70000/tcp\nc = 200-100/udp\nd = 80/tcp on moon base\n",
			"local.ini": "[ssh]\nlimit = many\nlimits = off\n",
		}, want: []string{"agent.ini:2", "agent.ini:3", "agent.ini:5", "agent.ini:6", "agent.ini:7", "agent.ini:8", "local.ini:2", "local.ini:3"}},

		{name: "profile: unknown key", files: profile("pong = yes\n"), want: []string{"mine.ini:3"}},
		{name: "profile: unknown section", files: profile("[close]\n"), want: []string{"mine.ini:3"}},
		{name: "profile: a key twice", files: profile("ping = yes\nping = no\n"), want: []string{"mine.ini:4"}},
		{name: "profile: extends nothing", files: profile("extends = no-such\n"), want: []string{"mine.ini:3.*no-such"}},
		{name: "profile: extends itself", files: profile("extends = mine\n"), want: []string{"mine.ini:3"}},
		{name: "profile: extends in a circle", files: map[string]string{
			"agent.ini":            "[agent]\nprofile = mine\n",
			"profiles.d/mine.ini":  "[profile]\nname = mine\nextends = yours\n",
			"profiles.d/yours.ini": "[profile]\nname = yours\nextends = mine\n",
		}, want: []string{"(mine|yours).ini:3"}},
		{name: "profile: many errors", files: profile("[open]\na = 0/tcp\nb = 70000/tcp\nc = 9-1/tcp\nd = 80/tcp from 10.0.0.1/8\ne = 80/tcp from host.example\nf = 80\n"),
			want: []string{"mine.ini:4", "mine.ini:5", "mine.ini:6", "mine.ini:7", "mine.ini:8", "mine.ini:9"}},
		{name: "profile: another name than its file", files: map[string]string{
			"agent.ini":           "[agent]\nprofile = mine\n",
			"profiles.d/mine.ini": "[profile]\nname = yours\n",
		}, want: []string{"mine.ini:2"}},
		{name: "profile: NUL", files: profile("title = a\x00b\n"), want: []string{"mine.ini:3"}},
		{name: "profile: not UTF-8", files: profile("title = caf\xe9\n"), want: []string{"mine.ini:3"}},
		{name: "profile: 10 MB", files: profile("title = " + strings.Repeat("x", 10<<20) + "\n"), want: []string{"mine.ini:"}},

		{name: "client: missing variable", client: true, files: agent("[ssh]\nclient_ip = CI_MISSING_JINJA_VAR/client_ip\n"), want: []string{"agent.ini:2.*CI_MISSING_JINJA_VAR"}},
		{name: "client: a name", client: true, files: agent("[ssh]\nclient_ip = office.example.com\n"), want: []string{"agent.ini:2.*office.example.com"}},
		{name: "client: host bits", client: true, files: agent("[ssh]\nclient_ip = 192.0.2.10/24\n"), want: []string{"agent.ini:2.*192.0.2.0/24"}},
		{name: "client: loopback", client: true, files: agent("[ssh]\nclient_ip = 127.0.0.1\n"), want: []string{"127.0.0.1"}},
		{name: "client: any address", client: true, files: agent("[ssh]\nclient_ip = 0.0.0.0\n"), want: []string{"0.0.0.0"}},
		{name: "client: multicast", client: true, files: agent("[ssh]\nclient_ip = 224.0.0.1\n"), want: []string{"224.0.0.1"}},
		{name: "client: link-local", client: true, files: agent("[ssh]\nclient_ip = fe80::1\n"), want: []string{"fe80::1"}},
		{name: "client: the office's LAN", client: true, files: agent("[ssh]\nclient_ip = 192.168.1.5\n"), want: []string{"192.168.1.5"}},
		{name: "client: carrier NAT", client: true, files: agent("[ssh]\nclient_ip = 100.64.3.2\n"), want: []string{"100.64.3.2"}},
	}
}

// put replaces all settings and profiles with those of a case.
func (in badInput) put(t *testing.T, m *machine) {
	t.Helper()
	dir := filepath.Join(m.root, "etc/basicfw")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	for path, text := range in.files {
		m.write(t, filepath.Join("/etc/basicfw", path), text, 0o640)
	}
}

// check fails unless a run reported all errors.
func (in badInput) check(t *testing.T, code int, stdout, stderr string) {
	t.Helper()
	if code != exitUsage {
		t.Errorf("%s: exit code %d, want %d\n%s%s", in.name, code, exitUsage, short(stdout), short(stderr))
	}
	lines := strings.Split(strings.TrimSuffix(stderr, "\n"), "\n")
	for _, want := range in.want {
		if !slices.ContainsFunc(lines, regexp.MustCompile(want).MatchString) {
			t.Errorf("%s: no line with %q in\n%s", in.name, want, short(stderr))
		}
	}
	for _, l := range lines {
		if len(l) > 1000 {
			t.Errorf("%s: a line of %d bytes on stderr", in.name, len(l))
		}
		if strings.ContainsFunc(l, func(r rune) bool { return r < ' ' || r == 0xfffd }) {
			t.Errorf("%s: invalid characters on stderr: %q", in.name, short(l))
		}
	}
}

// short truncates a text for a failure message.
func short(text string) string {
	const max = 2000
	if len(text) > max {
		return text[:max] + "..."
	}
	return text
}

// TestBadInput runs bootstrap with errors in settings and profiles. It has to report each
// with file and line, and change nothing.
func TestBadInput(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		for _, in := range badInputs() {
			in.put(t, m)
			before := m.everything(t)
			r := m.agent(t, "bootstrap", "--no-service")
			in.check(t, r.Code, r.Stdout, r.Stderr)
			if after := m.everything(t); after != before {
				t.Errorf("%s: something changed:%s", in.name, short(difference(before, after)))
				m.must(t, exitOK, "uninstall")
			}
		}
	})
}

// TestBadFlags is TestBadInput for the command line.
func TestBadFlags(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	before := m.everything(t)
	for _, args := range [][]string{
		{"bootstrap", "--profile", "no-such"},
		{"bootstrap", "--profile", "../../etc/passwd"},
		{"bootstrap", "--client-ip", "CI_MISSING_JINJA_VAR/client_ip"},
		{"bootstrap", "--client-ip", "localhost"},
		{"bootstrap", "--client-ip", "192.0.2.10 -j ACCEPT"},
		{"bootstrap", "--client-ip", "192.0.2.10\n[open]\na = 1-65535/tcp"},
		{"bootstrap", "--client-ip", "192.0.2.10/24"},
		{"bootstrap", "--client-ip", "::1"},
		{"bootstrap", "--backend", "pf"},
		{"bootstrap", "--no-such-flag"},
		{"bootstrap", "now"},
		{"no-such-command"},
		{"render", "--family", "ipv5"},
		{"render", "--format", "pf"},
		{"verify", "--log-level", "loud"},
	} {
		if args[0] == "bootstrap" {
			args = append(args, "--no-service")
		}
		r := m.agent(t, args...)
		if r.Code != exitUsage || r.Stderr == "" {
			t.Errorf("%q: exit code %d, want %d, with a reason\n%s%s", args, r.Code, exitUsage, r.Stdout, r.Stderr)
		}
		if after := m.everything(t); after != before {
			t.Fatalf("%q: something changed:%s", args, difference(before, after))
		}
	}
}

// TestOrFailsafe bootstraps a machine with the same errors and --or-failsafe, which closes
// it.
func TestOrFailsafe(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		reached := map[bool]bool{} // key: whether the profile can be used
		for _, in := range badInputs() {
			in.put(t, m)
			open := m.everything(t)
			r := m.agent(t, "bootstrap", "--no-service", "--or-failsafe")
			in.check(t, r.Code, r.Stdout, r.Stderr)
			for _, family := range families() {
				text := strings.Join(m.ours(t, family), "\n")
				closed := []string{":INPUT DROP", "-A INPUT -j BASICFW-INPUT"}
				if m.netlink {
					closed = []string{"policy drop;", family + " : jump " + m.chain(family, "INPUT")}
				}
				for _, want := range append(closed, m.comment("ssh-limit"), m.comment("ssh-drop")) {
					if !strings.Contains(text, want) {
						t.Errorf("%s: %s is not closed: no %s\n%s", in.name, family, want, short(r.Stderr))
					}
				}
				if strings.Contains(text, m.comment("http")) != in.client {
					t.Errorf("%s: %s: port 80 should be open: %v", in.name, family, in.client)
				}
			}
			if r.Code == exitUsage {
				if s := m.status(t, exitDrift); s.State != "failsafe" || s.SSH.Mode != "limited" {
					t.Errorf("%s: state %q, SSH %q", in.name, s.State, s.SSH.Mode)
				}
				// The cause is in status once, not again for each of its effects.
				cause, _, _ := strings.Cut(strings.TrimPrefix(r.Stderr, "basicfw-agent: "), "\n")
				quoted, err := json.Marshal(cause)
				if err != nil {
					t.Fatal(err)
				}
				if n := strings.Count(m.agent(t, "status", "--json").Stdout, strings.Trim(string(quoted), `"`)); in.client && n != 1 {
					t.Errorf("%s: status has %q %d times", in.name, cause, n)
				}
			}
			// Packets are sent once for each kind of error.
			if !reached[in.client] {
				reached[in.client] = true
				for _, to := range m.Server.Both() {
					m.wantReach(t, to, 22, true, true)
					m.wantReach(t, to, 80, in.client, in.client)
					m.wantReach(t, to, 8080, false, false)
				}
			}
			m.must(t, exitOK, "uninstall")
			if after := m.everything(t); after != open {
				t.Fatalf("%s: after uninstall:%s", in.name, short(difference(open, after)))
			}
		}
	})
}

// TestOrFailsafeThenRight corrects the settings and runs bootstrap again.
func TestOrFailsafeThenRight(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 8080)
		m.write(t, "/etc/basicfw/agent.ini", "[agent]\nprofil = web-only\n", 0o640)
		m.must(t, exitUsage, "bootstrap", "--no-service", "--or-failsafe")
		m.must(t, exitOK, "verify")
		m.write(t, "/etc/basicfw/agent.ini", "[agent]\nprofile = web-only\n", 0o640)
		m.must(t, exitOK, "bootstrap", "--no-service", "--client-ip", m.Client.String())
		m.wantReach(t, m.Server.V4, 22, true, false)
		m.wantReach(t, m.Server.V6, 80, true, true)
		if s := m.status(t, exitOK); s.State != "protected" || s.SSH.Mode != "pinned" {
			t.Errorf("status: %+v", s)
		}
	})
}
