package kernel_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestOrFailsafeUnsaved closes a machine on which nothing can be written, until a reboot.
func TestOrFailsafeUnsaved(t *testing.T) {
	for _, tt := range []struct {
		dir  string
		full bool
	}{{"etc", false}, {"var", false}, {"run", false}, {"etc", true}, {"var", true}} {
		t.Run(fmt.Sprintf("%s, full %t", tt.dir, tt.full), func(t *testing.T) {
			on(t, []string{"nft", "netlink"}, func(t *testing.T, m *machine) {
				m.Host.Listen(t, 22, 80)
				dir := filepath.Join(m.root, tt.dir)
				put := m.Host.ReadOnly
				if tt.full {
					put = m.Host.Full
				}
				undo := put(t, dir)
				asked := []string{"bootstrap", "--no-service", "--profile", "web+mail", "--client-ip", m.Client.String()}
				before := m.rules(t)
				m.must(t, exitFailed, asked...)
				same(t, "rules after a failed bootstrap", before, m.rules(t))
				m.wantOpen(t, map[string]string{"80/tcp": everybody})
				for range 2 { // the user-data runs it twice
					r := m.must(t, exitFailed, append(asked, "--or-failsafe")...)
					says(t, r.Stdout, "until a reboot", "SSH is open to any address")
					says(t, r.Stderr, "hint: ")
					if text := m.agent(t, "status").Stdout; strings.Contains(text, "does not filter") {
						t.Errorf("status denies the rules:\n%s", text)
					}
					m.wantOpen(t, map[string]string{"22/tcp": everybody, "80/tcp": nobody})
				}
				undo()
				m.must(t, exitOK, append(asked, "--or-failsafe")...)
				m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "80/tcp": everybody})
				m.must(t, exitOK, "verify")
			})
		})
	}
}

// TestFlagsAreKept checks that a plain bootstrap does what the flags of an earlier one
// asked for, although that one failed or was killed.
func TestFlagsAreKept(t *testing.T) {
	right := func(t *testing.T, m *machine) {
		t.Helper()
		m.must(t, exitOK, "bootstrap", "--no-service", "--no-selftest")
		if s := m.status(t, exitOK); s.SSH.Mode != "pinned" || !sameSet(s.SSH.Allow, []string{m.Client.V4.String(), m.Client.V6.String()}) {
			t.Errorf("SSH is %s to %q", s.SSH.Mode, s.SSH.Allow)
		}
		m.wantOpen(t, map[string]string{"22/tcp": "client4 client6", "25/tcp": everybody})
		m.must(t, exitOK, "uninstall")
		if _, err := os.Stat(filepath.Join(m.root, localINI)); err == nil {
			t.Error("local.ini is left after uninstall")
		}
	}
	t.Run("failsafe", func(t *testing.T) {
		on(t, []string{"nft", "netlink"}, func(t *testing.T, m *machine) {
			m.Host.Listen(t, 22, 25)
			m.write(t, agentINI, "[agent]\nprofil = web-only\n", 0o640)
			m.must(t, exitUsage, "bootstrap", "--no-service", "--or-failsafe", "--profile", "web+mail", "--client-ip", m.Client.String())
			if next := last(m.must(t, exitDrift, "status").Stdout); next != "next         basicfw-agent bootstrap" {
				t.Errorf("status ends in %q", next)
			}
			m.write(t, agentINI, "", 0o640)
			right(t, m)
			// What was refused is to be named again, and only that is not kept.
			m.must(t, exitUsage, "bootstrap", "--no-service", "--or-failsafe", "--profile", "web-mial", "--client-ip", m.Client.String())
			if next := last(m.must(t, exitDrift, "status").Stdout); next != "next         basicfw-agent bootstrap --profile NAME" {
				t.Errorf("status ends in %q", next)
			}
			m.must(t, exitOK, "bootstrap", "--no-service", "--no-selftest", "--profile", "web+mail")
			right(t, m)
		})
	})
	t.Run("killed", func(t *testing.T) {
		on(t, []string{"nft", "legacy"}, func(t *testing.T, m *machine) {
			m.Host.Listen(t, 22, 25)
			script := fmt.Sprintf("#!/bin/sh\n%s iptables-restore \"$@\"\nkill -KILL $PPID\n", m.multi)
			path := filepath.Join(m.bin, "iptables-restore")
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
			c := m.command("bootstrap", "--no-service", "--no-rehearsal", "--profile", "web+mail", "--client-ip", m.Client.String())
			c.Args = append([]string{"sh", "-c", `"$@"; exit $?`, "sh"}, c.Args...)
			r := m.Host.Run(t, c)
			if r.Code == exitOK || !strings.Contains(m.rules(t), m.comment("ssh")) {
				t.Fatalf("it was not killed: %d\n%s", r.Code, m.rules(t))
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			m.link(t, "iptables-restore")
			right(t, m)
		})
	})
}

// last returns the last line of a text.
func last(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}
