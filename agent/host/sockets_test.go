package host

import (
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// sockets opens sockets of each kind on loopback and returns those that Sockets must
// find.
func sockets(t *testing.T) (listening, established []system.Socket) {
	t.Helper()
	add := func(list *[]system.Socket, proto, local, remote string, c syscall.Conn) {
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var st syscall.Stat_t
		if err := raw.Control(func(fd uintptr) { err = syscall.Fstat(int(fd), &st) }); err != nil {
			t.Fatal(err)
		}
		if err != nil {
			t.Fatal(err)
		}
		*list = append(*list, system.Socket{
			Proto: proto, Local: netip.MustParseAddrPort(local), Remote: netip.MustParseAddrPort(remote),
			Inode: st.Ino, UID: uint32(os.Getuid()),
		})
	}
	tcp := func(listen, dial string) {
		l, err := net.Listen("tcp", listen)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		local := l.Addr().String()
		none := "[::]:0"
		if netip.MustParseAddrPort(local).Addr().Is4() {
			none = "0.0.0.0:0"
		}
		add(&listening, "tcp", local, none, l.(*net.TCPListener))
		_, port, _ := net.SplitHostPort(local)
		c, err := net.Dial("tcp", net.JoinHostPort(dial, port))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		add(&established, "tcp", c.LocalAddr().String(), c.RemoteAddr().String(), c.(*net.TCPConn))
		add(&established, "tcp", s.LocalAddr().String(), s.RemoteAddr().String(), s.(*net.TCPConn))
	}
	udp := func(listen, none string) {
		p, err := net.ListenPacket("udp", listen)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		add(&listening, "udp", p.LocalAddr().String(), none, p.(*net.UDPConn))
	}
	tcp("127.0.0.1:0", "127.0.0.1")
	tcp("[::1]:0", "::1")
	tcp("[::]:0", "127.0.0.1") // IPv4 on an IPv6 socket
	udp("127.0.0.1:0", "0.0.0.0:0")
	udp("[::1]:0", "[::]:0")
	return listening, established
}

func TestSockets(t *testing.T) {
	wantListening, wantEstablished := sockets(t)
	listening, established, err := Sockets()
	if err != nil {
		t.Fatal(err)
	}
	contains(t, "listening", listening, wantListening)
	contains(t, "established", established, wantEstablished)
	for _, s := range wantListening {
		if slices.Contains(established, s) {
			t.Errorf("%v is reported as established", s)
		}
	}
	for _, s := range wantEstablished {
		if slices.Contains(listening, s) {
			t.Errorf("%v is reported as listening", s)
		}
	}
}

// A connection that one side has closed is no longer established.
func TestSocketsOmitsHalfClosed(t *testing.T) {
	_, whole := sockets(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c.(*net.TCPConn).CloseWrite()
	if _, err := s.Read(make([]byte, 1)); err != io.EOF {
		t.Fatal("the end did not arrive:", err)
	}
	_, established, err := Sockets()
	if err != nil {
		t.Fatal(err)
	}
	contains(t, "established", established, whole)
	for _, e := range established {
		if p := netip.MustParseAddrPort(s.RemoteAddr().String()); e.Local == p || e.Remote == p {
			t.Errorf("%v is reported as established", e)
		}
	}
}

// The tables in /proc/net list the same sockets as netlink.
func TestProcNet(t *testing.T) {
	listening, established := sockets(t)
	var all []system.Socket
	for _, proto := range []string{"tcp", "udp"} {
		for _, suffix := range []string{"", "6"} {
			list, err := readProcNet("/proc", proto, suffix)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range list {
				if want := uint8(stateListen); s.Proto == "tcp" && slices.Contains(listening, s.Socket) && s.state != want {
					t.Errorf("%v is in state %d, want %d", s.Socket, s.state, want)
				}
				all = append(all, s.Socket)
			}
		}
	}
	contains(t, "all", all, slices.Concat(listening, established))
}

func contains(t *testing.T, what string, list, want []system.Socket) {
	t.Helper()
	for _, s := range want {
		if !slices.Contains(list, s) {
			t.Errorf("%s: %+v is missing", what, s)
		}
	}
}

func TestReadProcNetWithoutIPv6(t *testing.T) {
	dir := t.TempDir()
	if list, err := readProcNet(dir, "tcp", "6"); err != nil || list != nil {
		t.Errorf("got %v, %v; want nothing", list, err)
	}
	if _, err := readProcNet(dir, "tcp", ""); err == nil {
		t.Error("no error without /proc")
	}
}

func TestParseProcNetRefuses(t *testing.T) {
	const head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
	const row = "   0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4026 1 0 100 0 0 10 0\n"
	if list, err := parseProcNet("tcp", head+row); err != nil || len(list) != 1 {
		t.Fatalf("got %v, %v", list, err)
	}
	for _, change := range [][2]string{
		{"0100007F:0016", "0100007F"}, {"0100007F:0016", "0100007:0016"}, {"0100007F:0016", "01007F:0016"},
		{"0100007F:0016", "0100007F:10016"}, {"00000000:0000 0A", "00000000:0000 ZZ"}, {"4026", "-1"},
		{" 1 0 100 0 0 10 0", ""}, {"4026 1 0 100 0 0 10 0", ""},
	} {
		text := head + strings.Replace(row, change[0], change[1], 1)
		_, err := parseProcNet("tcp", text)
		if ok := change[1] == "" && change[0][0] == ' '; (err == nil) != ok {
			t.Errorf("%q for %q: %v", change[1], change[0], err)
		}
	}
}

func FuzzParseProcNet(f *testing.F) {
	f.Add("head\n   0: 0100007F:0016 00000000:0000 0A 0:0 0:0 0 0 0 4026\n")
	f.Fuzz(func(t *testing.T, text string) {
		list, err := parseProcNet("tcp", text)
		if err == nil && len(list) > strings.Count(text, "\n") {
			t.Errorf("%d sockets from %q", len(list), text)
		}
	})
}

func BenchmarkSockets(b *testing.B) {
	for range b.N {
		if _, _, err := Sockets(); err != nil {
			b.Fatal(err)
		}
	}
}
