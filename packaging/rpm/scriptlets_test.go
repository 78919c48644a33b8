package rpm

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// pack makes a package of nfpm.yaml around a program that writes down its calls
// and fails where /run/fails says with which code.
func pack(t *testing.T, version string) string {
	t.Helper()
	dir := t.TempDir()
	files := map[string]string{
		"amd64/basicfw-agent": "#!/bin/sh\necho \"" + version + ": $*\" >>/run/log\n[ ! -e /run/fails ] || exit \"$(cat /run/fails)\"\n[ \"$1\" != package-erased ] || rm -r /var/lib/basicfw\n",
		"completion.bash":     "", "completion.zsh": "", "completion.fish": "",
		"man/basicfw-agent.8.gz": "", "man/basicfw-agent.ini.5.gz": "", "man/basicfw-profile.5.gz": "",
	}
	for name, text := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	target := filepath.Join(dir, version+".rpm")
	nfpm(t, "../..", "nfpm.yaml", target, "ARCH=amd64", "BUILD="+dir, "VERSION="+version, "RPM_SIGNING_KEY_FILE=", "SOURCE_DATE_EPOCH=1")
	return target
}

// nfpm runs the nfpm that the build script runs.
func nfpm(t *testing.T, dir, config, target string, env ...string) {
	t.Helper()
	script, err := os.ReadFile("build")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^nfpm=(\S+)$`).FindSubmatch(script)
	if m == nil {
		t.Fatal("the build script names no nfpm")
	}
	must(t, dir, env, "go", "run", string(m[1]), "package", "--config", config, "--packager", "rpm", "--target", target)
}

// base makes a package that provides what every image has.
func base(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	config := "name: base\narch: amd64\nversion: 1\nversion_schema: none\ndescription: what every image has\nprovides: [/bin/sh]\n"
	if err := os.WriteFile(filepath.Join(dir, "nfpm.yaml"), []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	nfpm(t, dir, "nfpm.yaml", filepath.Join(dir, "base.rpm"))
	return filepath.Join(dir, "base.rpm")
}

// stage is a machine of a process's own, with an rpm database of its own:
// nothing that is written to /etc, /usr, /var and /run outlives it.
const stage = `set -e
mount -t tmpfs stage /mnt
for d in etc usr var; do
	mkdir -p /mnt/$d/upper /mnt/$d/work
	mount -t overlay $d -o lowerdir=/$d,upperdir=/mnt/$d/upper,workdir=/mnt/$d/work /$d
done
mount -t tmpfs run /run
export HOME=/run # where Debian has its database
rm -rf /etc/basicfw /var/lib/basicfw
touch /run/log
# Debian's rpm says on standard error that Debian has another one.
package() {
	rc=0
	rpm --dbpath /run/rpmdb "$@" >/run/out 2>&1 || rc=$?
	grep -v '^rpm: ' /run/out || :
	echo "rc $rc; called $(sed 's/ [0-9]*$/ PID/' /run/log | tr '\n' ,)"
	: >/run/log
}
bootstrapped() {
	mkdir -p /var/lib/basicfw
	touch /var/lib/basicfw/state.json
}
`

func onStage(t *testing.T, story string, files ...string) string {
	t.Helper()
	lab.Need(t, "rpm")
	// The files may be below what is mounted over.
	var open, put string
	for i, f := range files {
		open += fmt.Sprintf("exec %d<%s\n", 3+i, f)
		put += fmt.Sprintf("cat <&%d >/run/%s\n", 3+i, filepath.Base(f))
	}
	return must(t, "/", nil, "unshare", "-m", "--propagation", "private", "sh", "-c", open+stage+put+"cd /run\n"+story)
}

// TestLifecycle: installing changes nothing, an upgrade refreshes the service
// and takes nothing away, erasing gives the machine back or does not happen.
func TestLifecycle(t *testing.T) {
	packages := []string{base(t), pack(t, "1.0"), pack(t, "2.0")}
	const installed = "package -i base.rpm; package -U 1.0.rpm\n"
	const head = "rc 0; called \nrc 0; called 1.0: package-upgraded,\n"
	refused := "rc 1; called 1.0: package-erased PID,\n"
	for name, tt := range map[string]struct{ story, want string }{
		"install, verify, erase": {
			installed + "package -V basicfw-agent; package -e basicfw-agent; find /etc /usr/sbin /usr/share -name '*basicfw*'",
			head + "rc 0; called \nrc 0; called \n",
		},
		"without what it requires": {
			"package -U 1.0.rpm", "error: Failed dependencies:\n\t/bin/sh is needed by basicfw-agent-1.0-1.x86_64\nrc 1; called \n",
		},
		"upgrade": {
			installed + "bootstrapped; package -U 2.0.rpm; package -V basicfw-agent; package -q basicfw-agent; ls /var/lib/basicfw",
			head + "rc 0; called 2.0: package-upgraded,\nrc 0; called \nbasicfw-agent-2.0-1.x86_64\nrc 0; called \nstate.json\n",
		},
		"upgrade whose refresh fails": {
			installed + "bootstrapped; echo 1 >fails; package -U 2.0.rpm; package -q basicfw-agent",
			head + "basicfw-agent: the service is still the old version. Try: basicfw-agent package-upgraded\n" +
				"rc 0; called 2.0: package-upgraded,\nbasicfw-agent-2.0-1.x86_64\nrc 0; called \n",
		},
		"downgrade": {
			installed + "bootstrapped; package -U 2.0.rpm; package -U --oldpackage 1.0.rpm",
			head + "rc 0; called 2.0: package-upgraded,\nrc 0; called 1.0: package-upgraded,\n",
		},
		"settings are kept": {
			installed + "echo mine >/etc/basicfw/agent.ini; echo '[profile]' >/etc/basicfw/profiles.d/a.ini; package -U 2.0.rpm; cat /etc/basicfw/agent.ini; " +
				"package -e basicfw-agent; find /etc/basicfw -type f | sort",
			head + "rc 0; called 2.0: package-upgraded,\nmine\nwarning: /etc/basicfw/agent.ini saved as /etc/basicfw/agent.ini.rpmsave\nrc 0; called \n" +
				"/etc/basicfw/agent.ini.rpmsave\n/etc/basicfw/profiles.d/a.ini\n",
		},
		"erase what was bootstrapped": {
			installed + "bootstrapped; package -e basicfw-agent; package -q basicfw-agent",
			head + "rc 0; called 1.0: package-erased PID,\npackage basicfw-agent is not installed\nrc 1; called \n",
		},
		"erase what only has a backup left": {
			installed + "mkdir -p /var/lib/basicfw/backup; package -e basicfw-agent", head + "rc 0; called 1.0: package-erased PID,\n",
		},
		"not bootstrapped after all": {
			installed + "bootstrapped; echo 4 >fails; package -e basicfw-agent", head + "rc 0; called 1.0: package-erased PID,\n",
		},
		"erase that cannot give back": {
			installed + "bootstrapped; echo 1 >fails; package -e basicfw-agent | grep -v '^[eE ]'; package -q basicfw-agent; ls /usr/sbin/basicfw-agent; " +
				"rm fails; package -e basicfw-agent",
			head + "basicfw-agent: the package stays, because the machine could not be given back\n" +
				"as it was. Put right what is said above, and erase the package again. Erased with\n" +
				"--noscripts it leaves the rules, their files and the service's unit behind.\n" + refused +
				"basicfw-agent-1.0-1.x86_64\nrc 0; called \n/usr/sbin/basicfw-agent\nrc 0; called 1.0: package-erased PID,\n",
		},
		"the program is gone": {
			installed + "bootstrapped; rm /usr/sbin/basicfw-agent; package -e basicfw-agent >out2; grep -c 'the package stays' out2; package -q basicfw-agent",
			head + "1\nbasicfw-agent-1.0-1.x86_64\nrc 0; called \n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := onStage(t, tt.story, packages...); got != tt.want {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
}

// TestShells: /bin/sh is bash on one system and dash on the next.
func TestShells(t *testing.T) {
	lab.NeedTools(t, "dash", "bash")
	for _, script := range []string{"preun", "posttrans", "build"} {
		for _, shell := range []string{"dash -n ", "bash --posix -n "} {
			must(t, ".", nil, strings.Fields(shell+script)...)
		}
	}
}
