// Package vm boots virtual machines with real systemd and real cloud-init for the boot
// tests. One link connects a machine to the test's network namespace. Commands arrive on a
// serial port, independent of the network.
package vm

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/vm/wire"
)

// BootLimit is the time that a boot may take. Emulated on a busy computer, it takes a
// minute.
const BootLimit = 10 * time.Minute

// scriptLimit is the time that a script in the machine may take.
const scriptLimit = 2 * time.Minute

// Machine is a running virtual machine.
type Machine struct {
	dir      string
	image    Image
	wire     *Wire
	hardware Hardware
	done     chan struct{} // closed when qemu has ended
	end      string        // how qemu ended, once it has
	conn     net.Conn
	qemu     *os.Process

	cloudInit bool // runs at boot

	mu      sync.Mutex // guards what follows
	last    int
	waiting map[int]chan wire.Reply
}

// Start starts a machine on the wire until the test ends, with the hardware of its
// provider. If the test fails, the console and the journal of our unit are written to the
// test's log.
func Start(t testing.TB, image Image, w *Wire, hardware Hardware) *Machine {
	t.Helper()
	m := &Machine{dir: t.TempDir(), image: image, wire: w, hardware: hardware, cloudInit: true, waiting: map[int]chan wire.Reply{}}
	run(t, time.Minute, "qemu-img", "create", "-q", "-f", "qcow2", "-b", image.Disk, "-F", "raw", m.overlay())
	m.switchOn(t, "")
	t.Cleanup(m.switchOff)
	t.Cleanup(func() {
		if t.Failed() {
			m.report(t)
		}
	})
	return m
}

// switchOn starts qemu with additional kernel parameters.
func (m *Machine) switchOn(t testing.TB, arguments string) {
	t.Helper()
	cmd := exec.Command("qemu-system-x86_64", append([]string{"-nodefaults", "-display", "none",
		"-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1024",
		"-kernel", m.image.Kernel, "-initrd", m.image.Initrd,
		// no_timer_check: emulated on a busy computer, timer ticks may be so late that the
		// kernel rejects the timer.
		"-append", strings.TrimSpace("root=LABEL=root rw quiet console=ttyS0 mitigations=off no_timer_check systemd.show_status=1 " + m.hardware.Kernel + " " + arguments),
		"-drive", "if=virtio,format=qcow2,cache=unsafe,file=" + m.overlay(),
		"-netdev", "tap,id=wire,script=no,downscript=no,ifname=" + m.wire.Device,
		"-device", "virtio-net-pci,netdev=wire,addr=3,mac=" + m.wire.MAC,
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng",
		"-chardev", "socket,id=console,server=on,wait=off,path=" + m.dir + "/console.sock,logappend=on,logfile=" + m.console(),
		"-serial", "chardev:console",
		"-chardev", "socket,id=lab,server=on,wait=off,path=" + m.dir + "/lab.sock",
		"-device", "virtio-serial-pci", "-device", "virtserialport,chardev=lab,name=" + wire.Port}, m.hardware.Devices...)...)
	errs, err := os.Create(m.dir + "/qemu.log")
	if err != nil {
		t.Fatal(err)
	}
	defer errs.Close()
	cmd.Stdout, cmd.Stderr = errs, errs
	if err := m.wire.Outsider.Do(cmd.Start); err != nil {
		t.Fatalf("starting qemu: %v", err)
	}
	done := make(chan struct{})
	m.done, m.qemu = done, cmd.Process
	go func() {
		err := cmd.Wait()
		said, _ := os.ReadFile(m.dir + "/qemu.log")
		m.end = fmt.Sprintf("qemu has ended: %v %s", err, said)
		close(done)
	}()
	until(t, 30*time.Second, "connecting to the machine's serial port", func() error {
		if m.ended() {
			t.Fatal(m.end)
		}
		m.conn, err = net.Dial("unix", m.dir+"/lab.sock")
		return err
	})
	go m.listen(m.conn)
}

// switchOff kills qemu, which is a power cut.
func (m *Machine) switchOff() {
	m.qemu.Kill()
	<-m.done
	if m.conn != nil {
		m.conn.Close()
	}
}

// BootWith boots the machine again with kernel parameters, as typed at the boot loader's
// prompt, and waits until it is up. Reboots keep them.
func (m *Machine) BootWith(t testing.TB, arguments string) {
	t.Helper()
	r, err := m.call("systemctl --no-block poweroff", scriptLimit)
	if err != nil {
		t.Fatalf("asking for a power-off: %v", err)
	}
	select {
	case <-m.done:
	case <-time.After(scriptLimit):
		t.Fatal("the machine does not power off")
	}
	m.switchOff()
	m.switchOn(t, arguments)
	m.WaitBoot(t, r.Boot)
}

func (m *Machine) overlay() string { return filepath.Join(m.dir, "overlay.qcow2") }

// console returns the file with the output of the serial console.
func (m *Machine) console() string { return filepath.Join(m.dir, "console.log") }

// Console is the serial console as an administrator uses it.
type Console struct {
	m    *Machine
	conn net.Conn
	read int // bytes of the output already seen
}

// Sit opens the console until the test ends.
func (m *Machine) Sit(t testing.TB) *Console {
	t.Helper()
	conn, err := net.Dial("unix", m.dir+"/console.sock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	go io.Copy(io.Discard, conn) // it is in the file, too
	return &Console{m: m, conn: conn}
}

// Type types a line, waits until the words appear after it in this order, and returns the
// output.
func (c *Console) Type(t testing.TB, line string, words ...string) string {
	t.Helper()
	if fi, err := os.Stat(c.m.console()); err == nil {
		c.read = int(fi.Size())
	}
	if _, err := c.conn.Write([]byte(line + "\r")); err != nil {
		t.Fatal(err)
	}
	var shown string
	until(t, scriptLimit, fmt.Sprintf("the console to show %q after %q", words, line), func() error {
		data, err := os.ReadFile(c.m.console())
		if err != nil {
			return err
		}
		shown = string(data[c.read:])
		rest := shown
		for _, w := range words {
			_, after, found := strings.Cut(rest, w)
			if !found {
				return fmt.Errorf("it shows %q", shown)
			}
			rest = after
		}
		return nil
	})
	return shown
}

func (m *Machine) ended() bool {
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// listen passes replies to the calls that wait for them.
func (m *Machine) listen(conn net.Conn) {
	in := bufio.NewReader(conn)
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return
		}
		var r wire.Reply
		if json.Unmarshal(line, &r) != nil {
			continue // the rest of a reply cut off by a reboot
		}
		m.mu.Lock()
		if c := m.waiting[r.ID]; c != nil {
			c <- r
			delete(m.waiting, r.ID)
		}
		m.mu.Unlock()
	}
}

// call runs a script as root in the machine.
func (m *Machine) call(script string, limit time.Duration) (wire.Reply, error) {
	m.mu.Lock()
	m.last++
	q := wire.Request{ID: m.last, Script: script, Timeout: limit}
	c := make(chan wire.Reply, 1)
	m.waiting[q.ID] = c
	line, err := json.Marshal(q)
	if err == nil {
		_, err = m.conn.Write(append(line, '\n'))
	}
	m.mu.Unlock()
	if err != nil {
		return wire.Reply{}, fmt.Errorf("asking the machine: %w", err)
	}
	select {
	case r := <-c:
		return r, nil
	case <-m.done:
		return wire.Reply{}, errors.New(m.end)
	case <-time.After(limit + 5*time.Second):
		return wire.Reply{}, fmt.Errorf("no answer from the machine within %v", limit)
	}
}

// Run runs a script as root in the machine, and returns its output and exit code.
func (m *Machine) Run(t testing.TB, script string) (string, int) {
	t.Helper()
	r, err := m.call(script, scriptLimit)
	if err != nil {
		t.Fatalf("running %q: %v", script, err)
	}
	return r.Output, r.Code
}

// Must runs a script that has to succeed, and returns its output.
func (m *Machine) Must(t testing.TB, script string) string {
	t.Helper()
	out, code := m.Run(t, script)
	if code != 0 {
		t.Fatalf("%q in the machine: exit code %d\n%s", script, code, out)
	}
	return out
}

// WaitBoot waits until a boot other than the one before is finished: systemd has no job
// left, and cloud-init's last stage has run. It returns the boot's ID.
func (m *Machine) WaitBoot(t testing.TB, before string) string {
	t.Helper()
	var boot string
	until(t, BootLimit, "booting", func() error {
		r, err := m.call("true", time.Second)
		if m.ended() {
			t.Fatal(m.end)
		}
		if err == nil && r.Boot == before {
			err = errors.New("it has not shut down")
		}
		boot = r.Boot
		return err
	})
	// The tests check the result themselves ("degraded").
	if _, err := m.call("systemctl is-system-running --wait", BootLimit); err != nil {
		t.Fatalf("waiting for the end of the boot: %v", err)
	}
	return boot
}

// withoutCloudInit makes the next boots skip cloud-init, which would take half of their
// time.
func (m *Machine) withoutCloudInit(t testing.TB) {
	t.Helper()
	m.Must(t, "touch /etc/cloud/cloud-init.disabled")
	m.cloudInit = false
}

// Reboot reboots the machine and waits until it is up.
func (m *Machine) Reboot(t testing.TB) {
	t.Helper()
	r, err := m.call("systemctl --no-block reboot", scriptLimit)
	if err != nil {
		t.Fatalf("asking for a reboot: %v", err)
	}
	m.WaitBoot(t, r.Boot)
}

// Booted returns when the kernel started, to the second.
func (m *Machine) Booted(t testing.TB) time.Time {
	t.Helper()
	out := m.Must(t, "awk '/^btime/ { print $2 }' /proc/stat")
	sec, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil {
		t.Fatalf("reading when the machine booted: %v", err)
	}
	return time.Unix(sec, 0)
}

// report logs what is needed to find the cause of a failed test.
func (m *Machine) report(t testing.TB) {
	console, _ := os.ReadFile(m.console())
	const tail = 6000
	if len(console) > tail {
		console = console[len(console)-tail:]
	}
	t.Logf("the end of the console:\n%s", console)
	for _, script := range []string{
		"journalctl -b --no-pager -o short-monotonic -u basicfw-agent -n 200",
		"systemctl --no-pager --full status basicfw-agent cloud-init",
		"tail -n 40 /var/log/cloud-init-output.log",
		"rules",
	} {
		if m.ended() {
			return
		}
		r, err := m.call(script, 20*time.Second)
		t.Logf("%s: %v\n%s", script, err, r.Output)
	}
}
