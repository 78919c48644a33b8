package vm

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Image is a disk with its kernel. It is never written to: each machine has an overlay.
type Image struct{ Disk, Kernel, Initrd string }

// Release is a version of Debian that an image is made of.
type Release struct {
	Suite    string
	Packages string // in addition to those of all releases
	Bare     bool   // without any program that loads rules
}

// Debian12 is the release of the tests that need only one.
var Debian12 = Release{Suite: "bookworm", Packages: "iptables,nftables"}

// Bare is a machine that has neither iptables nor nft.
var Bare = Release{Suite: "bookworm", Packages: "libnftables1,libedit2", Bare: true}

// packages are those of the guest: what a cloud image has, and rpm.
const packages = "systemd,systemd-sysv,udev,dbus,iproute2,e2fsprogs," +
	"openssh-server,sudo,cloud-init,rpm,curl,initramfs-tools,linux-image-cloud-amd64"

// ListenPorts are the guest's listening ports except sshd's: those of the profile web+mail
// and others.
var ListenPorts = []uint16{25, 80, 110, 143, 443, 465, 993, 995, 21, 23, 111, 3306, 5432, 8080, 60000}

// files returns the files that are copied into the image.
func files() map[string]string {
	ports := strings.Trim(fmt.Sprint(ListenPorts), "[]")
	return map[string]string{
		"/etc/machine-id": "0123456789abcdef0123456789abcdef\n", // without one, systemd would enable every unit
		"/etc/hostname":   "guest\n",
		"/etc/fstab":      "",

		// The image has no other locales; keys of other types cost time.
		"/etc/cloud/cloud.cfg.d/90-lab.cfg": "ssh_genkeytypes: [ed25519]\nlocale: C.UTF-8\n",

		// No router advertises a route; networkd would wait 12 s for one.
		"/etc/systemd/network/10-cloud-init-ens3.network.d/lab.conf": "[Network]\nIPv6AcceptRA=no\n",
		"/etc/systemd/network/10-netplan-ens3.network.d/lab.conf":    "[Network]\nIPv6AcceptRA=no\n",

		// In a droplet, cloud-init brings up the interface to reach the metadata, and then
		// removes all its addresses. networkd would wait two minutes for the link-local one.
		"/etc/systemd/network/10-cloud-init-eth0.network.d/lab.conf": "[Network]\nIPv6AcceptRA=no\nLinkLocalAddressing=no\n",

		// The listeners start before anything that might close them: a port that is open
		// only for a moment of the boot shows.
		"/etc/systemd/system/lab-listen.service": `[Unit]
Description=Listeners for a firewall to hide
DefaultDependencies=no
Before=network-pre.target cloud-init-local.service basicfw-agent.service
[Service]
Type=notify
ExecStart=/usr/local/sbin/guest listen ` + ports + `
[Install]
WantedBy=sysinit.target
`,
		"/etc/systemd/system/lab-serve.service": `[Unit]
Description=Run commands from a serial port
DefaultDependencies=no
[Service]
ExecStart=/usr/local/sbin/guest serve lab
[Install]
WantedBy=sysinit.target
`,
		// The state of the machine before user-data.
		"/etc/systemd/system/lab-before.service": `[Unit]
Description=Record the state of the machine
DefaultDependencies=no
After=local-fs.target cloud-init-local.service
Before=cloud-init.service cloud-init-network.service
ConditionPathExists=!/root/before
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/inventory /root/before
[Install]
WantedBy=cloud-init.target
`,
		// The rules at network-pre.target.
		"/etc/systemd/system/lab-rules.service": `[Unit]
Description=Record the rules before the network
DefaultDependencies=no
After=basicfw-agent.service
Wants=network-pre.target
Before=network-pre.target cloud-init-local.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c '/usr/local/sbin/rules >/run/lab-rules'
[Install]
WantedBy=sysinit.target
`,
		"/usr/local/sbin/rules":     rules,
		"/usr/local/sbin/inventory": inventory,

		// A replacement for what the examples of user-data install and start: the machine
		// reaches no mirror.
		"/nginx/DEBIAN/control": "Package: nginx\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: nothing\n",
		"/nginx/lib/systemd/system/nginx.service": "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/true\n" +
			"[Install]\nWantedBy=multi-user.target\n",
	}
}

// rules prints the rules of the machine without counters. A bare machine has an nft that
// the agent does not find.
const rules = `#!/bin/sh
set -e
if command -v iptables-save >/dev/null; then
	{ iptables-save; ip6tables-save; } | sed -e '/^#/d' -e 's/\[[0-9:]*\]//'
else
	lab-nft -s list ruleset
fi
`

// inventory records rules and files, among them units and the links that enable them. A
// table without rules counts as none. What changes by itself is left out: files of rpm, the
// journal and systemd, and the host keys, user and locale of cloud-init.
const inventory = `#!/bin/sh
set -e
mkdir -p "$1"
rules | sed -e '/^[*]/d' -e '/^COMMIT/d' -e '/^:[A-Z]* ACCEPT/d' >"$1/rules"
cd /
set -f
without=
for p in var/lib/cloud var/lib/rpm var/lib/systemd var/log var/tmp root/before root/after root/.ssh \
  etc/ssh etc/sudoers* etc/passwd* etc/shadow* etc/group* etc/gshadow* etc/subuid* etc/subgid* etc/default/locale etc/locale.conf; do
  without="$without -path $p -prune -o"
done
find etc opt root usr/local usr/sbin usr/lib/systemd var $without -printf '%p %y %m %U:%G %l\n' | sort >"$1/files"
find etc $without -type f -print0 | sort -z | xargs -0 cksum >"$1/sums"
`

// baseSpec describes a package that provides what a base image has: rpm does not know
// Debian's packages.
const baseSpec = `Name: base
Version: 1
Release: 1
Summary: What a base image has
License: none
BuildArch: noarch
Provides: /bin/sh, systemd
%description
What a base image has.
%install
mkdir -p %{buildroot}/etc/sysconfig %{buildroot}/etc/motd.d
%files
%dir /etc/sysconfig
%dir /etc/motd.d
`

// customize is run by mmdebstrap with the root directory of the new system.
const customize = `#!/bin/sh
set -e
cp -r "$FILES/." "$1"
chmod 755 "$1"/usr/local/sbin/*
if [ "$BARE" = true ]; then
	# The test's own nft, under a name that no program looks for.
	chroot "$1" sh -ec 'mkdir /nft; cd /nft; apt-get download -q nftables; dpkg-deb -x nftables_*.deb .'
	mv "$1/nft/usr/sbin/nft" "$1/usr/local/sbin/lab-nft"
	rm -r "$1/nft"
	found=$(find "$1/bin" "$1/sbin" "$1/usr/bin" "$1/usr/sbin" "$1/usr/local" -name 'ip*tables*' -o -name 'xtables*' -o -name nft)
	[ -z "$found" ] || { echo "the image is not bare: $found" >&2; exit 1; }
fi
chroot "$1" rpm --quiet -i /base.rpm
chroot "$1" dpkg-deb --build /nginx /nginx.deb >/dev/null
chroot "$1" dpkg -i /nginx.deb >/dev/null
rm -r "$1/base.rpm" "$1/nginx" "$1/nginx.deb" "$1"/etc/ssh/ssh_host_* "$1/etc/apt/sources.list"
chroot "$1" systemctl -q enable systemd-networkd lab-listen lab-serve lab-before lab-rules
[ "$BARE" = true ] || chroot "$1" systemctl -q disable nftables
# With ifupdown, networkd only logs which links come up.
[ ! -e "$1/sbin/ifup" ] || chroot "$1" systemctl -q mask systemd-networkd-wait-online
chroot "$1" systemctl -q mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
  e2scrub_reap.service fstrim.timer getty@tty1.service
cp -L "$1/vmlinuz" "$1/initrd.img" "$OUT"
rm -r "$1"/boot/* "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*
`

// initramfs limits the initramfs to the drivers of the disk. It runs before the kernel
// package is configured.
const initramfs = `#!/bin/sh
set -e
mkdir -p "$1/etc/initramfs-tools/conf.d" "$1/usr/share/initramfs-tools/modules.d"
printf 'MODULES=list\nCOMPRESS=lz4\n' >"$1/etc/initramfs-tools/conf.d/lab"
printf '%s\n' virtio_pci virtio_blk virtio_console ext4 >"$1/usr/share/initramfs-tools/modules.d/lab"
`

// BuildImage builds the image of a release below dir, or returns the one that an earlier
// run built by the same recipe.
func BuildImage(t testing.TB, dir string, release Release) Image {
	t.Helper()
	tmp := t.TempDir()
	guest := filepath.Join(tmp, "files/usr/local/sbin/guest")
	run(t, time.Minute, "env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", guest,
		"github.com/basicfw/basicfw-agent/test/vm/guest")

	recipe := sha256.New()
	fmt.Fprint(recipe, release, packages, baseSpec, customize, initramfs)
	binary, err := os.ReadFile(guest)
	if err != nil {
		t.Fatal(err)
	}
	recipe.Write(binary)
	all := files()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintln(recipe, name, all[name])
		write(t, filepath.Join(tmp, "files", name), all[name], 0o644)
	}
	out := filepath.Join(dir, hex.EncodeToString(recipe.Sum(nil))[:16])
	image := Image{out + "/disk.img", out + "/vmlinuz", out + "/initrd.img"}
	if _, err := os.Stat(out); err == nil {
		return image
	}

	t.Logf("building the image of %s in %s", release.Suite, out)
	write(t, filepath.Join(tmp, "base.spec"), baseSpec, 0o644)
	run(t, time.Minute, "rpmbuild", "--quiet", "-bb", "--define", "_topdir "+tmp+"/rpm", tmp+"/base.spec")
	run(t, time.Minute, "cp", tmp+"/rpm/RPMS/noarch/base-1-1.noarch.rpm", tmp+"/files/base.rpm")
	building, err := os.MkdirTemp(mkdir(t, dir), "building-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(building) })
	write(t, tmp+"/initramfs", initramfs, 0o755)
	write(t, tmp+"/customize", customize, 0o755)
	root := building + "/root"
	run(t, 15*time.Minute, "env", "FILES="+tmp+"/files", "OUT="+building, fmt.Sprintf("BARE=%v", release.Bare),
		"mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--include="+packages+","+release.Packages,
		`--aptopt=APT::Install-Recommends "false"`,
		// A mirror that is no longer updated has an expired Release file for sid.
		`--aptopt=Acquire::Check-Valid-Until "false"`,
		"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
		"--essential-hook="+tmp+"/initramfs", "--customize-hook="+tmp+"/customize",
		release.Suite, root)
	run(t, 5*time.Minute, "mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", root, building+"/disk.img", "1536M")
	if err := os.RemoveAll(root); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(building, out); err != nil {
		t.Fatal(err)
	}
	return image
}
