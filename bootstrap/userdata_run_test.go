package bootstrap

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// stage sets up a private machine for one process: nothing that it writes to /etc,
// /usr, /var, /run and /dev outlives it. Every program that the user-data runs is a
// fake that logs its call, except cloud-init-per. Files in /run/fake control the
// fakes.
const stage = `set -e
mount -t tmpfs stage /mnt
for d in etc usr var; do
	mkdir -p /mnt/$d/upper /mnt/$d/work
	mount -t overlay $d -o lowerdir=/$d,upperdir=/mnt/$d/upper,workdir=/mnt/$d/work /$d
done
mount -t tmpfs run /run
mount -t tmpfs dev /dev
mknod -m 666 /dev/null c 1 3
rm -rf /etc/motd.d /etc/yum.repos.d /var/lib/cloud /var/lib/basicfw
mkdir -p /run/fake /var/lib/cloud/instance /etc/yum.repos.d
echo 100.5 1 >/run/fake/uptime
mount --bind /run/fake/uptime /proc/uptime
mkfifo /run/fake/console
ln -s /run/fake/console /dev/console
cat <>/run/fake/console >/run/fake/screen & screen=$!
printf package >/run/fake/package
echo 'agent.rpm: digests signatures OK' >/run/fake/signature
fake() {
	rm -f "$1"
	printf '#!/bin/sh\n%s\n' "$2" >"$1"
	chmod 755 "$1"
}
fake /usr/local/bin/curl 'while [ $# -gt 1 ]; do [ "$1" != -o ] || out=$2; shift; done
echo "curl $1" >>/run/fake/log
[ -s /etc/motd.d/basicfw-bootstrap ] || echo "without a login message" >>/run/fake/log
[ ! -e /run/fake/offline ] && cp /run/fake/package "$out"'
fake /usr/local/bin/rpm '
case $1 in --dbpath) shift 2;; esac
case $1 in
-q) [ -e /run/fake/installed ];;
-K) cat /run/fake/signature;;
-U) [ ! -e /run/fake/locked ] || { rm /run/fake/locked; exit 1; }
	echo "rpm -U $(cat "$2")" >>/run/fake/log; touch /run/fake/installed;;
--import) :;;
esac'
fake /usr/local/bin/dnf 'echo "dnf $*" >>/run/fake/log
[ ! -e /run/fake/offline ] && touch /run/fake/installed'
fake /usr/local/bin/sleep 'IFS=. read -r now _ </proc/uptime
echo $((now + $1)).5 1 >/run/fake/uptime'
fake /usr/local/bin/nft '[ ! -e /run/fake/nonft ] || exit 1
case $1 in add*) echo guard;; *) echo "nft $*";; esac >>/run/fake/log'
fake /usr/local/bin/iptables 'echo "iptables $*" >>/run/fake/log; [ ! -e /run/fake/noiptables ]'
fake /usr/local/bin/ip6tables 'echo "ip6tables $*" >>/run/fake/log'
fake /usr/local/bin/systemd-run 'echo "systemd-run $*" >>/run/fake/timers'
fake /usr/local/bin/systemctl 'echo "systemctl $*" >>/run/fake/timers'
fake /usr/sbin/sshd 'printf "port 2222\nport 22\nlistenaddress 0.0.0.0:22\n"'
fake /usr/sbin/basicfw-agent 'echo "basicfw-agent $*" >>/run/fake/log
[ ! -e /run/fake/broken ] || exit 1
[ -e /run/fake/stateless ] || { mkdir -p /var/lib/basicfw; touch /var/lib/basicfw/state.json; }'
# Runs a stage of cloud-init, and logs its exit code and the login message.
say() {
	rc=0
	sh /run/$1 || rc=$?
	echo "$1: $rc $(cat /etc/motd.d/basicfw-bootstrap 2>/dev/null | cut -c 1-70)" >>/run/fake/log
}
`

// onStage runs user-data's stages as story says, and returns the log.
func onStage(t *testing.T, o UserDataOptions, story string) string {
	t.Helper()
	lab.NeedTools(t, "/usr/bin/python3", "/usr/bin/cloud-init-per")
	lab.Need(t)
	data, err := UserData(o)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	sys := &system.System{}
	// The scripts that cloud-init itself makes of the lists of commands.
	const program = `
import email, sys, yaml
from cloudinit import util
text = sys.stdin.read()
if text.startswith("Content-Type: multipart/"):
    hook, config = email.message_from_string(text).get_payload()
    with open(sys.argv[1] + "/boothook", "w") as f:
        f.write(util.strip_prefix_suffix(hook.get_payload(), prefix="#cloud-boothook").lstrip())
    text = config.get_payload()
doc = yaml.safe_load(text)
for name in ("bootcmd", "runcmd"):
    with open(sys.argv[1] + "/" + name, "w") as f:
        script = util.shellify(doc[name])
        f.write(script if isinstance(script, str) else script.decode())
`
	if _, err := sys.Run(context.Background(), system.Command{Name: "/usr/bin/python3", Args: []string{"-c", program, dir}, Stdin: data}); err != nil {
		t.Fatal(err)
	}
	res, err := sys.Run(context.Background(), system.Command{Name: "unshare", Args: []string{"-m", "-n", "--propagation", "private", "sh", "-c",
		"cd " + dir + "\n" + stage + "cp * /run\n" + story + `
echo END >/run/fake/console
until grep -q END /run/fake/screen; do :; done
kill $screen
cat /run/fake/log /run/fake/screen
ls /run`}})
	if err != nil {
		t.Fatalf("%v\n%s", err, res.Stdout)
	}
	if strings.Contains(string(res.Stdout), "basicfw.") {
		t.Errorf("the download was not removed:\n%s", res.Stdout)
	}
	log, _, _ := strings.Cut(string(res.Stdout), "END\n")
	return log
}

func TestStages(t *testing.T) {
	sum := sha256.Sum256([]byte("package"))
	const (
		inactive  = "basicfw: the firewall is not active: it has not been set up yet. See /var/log/cloud-init-output.log\n"
		noPackage = "basicfw: the firewall is not active, and only SSH is open: its package cannot be installed. See /var/log/cloud-init-output.log\n"
		asked     = "basicfw: the firewall is not active as configured. See: basicfw-agent status, and /var/log/cloud-init-output.log\n"
		bootstrap = "basicfw-agent bootstrap --or-failsafe --profile web-only --client-ip 203.0.113.7\n"
		curl      = "curl " + testRPM + "\n"
		install   = "guard\n" + curl + "rpm -U package\n"
		done      = bootstrap + "nft delete table inet basicfw-guard\n"
	)
	minute := strings.Repeat(curl, 13)
	failed := func(stage, message string) string { return stage + ": 1 " + message[:70] + "\n" }
	plain := UserDataOptions{RPMURL: testRPM, ClientIP: "203.0.113.7", Profile: "web-only"}
	checked := plain
	checked.SHA256 = hex.EncodeToString(sum[:])
	wrong := plain
	wrong.SHA256 = testSum
	signed := plain
	signed.KeyURL = "https://example.com/key"
	repo := signed
	repo.RPMURL, repo.RepoURL = "", "https://example.com/repo"
	const dnf = "dnf -y -q --disablerepo=* --enablerepo=basicfw install basicfw-agent\n"
	for name, tt := range map[string]struct {
		o     UserDataOptions
		story string
		want  string
	}{
		"success, and another boot": {
			checked, "say bootcmd; say runcmd; say bootcmd",
			install + done + "bootcmd: 0 \nruncmd: 0 \nbootcmd: 0 \n" + inactive,
		},
		"no network at first": {
			plain, "touch /run/fake/offline; say bootcmd; rm /run/fake/offline; say runcmd",
			"guard\n" + minute + failed("bootcmd", noPackage) + install + done + "runcmd: 0 \n" + inactive + noPackage + noPackage,
		},
		"no network during the first boot": {
			plain, "touch /run/fake/offline; say bootcmd; say runcmd; rm /run/fake/offline; say bootcmd",
			"guard\n" + minute + failed("bootcmd", noPackage) + "guard\n" + minute + failed("runcmd", noPackage) + install + done + "bootcmd: 0 \n" +
				inactive + strings.Repeat(noPackage, 4),
		},
		"a network that is up after seconds": {
			plain, `fake /usr/local/bin/sleep 'IFS=. read -r now _ </proc/uptime; echo $((now + 30)).5 1 >/run/fake/uptime; rm -f /run/fake/offline'
				touch /run/fake/offline; say bootcmd`,
			"guard\n" + curl + curl + "rpm -U package\n" + done + "bootcmd: 0 \n" + inactive,
		},
		"rpm is locked at first": {
			plain, "touch /run/fake/locked; say bootcmd", install + done + "bootcmd: 0 \n" + inactive,
		},
		"wrong checksum": {
			wrong, "say bootcmd", "guard\n" + curl + failed("bootcmd", noPackage) + inactive + noPackage,
		},
		"already installed": {
			plain, "touch /run/fake/installed; say bootcmd", done + "bootcmd: 0 \n" + inactive,
		},
		"bootstrap fails once": {
			plain, "touch /run/fake/broken; say bootcmd; rm /run/fake/broken; say runcmd",
			install + bootstrap + "guard\n" + failed("bootcmd", asked) + done + "runcmd: 0 \n" + inactive + asked + asked,
		},
		"bootstrap leaves no state": {
			plain, "touch /run/fake/stateless; say bootcmd", install + bootstrap + "guard\n" + failed("bootcmd", asked) + inactive + asked,
		},
		"bootstrap closes the server with the failsafe rules": {
			plain, "mkdir /var/lib/basicfw; touch /run/fake/broken /var/lib/basicfw/state.json; say bootcmd",
			install + bootstrap + failed("bootcmd", asked) + inactive + asked,
		},
		"set up by hand meanwhile": {
			plain, "touch /run/fake/broken; say bootcmd; rm " + MessageFile + "; say runcmd",
			install + bootstrap + "guard\n" + failed("bootcmd", asked) + "runcmd: 0 \n" + inactive + asked,
		},
		"a clone": {
			plain, "say bootcmd; rm -r /var/lib/cloud/instance; mkdir /var/lib/cloud/instance; say bootcmd",
			install + done + "bootcmd: 0 \n" + done + "bootcmd: 0 \n" + inactive + inactive,
		},
		"signed": {
			signed, "say bootcmd", "guard\n" + curl + "curl https://example.com/key\nrpm -U package\n" + done + "bootcmd: 0 \n" + inactive,
		},
		"signed, with an old rpm": {
			signed, "echo 'agent.rpm: rsa sha1 (md5) pgp md5 OK' >/run/fake/signature; say bootcmd",
			"guard\n" + curl + "curl https://example.com/key\nrpm -U package\n" + done + "bootcmd: 0 \n" + inactive,
		},
		"not signed": {
			signed, "echo 'agent.rpm: digests OK' >/run/fake/signature; say bootcmd",
			"guard\n" + curl + "curl https://example.com/key\n" + failed("bootcmd", noPackage) + inactive + noPackage,
		},
		"signed with another key": {
			signed, "echo 'agent.rpm: digests SIGNATURES NOT OK' >/run/fake/signature; say bootcmd",
			"guard\n" + curl + "curl https://example.com/key\n" + failed("bootcmd", noPackage) + inactive + noPackage,
		},
		"a repository": {
			repo, "say bootcmd; grep -c '^baseurl=https://example.com/repo$\\|^gpgcheck=1$\\|^repo_gpgcheck=1$\\|^gpgkey=https://example.com/key$' /etc/yum.repos.d/basicfw.repo >>/run/fake/log",
			"guard\n" + dnf + done + "bootcmd: 0 \n4\n" + inactive,
		},
		"a repository that is not there at first": {
			repo, "touch /run/fake/offline; say bootcmd; rm /run/fake/offline; say runcmd",
			"guard\n" + strings.Repeat(dnf, 13) + failed("bootcmd", noPackage) + "guard\n" + dnf + done + "runcmd: 0 \n" + inactive + noPackage + noPackage,
		},
		"a repository without a key": {
			UserDataOptions{RepoURL: "https://example.com/repo"}, "say bootcmd; grep -c '^gpgcheck=0$\\|^gpgkey=$' /etc/yum.repos.d/basicfw.repo >>/run/fake/log",
			"guard\n" + dnf + "basicfw-agent bootstrap --or-failsafe\nnft delete table inet basicfw-guard\nbootcmd: 0 \n2\n" + inactive,
		},
		"no console": {
			plain, "rm /dev/console; mkdir /dev/console; say bootcmd", install + done + "bootcmd: 0 \n",
		},
		"neither nft nor iptables": {
			plain, "touch /run/fake/nonft /run/fake/noiptables /run/fake/offline; say bootcmd; grep -c 'iptables' /run/fake/log >/run/fake/n; mv /run/fake/n /run/fake/log",
			"1\n" + inactive + strings.Replace(noPackage, ", and only SSH is open", "", 1),
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := onStage(t, tt.o, tt.story); got != tt.want {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

// TestGuardByIptables checks the rules where nft does not work, and that they are gone when
// bootstrap begins.
func TestGuardByIptables(t *testing.T) {
	got := onStage(t, UserDataOptions{RPMURL: testRPM}, "touch /run/fake/nonft /run/fake/offline; say bootcmd; rm /run/fake/offline; say runcmd; ls /run/basicfw-guard >>/run/fake/log || :")
	const add = " -t mangle -A basicfw-guard -j "
	rules := func(program, icmp string) string {
		return program + " -t mangle -N basicfw-guard\n" + program + add + "ACCEPT -i lo\n" + program + add + "ACCEPT -m conntrack --ctstate ESTABLISHED,RELATED\n" +
			program + add + "ACCEPT -p " + icmp + "\n" + program + add + "ACCEPT -p udp -m multiport --dports 68,546\n" +
			program + add + "ACCEPT -p tcp -m multiport --dports 22,2222\n" + program + add + "DROP\n" + program + " -t mangle -I INPUT -j basicfw-guard\n"
	}
	gone := func(program string) string {
		return program + " -t mangle -D INPUT -j basicfw-guard\n" + program + " -t mangle -F basicfw-guard\n" + program + " -t mangle -X basicfw-guard\n"
	}
	curl := "curl " + testRPM + "\n"
	up, down := rules("iptables", "icmp")+rules("ip6tables", "ipv6-icmp"), gone("iptables")+gone("ip6tables")
	want := up + strings.Repeat(curl, 13) + "bootcmd: 1 basicfw: the firewall is not active, and only SSH is open: its package\n" +
		down + up + curl + "rpm -U package\n" + down + "basicfw-agent bootstrap --or-failsafe\nruncmd: 0 \n"
	if !strings.HasPrefix(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestDownloadByWget downloads with wget: an image may have no curl.
func TestDownloadByWget(t *testing.T) {
	got := onStage(t, UserDataOptions{RPMURL: testRPM}, `
rm -f /usr/local/bin/curl /usr/bin/curl
fake /usr/local/bin/wget 'while [ $# -gt 1 ]; do [ "$1" != -O ] || out=$2; shift; done; echo "wget $1" >>/run/fake/log; cp /run/fake/package "$out"'
say bootcmd`)
	if want := "guard\nwget " + testRPM + "\nrpm -U package\nbasicfw-agent bootstrap --or-failsafe\n"; !strings.HasPrefix(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestTimer checks that a failed script is run again later in the same boot, until it has
// succeeded.
func TestTimer(t *testing.T) {
	got := onStage(t, UserDataOptions{RPMURL: testRPM}, `
touch /run/fake/offline
say bootcmd
until [ -e /run/fake/timers ]; do :; done
rm /run/fake/offline
say basicfw-bootstrap
say basicfw-bootstrap
cat /run/fake/timers >>/run/fake/log`)
	const want = "bootcmd: 1 basicfw: the firewall is not active, and only SSH is open: its package\n" +
		"guard\ncurl " + testRPM + "\nrpm -U package\nbasicfw-agent bootstrap --or-failsafe\nnft delete table inet basicfw-guard\n" +
		"basicfw-bootstrap: 0 \nbasicfw-bootstrap: 0 \n" +
		"systemd-run --unit=basicfw-bootstrap --on-active=2min --on-unit-inactive=2min sh /run/basicfw-bootstrap\n" +
		"systemctl --no-block stop basicfw-bootstrap.timer\nsystemctl --no-block stop basicfw-bootstrap.timer\n"
	if _, after, ok := strings.Cut(got, want); !ok || strings.Contains(after, "rpm -U") {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestOneAtATime checks that the timer and runcmd do not run at the same time.
func TestOneAtATime(t *testing.T) {
	got := onStage(t, UserDataOptions{RPMURL: testRPM}, `
fake /usr/sbin/basicfw-agent 'echo begin >>/run/fake/log; until [ -e /run/fake/go ]; do :; done; mkdir -p /var/lib/basicfw; touch /var/lib/basicfw/state.json; echo end >>/run/fake/log'
sh /run/bootcmd & first=$!
until grep -q begin /run/fake/log; do :; done
sh /run/runcmd & second=$!
until grep -q -- "-> FLOCK" /proc/locks; do :; done
touch /run/fake/go
wait $first $second`)
	if n := strings.Count(got, "begin"); n != 1 {
		t.Errorf("bootstrap ran %d times:\n%s", n, got)
	}
}

// TestMIMEStages runs the parts of the multipart message.
func TestMIMEStages(t *testing.T) {
	o := UserDataOptions{RPMURL: testRPM, MIME: true}
	const (
		install = "guard\ncurl " + testRPM + "\nrpm -U package\nbasicfw-agent bootstrap --or-failsafe\nnft delete table inet basicfw-guard\n"
		failed  = ": 1 basicfw: the firewall is not active, and only SSH is open: its package\n"
	)
	for name, tt := range map[string]struct{ story, want string }{
		"at once":                   {"say boothook; say bootcmd; say runcmd; say boothook", install + "boothook: 0 \nbootcmd: 0 \nruncmd: 0 \nboothook: 0 \n"},
		"only the boothook is left": {"say boothook; rm -r /run/basicfw-bootstrap; say boothook", install + "boothook: 0 \nboothook: 0 \n"},
		"at the end of the boot": {"touch /run/fake/offline; say boothook; rm /run/fake/offline; say runcmd",
			"guard\n" + strings.Repeat("curl "+testRPM+"\n", 13) + "boothook" + failed + install + "runcmd: 0 \n"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := onStage(t, o, tt.story); !strings.HasPrefix(got, tt.want) {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

// TestShells checks the syntax with dash and bash: either may be sh.
func TestShells(t *testing.T) {
	lab.NeedTools(t, "/usr/bin/python3", "/bin/bash", "/bin/dash")
	data, err := UserData(UserDataOptions{RPMURL: testRPM, KeyURL: testRPM})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "script")
	sys := &system.System{}
	if _, err := sys.Run(context.Background(), system.Command{Name: "/usr/bin/python3", Stdin: data, Args: []string{"-c",
		"import sys, yaml; open(sys.argv[1], 'w').write(yaml.safe_load(sys.stdin)['bootcmd'][1][2].replace('cat >', ': ').replace(\"<<'BASICFW'\", ''))", file}}); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"/bin/dash", "-n"}, {"/bin/bash", "--posix", "-n"}} {
		if _, err := sys.Run(context.Background(), system.Command{Name: args[0], Args: append(args[1:], file)}); err != nil {
			t.Error(err)
		}
	}
}
