package house

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// phrases do not occur in idiomatic technical English. Each has what to write instead.
var phrases = []struct{ pattern, instead string }{
	{`\banew\b`, "again"},
	{`\bof others\b|\bothers'`, "another program's"},
	{`\b(is|are|was|were|as) decided\b`, "desired state, configured, expected"},
	{`\bfor a while\b`, "temporary, for a limited time"},
	{`\bof (root|sshd|systemd|Docker|firewalld|fail2ban|ufw|nft|iptables)'s\b`, "sshd's port, root-owned"},
	{`\b(take|takes|taken|took|taking)( it| them)? back\b`, "rolled back, undone"},
	{`\b(give|gives|given|gave|giving)( it| them)? back\b`, "restored"},
	{`\bmend(s|ed|ing)?\b`, "repair, fix"},
	{`\bsomebody\b`, "the administrator, another program, a user"},
	{`\bwhoever\b`, "name the actor"},
	{`\bbesides\b`, "also, in addition"},
	{`\b(go|goes|went|going|gone) over to\b`, "switch to"},
	{`\bsees? to it\b`, "ensure"},
	{`\bmade sure of\b`, "verified"},
	{`\btill\b`, "until"},
	{`\bin peace\b`, "unchanged"},
	{`\bwhat is ours\b`, "our rules and files"},
}

// commentVerbs match doc comments that do not begin as Go's do.
var commentVerbs = regexp.MustCompile(`^\s*// \w+ (tells|gives|says|has|comes of)\b`)

// TestLanguage searches every text file of the repository for the phrases.
func TestLanguage(t *testing.T) {
	var all []*regexp.Regexp
	for _, p := range phrases {
		all = append(all, regexp.MustCompile("(?i)"+p.pattern))
	}
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if slices.Contains([]string{".git", ".cache", "dist"}, d.Name()) {
				return fs.SkipDir
			}
			return nil
		}
		if d.Name() == "language_test.go" || d.Name() == "LICENSE" || !d.Type().IsRegular() {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil || bytes.IndexByte(data, 0) >= 0 {
			return err
		}
		comment := false
		for i, line := range strings.Split(string(data), "\n") {
			for j, re := range all {
				if found := re.FindString(line); found != "" {
					t.Errorf("%s:%d: %q: write %s", path, i+1, found, phrases[j].instead)
				}
			}
			if !comment && strings.HasSuffix(path, ".go") && commentVerbs.MatchString(line) {
				t.Errorf("%s:%d: %q: write returns, reports whether, is", path, i+1, strings.TrimSpace(line))
			}
			comment = strings.HasPrefix(strings.TrimSpace(line), "//")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
