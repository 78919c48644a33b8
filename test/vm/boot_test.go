//go:build vm

package vm

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// The ports that the two profiles open.
var (
	webOnly = []uint16{80, 443}
	webMail = []uint16{80, 443, 25, 465, 110, 995, 143, 993}
)

// built is what is tested.
type built struct {
	image        Image
	network      string // the unit that brings up the interface
	datasource   Datasource
	backend      backend
	agent        string // the program
	older, newer string // packages of two versions
}

// backend is what loads the rules on a machine: what status prints for it, and what can be
// damaged there.
type backend struct {
	name, why string
	table     string // the first rule line of each table
	tables    int
	files     string // the persisted rules
	spoil     string // damages rules and files without opening anything, while the service is stopped
	damage    []damage
}

// damage is a change by another program, and what the service logs when it repairs that.
type damage struct {
	script string
	says   []string
}

var iptables = backend{
	name:   "iptables",
	why:    "iptables",
	table:  ":BASICFW-INPUT",
	tables: 2,
	files:  "/etc/sysconfig/iptables /etc/sysconfig/ip6tables",
	spoil: `iptables -F INPUT
		ip6tables -F BASICFW-INPUT
		sed -i /basicfw-https/d /etc/sysconfig/iptables
		rm /etc/sysconfig/ip6tables`,
	damage: []damage{
		{"iptables -F; iptables -X; ip6tables -F; ip6tables -X; ip6tables -P INPUT ACCEPT", []string{"another program flushed the ipv4 and ipv6 rules"}},
		{"rm /etc/sysconfig/iptables; chmod 644 /etc/sysconfig/ip6tables", []string{"/etc/sysconfig/iptables: missing", "mode 0644"}},
	},
}

var nftables = backend{
	name:   "nftables",
	why:    "nf_tables over netlink, iptables-save is not installed",
	table:  "table inet basicfw {",
	tables: 1,
	files:  "/etc/nftables/basicfw.nft",
	spoil: `lab-nft flush chain inet basicfw input
		sed -i /basicfw-https/d /etc/nftables/basicfw.nft`,
	damage: []damage{
		{"lab-nft flush ruleset", []string{"another program flushed the ipv4 and ipv6 rules"}},
		{"rm /etc/nftables/basicfw.nft", []string{"/etc/nftables/basicfw.nft: missing"}},
		{"chmod 644 /etc/nftables/basicfw.nft", []string{"mode 0644"}},
	},
}

// releases are the systems to boot, each with what sets up the network in its own cloud
// images. The kernel of 11 is the original one: not every mirror has kept its last update.
var releases = []struct {
	name       string
	release    Release
	network    string
	datasource Datasource
	backend    backend
}{
	{"debian-11", Release{Suite: "bullseye", Packages: "iptables,nftables,ifupdown,linux-image-cloud-amd64/bullseye"}, "networking", (*Wire).NoCloud, iptables},
	{"debian-12", Debian12, "systemd-networkd", (*Wire).Droplet, iptables},
	{"debian-13", Release{Suite: "trixie", Packages: "iptables,nftables,netplan.io"}, "systemd-networkd", (*Wire).NoCloud, iptables},
	{"debian-sid", Release{Suite: "sid", Packages: "iptables,nftables,netplan.io"}, "systemd-networkd", (*Wire).NoCloud, iptables},
	{"bare", Bare, "systemd-networkd", (*Wire).NoCloud, nftables},
}

// TestBoot boots machines of each release from an image without the program. As many run at
// a time as the computer has processors: each keeps one busy.
func TestBoot(t *testing.T) {
	lab.Need(t, "ip", "mmdebstrap", "mke2fs", "rpmbuild", "qemu-system-x86_64", "qemu-img", "ssh", "ssh-keygen")
	b := built{older: buildPackage(t, "1.0.0"), newer: buildPackage(t, "1.0.1")}
	b.agent = filepath.Join(filepath.Dir(b.older), "build/amd64/basicfw-agent")
	cache, err := filepath.Abs("../../.cache/vm")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range releases {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			b := b
			b.image, b.network, b.datasource, b.backend = BuildImage(t, cache, r.release), r.network, r.datasource, r.backend
			t.Run("from first boot to removal", func(t *testing.T) { testLife(t, b) })
			if r.release != Debian12 {
				return
			}
			t.Run("a download that fails at first", func(t *testing.T) { testLateDownload(t, b) })
			t.Run("locked out", func(t *testing.T) { testLockedOut(t, b) })
		})
	}
}

// buildPackage builds the package of a version as a release does.
func buildPackage(t *testing.T, version string) string {
	t.Helper()
	dist := t.TempDir()
	run(t, 10*time.Minute, "env", "DIST="+dist, "../../packaging/rpm/build", version)
	return dist + "/basicfw-agent-" + version + "-1.x86_64.rpm"
}

// testLife follows one server from its first boot, with the printed user-data, to the
// removal of the package.
func testLife(t *testing.T, b built) {
	t.Parallel()
	s := newSite(t, b, 22, 80)
	s.download.Offer(b.older)
	client := s.wire.Client
	m := s.start(t, b.image, run(t, time.Minute, b.agent, "user-data", "--rpm", s.download.URL, "--sha256", sum(t, b.older),
		"--client-ip", client.String(), "--profile", "web+mail"))

	t.Run("first boot", func(t *testing.T) {
		if len(s.accepted(time.Time{}, hidden...)) == 0 {
			t.Error("the prober never reached a listener before the rules were loaded: its silence would prove nothing")
		}
		if a := s.accepted(time.Time{}, 22); len(a) > 0 {
			t.Errorf("sshd answered a stranger %d times, first %v", len(a), a[0])
		}
		s.checkCloudInit(t, m)
		s.checkProtected(t, m, webMail)
		checkSchema(t, m, "/var/lib/cloud/instance/user-data.txt")
		if out, _ := m.Run(t, "cat "+message+" 2>/dev/null"); out != "" {
			t.Errorf("the login message still says %q", out)
		}
		s.wire.Forget(t)
		for _, to := range s.wire.Machine.Both() {
			s.dial(t, client.Like(to), to, 80).Close()
		}
		s.wire.Know(t)
		if out := m.Must(t, "systemd-analyze verify --man=no basicfw-agent.service"); out != "" {
			t.Errorf("systemd-analyze verify printed: %s", out)
		}
	})

	t.Run("day two", func(t *testing.T) { s.checkDayTwo(t, m) })

	t.Run("watching", func(t *testing.T) { s.checkWatching(t, m) })

	t.Run("without var", func(t *testing.T) { s.checkWithoutVar(t, m) })

	t.Run("reboot with broken files, without var", func(t *testing.T) { s.checkBroken(t, m) })

	if b.backend.name == iptables.name {
		t.Run("reboot with nftables.service", func(t *testing.T) { s.checkBesideNftables(t, m) })
	}

	t.Run("upgrade", func(t *testing.T) {
		session := s.dial(t, s.wire.Stranger.V4, s.wire.Machine.V4, 80)
		defer session.Close()
		before := m.Must(t, "rules")
		version := m.Must(t, "basicfw-agent version")
		since := time.Now()
		s.download.Offer(b.newer)
		// Debian's rpm prints an advice of its own first.
		if out := m.Must(t, "curl -fsS -o /run/newer.rpm "+s.download.URL+"; rpm -U /run/newer.rpm 2>&1 | grep -v ^rpm:; rm /run/newer.rpm"); out != "" {
			t.Errorf("rpm -U printed %s", out)
		}
		if now := m.Must(t, "basicfw-agent version"); now == version {
			t.Errorf("the version is still %s", now)
		}
		until(t, time.Minute, "the service runs the new program", func() error {
			out, code := m.Run(t, `systemctl is-active basicfw-agent &&
				cmp /usr/sbin/basicfw-agent "/proc/$(systemctl show -p MainPID --value basicfw-agent)/exe"`)
			if code != 0 {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
		if now := m.Must(t, "rules"); now != before {
			t.Errorf("the rules were\n%s\nand are\n%s", before, now)
		}
		if err := session.Talk(30 * time.Second); err != nil {
			t.Errorf("a session that was open before the upgrade: %v", err)
		}
		s.checkSilent(t, since)
		s.checkProtected(t, m, webMail)
	})

	t.Run("removal", func(t *testing.T) {
		since := time.Now()
		m.Must(t, "rpm -e basicfw-agent")
		if n := flows(t, m); n >= 65536 {
			t.Errorf("the conntrack table still has %d entries", n)
		}
		m.Must(t, "inventory /root/after")
		for _, what := range []string{"rules", "files", "sums"} {
			if out, code := m.Run(t, "diff /root/before/"+what+" /root/after/"+what); code != 0 {
				t.Errorf("%s after the removal differ from before the first boot (< before, > after):\n%s", what, out)
			}
		}
		// Without a firewall every port answers. With it, this proves that the silence
		// until here was the firewall's.
		until(t, time.Minute, "the prober reaching every port in both families", func() error {
			for _, port := range append([]uint16{22}, hidden...) {
				a := s.accepted(since, port)
				for _, to := range s.wire.Machine.Both() {
					if !slices.ContainsFunc(a, func(a Answer) bool { return a.From.Addr() == to }) {
						return fmt.Errorf("no answer from %v port %d", to, port)
					}
				}
			}
			return nil
		})
	})
}

// checkBesideNftables boots a machine where nftables.service loads a large set and flushes
// all rules first.
func (s *site) checkBesideNftables(t *testing.T, m *Machine) {
	m.Must(t, `set -e
		cp /etc/nftables.conf /root/nftables.conf
		awk 'BEGIN {
			print "flush ruleset\ntable inet banned {\nset addresses { type ipv4_addr; elements = {"
			for (i = 0; i < 30000; i++) printf "10.%d.%d.%d,\n", i / 65536, i / 256 % 256, i % 256
			print "} }\n}"
		}' >/etc/nftables.conf
		systemctl enable nftables
		basicfw-agent open 60000/tcp --for 30m
		basicfw-agent open 5432/tcp --for 20s
		basicfw-agent ssh allow `+s.wire.Router.V4.String()+` --for 20s
		cp -p /etc/basicfw/agent.ini /root
		printf '\n[open]\nx = 23/tcp\n' >>/etc/basicfw/agent.ini
		basicfw-agent apply --confirm 1h`)
	s.dial(t, s.wire.Stranger.V4, s.wire.Machine.V4, 23).Close()
	defer m.Must(t, "systemctl disable nftables; mv /root/nftables.conf /etc/nftables.conf; rm /etc/cloud/cloud-init.disabled")
	m.withoutCloudInit(t)
	since := time.Now()
	m.Reboot(t)
	s.checkBoot(t, m, since)
	// A temporary port is still open, or has expired meanwhile.
	s.dial(t, s.wire.Stranger.V4, s.wire.Machine.V4, 60000).Close()
	s.wantSettings(t, m, "60000/tcp until ", true)
	// The unconfirmed change is rolled back, and status says so.
	if out, code := m.Run(t, "basicfw-agent status --json"); code != 0 || !strings.Contains(out, "the machine was rebooted before it was confirmed") {
		t.Errorf("status after an unconfirmed change: exit code %d\n%s", code, out)
	}
	m.Must(t, "cp -p /root/agent.ini /etc/basicfw/agent.ini && rm /root/agent.ini")
	// Expired entries are without effect, and stay in local.ini: early in a boot, the clock alone
	// removes nothing for good.
	m.Must(t, "basicfw-agent close 5432/tcp")
	m.Must(t, "basicfw-agent ssh remove "+s.wire.Router.V4.String())
	s.wantSettings(t, m, "5432", false)
	s.wantSettings(t, m, s.wire.Router.V4.String(), false)
	m.Must(t, "basicfw-agent close 60000/tcp")
	s.checkProtected(t, m, webMail)
	if began, done := moment(t, m, "basicfw-agent", "InactiveExit"), moment(t, m, "nftables", "ActiveEnter"); began < done {
		t.Errorf("the firewall began to load at %d us, but nftables.service flushed all rules by %d us", began, done)
	}
	if n := strings.TrimSpace(m.Must(t, "nft list set inet banned addresses | grep -o '10\\.[0-9.]*' | wc -l")); n != "30000" {
		t.Errorf("the set of nftables.service has %s addresses", n)
	}
	m.Must(t, "nft delete table inet banned")
}

// testLateDownload boots a server whose package cannot be downloaded: the user-data closes
// all ports but SSH, and a login message says what is missing. The profile is loaded at the
// next boot. No client is named, so SSH is open to any address.
func testLateDownload(t *testing.T, b built) {
	t.Parallel()
	s := newSite(t, b, 80) // a prober at port 22 would use up its limit
	s.anyone = true
	m := s.start(t, b.image, example(t, "web-only", s.download.URL, sum(t, b.older)))

	t.Run("without the package", func(t *testing.T) {
		if out, _ := m.Run(t, "cat "+message+" 2>/dev/null"); !strings.Contains(out, "not active") {
			t.Errorf("the login message says %q", out)
		}
		if !strings.Contains(read(t, m.console()), "basicfw: the firewall is not active") {
			t.Error("the console does not show that the firewall is not active")
		}
		for _, to := range s.wire.Machine.Both() {
			s.dial(t, s.wire.Stranger.Like(to), to, 22).Close()
			if c, err := s.wire.Dial(s.wire.Stranger.Like(to), to, 80, greeting(80), silence); err == nil {
				c.Close()
				t.Errorf("port 80 of %v answers", to)
			}
		}
		for _, name := range []string{"web-only", "web+mail"} {
			m.Must(t, "cat >/root/"+name+" <<'EOF'\n"+example(t, name, s.download.URL, sum(t, b.older))+"\nEOF")
			checkSchema(t, m, "/root/"+name)
		}
	})

	t.Run("with the package", func(t *testing.T) {
		s.download.Offer(b.older)
		m.Reboot(t)
		s.checkCloudInit(t, m)
		s.checkProtected(t, m, webOnly)
		if out, _ := m.Run(t, "cat "+message+" 2>/dev/null"); out != "" {
			t.Errorf("the login message still says %q", out)
		}
	})

	t.Run("in the sandbox", func(t *testing.T) { s.testSandbox(t, m) })
	t.Run("a detected client", func(t *testing.T) { s.checkProbation(t, m) })
}

// example returns an example of user-data, with its marked values replaced for this test.
func example(t *testing.T, name, url, sum string) string {
	t.Helper()
	text := read(t, "../../bootstrap/examples/"+name+".yaml")
	for old, new := range map[string]string{
		`rpm='.*'`:           "rpm='" + url + "'",
		`sha256=''`:          "sha256='" + sum + "'",
		` --client-ip [^ ]*`: "",
	} {
		re := regexp.MustCompile("(?m)" + old + "$")
		if n := len(re.FindAllString(text, -1)); n != 1 {
			t.Fatalf("the example %s has %q %d times", name, old, n)
		}
		text = re.ReplaceAllString(text, new)
	}
	return text
}
