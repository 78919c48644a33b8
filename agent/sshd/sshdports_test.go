package sshd

import (
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/host"
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
			name:  "no sshd",
			ports: []uint16{22},
			why:   []string{"sshd's default; there is no /etc/ssh/sshd_config"},
		},
		{
			name:  "sshd_config without a port",
			files: map[string]string{configFile: "PermitRootLogin no\n"},
			ports: []uint16{22},
			why:   []string{"sshd's default; /etc/ssh/sshd_config sets no port"},
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
			why:   []string{"sshd's default; /etc/ssh/sshd_config allows loopback only"},
		},
		{
			name:  "an unreadable Include",
			files: map[string]string{configFile: "Port 2222\nInclude gone\n", "/etc/ssh/gone": "-> nowhere"},
			ports: []uint16{2222},
			why:   []string{"/etc/ssh/sshd_config:1"},
			err:   "reading sshd's configuration",
		},
		{
			name:  "sshd_config of the distribution",
			files: map[string]string{"/usr" + configFile: "Include " + configFile + ".d/*.conf\nInclude /usr" + configFile + ".d/*.conf\n", configFile + ".d/p.conf": "Port 2222\n", "/usr" + configFile + ".d/q.conf": "Port 2223\n"},
			ports: []uint16{2222, 2223},
			why:   []string{configFile + ".d/p.conf:1", "/usr" + configFile + ".d/q.conf:1"},
		},
		{
			name:  "sshd_config replaces that of the distribution",
			files: map[string]string{"/usr" + configFile: "Port 2222\n", configFile: ""},
			ports: []uint16{22},
			why:   []string{"sshd's default; /etc/ssh/sshd_config sets no port"},
		},
		{
			name:  "options in an environment file",
			files: map[string]string{configFile: "\n", "/etc/sysconfig/sshd": "# -p 1\nOPTIONS=\"-u0 -p 2222\"\nX=\"-p 2223\"\n"},
			ports: []uint16{2222},
			why:   []string{"/etc/sysconfig/sshd:2"},
		},
		{
			name:  "options of Debian, and a port in sshd_config, which the unit may still use",
			files: map[string]string{configFile: "Port 22\n", "/etc/default/ssh": "SSHD_OPTS='-4 -o Port=2222 -oPort=2223 -o \"Port 2224\"'\n"},
			ports: []uint16{22, 2222, 2223, 2224},
			why:   []string{"/etc/ssh/sshd_config:1", "/etc/default/ssh:1", "/etc/default/ssh:1", "/etc/default/ssh:1"},
		},
		{
			name:  "options without sshd_config",
			files: map[string]string{"/etc/sysconfig/sshd": "OPTIONS=-Dp2222\n"},
			ports: []uint16{2222},
			why:   []string{"/etc/sysconfig/sshd:1"},
		},
		{
			name: "the command line in a unit", files: map[string]string{
				configFile: "\n", "/etc/ssh/other": "Port 2223\n",
				"/usr/lib/systemd/system/sshd.service":        "[Service]\nExecStart=-/usr/sbin/sshd -D -p 1\n",
				"/etc/systemd/system/sshd.service.d/own.conf": "[Service]\nExecStart=\nExecStart=/usr/sbin/sshd -D $OPTIONS -E p22 -p 2222 -f /etc/ssh/other\n",
			},
			ports: []uint16{2222, 2223},
			why:   []string{"/etc/systemd/system/sshd.service.d/own.conf:3", "/etc/ssh/other:1"},
		},
		{
			name:  "an enabled socket unit",
			files: map[string]string{configFile: none, unit: "[Socket]\nListenStream=2222\n", wants: "-> " + unit},
			ports: []uint16{2222},
			why:   []string{"sshd.socket is enabled (/usr/lib/systemd/system/sshd.socket:2)"},
		},
		{
			name:  "a socket unit that is not enabled",
			files: map[string]string{configFile: none, unit: "[Socket]\nListenStream=2222\n"},
			ports: []uint16{22},
			why:   []string{"sshd's default; /etc/ssh/sshd_config allows loopback only"},
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
			if err := os.MkdirAll(filepath.Join(sys.Root, "/etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			init := fake{exe: "systemd", comm: "systemd"}
			for _, s := range tt.init {
				init.sockets = append(init.sockets, s.Inode)
			}
			ports, why, live, err := fakeProc(t, map[int]fake{1: init}).SSHDPorts(sys, tt.init, nil)
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

// sshd's sockets for both families are one reason.
func TestOneReasonForBothFamilies(t *testing.T) {
	p := fakeProc(t, map[int]fake{500: {ppid: 1, sockets: []uint64{8, 9}}})
	ports, why, _, err := p.SSHDPorts(tree(t, map[string]string{configFile: "ListenAddress ::1"}), []system.Socket{tcp(8, "0.0.0.0:22", ""), tcp(9, "[::]:22", "")}, nil)
	if err != nil || !slices.Equal(ports, []uint16{22}) || !slices.Equal(why, []string{"sshd listens on it (process 500)"}) {
		t.Errorf("got %v because %q, %v", ports, why, err)
	}
}

// TestPortOfTheCallersSession checks that the port of the caller's session counts, whatever
// serves it, and that no default is added to it.
func TestPortOfTheCallersSession(t *testing.T) {
	session := &host.Session{Local: netip.MustParseAddrPort("203.0.113.5:2222")}
	for config, want := range map[string][]uint16{"": {2222}, "Port 22": {22, 2222}, "Port 2222": {2222}} {
		reason := host.SessionPort
		if config == "Port 2222" {
			reason = configFile + ":1" // it is followed if sshd moves
		}
		files := map[string]string{"/etc/hostname": ""}
		if config != "" {
			files[configFile] = config
		}
		ports, why, live, err := fakeProc(t, nil).SSHDPorts(tree(t, files), nil, session)
		if err != nil || live || !slices.Equal(ports, want) || why[len(why)-1] != reason {
			t.Errorf("%q: got %v because %q, %t, %v; want %v", config, ports, why, live, err, want)
		}
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
		{"sockets without a port", map[string]string{unit: "[Socket]\nListenStream=/run/ssh\nListenStream=@ssh\nListenStream=vsock::22\nListenStream=70000\nListenStream=0\n"}, nil},
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
		{"/etc overrides a drop-in with the same name", map[string]string{
			unit: text,
			"/etc/systemd/system/ssh.socket.d/10.conf":     "[Socket]\nListenStream=2220\n",
			"/usr/lib/systemd/system/ssh.socket.d/10.conf": "[Socket]\nListenStream=2210\n",
		}, []uint16{22, 2220}},
		{"Ubuntu's generator", map[string]string{unit: text, "/run/systemd/generator/ssh.socket.d/addresses.conf": "[Socket]\nListenStream=\nListenStream=0.0.0.0:2222\n"}, []uint16{2222}},
		{"/etc overrides the whole unit", map[string]string{unit: text, "/etc/systemd/system/ssh.socket": "[Socket]\nListenStream=2222\n"}, []uint16{2222}},
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

// FuzzCommandLine checks that no text of a file makes the reader panic or loop.
func FuzzCommandLine(f *testing.F) {
	f.Add("/usr/sbin/sshd -Dp 2222 -o 'Port=2223' -o ListenAddress=[::1]:5")
	f.Fuzz(func(t *testing.T, text string) {
		r := &configReader{sys: &system.System{Root: t.TempDir()}}
		r.commandLine(text, "f")
		for _, p := range r.config.ports {
			if p.port == 0 {
				t.Errorf("port 0 from %q", text)
			}
		}
	})
}

func FuzzListenStream(f *testing.F) {
	f.Add("[Socket]\nListenStream=[::]:22\\\n\n")
	f.Fuzz(func(t *testing.T, text string) {
		for _, p := range listenPorts(parseUnit("f", text, "[Socket]", "ListenStream", nil)) {
			if p.port == 0 {
				t.Errorf("port 0 from %q", text)
			}
		}
	})
}
