package kernel_test

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// forwarded is an entry of "forwarded" in "status --json".
type forwarded struct{ Family, Proto, Port, On, To, Program, Container string }

// engine is a container engine on a test machine.
type engine struct {
	m       *machine
	program string // as status names it
	cli     []string
	run     []string          // the command that runs a container, with its network
	address map[string]string // of the first container, as in a rule
	pid     string            // of the first process in its PID namespace
}

// newEngine prepares the machine for containers. They run in a PID namespace
// whose first process reads from a pipe: however the test ends, the pipe closes
// and all processes end. What they write to /etc, /run and /var/lib is private to
// the test, and so is their control group.
func newEngine(t *testing.T, m *machine, program string) *engine {
	t.Helper()
	lab.Need(t, "unshare", "nsenter")
	e := &engine{m: m, program: program}
	lib := t.TempDir()
	m.Host.Bind(t, lib, "/var/lib")
	if err := os.Symlink(filepath.Join(lib, "docker"), filepath.Join(m.root, "var/lib/docker")); err != nil {
		t.Fatal(err)
	}
	m.Host.MustRun(t, "sh", "-ec", "mkdir /run/etc; mount -t tmpfs tmpfs /run/etc; mkdir /run/etc/upper /run/etc/work; "+
		"mount -t overlay -o lowerdir=/etc,upperdir=/run/etc/upper,workdir=/run/etc/work overlay /etc")
	group := filepath.Join("/sys/fs/cgroup", e.group())
	if err := m.Host.Do(func() error { return unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "") }); err != nil {
		t.Fatalf("mounting cgroup2: %v", err)
	}
	t.Cleanup(func() {
		lab.Poll(t, "the control groups to be empty", func() bool {
			return m.Host.Do(func() error { return removeGroups(group) }) == nil
		})
	})

	run := filepath.Join(m.root, "run")
	pipe := filepath.Join(run, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	end, err := os.OpenFile(pipe, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	first := m.Host.Start(t, lab.Command{Args: []string{"unshare", "--pid", "--mount", "--fork", "sh", "-c",
		"read pid rest </proc/self/stat; echo $pid >/run/pid.new; mv /run/pid.new /run/pid; mount -t proc proc /proc; exec cat </run/pipe"}})
	t.Cleanup(func() { first.Wait(t) })
	t.Cleanup(func() { end.Close() })
	lab.Poll(t, "the PID namespace of the containers", func() bool {
		pid, err := os.ReadFile(filepath.Join(run, "pid"))
		e.pid = strings.TrimSpace(string(pid))
		return err == nil
	})
	return e
}

// shown returns a container's name as the program shows it: only Docker's are known.
func (e *engine) shown(name string) string {
	if e.program == "Docker" {
		return name
	}
	return ""
}

// group returns the name of the control group.
func (e *engine) group() string {
	return fmt.Sprintf("basicfw-%s-%s", e.program, filepath.Base(e.m.bin))
}

// removeGroups removes control groups, the inner ones first.
func removeGroups(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if os.IsNotExist(err) {
		return nil
	}
	for _, d := range slices.Backward(dirs) {
		if e := os.Remove(d); e != nil {
			err = e
		}
	}
	return err
}

// command returns a command that runs in the containers' namespace, where PATH
// finds the machine's variant of iptables first.
func (e *engine) command(args ...string) lab.Command {
	return lab.Command{
		Args: append([]string{"nsenter", "-t", e.pid, "-p", "-m", "--"}, args...),
		Env:  []string{"PATH=" + e.m.bin + ":/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"},
		Dir:  "/",
	}
}

// must runs a command of the engine.
func (e *engine) must(t *testing.T, args ...string) string {
	t.Helper()
	c := e.command(append(slices.Clone(e.cli), args...)...)
	r := e.m.Host.Run(t, c)
	if r.Code != 0 {
		t.Fatalf("%v: exit code %d\n%s%s", args, r.Code, r.Stdout, r.Stderr)
	}
	return r.Stdout
}

// buildGuest builds the program that runs in the containers.
func buildGuest(t *testing.T) string {
	t.Helper()
	binary := filepath.Join(t.TempDir(), "guest")
	build := exec.Command("go", "build", "-o", binary, "github.com/basicfw/basicfw-agent/test/kernel/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the guest: %v\n%s", err, out)
	}
	return binary
}

// image makes the image of all containers, which holds the guest alone.
func (e *engine) image(t *testing.T) {
	t.Helper()
	data, err := os.ReadFile(buildGuest(t))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Name: "guest", Mode: 0o755, Size: int64(len(data))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	c := e.command(append(slices.Clone(e.cli), "import", "-", "guest")...)
	c.Stdin = b.String()
	if r := e.m.Host.Run(t, c); r.Code != 0 {
		t.Fatalf("making the image: %s%s", r.Stdout, r.Stderr)
	}
}

// start runs a container with further options and waits until it listens.
func (e *engine) start(t *testing.T, name, port string, options ...string) {
	t.Helper()
	e.must(t, slices.Concat(e.run, []string{"--name", name}, options, []string{"guest", "/guest", "listen", port})...)
	listens := slices.Concat(e.cli, []string{"exec", name, "/guest", "dial", "127.0.0.1:" + port})
	lab.Poll(t, name+" to listen", func() bool { return e.m.Host.Run(t, e.command(listens...)).Code == 0 })
}

// docker starts dockerd with IPv6 in its default network.
func docker(t *testing.T, m *machine) *engine {
	t.Helper()
	lab.Need(t, "dockerd", "docker", "containerd", "runc")
	e := newEngine(t, m, "Docker")
	e.cli = []string{"docker"}
	e.run = []string{"run", "-d", "--cgroup-parent", "/" + e.group()}
	e.address = map[string]string{ipv4: "172.17.0.2:5432", ipv6: "[fd00:d0c::242:ac11:2]:5432"}
	log := filepath.Join(m.root, "run", "dockerd.log")
	daemon := m.Host.Start(t, e.command("sh", "-c", "exec dockerd --storage-driver vfs --ipv6 --fixed-cidr-v6 fd00:d0c::/64 --experimental --ip6tables >/run/dockerd.log 2>&1"))
	t.Cleanup(func() {
		m.Host.Run(t, e.command("sh", "-c", "kill $(cat /run/docker.pid)"))
		daemon.Wait(t)
	})
	t.Cleanup(func() {
		if text, err := os.ReadFile(log); err == nil && t.Failed() {
			t.Logf("dockerd:\n%s", text)
		}
	})
	lab.Poll(t, "dockerd", func() bool { return m.Host.Run(t, e.command("docker", "info")).Code == 0 })
	e.image(t)
	return e
}

// podman uses a network of its own, as podman's default network supports IPv4
// only. It has no daemon.
func podman(t *testing.T, m *machine) *engine {
	t.Helper()
	lab.Need(t, "podman", "conmon", "runc")
	e := newEngine(t, m, "podman")
	e.cli = []string{"podman", "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--network-backend", "netavark", "--events-backend", "file"}
	e.run = []string{"run", "-d", "--pids-limit", "0", "--cgroup-parent", "/" + e.group(), "--network", "both"}
	e.address = map[string]string{ipv4: "10.89.0.2:5432", ipv6: "[fd00:d0c:1::2]:5432"}
	e.must(t, "network", "create", "--disable-dns", "--ipv6", "--subnet", "10.89.0.0/24", "--subnet", "fd00:d0c:1::/64", "both")
	e.image(t)
	return e
}

// TestDocker and TestPodman publish a port that the profile closes.
func TestDocker(t *testing.T) {
	onEngine(t, func(t *testing.T, m *machine) { testEngine(t, m, docker(t, m)) })
}

func TestPodman(t *testing.T) {
	onEngine(t, func(t *testing.T, m *machine) { testEngine(t, m, podman(t, m)) })
}

// onEngine is onEach for container engines, which have their own rules in iptables: it runs
// on both variants of iptables, and with nftables chosen by the administrator.
func onEngine(t *testing.T, test func(t *testing.T, m *machine)) {
	onBoth(t, test)
	t.Run("beside", func(t *testing.T) {
		t.Parallel()
		m := newMachine(t, "nft")
		m.netlink = true
		m.write(t, localINI, "[agent]\nbackend = nftables\n", 0o600)
		test(t, m)
	})
}

func testEngine(t *testing.T, m *machine, e *engine) {
	host := m.Server.V4.String()
	m.Host.Listen(t, 22, 8080)
	m.Outsider.Listen(t, 7)
	e.start(t, "db", "5432", "-p", "5432:5432")
	others := m.rules(t)
	// works checks that the port answers, that the container reaches other hosts,
	// and that the engine's rules are unchanged.
	works := func(when string) {
		t.Helper()
		t.Log(when)
		for _, to := range m.Server.Both() {
			m.wantReach(t, to, 5432, true, true)
		}
		for _, to := range m.Client.Both() {
			says(t, e.must(t, "exec", "db", "/guest", "dial", netip.AddrPortFrom(to, 7).String()), "port 7")
		}
		same(t, "the engine's rules "+when, withoutOurs(others), withoutOurs(m.rules(t)))
	}
	wantVerdict := func(text string) {
		t.Helper()
		r := m.must(t, exitOK, "status")
		if first, _, _ := strings.Cut(r.Stdout, "\n"); first != text || r.Stderr != "" {
			t.Errorf("the verdict is %q, want %q\n%s", first, text, r.Stderr)
		}
		wantScreen(t, r.Stdout)
	}
	want := func(more ...forwarded) {
		t.Helper()
		s := m.status(t, exitOK)
		slices.SortFunc(s.Forwarded, func(a, b forwarded) int { return strings.Compare(a.Port+a.Family, b.Port+b.Family) })
		if diff := cmp.Diff(more, s.Forwarded); diff != "" {
			t.Errorf("forwarded (-want +got):\n%s", diff)
		}
	}
	db := []forwarded{{ipv4, "tcp", "5432", "", e.address[ipv4], e.program, e.shown("db")}, {ipv6, "tcp", "5432", "", e.address[ipv6], e.program, e.shown("db")}}

	works("before bootstrap")
	m.write(t, agentINI, "[containers]\npublished = leave\n", 0o640)
	m.bootstrap(t)
	works("after bootstrap")
	for _, to := range m.Server.Both() {
		m.wantReach(t, to, 8080, false, false)
	}
	want(db...)
	wantVerdict("protected, but 5432/tcp is published by " + e.program + ", bypassing this firewall")
	for _, l := range m.status(t, exitOK).Listening {
		if l.Proto == "tcp" && (l.Reachable != nil && *l.Reachable) != (l.Port != 8080) {
			t.Errorf("listening on port %d (%s): reachable %v", l.Port, l.Process, l.Reachable)
		}
	}
	m.must(t, exitOK, "verify")

	t.Log("ports of one address, and of loopback")
	e.start(t, "more", "9000", "-p", host+":9000:9000", "-p", host+":8000-8002:9100-9102/udp", "-p", "127.0.0.1:6379:6379")
	m.wantReach(t, m.Server.V4, 9000, true, true)
	m.wantReach(t, m.Server.V6, 9000, false, false)
	to, _, _ := strings.Cut(strings.Replace(e.address[ipv4], ".2:", ".3:", 1), ":")
	list := slices.Clone(db)
	if e.program == "podman" { // writes one rule for a range
		list = append(list, forwarded{ipv4, "udp", "8000-8002", host, to + ":9100-9102", e.program, ""})
	} else {
		for i := range 3 {
			list = append(list, forwarded{ipv4, "udp", fmt.Sprint(8000 + i), host, fmt.Sprintf("%s:%d", to, 9100+i), e.program, e.shown("more")})
		}
	}
	want(append(list, forwarded{ipv4, "tcp", "9000", host, to + ":9000", e.program, e.shown("more")})...)
	wantVerdict("protected, but 5 ports are published by " + e.program + ", bypassing this firewall")
	e.must(t, "rm", "-f", "more")
	want(db...)
	others = m.rules(t)

	m.must(t, exitOK, "apply")
	works("after apply")
	m.by(t, hand{"-F BASICFW-INPUT; -P INPUT ACCEPT", byTakeAway.nft}, families()...)
	m.must(t, exitOK, "verify", "--repair")
	works("after a repair")

	t.Log("with the container removed")
	e.must(t, "rm", "-f", "db")
	want([]forwarded{}...)
	wantVerdict("protected: profile web+mail on IPv4 and IPv6")
	for _, to := range m.Server.Both() {
		m.wantReach(t, to, 5432, false, false)
	}

	testHeld(t, m, e)
	e.start(t, "db", "5432", "-p", "5432:5432")
	others = m.rules(t)
	m.must(t, exitOK, "uninstall")
	works("after uninstall")
	e.must(t, "rm", "-f", "db")
}

// testHeld holds the ports of an engine to the profile.
func testHeld(t *testing.T, m *machine, e *engine) {
	t.Log("held to the profile")
	m.write(t, agentINI, "[containers]\npublished = profile\n", 0o640)
	m.must(t, exitOK, "apply")
	e.start(t, "db", "5432", "-p", "5432:5432")
	want := func(client bool) {
		t.Helper()
		for _, to := range m.Server.Both() {
			m.wantReach(t, to, 5432, client, false)
		}
		for _, to := range m.Client.Both() {
			says(t, e.must(t, "exec", "db", "/guest", "dial", netip.AddrPortFrom(to, 7).String()), "port 7")
		}
		m.must(t, exitOK, "verify")
	}
	want(false)
	by := e.program
	if e.shown("db") != "" {
		by += " (db)"
	}
	says(t, m.must(t, exitOK, "status").Stdout, "protected: profile web+mail", "5432/tcp published by "+by+": closed; open it: basicfw-agent")
	m.must(t, exitOK, "open", "5432/tcp", "--from", m.Client.String())
	want(true)
	e.must(t, "rm", "-f", "db")
	e.start(t, "db", "5432", "-p", "5432:5432")
	want(true)
	m.must(t, exitOK, "close", "5432/tcp")
	want(false)
	e.must(t, "rm", "-f", "db")
}

// netavark is what its newer versions write for podman: native nftables rules,
// which iptables-save does not print.
const netavark = `table inet netavark {
	chain PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local jump NETAVARK-HOSTPORT-DNAT
	}
	chain OUTPUT {
		type nat hook output priority -100; policy accept;
		fib daddr type local jump NETAVARK-HOSTPORT-DNAT
	}
	chain NETAVARK-HOSTPORT-DNAT {
		tcp dport 5432 jump nv_2f259bab_10_88_0_0_nm16_dnat
		tcp dport 5432 jump nv_2f259bab_fd00----_nm64_dnat
	}
	chain nv_2f259bab_10_88_0_0_nm16_dnat {
		tcp dport 5432 dnat ip to 10.88.0.2:5432
	}
	chain nv_2f259bab_fd00----_nm64_dnat {
		tcp dport 5432 dnat ip6 to [fd00::2]:5432
	}
}
`

// TestForwardedByNftables does the same without iptables: a container set up by
// hand, and the rules of a current netavark.
func TestForwardedByNftables(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.MustRun(t, "ip", "netns", "add", "guest")
		for _, line := range []string{
			"link add podman0 type veth peer name eth0 netns guest",
			"addr add 10.88.0.1/16 dev podman0", "addr add fd00::1/64 dev podman0 nodad", "link set podman0 up",
			"-n guest addr add 10.88.0.2/16 dev eth0", "-n guest addr add fd00::2/64 dev eth0 nodad", "-n guest link set eth0 up", "-n guest link set lo up",
			"-n guest route add default via 10.88.0.1", "-n guest route add default via fd00::1",
		} {
			m.Host.MustRun(t, append([]string{"ip"}, strings.Fields(line)...)...)
		}
		if err := m.Host.Do(func() error {
			for _, path := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
				if err := os.WriteFile(path, []byte("1"), 0); err != nil {
					return err
				}
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		binary := buildGuest(t)
		guest := m.Host.Start(t, lab.Command{Args: []string{"ip", "netns", "exec", "guest", binary, "listen", "5432"}})
		t.Cleanup(func() { guest.Stop(t) })
		lab.Poll(t, "the guest to listen", func() bool {
			return m.Host.Run(t, lab.Command{Args: []string{"ip", "netns", "exec", "guest", binary, "dial", "127.0.0.1:5432"}}).Code == 0
		})
		m.Host.Listen(t, 5432, 8080)
		m.write(t, localINI, "[containers]\npublished = leave\n", 0o600)
		m.bootstrap(t)
		for _, to := range m.Server.Both() {
			m.wantReach(t, to, 5432, false, false)
		}
		if r := m.Host.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: netavark}); r.Code != 0 {
			t.Fatal(r.Stderr)
		}
		for _, to := range m.Server.Both() {
			m.wantReach(t, to, 5432, true, true)
			m.wantReach(t, to, 8080, false, false)
		}
		s := m.status(t, exitOK)
		if diff := cmp.Diff([]forwarded{{ipv4, "tcp", "5432", "", "10.88.0.2:5432", "podman", ""}, {ipv6, "tcp", "5432", "", "[fd00::2]:5432", "podman", ""}}, s.Forwarded); diff != "" {
			t.Errorf("forwarded (-want +got):\n%s", diff)
		}
		// Neither command closes it.
		for _, words := range [][]string{{"close", "5432/tcp"}, {"open", "5432/tcp"}} {
			says(t, m.must(t, exitOK, words...).Stdout, "note: ipv4 5432/tcp to", "bypasses this firewall")
		}
		m.must(t, exitOK, "close", "5432/tcp")
		says(t, m.must(t, exitOK, "status").Stdout, "protected, but 5432/tcp is published by podman, bypassing this firewall\n")
		m.must(t, exitOK, "uninstall")
		for _, to := range m.Server.Both() {
			m.wantReach(t, to, 5432, true, true)
		}
	})
}
