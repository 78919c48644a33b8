package sshd

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// insideEnv makes the test program print a report, if an SSH session of the machine
// under test runs it.
const insideEnv = "BASICFW_SESSION_TEST"

// report is what this package detects inside the session.
type report struct {
	Invoker   string
	Listening []uint16 // from the kernel
	Ports     []uint16 // sshd's
	Why       []string
	Preauth   string // an error about an unauthenticated connection
}

// TestInside is part of TestRealSSHD, which runs it inside a session.
func TestInside(t *testing.T) {
	mode := os.Getenv(insideEnv)
	if mode == "" {
		return
	}
	var r report
	if mode == "preauth" {
		r.Preauth = preauth(t)
	}
	p, err := ReadProcesses()
	if err != nil {
		t.Fatal(err)
	}
	listening, established := procNet(t)
	for _, s := range listening {
		r.Listening = append(r.Listening, s.Local.Port())
	}
	if c, ok := p.Invoker(p.Caller(os.Getpid()), listening, established); ok {
		r.Invoker = c.Prefix.String()
	}
	r.Ports, r.Why, _, err = p.SSHDPorts(&system.System{Root: t.TempDir()}, listening, nil)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("\nreport %s\n", text)
}

// preauth connects to sshd, sends nothing, and checks how the connection is classified.
func preauth(t *testing.T) string {
	c, err := net.Dial("tcp", "192.0.2.1:2222")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	me := netip.MustParseAddrPort(c.LocalAddr().String())
	value := fmt.Sprintf("%s %d 192.0.2.1 2222", me.Addr(), me.Port())
	// sshd forks first, and sets the child's title later.
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		p, err := ReadProcesses()
		if err != nil {
			t.Fatal(err)
		}
		listening, established := procNet(t)
		for _, s := range established {
			h := p.ssh[s.Inode]
			if s.Remote != me || !h.root || !h.preauth {
				continue
			}
			if client, ok := p.Invoker(Caller{connections: []string{value}}, listening, established); ok {
				return "accepted as the client: " + client.Prefix.String()
			}
			return ""
		}
	}
	return "no sshd process was found before the login"
}

// procNet reads the sockets of this network namespace.
func procNet(t *testing.T) (listening, established []system.Socket) {
	t.Helper()
	end := func(text string) netip.AddrPort {
		host, port, _ := strings.Cut(text, ":")
		raw, err1 := hex.DecodeString(host)
		n, err2 := strconv.ParseUint(port, 16, 16)
		if err1 != nil || err2 != nil {
			t.Fatal(text, err1, err2)
		}
		for i := 0; i < len(raw); i += 4 {
			binary.LittleEndian.PutUint32(raw[i:], binary.BigEndian.Uint32(raw[i:]))
		}
		addr, _ := netip.AddrFromSlice(raw)
		return netip.AddrPortFrom(addr.Unmap(), uint16(n))
	}
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, row := range strings.Split(string(data), "\n")[1:] {
			f := strings.Fields(row)
			if len(f) < 10 {
				continue
			}
			inode, err := strconv.ParseUint(f[9], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			s := system.Socket{Proto: "tcp", Local: end(f[1]), Remote: end(f[2]), Inode: inode}
			switch f[3] {
			case "0A":
				listening = append(listening, s)
			case "01":
				established = append(established, s)
			}
		}
	}
	return listening, established
}

// TestRealSSHD runs inside sessions of this machine's sshd, between two network
// namespaces.
func TestRealSSHD(t *testing.T) {
	sys := &system.System{}
	lab.Need(t, "ip", "sshd", "ssh", "ssh-keygen", "unshare")
	run := func(args ...string) (string, error) {
		res, err := sys.Run(context.Background(), system.Command{Name: args[0], Args: args[1:]})
		return string(res.Stdout), err
	}
	must := func(args ...string) string {
		t.Helper()
		out, err := run(args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}

	host, client := fmt.Sprintf("basicfw-h%d", os.Getpid()), fmt.Sprintf("basicfw-c%d", os.Getpid())
	for _, ns := range []string{host, client} {
		must("ip", "netns", "add", ns)
		t.Cleanup(func() { run("ip", "netns", "del", ns) })
		must("ip", "-n", ns, "link", "set", "lo", "up")
	}
	must("ip", "link", "add", "eth0", "netns", host, "type", "veth", "peer", "name", "eth0", "netns", client)
	for ns, number := range map[string]string{host: "1", client: "2"} {
		must("ip", "-n", ns, "addr", "add", "192.0.2."+number+"/24", "dev", "eth0")
		must("ip", "-n", ns, "addr", "add", "2001:db8::"+number+"/64", "dev", "eth0", "nodad")
		must("ip", "-n", ns, "link", "set", "eth0", "up")
	}

	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	makeKey(t, sys, file("hostkey"))
	makeKey(t, sys, file("key"))
	config := fmt.Sprintf(`Port 2222
ListenAddress 0.0.0.0
ListenAddress ::
ListenAddress 127.0.0.1:2224
HostKey %s
AuthorizedKeysFile %s
PidFile %s
StrictModes no
UsePAM no
GatewayPorts yes
PermitRootLogin yes
`, file("hostkey"), file("key.pub"), file("pid"))
	if err := os.WriteFile(file("config"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	sshd, err := sys.LookPath("sshd")
	if err != nil {
		t.Fatal(err)
	}
	must(append([]string{"ip", "netns", "exec", host}, withRunDir(sshd, "-f", file("config"), "-E", file("log"))...)...)
	t.Cleanup(func() {
		if log, err := os.ReadFile(file("log")); t.Failed() && err == nil {
			t.Logf("sshd's log:\n%s", log)
		}
	})
	stop := func() {
		if text, err := os.ReadFile(file("pid")); err == nil {
			if pid, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil && pid > 1 {
				syscall.Kill(pid, syscall.SIGTERM)
			}
		}
	}
	t.Cleanup(stop)
	// sshd listens after it went to the background, and writes its PID a little later.
	wait(t, "sshd's PID", func() bool { _, err := os.Stat(file("pid")); return err == nil })

	ssh := func(address string, args ...string) []string {
		return append([]string{"ip", "netns", "exec", client, "ssh", "-F", "/dev/null", "-p", "2222", "-i", file("key"),
			"-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
			"root@" + address}, args...)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	inside := fmt.Sprintf("%s=yes %s -test.run ^TestInside$", insideEnv, self)
	read := func(out string) (r report) {
		t.Helper()
		_, text, _ := strings.Cut(out, "\nreport ")
		text, _, _ = strings.Cut(text, "\n")
		if err := json.Unmarshal([]byte(text), &r); err != nil {
			t.Fatalf("%v in %q", err, out)
		}
		return r
	}

	for _, tt := range []struct{ name, address, command, want string }{
		{"IPv4", "192.0.2.1", inside, "192.0.2.2/32"},
		{"IPv6", "2001:db8::1", inside, "2001:db8::/64"},
		{"the variable dropped", "192.0.2.1", "env -i " + inside + "; true", "192.0.2.2/32"},
		{"a stale variable, and a valid one in an ancestor", "192.0.2.1", "SSH_CONNECTION='203.0.113.9 1 192.0.2.1 2222' " + inside + "; true", "192.0.2.2/32"},
		{"a stale variable in all processes", "192.0.2.1", "export SSH_CONNECTION='203.0.113.9 1 192.0.2.1 2222'; exec sh -c '" + inside + "; true'", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := read(must(ssh(tt.address, tt.command)...))
			if r.Invoker != tt.want {
				t.Errorf("the invoker is %q, want %q", r.Invoker, tt.want)
			}
			if !slices.Equal(r.Ports, []uint16{2222}) || len(r.Why) != 1 || !strings.HasPrefix(r.Why[0], "sshd listens on it (process ") {
				t.Errorf("sshd's ports are %v because %q, want 2222", r.Ports, r.Why)
			}
		})
	}

	t.Run("a connection without a login", func(t *testing.T) {
		out := must("ip", "netns", "exec", host, "env", insideEnv+"=preauth", self, "-test.run", "^TestInside$")
		if r := read(out); r.Preauth != "" {
			t.Error(r.Preauth)
		}
	})

	// A session that itself listens, for ssh -R, and continues when sshd ends.
	control := file("control")
	// With this option, -f waits until the port is open (ssh_config(5)).
	forward := slices.Insert(ssh("192.0.2.1"), 5, "-o", "ExitOnForwardFailure=yes", "-f", "-N", "-M", "-S", control, "-R", "0.0.0.0:9000:127.0.0.1:9")
	must(forward...)
	t.Cleanup(func() { run("ip", "netns", "exec", client, "ssh", "-S", control, "-O", "exit", "192.0.2.1") })
	look := func() report {
		t.Helper()
		return read(must("ip", "netns", "exec", host, "env", insideEnv+"=yes", self, "-test.run", "^TestInside$"))
	}
	t.Run("ssh -R", func(t *testing.T) {
		r := look()
		if !slices.Contains(r.Listening, 9000) || !slices.Contains(r.Listening, 2224) {
			t.Fatalf("nothing listens on 9000 or 2224: %v", r.Listening)
		}
		if !slices.Equal(r.Ports, []uint16{2222}) || r.Invoker != "" {
			t.Errorf("sshd's ports are %v, the invoker %q; want 2222 and no client", r.Ports, r.Invoker)
		}
	})
	t.Run("ssh -R, orphaned", func(t *testing.T) {
		stop()
		wait(t, "the end of sshd", func() bool { return !slices.Contains(look().Listening, 2222) })
		r := look()
		if !slices.Contains(r.Listening, 9000) {
			t.Fatalf("nothing listens on 9000: %v", r.Listening)
		}
		if !slices.Equal(r.Ports, []uint16{22}) {
			t.Errorf("sshd's ports are %v because %q, want the default", r.Ports, r.Why)
		}
	})
}

// wait polls until f is true.
func wait(t *testing.T, what string, f func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); <-tick.C {
		if f() {
			return
		}
	}
	t.Fatal("timeout waiting for", what)
}
