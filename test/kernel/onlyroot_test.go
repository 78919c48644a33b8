package kernel_test

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// readable lists the program's files that unprivileged users may read, with their modes.
var readable = map[string]fs.FileMode{
	"/run/basicfw-agent":              0o755 | fs.ModeDir,
	"/run/basicfw-agent/status.json":  0o644,
	"/run/basicfw-agent/basicfw.prom": 0o644,
	"/run/issue.d":                    0o755 | fs.ModeDir,
	"/etc/issue.d":                    0o755 | fs.ModeDir,
	"/etc/issue.d/basicfw.issue":      0o777 | fs.ModeSymlink, // to an unreadable file
	"/etc/nftables":                   0o755 | fs.ModeDir,
	"/etc/motd.d":                     0o755 | fs.ModeDir,
	"/etc/motd.d/basicfw":             0o644,
	"/etc/systemd":                    0o755 | fs.ModeDir, "/etc/systemd/system": 0o755 | fs.ModeDir, "/etc/systemd/system/sysinit.target.wants": 0o755 | fs.ModeDir,
	"/etc/systemd/system/basicfw-agent.service":                      0o644,
	"/etc/systemd/system/sysinit.target.wants/basicfw-agent.service": 0o777 | fs.ModeSymlink,
}

// TestOnlyRoot checks every file that the program writes, with umask 0: all belong to root,
// and only those listed in readable are readable by others.
func TestOnlyRoot(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		if !m.netlink { // netlink leaves the iptables file alone
			m.write(t, rulesFile(ipv4), "*filter\n:INPUT ACCEPT [0:0]\nCOMMIT\n", 0o644)
		}
		there := map[string]bool{}
		walk := func(see func(path string, fi fs.FileInfo)) {
			t.Helper()
			for _, top := range []string{"etc", "var", "run", "usr"} {
				err := filepath.WalkDir(filepath.Join(m.root, top), func(path string, d fs.DirEntry, err error) error {
					if err != nil {
						return err
					}
					fi, err := os.Lstat(path)
					if err == nil {
						see(strings.TrimPrefix(path, m.root), fi)
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
			}
		}
		walk(func(path string, fi fs.FileInfo) { there[path] = fi.IsDir() })
		seen := map[string]bool{}
		check := func(when string) {
			t.Helper()
			walk(func(path string, fi fs.FileInfo) {
				if there[path] {
					return
				}
				seen[path] = true
				want := 0o600 | fi.Mode().Type()
				if fi.IsDir() {
					want = 0o700 | fs.ModeDir
				}
				if mode, ok := readable[path]; ok {
					want = mode
				}
				if owner := fi.Sys().(*syscall.Stat_t).Uid; fi.Mode() != want || owner != 0 {
					t.Errorf("%s: %s is %v, of user %d; want %v, owned by root", when, path, fi.Mode(), owner, want)
				}
			})
		}
		do := func(args ...string) {
			t.Helper()
			c := m.command(args...)
			c.Args = append([]string{"sh", "-c", `umask 0; exec "$@"`, "sh"}, c.Args...)
			if r := m.Host.Run(t, c); r.Code != exitOK {
				t.Fatalf("%v: exit code %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
			}
		}
		do("bootstrap", "--profile", "web+mail", "--client-ip", m.Client.V4.String())
		check("bootstrap")
		do("open", "8081/tcp")
		check("open")
		s := m.serve(t)
		do("ssh", "allow", m.Client.V6.String(), "--for", "1h")
		do("unlock", "--for", "10m")
		do("lock")
		m.write(t, agentINI, "[open]\nx = 8083/tcp\n", 0o640)
		there["/etc/basicfw/agent.ini"] = true
		do("apply", "--confirm", "10m")
		s.Stop(t)
		check("commands while the service runs")
		do("confirm", "--force")
		m.write(t, stateFile, "spoilt", 0o600)
		c := m.serve(t)
		c.Stop(t)
		check("a service that cannot read the state")
		for _, path := range []string{stateFile, stateFile + ".broken", copyFile, originalFile, "/etc/basicfw/local.ini",
			"/var/lib/basicfw/pending.json", "/run/basicfw-agent/lock", "/run/basicfw-agent/status.json", "/run/basicfw-agent/basicfw.prom", "/etc/motd.d/basicfw", "/run/issue.d/basicfw.issue", m.keptOf(ipv6)} {
			if !seen[path] {
				t.Errorf("%s never existed: this test proves less", path)
			}
		}
	})
}

// TestLinksAreNotFollowed replaces each file that the program writes by a link, whose
// target has to stay unchanged.
func TestLinksAreNotFollowed(t *testing.T) {
	on(t, []string{"legacy", "netlink"}, testLinksAreNotFollowed)
}

func testLinksAreNotFollowed(t *testing.T, m *machine) {
	m.bootstrap(t)
	m.must(t, exitOK, "open", "8081/tcp")
	s := m.serve(t)
	m.must(t, exitOK, "unlock")
	s.Stop(t)
	m.must(t, exitOK, "lock")
	files := append(m.persisted(), "/etc/basicfw/local.ini", stateFile, copyFile, "/var/lib/basicfw/pending.json",
		"/run/basicfw-agent/status.json", "/run/basicfw-agent/basicfw.prom", "/run/basicfw-agent/watch.json", "/etc/motd.d/basicfw", "/run/issue.d/basicfw.issue")
	victim := func(path string) string {
		return filepath.Join(m.root, "usr/victims", strings.ReplaceAll(path, "/", "_"))
	}
	for _, path := range files {
		text := "another text\n"
		if data, err := os.ReadFile(filepath.Join(m.root, path)); err == nil {
			text = string(data)
		}
		m.write(t, strings.TrimPrefix(victim(path), m.root), text, 0o600)
		os.Remove(filepath.Join(m.root, path))
		if err := os.Symlink(victim(path), filepath.Join(m.root, path)); err != nil {
			t.Fatal(err)
		}
	}
	before := m.tree(t, true, "usr/victims")
	// An untrusted file is refused, and bootstrap computes the allowed addresses again.
	r := m.agent(t, "open", "8082/tcp")
	if r.Code == exitOK {
		t.Error("a state behind a link is believed")
	}
	pending := filepath.Join(m.root, "var/lib/basicfw/pending.json")
	says(t, m.must(t, exitFailed, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service").Stderr, "pending.json")
	if err := os.Remove(pending); err != nil {
		t.Fatal(err)
	}
	m.must(t, exitOK, "bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
	s = m.serve(t)
	m.must(t, exitOK, "open", "8082/tcp")
	m.must(t, exitOK, "unlock")
	m.must(t, exitOK, "lock")
	m.write(t, agentINI, "[open]\nx = 8083/tcp\n", 0o640)
	m.must(t, exitOK, "apply", "--confirm", "10m")
	m.must(t, exitOK, "confirm", "--force")
	s.Stop(t)
	same(t, "targets of the links", before, m.tree(t, true, "usr/victims"))
	for _, path := range files {
		if fi, err := os.Lstat(filepath.Join(m.root, path)); err == nil && !fi.Mode().IsRegular() {
			t.Errorf("%s is %v", path, fi.Mode())
		}
	}

	// The lock is opened, and not replaced.
	lock := filepath.Join(m.root, "run/basicfw-agent/lock")
	m.write(t, "/usr/victims/lock", "another text\n", 0o600)
	if err := os.Remove(lock); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(m.root, "usr/victims/lock"), lock); err != nil {
		t.Fatal(err)
	}
	oneLine(t, m.must(t, exitFailed, "close", "8082/tcp").Stderr, "lock")
	if text := m.read(t, "/usr/victims/lock"); text != "another text\n" {
		t.Errorf("the target of the lock's link holds %q", text)
	}
}

// TestDirectoryOfAnother changes the owner of the state's directory to a user who could
// remove what is in it.
func TestDirectoryOfAnother(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"prepare", "open 8081/tcp"} {
		m := newMachine(t, "nft")
		m.bootstrap(t)
		dir := filepath.Join(m.root, "var/lib/basicfw")
		if err := os.Chmod(dir, 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, mallory, mallory); err != nil {
			t.Fatal(err)
		}
		m.must(t, exitOK, strings.Fields(how)...)
		fi, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		if owner := fi.Sys().(*syscall.Stat_t).Uid; owner != 0 || fi.Mode().Perm() != 0o700 {
			t.Errorf("after %s it has mode %v and owner %d", how, fi.Mode(), owner)
		}
	}
}

// TestFileOfAnother makes the state writable by another user: it decides nothing.
func TestFileOfAnother(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	m.bootstrap(t)
	path := filepath.Join(m.root, "var/lib/basicfw/state.json")
	spoil := map[string]func() error{
		"owned by another user": func() error { return os.Chown(path, mallory, 0) },
		"writable by others": func() error {
			return os.Chmod(path, 0o606)
		},
	}
	for what, do := range spoil {
		if err := do(); err != nil {
			t.Fatal(err)
		}
		for _, command := range []string{"open 8081/tcp", "apply"} {
			r := m.agent(t, strings.Fields(command)...)
			if r.Code == exitOK {
				t.Errorf("%s, %s: it is believed\n%s", what, command, r.Stdout)
			}
			says(t, r.Stderr, "state.json", "root")
		}
		m.must(t, exitOK, "verify", "--repair") // by the copy
		m.wantCopy(t)
		m.must(t, exitOK, "verify")
	}
}

// TestCallersEnvironment checks that the caller's environment does not affect root's runs.
func TestCallersEnvironment(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		evil := t.TempDir()
		pwned := filepath.Join(evil, "pwned")
		for _, name := range []string{"iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore",
			"nft", "modprobe", "systemctl", "sshd", "sh"} {
			if err := os.WriteFile(filepath.Join(evil, name), []byte("#!/bin/sh\necho "+name+" >>"+pwned+"\nexit 1\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		seen := filepath.Join(m.root, "environment")
		for _, name := range []string{"iptables-restore", "ip6tables-save"} {
			m.wrap(t, name, "tr '\\0' '\\n' </proc/$$/environ >>"+seen+"\nexec $real \"$@\"")
		}
		run := func(args ...string) {
			t.Helper()
			c := m.command(args...)
			c.Dir = evil
			c.Env = []string{"PATH=.:" + evil + ":/usr/local/sbin:/usr/sbin:/usr/bin", "HOME=" + evil, "LD_PRELOAD=" + evil + "/x.so", "LD_LIBRARY_PATH=" + evil,
				"XTABLES_LIBDIR=" + evil, "IPTABLES_LIB_DIR=" + evil, "MODPROBE_OPTIONS=-C " + evil, "SYSTEMD_EDITOR=" + evil + "/sh",
				"LC_ALL=tr_TR.UTF-8", "LANG=tr_TR.UTF-8", "IFS=/", "ENV=" + evil + "/sh", "BASH_ENV=" + evil + "/sh", "TMPDIR=" + evil, "GODEBUG=netdns=cgo"}
			if r := m.Host.Run(t, c); r.Code != exitOK {
				t.Fatalf("%v: exit code %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
			}
		}
		run("bootstrap", "--profile", "web+mail", "--client-ip", m.Client.String(), "--no-service")
		run("open", "8081/tcp")
		run("verify")
		run("prepare")
		if text, err := os.ReadFile(pwned); err == nil {
			t.Errorf("the caller's programs were run: %s", text)
		}
		text, err := os.ReadFile(seen)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range strings.Split(strings.TrimSpace(string(text)), "\n") {
			switch entry {
			case "LC_ALL=C", "TZ=UTC0UTC0", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin":
			default:
				t.Errorf("iptables was run with %q", entry)
			}
		}
		m.must(t, exitOK, "verify")
	})
}

// nasty clears a terminal, sets its title and colour, reverses the writing direction,
// begins a line, and ends a string.
const nasty = "\x1b[2J\x1b]0;x\x07\u009b31m\u202ex\u2066\u200b\x7f\r\"'$(x)"

// TestTextOfOthers puts terminal control characters into every text that other users can
// set, and has every command print what it finds.
func TestTextOfOthers(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	clean := func(what, text string) {
		t.Helper()
		for _, r := range text {
			if r != '\n' && r != '\t' && (r == utf8.RuneError || !unicode.IsPrint(r)) {
				t.Errorf("%s shows %q:\n%q", what, r, text)
				return
			}
		}
	}
	shown := ""
	show := func(args ...string) {
		t.Helper()
		r := m.agent(t, args...)
		clean(fmt.Sprintf("%q", args), r.Stdout+r.Stderr)
		shown += r.Stdout + r.Stderr
	}
	const name = "A\x1b[2J\u202e\u009bZ" // as long as names of interfaces and processes can be
	dir := t.TempDir()
	if err := os.Rename(buildGuest(t), filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{filepath.Dir(dir), dir, filepath.Join(dir, name)} {
		if err := os.Chmod(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.asMallory(t, filepath.Join(dir, name), "listen", "8080")
	m.hold(t, m.Stranger.V4, 8080)
	m.Wire(t, name)
	m.Host.MustRun(t, "ip", "addr", "add", "10.9.9.1/24", "dev", name)
	m.Host.MustRun(t, "ip", "link", "set", name, "up")
	m.write(t, "/run/cloud-init/.instance-id", nasty, 0o644)
	comment := []string{"-A", "INPUT", "-p", "tcp", "--dport", "99", "-m", "comment", "--comment", nasty, "-j", "ACCEPT"}
	m.iptables(t, ipv4, comment...)
	show("bootstrap", "--profile", "web-only", "--client-ip", m.Client.String(), "--no-service", "--dry-run")
	show("bootstrap", "--profile", "web-only", "--client-ip", m.Client.String(), "--no-service")
	m.must(t, exitOK, "status", "--json")
	m.iptables(t, ipv4, comment...)
	m.iptables(t, ipv4, "-I", "BASICFW-INPUT", "-m", "comment", "--comment", nasty, "-j", "ACCEPT")
	m.write(t, "/etc/ssh/sshd_config", "Port "+nasty+"\nInclude /etc/"+nasty+"\n", 0o600)
	m.write(t, "/etc/basicfw/profiles.d/"+strings.ReplaceAll(nasty, "/", "")+".ini", nasty, 0o644)
	m.write(t, "/etc/basicfw/profiles.d/x.ini", "[profile]\nname = x\ntitle = "+nasty+"\n["+nasty+"]\n"+nasty+" = "+nasty+"\n", 0o644)
	s := m.serve(t)
	lab.Poll(t, "a status for monitoring", func() bool {
		_, err := os.Stat(filepath.Join(m.root, "run/basicfw-agent/status.json"))
		return err == nil
	})
	show("status")
	show("status", "--json")
	show("verify")
	show("plan")
	show("render")
	show("ssh", "list")
	show("profile", "list")
	show("profile", "check", filepath.Join(m.root, "etc/basicfw/profiles.d/x.ini"))
	m.write(t, agentINI, "["+nasty+"]\n"+nasty+" = "+nasty+"\n[ssh]\nallow = "+nasty+"\n", 0o640)
	show("status")
	show("apply")
	if err := os.Remove(filepath.Join(m.root, agentINI)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{nasty}, {"open", nasty}, {"open", "99/tcp", "--from", nasty}, {"open", "99/tcp", "--name", nasty}, {"open", "99/tcp", "--on", nasty},
		{"open", "99/tcp", "--for", nasty}, {"close", nasty}, {"ssh", "allow", nasty}, {"ssh", "remove", nasty}, {"unlock", "--from", nasty}, {"profile", "show", nasty},
		{"profile", "check", nasty}, {"--log-level", nasty, "verify"}, {"--config", "/" + nasty, "apply"}, {"bootstrap", "--profile", nasty}, {"bootstrap", "--client-ip", nasty},
		{"bootstrap", "--backend", nasty}, {"user-data", "--rpm", nasty}, {"--" + nasty}, {"apply", "--confirm", nasty}, {"render", "--family", nasty}} {
		before := m.rules(t)
		r := m.agent(t, args...)
		if r.Code == exitOK {
			t.Errorf("%q is accepted", args)
		}
		clean(fmt.Sprintf("%q", args), r.Stdout+r.Stderr)
		same(t, fmt.Sprintf("after %q", args), before, m.rules(t))
	}
	r := s.Stop(t)
	clean("the journal", r.Stdout+r.Stderr)
	clean("status.json", m.read(t, "/run/basicfw-agent/status.json"))
	if data, err := os.ReadFile(filepath.Join(m.root, "etc/motd.d/basicfw")); err == nil {
		clean("the login message", string(data))
	}
	for _, part := range []string{"A?[2J??Z", "]0;x"} {
		if !strings.Contains(shown, part) {
			t.Errorf("nothing shows %q: this test proves less\n%s", part, shown)
		}
	}
}
