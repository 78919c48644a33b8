package kernel_test

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// inetd serves a port like inetd: it starts `sshd -i` for each connection, with the keys of
// s.
func (s *sshServer) inetd(t *testing.T, port uint16) {
	t.Helper()
	var l net.Listener
	err := s.m.Host.Do(func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	path := strings.TrimSpace(s.m.Host.MustRun(t, "sh", "-c", "command -v sshd"))
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f, err := c.(*net.TCPConn).File()
			c.Close()
			if err != nil {
				return
			}
			cmd := exec.Command(path, "-i", "-f", filepath.Join(filepath.Dir(s.key), "config"))
			cmd.Stdin, cmd.Stdout = f, f
			if s.m.Host.Do(cmd.Start) == nil {
				go cmd.Wait()
			}
			f.Close()
		}
	}()
}

// by runs commands in a session of the client by another port.
func (s *sshServer) by(t *testing.T, code int, port uint16, commands ...string) lab.Result {
	t.Helper()
	c := s.m.command()
	script := "export " + strings.Join(c.Env, " ") + "; cd " + c.Dir
	for _, command := range commands {
		script += " && " + strings.Join(c.Args, " ") + " " + command
	}
	r := s.m.Outsider.Run(t, lab.Command{Args: append([]string{"ssh", "-p", fmt.Sprint(port)}, s.login(s.m.Client.V4, script)...)})
	if r.Code != code {
		t.Fatalf("%q by port %d: exit code %d, want %d\nstdout: %s\nstderr: %s", commands, port, r.Code, code, r.Stdout, r.Stderr)
	}
	return r
}

// TestPortOfTheSession bootstraps in a session that neither sshd's unit nor its
// configuration knows of. The port stays open, also while sshd itself listens on another.
func TestPortOfTheSession(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		sshd := m.sshd(t)
		sshd.inetd(t, 2222)
		both := map[string]string{"22/tcp": "client4", "2222/tcp": "client4"}
		r := sshd.by(t, exitOK, 2222, "bootstrap --profile web-only --no-service --no-selftest")
		says(t, r.Stdout, "port 22, 2222: only "+m.Client.V4.String())
		m.wantOpen(t, both)
		sshd.by(t, exitOK, 2222, "confirm")

		before := m.everything(t)
		m.must(t, exitOK, "apply") // at the console, without a session
		same(t, "after apply at the console", before, m.everything(t))
		s := m.serve(t)
		m.write(t, "/etc/ssh/sshd_config", "Port 22\n", 0o600)
		lab.Poll(t, "the service to have seen sshd", func() bool { return m.public(t).State != "" })
		m.must(t, exitOK, "verify")
		m.wantOpen(t, both)
		s.Stop(t)
		m.reboot(t)
		s = m.serve(t)
		m.wantOpen(t, both)
		s.Stop(t)

		m.write(t, agentINI, "[ssh]\nports = 22\n", 0o640)
		text := sshd.by(t, exitFailed, 2222, "apply").Stderr
		says(t, text, "port 2222", "--force")
		m.wantOpen(t, both)
		sshd.by(t, exitOK, 2222, "apply --force")
		m.wantOpen(t, map[string]string{"22/tcp": "client4", "2222/tcp": nobody})
	})
}

// TestPortOfNoSession names, in SSH_CONNECTION, a connection of a root-owned process that
// is no SSH server: it serves every user who connects.
func TestPortOfNoSession(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	m.sshd(t)
	m.Host.Listen(t, 8080)
	m.believesNot(t, m.hold(t, m.Stranger.V4, 8080))
	m.wantOpen(t, map[string]string{"8080/tcp": nobody})
}

// TestSSHDInAContainer runs root's sshd in containers that share the host's network.
func TestSSHDInAContainer(t *testing.T) {
	lab.Need(t, "unshare")
	for name, enter := range map[string]string{
		"a PID namespace": `unshare --pid --fork --kill-child "$@" & trap "kill -9 $!" TERM; wait`,
		"a cgroup":        `echo $$ >"$0"; while [ -s "$0" ]; do sleep 0.05; done; exec "$@"`,
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, "nft")
			sshd := m.sshd(t)
			join := func(pid string) {}
			if name == "a cgroup" {
				join = cgroup(t)
			}
			path := strings.TrimSpace(m.Host.MustRun(t, "sh", "-c", "command -v sshd"))
			for _, port := range []string{"31337", "80"} {
				file := filepath.Join(t.TempDir(), "pid")
				p := m.Host.Start(t, lab.Command{Args: []string{"sh", "-c", enter, file, path, "-D", "-e", "-f", filepath.Join(filepath.Dir(sshd.key), "config"), "-p", port}})
				t.Cleanup(func() { p.Stop(t) })
				lab.Poll(t, "sshd to listen", func() bool {
					if pid, err := os.ReadFile(file); err == nil && len(pid) > 0 {
						join(strings.TrimSpace(string(pid)))
						if err := os.Truncate(file, 0); err != nil {
							t.Fatal(err)
						}
					}
					return strings.Contains(m.Host.MustRun(t, "ss", "-Hltn", "sport = :"+port), "LISTEN")
				})
			}
			m.bootstrap(t)
			if s := m.status(t, exitOK); !slices.Equal(s.SSH.Ports, []uint16{22}) {
				t.Errorf("sshd's ports are %v", s.SSH.Ports)
			}
			m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "31337/tcp": nobody})
			m.wantReach(t, m.Server.V4, 80, true, true)
		})
	}
}

// cgroup makes a cgroup as docker does, and returns a function that moves a process into it.
func cgroup(t *testing.T) (join func(pid string)) {
	t.Helper()
	dir := "/sys/fs/cgroup"
	if _, err := os.Stat(dir + "/systemd"); err == nil {
		dir += "/systemd"
	}
	dir += fmt.Sprintf("/docker/%064d", os.Getpid())
	if err := os.MkdirAll(dir, 0o755); err != nil {
		lab.Skip(t, "a writable cgroup: "+err.Error())
	}
	t.Cleanup(func() {
		lab.Poll(t, "the cgroup to be empty", func() bool { return os.Remove(dir) == nil })
		os.Remove(filepath.Dir(dir)) // unless it is in use
	})
	return func(pid string) {
		t.Helper()
		if err := os.WriteFile(dir+"/cgroup.procs", []byte(pid), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSSHDOnAPortOfTheProfile runs sshd on 443 at bootstrap, and moves it to a port of [open]
// later. The port is sshd's, and status names the cure.
func TestSSHDOnAPortOfTheProfile(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.write(t, "/etc/ssh/sshd_config", "Port 22\nPort 443\n", 0o600)
		sshd := m.sshdOn(t, 443)
		r := m.must(t, exitOK, "bootstrap", "--profile", "web-only", "--client-ip", m.Client.V4.String(), "--no-service", "--or-failsafe")
		says(t, r.Stdout, "protected by profile web-only")
		says(t, r.Stderr, "https = 443/tcp does not open port 443, where sshd listens", "basicfw-agent close https")
		m.wantOpen(t, map[string]string{"443/tcp": "client4"})
		if s := m.status(t, exitOK); s.State != "protected" || slices.Contains(s.openNames(), "https") {
			t.Errorf("status: %s, open %q", s.State, s.openNames())
		}
		says(t, m.status(t, exitOK).warnings(), "443", "https")
		m.must(t, exitOK, "close", "https")
		if text := m.status(t, exitOK).warnings(); strings.Contains(text, "443") {
			t.Errorf("closed: %s", text)
		}

		// It moves to a port of [open] while the service runs.
		sshd.stop()
		m.write(t, "/etc/ssh/sshd_config", "Port 22\n", 0o600)
		m.must(t, exitOK, "open", "8000-8100/tcp", "--name", "media")
		s := m.serve(t)
		m.sshdOn(t, 8022)
		m.write(t, "/etc/ssh/sshd_config", "Port 8022\n", 0o600)
		lab.Poll(t, "the service to follow", func() bool { return strings.Contains(m.rules(t), "8021") && strings.Contains(m.rules(t), "8023") })
		m.wantOpen(t, map[string]string{"8022/tcp": "client4"})
		if s := m.status(t, exitOK); s.State != "protected" || !strings.Contains(s.warnings(), "8022") {
			t.Errorf("status: %s, %s", s.State, s.warnings())
		}
		m.must(t, exitOK, "verify")
		s.Stop(t)
		m.refused(t, exitUsage, []string{"apply"}, "media", "port 8022")
		m.refused(t, exitUsage, []string{"open", "8022/tcp"}, "8022/tcp: sshd listens on port 8022")
		m.refused(t, exitUsage, []string{"open", "81/tcp"}, "media", "port 8022")
		m.must(t, exitOK, "close", "media")
		m.must(t, exitOK, "apply")
		m.wantOpen(t, map[string]string{"8021/tcp": nobody, "8022/tcp": "client4"})
	})
}

// TestTunnel bootstraps in a session through a VPN that this host serves. Its port would be
// closed, and with it the way back.
func TestTunnel(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		lab.NeedTools(t, "/dev/net/tun")
		guest := buildGuest(t)
		for _, end := range []struct {
			on      *lab.Namespace
			address string
			args    []string
		}{{m.Host, "10.66.0.1/24", []string{"51820"}}, {m.Outsider, "10.66.0.2/24", []string{"40000", m.Server.V4.String() + ":51820"}}} {
			p := end.on.Start(t, lab.Command{Args: append([]string{guest, "tunnel", "wg0"}, end.args...)})
			t.Cleanup(func() { p.Stop(t) })
			lab.Poll(t, "the interface", func() bool {
				return end.on.Run(t, lab.Command{Args: []string{"ip", "addr", "add", end.address, "dev", "wg0"}}).Code == 0
			})
			end.on.MustRun(t, "ip", "link", "set", "wg0", "up")
		}
		sshd := m.sshd(t)
		through := func(code int, command string) lab.Result {
			t.Helper()
			c := m.command()
			args := sshd.login(netip.MustParseAddr("10.66.0.2"), "export "+strings.Join(c.Env, " ")+"; cd / && "+strings.Join(c.Args, " ")+" "+command)
			args[len(args)-2] = "root@10.66.0.1"
			r := m.Outsider.Run(t, lab.Command{Args: append([]string{"ssh"}, args...)})
			if r.Code != code {
				t.Fatalf("%s: exit code %d, want %d\n%s%s", command, r.Code, code, r.Stdout, r.Stderr)
			}
			return r
		}
		const bootstrap = "bootstrap --profile web-only --no-service --no-selftest"
		before := m.everything(t)
		says(t, through(exitFailed, bootstrap).Stderr, "wg0", "51820/udp would be closed", "open 51820/udp", "agent.ini", "--force")
		same(t, "after the refusal", before, m.everything(t))
		m.wantReach(t, m.Server.V4, 22, true, true)

		r := through(exitOK, bootstrap+" --or-failsafe")
		says(t, r.Stdout, "protected by profile web-only", "warning: your SSH session came through wg0, whose port 51820/udp is closed", "open 51820/udp")
		m.must(t, exitOK, "uninstall")

		m.write(t, agentINI, "[open]\nvpn = 51820/udp\n", 0o640)
		r = through(exitOK, bootstrap)
		if strings.Contains(r.Stdout, "wg0") {
			t.Errorf("the tunnel's port is open: %s", r.Stdout)
		}
		m.write(t, agentINI, "", 0o640)
		says(t, through(exitFailed, "apply").Stderr, "51820/udp would be closed", "hint: basicfw-agent open 51820/udp, or use --force")
		m.must(t, exitOK, "apply") // at the console
		through(exitOK, "apply")   // as it is closed already, and the session works
	})
}

// TestWatchSSHDAnywhere sets sshd's port in places that sshd_config does not name, that are
// links, or that did not exist. Each port is open within two seconds.
func TestWatchSSHDAnywhere(t *testing.T) {
	on(t, told, func(t *testing.T, m *machine) {
		const config = "/etc/ssh/sshd_config"
		sshd := m.sshd(t)
		path := func(name string) string { return filepath.Join(m.root, name) }
		link := func(target, name string) {
			t.Helper()
			if err := os.Symlink(target, path(name)); err != nil {
				t.Fatal(err)
			}
		}
		m.write(t, "/usr/share/ssh/real", "Port 22\nInclude /etc/more/ssh/*.conf\n", 0o600)
		m.write(t, "/etc/ssh/moduli", "", 0o600)
		link("../../usr/share/ssh/real", config)
		m.bootstrap(t)
		s := m.quiet(t)
		follows := func(port, what string) {
			t.Helper()
			start := time.Now()
			by(t, start.Add(repaired), what, func() bool { return strings.Contains(m.rules(t), port) })
			t.Logf("%s: open after %v", what, time.Since(start).Round(time.Millisecond))
		}
		m.write(t, "/etc/sysconfig/sshd", "OPTIONS=\"-p 2201\"\n", 0o600)
		follows("2201", "the options of Red Hat")
		m.write(t, "/etc/default/ssh", "SSHD_OPTS=\"-p 2202\"\n", 0o600)
		follows("2202", "the options of Debian, in a new directory")
		m.write(t, "/etc/systemd/system/sshd.service.d/x.conf", "[Service]\nExecStart=/usr/sbin/sshd -D -p 2203\n", 0o600)
		m.write(t, "/etc/systemd/system/sshd.service", "[Service]\nType=notify\n", 0o600)
		follows("2203", "the command line of a unit")
		m.write(t, "/usr/share/ssh/real", "Port 22\nPort 2204\nInclude /etc/more/ssh/*.conf\n", 0o600)
		follows("2204", "the target of a link")
		m.write(t, "/etc/more/ssh/x.conf", "Port 2205\n", 0o600)
		follows("2205", "an included file in a new directory")
		m.write(t, "/usr/etc/ssh/sshd_config", "Port 2206\n", 0o600)
		if err := os.Remove(path(config)); err != nil {
			t.Fatal(err)
		}
		follows("2206", "the configuration of the distribution")

		// sshd listens elsewhere, and no file has changed but that of its process.
		sshd.stop()
		m.sshdOn(t, 2206)
		m.write(t, "/run/sshd.pid", "1\n", 0o600)
		by(t, time.Now().Add(repaired), "the old port to be closed", func() bool { return !port22.MatchString(m.rules(t)) })
		m.must(t, exitOK, "verify")
		s.Stop(t)
	})
}

// TestSecondUplink adds, to a private interface, a default route in a routing table of its
// own, as cloud providers do: it leads to the internet, and what is open on private networks
// is closed on it.
func TestSecondUplink(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.MustRun(t, "ip", "link", "add", "ens6", "link", "eth0", "type", "macvlan", "mode", "bridge")
		m.Host.MustRun(t, "ip", "addr", "add", "172.31.16.10/20", "dev", "ens6")
		m.Host.MustRun(t, "ip", "link", "set", "ens6", "up")
		m.write(t, agentINI, "[open]\ndb = 5432/tcp on private\n", 0o640)
		m.bootstrap(t)
		if !m.hasRule(t, "ens6", "5432") {
			t.Fatalf("5432 is not open on ens6:\n%s", m.rules(t))
		}
		s := m.serve(t)
		m.Host.MustRun(t, "ip", "route", "add", "default", "via", "172.31.16.1", "dev", "ens6", "table", "10001")
		by(t, time.Now().Add(repaired), "5432 to be closed on ens6", func() bool { return !m.hasRule(t, "ens6", "5432") })
		m.must(t, exitOK, "verify")
		s.Stop(t)
	})
}

// TestNamedFamilies names clients whose address may change, or of one family alone.
func TestNamedFamilies(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	const temporary, hint = "2001:db8:7:1:9d3c:e51a:8b02:47fe", "use ssh -4"
	r := m.must(t, exitOK, "bootstrap", "--profile", "web-only", "--no-service", "--no-selftest", "--client-ip", m.Client.V4.String())
	says(t, r.Stdout, hint)
	says(t, m.must(t, exitOK, "status", "--json").Stdout, hint)
	r = m.must(t, exitOK, "ssh", "allow", "203.0.113.50")
	says(t, r.Stdout, hint)
	r = m.must(t, exitOK, "ssh", "allow", temporary)
	says(t, r.Stderr, "may be a temporary address", "2001:db8:7:1::/64")
	if strings.Contains(r.Stdout, hint) {
		t.Errorf("IPv6 is allowed: %s", r.Stdout)
	}
	if text := m.must(t, exitOK, "status", "--json").Stdout; strings.Contains(text, hint) {
		t.Errorf("IPv6 is allowed: %s", text)
	}
	r = m.must(t, exitOK, "user-data", "--rpm", "https://example.com/a.rpm", "--client-ip", temporary)
	says(t, r.Stderr, "2001:db8:7:1::/64")
	if r = m.must(t, exitOK, "ssh", "allow", "2001:db8:7:1::/64"); strings.Contains(r.Stderr, "temporary") {
		t.Errorf("a network is not temporary: %s", r.Stderr)
	}
}

// TestNoSSHServer bootstraps a machine on which no SSH server is known.
func TestNoSSHServer(t *testing.T) {
	t.Parallel()
	const warning = "no SSH server was found"
	m := newMachine(t, "nft")
	says(t, m.must(t, exitOK, "bootstrap", "--no-service", "--no-selftest").Stdout, warning)
	m.must(t, exitOK, "uninstall")
	m.write(t, "/etc/ssh/sshd_config", "", 0o600) // it is started later in the boot
	if text := m.must(t, exitOK, "bootstrap", "--no-service", "--no-selftest").Stdout; strings.Contains(text, warning) {
		t.Errorf("sshd is configured: %s", text)
	}
}

// TestMultiplexer bootstraps in a session that a proxy passes to sshd, on a port of the
// profile that serves other protocols too. Who reaches that port reaches SSH: bootstrap and
// status say so.
func TestMultiplexer(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	sshd := m.sshd(t)
	var l net.Listener
	err := m.Host.Do(func() (err error) {
		l, err = net.Listen("tcp", ":443")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			var to net.Conn
			if err := m.Host.Do(func() (err error) {
				to, err = net.Dial("tcp", "127.0.0.1:22")
				return err
			}); err != nil {
				c.Close()
				continue
			}
			for _, ends := range [][2]net.Conn{{c, to}, {to, c}} {
				go func() {
					io.Copy(ends[0], ends[1])
					ends[0].Close()
				}()
			}
		}
	}()
	says(t, sshd.by(t, exitOK, 443, "bootstrap --profile web-only --no-service --no-selftest").Stdout, "which listens on 443/tcp: every address")
	says(t, sshd.by(t, exitOK, 443, "status --json").Stdout, "which listens on 443/tcp: every address")
	if text := m.status(t, exitOK).warnings(); strings.Contains(text, "443") {
		t.Errorf("at the console: %s", text)
	}
}
