package rpm

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// repository builds a repository of a tree, and returns its directory, which is also its
// address.
func repository(t *testing.T, tree string, env ...string) string {
	t.Helper()
	dist := t.TempDir()
	out := must(t, tree, append(env, "DIST="+dist, "REPO_URL=file://"+dist+"/repo", "SOURCE_DATE_EPOCH=1000000000", cache(t)), "packaging/repo/build", "1.2.3")
	if want := dist + "/repo\n"; out != want {
		t.Fatalf("it prints %q, want %q", out, want)
	}
	return dist + "/repo"
}

// dnf installs the package from a repository into an empty directory, beside a package that
// provides what every image has, and returns what is installed.
func dnf(t *testing.T, repo string) (installed string, err error) {
	t.Helper()
	lab.NeedTools(t, "dnf")
	root, other := t.TempDir(), t.TempDir()
	must(t, "/", nil, "cp", base(t), other)
	must(t, other, nil, "createrepo_c", "-q", ".")
	_, err = command(t, "/", nil, "dnf", "-y", "-q", "--installroot="+root, "--releasever=9", "--forcearch=x86_64", "--setopt=reposdir="+repo,
		"--setopt=cachedir="+root+"/cache", "--setopt=tsflags=noscripts", "--repofrompath=base,"+other, "--setopt=base.gpgcheck=0", "install", "basicfw-agent")
	res, _ := command(t, "/", nil, "rpm", "--root", root, "-q", "--qf", "%{NAME} %{VERSION}", "basicfw-agent")
	return string(res.Stdout), err
}

// TestRepository builds repositories with and without a key, and installs from them.
func TestRepository(t *testing.T) {
	lab.NeedTools(t, "createrepo_c")
	tree := filepath.Join(t.TempDir(), "tree")
	copyTree(t, "../..", tree, "022")
	private, _, theirs := keys(t)
	plain := repository(t, tree)
	signed := repository(t, tree, "RPM_SIGNING_KEY_FILE="+private, "RPM_SIGNING_KEY_PASSPHRASE=secret")
	refused := func(what string, damage func(repo string)) {
		t.Helper()
		repo := filepath.Join(t.TempDir(), "repo")
		must(t, "/", nil, "cp", "-a", signed, repo)
		must(t, repo, nil, "sed", "-i", "s,file://[^ ]*/repo,file://"+repo+",", "basicfw.repo")
		damage(repo)
		if got, err := dnf(t, repo); err == nil {
			t.Errorf("%s: dnf installs %q", what, got)
		}
	}
	for _, repo := range []string{plain, signed} {
		if got, err := dnf(t, repo); err != nil || got != "basicfw-agent 1.2.3" {
			t.Errorf("dnf: installed %q, %v", got, err)
		}
		must(t, repo, nil, "sha256sum", "--quiet", "-c", "SHA256SUMS")
		bill(t, repo)
	}
	refused("another key", func(repo string) { must(t, repo, nil, "cp", theirs, "RPM-GPG-KEY-basicfw-agent") })
	refused("metadata that is not signed", func(repo string) {
		must(t, repo, nil, "createrepo_c", "-q", "--no-database", "--simple-md-filenames", ".")
		must(t, repo, nil, "cp", signed+"/repodata/repomd.xml.asc", "repodata")
	})
	refused("packages that are not signed", func(repo string) {
		must(t, repo, nil, "sh", "-c", "cp "+plain+"/*.rpm . && createrepo_c -q . && sed -i s/repo_gpgcheck=1/repo_gpgcheck=0/ basicfw.repo")
	})

	home := t.TempDir()
	gpg := []string{"GNUPGHOME=" + home}
	must(t, signed, gpg, "gpg", "--batch", "--quiet", "--no-autostart", "--import", "RPM-GPG-KEY-basicfw-agent")
	for _, file := range []string{"repodata/repomd.xml", "SHA256SUMS"} {
		must(t, signed, gpg, "gpg", "--batch", "--quiet", "--no-autostart", "--verify", file+".asc", file)
	}

	second := repository(t, tree)
	must(t, "/", nil, "diff", "-r", "-x", "basicfw.repo", "-x", "SHA256SUMS", plain, second)
}

// bill checks the list of the program's modules.
func bill(t *testing.T, repo string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(repo, "basicfw-agent.cdx.json"))
	if err != nil {
		t.Fatal(err)
	}
	var doc struct {
		BomFormat, SpecVersion string
		Components             []struct{ Type, Name, Version, Purl string }
	}
	if err := json.Unmarshal(data, &doc); err != nil || doc.BomFormat != "CycloneDX" || doc.SpecVersion != "1.5" {
		t.Fatalf("%v: %s", err, data)
	}
	sums, err := os.ReadFile("../../go.sum")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range doc.Components[1:] {
		if c.Type != "library" || c.Purl != "pkg:golang/"+c.Name+"@"+c.Version || !bytes.Contains(sums, []byte(c.Name+" "+c.Version+" h1:")) {
			t.Errorf("component %+v", c)
		}
	}
	if std := doc.Components[0]; std.Name != "stdlib" || strings.Count(std.Version, ".") < 1 || len(doc.Components) < 10 {
		t.Errorf("%d components, the first %+v", len(doc.Components), std)
	}
}
