//go:build vm

package vm

import (
	"errors"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// sysv is a machine with System V's init and legacy iptables.
type sysv struct {
	*site
	m *Machine
}

// wait waits for the end of a boot other than the one before, and returns its ID.
func (s *sysv) wait(t *testing.T, before string) (boot string) {
	t.Helper()
	until(t, BootLimit, "booting", func() error {
		r, err := s.m.call("test -e /run/lab-booted", time.Second)
		if s.m.ended() {
			t.Fatal(s.m.end)
		}
		boot = r.Boot
		switch {
		case err == nil && r.Boot == before:
			return errors.New("it has not shut down")
		case err == nil && r.Code != 0:
			return errors.New("the scripts of the runlevel have not ended")
		}
		return err
	})
	return boot
}

// reboot reboots the machine, and returns when it began to.
func (s *sysv) reboot(t *testing.T) time.Time {
	t.Helper()
	since := time.Now()
	r, err := s.m.call("shutdown -r now </dev/null >/dev/null 2>&1 &", scriptLimit)
	if err != nil {
		t.Fatal(err)
	}
	s.wait(t, r.Boot)
	return since
}

// closed checks who reaches what, and that status agrees.
func (s *sysv) closed(t *testing.T, when string) {
	t.Helper()
	for _, to := range s.wire.Machine.Both() {
		for _, port := range []uint16{22, 80, 443} {
			s.dial(t, s.wire.Client.Like(to), to, port).Close()
		}
		s.dial(t, s.wire.Stranger.Like(to), to, 80).Close()
		for from, port := range map[netip.Addr]uint16{s.wire.Stranger.Like(to): 22, s.wire.Client.Like(to): 8080} {
			if c, err := s.wire.Dial(from, to, port, greeting(port), silence); err == nil {
				c.Close()
				t.Errorf("%s: %v reaches port %d", when, from, port)
			}
		}
	}
	out, code := s.m.Run(t, "basicfw-agent status")
	if code != 0 || !strings.HasPrefix(out, "protected") || !strings.Contains(out, "registered, enabled at boot, running") || !strings.Contains(out, "(legacy)") {
		t.Errorf("%s: status exits with %d:\n%s", when, code, out)
	}
}

// TestSystemV bootstraps a machine that has System V's init, with the order of the start of
// CentOS 6 and the program of its package. It closes, and stays closed during a reboot, from
// before the network.
func TestSystemV(t *testing.T) {
	lab.Need(t, "ip", "mmdebstrap", "mke2fs", "debugfs", "qemu-system-x86_64", "qemu-img")
	cache, err := filepath.Abs("../../.cache/vm")
	if err != nil {
		t.Fatal(err)
	}
	image, dist := BuildSysV(t, cache), t.TempDir()
	run(t, 10*time.Minute, "env", "EL6=yes", "DIST="+dist, "../../packaging/rpm/build", "1.0.0")
	disk := filepath.Join(t.TempDir(), "disk.img")
	run(t, 5*time.Minute, "cp", "--sparse=always", image.Disk, disk)
	const program = "/usr/sbin/basicfw-agent"
	for _, command := range []string{"write " + dist + "/build-el6/amd64/basicfw-agent " + program, "sif " + program + " mode 0100755"} {
		run(t, time.Minute, "debugfs", "-w", "-R", command, disk)
	}
	image.Disk = disk

	w := NewWire(t)
	s := &sysv{site: &site{wire: w, backend: iptables}}
	s.prober = Probe(t, w, append([]uint16{22}, hidden...)...)
	began := time.Now()
	s.m = Start(t, image, w, Hardware{})
	t.Cleanup(func() {
		if t.Failed() && !s.m.ended() {
			r, err := s.m.call("tail -n 40 /var/log/basicfw-agent.log; ss -Hltn; ps axf | tail -n 40; iptables-save", scriptLimit)
			t.Logf("%v\n%s", err, r.Output)
		}
	})
	s.wait(t, "")
	until(t, answerLimit, "the prober's answers", func() error {
		if len(s.accepted(began, hidden...)) == 0 {
			return errors.New("the prober gets no answer from an open machine")
		}
		return nil
	})
	if out := s.m.Must(t, "cat /proc/1/comm; iptables --version; uname -r; ls /etc/rc3.d"); !strings.HasPrefix(out, "init\n") || !strings.Contains(out, "legacy") {
		t.Fatalf("another machine:\n%s", out)
	}

	start := time.Now()
	out := s.m.Must(t, "cd /; basicfw-agent bootstrap --profile web-only --client-ip "+w.Client.String()+" --no-selftest")
	// It does not wait for its own lock through the script, which is a minute.
	if took := time.Since(start); took > time.Minute {
		t.Errorf("bootstrap took %v:\n%s", took, out)
	}
	links := strings.Join(strings.Fields(s.m.Must(t, "cd /etc; echo rc?.d/*basicfw-agent")), " ")
	if want := "rc0.d/K02basicfw-agent rc1.d/K02basicfw-agent rc2.d/S09basicfw-agent rc3.d/S09basicfw-agent rc4.d/S09basicfw-agent rc5.d/S09basicfw-agent rc6.d/K02basicfw-agent"; links != want {
		t.Errorf("links %s, want %s", links, want)
	}
	until(t, scriptLimit, "the service", func() error {
		if out, code := s.m.Run(t, "/etc/init.d/basicfw-agent status"); code != 0 {
			return errors.New(out)
		}
		return nil
	})
	s.closed(t, "bootstrap")

	since := s.reboot(t)
	s.closed(t, "reboot")
	s.checkSilent(t, since)

	// Legacy iptables announces no change: the service finds it within a minute.
	s.m.Must(t, "iptables -F; ip6tables -F; iptables -P INPUT ACCEPT")
	until(t, 3*time.Minute, "the repair", func() error {
		if out, code := s.m.Run(t, "basicfw-agent verify"); code != 0 {
			return errors.New(out)
		}
		return nil
	})
	s.m.Must(t, "/etc/init.d/basicfw-agent restart && /etc/init.d/basicfw-agent status")
	s.closed(t, "repair and restart")

	s.m.Must(t, "basicfw-agent uninstall")
	if out := s.m.Must(t, "ls -d /etc/init.d/basicfw* /etc/rc?.d/*basicfw* 2>/dev/null || :; iptables-save | grep -i basicfw || :"); out != "" {
		t.Errorf("uninstall leaves:\n%s", out)
	}
	until(t, answerLimit, "an open machine", func() error {
		c, err := w.Dial(w.Stranger.V4, w.Machine.V4, 8080, greeting(8080), silence)
		if err == nil {
			c.Close()
		}
		return err
	})
}
