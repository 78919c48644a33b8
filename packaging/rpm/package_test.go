// Package rpm tests the RPM packages that the build script builds, with the real rpm,
// rpmlint and gpg.
package rpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// command runs a program in dir, with the part of this process's environment that go
// needs.
func command(t *testing.T, dir string, env []string, args ...string) (system.Result, error) {
	t.Helper()
	clean := []string{"-i", "-C", dir}
	for _, v := range os.Environ() {
		if regexp.MustCompile(`(?i)^(PATH|HOME|TMPDIR|GO[A-Z]*|SSL_CERT_\w+|\w+_PROXY)=`).MatchString(v) {
			clean = append(clean, v)
		}
	}
	return (&system.System{}).Run(context.Background(), system.Command{Name: "env", Timeout: 5 * time.Minute, Args: append(append(clean, env...), args...)})
}

func must(t *testing.T, dir string, env []string, args ...string) string {
	t.Helper()
	res, err := command(t, dir, env, args...)
	if err != nil {
		t.Fatalf("%v\n%s%s", err, res.Stdout, res.Stderr)
	}
	return string(res.Stdout)
}

// build builds both packages from the tree at root and returns their paths, x86_64
// first.
func build(t *testing.T, root, dist, version string, env ...string) [2]string {
	t.Helper()
	lab.NeedTools(t, "rpm")
	out := strings.Fields(must(t, root, append(env, "DIST="+dist, cache(t)), "packaging/rpm/build", version))
	if len(out) != 2 {
		t.Fatalf("the build script printed %q", out)
	}
	return [2]string{out[0], out[1]}
}

// cache returns the setting that makes the scripts compile nfpm once for all trees.
func cache(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../../.cache")
	if err != nil {
		t.Fatal(err)
	}
	return "CACHE=" + dir
}

func query(t *testing.T, format, file string) string {
	t.Helper()
	return must(t, "/", nil, "rpm", "--dbpath", t.TempDir(), "-qp", "--qf", format, file)
}

// TestPackage tests the packages built from this tree.
func TestPackage(t *testing.T) {
	// A copy, because the tree may change during the test.
	tree, dist := filepath.Join(t.TempDir(), "tree"), t.TempDir()
	copyTree(t, "../..", tree, "022")
	packages := build(t, tree, dist, "v1.2.3")
	t.Run("contents", func(t *testing.T) { contents(t, dist, packages) })
	t.Run("links", func(t *testing.T) { links(t, dist, packages[0]) })
	t.Run("rpmlint", func(t *testing.T) { lint(t, packages) })
	t.Run("reproducible", func(t *testing.T) { sameBytes(t, tree, packages) })
	t.Run("signed", func(t *testing.T) { signed(t, tree, packages) })
}

// copyTree copies the sources with new times and modes.
func copyTree(t *testing.T, from, to, umask string) {
	t.Helper()
	must(t, from, nil, "sh", "-c", "umask "+umask+"; mkdir "+to+
		"; tar cf - --exclude=./.git --exclude=./dist --exclude=./basicfw-agent --exclude=./.cache . | tar xmf - --no-same-permissions -C "+to)
}

func contents(t *testing.T, dist string, packages [2]string) {
	for i, arch := range []struct {
		rpm, golang string
		machine     elf.Machine
	}{{"x86_64", "amd64", elf.EM_X86_64}, {"aarch64", "arm64", elf.EM_AARCH64}} {
		p := packages[i]
		if got, want := query(t, "%{NAME} %{VERSION}-%{RELEASE} %{ARCH} %{LICENSE} %{BUILDHOST}", p), "basicfw-agent 1.2.3-1 "+arch.rpm+" Apache-2.0 basicfw"; got != want {
			t.Errorf("package %q, want %q", got, want)
		}
		if got, want := filepath.Base(p), "basicfw-agent-1.2.3-1."+arch.rpm+".rpm"; got != want {
			t.Errorf("file name %s, want %s", got, want)
		}
		if got := query(t, "[%{REQUIRES} ]", p); got != "/bin/sh " {
			t.Errorf("it requires %q", got)
		}
		if got := query(t, "[%{RECOMMENDS} ]", p); got != "iptables " {
			t.Errorf("it recommends %q", got)
		}
		want := `/etc/basicfw drwxr-xr-x root 
/etc/basicfw/agent.ini -rw------- root cn
/etc/basicfw/profiles.d drwxr-xr-x root 
/etc/fail2ban drwxr-xr-x root 
/etc/fail2ban/action.d drwxr-xr-x root 
/etc/fail2ban/action.d/basicfw.conf -rw-r--r-- root cn
/usr/sbin/basicfw-agent -rwxr-xr-x root 
/usr/share/licenses/basicfw-agent drwxr-xr-x root 
/usr/share/licenses/basicfw-agent/LICENSE -rw-r--r-- root l
`
		files := query(t, `[%{FILENAMES} %{FILEMODES:perms} %{FILEUSERNAME} %{FILEFLAGS:fflags}\n]`, p)
		if got := regexp.MustCompile(`(?m)^/usr/share/(doc|fish|zsh|bash-completion|man)/.*\n`).ReplaceAllString(files, ""); got != want {
			t.Errorf("files\n%s\nwant\n%s", got, want)
		}
		program := filepath.Join(dist, "build", arch.golang, "basicfw-agent")
		data, err := os.ReadFile(program)
		if err != nil {
			t.Fatal(err)
		}
		if sum := fmt.Sprintf("/usr/sbin/basicfw-agent %x\n", sha256.Sum256(data)); !strings.Contains(query(t, `[%{FILENAMES} %{FILEDIGESTS}\n]`, p), sum) {
			t.Errorf("%s is not in %s", program, p)
		}
		f, err := elf.NewFile(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		for _, prog := range f.Progs {
			if prog.Type == elf.PT_INTERP {
				t.Errorf("%s is not static", program)
			}
		}
		if f.Machine != arch.machine {
			t.Errorf("%s is for %v", program, f.Machine)
		}
		if arch.golang == runtime.GOARCH {
			if got := must(t, "/", nil, program, "version"); got != "1.2.3\n" {
				t.Errorf("the program prints version %q", got)
			}
		}
	}
}

// links checks that each link of a packaged text leads to a packaged file or to the web.
func links(t *testing.T, dist, file string) {
	const doc = "/usr/share/doc/basicfw-agent"
	files := strings.Fields(query(t, `[%{FILENAMES}\n]`, file))
	n := 0
	for path, source := range map[string]string{"README.md": filepath.Join(dist, "build/README.md"), "CHANGELOG.md": "../../CHANGELOG.md", "docs/locked-out.md": "../../docs/locked-out.md"} {
		text, err := os.ReadFile(source)
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range regexp.MustCompile(`\]\(([^)#]+)`).FindAllStringSubmatch(string(text), -1) {
			n++
			if to := filepath.Join(doc, filepath.Dir(path), link[1]); !strings.HasPrefix(link[1], "https://") && !slices.Contains(files, to) {
				t.Errorf("%s links to %s, which is not in the package", path, to)
			}
		}
		if strings.Contains(string(text), "https://github.com/basicfw/basicfw-agent/blob/v1.2.3/docs/locked-out.md") {
			t.Errorf("%s links to the web for what is in the package", path)
		}
	}
	if n < 10 {
		t.Errorf("only %d links", n)
	}
	for _, example := range []string{"web-only", "web+mail"} {
		if !slices.Contains(files, doc+"/examples/"+example+".yaml") {
			t.Errorf("the example %s is not in the package", example)
		}
	}
}

// lint runs rpmlint. It extracts packages with cpio, and nfpm stores absolute paths:
// as root, this would install the package on the test machine.
func lint(t *testing.T, packages [2]string) {
	lab.NeedTools(t, "rpmlint")
	config, err := filepath.Abs("rpmlint.toml")
	if err != nil {
		t.Fatal(err)
	}
	out := onStage(t, "rpmlint --config rpmlint.toml *.rpm 2>&1 || :", append(packages[:], config)...)
	if !strings.Contains(out, "packages: 2") || !strings.Contains(out, "0 errors, 0 warnings") {
		t.Errorf("rpmlint:\n%s", out)
	}
}

// sameBytes checks that a build of the same commit elsewhere gives the same packages.
func sameBytes(t *testing.T, tree string, first [2]string) {
	// Another directory, other file times, and another umask, time zone, language
	// and Go settings.
	copied := filepath.Join(t.TempDir(), "elsewhere")
	copyTree(t, tree, copied, "077")
	epoch := query(t, "%{BUILDTIME}", first[0])
	second := build(t, copied, t.TempDir(), "1.2.3", "SOURCE_DATE_EPOCH="+epoch,
		"TZ=Pacific/Auckland", "LC_ALL=C.UTF-8", "GOFLAGS=-race", "GOAMD64=v3")
	for i := range first {
		a, err := os.ReadFile(first[i])
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(second[i])
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s: %x and %x", filepath.Base(first[i]), sha256.Sum256(a), sha256.Sum256(b))
		}
	}
}

// keys returns the files of a private key with a passphrase, its public key, and another
// public key.
func keys(t *testing.T) (private, ours, theirs string) {
	t.Helper()
	lab.NeedTools(t, "gpg", "gpgconf", "rpmsign")
	dir := t.TempDir()
	// A socket's path is limited to 108 characters.
	home, err := os.MkdirTemp("", "gpg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	gpg := []string{"GNUPGHOME=" + home}
	t.Cleanup(func() { must(t, "/", gpg, "gpgconf", "--kill", "all") })
	for _, name := range []string{"ours", "theirs"} {
		must(t, dir, gpg, "gpg", "--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", "secret", "--quick-generate-key", name+"@example.com", "rsa2048", "sign", "never")
		must(t, dir, gpg, "gpg", "--batch", "--armor", "--output", name, "--export", name+"@example.com")
	}
	must(t, dir, gpg, "gpg", "--batch", "--pinentry-mode", "loopback", "--passphrase", "secret", "--armor", "--output", "private", "--export-secret-keys", "ours@example.com")
	return dir + "/private", dir + "/ours", dir + "/theirs"
}

// signed checks that a key signs the packages without changing their content, and
// that the check in user-data accepts the signature.
func signed(t *testing.T, tree string, plain [2]string) {
	private, ours, theirs := keys(t)
	signed := build(t, tree, t.TempDir(), "1.2.3", "RPM_SIGNING_KEY_FILE="+private, "RPM_SIGNING_KEY_PASSPHRASE=secret")
	for i := range signed {
		const digests = "%{SHA256HEADER} [%{FILEDIGESTS} ]"
		if query(t, digests, signed[i]) != query(t, digests, plain[i]) {
			t.Errorf("%s differs from the unsigned package", signed[i])
		}
	}
	check := func(key, file string) string {
		db := t.TempDir()
		must(t, "/", nil, "rpm", "--dbpath", db, "--import", key)
		res, _ := command(t, "/", nil, "rpm", "--dbpath", db, "-K", file)
		return strings.TrimPrefix(strings.TrimSpace(string(res.Stdout)), file+": ")
	}
	for _, tt := range []struct{ key, file, want string }{
		{ours, signed[0], "digests signatures OK"},
		{ours, signed[1], "digests signatures OK"},
		{theirs, signed[0], "digests SIGNATURES NOT OK"},
		{ours, plain[0], "digests OK"},
	} {
		if got := check(tt.key, tt.file); got != tt.want {
			t.Errorf("with the key %s: %q, want %q", tt.key, got, tt.want)
		}
	}
	if _, err := command(t, tree, []string{"DIST=" + t.TempDir(), "RPM_SIGNING_KEY_FILE=/none"}, "packaging/rpm/build", "1.2.3"); err == nil {
		t.Error("the build succeeded with a missing key")
	}
}

// fakeGo returns a directory with a go that builds nothing, and an nfpm that packs nothing.
// All that runs writes its environment to the file env.
func fakeGo(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	program := "#!/bin/sh\nenv >>" + dir + "/env\n"
	script := program + `case $1 in
env) echo amd64;;
build)
	while [ "$1" != -o ]; do shift; done
	cp ` + dir + `/program "$2";;
install) cp ` + dir + `/program "$GOBIN/nfpm";;
esac
`
	for name, text := range map[string]string{"go": script, "program": program} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// TestKeyIsNotShared checks that neither the compiler nor nfpm gets the key or its
// passphrase.
func TestKeyIsNotShared(t *testing.T) {
	private, _, _ := keys(t)
	for _, script := range []string{"packaging/rpm/build", "packaging/repo/build"} {
		dir := fakeGo(t)
		// Signing fails: there is no package.
		command(t, "../..", []string{"PATH=" + dir + ":" + os.Getenv("PATH"), "DIST=" + dir, "CACHE=" + dir,
			"RPM_SIGNING_KEY_FILE=" + private, "RPM_SIGNING_KEY_PASSPHRASE=secret"}, script, "1.2.3")
		env, err := os.ReadFile(filepath.Join(dir, "env"))
		if err != nil || !strings.Contains(string(env), "GOBIN=") || !strings.Contains(string(env), "ARCH=arm64") {
			t.Errorf("%s: not all programs have run: %v", script, err)
		}
		if strings.Contains(string(env), private) || strings.Contains(string(env), "secret") {
			t.Errorf("%s: the key is in the environment:\n%s", script, env)
		}
	}
}

// TestVersions checks that versions are converted to valid rpm versions in the
// expected order.
func TestVersions(t *testing.T) {
	lab.NeedTools(t, "rpm")
	dir := fakeGo(t)
	made := func(version string) (string, error) {
		res, err := command(t, "../..", []string{"PATH=" + dir + ":" + os.Getenv("PATH"), "DIST=" + dir, "CACHE=" + dir}, "packaging/rpm/build", version)
		first, _, _ := strings.Cut(string(res.Stdout), "\n")
		return strings.TrimSuffix(strings.TrimPrefix(filepath.Base(first), "basicfw-agent-"), "-1.x86_64.rpm"), err
	}
	var last string
	for _, v := range []struct{ version, want string }{ // oldest first
		{"1.2.3-beta", "1.2.3~beta"},
		{"1.2.3-rc.1", "1.2.3~rc.1"},
		{"1.2.3-rc.2-dirty", "1.2.3~rc.2.dirty"},
		{"v1.2.3", "1.2.3"},
		{"1.2.3-4-gabcdef0", "1.2.3.4.gabcdef0"},
		{"1.2.3-15-gabcdef0-dirty", "1.2.3.15.gabcdef0.dirty"},
		{"1.2.4", "1.2.4"},
	} {
		got, err := made(v.version)
		if err != nil || got != v.want {
			t.Errorf("%s becomes %q, %v, want %q", v.version, got, err, v.want)
		}
		if last != "" {
			if order := must(t, "/", nil, "rpm", "--eval", fmt.Sprintf("%%{lua: print(rpm.vercmp('%s', '%s'))}", last, got)); order != "-1\n" {
				t.Errorf("rpm does not sort %s after %s: %q", got, last, order)
			}
		}
		last = got
	}
	for _, bad := range []string{"abc", "1.2 3", "1.2;reboot", "1/2", "$(id)"} {
		if got, err := made(bad); err == nil {
			t.Errorf("version %q was accepted as %q", bad, got)
		}
	}
}

// TestOtherSystem builds the program for the computer of the administrator, where user-data
// is printed.
func TestOtherSystem(t *testing.T) {
	program := filepath.Join(t.TempDir(), "basicfw-agent")
	must(t, "../..", []string{"GOOS=darwin", "GOARCH=arm64", "CGO_ENABLED=0"}, "go", "build", "-o", program, "./cmd/basicfw-agent")
}
