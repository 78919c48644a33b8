package apply_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/test/fake"
	"github.com/basicfw/basicfw-agent/test/lab"
)

func TestUninstallRestoresTheMachine(t *testing.T) {
	m := fake.New(t)
	m.Write(t, "/etc/sysconfig/iptables", "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 22 -j ACCEPT\nCOMMIT\n# the end\n")
	before := m.Contents(t)
	m.Install(t, fake.Decided(t, "203.0.113.9/32"))
	// A killed command left this. Its file is as before, and the process ID too high for one.
	m.Write(t, fmt.Sprintf("/etc/motd.d/.basicfw.%d.1", 1<<30), "x")
	if err := m.Uninstall(context.Background()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, m.Contents(t)); diff != "" {
		t.Errorf("not as before (-before +after):\n%s", diff)
	}
	if !m.Kernel.Rules.IsZero() || m.Service.Registered {
		t.Error("the rules or the service remain")
	}
	if err := m.Uninstall(context.Background()); !errors.Is(err, store.ErrNone) {
		t.Errorf("the second Uninstall: %v", err)
	}
}

// Uninstall on a machine that has lost /var, with rules or without, leaves none of our
// rules and files. The backup is not made from them.
func TestUninstallWithoutBackup(t *testing.T) {
	for _, what := range []string{"at once", "without rules", "after a bootstrap"} {
		m := fake.New(t)
		m.Install(t, fake.Decided(t, "203.0.113.9/32"))
		if err := os.RemoveAll(m.Path(store.Dir)); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		m.SetLog(&log)
		switch what {
		case "without rules":
			m.Kernel.Rules = firewall.Ruleset{}
		case "after a bootstrap":
			m.Kernel.Foreign, m.Kernel.Cleared = []firewall.Foreign{{Family: "ipv4", Chain: "INPUT", Rule: "-j REJECT"}}, false
			m.Install(t, fake.Decided(t, "203.0.113.9/32"))
			if org, err := m.Store.LoadBackup(); err != nil || len(org.Rules.IPv4.Removed) != 1 {
				t.Errorf("the backup lacks what a later bootstrap removed: %v, %v", org.Rules, err)
			}
		}
		if err := m.Uninstall(context.Background()); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if what != "after a bootstrap" && !strings.Contains(log.String(), "the backup from before bootstrap is lost") {
			t.Errorf("%s: the log is %s", what, log.String())
		}
		// The previous content of local.ini is lost with the backup.
		want := map[string]string{fake.LocalFile: m.Contents(t)[fake.LocalFile]}
		if diff := cmp.Diff(want, m.Contents(t)); diff != "" || !m.Kernel.Rules.IsZero() || m.Service.Registered {
			t.Errorf("%s: left behind: %s", what, diff)
		}
	}
}

// An uninstall is interrupted at each of its steps, without a rollback. Once the rules
// are removed, a boot restores only those of the state itself, and another uninstall
// completes.
func TestInterruptedUninstallCanBeRepeated(t *testing.T) {
	killed := errors.New("killed")
	for n, done := 1, false; !done; n++ {
		m := fake.New(t)
		m.Install(t, fake.Decided(t, "203.0.113.9/32"))
		var steps []string
		m.System.Step = lab.Before(func(op, name string) error {
			if steps = append(steps, op+" "+name); len(steps) >= n {
				return killed
			}
			return nil
		})
		err := m.Uninstall(context.Background())
		if done = len(steps) < n; done {
			if err != nil {
				t.Errorf("no step failed: %v", err)
			}
			if n < 8 {
				t.Errorf("only %d steps", n)
			}
			continue
		}
		files := m.Contents(t)
		if files[store.CopyFile] != "" && files[store.StateFile] == "" {
			t.Errorf("%s: only the copy is left", steps[n-1])
		}
		m.System.Step = nil
		if err := m.Uninstall(context.Background()); err != nil && !errors.Is(err, store.ErrNone) {
			t.Errorf("%s: the next uninstall: %v", steps[n-1], err)
		}
		files = m.Contents(t)
		if files[store.CopyFile] != "" || files[store.StateFile] != "" {
			t.Errorf("%s: the next uninstall leaves %v", steps[n-1], files)
		}
	}
}
