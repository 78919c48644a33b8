package rpm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestRelease makes a release of a commit, and checks what keeps one from being made.
func TestRelease(t *testing.T) {
	lab.NeedTools(t, "createrepo_c", "git")
	tree, dist := filepath.Join(t.TempDir(), "tree"), t.TempDir()
	copyTree(t, "../..", tree, "022")
	must(t, tree, nil, "rm", "-rf", ".git")
	env := []string{"DIST=" + dist, "REPO_URL=https://example.com/repo", cache(t), "GIT_CONFIG_GLOBAL=/dev/null"}
	git := func(args ...string) {
		t.Helper()
		must(t, tree, env, append([]string{"git", "-c", "user.name=x", "-c", "user.email=x@example.com"}, args...)...)
	}
	refused := func(version, why string) {
		t.Helper()
		res, err := command(t, tree, env, "packaging/release/build", version)
		if err == nil || !strings.Contains(string(res.Stderr), why) {
			t.Errorf("version %q: %v\n%swant %q", version, err, res.Stderr, why)
		}
		if _, err := os.Stat(filepath.Join(dist, "release")); err == nil {
			t.Errorf("version %q: files were made", version)
		}
	}
	changelog, err := os.ReadFile(filepath.Join(tree, "CHANGELOG.md"))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(string(changelog), "## Unreleased\n", "## Unreleased\n\n## 9.8.7 / 2030-01-02\n\n- [FEATURE] One.\n- [BUGFIX] Two.\n", 1)
	if err := os.WriteFile(filepath.Join(tree, "CHANGELOG.md"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	git("init", "-q")
	git("add", "-A")
	git("commit", "-q", "-m", "x")
	refused("", "invalid version")
	refused("9.8", "invalid version")
	refused("9.8.6", `no entries under "## 9.8.6 / YYYY-MM-DD"`)
	refused("0.1.0", "not the newest")
	must(t, tree, nil, "touch", "new")
	refused("9.8.7", "differs from the commit")
	must(t, tree, nil, "rm", "new")

	if out := must(t, tree, env, "packaging/release/build", "9.8.7"); out != dist+"/release\n" {
		t.Errorf("it prints %q", out)
	}
	out := filepath.Join(dist, "release")
	must(t, out, nil, "sha256sum", "--quiet", "-c", "SHA256SUMS")
	names := must(t, out, nil, "ls")
	const want = "SHA256SUMS\nbasicfw-agent-9.8.7-1.aarch64.rpm\nbasicfw-agent-9.8.7-1.x86_64.rpm\nbasicfw-agent-9.8.7-repo.tar.gz\nbasicfw-agent.cdx.json\nnotes.md\n"
	if strings.Join(strings.Fields(names), "\n")+"\n" != want && names != want {
		t.Errorf("files\n%s\nwant\n%s", names, want)
	}
	notes, err := os.ReadFile(filepath.Join(out, "notes.md"))
	if err != nil || !strings.HasPrefix(string(notes), "- [FEATURE] One.\n- [BUGFIX] Two.\n") || strings.Contains(string(notes), "## ") {
		t.Errorf("notes: %v\n%s", err, notes)
	}
	must(t, out, nil, "tar", "-xzf", "basicfw-agent-9.8.7-repo.tar.gz", "-C", t.TempDir())
	bill(t, out)

	git("commit", "-q", "--allow-empty", "-m", "y")
	git("tag", "v9.8.7", "HEAD~")
	must(t, "/", nil, "rm", "-r", out)
	refused("9.8.7", "another commit")
}
