package settings

import (
	"strings"
	"testing"
	"unicode"
)

func TestSetLocal(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		changes  []Change
		want     string
	}{
		{"a new file", "", []Change{{"agent", "profile", "web+mail"}, {"ssh", "client_ip", " 203.0.113.7\n"}, {"agent", "backend", "iptables"}},
			localHeader + "\n[agent]\nprofile = web+mail\nbackend = iptables\n\n[ssh]\nclient_ip = 203.0.113.7\n"},
		{"replaced, comment kept", "; top\n[ssh]\n  client_ip\t= 203.0.113.7 \t; the office\nallow = any\n", []Change{{"ssh", "client_ip", "198.51.100.1"}},
			"; top\n[ssh]\nclient_ip = 198.51.100.1 \t; the office\nallow = any\n"},
		{"an empty value is replaced", "[ssh]\nclient_ip = # none\n", []Change{{"ssh", "client_ip", "203.0.113.7"}},
			"[ssh]\nclient_ip = 203.0.113.7 # none\n"},
		{"added after the section's last key", "[ssh]\nallow = any\n; about it\n\n[log]\n", []Change{{"ssh", "limit", "off"}},
			"[ssh]\nallow = any\nlimit = off\n; about it\n\n[log]\n"},
		{"added to an empty section", "[ssh] ; here\n\n[log]\n", []Change{{"ssh", "limit", "off"}},
			"[ssh] ; here\nlimit = off\n\n[log]\n"},
		{"a repeated section", "[ssh]\nallow = any\n[log]\n[ssh]\nlimit = off\n", []Change{{"ssh", "ports", "22"}, {"ssh", "allow", "client"}},
			"[ssh]\nallow = client\n[log]\n[ssh]\nlimit = off\nports = 22\n"},
		{"no newline at the end", "[ssh]\nallow = any", []Change{{"log", "drops", "no"}, {"ssh", "limit", "off"}},
			"[ssh]\nallow = any\nlimit = off\n\n[log]\ndrops = no\n"},
		{"CR LF and byte order mark", "\ufeff[ssh]\r\nallow = any ; c\r\n", []Change{{"ssh", "allow", "client"}, {"log", "drops", "no"}},
			"\ufeff[ssh]\r\nallow = client ; c\r\n\r\n[log]\r\ndrops = no\r\n"},
		{"white space becomes one space", "[ssh]\n", []Change{{"ssh", "allow", "203.0.113.7,\n\t198.51.100.1\n"}},
			"[ssh]\nallow = 203.0.113.7, 198.51.100.1\n"},
		{"a service", "[open]\n", []Change{{"open", "db", "5432/tcp on private from 10.0.0.0/8"}},
			"[open]\ndb = 5432/tcp on private from 10.0.0.0/8\n"},
		{"removed", "[open]\ndb = 5432/tcp ; mine\nweb = 80/tcp\n", []Change{{"open", "db", ""}, {"open", "none", ""}, {"log", "drops", ""}},
			"[open]\nweb = 80/tcp\n"},
		{"the last key of its section", "[ssh]\nallow = any\n\n[open]\ndb = 5432/tcp\n\n[log]\ndrops = no\n", []Change{{"open", "db", ""}}, "[ssh]\nallow = any\n\n[log]\ndrops = no\n"},
		{"the last key, a comment remains", "[open]\n; mine\ndb = 5432/tcp\n", []Change{{"open", "db", ""}}, "[open]\n; mine\n"},
		{"the last key of a section with a comment", "[open] ; mine\ndb = 5432/tcp\n", []Change{{"open", "db", ""}}, "[open] ; mine\n"},
		{"the last key of a repeated section", "[open]\n[log]\n[open]\ndb = 5432/tcp\n", []Change{{"open", "db", ""}}, "[open]\n[log]\n[open]\n"},
		{"the last key, CR LF", "[ssh]\r\nallow = any\r\n\r\n[open]\r\ndb = 5432/tcp\r\n", []Change{{"open", "db", ""}}, "[ssh]\r\nallow = any\r\n"},
		{"nothing to do", "[open]\n", nil, "[open]\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := SetLocal("local.ini", []byte(tt.in), tt.changes)
			if err != nil {
				t.Fatal(err)
			}
			if string(got) != tt.want {
				t.Errorf("got\n%q\nwant\n%q", got, tt.want)
			}
			again, err := SetLocal("local.ini", got, tt.changes)
			if err != nil || string(again) != tt.want {
				t.Errorf("the second time: %v\n%q", err, again)
			}
		})
	}
}

func TestSetLocalErrors(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		change   Change
		want     string
	}{
		{"invalid text", "[ssh]\nallow = me\njunk\n", Change{"ssh", "limit", "off"},
			"local.ini:2: ssh.allow: \"me\" is not an address\nlocal.ini:3: \"junk\": want KEY = VALUE"},
		{"invalid value", "[ssh]\n", Change{"ssh", "limit", "fast"}, `local.ini: ssh.limit: "fast": want`},
		{"value with a comment", "[ssh]\n", Change{"ssh", "client_ip", "203.0.113.7 ;x"}, `local.ini: ssh.client_ip: ";x" is not an address`},
		{"value with a section", "[open]\n", Change{"open", "web", "80/tcp\n[ssh]\nallow = any"}, `local.ini: open.web: "[ssh] allow = any" is out of place`},
		{"unknown key", "", Change{"ssh", "colour", "red"}, "local.ini: ssh.colour: unknown key"},
		{"unknown section", "", Change{"a]\n[b", "colour", "red"}, "local.ini: a]?[b.colour: unknown section"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := SetLocal("local.ini", []byte(tt.in), []Change{tt.change})
			if got != nil {
				t.Errorf("got %q and an error", got)
			}
			wantLines(t, err, tt.want)
		})
	}
}

func FuzzSetLocal(f *testing.F) {
	f.Add([]byte("; c\n[ssh]\nallow = any ; c\n"), "ssh", "allow", "client")
	f.Add([]byte("\ufeff[ssh]\r\nallow = any"), "open", "web", "80/tcp on eth0")
	f.Add([]byte(""), "ssh", "client_ip", "203.0.113.7,\n198.51.100.1")
	f.Fuzz(func(t *testing.T, data []byte, section, key, value string) {
		got, err := SetLocal("f", data, []Change{{section, key, value}})
		if err != nil {
			return
		}
		before, _ := Parse("f", data)
		after, errs := Parse("f", got)
		s := Defaults()
		if errs = s.decode(after, errs); errs != nil {
			t.Fatalf("%q: %v", got, errs)
		}
		if want := strings.Join(strings.Fields(value), " "); after.value(section, key) != want {
			t.Errorf("%q: got %q, want %q", got, after.value(section, key), want)
		}
		// Nothing else has changed.
		for _, sec := range before.Sections {
			for _, k := range sec.Keys {
				if (sec.Name != section || k.Name != key) && after.value(sec.Name, k.Name) != k.Value {
					t.Errorf("%q became %q", data, got)
				}
			}
		}
		if strings.Count(string(got), ";") < strings.Count(string(data), ";") && strings.TrimFunc(value, unicode.IsSpace) != "" {
			t.Errorf("a comment is lost: %q became %q", data, got)
		}
	})
}
