package kernel_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestFileLists keeps the sources of SSH and of a service in files, which the service follows.
// A file that cannot be used changes nothing.
func TestFileLists(t *testing.T) {
	onEach(t, func(t *testing.T, m *machine) {
		m.Host.Listen(t, 22, 80, 5432, 8080)
		const admins, peers = "/etc/basicfw/admins", "/etc/lists/peers"
		client, stranger := m.Client.V4.String(), m.Stranger.V4.String()
		m.write(t, agentINI, "[ssh]\nallow = file:"+admins+"\n[open]\ndb = 5432/tcp from file:"+peers+"\n", 0o644)
		m.write(t, peers, client+"\n\n", 0o644)
		m.refused(t, exitUsage, []string{"bootstrap", "--no-service"}, agentINI+":2: ssh.allow: "+admins+": no such file or directory")
		m.write(t, admins, "# administrators\n"+client+" ; home\n"+m.Client.V6.String()+"\n", 0o644)
		m.write(t, peers, "\n\n", 0o644)
		m.refused(t, exitUsage, []string{"bootstrap", "--no-service"}, agentINI+":4: open.db: "+peers+" contains no address")
		m.write(t, peers, client+"\n\n", 0o644)
		m.must(t, exitOK, "bootstrap", "--no-service")
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "5432/tcp": "client4", "80/tcp": everybody})
		m.must(t, exitOK, "verify")
		m.must(t, exitOK, "plan", "--exit-code")
		says(t, m.must(t, exitOK, "ssh", "list").Stdout, client, "listed in "+admins)

		// An edited file is followed; an edited setting is not, until it is applied.
		s := m.serve(t)
		m.write(t, agentINI, "[ssh]\nallow = any\n", 0o644)
		m.write(t, peers+".new", client+"\n"+stranger+"\n", 0o644)
		if err := os.Rename(filepath.Join(m.root, peers+".new"), filepath.Join(m.root, peers)); err != nil {
			t.Fatal(err)
		}
		lab.Poll(t, "the service's list", func() bool { return m.reached("5432/tcp", "client4 stranger4", time.Second) == "client4 stranger4" })
		m.write(t, admins, client+"\n"+stranger+"\n", 0o644)
		lab.Poll(t, "SSH's list", func() bool { return m.reached("22/tcp", "client4 stranger4", time.Second) == "client4 stranger4" })
		m.write(t, agentINI, "[ssh]\nallow = file:"+admins+"\n[open]\ndb = 5432/tcp from file:"+peers+"\n", 0o644)
		m.must(t, exitOK, "plan", "--exit-code")
		m.must(t, exitOK, "verify")

		// What is no list keeps the last one, in the service, in commands and after a reboot.
		kept := map[string]string{"22/tcp": "client4 stranger4", "5432/tcp": "client4 stranger4"}
		path := filepath.Join(m.root, admins)
		for what, do := range map[string]func() error{
			"contains no address":     func() error { return os.WriteFile(path, []byte("# none\n"), 0o644) },
			`admins:2: "me" is not`:   func() error { return os.WriteFile(path, []byte("192.0.2.1\nme\n"), 0o644) },
			"no such file":            func() error { return nil },
			"not a regular file":      func() error { return unix.Mkfifo(path, 0o644) },
			"too many levels of symb": func() error { return os.Symlink(path, path) },
		} {
			if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			if err := do(); err != nil {
				t.Fatal(err)
			}
			lab.Poll(t, "the warning: "+what, func() bool {
				return strings.Contains(m.read(t, publicStatus), `"list-kept"`)
			})
			says(t, m.must(t, exitOK, "status").Stdout, "stays in effect")
			if r := m.must(t, exitOK, "apply"); !strings.Contains(r.Stderr, what) {
				t.Errorf("apply: %s, want %s", r.Stderr, what)
			}
			m.wantOpen(t, kept)
		}
		s.Stop(t)
		m.reboot(t)
		m.serve(t)
		m.wantOpen(t, kept)
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		m.write(t, admins, client+"\n", 0o644)
		m.must(t, exitOK, "apply")
		m.wantOpen(t, map[string]string{"22/tcp": "client4"})
		m.must(t, exitOK, "ssh", "allow", stranger)
		m.wantSetting(t, "ssh", "allow", stranger+", file:"+admins)
		m.wantOpen(t, map[string]string{"22/tcp": "client4 stranger4"})
		m.refused(t, exitUsage, []string{"ssh", "remove", client}, "may log in by "+client+" in "+admins)
		m.must(t, exitOK, "ssh", "remove", stranger)
		m.wantOpen(t, map[string]string{"22/tcp": "client4"})
	})
}
