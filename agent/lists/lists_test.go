package lists

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
)

func TestParse(t *testing.T) {
	entries, problems, err := Parse([]byte("\ufeff# bad hosts\r\n\n192.0.2.7 ; seen\n 2001:db8::/32#x\nexample.org\n192.0.2.1/24\n::ffff:198.51.100.1\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := []struct {
		text string
		line int
	}{{"192.0.2.7/32", 3}, {"2001:db8::/32", 4}, {"198.51.100.1/32", 7}}
	if len(entries) != len(want) {
		t.Fatalf("entries %v", entries)
	}
	for i, w := range want {
		if entries[i].String() != w.text || entries[i].Line != w.line {
			t.Errorf("entry %d is %v in line %d, want %+v", i, entries[i].Prefix, entries[i].Line, w)
		}
	}
	if len(problems) != 2 || problems[0].Line != 5 || problems[1].Line != 6 {
		t.Errorf("problems %v", problems)
	}
	for _, text := range []string{"192.0.2.7\n\xff", "192.0.2.7\x00"} {
		if _, _, err := Parse([]byte(text)); err == nil {
			t.Errorf("%q is accepted", text)
		}
	}
}

// TestReadOther reads what is no list. It must not hang.
func TestReadOther(t *testing.T) {
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := syscall.Mkfifo(path("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("loop", path("loop")); err != nil {
		t.Fatal(err)
	}
	large, err := os.Create(path("large"))
	if err == nil {
		err = large.Truncate(1 << 30)
	}
	if err != nil {
		t.Fatal(err)
	}
	large.Close()
	for _, name := range []string{"", "fifo", "loop", "large", "missing"} {
		if _, _, err := Read(&system.System{}, path(name)); err == nil {
			t.Errorf("%q is read as a list", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("192.0.2.0/24\n# comment\n2001:db8::1"))
	f.Fuzz(func(t *testing.T, data []byte) {
		entries, _, _ := Parse(data)
		for _, e := range entries {
			if !e.IsValid() || e.Masked() != e.Prefix || e.Line < 1 {
				t.Fatalf("%v in line %d", e.Prefix, e.Line)
			}
		}
	})
}
