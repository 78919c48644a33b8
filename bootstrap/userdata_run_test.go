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

// stage is a machine of a process's own: nothing that is written to /etc, /usr,
// /var, /run and /dev outlives it. Every program that the user-data runs is a
// stand-in that writes down its call; cloud-init-per is real. Files in
// /run/fake say how they behave.
const stage = `set -e
mount -t tmpfs stage /mnt
for d in etc usr var; do
	mkdir -p /mnt/$d/upper /mnt/$d/work
	mount -t overlay $d -o lowerdir=/$d,upperdir=/mnt/$d/upper,workdir=/mnt/$d/work /$d
done
mount -t tmpfs run /run
mount -t tmpfs dev /dev
mknod -m 666 /dev/null c 1 3
rm -rf /etc/motd.d /var/lib/cloud
mkdir -p /run/fake /var/lib/cloud/instance
mkfifo /run/fake/console
ln -s /run/fake/console /dev/console
cat <>/run/fake/console >/run/fake/screen &
printf package >/run/fake/package
echo 'agent.rpm: digests signatures OK' >/run/fake/signature
fake() {
	printf '#!/bin/sh\n%s\n' "$2" >"$1"
	chmod 755 "$1"
}
fake /usr/local/bin/curl 'while [ $# -gt 1 ]; do [ "$1" != -o ] || out=$2; shift; done
echo "curl $1" >>/run/fake/log
[ -s /etc/motd.d/basicfw-bootstrap ] || echo "and nobody is told" >>/run/fake/log
[ ! -e /run/fake/offline ] && cp /run/fake/package "$out"'
fake /usr/local/bin/rpm '
case $1 in --dbpath) shift 2;; esac
case $1 in
-q) [ -e /run/fake/installed ];;
-K) cat /run/fake/signature;;
-U) echo "rpm -U $(cat "$2")" >>/run/fake/log; touch /run/fake/installed;;
--import) :;;
esac'
fake /usr/local/bin/sleep 'echo "sleep $1" >>/run/fake/log'
fake /usr/sbin/basicfw-agent 'echo "basicfw-agent $*" >>/run/fake/log
[ ! -e /run/fake/broken ]'
# A stage of cloud-init: what it leaves is a mark in the log, its exit code, and
# whether the login message is there.
say() {
	rc=0
	sh /run/$1 || rc=$?
	echo "$1: $rc $(cat /etc/motd.d/basicfw-bootstrap 2>/dev/null | cut -c 1-66)" >>/run/fake/log
}
`

// onStage runs user-data's stages as story says, and gives the log.
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
	// What cloud-init itself makes of a list of commands.
	const program = `
import sys, yaml
from cloudinit import util
doc = yaml.safe_load(sys.stdin)
for name in ("bootcmd", "runcmd"):
    with open(sys.argv[1] + "/" + name, "w") as f:
        script = util.shellify(doc[name])
        f.write(script if isinstance(script, str) else script.decode())
`
	if _, err := sys.Run(context.Background(), system.Command{Name: "/usr/bin/python3", Args: []string{"-c", program, dir}, Stdin: data}); err != nil {
		t.Fatal(err)
	}
	res, err := sys.Run(context.Background(), system.Command{Name: "unshare", Args: []string{"-m", "--propagation", "private", "sh", "-c",
		"cd " + dir + "\n" + stage + "cp bootcmd runcmd /run\n" + story + `
echo END >/run/fake/console
until grep -q END /run/fake/screen; do :; done
kill $!
cat /run/fake/log /run/fake/screen
ls /run`}})
	if err != nil {
		t.Fatalf("%v\n%s", err, res.Stdout)
	}
	if strings.Contains(string(res.Stdout), "basicfw.") {
		t.Errorf("the download is left behind:\n%s", res.Stdout)
	}
	log, _, _ := strings.Cut(string(res.Stdout), "END\n")
	return log
}

func TestStages(t *testing.T) {
	sum := sha256.Sum256([]byte("package"))
	const (
		inactive  = "basicfw: the firewall is not active: it has not been set up yet. S"
		failed    = "basicfw: the firewall is not active as it was asked for. See: basi"
		console   = "basicfw: the firewall is not active: it has not been set up yet. See /var/log/cloud-init-output.log\n"
		asked     = "basicfw: the firewall is not active as it was asked for. See: basicfw-agent status, and /var/log/cloud-init-output.log\n"
		bootstrap = "basicfw-agent bootstrap --or-failsafe --profile web-only --client-ip 203.0.113.7\n"
		thrice    = "curl " + testRPM + "\nsleep 2\ncurl " + testRPM + "\nsleep 4\ncurl " + testRPM + "\nsleep 0\n"
	)
	plain := UserDataOptions{RPMURL: testRPM, ClientIP: "203.0.113.7", Profile: "web-only"}
	checked := plain
	checked.SHA256 = hex.EncodeToString(sum[:])
	wrong := plain
	wrong.SHA256 = testSum
	signed := plain
	signed.KeyURL = "https://example.com/key"
	for name, tt := range map[string]struct {
		o     UserDataOptions
		story string
		want  string
	}{
		"all is well, and so it is at the next boot": {
			checked, "say bootcmd; say runcmd; say bootcmd",
			"curl " + testRPM + "\nrpm -U package\n" + bootstrap + "bootcmd: 0 \nruncmd: 0 \nbootcmd: 0 \n" + console,
		},
		"no network at first": {
			plain, "touch /run/fake/offline; say bootcmd; rm /run/fake/offline; say runcmd",
			thrice + "bootcmd: 1 " + inactive + "\ncurl " + testRPM + "\nrpm -U package\n" + bootstrap + "runcmd: 0 \n" + console + console,
		},
		"no network all the first boot": {
			plain, "touch /run/fake/offline; say bootcmd; say runcmd; rm /run/fake/offline; say bootcmd",
			thrice + "bootcmd: 1 " + inactive + "\n" + thrice + "runcmd: 1 " + inactive + "\ncurl " + testRPM + "\nrpm -U package\n" + bootstrap + "bootcmd: 0 \n" + console + console + console,
		},
		"another package than was meant": {
			wrong, "say bootcmd", "curl " + testRPM + "\nbootcmd: 1 " + inactive + "\n" + console,
		},
		"installed already": {
			plain, "touch /run/fake/installed; say bootcmd", bootstrap + "bootcmd: 0 \n" + console,
		},
		"bootstrap fails once": {
			plain, "touch /run/fake/broken; say bootcmd; rm /run/fake/broken; say runcmd",
			"curl " + testRPM + "\nrpm -U package\n" + bootstrap + "bootcmd: 1 " + failed + "\n" + bootstrap + "runcmd: 0 \n" + console + asked + asked,
		},
		"the owner set it up by hand meanwhile": {
			plain, "touch /run/fake/broken; say bootcmd; rm " + MessageFile + "; say runcmd",
			"curl " + testRPM + "\nrpm -U package\n" + bootstrap + "bootcmd: 1 " + failed + "\nruncmd: 0 \n" + console + asked,
		},
		"a clone": {
			plain, "say bootcmd; rm -r /var/lib/cloud/instance; mkdir /var/lib/cloud/instance; say bootcmd",
			"curl " + testRPM + "\nrpm -U package\n" + bootstrap + "bootcmd: 0 \n" + bootstrap + "bootcmd: 0 \n" + console + console,
		},
		"signed": {
			signed, "say bootcmd", "curl " + testRPM + "\ncurl https://example.com/key\nrpm -U package\n" + bootstrap + "bootcmd: 0 \n" + console,
		},
		"signed, as old rpm says it": {
			signed, "echo 'agent.rpm: rsa sha1 (md5) pgp md5 OK' >/run/fake/signature; say bootcmd",
			"curl " + testRPM + "\ncurl https://example.com/key\nrpm -U package\n" + bootstrap + "bootcmd: 0 \n" + console,
		},
		"not signed": {
			signed, "echo 'agent.rpm: digests OK' >/run/fake/signature; say bootcmd",
			"curl " + testRPM + "\ncurl https://example.com/key\nbootcmd: 1 " + inactive + "\n" + console,
		},
		"signed by somebody else": {
			signed, "echo 'agent.rpm: digests SIGNATURES NOT OK' >/run/fake/signature; say bootcmd",
			"curl " + testRPM + "\ncurl https://example.com/key\nbootcmd: 1 " + inactive + "\n" + console,
		},
		"no console": {
			plain, "rm /dev/console; mkdir /dev/console; say bootcmd",
			"curl " + testRPM + "\nrpm -U package\n" + bootstrap + "bootcmd: 0 \n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := onStage(t, tt.o, tt.story); got != tt.want {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

// TestDownloadByWget: an image may have no curl.
func TestDownloadByWget(t *testing.T) {
	got := onStage(t, UserDataOptions{RPMURL: testRPM}, `
rm -f /usr/local/bin/curl /usr/bin/curl
fake /usr/local/bin/wget 'while [ $# -gt 1 ]; do [ "$1" != -O ] || out=$2; shift; done; echo "wget $1" >>/run/fake/log; cp /run/fake/package "$out"'
say bootcmd`)
	if want := "wget " + testRPM + "\nrpm -U package\nbasicfw-agent bootstrap --or-failsafe\nbootcmd: 0 \n"; !strings.HasPrefix(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestShells: sh is dash on one system and bash on the next.
func TestShells(t *testing.T) {
	lab.NeedTools(t, "/usr/bin/python3", "/bin/bash", "/bin/dash")
	data, err := UserData(UserDataOptions{RPMURL: testRPM, KeyURL: testRPM})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "script")
	sys := &system.System{}
	if _, err := sys.Run(context.Background(), system.Command{Name: "/usr/bin/python3", Stdin: data, Args: []string{"-c",
		"import sys, yaml; open(sys.argv[1], 'w').write(yaml.safe_load(sys.stdin)['runcmd'][0][2])", file}}); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"/bin/dash", "-n"}, {"/bin/bash", "--posix", "-n"}} {
		if _, err := sys.Run(context.Background(), system.Command{Name: args[0], Args: append(args[1:], file)}); err != nil {
			t.Error(err)
		}
	}
}
