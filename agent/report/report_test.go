package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/verify"
)

// ordinary is a protected machine with SSH restricted to two addresses.
func ordinary(t testing.TB) Input {
	t.Helper()
	client := netip.MustParsePrefix("203.0.113.9/32")
	in := Input{Version: "1", Families: firewall.Families[:], Now: firewall.Moment{Time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}}
	net := netip.MustParsePrefix
	in.Facts.Interfaces = []firewall.Interface{{Name: "lo", Zone: firewall.LoopbackZone, Addresses: []netip.Prefix{net("127.0.0.1/8"), net("::1/128")}},
		{Name: "eth0", Zone: firewall.PublicZone, Addresses: []netip.Prefix{net("192.0.2.1/24"), net("2001:db8::1/64")}}}
	in.State = store.State{Version: "1", Profile: store.Choice{Name: "web-only"}, Client: store.Client{Source: "named", Allow: []netip.Prefix{client}},
		Desired: firewall.Desired{Published: firewall.PublishedLeave, Interfaces: in.Facts.Interfaces,
			Profile: firewall.Profile{Name: "web-only", Services: []firewall.Service{{Name: "http", Proto: firewall.TCP, Ports: firewall.Port(80)}}},
			SSH:     firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHPinned, Allow: []netip.Prefix{client, netip.MustParsePrefix("2001:db8:1::/64")}}}}
	compile(t, &in)
	return in
}

// compile sets the rules of in to those of its desired state, and makes them the only ones
// in the kernel.
func compile(t testing.TB, in *Input) {
	t.Helper()
	var err error
	if in.State.Ruleset, err = firewall.Compile(in.State.Desired); err != nil {
		t.Fatal(err)
	}
	in.Alone, in.Live = iptables.Model(in.State.Ruleset), iptables.Model(in.State.Ruleset)
}

// beside adds rules of another program to a table of iptables in the kernel, before those
// that its chains already have.
func beside(t testing.TB, in *Input, table, rules string) {
	t.Helper()
	tables, _, err := exposure.ReadSave("iptables", "ip", []byte("*"+table+"\n"+rules+"\nCOMMIT\n"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range in.Live.Tables {
		if old := &in.Live.Tables[i]; old.Family == "ip" && old.Name == table {
			for _, c := range tables[0].Chains {
				at := slices.IndexFunc(old.Chains, func(o exposure.Chain) bool { return o.Name == c.Name })
				if at < 0 {
					old.Chains = append(old.Chains, c)
				} else {
					old.Chains[at].Rules = slices.Concat(c.Rules, old.Chains[at].Rules)
				}
			}
			return
		}
	}
	in.Live.Tables = append(in.Live.Tables, tables...)
}

// TestConditions checks that all conditions that hold are listed, and that the first is the
// state. Next begins with their commands.
func TestConditions(t *testing.T) {
	drift := func(in *Input) { in.Drift = []firewall.Drift{{Family: "ipv4", Chain: "x", Kind: firewall.Missing}} }
	open := func(in *Input) {
		in.Inspection.Exposed = []backend.Finding{{Family: firewall.IPv4, Why: "because", Next: "iptables -D INPUT -j ACCEPT"}}
	}
	unlock := func(in *Input) {
		in.State.Desired.Unlock = &firewall.Unlock{Window: firewall.Window{Until: in.Now.Time.Add(time.Hour)}}
	}
	failsafe := func(in *Input) { in.State.Failsafe = "because" }
	pending := func(in *Input) {
		in.Pending = &store.Pending{State: in.State, Window: firewall.Window{Until: in.Now.Time.Add(time.Hour)}}
	}
	exposed := func(in *Input) { beside(t, in, "filter", "-A INPUT -p tcp -m tcp --dport 8080 -j ACCEPT") }
	sometimes := func(in *Input) {
		beside(t, in, "filter", "-A INPUT -p tcp -m tcp --dport 8080 -m limit --limit 3/min -j ACCEPT")
	}
	blocked := func(in *Input) { beside(t, in, "raw", "-A PREROUTING -p tcp -m tcp --dport 80 -j DROP") }
	unread := func(in *Input) { in.Live, in.LiveErr = exposure.Ruleset{}, errors.New("broken") }
	unreadable := func(in *Input) { *in = Input{Err: errors.New("broken"), Families: in.Families, Facts: in.Facts} }
	for _, tt := range []struct {
		name       string
		change     []func(*Input)
		conditions string
		next       []string
		exit       int
	}{
		{"protected", nil, "protected", []string{}, 0},
		{"not bootstrapped", []func(*Input){func(in *Input) { *in = Input{Err: store.ErrNone} }}, "not-bootstrapped", []string{"basicfw-agent bootstrap"}, 4},
		{"lost", []func(*Input){func(in *Input) { *in = Input{Err: store.ErrLost} }}, "drifted", []string{"basicfw-agent verify --repair"}, 3},
		{"unreadable", []func(*Input){unreadable}, "drifted", []string{"basicfw-agent bootstrap"}, 3},
		{"unreadable and open", []func(*Input){unreadable, open}, "unprotected drifted", []string{"iptables -D INPUT -j ACCEPT", "basicfw-agent bootstrap"}, 3},
		{"drifted", []func(*Input){drift}, "drifted", []string{"basicfw-agent verify --repair"}, 3},
		{"open and drifted", []func(*Input){open, drift}, "unprotected drifted", []string{"basicfw-agent verify --repair", "iptables -D INPUT -j ACCEPT"}, 3},
		{"unlocked", []func(*Input){unlock}, "unlocked", []string{"basicfw-agent lock"}, 3},
		{"unlocked and drifted", []func(*Input){unlock, drift}, "unlocked drifted", []string{"basicfw-agent verify --repair", "basicfw-agent lock"}, 3},
		{"failsafe and drifted", []func(*Input){failsafe, drift}, "failsafe drifted", []string{"basicfw-agent verify --repair", "basicfw-agent bootstrap"}, 3},
		{"pending", []func(*Input){pending}, "pending", []string{"basicfw-agent confirm"}, 3},
		{"unlocked and pending", []func(*Input){unlock, pending}, "unlocked pending", []string{"basicfw-agent confirm", "basicfw-agent lock"}, 3},
		{"drifted and pending", []func(*Input){drift, pending}, "drifted pending", []string{"basicfw-agent confirm", "basicfw-agent verify --repair"}, 3},
		{"exposed", []func(*Input){exposed}, "exposed", []string{}, 3},
		{"blocked", []func(*Input){blocked}, "blocked", []string{}, 3},
		{"exposed within a limit", []func(*Input){sometimes}, "protected", []string{}, 0},
		{"rules of other programs that cannot be read", []func(*Input){unread}, "protected", []string{}, 0},
		{"unreadable and exposed", []func(*Input){exposed, unreadable}, "drifted", []string{"basicfw-agent bootstrap"}, 3},
		{"everything", []func(*Input){failsafe, unlock, exposed, blocked, pending, drift, open}, "unprotected failsafe unlocked drifted exposed blocked pending",
			[]string{"basicfw-agent confirm", "basicfw-agent verify --repair", "iptables -D INPUT -j ACCEPT", "basicfw-agent bootstrap", "basicfw-agent lock"}, 3},
	} {
		in := ordinary(t)
		for _, change := range tt.change {
			change(&in)
		}
		s := New(in)
		if got := strings.Join(s.Conditions, " "); got != tt.conditions || s.State != s.Conditions[0] || s.ExitCode() != tt.exit {
			t.Errorf("%s: conditions %q, state %q, exit code %d", tt.name, got, s.State, s.ExitCode())
		}
		if diff := cmp.Diff(tt.next, s.Next); diff != "" {
			t.Errorf("%s: next (-want +got):\n%s", tt.name, diff)
		}
		if explained := s.State != Protected && s.State != Pending && s.Conditions[0] != Unlocked; explained && s.Why == "" {
			t.Errorf("%s: Why is empty", tt.name)
		}
	}
}

// TestListening checks whether a listener is reachable, and the command to open it.
func TestListening(t *testing.T) {
	tcp := func(port uint16) host.Listener { return host.Listener{Proto: firewall.TCP, Port: port} }
	const yes, no, unknown = "reachable", "closed", "unknown"
	for _, tt := range []struct {
		name     string
		change   func(*Input)
		beside   string // rules of another program, of the table filter
		listener host.Listener
		want     string
		command  string
	}{
		{"the profile's", func(*Input) {}, "", tcp(80), yes, ""},
		{"another", func(*Input) {}, "", tcp(8080), no, "basicfw-agent open 8080/tcp"},
		{"SSH", func(*Input) {}, "", tcp(22), yes, ""},
		{"a larger profile's", func(in *Input) {
			more := in.State.Desired.Profile
			more.Name, more.Services = "more", append(slices.Clone(more.Services), firewall.Service{Name: "smtp", Proto: firewall.TCP, Ports: firewall.Port(25)})
			in.Facts.Profiles = []firewall.Profile{more, in.State.Desired.Profile, {Name: "other", Services: more.Services[1:]}}
		}, "", tcp(25), no, "basicfw-agent bootstrap --profile more"},
		{"SSH that is blocked", func(in *Input) {
			in.State.Desired.SSH.Allow, in.State.Desired.SSH.Nobody = nil, true
		}, "", tcp(22), no, "basicfw-agent ssh allow YOUR-ADDRESS"},
		{"opened on a zone without an interface", func(in *Input) {
			in.State.Desired.Open = []firewall.Service{{Name: "db", Proto: firewall.TCP, Ports: firewall.Port(5432), On: "private"}}
		}, "", tcp(5432), no, ""},
		{"an unreadable state", func(in *Input) { in.Err = errors.New("broken") }, "", tcp(80), yes, ""},
		{"an unreadable state, and a closed port", func(in *Input) { in.Err = errors.New("broken") }, "", tcp(8080), no, ""},
		{"before bootstrap", func(in *Input) { *in = Input{Err: store.ErrNone, Facts: in.Facts} }, "", tcp(8080), yes, ""},
		{"rules that cannot be read", func(in *Input) { in.LiveErr = errors.New("broken") }, "", tcp(80), yes, ""},
		{"everything is closed", func(*Input) {}, "-A INPUT -j DROP", host.Listener{Proto: firewall.UDP, Port: 68}, no, "basicfw-agent open 68/udp"},
		{"the profile's is closed", func(in *Input) { in.Facts.Interfaces[1].Addresses = in.Facts.Interfaces[1].Addresses[:1] }, "-A INPUT -j DROP", tcp(80), no, ""},
		{"one family is closed", func(*Input) {}, "-A INPUT -j DROP", tcp(80), yes, ""},
		{"another program accepts a range", func(*Input) {}, "-A INPUT -p tcp -m tcp --dport 8000:8090 -j ACCEPT", tcp(8080), yes, ""},
		{"another program accepts all", func(*Input) {}, "-A INPUT -j ACCEPT", tcp(8080), yes, ""},
		{"another program accepts some perhaps", func(*Input) {}, "-A INPUT -s 203.0.113.7/32 -m limit --limit 3/min -j ACCEPT", tcp(8080), yes, ""},
		{"another program accepts on loopback", func(*Input) {}, "-A INPUT -i lo -j ACCEPT", tcp(8080), no, "basicfw-agent open 8080/tcp"},
		{"another program accepts from containers", func(*Input) {}, "-A INPUT -i docker0 -j ACCEPT", tcp(8080), yes, ""},
		{"another program accepts on a trusted interface", func(*Input) {}, "-A INPUT -i wg0 -j ACCEPT", tcp(8080), no, "basicfw-agent open 8080/tcp"},
		{"another program drops", func(*Input) {}, "-A INPUT -p tcp -m tcp --dport 8080 -j DROP", tcp(8080), no, "basicfw-agent open 8080/tcp"},
	} {
		in := ordinary(t)
		in.Facts.Interfaces = append(in.Facts.Interfaces,
			firewall.Interface{Name: "docker0", Zone: firewall.VirtualZone, Addresses: []netip.Prefix{netip.MustParsePrefix("172.17.0.1/16")}},
			firewall.Interface{Name: "wg0", Zone: firewall.TrustedZone, Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/24")}})
		tt.change(&in)
		if in.Err == nil {
			compile(t, &in)
		}
		if tt.beside != "" {
			beside(t, &in, "filter", tt.beside)
		}
		in.Facts.Listeners = []host.Listener{tt.listener}
		got := New(in).Listening[0]
		state := unknown
		if got.Reachable != nil {
			state = map[bool]string{true: yes, false: no}[*got.Reachable]
		}
		if state != tt.want || got.OpenCommand != tt.command {
			t.Errorf("%s: %s, %q; want %s, %q", tt.name, state, got.OpenCommand, tt.want, tt.command)
		}
	}
}

// TestNewIsLinear checks that twice as many listeners take about twice the work.
func TestNewIsLinear(t *testing.T) {
	work := func(n int) float64 {
		in := ordinary(t)
		in.Facts.Profiles = []firewall.Profile{in.State.Desired.Profile}
		for i := range n {
			in.Facts.Listeners = append(in.Facts.Listeners, host.Listener{Proto: firewall.TCP, Port: uint16(10000 + i)})
		}
		return testing.AllocsPerRun(1, func() { New(in) })
	}
	if one, two := work(5000), work(10000); two > 3*one {
		t.Errorf("%.0f allocations for 5000 listeners, %.0f for 10000", one, two)
	}
}

// TestPublic checks that neither the status for all users nor the login message contains a
// client address, from wherever it comes, and that the original status is unchanged.
func TestPublic(t *testing.T) {
	const secret, chain = "198.51.100.77", "c198.51.100.77"
	p := netip.MustParsePrefix(secret + "/32")
	fail := errors.New("connecting from admin:" + secret)
	in := ordinary(t)
	until := in.Now.Time.Add(time.Hour)
	in.State.Failsafe = "client_ip " + secret
	in.State.Profile = store.Choice{Name: "web-only", Source: secret, Reason: secret}
	in.State.Backend = store.Choice{Name: "iptables", Source: secret, Reason: secret}
	in.State.Client = store.Client{Source: "session", Reason: secret, Allow: []netip.Prefix{p}}
	ssh := &in.State.Desired.SSH
	ssh.Allow, ssh.Timed = []netip.Prefix{p}, []firewall.TimedSource{{From: p, Until: until}}
	ssh.Probation = &firewall.Probation{Window: firewall.Window{Until: until}}
	in.State.Desired.Unlock = &firewall.Unlock{From: []netip.Prefix{p}, Window: firewall.Window{Until: until}}
	in.State.Desired.Open = []firewall.Service{{Name: "db", Proto: firewall.TCP, Ports: firewall.Port(1), From: []netip.Prefix{p}, Source: secret}}
	in.Facts.Session, in.Facts.Seen = &host.Session{Addr: p.Addr(), Prefix: p, Reason: secret}, []netip.Prefix{p}
	in.Facts.Listeners = []host.Listener{{Proto: firewall.TCP, Port: 8080, Process: secret + ":4444"}}
	in.Facts.LoginWarnings, in.Facts.Instance, in.Facts.SSHWhy = []string{secret}, secret, []string{secret}
	in.Drift = []firewall.Drift{{Family: "ipv4", Chain: chain, Kind: firewall.Altered, Want: secret, Got: secret}, {Chain: secret, Kind: firewall.Extra}}
	in.RepairPaused = []string{secret}
	compile(t, &in)
	in.Facts.Interfaces = slices.Clone(in.Facts.Interfaces)
	in.Facts.Interfaces[1].Reason = secret
	beside(t, &in, "filter", "-A INPUT -m comment --comment "+secret+" -j "+chain+"\n-A "+chain+" -s "+secret+"/32 -p tcp -m tcp --dport 8080 -j ACCEPT\n-A INPUT -s "+secret+"/32 -m limit --limit 3/min -j ACCEPT")
	beside(t, &in, "raw", "-A PREROUTING -s "+secret+"/32 -p tcp -m tcp --dport 1 -m comment --comment admin:"+secret+" -j DROP")
	beside(t, &in, "nat", "-A PREROUTING -j "+chain+"\n-A "+chain+" -d 198.51.100.77/32 -p tcp -m tcp --dport 9999 -j DNAT --to-destination "+secret+":4444")
	in.Inspection.Foreign = []firewall.Foreign{{Rule: "-s " + secret}}
	in.Inspection.Backend = secret
	in.Inspection.Exposed = []backend.Finding{{Family: firewall.IPv4, Why: secret, Next: "iptables -D INPUT -s " + secret}}
	in.Inspection.LockedOut = in.Inspection.Exposed
	in.Inspection.Warnings, in.Warnings = []string{secret}, []string{secret}
	in.ConflictsErr, in.SettingsErr, in.InspectionErr = fail, fail, fail
	unread, limited, lost := in, in, in
	unread.LiveErr = fail
	limited.State.Desired.SSH, limited.State.Client.Source = firewall.SSH{Mode: firewall.SSHLimited, Ports: []uint16{22}}, store.Unconfirmed
	lost.Err = fail
	for name, in := range map[string]Input{"read": in, "not read": unread, "limited": limited, "lost": lost} {
		s := New(in)
		before, _ := json.Marshal(s)
		public, err := json.Marshal(s.Redacted())
		if err != nil || strings.Contains(string(public), secret) {
			t.Errorf("%s: %v, %s", name, err, public)
		}
		if text := s.Message(); text == "" || strings.Contains(text, secret) {
			t.Errorf("%s: the login message: %s", name, text)
		}
		if after, _ := json.Marshal(s); string(after) != string(before) {
			t.Errorf("%s: the original status has changed:\n%s\n%s", name, before, after)
		}
	}
	s := New(in)
	text := fmt.Sprint(s.Exposure, s.Forwarded, s.Listening, s.Warnings)
	for _, part := range []string{secret + ":4444", chain, "admin:" + secret} {
		if !strings.Contains(text, part) {
			t.Errorf("the whole status does not contain %q: this test proves less\n%s", part, text)
		}
	}
	for _, code := range []string{Exposed, Blocked, "open-sometimes"} {
		if !slices.ContainsFunc(s.Warnings, func(w Warning) bool { return w.Code == code && strings.Contains(w.Text, secret) }) {
			t.Errorf("no warning %s with a client address in %+v", code, s.Warnings)
		}
	}
	if public := s.Redacted(); len(public.Warnings) != len(s.Warnings) || !slices.Contains(public.Next, bootstrapCommand) || !slices.Contains(public.Next, confirmCommand) {
		t.Errorf("too much is left out: %+v", public)
	}
}

// TestRedactedKeeps checks which texts of a status all users may read. None of them can hold
// a text from elsewhere. A new field is left out unless it is listed here.
func TestRedactedKeeps(t *testing.T) {
	const secret = "admin:198.51.100.7"
	var s Status
	fill(reflect.ValueOf(&s).Elem(), secret)
	s.Warnings = nil
	for _, r := range rows {
		if r.text != "" && !r.public {
			s.Warnings = append(s.Warnings, Warning{Code: r.code, Severity: r.severity, Text: secret, Fix: secret})
		}
	}
	data, err := json.Marshal(s.Redacted())
	if err != nil {
		t.Fatal(err)
	}
	var decoded any
	if err := json.Unmarshal(data, &decoded); err != nil {
		t.Fatal(err)
	}
	want := []string{"backend.name", "block.name", "conditions", "conflicts", "drift.family", "drift.kind", "families.ipv4", "families.ipv6",
		"foreign.chain", "foreign.effect", "foreign.family", "forwarded.family", "forwarded.port", "forwarded.program", "forwarded.proto",
		"interfaces.ipv4", "interfaces.kind", "interfaces.mac", "interfaces.master", "interfaces.name", "interfaces.zone", "listening.open_command", "listening.proto",
		"open.limit", "open.name", "open.ports", "open.proto", "open.via", "open.zone", "persisted.path", "profile.name", "rolled_back", "ssh.limit", "ssh.mode", "ssh.source", "state", "version"}
	if diff := cmp.Diff(want, holding(decoded, secret)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if text := s.Message(); text == "" || strings.Contains(text, secret) {
		t.Errorf("the login message: %s", text)
	}
}

// fill sets every text in a value to text, and gives each list and pointer an element.
func fill(v reflect.Value, text string) {
	switch v.Kind() {
	case reflect.String:
		if v.CanSet() {
			v.SetString(text)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i), text)
		}
	case reflect.Slice:
		if v.CanSet() {
			v.Set(reflect.MakeSlice(v.Type(), 1, 1))
			fill(v.Index(0), text)
		}
	case reflect.Pointer:
		if v.CanSet() && v.Type() != reflect.TypeFor[*time.Location]() {
			v.Set(reflect.New(v.Type().Elem()))
			fill(v.Elem(), text)
		}
	}
}

// holding returns the paths in a decoded JSON value whose text contains a text, sorted.
func holding(v any, text string) (paths []string) {
	add := func(prefix string, v any) {
		for _, p := range holding(v, text) {
			paths = append(paths, strings.Trim(prefix+"."+p, "."))
		}
	}
	switch v := v.(type) {
	case string:
		if strings.Contains(v, text) {
			return []string{""}
		}
	case []any:
		for _, e := range v {
			add("", e)
		}
	case map[string]any:
		for k, e := range v {
			add(k, e)
		}
	}
	slices.Sort(paths)
	return slices.Compact(paths)
}

// TestWarnings checks that codes are well formed and unique, that severities are known, and
// that each row of the table is used, with all arguments of its text.
func TestWarnings(t *testing.T) {
	seen := map[string]bool{}
	use := func(in Input) {
		in.SettingsErr, in.BackupLost = errors.New("x"), true
		s := New(in)
		for _, w := range s.Warnings {
			seen[w.Code] = true
			if strings.Contains(w.Text, "%!") || w.Text == "" {
				t.Errorf("%s: %q", w.Code, w.Text)
			}
		}
	}
	stranger := host.Session{Addr: netip.MustParseAddr("198.51.100.7")}
	in := ordinary(t)
	in.Version = "2"
	in.Facts.Session, in.Facts.LoginWarnings, in.Facts.KeptLists = &stranger, []string{"x"}, []string{"x"}
	in.Facts.Conntrack = host.Conntrack{Count: 9, Max: 10}
	beside(t, &in, "nat", "-A PREROUTING -p tcp -m tcp --dport 1 -j DNAT --to-destination 172.17.0.2")
	beside(t, &in, "filter", "-A INPUT -p tcp -m tcp --dport 8080 -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 8081 -m limit --limit 3/min -j ACCEPT")
	beside(t, &in, "raw", "-A PREROUTING -p tcp -m tcp --dport 80 -j DROP")
	in.Conflicts, in.ConflictsErr = []firewall.Conflict{{Name: "a", Active: true}, {Name: "b", Enabled: true}}, errors.New("x")
	in.Inspection.Warnings, in.Warnings = []string{"x"}, []string{"x"}
	in.Inspection.LockedOut = []backend.Finding{{Family: firewall.IPv4, Why: "x", Next: "x"}}
	in.Drift, in.RepairPaused, in.State.RolledBack = []firewall.Drift{{}}, []string{"x"}, "x"
	in.State.Desired.Open = []firewall.Service{{Name: "db", Proto: firewall.TCP, Ports: firewall.Port(1), On: "private"}, {Name: "lan", Proto: firewall.TCP, Ports: firewall.Port(2), On: "eth9"}}
	in.State.Desired.Interfaces = append(slices.Clone(in.State.Desired.Interfaces), firewall.Interface{Name: "eth9", Master: "blue"})
	in.State.Desired.SSH.Ports = []uint16{22, 80}
	in.State.Named = &host.Naming{Trusted: []string{"wg9"}}
	in.State.Desired.SSH.Allow = in.State.Desired.SSH.Allow[:1]
	in.State.Desired.SSH.Probation = &firewall.Probation{Window: firewall.Window{Until: in.Now.Time.Add(time.Hour)}}
	use(in)
	in.State.Desired.SSH = firewall.SSH{Mode: firewall.SSHPinned}
	use(in)
	in.State.Desired.SSH, in.State.Client.Source, in.State.Desired.Published = firewall.SSH{Mode: firewall.SSHLimited}, "none", ""
	use(in)
	use(Input{LiveErr: errors.New("x"), Err: store.ErrNone, Report: verify.Report{Inspection: backend.Inspection{Present: true}}, InspectionErr: errors.New("x")})
	for _, h := range hazards(t) {
		in := ordinary(t)
		h.make(&in)
		use(in)
	}
	codes := map[string]bool{}
	for _, r := range rows {
		if codes[r.code] || strings.Trim(r.code, "abcdefghijklmnopqrstuvwxyz-") != "" {
			t.Errorf("code %q", r.code)
		}
		codes[r.code] = true
		if known := slices.Contains([]string{Info, Warn, Critical}, r.severity); known != (r.text != "") || seen[r.code] != known {
			t.Errorf("%s: severity %q, used %v", r.code, r.severity, seen[r.code])
		}
	}
}
