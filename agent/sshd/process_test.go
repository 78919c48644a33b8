package sshd

import (
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// fake is a process of a fake /proc. The zero value is a root-owned sshd.
type fake struct {
	exe     string // default sshd; may have the kernel's suffix " (deleted)"
	owner   int    // of the program
	mode    os.FileMode
	ppid    int
	uid     string // default "0\t0\t0\t0"
	title   string // with NUL for spaces between arguments
	comm    string
	environ string
	sockets []uint64
	tty     int  // the device's number
	kernel  bool // a kernel thread: no program
	cgroup  string
	ns      string // of PIDs; default "pid:[1]"
}

func fakeProc(t *testing.T, processes map[int]fake) *Processes {
	t.Helper()
	lab.Need(t) // to create files of root and of other users
	dir := t.TempDir()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.MkdirAll(filepath.Join(dir, "proc", "self", "ns"), 0o755))
	must(os.Symlink("pid:[1]", filepath.Join(dir, "proc", "self", "ns", "pid")))
	for _, name := range []string{"sys", "net", "12x", "-3", "0"} { // not processes
		must(os.MkdirAll(filepath.Join(dir, "proc", name, "fd"), 0o755))
	}
	for pid, f := range processes {
		proc := filepath.Join(dir, "proc", strconv.Itoa(pid))
		must(os.MkdirAll(filepath.Join(proc, "fd"), 0o755))
		if !f.kernel {
			exe := filepath.Join(dir, strconv.Itoa(pid), or(f.exe, "sshd"))
			must(os.MkdirAll(filepath.Dir(exe), 0o755))
			must(os.WriteFile(exe, nil, 0o755))
			must(os.Chmod(exe, max(f.mode, 0o755)))
			must(os.Chown(exe, f.owner, f.owner))
			must(os.Symlink(exe, filepath.Join(proc, "exe")))
		}
		status := fmt.Sprintf("Name:\t%s\nPPid:\t%d\nUid:\t%s\nGid:\t0\t0\t0\t0\n", f.comm, f.ppid, or(f.uid, "0\t0\t0\t0"))
		// comm may contain anything, even ")".
		stat := fmt.Sprintf("%d (%s) 1) S %d 1 1 %d -1 0 0 0 0 0 0 0 0 0 20 0 1 0 %d 0 0", pid, f.comm, f.ppid, f.tty, pid*100)
		must(os.Mkdir(filepath.Join(proc, "ns"), 0o755))
		must(os.Symlink(or(f.ns, "pid:[1]"), filepath.Join(proc, "ns", "pid")))
		for name, text := range map[string]string{"cgroup": f.cgroup, "status": status, "stat": stat, "cmdline": f.title, "comm": f.comm + "\n", "environ": f.environ} {
			must(os.WriteFile(filepath.Join(proc, name), []byte(text), 0o644))
		}
		links := []string{"/dev/null", "pipe:[77]", "socket:[x]"}
		for _, inode := range f.sockets {
			links = append(links, fmt.Sprintf("socket:[%d]", inode))
		}
		for i, l := range links {
			must(os.Symlink(l, filepath.Join(proc, "fd", strconv.Itoa(i))))
		}
	}
	p, err := readProcesses(filepath.Join(dir, "proc"))
	must(err)
	return p
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// tcp returns a socket; it listens if remote is "".
func tcp(inode uint64, local, remote string) system.Socket {
	s := system.Socket{Proto: "tcp", Local: netip.MustParseAddrPort(local), Inode: inode}
	if remote != "" {
		s.Remote = netip.MustParseAddrPort(remote)
	}
	return s
}

func TestSSHDListener(t *testing.T) {
	const user = "1000\t1000\t1000\t1000"
	for _, tt := range []struct {
		name   string
		listen string // default 0.0.0.0:2222
		procs  map[int]fake
		want   bool
	}{
		{"the main process", "", map[int]fake{500: {ppid: 1, title: "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups", sockets: []uint64{9}}}, true},
		{"the main process, before 8.2", "", map[int]fake{500: {ppid: 1, title: "/usr/sbin/sshd\x00-D\x00", sockets: []uint64{9}}}, true},
		{"after an upgrade", "", map[int]fake{500: {exe: "sshd (deleted)", ppid: 1, title: "/usr/sbin/sshd\x00-D\x00", sockets: []uint64{9}}}, true},
		{"in a container, as PID 1", "", map[int]fake{1: {ppid: 0, title: "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups", sockets: []uint64{9}}}, true},
		{"on IPv6", "[::]:2222", map[int]fake{500: {ppid: 1, sockets: []uint64{9}}}, true},
		{"on loopback", "127.0.0.1:2222", map[int]fake{500: {ppid: 1, sockets: []uint64{9}}}, false},
		{"on loopback, IPv6", "[::1]:2222", map[int]fake{500: {ppid: 1, sockets: []uint64{9}}}, false},

		{"a user's own program called sshd", "", map[int]fake{500: {owner: 1000, uid: user, ppid: 1, sockets: []uint64{9}}}, false},
		{"a user runs root's sshd", "", map[int]fake{500: {uid: user, ppid: 1, sockets: []uint64{9}}}, false},
		{"root runs a user's program", "", map[int]fake{500: {owner: 1000, ppid: 1, sockets: []uint64{9}}}, false},
		{"a group-writable program", "", map[int]fake{500: {mode: 0o775, ppid: 1, sockets: []uint64{9}}}, false},
		{"set-user-ID", "", map[int]fake{500: {uid: "1000\t0\t0\t0", ppid: 1, sockets: []uint64{9}}}, false},
		{"another root-owned program", "", map[int]fake{500: {exe: "nginx", ppid: 1, title: "sshd: x [listener] y", sockets: []uint64{9}}}, false},
		{"a kernel thread", "", map[int]fake{500: {kernel: true, ppid: 1, sockets: []uint64{9}}}, false},
		{"ssh -R by root", "", map[int]fake{
			500: {ppid: 1, title: "/usr/sbin/sshd\x00-D\x00"},
			600: {ppid: 500, title: "/usr/sbin/sshd\x00-R\x00", sockets: []uint64{9}},
		}, false},
		{"ssh -R by root, orphaned", "", map[int]fake{600: {ppid: 1, title: "sshd: root@pts/0", sockets: []uint64{9}}}, false},
		{"ssh -R by root, 9.8 and later", "", map[int]fake{600: {exe: "sshd-session", ppid: 1, title: "sshd-session: root@notty", sockets: []uint64{9}}}, false},
		{"below sshd-session", "", map[int]fake{
			500: {exe: "sshd-session", ppid: 1},
			600: {ppid: 500, sockets: []uint64{9}},
		}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := fakeProc(t, tt.procs)
			sys := tree(t, map[string]string{configFile: "Port 22"})
			ports, why, _, err := p.SSHDPorts(sys, []system.Socket{
				tcp(9, or(tt.listen, "0.0.0.0:2222"), ""),
				{Proto: "udp", Local: netip.MustParseAddrPort("0.0.0.0:53"), Inode: 9},
				tcp(0, "0.0.0.0:7777", ""),
			}, nil)
			want := []uint16{22}
			if tt.want {
				want = []uint16{22, 2222}
			}
			if err != nil || !slices.Equal(ports, want) || len(why) != len(ports) {
				t.Errorf("got %v because %q, %v; want %v", ports, why, err, want)
			}
			if pid := slices.Max(slices.Collect(maps.Keys(tt.procs))); tt.want && why[1] != fmt.Sprintf("sshd listens on it (process %d)", pid) {
				t.Errorf("the reason is %q", why[1])
			}
		})
	}
}

// TestContained checks that a process called sshd counts only if it runs on this machine
// itself: a container may share the host's network.
func TestContained(t *testing.T) {
	const id = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for group, want := range map[string]bool{
		"":                                  true, // a kernel without cgroups
		"0::/system.slice/ssh.service":      true,
		"0::/system.slice/sshd-alt.service": true,
		"0::/user.slice/user-0.slice/session-3.scope":                 true,
		"12:pids:/x\n1:name=systemd:/system.slice/sshd.service\n0::/": true,
		"0::/init.scope": true, // PID 1's
		"0::/system.slice/docker-" + id + ".scope":          false,
		"1:name=systemd:/docker/" + id + "\n0::/init.scope": false,
		"0::/docker/" + id: false,
		"0::/docker/" + id + "/system.slice/ssh.service":                                false,
		"0::/system.slice/docker-" + id + ".scope/system.slice/ssh.service":             false,
		"0::/machine.slice/libpod-" + id + ".scope/container":                           false,
		"0::/machine.slice/systemd-nspawn@box.service/payload/system.slice/ssh.service": false,
		"0::/machine.slice/ssh.service":                                                 false,
		"0::/system.slice/web.service/libpod-payload-" + id:                             false,
		"0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-" + id + ".scope":        false,
		"0::/kubepods/besteffort/pod1/" + id:                                            false,
		"0::/lxc.payload.box/system.slice/ssh.service":                                  false,
		"0::/user.slice/user-0.slice/user@0.service/user.slice/libpod-" + id + ".scope": false,
		"0::/../docker-" + id + ".scope":                                                false,
	} {
		p := fakeProc(t, map[int]fake{1: {exe: "systemd", cgroup: "0::/init.scope"}, 500: {ppid: 1, cgroup: group, sockets: []uint64{9}}})
		if _, ok := p.ssh[9]; ok != want {
			t.Errorf("sshd in the cgroup %q counts: %t, want %t", group, ok, want)
		}
	}
	if p := fakeProc(t, map[int]fake{500: {ppid: 1, ns: "pid:[2]", sockets: []uint64{9}}}); len(p.ssh) > 0 {
		t.Error("sshd in another PID namespace counts")
	}
}

func TestNames(t *testing.T) {
	p := fakeProc(t, map[int]fake{
		1:   {exe: "systemd", comm: "systemd", sockets: []uint64{1, 2}},
		300: {exe: "nginx", comm: "nginx", sockets: []uint64{3}},
		301: {exe: "nginx", comm: "worker", sockets: []uint64{3}},
		400: {exe: "sshd", comm: "sshd", sockets: []uint64{2}},
		500: {exe: "evil", comm: "a\x1b[2Jb", sockets: []uint64{4}},
		600: {exe: "other", comm: "other", sockets: []uint64{99}},
	})
	var sockets []system.Socket
	for inode := range uint64(6) {
		sockets = append(sockets, tcp(inode, "0.0.0.0:1", ""))
	}
	want := map[uint64]string{1: "systemd", 2: "sshd", 3: "nginx", 4: "a?[2Jb"}
	if got := p.Names(sockets); !maps.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	// Linux 2.6.32 has no file comm. In fakeProc, a name in stat ends in ") 1".
	for _, proc := range p.list {
		if err := os.Remove(p.path(proc.pid, "comm")); err != nil {
			t.Fatal(err)
		}
	}
	for inode, name := range want {
		want[inode] = name + ") 1"
	}
	if got := p.Names(sockets); !maps.Equal(got, want) {
		t.Errorf("without comm: got %q, want %q", got, want)
	}
}

func TestParseStatus(t *testing.T) {
	for _, tt := range []struct {
		text string
		want status
		ok   bool
	}{
		{"Name:\tsshd\nPPid:\t1\nUid:\t0\t0\t0\t0\n", status{ppid: 1, same: true, root: true}, true},
		{"Name:\tsshd\nPPid:\t7\nUid:\t0\t0\t0\t1000\n", status{ppid: 7}, true},
		{"Name:\tx\\nUid:\t0\t0\t0\t0\nPPid:\t7\nUid:\t1\t1\t1\t1\n", status{ppid: 7, uid: 1, same: true}, true},
		{"PPid:\t1\nUid:\t0\t0\t0\n", status{}, false},
		{"PPid:\t1\nUid:\tx\t0\t0\t0\n", status{}, false},
		{"PPid:\tx\nUid:\t0\t0\t0\t0\n", status{}, false},
		{"PPid:\t1\n", status{}, false},
		{"Uid:\t0\t0\t0\t0\n", status{}, false},
		{"", status{}, false},
	} {
		got, err := parseStatus([]byte(tt.text))
		if (err == nil) != tt.ok || tt.ok && got != tt.want {
			t.Errorf("%q: got %+v, %v; want %+v", tt.text, got, err, tt.want)
		}
	}
}

// The process that runs the test is found, with its name.
func TestReadProcesses(t *testing.T) {
	p, err := ReadProcesses()
	if err != nil {
		t.Fatal(err)
	}
	i, ok := slices.BinarySearchFunc(p.list, os.Getpid(), func(q process, pid int) int { return q.pid - pid })
	if !ok || !strings.HasSuffix(p.list[i].exe, ".test") {
		t.Errorf("this process is missing or has another program: %v", p.list)
	}
	st, err := p.status(os.Getpid())
	if err != nil || st.ppid != os.Getppid() || st.root != (os.Getuid() == 0) {
		t.Errorf("got %+v, %v", st, err)
	}
}

func BenchmarkReadProcesses(b *testing.B) {
	for range b.N {
		if _, err := ReadProcesses(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkNames(b *testing.B) {
	p, err := ReadProcesses()
	if err != nil {
		b.Fatal(err)
	}
	for range b.N {
		p.Names([]system.Socket{tcp(1, "0.0.0.0:1", "")})
	}
}
