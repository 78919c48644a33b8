package rpm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// pack builds a package from nfpm.yaml with a program that logs its calls and, if
// /run/fails exists, exits with the code in it.
func pack(t *testing.T, version string) string {
	t.Helper()
	dir := t.TempDir()
	files := map[string]string{
		"amd64/basicfw-agent": "#!/bin/sh\necho \"" + version + ": $*\" >>/run/log\n[ ! -e /run/fails ] || exit \"$(cat /run/fails)\"\n[ \"$1\" != package-erased ] || rm -r /var/lib/basicfw\n",
		"completion.bash":     "", "README.md": "", "completion.zsh": "", "completion.fish": "",
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
	nfpm(t, "../..", "nfpm.yaml", target, "ARCH=amd64", "RELEASE=1", "BUILD="+dir, "VERSION="+version, "SOURCE_DATE_EPOCH=1")
	return target
}

// nfpm runs nfpm as the build script does.
func nfpm(t *testing.T, dir, config, target string, env ...string) {
	t.Helper()
	program, err := filepath.Abs("nfpm")
	if err != nil {
		t.Fatal(err)
	}
	must(t, dir, append(env, cache(t)), program, "package", "--config", config, "--packager", "rpm", "--target", target)
}

// base builds a package that provides what every image has.
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

// stage sets up a private machine for one process, with its own rpm database: nothing
// that it writes to /etc, /usr, /var and /run outlives it.
const stage = `set -e
mount -t tmpfs stage /mnt
for d in etc usr var; do
	mkdir -p /mnt/$d/upper /mnt/$d/work
	mount -t overlay $d -o lowerdir=/$d,upperdir=/mnt/$d/upper,workdir=/mnt/$d/work /$d
done
mount -t tmpfs run /run
export HOME=/run # Debian's rpm database is there
rm -rf /etc/basicfw /var/lib/basicfw
touch /run/log
# Debian's rpm warns on standard error that Debian uses another package manager.
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
	// The mounts may hide the files.
	var open, put string
	for i, f := range files {
		open += fmt.Sprintf("exec %d<%s\n", 3+i, f)
		put += fmt.Sprintf("cat <&%d >/run/%s\n", 3+i, filepath.Base(f))
	}
	return must(t, "/", nil, "unshare", "-m", "--propagation", "private", "sh", "-c", open+stage+put+"cd /run\n"+story)
}

// TestLifecycle checks that installing changes nothing, that an upgrade refreshes the
// service and keeps everything else, and that erasing restores the machine or fails.
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
		"missing dependency": {
			"package -U 1.0.rpm", "error: Failed dependencies:\n\t/bin/sh is needed by basicfw-agent-1.0-1.x86_64\nrc 1; called \n",
		},
		"upgrade": {
			installed + "bootstrapped; package -U 2.0.rpm; package -V basicfw-agent; package -q basicfw-agent; ls /var/lib/basicfw",
			head + "rc 0; called 2.0: package-upgraded,\nrc 0; called \nbasicfw-agent-2.0-1.x86_64\nrc 0; called \nstate.json\n",
		},
		"upgrade, service not refreshed": {
			installed + "bootstrapped; echo 1 >fails; package -U 2.0.rpm; package -q basicfw-agent",
			head + "basicfw-agent: the service still runs the old version. Try: basicfw-agent package-upgraded\n" +
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
		"erase after bootstrap": {
			installed + "bootstrapped; package -e basicfw-agent; package -q basicfw-agent",
			head + "rc 0; called 1.0: package-erased PID,\npackage basicfw-agent is not installed\nrc 1; called \n",
		},
		"erase with only a backup left": {
			installed + "mkdir -p /var/lib/basicfw/backup; package -e basicfw-agent", head + "rc 0; called 1.0: package-erased PID,\n",
		},
		"erase with only the copy of the state left": {
			installed + "mkdir -p /var/lib/basicfw; touch /etc/basicfw/state.json; package -e basicfw-agent", head + "rc 0; called 1.0: package-erased PID,\n",
		},
		"not bootstrapped": {
			installed + "bootstrapped; echo 4 >fails; package -e basicfw-agent", head + "rc 0; called 1.0: package-erased PID,\n",
		},
		"erase, restoring fails": {
			installed + "bootstrapped; echo 1 >fails; package -e basicfw-agent | grep -v '^[eE ]'; package -q basicfw-agent; ls /usr/sbin/basicfw-agent; " +
				"rm fails; package -e basicfw-agent",
			head + "basicfw-agent: the package stays, because the previous firewall could not be\n" +
				"restored. Fix the error above, and erase the package again. With --noscripts,\n" +
				"the rules, their files and the service's unit would be left behind.\n" + refused +
				"basicfw-agent-1.0-1.x86_64\nrc 0; called \n/usr/sbin/basicfw-agent\nrc 0; called 1.0: package-erased PID,\n",
		},
		"program missing": {
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

// TestShells checks the syntax with dash and bash: either may be /bin/sh.
func TestShells(t *testing.T) {
	lab.NeedTools(t, "dash", "bash")
	for _, script := range []string{"preun", "posttrans", "build", "nfpm", "sign", "../repo/build"} {
		for _, shell := range []string{"dash -n ", "bash --posix -n "} {
			must(t, ".", nil, strings.Fields(shell+script)...)
		}
	}
}
