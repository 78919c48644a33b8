package kernel_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestUninstallInChroot erases the package of an installed system from a rescue system, with
// and without /proc. The kernel is the rescue system's, and so are the rules in it.
func TestUninstallInChroot(t *testing.T) {
	on(t, []string{"nft", "netlink"}, func(t *testing.T, m *machine) {
		lab.Need(t, "unshare", "chroot")
		m.bootstrap(t)
		rules := m.rules(t)
		// As the kernel's rules differ from the desired state, they would be removed.
		m.Host.MustRun(t, "nft", "add", "table", "inet", "rescue")
		program, err := os.ReadFile(program)
		if err == nil {
			err = os.WriteFile(filepath.Join(m.root, "agent"), program, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		backup := filepath.Join(t.TempDir(), "backup")
		m.Host.MustRun(t, "cp", "-a", m.root, backup)
		for _, proc := range []string{"mount -t proc proc proc", ":"} {
			// Process 1 of the rescue system is its shell.
			const script = `set -e
cd "$1"; for d in bin sbin lib lib64; do [ ! -e /$d ] || cp -a /$d ./ 2>/dev/null || :; done
mkdir -p usr proc; mount --bind /usr usr; `
			r := m.Host.Run(t, lab.Command{Args: []string{"unshare", "--pid", "--fork", "--mount", "--mount-proc", "--propagation", "private", "sh", "-c",
				script + proc + "; chroot . /agent package-upgraded; chroot . /agent package-erased $$", "sh", m.root}})
			if r.Code != 0 {
				t.Fatalf("%s: exit code %d\n%s%s", proc, r.Code, r.Stdout, r.Stderr)
			}
			says(t, r.Stdout, "the rules in the kernel are another system's and stay")
			same(t, "rules after "+proc, rules, m.rules(t))
			if !strings.Contains(m.Host.MustRun(t, "nft", "list", "tables"), "rescue") {
				t.Error("the rescue system's table is gone")
			}
			for _, path := range append(m.persisted(), "/var/lib/basicfw", "/etc/basicfw/state.json") {
				if _, err := os.Lstat(filepath.Join(m.root, path)); err == nil {
					t.Errorf("%s: %s is left", proc, path)
				}
			}
			m.Host.MustRun(t, "cp", "-a", backup+"/.", m.root)
		}
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "uninstall")
	})
}
