package kernel_test

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// mallory is an unprivileged user. In each test below he forges evidence, which must decide
// nothing.
const mallory = 65534

// hold connects from an address of the outsider to a port of the server, waits for the
// greeting, and keeps the connection. It returns the SSH_CONNECTION that would describe it.
func (m *machine) hold(t *testing.T, from netip.Addr, port uint16) (sshConnection string) {
	t.Helper()
	d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0)), Timeout: lab.Patient}
	to := netip.AddrPortFrom(m.Server.Like(from), port)
	var c net.Conn
	lab.Poll(t, "an answer of "+to.String(), func() bool {
		return m.Outsider.Do(func() (err error) {
			c, err = d.Dial("tcp", to.String())
			return err
		}) == nil
	})
	t.Cleanup(func() { c.Close() })
	if err := c.SetReadDeadline(time.Now().Add(lab.Patient)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 64)); err != nil {
		t.Fatalf("%v does not answer: %v", to, err)
	}
	me := netip.MustParseAddrPort(c.LocalAddr().String())
	return fmt.Sprintf("%v %d %v %d", me.Addr(), me.Port(), to.Addr(), port)
}

// asMallory starts a program as mallory until the test ends.
func (m *machine) asMallory(t *testing.T, args ...string) {
	t.Helper()
	p := m.Host.Start(t, lab.Command{Args: args, UID: mallory, Dir: "/"})
	t.Cleanup(func() {
		if r := p.Stop(t); t.Failed() {
			t.Logf("%v printed %s%s", args, r.Stdout, r.Stderr)
		}
	})
}

// believesNot runs the program with SSH_CONNECTION set, as sudo may leave it, but without a
// session: no address may be pinned or allowed.
func (m *machine) believesNot(t *testing.T, sshConnection string) {
	t.Helper()
	who, _, _ := strings.Cut(sshConnection, " ")
	run := func(code int, args ...string) string {
		t.Helper()
		c := m.command(args...)
		c.Env = append(c.Env, "SSH_CONNECTION="+sshConnection, "SSH_CLIENT="+who+" 50000 22")
		r := m.Host.Run(t, c)
		if r.Code != code {
			t.Errorf("%v of SSH_CONNECTION=%q: exit code %d, want %d\n%s%s", args, sshConnection, r.Code, code, r.Stdout, r.Stderr)
		}
		return r.Stdout + r.Stderr
	}
	run(exitOK, "bootstrap", "--profile", "web-only", "--no-service")
	before := m.everything(t)
	says(t, run(exitFailed, "ssh", "allow", "me"), "address")
	same(t, "after ssh allow me", before, m.everything(t))
	if strings.Contains(before, who) {
		t.Errorf("%s is in the rules or in a file", who)
	}
	var s status
	text := run(exitOK, "status", "--json")
	if err := json.Unmarshal([]byte(text), &s); err != nil || s.SSH.Mode != "limited" || len(s.SSH.Allow) > 0 || s.SSH.Caller.Address != "" || len(s.SSH.Sessions) > 0 {
		t.Errorf("status: %v, SSH %+v, want it limited for all, and no session seen", err, s.SSH)
	}
	if !slices.Equal(s.SSH.Ports, []uint16{22}) {
		t.Errorf("sshd's ports are %v, want 22 alone", s.SSH.Ports)
	}
}

// TestForgedSSHD runs, as mallory, his own program called sshd, and the real sshd. Each
// listens and has a connection.
func TestForgedSSHD(t *testing.T) {
	for _, kind := range []string{"a program called sshd", "the real sshd"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, "nft")
			m.sshd(t)
			dir := t.TempDir()
			const port = 2222
			if kind == "the real sshd" {
				for path, mode := range map[string]os.FileMode{filepath.Dir(dir): 0o755, dir: 0o755} {
					if err := os.Chmod(path, mode); err != nil {
						t.Fatal(err)
					}
				}
				m.Host.MustRun(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", dir+"/key")
				if err := os.Chown(dir+"/key", mallory, mallory); err != nil {
					t.Fatal(err)
				}
				path := strings.TrimSpace(m.Host.MustRun(t, "sh", "-c", "command -v sshd"))
				m.asMallory(t, path, "-D", "-e", "-f", "/dev/null", "-h", dir+"/key", "-p", fmt.Sprint(port), "-o", "PidFile=none", "-o", "LogLevel=ERROR")
			} else {
				sshd := filepath.Join(dir, "sshd")
				if err := os.Rename(buildGuest(t), sshd); err != nil {
					t.Fatal(err)
				}
				for _, path := range []string{filepath.Dir(dir), dir, sshd} {
					if err := os.Chmod(path, 0o755); err != nil {
						t.Fatal(err)
					}
				}
				m.asMallory(t, sshd, "listen", fmt.Sprint(port))
			}
			m.believesNot(t, m.hold(t, m.Stranger.V4, port))
			if text := m.rules(t); strings.Contains(text, fmt.Sprint(port)) {
				t.Errorf("the rules have mallory's port:\n%s", text)
			}
			m.wantOpen(t, map[string]string{"2222/tcp": nobody})
		})
	}
}

// TestForgedEnviron sets SSH_CONNECTION to an unauthenticated connection to root's sshd,
// and to one that does not exist.
func TestForgedEnviron(t *testing.T) {
	t.Parallel()
	for _, kind := range []string{"an unauthenticated connection", "no connection"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			m := newMachine(t, "nft")
			sshd := m.sshd(t)
			value := m.Stranger.V4.String() + " 50000 " + m.Server.V4.String() + " 22"
			if kind == "an unauthenticated connection" {
				value = m.hold(t, m.Stranger.V4, 22)
			}
			m.believesNot(t, value)
			// It is believed of an authenticated session.
			says(t, you(t, sshd.must(t, exitOK, m.Client.V4, "status").Stdout), m.Client.V4.String())
		})
	}
}

// TestForgedUtmp puts mallory's text into utmp's host field, where libutempter lets any
// user write, and an address into the binary field. The address's owner has a connection
// but has not logged in.
func TestForgedUtmp(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	sshd := m.sshd(t)
	record := func(host string, addr netip.Addr) []byte {
		r, at := make([]byte, 400), 360
		if runtime.GOARCH == "amd64" {
			r, at = r[:384], 348
		}
		binary.NativeEndian.PutUint16(r, 7) // USER_PROCESS
		copy(r[8:], "pts/7")
		copy(r[44:], "root")
		copy(r[76:], host)
		copy(r[at:], addr.AsSlice())
		return r
	}
	utmp := record(m.Stranger.V4.String(), netip.Addr{})
	value := m.hold(t, m.Stranger.V4, 22)
	for what, more := range map[string][]byte{"text": nil, "text and a binary address": record("", m.Stranger.V4)} {
		m.write(t, "/run/utmp", string(append(slices.Clone(utmp), more...)), 0o664)
		m.believesNot(t, value)
		t.Log(what)
	}
	// Even for an authenticated session the text is ignored. The file is read: a session
	// named by its binary address is seen.
	for seen, r := range map[string][]byte{"": record(m.Client.V4.String(), netip.Addr{}), m.Client.V4.String(): record("", m.Client.V4)} {
		m.write(t, "/run/utmp", string(r), 0o664)
		var s status
		text := sshd.must(t, exitOK, m.Client.V4, "status --json").Stdout
		if err := json.Unmarshal([]byte(text), &s); err != nil || strings.Join(s.SSH.Sessions, " ") != seen || s.SSH.Mode != "limited" {
			t.Errorf("%v: SSH %+v, want %q seen, with no effect", err, s.SSH, seen)
		}
	}
}

// TestForgedLock locks, as mallory, every file that he can open: commands and the service
// keep working.
func TestForgedLock(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.bootstrap(t)
		s := m.serve(t)
		defer s.Stop(t)
		m.must(t, exitOK, "open", "8081/tcp") // iptables makes its lock
		as := func(script string) lab.Result {
			return m.Host.Run(t, lab.Command{Args: []string{"sh", "-c", script}, UID: mallory, Dir: m.root})
		}
		locks := []string{"run/basicfw-agent/lock"}
		if _, err := os.Stat(filepath.Join(m.root, "run/xtables.lock")); err == nil {
			locks = append(locks, "run/xtables.lock")
		} else if strings.Contains(m.multi, "legacy") {
			t.Error(err)
		}
		for _, lock := range locks {
			if r := as("flock -n " + lock + " true"); r.Code == 0 || !strings.Contains(r.Stderr, "ermission denied") {
				t.Errorf("flock of %s: exit code %d, %s", lock, r.Code, r.Stderr)
			}
			if r := as("rm -f " + lock); r.Code == 0 {
				t.Errorf("%s could be removed", lock)
			}
		}
		if r := as("touch run/basicfw-agent/new"); r.Code == 0 {
			t.Error("he can create files next to the lock")
		}
		held := filepath.Join(t.TempDir(), "held")
		if err := os.WriteFile(held, nil, 0o666); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{filepath.Dir(held), filepath.Dir(filepath.Dir(held)), held} {
			if err := os.Chmod(path, 0o777); err != nil {
				t.Fatal(err)
			}
		}
		p := m.Host.Start(t, lab.Command{UID: mallory, Dir: m.root, Args: []string{"sh", "-c", `
			n=0
			for f in $(find . -readable 2>/dev/null); do
				flock -n $f sleep 80 & n=$((n + 1))
			done
			echo $n >` + held + `; trap 'kill $(jobs -p)' TERM; wait`}})
		defer p.Stop(t)
		lab.Poll(t, "mallory to hold his locks", func() bool {
			data, _ := os.ReadFile(held)
			return len(data) > 0
		})
		m.must(t, exitOK, "close", "8081/tcp")
		m.must(t, exitOK, "open", "8082/tcp")
		m.must(t, exitOK, "verify")
		lab.Poll(t, "the service to follow", func() bool {
			return strings.Contains(m.read(t, "/run/basicfw-agent/status.json"), "8082")
		})
	})
}

// TestLockOfHungProcess keeps the lock in a hung root process. A boot does not wait long
// for it, and a command names the holder.
func TestLockOfHungProcess(t *testing.T) {
	t.Parallel()
	m := newMachine(t, "nft")
	m.Host.Listen(t, 80, 8080)
	m.bootstrap(t)
	path := filepath.Join(m.root, "run/basicfw-agent/lock")
	lock, err := os.OpenFile(path, os.O_RDWR|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if _, err := lock.WriteString("4711 hang\x1b[2J\n"); err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	before := m.rules(t)
	command := m.start(t, "open", "8080/tcp") // it waits for a minute
	m.reboot(t)
	s := m.serve(t)
	m.wantOpen(t, map[string]string{"80/tcp": everybody, "8080/tcp": nobody})
	r := command.Wait(t)
	if r.Code != exitFailed {
		t.Errorf("exit code %d\n%s", r.Code, r.Stdout)
	}
	oneLine(t, r.Stderr, "process 4711: basicfw-agent hang?[2J")
	says(t, s.Stop(t).Stderr, "without the lock")
	same(t, "the rules", before, m.rules(t))
}
