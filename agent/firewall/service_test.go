package firewall

import (
	"reflect"
	"strings"
	"testing"
	"unicode"
)

func TestParseService(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"80/tcp", "80/tcp"},
		{"53/udp", "53/udp"},
		{"65535/tcp", "65535/tcp"},
		{"40000-40100/udp", "40000-40100/udp"},
		{"80-80/tcp", "80/tcp"},
		{"80/tcp on any", "80/tcp"},
		{"  80/tcp \t on  public ", "80/tcp on public"},
		{"80/tcp on eth0", "80/tcp on eth0"},
		{"80/tcp on eth*", "80/tcp on eth*"},
		{"80/tcp on br-1a2b3c", "80/tcp on br-1a2b3c"},
		{"80/tcp on cni-podman0", "80/tcp on cni-podman0"},
		{"80/tcp on mars*", "80/tcp on mars*"},
		{"5432/tcp on private from 10.0.0.0/8", "5432/tcp on private from 10.0.0.0/8"},
		{"80/tcp from 10.0.0.1", "80/tcp from 10.0.0.1"},
		{"80/tcp from 10.0.0.0/8,fd00::/8 ,192.168.0.0/16 , 10.0.0.0/8", "80/tcp from 10.0.0.0/8, fd00::/8, 192.168.0.0/16"},
		{"80/tcp from ::ffff:10.0.0.0/104", "80/tcp from 10.0.0.0/8"},
		{"9/sctp", "9/sctp"},
		{"1701/udp via ipsec", "1701/udp via ipsec"},
		{"1701/udp from file:/etc/x limit 5/sec via ipsec", "1701/udp from file:/etc/x limit 5/second via ipsec"},
		{"vrrp on private", "vrrp on private"},
		{"VRRP", "vrrp"},
		{"proto 112", "vrrp"},
		{"proto 99 from 10.0.0.1", "proto 99 from 10.0.0.1"},
		{"gre from 192.0.2.7 limit 10/min", "gre from 192.0.2.7 limit 10/minute"},
		{"8443/tcp on eth0 from 10.0.0.0/8, fd00::/8 limit 50/second until 2030-01-01T00:00:00Z",
			"8443/tcp on eth0 from 10.0.0.0/8, fd00::/8 limit 50/second until 2030-01-01T00:00:00Z"},
	} {
		got, err := ParseService("web", tt.in)
		if err != nil {
			t.Errorf("%q: %v", tt.in, err)
			continue
		}
		if got.Name != "web" || got.String() != tt.want {
			t.Errorf("%q: got %q, %q; want %q", tt.in, got.Name, got, tt.want)
		}
	}
	got, err := ParseService("db", "5432/tcp on private from 10.0.0.0/8")
	if err != nil || got.Proto != TCP || got.Ports != Port(5432) || got.On != "private" || len(got.From) != 1 {
		t.Errorf("got %+v, %v", got, err)
	}
	if got, _ := ParseService("web", "80/tcp"); got.On != "any" || got.From != nil {
		t.Errorf("got %+v, want on any, without sources", got)
	}
}

func TestParseServiceErrors(t *testing.T) {
	const form = serviceForm
	for _, tt := range []struct {
		in    string
		wrong []string // one for each line of the error
	}{
		{"", []string{"no port: want " + form}},
		{"8080", []string{`"8080": write 8080/tcp or 8080/udp`}},
		{"40000:40100", []string{`"40000:40100": write 40000-40100/tcp or 40000-40100/udp`}},
		{"40000:40100/udp", []string{"write 40000-40100/tcp or 40000-40100/udp"}},
		{"40000-40100", []string{"write 40000-40100/tcp or 40000-40100/udp"}},
		{"tcp/8080", []string{"write 8080/tcp or 8080/udp"}},
		{"8080/TCP", []string{"write 8080/tcp or 8080/udp"}},
		{"8080/dccp", []string{"write 8080/tcp or 8080/udp"}},
		{"112/vrrp", []string{`"112/vrrp": this protocol has no ports: write vrrp`}},
		{"vrpp", []string{"want a port or port range and a protocol"}},
		{"proto", []string{"want proto and a number from 1 to 254, such as proto 112"}},
		{"proto esp", []string{"want proto and a number"}},
		{"proto 256", []string{"want proto and a number"}},
		{"proto 0", []string{"extension header of IPv6"}},
		{"proto 255", []string{"reserved"}},
		{"proto 6", []string{"this protocol has ports: write PORT/tcp"}},
		{"proto 132", []string{"this protocol has ports: write PORT/sctp"}},
		{"proto 1", []string{"ICMP, which the built-in rules treat"}},
		{"80/tcp limit", []string{`limit: "": want 1 to 10000 per second, minute, hour or day, such as 30/minute`}},
		{"80/tcp limit 5", []string{"limit: \"5\": want 1 to 10000"}},
		{"80/tcp limit 7000/second", []string{"limit: \"7000/second\": iptables would round this rate"}},
		{"80/tcp via", []string{`via: "": want ipsec`}},
		{"80/tcp via vpn", []string{`via: "vpn": want ipsec`}},
		{"80/tcp via ipsec limit 5/second", []string{`"limit 5/second" is out of place`}},
		{"80/tcp limt 5/second", []string{`"limt 5/second" is out of place`}},
		{"80/tcp limit 5/second from 10.0.0.0/8", []string{`"from 10.0.0.0/8" is out of place`}},
		{"0/tcp", []string{`"0/tcp": ports are 1 to 65535, such as 8080/tcp or 40000-40100/udp`}},
		{"0-10/tcp", []string{"ports are 1 to 65535"}},
		{"70000/tcp", []string{"ports are 1 to 65535"}},
		{"1-70000/tcp", []string{"ports are 1 to 65535"}},
		{"99999999999999999999/tcp", []string{"ports are 1 to 65535"}},
		{"200-100/udp", []string{`"200-100/udp": the range is reversed: write 100-200/udp`}},
		{"200-100", []string{"write 100-200/tcp"}},
		{"http/tcp", []string{"such as 8080/tcp or 40000-40100/udp"}},
		{"080/tcp", []string{"such as 8080/tcp or 40000-40100/udp"}},
		{"+80/tcp", []string{"such as 8080/tcp or 40000-40100/udp"}},
		{"1-2-3/tcp", []string{"such as 8080/tcp or 40000-40100/udp"}},
		{"-80/tcp", []string{"such as 8080/tcp or 40000-40100/udp"}},
		{"80,443/tcp", []string{"such as 8080/tcp or 40000-40100/udp"}},
		{`"80/tcp"`, []string{"such as 8080/tcp or 40000-40100/udp"}},
		{"80 /tcp", []string{"write 80/tcp or 80/udp", `"/tcp" is out of place: want ` + form}},
		{"80/tcp 81/tcp", []string{`"81/tcp" is out of place`}},
		{"80/tcp public", []string{`"public" is out of place`}},
		{"80/tcp from 10.0.0.0/8 on public", []string{`"on public" is out of place`}},
		{"80/tcp on", []string{`"on" has no value: want any, public, private, virtual or an interface name`}},
		{"80/tcp on from 10.0.0.0/8", []string{`"on" has no value`}},
		{"80/tcp on public, private", []string{"out of place"}},
		{"80/tcp on loopback", []string{`unknown zone "loopback": want any, public, private, virtual or`}},
		{"80/tcp on trusted", []string{`unknown zone "trusted"`}},
		{"80/tcp on lan", []string{`unknown zone "lan"`}},
		{"80/tcp on Public", []string{`unknown zone "Public"`}},
		{"80/tcp on privat", []string{`unknown zone "privat": want any, public, private, virtual or an interface name (for an interface of this name: privat*)`}},
		{"80/tcp on eth/0", []string{"want letters, digits"}},
		{"80/tcp on e*h0", []string{`"*" only at the end`}},
		{"80/tcp on *", []string{"want a name such as eth0"}},
		{"80/tcp on eth0123456789012", []string{"longer than the kernel's 15"}},
		{"80/tcp on " + strings.Repeat("x", 1000), []string{`"... is neither a zone nor an interface name`}},
		{"80/tcp from", []string{"a network is missing at the end"}},
		{"80/tcp from 10.0.0.0/8,", []string{"a network is missing at the end"}},
		{"80/tcp from , 10.0.0.0/8", []string{"a network is missing before"}},
		{"80/tcp from 10.0.0.0/8 192.168.0.0/16", []string{`want a "," between two networks`}},
		{"80/tcp from 10.0.0.1/8", []string{"the network is 10.0.0.0/8"}},
		{"70000/tcp on dmz from 10.0.0.1/8, me", []string{"ports are 1 to 65535", `unknown zone "dmz"`, "host bits", `"me" is not an address`}},
	} {
		got, err := ParseService("web", tt.in)
		if err == nil {
			t.Errorf("%q: got %q, want an error with %q", tt.in, got, tt.wrong)
			continue
		}
		lines := strings.Split(err.Error(), "\n")
		if len(lines) != len(tt.wrong) {
			t.Errorf("%q: error %q, want %d lines", tt.in, err, len(tt.wrong))
			continue
		}
		for i, line := range lines {
			if !strings.Contains(line, tt.wrong[i]) {
				t.Errorf("%q: error %q, want %q in it", tt.in, line, tt.wrong[i])
			}
		}
	}
	for _, name := range []string{"", "HTTP", "a_b", "ssh", "xmas", strings.Repeat("x", 21), strings.Repeat("x", 1000)} {
		if got, err := ParseService(name, "80/tcp"); err == nil || len(err.Error()) > 200 {
			t.Errorf("name %q: got %v, error %v", name, got, err)
		}
	}
}

func FuzzParseService(f *testing.F) {
	for _, v := range []string{"80/tcp", "40000-40100/udp on eth* from 10.0.0.0/8, ::ffff:1.2.3.4", "80/tcp on public from fd00::/8", "0/tcp on \x00"} {
		f.Add("web", v)
	}
	f.Fuzz(func(t *testing.T, name, value string) {
		s, err := ParseService(name, value)
		if err != nil {
			return
		}
		text := s.String()
		again, err := ParseService(s.Name, text)
		if err != nil || !reflect.DeepEqual(again, s) {
			t.Errorf("%q: %q parses as %+v, %v; want %+v", value, text, again, err, s)
		}
		if strings.ContainsFunc(s.Name+text, func(r rune) bool {
			return r > unicode.MaxASCII || unicode.IsControl(r) || strings.ContainsRune("\"'\\`$;#!", r)
		}) {
			t.Errorf("%q: accepted as %q %q", value, s.Name, text)
		}
	})
}

// The exact rates are as iptables 1.8.9 printed them, both legacy and nft.
func TestRateCanonical(t *testing.T) {
	for _, tt := range []struct {
		in, want Rate
		exact    bool
	}{
		{Rate{}, Rate{}, true},
		{Rate{30, Minute}, Rate{30, Minute}, true},
		{Rate{60, Minute}, Rate{1, Second}, true},
		{Rate{120, Minute}, Rate{2, Second}, true},
		{Rate{1000, Minute}, Rate{1000, Minute}, true},
		{Rate{5000, Minute}, Rate{83, Second}, false}, // 5000/min since revision 2
		{Rate{7, Second}, Rate{7, Second}, true},
		{Rate{10000, Second}, Rate{10000, Second}, true},
		{Rate{7000, Second}, Rate{10000, Second}, false}, // 7042/sec since revision 2
		{Rate{110, Second}, Rate{111, Second}, false},    // 110/sec since revision 2
		{Rate{20000, Second}, Rate{}, false},
		{Rate{7, Hour}, Rate{7, Hour}, true},
		{Rate{24, Hour}, Rate{24, Hour}, true},
		{Rate{10000, Hour}, Rate{10000, Hour}, true},
		{Rate{1, Day}, Rate{1, Day}, true},
		{Rate{24, Day}, Rate{1, Hour}, true},
		{Rate{10000, Day}, Rate{10000, Day}, true},
		{Rate{1, "week"}, Rate{}, false},
	} {
		got, exact := tt.in.Canonical()
		if got != tt.want || exact != tt.exact {
			t.Errorf("%s: got %s, %v; want %s, %v", tt.in, got, exact, tt.want, tt.exact)
		}
		if again, ok := got.Canonical(); exact && (again != got || !ok) {
			t.Errorf("%s: %s is not canonical, want %s", tt.in, got, again)
		}
	}
}
