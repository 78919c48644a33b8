package sshd

import (
	"fmt"
	"slices"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Only a shell on a terminal belongs to a person, and only root, or a user who may
// become root, is the administrator.
func TestShells(t *testing.T) {
	const bob, eve = "1000\t1000\t1000\t1000", "1002\t1002\t1002\t1002"
	root := fake{ppid: 500, title: "sshd: root@pts/0", sockets: []uint64{10}}
	for _, tt := range []struct {
		name  string
		procs map[int]fake
		want  string
	}{
		{"root", map[int]fake{600: root, 601: {exe: "bash", ppid: 600, title: "-bash", tty: 34816}}, "[198.51.100.7 10m0s]"},
		{"root, with sshd-session", map[int]fake{600: {exe: "sshd-session", ppid: 500, title: "sshd-session: root@pts/0", sockets: []uint64{10}},
			601: {exe: "bash", ppid: 600, title: "-bash", tty: 34816}}, "[198.51.100.7 10m0s]"},
		{"dropbear", map[int]fake{600: {exe: "dropbear", ppid: 500, title: "dropbear", sockets: []uint64{10}},
			601: {exe: "bash", ppid: 600, title: "-bash", tty: 34816}}, "[198.51.100.7 10m0s]"},
		{"dropbear, a command", map[int]fake{600: {exe: "dropbear", ppid: 500, title: "dropbear", sockets: []uint64{10}},
			601: {exe: "bash", ppid: 600, title: "bash\x00-c\x00sleep 9", tty: 34816}}, "[]"},
		{"dropbear, not authenticated", map[int]fake{600: {exe: "dropbear", ppid: 500, title: "dropbear", sockets: []uint64{10}}}, "[]"},
		{"dropbear, without a connection", map[int]fake{600: {exe: "dropbear", ppid: 500, title: "dropbear"},
			601: {exe: "bash", ppid: 600, title: "-bash", tty: 34816}}, "[]"},
		{"a user's own dropbear", map[int]fake{600: {exe: "dropbear", owner: 1000, uid: bob, ppid: 1, title: "dropbear", sockets: []uint64{10}},
			601: {exe: "bash", ppid: 600, uid: bob, title: "-bash", tty: 34816}}, "[]"},
		{"a user who may become root", map[int]fake{600: {ppid: 500, title: "sshd: bob [priv]", sockets: []uint64{10}},
			602: {ppid: 600, uid: bob, title: "sshd: bob@pts/0", sockets: []uint64{10}},
			603: {exe: "bash", ppid: 602, uid: bob, title: "-bash", tty: 34816}}, "[198.51.100.7 10m0s]"},
		{"a user who may not become root", map[int]fake{600: {ppid: 500, title: "sshd: eve [priv]", sockets: []uint64{10}},
			602: {ppid: 600, uid: eve, title: "sshd: eve@pts/0", sockets: []uint64{10}},
			603: {exe: "bash", ppid: 602, uid: eve, title: "-bash", tty: 34816}}, "[]"},
		{"a user who may not, with a process that runs as root", map[int]fake{600: {ppid: 500, title: "sshd: eve [priv]", sockets: []uint64{10}},
			602: {ppid: 600, uid: eve, title: "sshd: eve@pts/0", sockets: []uint64{10}},
			603: {exe: "su", ppid: 602, uid: "1002\t0\t0\t0", title: "-su", tty: 34816}}, "[]"},
		{"a command", map[int]fake{600: root, 601: {exe: "bash", ppid: 600, title: "bash\x00-c\x00sleep 9", tty: 34816}}, "[]"},
		{"no terminal", map[int]fake{600: root, 601: {exe: "bash", ppid: 600, title: "-bash"}}, "[]"},
		{"a shell of another program", map[int]fake{600: root, 700: {exe: "cron", ppid: 1}, 601: {exe: "bash", ppid: 700, title: "-bash", tty: 34816}}, "[]"},
		{"not authenticated", map[int]fake{600: {ppid: 500, title: "sshd: root [priv]", sockets: []uint64{10}}, 605: {ppid: 600, title: "sshd: root [net]", sockets: []uint64{10}},
			601: {exe: "bash", ppid: 600, title: "-bash", tty: 34816}}, "[]"},
		{"a user's own sshd", map[int]fake{600: {owner: 1000, uid: bob, ppid: 1, title: "sshd: root@pts/0", sockets: []uint64{10}},
			601: {exe: "bash", ppid: 600, uid: bob, title: "-bash", tty: 34816}}, "[]"},
		{"from this host", map[int]fake{600: {ppid: 500, title: "sshd: root@pts/0", sockets: []uint64{11}},
			601: {exe: "bash", ppid: 600, title: "-bash", tty: 34816}}, "[]"},
		{"from this host, dropbear", map[int]fake{600: {exe: "dropbear", ppid: 500, title: "dropbear", sockets: []uint64{11}},
			601: {exe: "bash", ppid: 600, title: "-bash", tty: 34816}}, "[]"},
		{"no connection", map[int]fake{600: {ppid: 500, title: "sshd: root@pts/0"}, 601: {exe: "bash", ppid: 600, title: "-bash", tty: 34816}}, "[]"},
	} {
		sys := tree(t, map[string]string{"/etc/passwd": passwdFile, "/etc/group": groupFile})
		var got []string
		for _, c := range fakeProc(t, tt.procs).Shells(sys, []system.Socket{tcp(10, "203.0.113.5:22", "198.51.100.7:50000"), tcp(11, "203.0.113.5:22", "203.0.113.5:50000")}) {
			got = append(got, fmt.Sprint(c.Addr, " ", c.Began))
		}
		if slices.Sort(got); fmt.Sprint(got) != tt.want {
			t.Errorf("%s: %v, want %s", tt.name, got, tt.want)
		}
	}
}
