package vm

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// containerPackages are the packages of a container: no kernel, and other programs that
// manage the firewall or write rules.
const containerPackages = "systemd,systemd-sysv,dbus,iproute2,iptables,nftables,openssh-server,ufw,firewalld,shorewall,shorewall6," +
	"fail2ban,docker.io,lynis"

// customizeContainer is run by mmdebstrap with the root directory of the new system.
const customizeContainer = `#!/bin/sh
set -e
echo host >"$1/etc/hostname"
echo 0123456789abcdef0123456789abcdef >"$1/etc/machine-id"
mkdir -p "$1/etc/sysconfig"
chroot "$1" systemctl -q disable nftables ufw firewalld shorewall shorewall6 fail2ban docker docker.socket containerd
# ufw and these do not go together, so they are there to be unpacked.
chroot "$1" sh -ec 'mkdir /packages; cd /packages; apt-get download -q netfilter-persistent iptables-persistent'
chroot "$1" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
  fstrim.timer lynis.timer getty@tty1.service console-getty.service
rm -r "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*
`

// BuildRoot builds a root directory for containers below dir, or returns the one that an
// earlier run built by the same recipe.
func BuildRoot(t testing.TB, dir string) string {
	t.Helper()
	recipe := sha256.Sum256([]byte(containerPackages + customizeContainer))
	out := filepath.Join(dir, "root-"+hex.EncodeToString(recipe[:])[:16])
	if _, err := os.Stat(out); err == nil {
		return out
	}
	t.Logf("building the system in %s", out)
	building, err := os.MkdirTemp(mkdir(t, dir), "building-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(building) })
	script := filepath.Join(t.TempDir(), "customize")
	write(t, script, customizeContainer, 0o755)
	run(t, 15*time.Minute, "mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--include="+containerPackages,
		`--aptopt=APT::Install-Recommends "false"`,
		"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
		"--customize-hook="+script, "bookworm", building+"/root")
	if err := os.Rename(building+"/root", out); err != nil {
		t.Fatal(err)
	}
	return out
}

// Container is a system booted by systemd-nspawn on the network of the lab's host. What
// listens there may be the test.
type Container struct {
	lab   *lab.Lab
	root  string
	net   *os.File
	group string
	ended chan struct{} // closed when systemd-nspawn has ended; nil if not started
	pid   int           // of systemd-nspawn
	first string        // the process ID of its first process
}

// StartContainer boots a copy of a system on a lab's host until the test ends.
func StartContainer(t testing.TB, l *lab.Lab, root string) *Container {
	t.Helper()
	c := &Container{lab: l, root: t.TempDir() + "/root"}
	run(t, 5*time.Minute, "cp", "-a", "--reflink=auto", root, c.root)
	err := l.Host.Do(func() (err error) {
		c.net, err = os.Open("/proc/thread-self/ns/net")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.net.Close() })
	c.group = fmt.Sprintf("basicfw-container-%d-%d", os.Getpid(), c.net.Fd())
	t.Cleanup(func() {
		if t.Failed() && c.ended != nil {
			for _, script := range []string{"iptables-save; ip6tables-save; nft list ruleset", "journalctl -b --no-pager -n 60"} {
				out, _ := c.Run(t, script)
				t.Logf("%s\n%s", script, out)
			}
		}
		c.Stop(t)
	})
	c.Start(t)
	return c
}

// Start boots the container and waits until the boot is finished.
func (c *Container) Start(t testing.TB) {
	t.Helper()
	// systemd takes the control group it runs in for the root. A group of its own separates
	// it from other containers.
	script := `for d in /sys/fs/cgroup /sys/fs/cgroup/systemd /sys/fs/cgroup/unified; do
	[ -e $d/cgroup.procs ] || continue
	mkdir $d/$0 && echo $$ >$d/$0/cgroup.procs || exit
done
exec "$@"`
	cmd := exec.Command("sh", "-c", script, c.group, "systemd-nspawn", "-q", "-D", c.root, "--register=no", "--keep-unit",
		fmt.Sprintf("--network-namespace-path=/proc/%d/fd/%d", os.Getpid(), c.net.Fd()), "--capability=CAP_NET_ADMIN",
		"--system-call-filter=bpf add_key keyctl", "-b") // for Docker's containers
	// The signal shuts the container down when the test ends, however it does. It is sent
	// when the thread that started the program ends.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	console, err := os.Create(filepath.Join(filepath.Dir(c.root), "console"))
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	cmd.Stdout, cmd.Stderr = console, console
	started, ended := make(chan error), make(chan struct{})
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			cmd.Wait()
		}
		close(ended)
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	c.ended, c.pid = ended, cmd.Process.Pid
	until(t, time.Minute, "booting the container", func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", c.pid))
		if err != nil {
			return err
		}
		c.first, _, _ = strings.Cut(string(children), " ")
		comm, _ := os.ReadFile("/proc/" + c.first + "/comm")
		if string(comm) != "systemd\n" {
			said, _ := os.ReadFile(console.Name())
			return fmt.Errorf("its first process is %q: %s", comm, said)
		}
		if out, _ := c.Run(t, "systemctl is-system-running"); out != "running\n" && out != "degraded\n" {
			return fmt.Errorf("it is %s", out)
		}
		return nil
	})
}

// Stop shuts the container down. The network stays as it is.
func (c *Container) Stop(t testing.TB) {
	t.Helper()
	if c.ended == nil {
		return
	}
	syscall.Kill(c.pid, syscall.SIGTERM)
	select {
	case <-c.ended:
	case <-time.After(30 * time.Second):
		t.Error("the container does not shut down")
		run(t, time.Minute, "kill", "-9", c.first)
		<-c.ended
	}
	c.ended = nil
	until(t, 10*time.Second, "the control groups to be empty", func() error {
		var err error
		for _, d := range []string{"", "/systemd", "/unified"} {
			top := "/sys/fs/cgroup" + d + "/" + c.group
			var dirs []string
			filepath.WalkDir(top, func(path string, e os.DirEntry, err error) error {
				if err == nil && e.IsDir() {
					dirs = append([]string{path}, dirs...)
				}
				return nil
			})
			for _, dir := range dirs {
				if e := os.Remove(dir); e != nil {
					err = e
				}
			}
		}
		return err
	})
}

// Run runs a script in the container, and returns its output and exit code.
func (c *Container) Run(t testing.TB, script string) (string, int) {
	t.Helper()
	cmd := exec.Command("nsenter", "-t", c.first, "-m", "-u", "-i", "-n", "-p", "-C", "--", "/bin/sh", "-c", script)
	cmd.Env = []string{"LC_ALL=C", "HOME=/root", "NO_COLOR=1", "SYSTEMD_COLORS=0", "SYSTEMD_PAGER=", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	out, _ := cmd.CombinedOutput()
	return string(out), cmd.ProcessState.ExitCode()
}

// Must runs a script that has to succeed, and returns its output.
func (c *Container) Must(t testing.TB, script string) string {
	t.Helper()
	out, code := c.Run(t, script)
	if code != 0 {
		t.Fatalf("%q in the container: exit code %d\n%s", script, code, out)
	}
	return out
}
