package sshd

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// sessionFile returns a session file of systemd-logind 252 with replacements.
func sessionFile(changes ...string) string {
	text := `# This is private data. Do not parse.
UID=0
USER=root
ACTIVE=1
IS_DISPLAY=0
STATE=active
REMOTE=1
TYPE=tty
CLASS=user
SCOPE=session-3.scope
FIFO=/run/systemd/sessions/3.ref
TTY=pts/0
REMOTE_HOST=198.51.100.7
SERVICE=sshd
LEADER=600
AUDIT=3
REALTIME=1700000000000000
MONOTONIC=100000000
`
	return strings.NewReplacer(changes...).Replace(text)
}

// utmpRecord returns a struct utmp record.
func utmpRecord(layout utmpLayout, kind uint16, line, user, host, addr string) string {
	r := make([]byte, layout.size)
	binary.NativeEndian.PutUint16(r, kind)
	binary.NativeEndian.PutUint32(r[4:], 600)
	copy(r[8:40], line)
	copy(r[44:76], user)
	copy(r[76:332], host)
	if addr != "" {
		copy(r[layout.addr:], netip.MustParseAddr(addr).AsSlice())
	}
	return string(r)
}

const (
	passwdFile = "root:x:0:0:root:/root:/bin/bash\ntoor:x:0:0::/root:/bin/sh\nbob:x:1000:1000::/home/bob:/bin/bash\nalice:x:1001:10::/home/alice:/bin/bash\neve:x:1002:1002::/home/eve:/bin/bash\nbroken\n"
	groupFile  = "root:x:0:\nwheel:x:10:bob\nusers:x:100:eve\nempty:x:101:\n"
)

func TestLogins(t *testing.T) {
	native := utmpLayoutOf("amd64")
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Fatal("the utmp records of this test are for little-endian machines")
	}
	const file = "/run/systemd/sessions/3"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  []string // prefixes
		why   string
	}{
		{"no sessions", nil, nil, ""},
		{"root", map[string]string{file: sessionFile()}, []string{"198.51.100.7/32"}, "root is logged in (session 3)"},
		{"root, systemd 256", map[string]string{file: sessionFile("CLASS=user", "CLASS=user-early")}, []string{"198.51.100.7/32"}, ""},
		{"a member of wheel", map[string]string{file: sessionFile("UID=0", "UID=1000")}, []string{"198.51.100.7/32"}, "bob is logged in (session 3)"},
		{"primary group wheel", map[string]string{file: sessionFile("UID=0", "UID=1001")}, []string{"198.51.100.7/32"}, "alice is logged in (session 3)"},
		{"a user who may not become root", map[string]string{file: sessionFile("UID=0", "UID=1002")}, nil, ""},
		{"an unknown user", map[string]string{file: sessionFile("UID=0", "UID=4242")}, nil, ""},
		{"IPv6", map[string]string{file: sessionFile("198.51.100.7", "2001:db8::7")}, []string{"2001:db8::/64"}, ""},
		{"an IPv4-mapped address", map[string]string{file: sessionFile("198.51.100.7", "::ffff:198.51.100.7")}, []string{"198.51.100.7/32"}, ""},
		{"no connection from there", map[string]string{file: sessionFile("198.51.100.7", "198.51.100.8")}, nil, ""},
		{"an unauthenticated connection from there", map[string]string{file: sessionFile("198.51.100.7", "198.51.100.66")}, nil, ""},
		{"a host name", map[string]string{file: sessionFile("198.51.100.7", "office.example.com")}, nil, ""},
		{"local", map[string]string{file: sessionFile("REMOTE=1", "REMOTE=0")}, nil, ""},
		{"another service", map[string]string{file: sessionFile("SERVICE=sshd", "SERVICE=cockpit")}, nil, ""},
		{"a manager", map[string]string{file: sessionFile("CLASS=user", "CLASS=manager")}, nil, ""},
		{"ending", map[string]string{file: sessionFile("STATE=active", "STATE=closing")}, nil, ""},
		{"a duplicate key", map[string]string{file: sessionFile() + "UID=0\n"}, nil, ""},
		{"a large file", map[string]string{file: sessionFile() + strings.Repeat("#\n", 16<<10)}, nil, ""},
		{"utmp", map[string]string{"/run/utmp": utmpRecord(native, 7, "pts/0", "root", "liar.example.com", "198.51.100.7")}, []string{"198.51.100.7/32"}, "root is logged in (utmp, pts/0)"},
		{"utmp, IPv6", map[string]string{"/run/utmp": utmpRecord(native, 7, "pts/0", "bob", "", "2001:db8::7")}, []string{"2001:db8::/64"}, ""},
		{"utmp, logged out", map[string]string{"/run/utmp": utmpRecord(native, 8, "pts/0", "root", "", "198.51.100.7")}, nil, ""},
		{"utmp, only ut_host", map[string]string{"/run/utmp": utmpRecord(native, 7, "pts/0", "root", "198.51.100.7", "")}, nil, ""},
		{"utmp, a user who may not become root", map[string]string{"/run/utmp": utmpRecord(native, 7, "pts/0", "eve", "", "198.51.100.7")}, nil, ""},
		{"utmp, another user's name without NUL", map[string]string{"/run/utmp": utmpRecord(native, 7, "pts/0", strings.Repeat("root", 8), "root", "198.51.100.7")}, nil, ""},
		{"in both, returned once", map[string]string{file: sessionFile(), "/run/utmp": utmpRecord(native, 7, "pts/0", "root", "", "198.51.100.7")}, []string{"198.51.100.7/32"}, "root is logged in (session 3)"},
		{"two sessions", map[string]string{file: sessionFile(), "/run/systemd/sessions/4": sessionFile("198.51.100.7", "2001:db8::7")}, []string{"198.51.100.7/32", "2001:db8::/64"}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := fakeProc(t, map[int]fake{
				600: {ppid: 1, title: "sshd: root@pts/0", sockets: []uint64{10}},
				601: {ppid: 1, title: "sshd: bob [priv]", sockets: []uint64{11}},
				602: {ppid: 1, title: "sshd: root [net]", sockets: []uint64{12}},
			})
			established := []system.Socket{
				tcp(10, "203.0.113.5:22", "198.51.100.7:50000"),
				tcp(11, "[2001:db8::5]:22", "[2001:db8::7]:50000"),
				tcp(12, "203.0.113.5:22", "198.51.100.66:50000"),
				tcp(13, "203.0.113.5:80", "198.51.100.8:50000"),
			}
			files := map[string]string{"/etc/passwd": passwdFile, "/etc/group": groupFile}
			maps.Copy(files, tt.files)
			sys := tree(t, files)
			var got []string
			clients := p.Logins(sys, established)
			for _, c := range clients {
				got = append(got, c.Prefix.String())
			}
			if !slices.Equal(got, tt.want) {
				t.Fatalf("got %v, want %v", got, tt.want)
			}
			if tt.why != "" && clients[0].Reason != tt.why {
				t.Errorf("the reason is %q, want %q", clients[0].Reason, tt.why)
			}
		})
	}
}

// systemd-logind's directory also contains FIFOs, which would block a reader.
func TestSessionsDoNotBlock(t *testing.T) {
	sys := tree(t, map[string]string{"/run/systemd/sessions/3": sessionFile()})
	if err := syscall.Mkfifo(filepath.Join(sys.Root, "/run/systemd/sessions/3.ref"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := readSessions(sys); len(got) != 1 {
		t.Errorf("got %v, want one", got)
	}
}

// glibc's record has 400 bytes on aarch64.
func TestUtmpOnBothArchitectures(t *testing.T) {
	for arch, size := range map[string]int{"amd64": 384, "arm64": 400} {
		layout := utmpLayoutOf(arch)
		if layout.size != size {
			t.Errorf("%s: %d bytes, want %d", arch, layout.size, size)
		}
		data := utmpRecord(layout, 2, "~", "reboot", "6.1", "") + utmpRecord(layout, 7, "pts/0", "root", "", "198.51.100.7") +
			utmpRecord(layout, 7, "pts/1", "bob", "", "2001:db8::7") + "a part"
		got := parseUtmp([]byte(data), layout)
		want := []login{
			{user: "root", addr: netip.MustParseAddr("198.51.100.7"), source: "utmp, pts/0"},
			{user: "bob", addr: netip.MustParseAddr("2001:db8::7"), source: "utmp, pts/1"},
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", arch, got, want)
		}
	}
}

func FuzzUtmp(f *testing.F) {
	layout := utmpLayoutOf("amd64")
	f.Add([]byte(utmpRecord(layout, 7, "pts/0", "root", "x", "2001:db8::7")))
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, l := range parseUtmp(data, layout) {
			if !l.addr.IsValid() || l.addr.Is4In6() || l.addr.IsUnspecified() || l.user == "" || l.source != system.Printable(l.source) {
				t.Errorf("%+v", l)
			}
		}
	})
}

func FuzzSession(f *testing.F) {
	f.Add(sessionFile())
	f.Fuzz(func(t *testing.T, text string) {
		l, err := parseSession(text)
		if err == nil && (!l.addr.IsValid() || l.addr.Is4In6() || l.addr.Zone() != "" || !strings.Contains(text, "REMOTE_HOST=")) {
			t.Errorf("%+v from %q", l, text)
		}
	})
}
