package settings

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// edited is a machine's settings before an edit.
type edited struct {
	owner, local string
	clients      []string // named by a flag and kept in local.ini, or detected
	open         bool     // SSH, to any address
}

var editNow = time.Date(2026, 11, 24, 10, 0, 0, 0, time.UTC)

func (m edited) editor(t *testing.T) (Editor, *system.System) {
	t.Helper()
	sys := &system.System{Root: t.TempDir()}
	if err := os.MkdirAll(filepath.Join(sys.Root, "etc/basicfw"), 0o755); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{DefaultFile: m.owner, LocalFile(""): m.local} {
		if err := os.WriteFile(filepath.Join(sys.Root, path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Load(sys, "")
	if err != nil {
		t.Fatal(err)
	}
	e := Editor{Settings: s, Local: LocalFile(""), SSHPorts: []uint16{22, 2222}, Now: firewall.Moment{Time: editNow}, SSHOpen: m.open, Profile: firewall.Profile{Name: "web-only", Services: []firewall.Service{
		{Name: "http", Proto: firewall.TCP, Ports: firewall.Port(80), On: "any", Source: "profile web-only"},
		{Name: "https", Proto: firewall.TCP, Ports: firewall.Port(443), On: "any", Source: "profile web-only"}}}}
	for _, c := range m.clients {
		e.Clients = append(e.Clients, netip.MustParsePrefix(c))
	}
	return e, sys
}

// wantEdit compares the local.ini that results from an edit, and its output.
func wantEdit(t *testing.T, m edited, e Edit, err error, want, said string) {
	t.Helper()
	if err != nil {
		if want != "" || !strings.Contains(err.Error()+"\nhint: "+hint.Of(err), said) {
			t.Errorf("error %q, want local.ini %q, %q", err, want, said)
		}
		return
	}
	text, err := SetLocal(LocalFile(""), []byte(m.local), e.Changes)
	if err != nil {
		t.Fatal(err)
	}
	if got := string(text); got != want {
		t.Errorf("local.ini is\n%s\nwant\n%s", got, want)
	}
	if all := strings.Join(e.Said, "\n"); !strings.Contains(all, said) {
		t.Errorf("said %q, want %q", all, said)
	}
}

func TestOpen(t *testing.T) {
	const top = "; mine\n[open]\n"
	for _, tt := range []struct {
		name string
		edited
		service, value string // as in a settings file; service may be empty
		want, said     string // if want is empty, said is part of an error
	}{
		{"a port", edited{local: top}, "", "8080/tcp", top + "tcp-8080 = 8080/tcp\n", "8080/tcp is open: tcp-8080 = 8080/tcp"},
		{"a range", edited{local: top}, "", "40000-40100/udp", top + "udp-40000-40100 = 40000-40100/udp\n", "is open"},
		{"all options", edited{local: top}, "db", "5432/tcp on private from 10.0.0.0/8, 192.0.2.1 until 2026-11-24T18:00:00Z",
			top + "db = 5432/tcp on private from 10.0.0.0/8, 192.0.2.1 until 2026-11-24T18:00:00Z\n", "is open"},
		{"again", edited{local: top + "x = 8080/tcp ; c\n"}, "", "8080/tcp", top + "x = 8080/tcp ; c\n", "nothing changed: 8080/tcp is already open (x = 8080/tcp in /etc/basicfw/local.ini:3)"},
		{"again, by another name", edited{local: top + "x = 8080/tcp\n"}, "y", "8080/tcp", top + "x = 8080/tcp\n", "nothing changed"},
		{"a port of the profile", edited{local: top}, "", "443/tcp", top, "https = 443/tcp in profile web-only"},
		{"a part of a range", edited{local: top + "x = 8000-8100/tcp\n"}, "", "8080/tcp", top + "x = 8000-8100/tcp\n", "nothing changed: 8080/tcp is already open, also to more clients"},
		{"more than a range", edited{local: top + "x = 8000-8100/tcp\n"}, "", "8000-8200/tcp", top + "x = 8000-8100/tcp\ntcp-8000-8200 = 8000-8200/tcp\n", "is open"},
		{"for fewer sources", edited{local: top + "x = 8080/tcp from 10.0.0.0/8\n"}, "", "8080/tcp from 10.1.0.0/16", top + "x = 8080/tcp from 10.0.0.0/8\n", "to narrow it, close it first"},
		{"for other sources", edited{local: top + "tcp-8080 = 8080/tcp from 10.0.0.0/8\n"}, "", "8080/tcp from 192.0.2.0/24",
			top + "tcp-8080 = 8080/tcp from 10.0.0.0/8\ntcp-8080-2 = 8080/tcp from 192.0.2.0/24\n", "tcp-8080-2"},
		{"on another interface", edited{local: top + "x = 8080/tcp on eth0\n"}, "", "8080/tcp on eth1", top + "x = 8080/tcp on eth0\ntcp-8080 = 8080/tcp on eth1\n", "is open"},
		{"the other protocol", edited{local: top + "x = 8080/tcp\n"}, "", "8080/udp", top + "x = 8080/tcp\nudp-8080 = 8080/udp\n", "is open"},
		{"a later end", edited{local: top + "x = 9000/udp until 2026-11-24T11:00:00Z ; c\n"}, "", "9000/udp until 2026-11-24T12:00:00Z",
			top + "x = 9000/udp until 2026-11-24T12:00:00Z ; c\n", "stays open"},
		{"an earlier end", edited{local: top + "x = 9000/udp until 2026-11-24T12:00:00Z\n"}, "", "9000/udp until 2026-11-24T11:00:00Z",
			top + "x = 9000/udp until 2026-11-24T11:00:00Z\n", "stays open"},
		{"no time limit any more", edited{local: top + "x = 9000/udp until 2026-11-24T12:00:00Z\n"}, "", "9000/udp", top + "x = 9000/udp\n", "stays open"},
		{"a time limit for a permanent service", edited{local: top + "x = 9000/udp\n"}, "", "9000/udp until 2026-11-24T12:00:00Z", top + "x = 9000/udp\n", "nothing changed: 9000/udp is already open, without a time limit"},
		{"an expired service", edited{local: top + "udp-9000 = 9000/udp until 2026-11-24T09:00:00Z ; c\n"}, "", "9000/udp", top + "udp-9000 = 9000/udp ; c\n", "is open"},
		{"the name of an expired service", edited{local: top + "x = 1/tcp until 2026-11-24T09:00:00Z\n"}, "x", "9000/udp", top + "x = 9000/udp\n", "is open"},
		{"closed by a command", edited{local: top + "http = closed\n"}, "", "80/tcp", "; mine\n", "80/tcp is open again: http = 80/tcp in profile web-only"},
		{"closed by a command, from agent.ini", edited{owner: "[open]\ngame = 9999/udp\n", local: top + "game = closed\n"}, "", "9999/udp", "; mine\n", "open again: game = 9999/udp in /etc/basicfw/agent.ini:2"},
		{"closed by a command, for some sources", edited{local: top + "http = closed\n"}, "", "80/tcp from 10.0.0.0/8", top + "http = closed\ntcp-80 = 80/tcp from 10.0.0.0/8\n", "is open"},
		{"closed by a command, temporarily", edited{local: top + "http = closed\n"}, "", "80/tcp until 2026-11-24T12:00:00Z",
			top + "http = closed\ntcp-80 = 80/tcp until 2026-11-24T12:00:00Z\n", "is open"},
		{"closed in agent.ini", edited{owner: "[open]\nhttp = closed\n", local: top}, "", "80/tcp", top + "tcp-80 = 80/tcp\n", "is open"},
		{"a name that is taken", edited{local: top + "x = 1/tcp\n"}, "x", "8080/tcp", "", `--name "x": already used by x = 1/tcp in /etc/basicfw/local.ini:3`},
		{"the profile's name", edited{local: top}, "http", "8080/tcp", "", "http = 80/tcp in profile web-only"},
		{"sshd's port", edited{local: top}, "", "22/tcp", "", "ssh allow"},
		{"sshd's port in a range", edited{local: top}, "", "2000-3000/tcp", "", "sshd listens on port 2222"},
		{"a reserved word", edited{local: top}, "log", "8080/tcp", "", "service name"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, _ := tt.editor(t)
			want, err := firewall.ParseService("x", tt.value)
			if err != nil {
				t.Fatal(err)
			}
			want.Name = tt.service
			edit, err := e.Open(want)
			wantEdit(t, tt.edited, edit, err, tt.want, tt.said)
		})
	}
}

func TestClose(t *testing.T) {
	const top = "; mine\n[open]\n"
	tcp := func(first, last uint16) CloseRequest {
		return CloseRequest{Ports: firewall.PortRange{First: first, Last: last}, Proto: firewall.TCP}
	}
	from := func(r CloseRequest, networks ...string) CloseRequest {
		for _, n := range networks {
			r.From = append(r.From, netip.MustParsePrefix(n))
		}
		return r
	}
	for _, tt := range []struct {
		name string
		edited
		r          CloseRequest
		want, said string
	}{
		{"opened by a command", edited{local: top + "x = 8080/tcp\ny = 1/tcp\n"}, tcp(8080, 8080), top + "y = 1/tcp\n", "8080/tcp is closed: x removed from /etc/basicfw/local.ini"},
		{"by name", edited{local: top + "x = 8080/tcp\n"}, CloseRequest{Name: "x"}, "; mine\n", "is closed"},
		{"all opened by commands", edited{local: top + "x = 8080/tcp from 10.0.0.0/8\ny = 8080/tcp on eth0\nz = 8080/udp\n"}, tcp(8080, 8080), top + "z = 8080/udp\n", "y removed"},
		{"one interface", edited{local: top + "x = 8080/tcp from 10.0.0.0/8\ny = 8080/tcp on eth0\n"},
			CloseRequest{Ports: firewall.Port(8080), Proto: firewall.TCP, On: "eth0"}, top + "x = 8080/tcp from 10.0.0.0/8\n", "note: 8080/tcp is still open: x"},
		{"one source", edited{local: top + "x = 8080/tcp from 10.0.0.0/8, 192.0.2.0/24\n"}, from(tcp(8080, 8080), "10.0.0.0/8"), top + "x = 8080/tcp from 192.0.2.0/24\n",
			"8080/tcp is closed for 10.0.0.0/8: x = 8080/tcp from 192.0.2.0/24 remains"},
		{"the last source", edited{local: top + "x = 8080/tcp from 10.0.0.0/8\n"}, from(tcp(8080, 8080), "10.0.0.0/8"), "; mine\n", "x removed"},
		{"an unused source", edited{local: top + "x = 8080/tcp from 10.0.0.0/8\n"}, from(tcp(8080, 8080), "10.1.0.0/16"), top + "x = 8080/tcp from 10.0.0.0/8\n", "nothing changed: 8080/tcp is open, but differently: x = 8080/tcp from 10.0.0.0/8"},
		{"a profile service", edited{local: top}, tcp(80, 80), top + "http = closed\n", "http = closed in /etc/basicfw/local.ini overrides http = 80/tcp in profile web-only"},
		{"a profile service by name", edited{local: top}, CloseRequest{Name: "https"}, top + "https = closed\n", "overrides"},
		{"a profile service overridden in local.ini", edited{local: top + "http = 80/tcp from 10.0.0.0/8\n"}, tcp(80, 80), top + "http = closed\n", "overrides"},
		{"a service of agent.ini", edited{owner: "[open]\ngame = 9999/tcp\n", local: top}, tcp(9999, 9999), top + "game = closed\n", "overrides game = 9999/tcp in /etc/basicfw/agent.ini:2"},
		{"one source of a service of agent.ini", edited{owner: "[open]\ngame = 9999/tcp from 10.0.0.0/8, 192.0.2.0/24\n", local: top}, from(tcp(9999, 9999), "10.0.0.0/8"),
			top + "game = 9999/tcp from 192.0.2.0/24\n", "remains"},
		{"a new local.ini", edited{}, tcp(80, 80), localHeader + "\n[open]\nhttp = closed\n", "overrides"},
		{"not open", edited{local: top}, tcp(8080, 8080), top, "nothing changed: 8080/tcp is not open"},
		{"expired", edited{local: top + "x = 8080/tcp until 2026-11-24T09:00:00Z\n"}, tcp(8080, 8080), top + "x = 8080/tcp until 2026-11-24T09:00:00Z\n", "nothing changed"},
		{"already closed", edited{local: top + "http = closed\n"}, tcp(80, 80), top + "http = closed\n", "nothing changed"},
		{"no such name", edited{local: top}, CloseRequest{Name: "nosuch"}, top, "nothing changed: nosuch is not open"},
		{"a part of a range", edited{local: top + "x = 8000-8100/tcp\n"}, tcp(8080, 8080), "", "x = 8000-8100/tcp in /etc/basicfw/local.ini:3\nhint: basicfw-agent close 8000-8100/tcp"},
		{"sshd's port", edited{local: top}, tcp(22, 22), "", "ssh remove"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, _ := tt.editor(t)
			edit, err := e.Close(tt.r)
			wantEdit(t, tt.edited, edit, err, tt.want, tt.said)
		})
	}
}

func TestAllowRemove(t *testing.T) {
	const ssh = "[ssh]\n"
	end := editNow.Add(8 * time.Hour)
	for _, tt := range []struct {
		name string
		edited
		do         string // "+ADDR" allow, "~ADDR" allow temporarily, "-ADDR" remove, "!ADDR" remove by force
		want, said string
	}{
		{"another address", edited{local: ssh, clients: []string{"203.0.113.9/32"}}, "+198.51.100.7/32", ssh + "allow = client, 198.51.100.7\n", "198.51.100.7 may log in"},
		{"a network", edited{local: ssh}, "+2001:db8::/64", ssh + "allow = client, 2001:db8::/64\n", "may log in"},
		{"temporarily", edited{local: ssh}, "~198.51.100.7/32", ssh + "allow = client, 198.51.100.7 until 2026-11-24T18:00:00Z\n", "until 2026-11-24T18:00:00Z"},
		{"the client", edited{local: ssh, clients: []string{"203.0.113.0/24"}}, "+203.0.113.9/32", ssh, "nothing changed: 203.0.113.9 may already log in, as part of 203.0.113.0/24"},
		{"again", edited{local: ssh + "allow = client, 198.51.100.7\n"}, "+198.51.100.7/32", ssh + "allow = client, 198.51.100.7\n", "nothing changed"},
		{"temporarily, already permanent", edited{local: ssh + "allow = client, 198.51.100.7\n"}, "~198.51.100.7/32", ssh + "allow = client, 198.51.100.7\n", "nothing changed"},
		{"permanently, already temporary", edited{local: ssh + "allow = any, 198.51.100.7 until 2026-11-24T12:00:00Z\n"}, "+198.51.100.7/32", ssh + "allow = any, 198.51.100.7\n", "may log in"},
		{"another end", edited{local: ssh + "allow = any, 198.51.100.7 until 2026-11-24T12:00:00Z\n"}, "~198.51.100.7/32", ssh + "allow = any, 198.51.100.7 until 2026-11-24T18:00:00Z\n", "until"},
		{"with a list in agent.ini", edited{owner: ssh + "allow = 203.0.113.9\n", local: ssh}, "+198.51.100.7/32", ssh + "allow = 203.0.113.9, 198.51.100.7\n", "may log in"},
		{"with allow = none", edited{local: ssh + "allow = none\n"}, "+198.51.100.7/32", ssh + "allow = 198.51.100.7\n", "may log in"},
		{"with allow = none, temporarily", edited{local: ssh + "allow = none\n"}, "~198.51.100.7/32", ssh + "allow = none, 198.51.100.7 until 2026-11-24T18:00:00Z\n", "may log in"},
		{"expired entries are removed", edited{local: ssh + "allow = client, 192.0.2.1 until 2026-11-24T09:00:00Z\n"}, "+198.51.100.7/32", ssh + "allow = client, 198.51.100.7\n", "may log in"},

		{"a listed address", edited{local: ssh + "allow = client, 198.51.100.7, 192.0.2.1\n", clients: []string{"203.0.113.9/32"}}, "-198.51.100.7/32", ssh + "allow = client, 192.0.2.1\n", "may no longer log in"},
		{"a temporary address", edited{local: ssh + "allow = client, 198.51.100.7 until 2026-11-24T12:00:00Z\n"}, "-198.51.100.7/32", ssh + "allow = client\n", "no longer"},
		{"a named client", edited{local: ssh + "client_ip = 203.0.113.9, 203.0.113.10\n", clients: []string{"203.0.113.9/32", "203.0.113.10/32"}}, "-203.0.113.9/32", ssh + "client_ip = 203.0.113.10\n", "no longer"},
		{"a client named in agent.ini", edited{owner: ssh + "client_ip = 203.0.113.9, 203.0.113.10\n", local: ssh, clients: []string{"203.0.113.9/32", "203.0.113.10/32"}}, "-203.0.113.9/32",
			ssh + "client_ip = 203.0.113.10\n", "no longer"},
		{"the last named client, other addresses remain", edited{local: ssh + "client_ip = 203.0.113.9\nallow = client, 192.0.2.1\n", clients: []string{"203.0.113.9/32"}}, "-203.0.113.9/32", ssh + "allow = 192.0.2.1\n", "no longer"},
		{"a detected client", edited{local: ssh, clients: []string{"203.0.113.9/32", "2001:db8::/64"}}, "-203.0.113.9/32", ssh + "allow = 2001:db8::/64\n", "no longer"},
		{"the last address", edited{local: ssh, clients: []string{"203.0.113.9/32"}}, "-203.0.113.9/32", "", "no other address may log in permanently\nhint: allow another address first; or use --force"},
		{"the last permanent address", edited{local: ssh + "allow = client, 192.0.2.1 until 2026-11-24T12:00:00Z\n", clients: []string{"203.0.113.9/32"}}, "-203.0.113.9/32", "", "no other address may log in permanently\nhint: allow another address first; or use --force"},
		{"the last address by force", edited{local: ssh + "client_ip = 203.0.113.9\n", clients: []string{"203.0.113.9/32"}}, "!203.0.113.9/32", ssh + "allow = none\n", "no longer"},
		{"the last listed address by force", edited{local: ssh + "allow = client, 192.0.2.1\n"}, "!192.0.2.1/32", ssh + "allow = none\n", "no longer"},
		{"with allow = any", edited{local: ssh + "allow = any, 192.0.2.1\n"}, "-192.0.2.1/32", ssh + "allow = any\n", "192.0.2.1 is no longer listed, but SSH is open to any address"},
		{"not listed, with allow = any", edited{owner: ssh + "allow = any\n", local: ssh, open: true}, "-192.0.2.1/32", ssh, "list addresses in \"allow\" (/etc/basicfw/agent.ini:2) instead of any"},
		{"not listed, no known client", edited{local: ssh, open: true}, "-192.0.2.1/32", ssh, "nothing changed: 192.0.2.1 is not listed, but SSH is open to any address"},
		{"a temporary address, no known client", edited{local: ssh + "allow = client, 192.0.2.1 until 2026-11-24T12:00:00Z\n", open: true}, "-192.0.2.1/32", ssh + "allow = client\n", "192.0.2.1 is no longer listed, but"},
		{"a hint how to restrict SSH", edited{local: ssh, open: true}, "-192.0.2.1/32", ssh, "hint: to restrict SSH to addresses of your choice, run: basicfw-agent ssh allow ADDRESS"},
		{"a part of a network", edited{local: ssh, clients: []string{"2001:db8::/64"}}, "-2001:db8::5/128", "", "2001:db8::5 may log in as part of 2001:db8::/64\nhint: basicfw-agent ssh remove 2001:db8::/64"},
		{"not allowed", edited{local: ssh}, "-192.0.2.1/32", ssh, "nothing changed: 192.0.2.1 was not allowed to log in"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e, sys := tt.editor(t)
			who := []netip.Prefix{netip.MustParsePrefix(tt.do[1:])}
			var edit Edit
			var err error
			switch tt.do[0] {
			case '+':
				edit = e.Allow(who, time.Time{})
			case '~':
				edit = e.Allow(who, end)
			default:
				edit, err = e.Remove(who, tt.do[0] == '!')
			}
			wantEdit(t, tt.edited, edit, err, tt.want, tt.said)
			if errors.Is(err, ErrLast) != strings.Contains(tt.said, "no other address") {
				t.Errorf("%v", err)
			}
			// The written file is valid, and can be changed again.
			if err == nil {
				if _, err := LoadEdited(sys, "", []byte(tt.want)); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

func TestPrune(t *testing.T) {
	m := edited{
		owner: "[open]\nowners = 1/tcp until 2026-11-24T09:00:00Z\n",
		local: "[open]\n; kept\na = 2/tcp until 2026-11-24T09:59:59Z\nb = 3/tcp until 2026-11-24T10:00:00Z ; its last second\nc = 4/tcp\n" +
			"[ssh]\nallow = client, 192.0.2.1 until 2026-11-24T09:00:00Z, 192.0.2.2\n",
	}
	e, _ := m.editor(t)
	wantEdit(t, m, Edit{Changes: e.Prune()}, nil, "[open]\n; kept\nb = 3/tcp until 2026-11-24T10:00:00Z ; its last second\nc = 4/tcp\n[ssh]\nallow = client, 192.0.2.2\n", "")
	m.local = "[open]\nc = 4/tcp\n"
	if e, _ := m.editor(t); len(e.Prune()) > 0 {
		t.Errorf("pruned with nothing expired: %v", e.Prune())
	}
}
