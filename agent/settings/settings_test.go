package settings

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

var comparePrefixes = cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })

// machine returns a system with files below its own root.
func machine(t *testing.T, files map[string]string) *system.System {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return &system.System{Root: root}
}

func TestLoadWithoutFiles(t *testing.T) {
	got, err := Load(machine(t, nil), "")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Defaults(), got, comparePrefixes); diff != "" {
		t.Error(diff)
	}
	_, err = Load(machine(t, nil), "/etc/basicfw/mine.ini")
	wantLines(t, err, "/etc/basicfw/mine.ini: cannot be read: no such file or directory")
}

func TestLoad(t *testing.T) {
	sys := machine(t, map[string]string{
		"/etc/basicfw/agent.ini": `
[agent]
profile = web+mail
backend = iptables
on_conflict = refuse
[ssh]
ports = 22, 2222 22
allow = 203.0.113.7, 2001:db8::/64
client_ip = 198.51.100.1
limit = 5/second
confirm_within = 1h30m
[interfaces]
public = eth0, ens*
private = eth1
trusted = wg0 tailscale0
[open]
db = 5432/tcp on private from 10.0.0.0/8
media = 40000-40100/udp
none =
[log]
level = debug
drops = no
[containers]
published = leave
`,
		"/etc/basicfw/local.ini": `
[ssh]
allow = any
client_ip = ; as good as none
[open]
games = 27015/udp
db = 5433/tcp
`})
	got, err := Load(sys, "")
	if err != nil {
		t.Fatal(err)
	}
	const agent, local = "/etc/basicfw/agent.ini:", "/etc/basicfw/local.ini:"
	want := Settings{
		Profile: "web+mail", Backend: "iptables", OnConflict: "refuse",
		SSHPorts: []uint16{22, 2222},
		Allow:    Allow{Mode: AllowAny},
		ClientIP: []netip.Prefix{netip.MustParsePrefix("198.51.100.1/32")}, ClientIPText: "198.51.100.1",
		Limit: firewall.Rate{N: 5, Per: firewall.Second}, ConfirmWithin: 90 * time.Minute,
		Public: []string{"eth0", "ens*"}, Private: []string{"eth1"}, Trusted: []string{"wg0", "tailscale0"},
		Open: []firewall.Service{
			{Name: "db", Proto: "tcp", Ports: firewall.Port(5433), On: "any", Source: local + "7"},
			{Name: "media", Proto: "udp", Ports: firewall.PortRange{First: 40000, Last: 40100}, On: "any", Source: agent + "18"},
			{Name: "games", Proto: "udp", Ports: firewall.Port(27015), On: "any", Source: local + "6"},
		},
		Replaced: []firewall.Service{{Name: "db", Proto: "tcp", Ports: firewall.Port(5432), On: "private",
			From: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, Source: agent + "17"}},
		LogLevel: "debug", LogDrops: false, Published: "leave",
		Sources: map[string]string{
			"agent.profile": agent + "3", "agent.backend": agent + "4", "agent.on_conflict": agent + "5",
			"ssh.ports": agent + "7", "ssh.allow": local + "3", "ssh.client_ip": agent + "9",
			"ssh.limit": agent + "10", "ssh.confirm_within": agent + "11",
			"interfaces.public": agent + "13", "interfaces.private": agent + "14", "interfaces.trusted": agent + "15",
			"open.db": local + "7", "open.media": agent + "18", "open.games": local + "6",
			"log.level": agent + "21", "log.drops": agent + "22", "containers.published": agent + "24",
		},
	}
	if diff := cmp.Diff(want, got, comparePrefixes); diff != "" {
		t.Error(diff)
	}
}

func TestLoadNamesEveryError(t *testing.T) {
	sys := machine(t, map[string]string{
		"/etc/basicfw/mine.ini": `[agent]
profile = Web
client_ip = 203.0.113.7
colour = red
[ssh]
ports = 0, 22, 70000
allow = office.example.com, 203.0.113.7, 10.0.0.1/8
junk
limit = 5
limit = 6/hour
[nonsense]
profile = auto
[log]
drops = true
`,
		"/etc/basicfw/local.ini": `[open]
ssh = 22/tcp
db = 70000/tcp on lan from 10.0.0.1/8
`})
	got, err := Load(sys, "/etc/basicfw/mine.ini")
	wantLines(t, err, `/etc/basicfw/mine.ini:2: agent.profile: profile name "Web": want 1 to 40 of a-z, 0-9,
/etc/basicfw/mine.ini:3: agent.client_ip: belongs in section [ssh]
/etc/basicfw/mine.ini:4: agent.colour: unknown key: [agent] has profile, backend, on_conflict
/etc/basicfw/mine.ini:6: ssh.ports: "0": want auto, or ports from 1 to 65535 such as 22, 2222
/etc/basicfw/mine.ini:6: ssh.ports: "70000": want auto, or ports from 1 to 65535
/etc/basicfw/mine.ini:7: ssh.allow: "office.example.com" is not an address
/etc/basicfw/mine.ini:7: ssh.allow: "10.0.0.1/8" has host bits set: the network is 10.0.0.0/8
/etc/basicfw/mine.ini:8: "junk": want KEY = VALUE
/etc/basicfw/mine.ini:9: ssh.limit: "5": want 1 to 10000 per second, minute, hour or day, such as 30/minute, or off
/etc/basicfw/mine.ini:10: ssh.limit: duplicate key, first set in line 9
/etc/basicfw/mine.ini:11: unknown section [nonsense]: want one of [agent], [ssh], [interfaces], [containers], [open], [block], [test], [log]
/etc/basicfw/mine.ini:14: log.drops: "true": want yes or no
/etc/basicfw/local.ini:2: open.ssh: service name "ssh" is reserved for the baseline rules: choose another
/etc/basicfw/local.ini:3: open.db: "70000/tcp": ports are 1 to 65535
/etc/basicfw/local.ini:3: open.db: unknown zone "lan"
/etc/basicfw/local.ini:3: open.db: "10.0.0.1/8" has host bits set`)
	var errs Errors
	if !errors.As(err, &errs) || errs.OnlyClient() {
		t.Errorf("%T, OnlyClient %v", err, errs.OnlyClient())
	}
	if diff := cmp.Diff(Defaults(), got, comparePrefixes); diff != "" {
		t.Errorf("a bad value was accepted: %s", diff)
	}
}

func TestLoadWithABadClientOnly(t *testing.T) {
	sys := machine(t, map[string]string{"/etc/basicfw/agent.ini": "[agent]\nprofile = web-only\n[ssh]\nclient_ip = CI_MISSING_JINJA_VAR/client_ip, 10.0.0.1/8\n"})
	got, err := Load(sys, "")
	wantLines(t, err, `/etc/basicfw/agent.ini:4: ssh.client_ip: "CI_MISSING_JINJA_VAR/client_ip": cloud-init could not fill in the template variable "client_ip"
/etc/basicfw/agent.ini:4: ssh.client_ip: "10.0.0.1/8" has host bits set`)
	var errs Errors
	if !errors.As(err, &errs) || !errs.OnlyClient() {
		t.Errorf("%T, want only errors about the client: %v", err, err)
	}
	if got.Profile != "web-only" || got.ClientIP != nil {
		t.Errorf("got profile %q, client %v", got.Profile, got.ClientIP)
	}
	if (Errors{}).OnlyClient() || (Errors{}).Err() != nil {
		t.Error("an empty Errors is an error about the client")
	}
}

func TestLoadUnreadableFiles(t *testing.T) {
	sys := machine(t, map[string]string{"/etc/basicfw/agent.ini": strings.Repeat("x", 10<<20), "/etc/basicfw/local.ini/x": ""})
	_, err := Load(sys, "")
	wantLines(t, err, `/etc/basicfw/agent.ini:1: file is larger than 1048576 bytes
/etc/basicfw/local.ini: cannot be read: is a directory`)

	// A dangling link is an error, not a missing file.
	sys = machine(t, map[string]string{"/etc/basicfw/x": ""})
	if err := os.Symlink("nowhere", filepath.Join(sys.Root, "/etc/basicfw/agent.ini")); err != nil {
		t.Fatal(err)
	}
	_, err = Load(sys, "")
	wantLines(t, err, "/etc/basicfw/agent.ini: cannot be read: no such file or directory")
}

func TestLoadInterfaceInTwoZones(t *testing.T) {
	sys := machine(t, map[string]string{
		"/etc/basicfw/agent.ini": "[interfaces]\npublic = eth0\n",
		"/etc/basicfw/local.ini": "[interfaces]\nprivate = eth1 eth0\n"})
	_, err := Load(sys, "")
	wantLines(t, err, `/etc/basicfw/local.ini:2: interfaces.private: "eth0" is also public (/etc/basicfw/agent.ini:2)`)
}

func TestSet(t *testing.T) {
	rate := func(n uint32, per firewall.Unit) func(*Settings) {
		return func(s *Settings) { s.Limit = firewall.Rate{N: n, Per: per} }
	}
	confirm := func(d time.Duration) func(*Settings) { return func(s *Settings) { s.ConfirmWithin = d } }
	for _, tt := range []struct {
		key, value string
		want       func(*Settings) // on top of the defaults
		wrong      string          // one line for each error
	}{
		{key: "agent.profile", value: "web+mail", want: func(s *Settings) { s.Profile = "web+mail" }},
		{key: "agent.profile", value: " auto\n", want: func(s *Settings) {}},
		{key: "agent.profile", value: "../../etc/passwd", wrong: "want 1 to 40"},
		{key: "agent.profile", value: "..", wrong: "want 1 to 40"},
		{key: "agent.profile", value: strings.Repeat("x", 41), wrong: "want 1 to 40"},
		{key: "agent.backend", value: "nftables", want: func(s *Settings) { s.Backend = "nftables" }},
		{key: "agent.backend", value: "nft", wrong: `--flag: "nft": want auto, iptables or nftables`},
		{key: "agent.on_conflict", value: "auto", wrong: "want takeover or refuse"},
		{key: "ssh.ports", value: "2222", want: func(s *Settings) { s.SSHPorts = []uint16{2222} }},
		{key: "ssh.ports", value: "auto", want: func(s *Settings) {}},
		{key: "ssh.ports", value: "22,auto", wrong: `"auto": want auto, or ports`},
		{key: "ssh.ports", value: "022", wrong: `"022": want auto, or ports`},
		{key: "ssh.ports", value: "22/tcp", wrong: `"22/tcp": want auto, or ports`},
		{key: "ssh.ports", value: "-1", wrong: `"-1": want auto, or ports`},
		{key: "ssh.ports", value: strings.Repeat("22,", 257), wrong: "a list of 257: want at most 256"},
		{key: "ssh.ports", value: ",", wrong: `",": want auto, or ports`},
		{key: "ssh.allow", value: "any", want: func(s *Settings) { s.Allow = Allow{Mode: AllowAny} }},
		{key: "ssh.allow", value: "203.0.113.7\n2001:db8::/64\n", want: func(s *Settings) {
			s.Allow = Allow{Mode: AllowList, List: []netip.Prefix{netip.MustParsePrefix("203.0.113.7/32"), netip.MustParsePrefix("2001:db8::/64")}}
		}},
		{key: "ssh.allow", value: "203.0.113.7, client, 198.51.100.0/24 until 2026-11-24T18:00:00Z", want: func(s *Settings) {
			s.Allow = Allow{Mode: AllowClient, List: []netip.Prefix{netip.MustParsePrefix("203.0.113.7/32")},
				Timed: []firewall.TimedSource{{From: netip.MustParsePrefix("198.51.100.0/24"), Until: time.Date(2026, 11, 24, 18, 0, 0, 0, time.UTC)}}}
		}},
		{key: "ssh.allow", value: "none", want: func(s *Settings) { s.Allow = Allow{Mode: AllowNone} }},
		{key: "ssh.allow", value: "client, any", wrong: `client and any exclude each other`},
		{key: "ssh.allow", value: "none 203.0.113.7", wrong: `none allows only temporary addresses`},
		{key: "ssh.allow", value: "203.0.113.7 until 2026-11-24T18:00:00Z", wrong: `all addresses are temporary`},
		{key: "ssh.allow", value: "client 203.0.113.7 until", wrong: `until: "": want a time in UTC such as 2006-01-02T15:04:05Z`},
		{key: "ssh.allow", value: "until 2026-11-24T18:00:00Z", wrong: `"until" is not an address` + "\n" + `"2026-11-24T18:00:00Z" is not an address`},
		{key: "ssh.allow", value: "Any", wrong: `"Any" is not an address`},
		{key: "ssh.allow", value: "0.0.0.0/0 ::/0", wrong: "set allow = any in [ssh]\nset allow = any in [ssh]"},
		{key: "ssh.allow", value: ", ,", wrong: "contains no address"},
		{key: "ssh.client_ip", value: "203.0.113.7,\n198.51.100.0/24\n", want: func(s *Settings) {
			s.ClientIP = []netip.Prefix{netip.MustParsePrefix("203.0.113.7/32"), netip.MustParsePrefix("198.51.100.0/24")}
			s.ClientIPText = "203.0.113.7, 198.51.100.0/24"
		}},
		{key: "ssh.client_ip", value: "127.0.0.1", wrong: "--flag: \"127.0.0.1\" is a loopback address"},
		{key: "ssh.client_ip", value: "a\x1bb", wrong: `"a\x1bb" is not an address`},
		{key: "ssh.limit", value: "1/second", want: rate(1, firewall.Second)},
		{key: "ssh.limit", value: "10000/sec", want: rate(10000, firewall.Second)},
		{key: "ssh.limit", value: "60/min", want: rate(60, firewall.Minute)},
		{key: "ssh.limit", value: "7/hour", want: rate(7, firewall.Hour)},
		{key: "ssh.limit", value: "7/day", want: rate(7, firewall.Day)},
		{key: "ssh.limit", value: "off", want: rate(0, "")},
		{key: "ssh.limit", value: "0/second", wrong: "want 1 to 10000"},
		{key: "ssh.limit", value: "7000/second", wrong: "iptables would round this rate"},
		{key: "ssh.limit", value: "10001/second", wrong: "want 1 to 10000"},
		{key: "ssh.limit", value: "-1/second", wrong: "want 1 to 10000"},
		{key: "ssh.limit", value: "4294967297/second", wrong: "want 1 to 10000"},
		{key: "ssh.limit", value: "1.5/second", wrong: "want 1 to 10000"},
		{key: "ssh.limit", value: "30/month", wrong: "want 1 to 10000"},
		{key: "ssh.limit", value: "30 / minute", wrong: "want 1 to 10000"},
		{key: "ssh.confirm_within", value: "0", want: confirm(0)},
		{key: "ssh.confirm_within", value: "0s", want: confirm(0)},
		{key: "ssh.confirm_within", value: "90s", want: confirm(90 * time.Second)},
		{key: "ssh.confirm_within", value: "720h", want: confirm(720 * time.Hour)},
		{key: "ssh.confirm_within", value: "1d", want: confirm(24 * time.Hour)},
		{key: "ssh.confirm_within", value: "30", wrong: "want a time from 1s to 30d, such as 90m, 8h or 7d, or 0 for never"},
		{key: "ssh.confirm_within", value: "-30m", wrong: "want a time"},
		{key: "ssh.confirm_within", value: "1ms", wrong: "want a time"},
		{key: "ssh.confirm_within", value: "721h", wrong: "want a time"},
		{key: "ssh.confirm_within", value: "off", wrong: "want a time"},
		{key: "interfaces.public", value: "auto", want: func(s *Settings) {}},
		{key: "interfaces.public", value: "eth0 eth*, eth0", want: func(s *Settings) { s.Public = []string{"eth0", "eth*"} }},
		{key: "interfaces.private", value: "auto, eth0", wrong: `"auto": want names of interfaces`},
		{key: "interfaces.private", value: "private", wrong: `"private": want names of interfaces`},
		{key: "interfaces.trusted", value: "auto", wrong: `"auto": want names of interfaces`},
		{key: "interfaces.trusted", value: "*", wrong: `interface name "*"`},
		{key: "interfaces.trusted", value: "wg0, e/0, " + strings.Repeat("x", 17), wrong: `interface name "e/0"` + "\n" + "longer than the kernel's 15"},
		{key: "interfaces.trusted", value: strings.Repeat("e0 ", 257), wrong: "a list of 257: want at most 256"},
		{key: "interfaces.trusted", value: ",", wrong: `",": want names of interfaces`},
		{key: "open.web", value: "8080/tcp", want: func(s *Settings) {
			s.Open = []firewall.Service{{Name: "web", Proto: "tcp", Ports: firewall.Port(8080), On: "any", Source: "--flag"}}
		}},
		{key: "open.web", value: "8080", wrong: `--flag: "8080": write 8080/tcp or 8080/udp`},
		{key: "open.Web", value: "8080/tcp", wrong: `service name "Web"`},
		{key: "log.level", value: "warn", want: func(s *Settings) { s.LogLevel = "warn" }},
		{key: "log.level", value: "loud", wrong: "want error, warn, warning, info, debug or trace"},
		{key: "log.drops", value: "no", want: func(s *Settings) { s.LogDrops = false }},
		{key: "log.drops", value: "0", wrong: "want yes or no"},
		{key: "log.colour", value: "red", wrong: "unknown key: [log] has level, drops"},
		{key: "log.ports", value: "22", wrong: "belongs in section [ssh]"},
		{key: "nonsense.x", value: "1", wrong: "unknown section"},
	} {
		got, want := Defaults(), Defaults()
		section, key, _ := strings.Cut(tt.key, ".")
		err := got.Set(section, key, tt.value, "--flag")
		if tt.want != nil {
			if err != nil {
				t.Errorf("%s = %q: %v", tt.key, tt.value, err)
				continue
			}
			tt.want(&want)
			want.Sources[tt.key] = "--flag"
		} else if err == nil {
			t.Errorf("%s = %q: no error, want %s", tt.key, tt.value, tt.wrong)
		} else {
			lines, wrong := strings.Split(err.Error(), "\n"), strings.Split(tt.wrong, "\n")
			for i := range lines {
				if len(lines) != len(wrong) || !strings.Contains(lines[i], wrong[i]) || !strings.HasPrefix(lines[i], "--flag: ") || strings.Contains(lines[i], tt.key) {
					t.Errorf("%s = %q: got %s, want %s", tt.key, tt.value, err, tt.wrong)
					break
				}
			}
		}
		if diff := cmp.Diff(want, got, comparePrefixes); diff != "" {
			t.Errorf("%s = %q: %s", tt.key, tt.value, diff)
		}
	}
}

func TestEmptyValueChangesNothing(t *testing.T) {
	s := Defaults()
	for _, l := range layout {
		for _, key := range append(l.keys, map[string][]string{"open": {"web"}}[l.name]...) {
			for _, value := range []string{"", " \n"} {
				if err := s.Set(l.name, key, value, "--flag"); err != nil {
					t.Errorf("%s.%s = %q: %v", l.name, key, value, err)
				}
			}
		}
	}
	if diff := cmp.Diff(Defaults(), s, comparePrefixes); diff != "" {
		t.Error(diff)
	}
}

// Every key of the layout has a check.
func TestEveryKeyIsChecked(t *testing.T) {
	for _, l := range layout {
		for _, key := range l.keys {
			s := Defaults()
			if err := s.Set(l.name, key, "!", "--flag"); err == nil {
				t.Errorf("%s.%s accepted \"!\"", l.name, key)
			}
		}
	}
}

// The packaged settings file shows the defaults: every line of it can be
// uncommented unchanged.
func TestPackagedFileShowsTheDefaults(t *testing.T) {
	data, err := os.ReadFile("../../packaging/rpm/agent.ini")
	if err != nil {
		t.Fatal(err)
	}
	doc, errs := Parse("agent.ini", data)
	if errs != nil {
		t.Fatal(errs)
	}
	for _, s := range doc.Sections {
		if len(s.Keys) > 0 {
			t.Errorf("[%s] is not commented out", s.Name)
		}
	}
	doc, errs = Parse("agent.ini", regexp.MustCompile(`(?m)^#`).ReplaceAll(data, nil))
	got := Defaults()
	if errs := got.decode(doc, errs); errs != nil {
		t.Fatal(errs)
	}
	for _, l := range layout {
		s := doc.Section(l.name)
		if s == nil {
			t.Errorf("no section [%s]", l.name)
			continue
		}
		var keys []string
		for _, k := range s.Keys {
			keys = append(keys, k.Name)
			if _, said := got.Sources[l.name+"."+k.Name]; !said && k.Value != "" {
				t.Errorf("%s.%s = %s had no effect", l.name, k.Name, k.Value)
			}
		}
		if diff := cmp.Diff(strings.Join(l.keys, " "), strings.Join(keys, " ")); diff != "" {
			t.Errorf("[%s]: %s", l.name, diff)
		}
	}
	got.Sources = map[string]string{}
	if diff := cmp.Diff(Defaults(), got, comparePrefixes); diff != "" {
		t.Error(diff)
	}
}

func FuzzDecode(f *testing.F) {
	packaged, err := os.ReadFile("../../packaging/rpm/agent.ini")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packaged)
	f.Add(regexp.MustCompile(`(?m)^#`).ReplaceAll(packaged, nil))
	f.Add([]byte("[ssh]\nallow = 203.0.113.7 ::ffff:1.2.3.4\nclient_ip = fe80::1%eth0\n[open]\nweb = 8080/tcp on eth* from 10.0.0.0/8\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := Defaults()
		doc, errs := Parse("f", data)
		errs = s.decode(doc, errs)
		for i, p := range errs {
			if p.Line < 1 || i > 0 && p.Line < errs[i-1].Line || strings.ContainsFunc(p.String(), unicode.IsControl) {
				t.Errorf("problem %d: %q", i, p.String())
			}
		}
		words := []string{s.Profile, s.Backend, s.OnConflict, s.ClientIPText, s.LogLevel}
		words = append(append(append(words, s.Public...), s.Private...), s.Trusted...)
		for _, o := range s.Open {
			words = append(words, o.Name, o.String())
		}
		for _, w := range words {
			if strings.ContainsFunc(w, func(r rune) bool { return r > unicode.MaxASCII || !unicode.IsPrint(r) }) {
				t.Errorf("accepted %q", w)
			}
		}
	})
}
