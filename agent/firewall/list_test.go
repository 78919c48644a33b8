package firewall

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func TestParseList(t *testing.T) {
	const text = "\ufeff# administrators\r\n203.0.113.9 ; home\r\n\n  198.51.100.0/24\t# office\n2001:db8::/64\n203.0.113.9/32\n;203.0.113.10\n# \xff\n"
	list, err := ParseList("/etc/x", []byte(text), true)
	if got := strings.Join(FormatPrefixes(list), " "); err != nil || got != "203.0.113.9 198.51.100.0/24 2001:db8::/64" {
		t.Errorf("%s, %v", got, err)
	}
	if list, err = ParseList("/etc/x", []byte("0.0.0.0/0\n127.0.0.0/8"), false); err != nil || len(list) != 2 {
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
		if list, err := ParseList("/etc/x", []byte(text), true); err == nil || list != nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, %v, want %q", text, list, err, want)
		}
	}
	var many strings.Builder
	a := netip.MustParseAddr("10.0.0.0")
	for range maxListed + 1 {
		many.WriteString(a.String() + "\n")
		a = a.Next()
	}
	if _, err := ParseList("/etc/x", []byte(many.String()), true); err == nil || !strings.Contains(err.Error(), "want at most 10000") {
		t.Errorf("too many: %v", err)
	}
}

func TestParseFile(t *testing.T) {
	for word, want := range map[string]string{"file:/etc/basicfw/admins": "/etc/basicfw/admins", "10.0.0.0/8": "", "/etc/x": "",
		"file:": "error", "file:admins": "error", "file:/": "error", "file:/etc/../x": "error", "file:/etc/": "error", "file://x": "error", "file:/a'b": "error"} {
		got, err := ParseFile(word)
		if err != nil {
			got = "error"
		}
		if got != want {
			t.Errorf("%q: %q, %v, want %q", word, got, err, want)
		}
	}
}

// A list replaces only what was read from its file, and an empty one opens nothing.
func TestWithList(t *testing.T) {
	p := netip.MustParsePrefix
	d := base()
	d.SSH.File = &ListFile{Path: "/a", Others: []netip.Prefix{p("203.0.113.9/32")}}
	d.Open = []Service{{Name: "db", Proto: TCP, Ports: Port(5432), File: "/a"}, {Name: "x", Proto: TCP, Ports: Port(1), File: "/b", From: []netip.Prefix{p("10.0.0.1/32")}}}
	if _, err := Compile(d); err == nil || !strings.Contains(err.Error(), "db: /a contains no address") {
		t.Errorf("without a list: %v", err)
	}
	list := []netip.Prefix{p("203.0.113.9/32"), p("198.51.100.7/32")}
	next := d.WithList(ListFile{Path: "/a", SSH: true, From: list})
	if !slices.Equal(FormatPrefixes(next.SSH.Allow), []string{"203.0.113.9", "198.51.100.7"}) || next.Open[0].From != nil {
		t.Errorf("SSH: %+v, %+v", next.SSH, next.Open)
	}
	next = next.WithList(ListFile{Path: "/a", From: list[1:]})
	if !slices.Equal(next.Open[0].From, list[1:]) || len(next.Open[1].From) != 1 || d.Open[0].From != nil {
		t.Errorf("services: %+v", next.Open)
	}
	next = next.WithList(ListFile{Path: "/a", SSH: true, From: list[1:]})
	if got := next.WithList(ListFile{Path: "/a", SSH: true, From: []netip.Prefix{p("192.0.2.1/32")}}).SSH.Allow; !slices.Equal(FormatPrefixes(got), []string{"203.0.113.9", "192.0.2.1"}) {
		t.Errorf("SSH, after a change: %v", got)
	}
	if got := next.ListFiles(); len(got) != 3 || !got[0].SSH || got[1].Path != "/a" || got[2].Path != "/b" {
		t.Errorf("%+v", got)
	}
	if _, err := Compile(next); err != nil {
		t.Error(err)
	}
	if got := next.Open[0].String(); got != "5432/tcp from file:/a" {
		t.Error(got)
	}
}

func FuzzParseList(f *testing.F) {
	f.Add([]byte("192.0.2.1\n2001:db8::/32 # x\n"), true)
	f.Add([]byte("0.0.0.0/0\n\xff"), false)
	f.Fuzz(func(t *testing.T, data []byte, ssh bool) {
		list, err := ParseList("/etc/x", data, ssh)
		if (len(list) == 0) != (err != nil) {
			t.Fatalf("%v, %v", list, err)
		}
		again, err := ParseList("/etc/x", []byte(strings.Join(FormatPrefixes(list), "\n")), ssh)
		if len(list) > 0 && (err != nil || !slices.Equal(again, list)) {
			t.Fatalf("%v, %v, want %v", again, err, list)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\n") {
			t.Fatalf("%q", err)
		}
	})
}
