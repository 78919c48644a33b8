package motd

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// machine returns a system that records its steps.
func machine(t *testing.T) (sys *system.System, steps *[]string) {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"etc", "run"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	steps = new([]string)
	return &system.System{Root: root, Step: lab.Before(func(op, name string) error {
		*steps = append(*steps, op+" "+name)
		return nil
	})}, steps
}

// Each file exists while it has a text, and is written only if the text changes.
func TestShowWritesWhatIsNew(t *testing.T) {
	sys, steps := machine(t)
	for _, tt := range []struct {
		message, issue string
		changes        bool
	}{
		{"", "who\n", true}, {"", "who\n", false}, {"help\n", "who\n", true}, {"help\n", "", true}, {"help\n", "", false},
		{"other\n", "other\n", true}, {"", "", true}, {"", "", false},
	} {
		*steps = nil
		if err := Show(sys, tt.message, tt.issue); err != nil {
			t.Fatal(err)
		}
		if changed := len(*steps) > 0; changed != tt.changes {
			t.Errorf("%q, %q: %q", tt.message, tt.issue, *steps)
		}
		for _, f := range []struct {
			path, text string
			mode       os.FileMode
		}{{MessageFile, tt.message, 0o644}, {IssueFile, tt.issue, 0o600}} { // only root can read the issue
			data, _ := sys.ReadLimited(f.path, 1<<20)
			if there := sys.Exists(f.path); there != (f.text != "") || string(data) != f.text {
				t.Errorf("%s exists: %v, content %q; want %q", f.path, there, data, f.text)
			}
			if fi, err := sys.Lstat(f.path); err == nil && fi.Mode() != f.mode {
				t.Errorf("%s has mode %v", f.path, fi.Mode())
			}
		}
	}
}

// The consoles show a new issue at once, if one of them waits for a login.
func TestShowReloadsTheConsoles(t *testing.T) {
	sys, _ := machine(t)
	reloaded := func(issue string) bool {
		t.Helper()
		past := time.Unix(1, 0)
		os.Chtimes(filepath.Join(sys.Root, reloadFile), past, past)
		if err := Show(sys, "", issue); err != nil {
			t.Fatal(err)
		}
		fi, err := sys.Stat(reloadFile)
		return err == nil && !fi.ModTime().Equal(past)
	}
	if reloaded("a\n") || sys.Exists(reloadFile) {
		t.Error("agetty's file is created although no agetty runs")
	}
	if err := sys.WriteFile(reloadFile, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		issue string
		want  bool
	}{{"a\n", false}, {"b\n", true}, {"b\n", false}, {"", true}, {"", false}} {
		if got := reloaded(tt.issue); got != tt.want {
			t.Errorf("%q: reloaded %v, want %v", tt.issue, got, tt.want)
		}
	}
}

func TestLinkLeadsToTheIssue(t *testing.T) {
	sys, steps := machine(t)
	for i := range 2 {
		*steps = nil
		if err := Link(sys); err != nil {
			t.Fatal(err)
		}
		if target, err := sys.Readlink(IssueLink); target != IssueFile {
			t.Errorf("the link points to %q, %v", target, err)
		}
		if i == 1 && len(*steps) > 0 {
			t.Errorf("the second call took the steps %q", *steps)
		}
	}
}
