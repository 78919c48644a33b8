package kernel_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestRescue unlocks a machine from the boot loader's prompt and from a rescue system:
// once, at the next boot.
func TestRescue(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22)
		m.write(t, "/etc/shadow", "root:*:20000:0:99999:7:::\n", 0o640)
		says(t, m.bootstrap(t).Stdout, "warning   root cannot log in at the console (its password is locked)")
		cmdline := filepath.Join(t.TempDir(), "cmdline")
		loader := func(text string) {
			t.Helper()
			if err := os.WriteFile(cmdline, []byte("BOOT_IMAGE=/vmlinuz root=/dev/vda1 "+text+"quiet\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		loader("")
		m.Host.Bind(t, cmdline, "/proc/cmdline")
		// boot boots the machine and returns how long it is unlocked for.
		boot := func() time.Duration {
			t.Helper()
			m.reboot(t)
			s := m.serve(t)
			defer s.Stop(t)
			state, until := m.unlocked(t)
			m.wantReach(t, m.Server.V4, 22, true, state == "unlocked")
			if state == "unlocked" {
				return time.Until(until).Round(time.Minute)
			}
			if state != "protected" {
				t.Errorf("the state is %q", state)
			}
			return 0
		}
		want := func(what string, length time.Duration) {
			t.Helper()
			if got := boot(); got != length {
				t.Errorf("%s: unlocked for %v, want %v", what, got, length)
			}
			if length > 0 {
				m.must(t, exitOK, "lock")
			}
		}
		want("an ordinary boot", 0)
		loader("basicfw.unlock=30m ")
		want("the kernel parameter", 30*time.Minute)
		want("the same parameter again", 0)
		m.must(t, exitOK, "open", "8081/tcp")
		m.must(t, exitOK, "close", "8081/tcp")
		want("the same parameter after other changes", 0)
		loader("")
		want("without it", 0)
		loader("basicfw.unlock ")
		want("the parameter without a time", 15*time.Minute)

		loader("")
		m.write(t, "/etc/basicfw/unlock", "1h\n", 0o600)
		want("the file", time.Hour)
		if m.exists(t, "/etc/basicfw/unlock") {
			t.Error("the file is still there")
		}
		want("after the file", 0)
		m.write(t, "/etc/basicfw/unlock", "", 0o644)
		want("an empty file", 15*time.Minute)
		m.write(t, "/etc/basicfw/unlock", "for ever", 0o600)
		want("a file with nonsense", 15*time.Minute)
		m.write(t, "/etc/basicfw/unlock", "1h", 0o666)
		want("a file writable by everyone", 0)
		if err := os.Remove(filepath.Join(m.root, "etc/basicfw/unlock")); err != nil {
			t.Fatal(err)
		}
		m.must(t, exitOK, "verify")
	})
}
