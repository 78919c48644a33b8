package session

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
)

func TestSSHDPorts(t *testing.T) {
	const (
		unit  = "/usr/lib/systemd/system/sshd.socket"
		wants = "/etc/systemd/system/sockets.target.wants/sshd.socket"
		none  = "ListenAddress 127.0.0.1\n"
	)
	for _, tt := range []struct {
		name  string
		files map[string]string
		init  []system.Socket // that PID 1 has open
		ports []uint16
		why   []string
		err   string
	}{
		{
			name:  "no sshd at all",
			ports: []uint16{22},
			why:   []string{"sshd's default, as there is no /etc/ssh/sshd_config"},
		},
		{
			name:  "sshd_config that names no port",
			files: map[string]string{configFile: "PermitRootLogin no\n"},
			ports: []uint16{22},
			why:   []string{"sshd's default, as /etc/ssh/sshd_config names no port"},
		},
		{
			name:  "sshd_config",
			files: map[string]string{configFile: "Port 2222\nPort 22\nPort 2222\n"},
			ports: []uint16{22, 2222},
			why:   []string{"/etc/ssh/sshd_config:2", "/etc/ssh/sshd_config:1, /etc/ssh/sshd_config:3"},
		},
		{
			name:  "loopback only",
			files: map[string]string{configFile: none},
			ports: []uint16{22},
			why:   []string{"sshd's default, as /etc/ssh/sshd_config lets sshd listen on loopback only"},
		},
		{
			name:  "an Include that cannot be read",
			files: map[string]string{configFile: "Port 2222\nInclude gone\n", "/etc/ssh/gone": "-> nowhere"},
			ports: []uint16{2222},
			why:   []string{"/etc/ssh/sshd_config:1"},
			err:   "reading sshd's configuration",
		},
		{
			name:  "an enabled socket unit",
			files: map[string]string{configFile: none, unit: "[Socket]\nListenStream=2222\n", wants: "-> " + unit},
			ports: []uint16{2222},
			why:   []string{"sshd.socket is enabled (/usr/lib/systemd/system/sshd.socket:2)"},
		},
		{
			name:  "a socket unit that nobody enabled",
			files: map[string]string{configFile: none, unit: "[Socket]\nListenStream=2222\n"},
			ports: []uint16{22},
			why:   []string{"sshd's default, as /etc/ssh/sshd_config lets sshd listen on loopback only"},
		},
		{
			name:  "a socket unit that listens",
			files: map[string]string{configFile: none, unit: "[Socket]\nListenStream=2222\nListenStream=2223\n"},
			init:  []system.Socket{tcp(5, "[::]:2222", ""), tcp(6, "0.0.0.0:80", ""), tcp(7, "127.0.0.1:2223", "")},
			ports: []uint16{2222},
			why:   []string{"systemd listens on it for sshd.socket"},
		},
		{
			name:  "both sshd_config and a socket unit",
			files: map[string]string{configFile: "Port 22\n", unit: "[Socket]\nListenStream=2222\nListenStream=22\n", wants: "-> " + unit},
			ports: []uint16{22, 2222},
			why:   []string{"sshd.socket is enabled (/usr/lib/systemd/system/sshd.socket:3), /etc/ssh/sshd_config:1", "sshd.socket is enabled (/usr/lib/systemd/system/sshd.socket:2)"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sys := tree(t, tt.files)
			if err := os.MkdirAll(sys.Path("/etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			init := fake{exe: "systemd", comm: "systemd"}
			for _, s := range tt.init {
				init.sockets = append(init.sockets, s.Inode)
			}
			ports, why, live, err := fakeProc(t, map[int]fake{1: init}).SSHDPorts(sys, tt.init)
			if !slices.Equal(ports, tt.ports) || !slices.Equal(why, tt.why) {
				t.Errorf("got %v because %q\nwant %v because %q", ports, why, tt.ports, tt.why)
			}
			if want := strings.Contains(strings.Join(why, " "), "systemd listens"); live != want {
				t.Errorf("live is %v for %q", live, why)
			}
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %v, want %q", err, tt.err)
			}
		})
	}
}

// sshd has a socket for each family: that is one reason.
func TestOneReasonForBothFamilies(t *testing.T) {
	p := fakeProc(t, map[int]fake{500: {ppid: 1, sockets: []uint64{8, 9}}})
	ports, why, _, err := p.SSHDPorts(tree(t, map[string]string{configFile: "ListenAddress ::1"}), []system.Socket{tcp(8, "0.0.0.0:22", ""), tcp(9, "[::]:22", "")})
	if err != nil || !slices.Equal(ports, []uint16{22}) || !slices.Equal(why, []string{"sshd listens on it (process 500)"}) {
		t.Errorf("got %v because %q, %v", ports, why, err)
	}
}

func TestSocketUnit(t *testing.T) {
	const unit = "/usr/lib/systemd/system/ssh.socket"
	const text = "[Unit]\nDescription=x\n[Socket]\nListenStream=22\nAccept=no\n"
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  []uint16
	}{
		{"none", nil, nil},
		{"plain", map[string]string{unit: text}, []uint16{22}},
		{"addresses", map[string]string{unit: "[Socket]\nListenStream=0.0.0.0:22\nListenStream = [::]:2222\nListenStream=127.0.0.1:23\nListenStream=[::1]:24\n"}, []uint16{22, 2222}},
		{"others than ports", map[string]string{unit: "[Socket]\nListenStream=/run/ssh\nListenStream=@ssh\nListenStream=vsock::22\nListenStream=70000\nListenStream=0\n"}, nil},
		{"another section", map[string]string{unit: "[Socket]\n[Install]\nListenStream=22\n"}, nil},
		{"comments", map[string]string{unit: "[Socket]\n#ListenStream=22\n;ListenStream=23\n"}, nil},
		{"continued", map[string]string{unit: "[Socket]\nListenStream=\\\n# in between\n  2222\nX=\\\nListenStream=23\n"}, []uint16{2222}},
		{"drop-in adds", map[string]string{unit: text, "/etc/systemd/system/ssh.socket.d/port.conf": "[Socket]\nListenStream=2222\n"}, []uint16{22, 2222}},
		{"drop-in replaces", map[string]string{unit: text, "/etc/systemd/system/ssh.socket.d/port.conf": "[Socket]\nListenStream=\nListenStream=2222\n"}, []uint16{2222}},
		{"drop-ins in order", map[string]string{
			unit: text,
			"/etc/systemd/system/ssh.socket.d/20.conf":     "[Socket]\nListenStream=\nListenStream=2220\n",
			"/usr/lib/systemd/system/ssh.socket.d/10.conf": "[Socket]\nListenStream=\nListenStream=2210\n",
			"/usr/lib/systemd/system/ssh.socket.d/30.txt":  "[Socket]\nListenStream=2230\n",
		}, []uint16{2220}},
		{"/etc hides a drop-in of the same name", map[string]string{
			unit: text,
			"/etc/systemd/system/ssh.socket.d/10.conf":     "[Socket]\nListenStream=2220\n",
			"/usr/lib/systemd/system/ssh.socket.d/10.conf": "[Socket]\nListenStream=2210\n",
		}, []uint16{22, 2220}},
		{"Ubuntu's generator", map[string]string{unit: text, "/run/systemd/generator/ssh.socket.d/addresses.conf": "[Socket]\nListenStream=\nListenStream=0.0.0.0:2222\n"}, []uint16{2222}},
		{"/etc hides the whole unit", map[string]string{unit: text, "/etc/systemd/system/ssh.socket": "[Socket]\nListenStream=2222\n"}, []uint16{2222}},
		{"masked", map[string]string{unit: text, "/etc/systemd/system/ssh.socket": "-> /dev/null"}, nil},
		{"masked by an empty file", map[string]string{unit: text, "/etc/systemd/system/ssh.socket": ""}, nil},
		{"masked, with a drop-in", map[string]string{unit: text, "/etc/systemd/system/ssh.socket": "-> /dev/null", "/etc/systemd/system/ssh.socket.d/10.conf": "[Socket]\nListenStream=1\n"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []uint16
			found, err := readSocketUnit(tree(t, tt.files), "ssh.socket")
			if err != nil {
				t.Error(err)
			}
			for _, p := range found {
				got = append(got, p.port)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

func FuzzListenStream(f *testing.F) {
	f.Add("[Socket]\nListenStream=[::]:22\\\n\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, p := range parseListenStream("f", text, nil) {
			if p.port == 0 {
				t.Errorf("port 0 from %q", text)
			}
		}
	})
}
