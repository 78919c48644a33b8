package vm

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// sysvPackages are those of a machine without systemd.
const sysvPackages = "sysvinit-core,initscripts,sysv-rc,udev,ifupdown,iproute2,procps,iptables,openssh-server,e2fsprogs," +
	"initramfs-tools,linux-image-cloud-amd64"

// customizeSysV is run by mmdebstrap with the root directory of the new system. It makes the
// order of the start that of CentOS 6: the links alone decide, one script runs after the
// other, and the network comes up in the runlevel, by S10, not before it.
const customizeSysV = `#!/bin/sh
set -e
for name in iptables ip6tables; do
	chroot "$1" update-alternatives --quiet --set $name /usr/sbin/$name-legacy
done
touch "$1/etc/init.d/.legacy-bootordering"
rm "$1"/etc/rcS.d/S??networking "$1"/etc/rcS.d/S??mountnfs*
for level in 2 3 4 5; do
	ln -s ../init.d/networking "$1/etc/rc$level.d/S10networking"
	mv "$1/etc/rc$level.d"/S??ssh "$1/etc/rc$level.d/S55ssh"
done
rm -f "$1"/etc/rc[06].d/K??networking
mkdir -p "$1/etc/sysconfig"
install -m 755 "$GUEST" "$1/usr/local/sbin/guest"
cp "$INTERFACES" "$1/etc/network/interfaces"
echo guest >"$1/etc/hostname"
echo 'LABEL=root / ext4 defaults 0 1' >"$1/etc/fstab"
# The listeners are there before the scripts of the runlevel. init passes 15 arguments.
printf '#!/bin/sh\nexec /usr/local/sbin/guest listen %s\n' "$PORTS" >"$1/usr/local/sbin/listen"
chmod 755 "$1/usr/local/sbin/listen"
sed -i -e 's/^id:.*/id:3:initdefault:/' -e '/:\/sbin\/getty /d' \
  -e "s|^l0:|la:23:respawn:/usr/local/sbin/guest serve lab\nlb:23:respawn:/usr/local/sbin/listen\n&|" "$1/etc/inittab"
echo 'lc:23:once:/bin/touch /run/lab-booted' >>"$1/etc/inittab"
cp -L "$1/vmlinuz" "$1/initrd.img" "$OUT"
rm -r "$1"/boot/* "$1"/var/cache/apt/* "$1"/var/lib/apt/lists/*
`

// sysvInterfaces configures the machine's end of a Wire.
const sysvInterfaces = `auto lo
iface lo inet loopback
auto ens3
iface ens3 inet static
	address 192.0.2.1/24
	gateway 192.0.2.254
iface ens3 inet6 static
	address 2001:db8:0:1::1/64
	gateway 2001:db8:0:1::fe
	accept_ra 0
	dad-attempts 0
`

// BuildSysV builds the image of a machine with System V's init below dir, or returns the one
// that an earlier run built by the same recipe.
func BuildSysV(t testing.TB, dir string) Image {
	t.Helper()
	tmp := t.TempDir()
	guest := filepath.Join(tmp, "guest")
	run(t, time.Minute, "env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", guest,
		"github.com/basicfw/basicfw-agent/test/vm/guest")
	binary, err := os.ReadFile(guest)
	if err != nil {
		t.Fatal(err)
	}
	recipe := sha256.Sum256([]byte(sysvPackages + customizeSysV + sysvInterfaces + initramfs + string(binary)))
	out := filepath.Join(dir, "sysv-"+hex.EncodeToString(recipe[:])[:16])
	image := Image{out + "/disk.img", out + "/vmlinuz", out + "/initrd.img"}
	if _, err := os.Stat(out); err == nil {
		return image
	}
	t.Logf("building the image in %s", out)
	building, err := os.MkdirTemp(mkdir(t, dir), "building-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(building) })
	write(t, tmp+"/initramfs", initramfs, 0o755)
	write(t, tmp+"/customize", customizeSysV, 0o755)
	write(t, tmp+"/interfaces", sysvInterfaces, 0o644)
	run(t, 15*time.Minute, "env", "GUEST="+guest, "INTERFACES="+tmp+"/interfaces", "OUT="+building, "PORTS="+strings.Trim(fmt.Sprint(ListenPorts), "[]"),
		"mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", "--include="+sysvPackages,
		`--aptopt=APT::Install-Recommends "false"`,
		"--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/locale/*",
		"--essential-hook="+tmp+"/initramfs", "--customize-hook="+tmp+"/customize", "bookworm", building+"/root")
	run(t, 5*time.Minute, "mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", building+"/root", building+"/disk.img", "1024M")
	if err := os.RemoveAll(building + "/root"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(building, out); err != nil {
		t.Fatal(err)
	}
	return image
}
