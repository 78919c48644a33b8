package firewall

import (
	"net/netip"
	"strings"
	"testing"
	"unicode"
)

func TestParseSource(t *testing.T) {
	for _, tt := range []struct{ in, want, wrong string }{
		{in: "203.0.113.7", want: "203.0.113.7/32"},
		{in: " \t203.0.113.7\r\n", want: "203.0.113.7/32"},
		{in: "198.51.100.0/24", want: "198.51.100.0/24"},
		{in: "2001:DB8::1", want: "2001:db8::1/128"},
		{in: "2001:db8::/64", want: "2001:db8::/64"},
		{in: "::ffff:203.0.113.7", want: "203.0.113.7/32"},
		{in: "::ffff:203.0.113.7/128", want: "203.0.113.7/32"},
		{in: "::ffff:203.0.113.0/120", want: "203.0.113.0/24"},
		{in: "10.0.0.1", want: "10.0.0.1/32"}, // whether it is valid depends on the host
		{in: "100.64.0.1", want: "100.64.0.1/32"},
		{in: "128.0.0.0/1", want: "128.0.0.0/1"},
		{in: "126.0.0.0/7", want: "126.0.0.0/7"}, // contains more than loopback

		{in: "", wrong: `"" is not an address`},
		{in: "office.example.com", wrong: `"office.example.com" is not an address: want one such as 203.0.113.7, 198.51.100.0/24 or 2001:db8::/64 (names are not looked up)`},
		{in: "203.0.113.7:22", wrong: "is not an address"},
		{in: "203.0.113.007", wrong: "is not an address"},
		{in: "203.0.113", wrong: "is not an address"},
		{in: "203.0.113.7 198.51.100.1", wrong: "is not an address"},
		{in: "203.0.113.0/33", wrong: "want a number from 0 to 32"},
		{in: "203.0.113.0/", wrong: "want a number from 0 to 32"},
		{in: "203.0.113.0/024", wrong: "want a number from 0 to 32"},
		{in: "203.0.113.0/255.255.255.0", wrong: "want a number from 0 to 32"},
		{in: "2001:db8::/129", wrong: "want a number from 0 to 128"},
		{in: "203.0.113.7/24", wrong: `"203.0.113.7/24" has host bits set: the network is 203.0.113.0/24, the address is 203.0.113.7`},
		{in: "2001:db8::1/64", wrong: "the network is 2001:db8::/64"},
		{in: "::ffff:203.0.113.7/120", wrong: "the network is 203.0.113.0/24"},
		{in: "::ffff:0:0/95", wrong: "more than the IPv4-mapped addresses"},
		{in: "::ffff:0:0/96", wrong: "contains every address"},
		{in: "0.0.0.0/0", wrong: "contains every address: to allow any, set allow = any"},
		{in: "1.2.3.4/0", wrong: "contains every address"},
		{in: "::/0", wrong: "contains every address"},
		{in: "0.0.0.0", wrong: "unspecified"},
		{in: "::", wrong: "unspecified"},
		{in: "::ffff:0.0.0.0", wrong: "unspecified"},
		{in: "0.0.0.0/1", wrong: "unspecified"},
		{in: "::/8", wrong: "unspecified"},
		{in: "0.1.2.3", wrong: "unspecified network"},
		{in: "127.0.0.1", wrong: "loopback"},
		{in: "127.0.0.1/8", wrong: "loopback"},
		{in: "127.1.0.0/16", wrong: "loopback"},
		{in: "::1", wrong: "loopback"},
		{in: "::ffff:127.0.0.1", wrong: "loopback"},
		{in: "169.254.169.254", wrong: "link-local"},
		{in: "fe80::1", wrong: "link-local"},
		{in: "fe80::/64", wrong: "link-local"},
		{in: "fe80::1%eth0", wrong: "zone ID"},
		{in: "fe80::1%eth0/64", wrong: "zone ID"},
		{in: "224.0.0.1", wrong: "multicast"},
		{in: "239.0.0.0/8", wrong: "multicast"},
		{in: "ff02::1", wrong: "multicast"},
		{in: "ff00::/8", wrong: "multicast"},
		{in: "255.255.255.255", wrong: "broadcast"},
		{in: "CI_MISSING_JINJA_VAR/client_ip", wrong: `cloud-init could not fill in the template variable "client_ip"`},
		{in: "CI_MISSING_JINJA_VAR/client_ip/32", wrong: `cloud-init could not fill in the template variable "client_ip":`},
		{in: "\x1b[2J", wrong: `"\x1b[2J" is not`},
		{in: strings.Repeat("x", 1000), wrong: strings.Repeat("x", 60) + `"...`},
	} {
		got, err := ParseSource(tt.in)
		checkPrefix(t, tt.in, got, err, tt.want, tt.wrong)
	}
}

func TestParseNetwork(t *testing.T) {
	for _, tt := range []struct{ in, want, wrong string }{
		{in: "10.0.0.0/8", want: "10.0.0.0/8"},
		{in: "10.0.0.1", want: "10.0.0.1/32"},
		{in: "::ffff:10.0.0.0/104", want: "10.0.0.0/8"},
		{in: "fd00::/8", want: "fd00::/8"},
		{in: "fe80::/10", want: "fe80::/10"},
		{in: "0.0.0.0/0", want: "0.0.0.0/0"},
		{in: "10.0.0.1/8", wrong: "the network is 10.0.0.0/8"},
		{in: "db.example.com", wrong: "is not an address"},
		{in: "fe80::1%eth0", wrong: "zone ID"},
		{in: "CI_MISSING_JINJA_VAR/x", wrong: `template variable "x"`},
	} {
		got, err := ParseNetwork(tt.in)
		checkPrefix(t, tt.in, got, err, tt.want, tt.wrong)
	}
}

func checkPrefix(t *testing.T, in string, got netip.Prefix, err error, want, wrong string) {
	t.Helper()
	switch {
	case wrong == "" && err != nil:
		t.Errorf("%q: error %v, want %s", in, err, want)
	case wrong == "" && got.String() != want:
		t.Errorf("%q: got %s, want %s", in, got, want)
	case wrong != "" && err == nil:
		t.Errorf("%q: got %s, want an error with %q", in, got, wrong)
	case wrong != "" && !strings.Contains(err.Error(), wrong):
		t.Errorf("%q: error %q, want %q in it", in, err, wrong)
	case wrong != "" && got.IsValid():
		t.Errorf("%q: got %s with an error", in, got)
	}
}

func TestParseSources(t *testing.T) {
	for _, tt := range []struct {
		in, want string
		wrong    []string
	}{
		{in: ""},
		{in: " \n"},
		{in: "203.0.113.7", want: "203.0.113.7/32"},
		{in: "203.0.113.7,2001:db8::/64 , 198.51.100.0/24\n10.0.0.1,", want: "203.0.113.7/32 2001:db8::/64 198.51.100.0/24 10.0.0.1/32"},
		{in: "203.0.113.7 203.0.113.7/32 ::ffff:203.0.113.7", want: "203.0.113.7/32"},
		{in: "one, 203.0.113.7 127.0.0.1", want: "203.0.113.7/32", wrong: []string{`"one"`, "loopback"}},
		{in: " , ", wrong: []string{"contains no address"}},
	} {
		got, errs := ParseSources(tt.in)
		var words []string
		for _, p := range got {
			words = append(words, p.String())
		}
		if s := strings.Join(words, " "); s != tt.want {
			t.Errorf("%q: got %s, want %s", tt.in, s, tt.want)
		}
		if len(errs) != len(tt.wrong) {
			t.Errorf("%q: errors %v, want %d", tt.in, errs, len(tt.wrong))
			continue
		}
		for i, err := range errs {
			if !strings.Contains(err.Error(), tt.wrong[i]) {
				t.Errorf("%q: error %q, want %q in it", tt.in, err, tt.wrong[i])
			}
		}
	}
}

func TestQuoteCutsBetweenCharacters(t *testing.T) {
	got := Quote(strings.Repeat("ä", 100))
	if want := `"` + strings.Repeat("ä", 30) + `"...`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func FuzzParseSource(f *testing.F) {
	for _, s := range []string{"203.0.113.7", "::ffff:1.2.3.0/120", "fe80::1%eth0", "1.2.3.4/0", "CI_MISSING_JINJA_VAR/x", "::/0"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		p, err := ParseSource(text)
		if err != nil {
			if strings.ContainsFunc(err.Error(), unicode.IsControl) || len(err.Error()) > 1000 {
				t.Errorf("%q: error is not printable or too long: %q", text, err)
			}
			return
		}
		if again, err := ParseSource(p.String()); err != nil || again != p {
			t.Errorf("%q: %s parses as %s, %v", text, p, again, err)
		}
		if n, err := ParseNetwork(text); err != nil || n != p {
			t.Errorf("%q: parses as source %s, as network %s, %v", text, p, n, err)
		}
		if a := p.Addr(); p.Bits() == 0 || a.Zone() != "" || a.Is4In6() || a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() {
			t.Errorf("%q: accepted as %s", text, p)
		}
	})
}

func TestTemporaryHint(t *testing.T) {
	for client, want := range map[string]string{
		"2001:db8:7:1:9d3c:e51a:8b02:47fe/128": "2001:db8:7:1::/64",
		"fd00:7:1:2:9d3c:e51a:8b02:47fe/128":   "fd00:7:1:2::/64",
		"2001:db8:7:1::/64":                    "",
		"2001:db8:7:1::1/128":                  "",
		"2001:db8:7:1::dead:beef/128":          "",
		"2001:db8:7:1:192:168:1:10/128":        "", // an IPv4 address in it
		"2001:db8:7:1:5054:ff:fe12:3456/128":   "", // from a MAC address
		"2001:db8:7:1:5054:12ff:fe12:3456/128": "",
		"203.0.113.9/32":                       "",
	} {
		if got := TemporaryHint(netip.MustParsePrefix(client)); (got != "") != (want != "") || !strings.HasSuffix(got, want) {
			t.Errorf("%s: %q, want %q", client, got, want)
		}
	}
}

func TestSSHNeedsIPv4(t *testing.T) {
	for _, tt := range []struct {
		client, address string
		mode            SSHMode
		want            bool
	}{
		{"203.0.113.9/32", "2001:db8::1/64", SSHPinned, true},
		{"203.0.113.9/32", "2001:db8::1/64", SSHLimited, false},
		{"203.0.113.9/32", "fd00::1/64", SSHPinned, false},
		{"203.0.113.9/32", "fe80::1/64", SSHPinned, false},
		{"203.0.113.9/32", "192.0.2.1/24", SSHPinned, false},
		{"2001:db8:1::/64", "2001:db8::1/64", SSHPinned, false},
	} {
		d := Desired{Interfaces: []Interface{{Addresses: []netip.Prefix{netip.MustParsePrefix(tt.address)}}},
			SSH: SSH{Mode: tt.mode, Allow: []netip.Prefix{netip.MustParsePrefix(tt.client)}}}
		if got := d.SSHNeedsIPv4(); got != tt.want {
			t.Errorf("%+v: %t", tt, got)
		}
	}
}
