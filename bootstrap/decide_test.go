package bootstrap

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/profiles"
)

// input returns the input of a machine where only sshd was found, with the text of
// agent.ini.
func input(t *testing.T, ini string) Input {
	t.Helper()
	sys := &system.System{Root: t.TempDir()}
	path := filepath.Join(sys.Root, settings.DefaultFile)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(ini), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := settings.Load(sys, "")
	if err != nil {
		t.Fatal(err)
	}
	set, err := profiles.Load(sys)
	if err != nil {
		t.Fatal(err)
	}
	return Input{Settings: s, Profiles: set, Now: firewall.Moment{Time: now},
		Facts: host.Facts{SSHPorts: []uint16{22}, SSHWhy: []string{"sshd listens on it"}, Instance: "i-1"},
		CheckClient: func(p netip.Prefix) (string, error) {
			if p.Addr().IsPrivate() {
				return "", errors.New("private, and no route leads there")
			}
			return "", nil
		}}
}

// now is the current time in the tests.
var now = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

// summary returns a state in one line: the profile and its source, SSH and the
// client's source, the allowed networks, and the end of the probation.
func summary(st store.State) string {
	var allow []string
	for _, p := range st.Desired.SSH.Allow {
		allow = append(allow, firewall.FormatPrefix(p))
	}
	if p := st.Desired.SSH.Probation; p != nil {
		allow = append(allow, "until "+p.Until.Format("15:04"))
	}
	return fmt.Sprintf("%s %s; %s %s %v %s", st.Profile.Name, st.Profile.Source, st.Desired.SSH.Mode, st.Client.Source, st.Desired.SSH.Ports, strings.Join(allow, " "))
}

func session(addr string) *host.Session {
	a := netip.MustParseAddr(addr)
	return &host.Session{Addr: a, Prefix: netip.PrefixFrom(a, a.BitLen()), Reason: "its session"}
}

func TestDecide(t *testing.T) {
	const ini = settings.DefaultFile
	mail := []host.Listener{{Proto: firewall.UDP, Port: 25}, {Proto: firewall.TCP, Port: 993, Process: "dovecot"}}
	before := func(change func(*store.State)) *store.State {
		st := store.State{InstanceID: "i-1", Profile: store.Choice{Name: "web+mail", Source: "detected", Reason: "then"},
			Client: store.Client{Source: "session", Allow: []netip.Prefix{netip.MustParsePrefix("198.51.100.1/32")}}}
		change(&st)
		return &st
	}
	onProbation := func(since time.Duration) func(*store.State) {
		return func(s *store.State) {
			ssh := &s.Desired.SSH
			ssh.Mode = firewall.SSHPinned
			ssh.Probation = &firewall.Probation{Window: firewall.NewWindow(firewall.Moment{Time: now.Add(since)}, 30*time.Minute)}
		}
	}
	seen := []netip.Prefix{netip.MustParsePrefix("198.51.100.9/32"), netip.MustParsePrefix("2001:db8:1::/64")}
	for _, tt := range []struct {
		name, ini, want string
		change          func(*Input)
	}{
		{"nothing known", "", "web-only detected; limited none [22] ", nil},
		{"a session", "", "web-only detected; pinned session [22] 198.51.100.9 until 12:30", func(in *Input) { in.Facts.Session = session("198.51.100.9") }},
		{"sshd on a port of the profile", "", "web-only detected; limited none [22 443] ", func(in *Input) {
			in.Facts.SSHPorts, in.Facts.SSHWhy = []uint16{22, 443}, []string{"sshd listens on it", "sshd listens on it"}
		}},
		{"a session by another port", "", "web-only detected; limited none [22 2222] ", func(in *Input) {
			in.Facts.SSHPorts, in.Facts.SSHWhy = []uint16{22, 2222}, []string{"sshd listens on it", host.SessionPort}
		}},
		{"a session by a port that is open anyway", "[open]\nx = 2222/tcp", "web-only detected; limited none [22] ", func(in *Input) {
			in.Facts.SSHPorts, in.Facts.SSHWhy = []uint16{22, 2222}, []string{"sshd listens on it", host.SessionPort}
		}},
		{"only a session by a port that is open anyway", "[open]\nx = 2222/tcp", "web-only detected; limited none [22] ", func(in *Input) {
			in.Facts.SSHPorts, in.Facts.SSHWhy = []uint16{2222}, []string{host.SessionPort}
		}},
		{"an earlier session by another port", "", "web+mail detected; pinned session [22 2222] 198.51.100.1", func(in *Input) {
			in.Previous = before(func(s *store.State) {
				s.Desired.SSH.Ports, s.SSHPorts = []uint16{22, 2222, 2223}, []string{"sshd listens on it", host.SessionPort, "sshd listens on it"}
			})
		}},
		{"an earlier session by another port, detected again", "", "web-only detected; limited none [22] ", func(in *Input) {
			in.Redetect, in.Previous = true, before(func(s *store.State) { s.Desired.SSH.Ports, s.SSHPorts = []uint16{2222}, []string{host.SessionPort} })
		}},
		{"other users logged in", "", "web-only detected; pinned session [22] 198.51.100.9 2001:db8:1::/64 until 12:30", func(in *Input) { in.Facts.Seen = seen }},
		{"a session precedes other users", "", "web-only detected; pinned session [22] 198.51.100.7 until 12:30", func(in *Input) {
			in.Facts.Seen, in.Facts.Session = seen, session("198.51.100.7")
		}},
		{"a session, with a longer probation", "[ssh]\nconfirm_within = 2h\n", "web-only detected; pinned session [22] 198.51.100.9 until 14:00",
			func(in *Input) { in.Facts.Session = session("198.51.100.9") }},
		{"a session, without probation", "[ssh]\nconfirm_within = 0\n", "web-only detected; pinned session [22] 198.51.100.9",
			func(in *Input) { in.Facts.Session = session("198.51.100.9") }},
		{"a session and a listed address", "[ssh]\nallow = client, 203.0.113.9\n", "web-only detected; pinned session [22] 198.51.100.9 203.0.113.9",
			func(in *Input) { in.Facts.Session = session("198.51.100.9") }},
		{"a session and a temporary address", "[ssh]\nallow = client, 203.0.113.9 until 2026-11-24T13:00:00Z\n", "web-only detected; pinned session [22] 198.51.100.9 until 12:30",
			func(in *Input) { in.Facts.Session = session("198.51.100.9") }},
		{"still on probation", "", "web+mail detected; pinned session [22] 198.51.100.1 until 12:20",
			func(in *Input) { in.Previous = before(onProbation(-10 * time.Minute)) }},
		{"on probation, with a new length", "[ssh]\nconfirm_within = 1h\n", "web+mail detected; pinned session [22] 198.51.100.1 until 13:00",
			func(in *Input) { in.Previous = before(onProbation(-10 * time.Minute)) }},
		{"probation turned off", "[ssh]\nconfirm_within = 0\n", "web+mail detected; pinned session [22] 198.51.100.1",
			func(in *Input) { in.Previous = before(onProbation(-10 * time.Minute)) }},
		{"probation has ended", "", "web+mail detected; limited unconfirmed [22] 198.51.100.1",
			func(in *Input) { in.Previous = before(onProbation(-40 * time.Minute)) }},
		{"probation has ended, with a listed address", "[ssh]\nallow = client, 203.0.113.9\n", "web+mail detected; pinned unconfirmed [22] 198.51.100.1 203.0.113.9",
			func(in *Input) { in.Previous = before(onProbation(-40 * time.Minute)) }},
		{"probation has ended, then redetect", "", "web-only detected; pinned session [22] 198.51.100.9 until 12:30", func(in *Input) {
			in.Previous = before(onProbation(-40 * time.Minute))
			in.Facts.Session, in.Redetect = session("198.51.100.9"), true
		}},
		{"a named client precedes the session", "[ssh]\nclient_ip = 203.0.113.9, 2001:db8::/64\n", "web-only detected; pinned named [22] 203.0.113.9 2001:db8::/64",
			func(in *Input) { in.Facts.Session = session("198.51.100.9") }},
		{"a list", "[ssh]\nallow = 203.0.113.0/24\nclient_ip = 198.51.100.9\n", "web-only detected; pinned settings [22] 203.0.113.0/24", nil},
		{"any", "[ssh]\nallow = any\n", "web-only detected; limited any [22] ", nil},
		{"any, with a client exempt from the limit", "[ssh]\nallow = any\nclient_ip = 203.0.113.9\n", "web-only detected; limited any [22] 203.0.113.9", nil},
		{"mail listens", "", "web+mail detected; limited none [22] ", func(in *Input) { in.Facts.Listeners = mail }},
		{"UDP is not mail", "", "web-only detected; limited none [22] ", func(in *Input) { in.Facts.Listeners = mail[:1] }},
		{"a profile from the settings", "[agent]\nprofile = web-mail\n", "web+mail " + ini + "; limited none [22] ", nil},
		{"ports from the settings", "[ssh]\nports = 2222\n", "web-only detected; limited none [2222] ", nil},
		{"an earlier detection stays", "", "web+mail detected; pinned session [22] 198.51.100.1",
			func(in *Input) {
				in.Previous = before(func(*store.State) {})
				in.Facts.Session = session("198.51.100.9")
			}},
		{"an earlier detection of no client stays", "", "web+mail detected; limited none [22] ", func(in *Input) {
			in.Previous = before(func(s *store.State) { s.Client = store.Client{Source: "none"} })
			in.Facts.Session = session("198.51.100.9")
		}},
		{"redetect", "", "web-only detected; pinned session [22] 198.51.100.9 until 12:30", func(in *Input) {
			in.Previous = before(func(*store.State) {})
			in.Facts.Session, in.Redetect = session("198.51.100.9"), true
		}},
		{"a client that is no longer named", "", "web+mail detected; limited none [22] ",
			func(in *Input) { in.Previous = before(func(s *store.State) { s.Client.Source = "named" }) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := input(t, tt.ini)
			if tt.change != nil {
				tt.change(&in)
			}
			st, _, err := Decide(in)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, summary(st)); diff != "" {
				t.Error(diff)
			}
			again, err := firewall.Compile(st.Desired)
			if err != nil || !again.Equal(st.Ruleset) {
				t.Errorf("the ruleset differs from the compiled desired state: %v", err)
			}
		})
	}
}

// The error names a refused flag once.
func TestDecideRefusesFlags(t *testing.T) {
	for _, tt := range []struct{ section, key, value, flag, want string }{
		{"ssh", "client_ip", "10.0.0.9", "--client-ip", "--client-ip: private"},
		{"agent", "profile", "nosuch", "--profile", `--profile: unknown profile "nosuch": `},
	} {
		in := input(t, "")
		if err := in.Settings.Set(tt.section, tt.key, tt.value, tt.flag); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Decide(in); err == nil || !strings.HasPrefix(err.Error(), tt.want) {
			t.Errorf("%v, want %s", err, tt.want)
		}
	}
}

func TestDecideRefuses(t *testing.T) {
	for _, tt := range []struct {
		name, ini, want string
		onlyClient      bool
	}{
		{"a private client", "[ssh]\nclient_ip = 10.0.0.9, 203.0.113.9\n", "agent.ini:2: ssh.client_ip: private", true},
		{"an unknown profile", "[agent]\nprofile = nosuch\n", "agent.ini:2: agent.profile: ", false},
		{"sshd's port", "[open]\nme = 20-30/tcp\n", "agent.ini:2: me = 20-30/tcp contains port 22", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := input(t, tt.ini)
			in.Facts.Session = session("198.51.100.9") // must not replace a refused client
			_, _, err := Decide(in)
			var invalid *InvalidError
			if !errors.As(err, &invalid) || !strings.Contains(err.Error(), tt.want) || invalid.OnlyClient != tt.onlyClient {
				t.Errorf("%v", err)
			}
		})
	}
}
