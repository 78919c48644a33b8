package sshd

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
)

func TestLoginWarnings(t *testing.T) {
	const (
		passwd   = "root:x:0:0:root:/root:/bin/bash\n"
		console  = "DigitalOcean's web console uses SSH: it probably fails if SSH is limited to one address; the recovery console is not affected"
		locked   = "root cannot log in at the console (its password is locked): it is no fallback when SSH fails"
		empty    = "root cannot log in at the console (it has no password): it is no fallback when SSH fails"
		noShell  = "root cannot log in at the console (its shell is /sbin/nologin): it is no fallback when SSH fails"
		noShadow = "root cannot log in at the console (it has no entry in /etc/shadow): it is no fallback when SSH fails"
	)
	for _, tt := range []struct {
		name, vendor, passwd, shadow string
		want                         []string
	}{
		{"no warning", "QEMU", passwd, "root:$6$x$y:20000:0:99999:7:::\n", nil},
		{"locked", "QEMU", passwd, "bin:*:1::::::\nroot:!$6$x$y:20000:0:99999:7:::\n", []string{locked}},
		{"locked without a hash", "QEMU", passwd, "root:*:20000:0:99999:7:::\n", []string{locked}},
		{"locked on EL", "QEMU", passwd, "root:!!:20000:0:99999:7:::\n", []string{locked}},
		{"empty", "QEMU", passwd, "root::20000:0:99999:7:::\n", []string{empty}},
		{"no shell", "QEMU", "root:x:0:0:root:/root:/sbin/nologin\n", "root:$6$x$y:20000:0:99999:7:::\n", []string{noShell}},
		{"no entry", "QEMU", passwd, "rooty:$6$x$y:20000\n", []string{noShadow}},
		{"shadow is unreadable", "QEMU", passwd, "", nil},
		{"a droplet", "DigitalOcean", passwd, "root:$6$x$y:20000:0:99999:7:::\n", []string{console}},
		{"a droplet, locked", "DigitalOcean\n", passwd, "root:!:20000:0:99999:7:::\n", []string{console, locked}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := map[string]string{"/etc/passwd": tt.passwd}
			if tt.shadow != "" {
				files["/etc/shadow"] = tt.shadow
			}
			vendor := filepath.Join(t.TempDir(), "sys_vendor")
			if err := os.WriteFile(vendor, []byte(tt.vendor), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := loginWarnings(tree(t, files), vendor); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

// TestMultiplexed covers sessions that come in by a program that also serves other
// protocols: a proxy like sslh, whose processes share the work, or a server that accepts
// SSH itself.
func TestMultiplexed(t *testing.T) {
	listening := []system.Socket{tcp(9, "0.0.0.0:22", ""), tcp(20, "0.0.0.0:443", ""), tcp(21, "127.0.0.1:8443", ""), {Proto: "udp", Local: netip.MustParseAddrPort("0.0.0.0:443"), Inode: 22}}
	session := func(environ string, proxy fake) map[int]fake {
		return map[int]fake{
			500: {exe: proxy.exe, comm: map[bool]string{true: "server", false: "sslh"}[proxy.exe == "server"], ppid: 1, sockets: []uint64{20, 21, 22}},
			501: proxy,
			600: {comm: "sshd", ppid: 1, title: "sshd: root@pts/0", sockets: []uint64{10}},
			601: {exe: "bash", ppid: 600, environ: "SSH_CONNECTION=" + environ + "\x00"},
		}
	}
	const proxied = "127.0.0.1 50000 127.0.0.1 22"
	ends := []system.Socket{tcp(10, "127.0.0.1:22", "127.0.0.1:50000"), tcp(30, "127.0.0.1:50000", "127.0.0.1:22")}
	for name, tt := range map[string]struct {
		procs       map[int]fake
		established []system.Socket
		want        string // "" is no warning
	}{
		"one process":                  {session(proxied, fake{exe: "sslh", comm: "sslh", ppid: 500, sockets: []uint64{20, 30}}), ends, "sslh, which listens on 443/tcp:"},
		"a process for the connection": {session(proxied, fake{exe: "sslh", comm: "sslh", ppid: 500, sockets: []uint64{30}}), ends, "sslh, which listens on 443/tcp:"},
		"a client on this host":        {session(proxied, fake{exe: "ssh", comm: "ssh", ppid: 1, sockets: []uint64{30}}), ends, ""},
		"the address of the client is kept": {session("198.51.100.7 50000 203.0.113.5 22", fake{exe: "sslh", comm: "sslh", sockets: []uint64{20, 30}}),
			[]system.Socket{tcp(10, "203.0.113.5:22", "198.51.100.7:50000"), tcp(30, "198.51.100.7:50000", "203.0.113.5:22")}, "sslh, which listens on 443/tcp:"},
		"a server of many protocols": {session("198.51.100.7 50000 203.0.113.5 443", fake{exe: "server", comm: "server", sockets: []uint64{20, 30}}),
			[]system.Socket{tcp(30, "203.0.113.5:443", "198.51.100.7:50000")}, "server, which listens on 443/tcp:"},
		"sshd":          {session("198.51.100.7 50000 203.0.113.5 22", fake{exe: "sshd", comm: "sshd", sockets: []uint64{9}}), []system.Socket{tcp(10, "203.0.113.5:22", "198.51.100.7:50000")}, ""},
		"no connection": {session(proxied, fake{exe: "sslh", comm: "sslh", sockets: []uint64{20, 30}}), nil, ""},
		"nonsense":      {session("x", fake{exe: "sslh", comm: "sslh", sockets: []uint64{20, 30}}), ends, ""},
	} {
		p := fakeProc(t, tt.procs)
		got := strings.Join(p.Multiplexed(p.Caller(601), listening, tt.established), "\n")
		if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%s: got %q, want %q", name, got, tt.want)
		}
	}
}
