//go:build vm

package vm

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestAudit runs lynis, an auditing tool, in a container before and after bootstrap: it sees
// the rules of each backend, and has no warning about the firewall.
func TestAudit(t *testing.T) {
	lab.Need(t, "ip", "nft", "mmdebstrap", "systemd-nspawn", "nsenter")
	cache, err := filepath.Abs("../../.cache/vm")
	if err != nil {
		t.Fatal(err)
	}
	root := BuildRoot(t, cache)
	agent := filepath.Join(t.TempDir(), "basicfw-agent")
	run(t, 10*time.Minute, "env", "CGO_ENABLED=0", "go", "build", "-o", agent, "github.com/basicfw/basicfw-agent/cmd/basicfw-agent")
	for _, b := range []struct{ name, setUp, empty, finds string }{
		{"iptables", "", "iptables ruleset seems to be empty", `one or more rules are available \([0-9]{2,} rules\)`},
		// lynis takes an iptables without rules for an open machine.
		{"nftables", "find /usr/sbin /etc/alternatives -name '*tables*' -delete",
			"3 rules or less", `found [0-9]{2,} rules in nftables configuration`},
	} {
		t.Run(b.name, func(t *testing.T) {
			l := lab.New(t)
			c := StartContainer(t, l, root)
			run(t, time.Minute, "install", "-m", "755", agent, c.root+"/usr/sbin/basicfw-agent")
			c.Must(t, b.setUp)
			findings(t, c)
			if log := c.Must(t, "cat /var/log/lynis.log"); !strings.Contains(log, b.empty) {
				t.Errorf("lynis does not see that a machine is open:\n%s", log)
			}
			c.Must(t, "basicfw-agent bootstrap --profile web-only --client-ip "+l.Client.String())
			if out := c.Must(t, "basicfw-agent status --json"); !strings.Contains(out, `"name": "`+b.name+`"`) {
				t.Errorf("the backend is not %s:\n%s", b.name, out)
			}
			if found := findings(t, c); len(found) > 0 {
				t.Errorf("lynis reports %q", found)
			}
			if log := c.Must(t, "cat /var/log/lynis.log"); !regexp.MustCompile(b.finds).MatchString(log) {
				t.Errorf("lynis does not see the rules:\n%s", log)
			}
		})
	}
}

// findings returns the warnings and suggestions of lynis about firewalls. Not among them is
// that rules are unused: no packet has matched them since they were loaded. Whether there is
// a firewall is also judged by the kernel's modules, which are the computer's.
func findings(t *testing.T, c *Container) []string {
	t.Helper()
	out := c.Must(t, "rm -f /var/log/lynis*; lynis audit system --quick --no-colors --tests-from-group firewalls && cat /var/log/lynis-report.dat")
	var found []string
	for _, line := range strings.Split(out, "\n") {
		if m := regexp.MustCompile(`^(?:warning|suggestion)\[\]=(FIRE-[0-9]+)\|`).FindStringSubmatch(line); m != nil && m[1] != "FIRE-4513" && m[1] != "FIRE-4590" {
			found = append(found, line)
		}
	}
	return found
}
