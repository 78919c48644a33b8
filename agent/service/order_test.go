package service

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// The orderings below are those of [Unit] in the distributions' own unit files, which
// we do not copy.
const (
	oneshot = "\n[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n"
	// noDefaults is what a unit has that starts early.
	noDefaults = "DefaultDependencies=no\nBefore=shutdown.target\nConflicts=shutdown.target\n"
	preNetwork = "Wants=network-pre.target\nBefore=network-pre.target\n"
)

// layout is a machine: its units by name, and the targets that start them.
type layout struct {
	units map[string]string   // [Unit] of each
	wants map[string][]string // by target
}

// cloudInit adds a distribution's stages of cloud-init to a layout.
func (l layout) cloudInit(local, network string) layout {
	l.units["cloud-init-local.service"] = preNetwork + local
	l.units["cloud-init.service"] = "Wants=cloud-init-local.service\nAfter=cloud-init-local.service\nBefore=network-online.target sshd.service\n" + network
	l.units["cloud-config.service"] = "Wants=network-online.target\nAfter=network-online.target cloud-init.service\n"
	l.wants["multi-user.target"] = append(l.wants["multi-user.target"], "cloud-init-local.service", "cloud-init.service", "cloud-config.service")
	return l
}

func layouts() map[string]layout {
	networkManager := "Wants=network.target\nAfter=network-pre.target dbus.service\nBefore=network.target\n"
	nmOnline := "Requires=NetworkManager.service\nAfter=NetworkManager.service\nBefore=network-online.target\n"
	return map[string]layout{
		// cloud-init is ordered before sysinit.target, as are the rules.
		"debian": layout{
			units: map[string]string{
				"networking.service":           "DefaultDependencies=no\nWants=network.target\nAfter=local-fs.target network-pre.target\nBefore=network.target shutdown.target network-online.target\nConflicts=shutdown.target\n",
				"nftables.service":             noDefaults + preNetwork,
				"netfilter-persistent.service": noDefaults + preNetwork + "Wants=systemd-modules-load.service local-fs.target\nAfter=systemd-modules-load.service local-fs.target\n",
				"ufw.service":                  "DefaultDependencies=no\n" + preNetwork + "Wants=local-fs.target\nAfter=local-fs.target\n",
				"shorewall.service":            "Wants=network-online.target\nAfter=network-online.target\n",
				"shorewall6.service":           "Wants=network-online.target\nAfter=network-online.target shorewall.service\n",
			},
			wants: map[string][]string{
				"sysinit.target":    {"nftables.service"},
				"basic.target":      {"shorewall.service", "shorewall6.service"},
				"multi-user.target": {"networking.service", "netfilter-persistent.service", "ufw.service"},
			},
		}.cloudInit(
			noDefaults+"After=systemd-remount-fs.service\nBefore=NetworkManager.service sysinit.target\nRequiresMountsFor=/var/lib/cloud\n",
			noDefaults+"After=networking.service systemd-networkd-wait-online.service\nBefore=sysinit.target\n",
		),
		// One process for all stages of cloud-init, since 24.3.
		"ubuntu": layout{
			units: map[string]string{
				"cloud-init-main.service": noDefaults + "After=systemd-remount-fs.service\nBefore=cloud-init-local.service\nRequiresMountsFor=/var/lib/cloud\n",
				"ufw.service":             "DefaultDependencies=no\n" + preNetwork + "Wants=local-fs.target\nAfter=local-fs.target\n",
				"firewalld.service":       preNetwork + "After=dbus.service polkit.service\n",
			},
			wants: map[string][]string{"multi-user.target": {"cloud-init-main.service", "ufw.service", "firewalld.service", "systemd-networkd.service"}},
		}.cloudInit(noDefaults+"Before=sysinit.target\n", noDefaults+"Before=sysinit.target\nAfter=systemd-networkd-wait-online.service\n"),
		// iptables-services waits for sysinit.target, cloud-init for D-Bus.
		"el9 with iptables-services": layout{
			units: map[string]string{
				"NetworkManager.service":             networkManager,
				"NetworkManager-wait-online.service": nmOnline,
				"iptables.service":                   preNetwork,
				"ip6tables.service":                  preNetwork + "After=iptables.service\n",
				"nftables.service":                   preNetwork,
			},
			wants: map[string][]string{"multi-user.target": {"NetworkManager.service", "NetworkManager-wait-online.service",
				"iptables.service", "ip6tables.service", "nftables.service"}},
		}.cloudInit(
			noDefaults+"After=systemd-remount-fs.service dbus.socket\nRequires=dbus.socket\nBefore=NetworkManager.service firewalld.target\nRequiresMountsFor=/var/lib/cloud\n",
			"After=NetworkManager.service NetworkManager-wait-online.service\n",
		),
		"el9 with firewalld": layout{
			units: map[string]string{
				"NetworkManager.service":             networkManager,
				"NetworkManager-wait-online.service": nmOnline,
				"firewalld.service":                  preNetwork + "After=dbus.service polkit.service\nConflicts=iptables.service ip6tables.service ebtables.service ipset.service\n",
			},
			wants: map[string][]string{"multi-user.target": {"NetworkManager.service", "NetworkManager-wait-online.service", "firewalld.service"}},
		}.cloudInit(
			noDefaults+"After=systemd-remount-fs.service dbus.socket\nRequires=dbus.socket\nBefore=NetworkManager.service firewalld.target\nRequiresMountsFor=/var/lib/cloud\n",
			"After=NetworkManager.service NetworkManager-wait-online.service\n",
		),
		"el7": layout{
			units: map[string]string{
				"network.service":  "After=network-pre.target\nBefore=network.target network-online.target\nWants=network.target\n",
				"iptables.service": "After=syslog.target\nBefore=ip6tables.service\n", "ip6tables.service": "After=syslog.target\n",
			},
			wants: map[string][]string{"basic.target": {"iptables.service", "ip6tables.service"}, "multi-user.target": {"network.service"}},
		}.cloudInit(noDefaults+"After=systemd-remount-fs.service dbus.socket\nRequires=dbus.socket\nBefore=NetworkManager.service network.service\n", "After=network.service\n"),
		// cloud-init with the default dependencies, as in Fedora, CentOS Stream
		// and Amazon Linux.
		"fedora": layout{
			units: map[string]string{
				"NetworkManager.service":             networkManager,
				"NetworkManager-wait-online.service": nmOnline,
				"iptables.service":                   preNetwork, "ip6tables.service": preNetwork + "After=iptables.service\n",
			},
			wants: map[string][]string{"multi-user.target": {"NetworkManager.service", "NetworkManager-wait-online.service", "iptables.service", "ip6tables.service"}},
		}.cloudInit("Before=shutdown.target\nConflicts=shutdown.target\n", "DefaultDependencies=no\nAfter=NetworkManager.service NetworkManager-wait-online.service\n"),
	}
}

// analyze makes systemd build the transaction of a boot and returns its output.
func analyze(t *testing.T, l layout, unitText string) string {
	t.Helper()
	sys := &system.System{}
	lab.NeedTools(t, "systemd-analyze")
	dir := t.TempDir()
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	pull := func(target, name string) {
		wants := filepath.Join(dir, target+".wants")
		if err := os.MkdirAll(wants, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("../"+name, filepath.Join(wants, name)); err != nil {
			t.Fatal(err)
		}
	}
	// This machine's own units of these names must not replace those that a layout
	// leaves out.
	for _, name := range []string{"cloud-config.service", "cloud-final.service", "cloud-init-local.service", "cloud-init.service", "cloud-init.target",
		"cloud-init-hotplugd.socket", "networking.service", "nftables.service", "ssh.service"} {
		if _, ok := l.units[name]; !ok {
			if err := os.Symlink("/dev/null", filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, text := range l.units {
		write(name, "[Unit]\nDescription="+name+"\n"+text+oneshot)
	}
	for target, names := range l.wants {
		for _, name := range names {
			pull(target, name)
		}
	}
	if unitText != "" {
		write(unit, strings.ReplaceAll(unitText, "@EXEC@", "/bin/true"))
		pull("sysinit.target", unit)
	}
	res, err := sys.Run(context.Background(), system.Command{Name: "env", Args: []string{
		"SYSTEMD_UNIT_PATH=" + dir + ":/usr/lib/systemd/system:/lib/systemd/system", "SYSTEMD_LOG_LEVEL=info",
		"systemd-analyze", "verify", "--man=no", "multi-user.target"}})
	var failed *system.ExitError
	if err != nil && !errors.As(err, &failed) {
		t.Fatal(err)
	}
	return string(res.Stdout) + string(res.Stderr)
}

// TestNoOrderingCycle: systemd breaks a cycle by leaving out a unit of its
// choice, which may be this one, or the network.
func TestNoOrderingCycle(t *testing.T) {
	for name, l := range layouts() {
		t.Run(name, func(t *testing.T) {
			if out := analyze(t, l, ""); strings.Contains(out, "cycle") {
				t.Fatalf("the layout itself has a cycle:\n%s", out)
			}
			out := analyze(t, l, systemdUnit)
			for _, line := range strings.Split(out, "\n") {
				if strings.Contains(line, "cycle") || strings.Contains(line, unit) {
					t.Error(line)
				}
			}
		})
	}
}

// TestOrderingsThatWouldBeCycles shows that the test above can fail, and why the unit is
// not ordered after these.
func TestOrderingsThatWouldBeCycles(t *testing.T) {
	for _, tt := range []struct{ layout, from, to string }{
		{"debian", " ufw.service\n", " ufw.service shorewall.service\n"},
		{"ubuntu", " ufw.service\n", " ufw.service firewalld.service\n"},
		{"debian", "DefaultDependencies=no\n", ""},
		{"el9 with iptables-services", "[Service]\n", "Before=sysinit.target\n[Service]\n"},
	} {
		text := strings.Replace(systemdUnit, tt.from, tt.to, 1)
		if text == systemdUnit {
			t.Fatalf("the unit has no %q", tt.from)
		}
		if out := analyze(t, layouts()[tt.layout], text); !strings.Contains(out, "cycle") {
			t.Errorf("%s with %q: no cycle:\n%s", tt.layout, tt.to, out)
		}
	}
}

// TestEnabledAsWanted: Install below a root makes the same link as systemctl makes from
// the unit's [Install].
func TestEnabledAsWanted(t *testing.T) {
	sys := &system.System{}
	lab.NeedTools(t, "systemctl")
	sys.Root = t.TempDir()
	put(t, sys, unitPath, systemdUnit)
	if _, err := sys.Run(context.Background(), system.Command{Name: "systemctl", Args: []string{"--root", sys.Root, "enable", unit}}); err != nil {
		t.Fatal(err)
	}
	links, err := newTest(t, sys).links()
	if err != nil || len(links) != 1 || links[0] != linkPath {
		t.Errorf("systemctl enable makes %q, %v, want %q", links, err, linkPath)
	}
}
