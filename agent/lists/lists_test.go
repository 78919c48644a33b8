package lists

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
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

func TestParseSources(t *testing.T) {
	const text = "\ufeff# administrators\r\n203.0.113.9 ; home\r\n\n  198.51.100.0/24\t# office\n2001:db8::/64\n203.0.113.9/32\n;203.0.113.10\n# \xff\n"
	list, err := ParseSources("/etc/x", []byte(text), true)
	if got := strings.Join(firewall.FormatPrefixes(list), " "); err != nil || got != "203.0.113.9 198.51.100.0/24 2001:db8::/64" {
		t.Errorf("%s, %v", got, err)
	}
	if list, err = ParseSources("/etc/x", []byte("0.0.0.0/0\n127.0.0.0/8"), false); err != nil || len(list) != 2 {
		t.Errorf("sources of a service: %v, %v", list, err)
	}
	for text, want := range map[string]string{
		"":                               "/etc/x contains no address",
		" # nothing\n;\n":                "/etc/x contains no address",
		"203.0.113.9\nme\n":              `/etc/x:2: "me" is not an address`,
		"me\nyou\n203.0.113.9":           `names are not looked up) (and 1 more invalid lines)`,
		"203.0.113.9 203.0.113.10\n":     `/etc/x:1: "203.0.113.9 203.0.113.10" is not an address`,
		"203.0.113.9\n\n203.0.113.8/24":  "/etc/x:3: ",
		"203.0.113.9\n203.0.113.\xff\n":  "/etc/x:2: the text is not UTF-8",
		"203.0.113.9\n0.0.0.0/0\n":       "/etc/x:2: \"0.0.0.0/0\" contains every address",
		"203.0.113.9\n127.0.0.1\n":       "/etc/x:2: \"127.0.0.1\" is a loopback address",
		"203.0.113.9\x00\n203.0.113.7\n": "/etc/x:1: ",
	} {
		if list, err := ParseSources("/etc/x", []byte(text), true); err == nil || list != nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, %v, want %q", text, list, err, want)
		}
	}
	var many strings.Builder
	a := netip.MustParseAddr("10.0.0.0")
	for range maxSources + 1 {
		many.WriteString(a.String() + "\n")
		a = a.Next()
	}
	if _, err := ParseSources("/etc/x", []byte(many.String()), true); err == nil || !strings.Contains(err.Error(), "want at most 10000") {
		t.Errorf("too many: %v", err)
	}
}

func FuzzParseSources(f *testing.F) {
	f.Add([]byte("192.0.2.1\n2001:db8::/32 # x\n"), true)
	f.Add([]byte("0.0.0.0/0\n\xff"), false)
	f.Fuzz(func(t *testing.T, data []byte, ssh bool) {
		list, err := ParseSources("/etc/x", data, ssh)
		if (len(list) == 0) != (err != nil) {
			t.Fatalf("%v, %v", list, err)
		}
		again, err := ParseSources("/etc/x", []byte(strings.Join(firewall.FormatPrefixes(list), "\n")), ssh)
		if len(list) > 0 && (err != nil || !slices.Equal(again, list)) {
			t.Fatalf("%v, %v, want %v", again, err, list)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\n") {
			t.Fatalf("%q", err)
		}
	})
}
