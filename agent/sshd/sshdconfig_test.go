package sshd

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// tree creates files below a temporary directory. A name that ends in "/" is a
// directory; a text that begins with "-> " is a link.
func tree(t testing.TB, files map[string]string) *system.System {
	t.Helper()
	root := t.TempDir()
	for name, text := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(text, "-> "); ok {
			err = os.Symlink(target, path)
		} else {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return &system.System{Root: root}
}

const configFile = "/etc/ssh/sshd_config"

// configCase is a configuration and the resulting ports.
type configCase struct {
	name  string
	text  string
	files map[string]string // other files
	want  []uint16
}

// configCases returns cases from sshd_config(5) and servconf.c.
func configCases() []configCase {
	return []configCase{
		{"nothing", "", nil, []uint16{22}},
		{"comments", "# Port 2200\n  #Port 2201\n\t\nPort 2222 # not 2223\n", nil, []uint16{2222}},
		{"several", "Port 22\nPort 2222\nPort 22\n", nil, []uint16{22, 2222}},
		{"any case", "pOrT 2222\n", nil, []uint16{2222}},
		{"equals", "Port=2222\n", nil, []uint16{2222}},
		{"spaced equals", "Port = 2222\n", nil, []uint16{2222}},
		{"equals then space", "Port= 2222\n", nil, []uint16{2222}},
		{"tabs", "\tPort\t2222\t\n", nil, []uint16{2222}},
		{"carriage returns", "Port 2222\r\nPort 2223\r\n", nil, []uint16{2222, 2223}},
		{"form feed", "Port 2222\f\n", nil, []uint16{2222}},
		{"no newline at the end", "Port 2222", nil, []uint16{2222}},
		{"quoted", "Port \"2222\"\nPort '2223'\n", nil, []uint16{2222, 2223}},
		{"quoted keyword", "\"Port\" 2222\n", nil, []uint16{2222}},
		{"quoted keyword and equals", "\"Port\" = 2222\n", nil, []uint16{22}}, // refused by sshd
		{"a quote in the middle", "Port 22\"22\"\n", nil, []uint16{2222}},
		{"leading zero", "Port 02222\n", nil, []uint16{2222}},
		{"a service's name", "Port ssh\n", map[string]string{"/etc/services": "x 1/tcp\nssh\t22/udp\nssh 22/tcp # secure\n"}, []uint16{22}},
		{"a service's alias", "Port mine\n", map[string]string{"/etc/services": "x 2022/tcp y mine\n"}, []uint16{2022}},

		{"address", "ListenAddress 0.0.0.0\n", nil, []uint16{22}},
		{"address and port", "Port 22\nListenAddress 0.0.0.0:2222\n", nil, []uint16{2222}},
		{"address before port", "ListenAddress 0.0.0.0\nPort 2222\n", nil, []uint16{2222}},
		{"addresses with and without", "Port 2200\nListenAddress 0.0.0.0:2222\nListenAddress ::\n", nil, []uint16{2200, 2222}},
		{"IPv6", "ListenAddress ::\nPort 2222\n", nil, []uint16{2222}},
		{"IPv6 in brackets", "ListenAddress [::]\nPort 2222\n", nil, []uint16{2222}},
		{"IPv6 and port", "ListenAddress [::]:2222\n", nil, []uint16{2222}},
		{"a bare IPv6 address has no port", "ListenAddress ::2222\nPort 2200\n", nil, []uint16{2200}},
		{"slash", "ListenAddress 0.0.0.0/2222\n", nil, []uint16{22}}, // refused by sshd
		{"brackets around IPv4", "ListenAddress [0.0.0.0]:2222\n", nil, []uint16{2222}},
		{"quoted address", "ListenAddress \"0.0.0.0:2222\"\n", nil, []uint16{2222}},
		{"equals address", "ListenAddress=0.0.0.0:2222\n", nil, []uint16{2222}},
		{"name", "ListenAddress vps.example.com:2222\n", map[string]string{}, []uint16{2222}},
		{"routing domain", "ListenAddress 0.0.0.0:2222 rdomain lo\n", map[string]string{}, []uint16{2222}},

		{"loopback", "ListenAddress 127.0.0.1:2222\nListenAddress 0.0.0.0:2223\n", nil, []uint16{2223}},
		{"loopback only", "ListenAddress 127.0.0.1\nListenAddress ::1\nListenAddress [::1]:2222\nListenAddress localhost:2223\n", nil, nil},

		{"Match", "Port 2222\nMatch User bob\n  X11Forwarding no\n", nil, []uint16{2222}},
		{"port in a Match block", "Match User bob\nPort 2222\n", nil, []uint16{22}}, // refused by sshd
		{"Match all", "Match User bob\nX11Forwarding no\nMatch all\nPort 2222\n", nil, []uint16{2222}},
		{"Match all, commented", "Match User bob\nMatch all # again\nPort 2222\n", nil, []uint16{2222}},
		{"Match=all", "Match User bob\nMatch=All\nPort 2222\n", nil, []uint16{2222}},

		{"Include", "Include " + "/etc/ssh/sshd_config.d/*.conf\nPort 22\n", map[string]string{
			"/etc/ssh/sshd_config.d/20-b.conf":     "Port 2220",
			"/etc/ssh/sshd_config.d/10-a.conf":     "Port 2210",
			"/etc/ssh/sshd_config.d/.hidden.conf":  "Port 2211",
			"/etc/ssh/sshd_config.d/30-c.conf.bak": "Port 2212",
		}, []uint16{22, 2210, 2220}},
		{"relative Include", "Include more.conf\n", map[string]string{"/etc/ssh/more.conf": "Port 2222"}, []uint16{2222}},
		{"several in an Include", "Include \"a b.conf\" c.conf\n", map[string]string{
			"/etc/ssh/a b.conf": "Port 2221", "/etc/ssh/c.conf": "Port 2222",
		}, []uint16{2221, 2222}},
		{"negated class", "Include d[!a]?.conf\n", map[string]string{
			"/etc/ssh/dax.conf": "Port 2221", "/etc/ssh/dbx.conf": "Port 2222",
		}, []uint16{2222}},
		{"wildcard directories", "Include */x.conf\n", map[string]string{
			"/etc/ssh/a/x.conf": "Port 2221", "/etc/ssh/b/x.conf": "Port 2222",
		}, []uint16{2221, 2222}},
		{"Include of nothing", "Include nothing*.conf none.conf\nPort 2222\n", map[string]string{}, []uint16{2222}},
		{"nested", "Include a.conf\n", map[string]string{
			"/etc/ssh/a.conf": "Port 2221\nInclude b.conf", "/etc/ssh/b.conf": "Port 2222",
		}, []uint16{2221, 2222}},
		{"Include in a Match block", "Match User bob\nInclude a.conf\n", map[string]string{
			"/etc/ssh/a.conf": "Match all\nPort 2222",
		}, []uint16{22}},
		{"Match in an included file ends with it", "Include a.conf\nPort 2222\n", map[string]string{
			"/etc/ssh/a.conf": "Match User bob\nX11Forwarding no",
		}, []uint16{2222}},

		{"out of range", "Port 0\nPort 65536\nPort -1\nPort 2222x\nPort\nPort \"\"\n", nil, []uint16{22}},
		{"open quote", "Port \"2222\nPort 2223\n", nil, []uint16{2223}},
		{"open bracket", "ListenAddress [::\nListenAddress [::]x\nListenAddress 0.0.0.0:\nListenAddress \"\"\n", nil, []uint16{22}},
	}
}

func TestSSHDConfig(t *testing.T) {
	for _, tt := range configCases() {
		t.Run(tt.name, func(t *testing.T) {
			files := map[string]string{configFile: tt.text}
			for name, text := range tt.files {
				files[name] = text
			}
			config, err := readSSHDConfig(tree(t, files), configFile)
			if err != nil {
				t.Error(err)
			}
			if got := portsOf(config); !slices.Equal(got, tt.want) {
				t.Errorf("got %v, want %v", got, tt.want)
			}
		})
	}
}

// The real sshd, if it accepts a case of one file, reports the same ports.
func TestRealSSHDAgrees(t *testing.T) {
	sshd := newRealSSHD(t)
	for _, tt := range configCases() {
		if tt.files != nil {
			continue
		}
		if got, ok := sshd.ports(t, tt.text); ok && !slices.Equal(got, tt.want) {
			t.Errorf("%s: sshd reports %v, want %v", tt.name, got, tt.want)
		} else if !ok {
			t.Logf("%s: sshd refuses it", tt.name)
		}
	}
}

func portsOf(c sshdConfig) []uint16 {
	var ports []uint16
	for _, p := range c.listening(configFile) {
		ports = append(ports, p.port)
	}
	slices.Sort(ports)
	return slices.Compact(ports)
}

func TestSSHDConfigPositions(t *testing.T) {
	sys := tree(t, map[string]string{
		configFile:        "\nInclude a.conf\nListenAddress 0.0.0.0\nListenAddress [::]:2223\n",
		"/etc/ssh/a.conf": "# mine\nPort 2222\n",
	})
	config, err := readSSHDConfig(sys, configFile)
	if err != nil {
		t.Fatal(err)
	}
	want := []configPort{{2222, "/etc/ssh/a.conf:2"}, {2223, "/etc/ssh/sshd_config:4"}}
	if got := config.listening(configFile); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// Unreadable files are reported, and the rest is read.
func TestSSHDConfigLimits(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		err   string
	}{
		{"a file that includes itself", map[string]string{configFile: "Port 2222\nInclude sshd_config\n"}, "too many or too deep includes"},
		{"a file that includes itself often", map[string]string{configFile: "Port 2222\n" + strings.Repeat("Include sshd_config\n", 50)}, "too many or too deep includes"},
		{"a large file", map[string]string{configFile: "Port 2222\nInclude big.conf\n", "/etc/ssh/big.conf": strings.Repeat("#\n", maxConfigSize)}, "larger than 1048576 bytes"},
		{"a directory", map[string]string{configFile: "Port 2222\nInclude dir\n", "/etc/ssh/dir/x": ""}, "not a regular file"},
		{"a dangling link", map[string]string{configFile: "Port 2222\nInclude link\n", "/etc/ssh/link": "-> nowhere"}, "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			config, err := readSSHDConfig(tree(t, tt.files), configFile)
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %v, want %q", err, tt.err)
			}
			if got := portsOf(config); !slices.Equal(got, []uint16{2222}) {
				t.Errorf("got %v, want 2222", got)
			}
		})
	}
}

// A FIFO would block a reader for ever.
func TestSSHDConfigDoesNotBlock(t *testing.T) {
	sys := tree(t, map[string]string{configFile: "Port 2222\nInclude fifo\n"})
	if err := syscall.Mkfifo(filepath.Join(sys.Root, "/etc/ssh/fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readSSHDConfig(sys, configFile); err == nil {
		t.Error("the FIFO was read")
	}
}

// realSSHD is this machine's sshd and a host key, without which it prints nothing.
type realSSHD struct {
	sys     *system.System
	key     string
	program string
	file    string
}

func newRealSSHD(t *testing.T) realSSHD {
	t.Helper()
	sys := &system.System{}
	lab.Need(t, "sshd", "ssh-keygen", "unshare")
	dir := t.TempDir()
	program, err := sys.LookPath("sshd")
	if err != nil {
		t.Fatal(err)
	}
	s := realSSHD{sys: sys, program: program, key: filepath.Join(dir, "key"), file: filepath.Join(dir, "sshd_config")}
	makeKey(t, sys, s.key)
	if _, ok := s.ports(t, ""); !ok {
		t.Fatal("sshd rejects an empty configuration")
	}
	return s
}

// ports returns sshd's ports with a configuration. ok is whether sshd accepts it.
func (s realSSHD) ports(t *testing.T, text string) (ports []uint16, ok bool) {
	t.Helper()
	if err := os.WriteFile(s.file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	sshd := withRunDir(s.program, "-T", "-f", s.file, "-h", s.key)
	res, err := s.sys.Run(context.Background(), system.Command{Name: sshd[0], Args: sshd[1:]})
	var exit *system.ExitError
	if errors.As(err, &exit) {
		return nil, false
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(res.Stdout), "\n") {
		if a, is := strings.CutPrefix(line, "listenaddress "); is {
			addr, err := netip.ParseAddrPort(strings.Fields(a)[0])
			if err != nil {
				t.Fatal(err)
			}
			if !addr.Addr().IsLoopback() {
				ports = append(ports, addr.Port())
			}
		}
	}
	slices.Sort(ports)
	return slices.Compact(ports), true
}

// withRunDir runs a command with its own /run, which contains the directory that
// Debian's sshd needs and its unit creates.
func withRunDir(command ...string) []string {
	return append([]string{"unshare", "--mount", "sh", "-c", `mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec "$@"`, "sh"}, command...)
}

func makeKey(t *testing.T, sys *system.System, file string) {
	t.Helper()
	_, err := sys.Run(context.Background(), system.Command{Name: "ssh-keygen", Args: []string{"-q", "-t", "ed25519", "-N", "", "-f", file}})
	if err != nil {
		t.Fatal(err)
	}
}

// TestSSHDConfigAgreesWithSSHD compares random configurations with the real sshd, if
// that accepts them.
func TestSSHDConfigAgreesWithSSHD(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	pick := func(list ...string) string { return list[random.IntN(len(list))] }
	sshd := newRealSSHD(t)
	taken := 0
	for range 80 {
		var text strings.Builder
		for range 1 + random.IntN(5) {
			value := pick("2222", "2223", "\"2224\"", "'2225'", "22\"26\"", "02227", "\\2228", "ssh", "2229#x", "2230 #x")
			keyword := pick("Port", "port", "PORT", "\"Port\"", "Po\"rt\"")
			switch random.IntN(6) {
			case 0, 1:
				keyword, value = pick("ListenAddress", "listenaddress"), pick("0.0.0.0", "::", "[::]", "127.0.0.1", "[::1]", "0.0.0.0:2231", "[::]:2232", "127.0.0.1:2233",
					"[::1]:2234", "0.0.0.0/2235", "[::]/2236", "\"[::]:2237\"", "::1", "::2238", "[0.0.0.0]:2239", "0.0.0.0:ssh", "localhost", "localhost:2240", "[127.0.0.1]")
			case 2:
				keyword, value = "Match", pick("all", "All", "all #x", "User bob", "all User bob", "\"all\"")
			case 3:
				keyword, value = pick("X11Forwarding", "x11forwarding"), pick("yes", "no", "\"yes\"")
			}
			fmt.Fprintf(&text, "%s%s%s%s%s", pick("", " ", "\t", "\r"), keyword, pick(" ", "=", " = ", "\t", "= ", " =", "  "), value, pick("\n", "\r\n", " \n", "\f\n", "\n\n"))
		}
		real, ok := sshd.ports(t, text.String())
		if !ok {
			continue
		}
		taken++
		config, err := readSSHDConfig(tree(t, map[string]string{configFile: text.String(), "/etc/services": "ssh 22/tcp\n"}), configFile)
		if got := portsOf(config); err != nil || !slices.Equal(got, real) {
			t.Errorf("%q: got %v, %v; sshd reports %v", text.String(), got, err, real)
		}
	}
	if taken < 15 {
		t.Errorf("sshd accepted only %d of the configurations: too few for this test", taken)
	}
}

// The kernel's files are not read: reading some of them blocks.
func TestIncludeKernelFiles(t *testing.T) {
	r := &configReader{sys: &system.System{Root: t.TempDir()}}
	r.parse(configFile, "Include /proc/kmsg /????//kmsg /sys/../proc/kmsg\nPort 2222\n", 0)
	if len(r.errs) != 3 || len(r.config.ports) != 1 {
		t.Errorf("%v, ports %v", r.errs, r.config.ports)
	}
}

// A pattern that matches all files of the machine is an error.
func TestIncludeAllFiles(t *testing.T) {
	files := map[string]string{}
	for i := range 23 * 23 {
		files[fmt.Sprintf("/etc/%d/%d/x", i/23, i%23)] = "Port 3333\n"
	}
	r := &configReader{sys: tree(t, files)}
	r.parse(configFile, "Include /etc/*/*/x /etc/*/*/x\nInclude /etc/*/*/x\nPort 2222\n", 0)
	if len(r.errs) != 1 || !errors.Is(r.errs[0], errTooMany) || len(r.config.ports) != 1 {
		t.Errorf("%v, %d ports", r.errs, len(r.config.ports))
	}
}

func FuzzSSHDConfig(f *testing.F) {
	for _, seed := range []string{
		"Port 22\n", "ListenAddress [::]:22 rdomain x\nMatch all\nPort=\"2\"\n", "Include /etc/ssh/*\n", "Include /????//????", "\"", "Port \\", "ListenAddress [", "Match", "=",
	} {
		f.Add(seed)
	}
	sys := &system.System{Root: f.TempDir()}
	f.Fuzz(func(t *testing.T, text string) {
		// Files outside /etc are the real machine's: a few are enough.
		r := &configReader{sys: sys, files: maxConfigFiles - 4}
		r.parse(configFile, text, 0)
		for _, p := range r.config.listening(configFile) {
			if p.port == 0 || p.why == "" {
				t.Errorf("%+v from %q", p, text)
			}
		}
	})
}
