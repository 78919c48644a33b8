package sshd

import (
	"net/netip"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// A session of root in OpenSSH 9.2, where one process serves the connection. In 10.0
// it is sshd-session.
func rootSession() map[int]fake {
	return map[int]fake{
		1:   {exe: "systemd"},
		500: {ppid: 1, title: "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups", sockets: []uint64{9}},
		600: {ppid: 500, title: "sshd: root@pts/0", sockets: []uint64{10}},
		601: {exe: "bash", ppid: 600, environ: "HOME=/root\x00SSH_CONNECTION=198.51.100.7 50000 203.0.113.5 22\x00TERM=x\x00"},
		602: {exe: "agent", ppid: 601, environ: "HOME=/root\x00SSH_CONNECTION=198.51.100.7 50000 203.0.113.5 22\x00"},
	}
}

func TestInvoker(t *testing.T) {
	change := func(procs map[int]fake, pid int, f func(*fake)) map[int]fake {
		p := procs[pid]
		f(&p)
		procs[pid] = p
		return procs
	}
	connection := tcp(10, "203.0.113.5:22", "198.51.100.7:50000")
	const env = "SSH_CONNECTION=198.51.100.7 50000 203.0.113.5 22\x00"
	// A session that another server serves: a process for this connection alone.
	other := func(exe string) map[int]fake {
		return map[int]fake{
			500: {exe: exe, ppid: 1, sockets: []uint64{9}},
			600: {exe: exe, ppid: 500, sockets: []uint64{10}},
			601: {exe: "bash", ppid: 600, uid: "1000\t1000\t1000\t1000", environ: env},
			602: {exe: "agent", ppid: 601},
		}
	}
	// The same in tmux, which is no descendant of the server.
	apart := func(exe string) map[int]fake {
		return change(other(exe), 601, func(f *fake) { f.exe, f.ppid = "tmux", 1 })
	}
	for _, tt := range []struct {
		name        string
		procs       map[int]fake
		established []system.Socket
		want        string // "" is no client
	}{
		{"dropbear", other("dropbear"), []system.Socket{connection}, "198.51.100.7/32"},
		{"dropbear, in tmux", apart("dropbear"), []system.Socket{connection}, "198.51.100.7/32"},
		{"a server of any name", other("tinysshd"), []system.Socket{connection}, "198.51.100.7/32"},
		{"another program that is no ancestor", apart("nginx"), []system.Socket{connection}, ""},
		{"a server that listens on the port itself", change(other("nginx"), 600, func(f *fake) { f.sockets = []uint64{9, 10} }), []system.Socket{connection}, ""},
		{"a user's own server", change(other("dropbear"), 600, func(f *fake) { f.owner, f.uid = 1000, "1000\t1000\t1000\t1000" }), []system.Socket{connection}, ""},
		{"root runs a user's server", change(other("dropbear"), 600, func(f *fake) { f.owner = 1000 }), []system.Socket{connection}, ""},
		{"root's session", rootSession(), []system.Socket{connection}, "198.51.100.7/32"},
		{"sudo dropped the variable", change(rootSession(), 602, func(f *fake) { f.environ = "HOME=/root\x00" }), []system.Socket{connection}, "198.51.100.7/32"},
		{
			"a user's session, and sudo", map[int]fake{
				500: {ppid: 1, title: "/usr/sbin/sshd\x00-D\x00"},
				600: {ppid: 500, title: "sshd: bob [priv]", sockets: []uint64{10}},
				601: {ppid: 600, title: "sshd: bob@pts/0", uid: "1000\t1000\t1000\t1000", sockets: []uint64{10}},
				602: {exe: "agent", ppid: 601, environ: env},
			}, []system.Socket{connection}, "198.51.100.7/32",
		},
		{
			"sshd-session", map[int]fake{
				500: {ppid: 1, title: "sshd: /usr/sbin/sshd -D [listener] 0 of 10-100 startups"},
				600: {exe: "sshd-session (deleted)", ppid: 500, title: "sshd-session: root@pts/0", sockets: []uint64{10}},
				602: {exe: "agent", ppid: 600, environ: env},
			}, []system.Socket{connection}, "198.51.100.7/32",
		},
		{
			"tmux keeps an old one, an ancestor has the new", change(rootSession(), 602, func(f *fake) {
				f.environ = "SSH_CONNECTION=198.51.100.9 40000 203.0.113.5 22\x00"
			}), []system.Socket{connection}, "198.51.100.7/32",
		},
		{
			"tmux keeps an old one, and that is all", map[int]fake{
				600: {ppid: 1, title: "sshd: root@pts/0", sockets: []uint64{10}},
				700: {exe: "tmux", ppid: 1, environ: "SSH_CONNECTION=198.51.100.9 40000 203.0.113.5 22\x00"},
				602: {exe: "agent", ppid: 700},
			}, []system.Socket{connection}, "",
		},
		{"no such connection", rootSession(), nil, ""},
		{"another port of the same client", rootSession(), []system.Socket{tcp(10, "203.0.113.5:22", "198.51.100.7:50001")}, ""},
		{"another server", rootSession(), []system.Socket{tcp(10, "203.0.113.6:22", "198.51.100.7:50000")}, ""},
		{"the connection is another program's", rootSession(), []system.Socket{tcp(11, "203.0.113.5:22", "198.51.100.7:50000")}, ""},
		{"the connection has no process", rootSession(), []system.Socket{tcp(0, "203.0.113.5:22", "198.51.100.7:50000")}, ""},
		{"a user's own sshd has it", change(rootSession(), 600, func(f *fake) { f.owner, f.uid = 1000, "1000\t1000\t1000\t1000" }), []system.Socket{connection}, ""},
		{"root's sshd, run by a user, has it", change(rootSession(), 600, func(f *fake) { f.uid = "1000\t1000\t1000\t1000" }), []system.Socket{connection}, ""},
		{"not yet authenticated", change(rootSession(), 600, func(f *fake) { f.title = "sshd: [accepted]" }), []system.Socket{connection}, ""},
		{
			"nobody has authenticated yet, a name is given", map[int]fake{
				600: {ppid: 1, title: "sshd: root [priv]", sockets: []uint64{10}},
				601: {ppid: 600, title: "sshd: root [net]", uid: "103\t103\t103\t103", sockets: []uint64{10}},
				602: {exe: "agent", ppid: 1, environ: env},
			}, []system.Socket{connection}, "",
		},
		{
			"nobody has authenticated yet, sshd-auth", map[int]fake{
				600: {exe: "sshd-session", ppid: 1, title: "sshd-session: root [priv]", sockets: []uint64{10}},
				601: {exe: "sshd-auth", ppid: 600, title: "sshd-auth: root", uid: "103\t103\t103\t103", sockets: []uint64{10}},
				602: {exe: "agent", ppid: 1, environ: env},
			}, []system.Socket{connection}, "",
		},
		{"no SSH session", map[int]fake{602: {exe: "agent", ppid: 1, environ: "A=B\x00"}}, nil, ""},
		{"a cycle of processes", map[int]fake{602: {exe: "a", ppid: 603}, 603: {exe: "b", ppid: 602}}, nil, ""},
		{"a variable with this suffix", change(change(rootSession(), 602, func(f *fake) { f.environ = "MY_" + env }), 601, func(f *fake) { f.environ = "A=1\nSSH_CONNECTION=" + env }), []system.Socket{connection}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := fakeProc(t, tt.procs)
			c, ok := p.Invoker(p.Caller(602), []system.Socket{tcp(9, "0.0.0.0:22", "")}, tt.established)
			if got := c.Prefix.String(); ok != (tt.want != "") || ok && got != tt.want {
				t.Errorf("got %v, %t; want %q", c, ok, tt.want)
			}
			if ok && (c.Reason == "" || c.Local != connection.Local || c.Began == 0) {
				t.Errorf("incomplete: %+v", c)
			}
		})
	}
}

func TestNewClient(t *testing.T) {
	for addr, want := range map[string]string{
		"198.51.100.7":        "198.51.100.7/32",
		"10.0.0.7":            "10.0.0.7/32", // correct, as the host saw it
		"100.64.0.7":          "100.64.0.7/32",
		"2001:db8:1:2:3::4":   "2001:db8:1:2::/64",
		"fd00:1:2:3:4::5":     "fd00:1:2:3:4::5/128",
		"::ffff:198.51.100.7": "198.51.100.7/32",
		"127.0.0.1":           "",
		"::1":                 "",
		"0.0.0.0":             "",
		"::":                  "",
		"169.254.1.1":         "",
		"fe80::1":             "",
		"224.0.0.1":           "",
		"ff02::1":             "",
		"255.255.255.255":     "",
	} {
		c, ok := newClient(netip.MustParseAddr(addr), "x")
		if ok != (want != "") || ok && (c.Prefix.String() != want || c.Addr != netip.MustParseAddr(addr).Unmap()) {
			t.Errorf("%s: got %v, %t; want %q", addr, c, ok, want)
		}
	}
}

func TestParseSSHConnection(t *testing.T) {
	for value, want := range map[string][2]string{
		"198.51.100.7 50000 203.0.113.5 22":               {"198.51.100.7:50000", "203.0.113.5:22"},
		"2001:db8::7 50000 2001:db8::5 22":                {"[2001:db8::7]:50000", "[2001:db8::5]:22"},
		"::ffff:198.51.100.7 50000 ::ffff:203.0.113.5 22": {"198.51.100.7:50000", "203.0.113.5:22"},
		"fe80::7%eth0 50000 fe80::5%eth0 22":              {"[fe80::7]:50000", "[fe80::5]:22"},
		"":                                                {},
		"UNKNOWN 65535 UNKNOWN 65535":                     {}, // sshd's value if the connection is no socket
		"198.51.100.7 50000 203.0.113.5":                  {},
		"198.51.100.7 50000 203.0.113.5 22 x":             {},
		"198.51.100.7  50000 203.0.113.5 22":              {},
		"198.51.100.7 70000 203.0.113.5 22":               {},
		"198.51.100.7 50000 host 22":                      {},
		"198.51.100.0/24 50000 203.0.113.5 22":            {},
		"198.51.100.7 50000 203.0.113.5 22\n":             {},
		"198.51.100.7\x00 50000 203.0.113.5 +22":          {},
	} {
		client, server, err := parseSSHConnection(value)
		if (err == nil) != (want[0] != "") || err == nil && (client.String() != want[0] || server.String() != want[1]) {
			t.Errorf("%q: got %v, %v, %v; want %v", value, client, server, err, want)
		}
	}
}

func FuzzSSHConnection(f *testing.F) {
	f.Add("198.51.100.7 50000 203.0.113.5 22")
	f.Fuzz(func(t *testing.T, value string) {
		client, server, err := parseSSHConnection(value)
		if err == nil && (!client.Addr().IsValid() || !server.Addr().IsValid() || client.Addr().Is4In6() || client.Addr().Zone() != "") {
			t.Errorf("%q returned %v and %v", value, client, server)
		}
	})
}
