package firewall

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

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
