//go:build vm

package vm

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// beside is a container whose programs write rules, and the agent, which leaves these
// unchanged.
type beside struct {
	*Container
	lab    *lab.Lab
	wire   *Wire
	prober *Prober
	ssh    *attempts
}

// newBeside starts the container with the programs of a directory. Its host listens on 22,
// 80, 443 and the hidden ports.
func newBeside(t *testing.T, root, programs string) *beside {
	t.Helper()
	l := lab.New(t)
	w := &Wire{Outsider: l.Outsider, Machine: l.Server, Client: l.Client, Stranger: l.Stranger}
	b := &beside{Container: StartContainer(t, l, root), lab: l, wire: w}
	l.Host.Listen(t, append([]uint16{80, 443}, hidden...)...)
	run(t, time.Minute, "install", "-m", "755", programs+"/basicfw-agent", b.root+"/usr/sbin/basicfw-agent")
	run(t, time.Minute, "install", "-m", "755", programs+"/guest", b.root+"/root/guest")
	b.prober = Probe(t, w, append([]uint16{80}, hidden...)...)
	b.ssh = keepTrying(t, w, 22)
	return b
}

// bootstrap closes the machine.
func (b *beside) bootstrap(t *testing.T) {
	t.Helper()
	b.Must(t, "basicfw-agent bootstrap --profile web-only --client-ip "+b.lab.Client.String())
}

// whole checks that our rules, files and service are as configured. They may have to be
// repaired first.
func (b *beside) whole(t *testing.T, when string) {
	t.Helper()
	b.verified(t, when)
	b.wantState(t, when, "protected")
}

// verified waits until our rules, files and service are as they should be.
func (b *beside) verified(t *testing.T, when string) {
	t.Helper()
	t.Log(when)
	until(t, 30*time.Second, "our rules, files and service "+when, func() error {
		if out, code := b.Run(t, "basicfw-agent verify"); code != 0 {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
}

// wantState checks the verdict.
func (b *beside) wantState(t *testing.T, when, want string) {
	t.Helper()
	out, _ := b.Run(t, "basicfw-agent status --json")
	var status struct{ State string }
	if err := json.Unmarshal([]byte(out), &status); err != nil || status.State != want {
		t.Errorf("%s the state is %q, %v, want %s", when, status.State, err, want)
	}
}

// steady checks that since then closed ports were silent and sshd answered the client.
func (b *beside) steady(t *testing.T, when string, since time.Time) {
	t.Helper()
	if a := b.prober.Answers(since, hidden...); len(a) > 0 {
		t.Errorf("%s: closed ports answered %d times, first %v and last %v", when, len(a), a[0], a[len(a)-1])
	}
	until(t, 30*time.Second, "some attempts to reach sshd "+when, func() error {
		if tries, _ := b.ssh.since(t, since); tries < 4 {
			return fmt.Errorf("%d", tries)
		}
		return nil
	})
	// On a busy computer some attempts are late.
	if tries, failed := b.ssh.since(t, since); len(failed) > max(2, tries/20) {
		t.Errorf("%s: of %d attempts to reach sshd %d failed: %q", when, tries, len(failed), failed)
	}
}

// refused waits until a connection is refused; the kernel does not report that for each.
func (b *beside) refused(t *testing.T, when string, from, to netip.Addr, port uint16) {
	t.Helper()
	until(t, 30*time.Second, fmt.Sprintf("%s: %v to be refused at port %d", when, from, port), func() error {
		if b.lab.Outsider.Reach(from, to, port, lab.Brief) == nil {
			return errors.New("it answers")
		}
		return nil
	})
}

// reached waits until a port answers.
func (b *beside) reached(t *testing.T, when string, from, to netip.Addr, port uint16) {
	t.Helper()
	until(t, 30*time.Second, fmt.Sprintf("%s: %v to reach port %d of %v", when, from, port, to), func() error {
		return b.lab.Outsider.Reach(from, to, port, lab.Brief)
	})
}

// TestBeside runs other programs that write rules. Their rules stay and so do ours,
// whichever program is restarted.
func TestBeside(t *testing.T) {
	lab.Need(t, "ip", "nft", "mmdebstrap", "systemd-nspawn", "nsenter")
	cache, err := filepath.Abs("../../.cache/vm")
	if err != nil {
		t.Fatal(err)
	}
	root := BuildRoot(t, cache)
	dir := t.TempDir()
	for name, what := range map[string]string{"basicfw-agent": "cmd/basicfw-agent", "guest": "test/kernel/guest"} {
		run(t, 10*time.Minute, "env", "CGO_ENABLED=0", "go", "build", "-o", filepath.Join(dir, name), "github.com/basicfw/basicfw-agent/"+what)
	}
	for name, test := range map[string]func(*testing.T, *beside){
		"fail2ban": testFail2ban, "docker": testDockerUnit, "firewalld started later": testLater, "programs that load rule files": testLoaders} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, newBeside(t, root, dir))
		})
	}
}

// jails configures two jails of fail2ban: one bans with iptables, the other with nftables.
const jails = `[DEFAULT]
backend = polling
logpath = /var/log/lab.log
filter = sshd
bantime = 1h
allowipv6 = auto
ignoreself = false
usedns = no
[sshd]
enabled = false
[by-iptables]
enabled = true
port = 80
banaction = iptables-multiport
[by-nftables]
enabled = true
port = 443
banaction = nftables-multiport
`

// testFail2ban bans a stranger from two ports that the profile opens.
func testFail2ban(t *testing.T, b *beside) {
	b.Must(t, "cat >/etc/fail2ban/jail.local <<'EOF'\n"+jails+"EOF\ntouch /var/log/lab.log; systemctl start fail2ban")
	until(t, 30*time.Second, "fail2ban", func() error {
		if out, code := b.Run(t, "fail2ban-client ping"); code != 0 {
			return errors.New(out)
		}
		return nil
	})
	banned := func(when string) {
		t.Helper()
		for _, to := range b.lab.Server.Both() {
			for _, port := range []uint16{80, 443} {
				b.refused(t, when, b.lab.Stranger.Like(to), to, port)
				b.reached(t, when, b.lab.Client.Like(to), to, port)
			}
		}
	}
	both := func(what string) {
		t.Helper()
		for _, jail := range []string{"by-iptables", "by-nftables"} {
			b.Must(t, fmt.Sprintf("fail2ban-client set %s %s %s %s", jail, what, b.lab.Stranger.V4, b.lab.Stranger.V6))
		}
	}
	both("banip")
	banned("before bootstrap")
	b.bootstrap(t)
	banned("after bootstrap")
	b.whole(t, "after bootstrap")
	b.Must(t, "basicfw-agent open 8443/tcp && basicfw-agent apply")
	banned("after apply")
	b.Must(t, "systemctl stop basicfw-agent; iptables -F BASICFW-INPUT; ip6tables -D INPUT -j BASICFW-INPUT; basicfw-agent verify --repair; systemctl start basicfw-agent")
	banned("after a repair")
	since := time.Now()
	for _, what := range []string{"fail2ban-client reload", "systemctl restart fail2ban", "systemctl stop basicfw-agent; systemctl restart fail2ban; systemctl start basicfw-agent"} {
		b.Must(t, what)
		banned("after " + what)
		b.whole(t, "after "+what)
	}
	both("unbanip")
	for _, to := range b.lab.Server.Both() {
		b.reached(t, "no longer banned", b.lab.Stranger.Like(to), to, 80)
		b.reached(t, "no longer banned", b.lab.Stranger.Like(to), to, 443)
	}
	both("banip")
	banned("banned again")
	b.steady(t, "fail2ban", since)
	if out, code := b.Run(t, "grep -l -E 'f2b|"+b.lab.Stranger.V4.String()+"' /etc/sysconfig/ip*tables /var/lib/basicfw/*.json"); code == 0 {
		t.Errorf("a ban is persisted in %s", out)
	}
	b.Must(t, "basicfw-agent uninstall")
	banned("after uninstall")
	b.Must(t, "fail2ban-client reload")
	banned("after uninstall, and a reload")
	if out, code := b.Run(t, "grep -E ' (ERROR|CRITICAL) ' /var/log/fail2ban.log"); code == 0 {
		t.Errorf("fail2ban logged errors:\n%s", out)
	}
}

// testDockerUnit restarts Docker's service while a port is published.
func testDockerUnit(t *testing.T, b *beside) {
	// Docker sets kernel parameters of its network, and makes control groups.
	for unit, command := range map[string]string{
		"docker": "dockerd -H fd:// --containerd=/run/containerd/containerd.sock", "containerd": "containerd"} {
		write(t, b.root+"/etc/systemd/system/"+unit+".service.d/lab.conf", "[Service]\nPrivateMounts=yes\nExecStart=\n"+
			"ExecStart=/bin/sh -ec 'mount -t cgroup2 cgroup2 /sys/fs/cgroup; exec "+command+"'\n", 0o644)
	}
	b.Must(t, "systemctl daemon-reload; mount -o remount,rw,bind /proc/sys; mkdir -p /etc/docker; cat >/etc/docker/daemon.json <<'EOF'\n"+
		`{"storage-driver": "vfs", "exec-opts": ["native.cgroupdriver=cgroupfs"], "ipv6": true, "fixed-cidr-v6": "fd00:d0c::/64", "experimental": true, "ip6tables": true}`+"\nEOF\nsystemctl start docker")
	b.Must(t, "tar -C /root -c guest | docker import - guest && docker run -d --name db --restart always --cgroup-parent /"+b.group+"/docker -p 5432:5432 guest /guest listen 5432")
	b.lab.Outsider.Listen(t, 7)
	const db = 5432
	works := func(when string) {
		t.Helper()
		for _, to := range b.lab.Server.Both() {
			b.reached(t, when, b.lab.Stranger.Like(to), to, db)
		}
		for _, to := range b.lab.Client.Both() {
			until(t, 30*time.Second, when+": the container to reach "+to.String(), func() error {
				if out, code := b.Run(t, "docker exec db /guest dial "+netip.AddrPortFrom(to, 7).String()); code != 0 {
					return errors.New(out)
				}
				return nil
			})
		}
	}
	works("before bootstrap")
	b.bootstrap(t)
	for _, to := range b.lab.Server.Both() {
		if b.lab.Outsider.Reach(b.lab.Stranger.Like(to), to, db, lab.Brief) == nil {
			t.Errorf("after bootstrap the published port of %v answers", to)
		}
	}
	b.Must(t, fmt.Sprintf("basicfw-agent open %d/tcp", db))
	works("after open")
	b.whole(t, "after bootstrap")
	since := time.Now()
	for _, what := range []string{"systemctl restart docker", "systemctl stop docker.socket docker; systemctl start docker",
		"systemctl stop basicfw-agent; systemctl restart docker; basicfw-agent verify && systemctl start basicfw-agent",
		"systemctl restart basicfw-agent", "basicfw-agent open 8443/tcp"} {
		b.Must(t, what)
		works("after " + what)
		b.whole(t, "after "+what)
	}
	b.steady(t, "docker", since)
	if out, code := b.Run(t, "grep -i docker /etc/sysconfig/ip*tables | grep -v BASICFW-"); code == 0 {
		t.Errorf("Docker's rules are persisted:\n%s", out)
	}
	b.Must(t, "basicfw-agent uninstall")
	works("after uninstall")
	b.Must(t, "systemctl restart docker")
	works("after uninstall, and a restart")
	b.Must(t, "docker rm -f db; systemctl stop docker.socket docker containerd")
}

// testLater starts firewalld on a closed machine whose administrator wants both, over a
// boot.
func testLater(t *testing.T, b *beside) {
	b.bootstrap(t)
	b.whole(t, "after bootstrap")
	since := time.Now()
	ready := func() { t.Helper(); b.Must(t, "until firewall-cmd -q --state; do sleep 0.1; done") }
	b.Must(t, "printf '[agent]\\non_conflict = refuse\\n' >/etc/basicfw/agent.ini; systemctl -q enable firewalld; systemctl start firewalld")
	ready()
	beside := func(when string) {
		t.Helper()
		b.verified(t, when)
		b.wantState(t, when, "blocked") // firewalld's own zone accepts SSH only
		if out, code := b.Run(t, "basicfw-agent open 8443/tcp"); code != 1 || !strings.Contains(out, "the firewall of this machine is also managed by firewalld") {
			t.Errorf("%s: a change: exit code %d\n%s", when, code, out)
		}
		if out, _ := b.Run(t, "basicfw-agent status --json"); !strings.Contains(strings.Join(strings.Fields(out), ""), `"conflicts":["firewalld"]`) {
			t.Errorf("%s: status does not show the conflict:\n%s", when, out)
		}
		if out, _ := b.Run(t, "systemctl is-enabled firewalld basicfw-agent; systemctl is-active firewalld basicfw-agent"); out != "enabled\nenabled\nactive\nactive\n" {
			t.Errorf("%s: the units are %q", when, out)
		}
		for _, to := range b.lab.Server.Both() {
			until(t, 30*time.Second, when+": sshd to answer the client", func() error { return connect(b.wire, b.lab.Client.Like(to), to, 22) })
		}
	}
	beside("with firewalld")
	b.Must(t, "firewall-cmd -q --reload")
	beside("after firewalld's reload")
	// The flush is logged, and repaired.
	if out := b.Must(t, "journalctl -b -u basicfw-agent --no-pager"); !strings.Contains(out, "another program flushed the") {
		t.Errorf("the log does not report the flush:\n%s", out)
	}
	if a := b.prober.Answers(since, hidden...); len(a) > 0 {
		t.Errorf("closed ports answered %d times, first %v", len(a), a[0])
	}
	b.reboot(t)
	ready()
	since = time.Now()
	beside("after a boot")
	b.Must(t, "rm /etc/basicfw/agent.ini; basicfw-agent apply")
	b.whole(t, "taken over")
	if out, _ := b.Run(t, "systemctl is-enabled firewalld"); out != "masked\n" {
		t.Errorf("firewalld is %s", out)
	}
	if a := b.prober.Answers(since, hidden...); len(a) > 0 {
		t.Errorf("after a boot closed ports answered %d times, first %v", len(a), a[0])
	}
}

// iptablesServices installs the two units of iptables-services and their script: a stop
// removes all rules and sets the policies to ACCEPT.
const iptablesServices = `
mkdir -p /usr/libexec/iptables
cat >/usr/libexec/iptables/init <<'EOF'
#!/bin/sh
p=$1
stop() {
	for table in $(cat /proc/net/${p%tables}_tables_names 2>/dev/null || echo filter nat mangle raw); do
		$p -t $table -F; $p -t $table -X; $p -t $table -Z
	done
	for chain in INPUT FORWARD OUTPUT; do $p -P $chain ACCEPT; done
}
case $2 in
start|reload) exec $p-restore /etc/sysconfig/$p;;
stop) stop;;
esac
EOF
chmod 755 /usr/libexec/iptables/init
for p in iptables ip6tables; do
	cat >/etc/systemd/system/$p.service <<EOF
[Unit]
Description=firewall with $p
AssertPathExists=/etc/sysconfig/$p
Before=network-pre.target
Wants=network-pre.target
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/libexec/iptables/init $p start
ExecReload=/usr/libexec/iptables/init $p reload
ExecStop=/usr/libexec/iptables/init $p stop
[Install]
WantedBy=multi-user.target
EOF
done
cat >/etc/sysconfig/iptables <<'EOF'
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -m state --state RELATED,ESTABLISHED -j ACCEPT
-A INPUT -p icmp -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A INPUT -p tcp -m state --state NEW -m tcp --dport 22 -j ACCEPT
-A INPUT -j REJECT --reject-with icmp-host-prohibited
-A FORWARD -j REJECT --reject-with icmp-host-prohibited
COMMIT
EOF
sed -e s/icmp-host/icmp6-adm/ -e 's/-p icmp/-p ipv6-icmp/' /etc/sysconfig/iptables >/etc/sysconfig/ip6tables
systemctl daemon-reload
systemctl -q enable iptables ip6tables
systemctl start iptables ip6tables
`

// testLoaders adds services that load rules from files: netfilter-persistent and
// iptables-services, whose files hold our rules, and nftables. They stay.
func testLoaders(t *testing.T, b *beside) {
	const rules = "{ iptables-save; ip6tables-save; } | sed -e 's/\\[.*\\]//' -e '/^[#*]/d' -e '/^COMMIT/d' -e '/^:[A-Z]* ACCEPT/d'"
	for _, l := range []struct {
		name, setUp, units string
		harmless           []string // commands that change no rule
		flushes            []string // commands that remove our rules
	}{
		{"netfilter-persistent", "rmdir /etc/sysconfig; for p in /packages/*.deb; do dpkg-deb --fsys-tarfile $p | tar -C / -x --keep-directory-symlink; done; systemctl daemon-reload; systemctl -q enable netfilter-persistent; systemctl start netfilter-persistent", "netfilter-persistent",
			[]string{"systemctl restart netfilter-persistent", "netfilter-persistent save", "systemctl stop netfilter-persistent"},
			[]string{"netfilter-persistent flush"}},
		{"iptables-services", "mkdir /etc/sysconfig;" + iptablesServices, "iptables ip6tables",
			[]string{"systemctl reload iptables ip6tables"},
			[]string{"systemctl restart iptables ip6tables", "systemctl stop iptables ip6tables"}},
		{"nftables", "mkdir -p /etc/sysconfig; rm -f /etc/sysconfig/*; " + `printf '%s\n' 'flush ruleset' 'table inet banned {' \
			'chain input { type filter hook input priority -10; ip saddr 203.0.113.66 drop; }' '}' >/etc/nftables.conf;
			systemctl -q enable nftables; systemctl start nftables`, "nftables",
			nil, []string{"systemctl reload nftables", "systemctl stop nftables", "systemctl start nftables"}},
	} {
		t.Log(l.name)
		b.Must(t, l.setUp)
		before := b.Must(t, rules)
		b.bootstrap(t)
		b.whole(t, "after bootstrap")
		ours := b.Must(t, rules)
		since := time.Now()
		for _, what := range l.harmless {
			b.Must(t, what)
			b.whole(t, "after "+what)
		}
		if len(l.harmless) > 0 {
			b.steady(t, l.name, since)
		}
		for _, what := range l.flushes {
			b.Must(t, what)
			b.whole(t, "after "+what)
		}
		if now := b.Must(t, rules); now != ours {
			t.Errorf("with %s the rules became\n%s\nand were\n%s", l.name, now, ours)
		}
		b.Must(t, "systemctl start "+l.units)
		b.whole(t, "after a start")
		b.reboot(t)
		since = time.Now()
		b.whole(t, "after a boot")
		if now := b.Must(t, rules); now != ours {
			t.Errorf("after a boot with %s the rules are\n%s\nand were\n%s", l.name, now, ours)
		}
		b.Must(t, "systemctl is-active "+l.units)
		if out, code := b.Run(t, "journalctl -b -u basicfw-agent --no-pager | grep -E 'level=(warning|error)'"); code == 0 {
			t.Errorf("with %s the service logged warnings or errors:\n%s", l.name, out)
		}
		b.steady(t, "after a boot with "+l.name, since)
		b.Must(t, "basicfw-agent uninstall")
		if now := b.Must(t, rules); now != before {
			t.Errorf("after uninstall with %s the rules are\n%s\nand were\n%s", l.name, now, before)
		}
		b.Must(t, "systemctl -q disable --now "+l.units)
		b.lab.Host.MustRun(t, "nft", "flush", "ruleset")
	}
}

// reboot boots the container on a network without rules.
func (b *beside) reboot(t *testing.T) {
	t.Helper()
	b.Stop(t)
	b.lab.Host.MustRun(t, "nft", "flush", "ruleset")
	b.Start(t)
}
