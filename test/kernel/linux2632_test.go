package kernel_test

import (
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestLinux2632 takes a machine through its whole life with the system calls of Linux
// 2.6.32 only, the kernel of CentOS 6.
func TestLinux2632(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Skip("the system calls of Linux 2.6.32 are known for x86_64 only")
	}
	on(t, variants[1:2], func(t *testing.T, m *machine) {
		m.linux2632 = true
		lab.NeedTools(t, "python3", "ss")
		for _, args := range [][]string{{"python3", "-c", "import os; os.getrandom(1)"}, {"ss", "-Hltn"}} {
			r := m.Host.Run(t, lab.Command{Args: args, Linux2632: true})
			if !strings.Contains(r.Stderr, "not implemented") && !strings.Contains(r.Stderr, "not supported") {
				t.Fatalf("%v: %q: the filter hides nothing", args, r.Stderr)
			}
		}
		m.Host.Listen(t, 22, 80, 3306, 8080)
		before := m.everything(t)
		m.must(t, exitNotBootstrapped, "status")
		m.bootstrap(t)
		says(t, m.must(t, exitOK, "status").Stdout, "protected", "3306/tcp ", ": closed; open it")
		m.must(t, exitOK, "open", "8080/tcp")
		m.wantReach(t, m.Server.V4, 8080, true, true)
		m.must(t, exitOK, "close", "8080/tcp")
		m.must(t, exitOK, "ssh", "allow", "198.51.100.20", "--for", "1h")
		m.must(t, exitOK, "ssh", "remove", "198.51.100.20")

		m.by(t, byFlush, ipv4, ipv6)
		m.must(t, exitDrift, "verify")
		m.must(t, exitOK, "verify", "--repair")
		m.must(t, exitOK, "unlock")
		m.wantSSH(t, true, false)
		m.must(t, exitOK, "lock")
		says(t, m.must(t, exitOK, "exposure").Stdout, "3306/tcp")
		m.must(t, exitOK, "explain", "--from", "198.51.100.20", "--to", "80/tcp")
		m.must(t, exitOK, "selftest")

		s := m.serve(t)
		m.by(t, byFlush, ipv4, ipv6)
		by(t, time.Now().Add(time.Minute), "repaired", func() bool { return m.agent(t, "verify").Code == exitOK })
		m.wantSSH(t, false, false)
		s.Stop(t)

		m.must(t, exitOK, "uninstall")
		same(t, "after uninstall", before, m.everything(t))
	})
}
