package kernel_test

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestUserNamespace closes a container without privileges: root of a user namespace, in a
// network namespace of that.
func TestUserNamespace(t *testing.T) {
	on(t, []string{"nft", "netlink"}, func(t *testing.T, m *machine) {
		lab.Need(t, "unshare")
		const script = `set -e
ip link set lo up
"$@" bootstrap --no-service --client-ip 203.0.113.9 --profile web+mail
"$@" verify
for n in $(seq "$MANY"); do echo "p$n = $((20000 + n))/tcp from 198.51.100.0/25, 203.0.113.0/25"; done >>"$0"
"$@" apply
"$@" status
"$@" uninstall
`
		m.write(t, agentINI, "[open]\n", 0o600)
		many := map[string]string{"nft": "20", "netlink": "200"}[m.variant()] // iptables-nft has a limit of its own
		c := m.command()
		c.Args = append([]string{"unshare", "--user", "--map-root-user", "--net", "sh", "-c", script, filepath.Join(m.root, agentINI)}, c.Args...)
		c.Env = append(c.Env, "MANY="+many)
		r := m.Host.Run(t, c)
		if r.Code != exitOK {
			t.Fatalf("exit code %d\n%s\n%s", r.Code, r.Stdout, r.Stderr)
		}
		says(t, r.Stdout, "protected: profile web+mail on IPv4 and IPv6", "p1 20001/tcp")
	})
}

// TestOutOfProcesses runs commands in a container that allows few processes. They fail with
// exit code 1 and one line, and never with a stack trace of the runtime.
func TestOutOfProcesses(t *testing.T) {
	on(t, []string{"nft"}, func(t *testing.T, m *machine) {
		lab.Need(t, "unshare", "setpriv", "prlimit")
		m.Host.MustRun(t, "chown", "-R", "54321", m.root)
		failed := 0
		for most := 9; most <= 21; most += 2 {
			c := m.command("bootstrap", "--no-service", "--client-ip", "203.0.113.9")
			c.Args = append([]string{"setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups", "unshare", "--user", "--map-root-user", "--net",
				"prlimit", fmt.Sprintf("--nproc=%d:%d", most, most)}, c.Args...)
			r := m.Host.Run(t, c)
			if r.Code != exitOK && r.Code != exitFailed || strings.Contains(r.Stderr, "goroutine") || strings.Contains(r.Stderr, "runtime:") {
				t.Errorf("%d processes: exit code %d\n%.600s", most, r.Code, r.Stderr)
			}
			if r.Code == exitFailed {
				failed++
			}
		}
		if failed == 0 {
			t.Error("there were always enough processes")
		}
	})
}
