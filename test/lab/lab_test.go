package lab_test

import (
	"os"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// byHand is a firewall that admits 80 and, from the client, 22. One rule has the flaw of
// the article that this program began with: port 80 answers any flags.
const byHand = `*filter
:INPUT DROP [0:0]
:FORWARD ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
-A INPUT -i lo -j ACCEPT
-A INPUT -p ICMP -j ACCEPT
-A INPUT -p tcp -m tcp --dport 80 -j ACCEPT
-A INPUT -p tcp -m tcp --dport 81 -j ACCEPT
-A INPUT -s CLIENT -p tcp -m tcp --dport 22 -j ACCEPT
-A INPUT -p tcp -m tcp --dport 8080 -j REJECT
COMMIT
`

// TestOutsider tests the lab with rules whose effect is known, so that its results about
// the program can be trusted.
func TestOutsider(t *testing.T) {
	t.Parallel()
	for _, multi := range []string{"xtables-nft-multi", "xtables-legacy-multi"} {
		t.Run(multi, func(t *testing.T) {
			lab.Need(t, multi, "nmap")
			l := lab.New(t)
			l.Host.Listen(t, 22, 80, 8080, 9999)
			for i, to := range l.Server.Both() {
				client, stranger := l.Client.Like(to), l.Stranger.Like(to)
				for _, port := range []uint16{22, 80, 8080, 9999} {
					if err := l.Outsider.Reach(stranger, to, port, lab.Patient); err != nil {
						t.Errorf("without rules: reaching port %d of %v: %v", port, to, err)
					}
				}
				restore := []string{"iptables-restore", "ip6tables-restore"}[i]
				icmp := []string{"icmp", "ipv6-icmp"}[i]
				r := l.Host.Run(t, lab.Command{
					Args:  []string{multi, restore},
					Stdin: replace(byHand, "CLIENT", client.String(), "ICMP", icmp),
				})
				if r.Code != 0 {
					t.Fatalf("loading rules: %s", r.Stderr)
				}
				for _, from := range []lab.Addrs{l.Client, l.Stranger} {
					from := from.Like(to)
					got := l.Outsider.Nmap(t, from, to, "1-10000")
					want := map[uint16]lab.Port{
						0: {"filtered", "no-response"}, 80: {"open", "syn-ack"}, 81: {"closed", "reset"},
						8080: {"filtered", "port-unreach"}}
					if from == client {
						want[22] = lab.Port{State: "open", Reason: "syn-ack"}
					}
					for port, p := range got {
						if want[port] != p {
							t.Errorf("nmap from %v to %v: port %d is %v, want %v", from, to, port, p, want[port])
						}
						delete(want, port)
					}
					for port, p := range want {
						t.Errorf("nmap from %v to %v: port %d is missing, want %v", from, to, port, p)
					}
					if err := l.Outsider.Reach(from, to, 22, lab.Brief); (err == nil) != (from == client) {
						t.Errorf("port 22 from %v: %v", from, err)
					}
				}
				flags := l.Outsider.Flags(t, stranger, to, 80, 81, 9999)
				if got := flags[80][lab.SYN]; got != lab.SYN|lab.ACK {
					t.Errorf("port 80 of %v answers SYN with flags %#02x", to, got)
				}
				// An open port without a session answers ACK with RST, a closed port
				// anything except RST.
				if got := flags[80][lab.ACK]; got != lab.RST {
					t.Errorf("port 80 of %v answers ACK with flags %#02x", to, got)
				}
				if got := len(flags[81]); got != 128 {
					t.Errorf("port 81 of %v answers %d kinds of flags, want the 128 without RST", to, got)
				}
				if got := len(flags[9999]); got != 0 {
					t.Errorf("port 9999 of %v is closed, and answers %d kinds of flags", to, got)
				}
			}
		})
	}
}

func TestSession(t *testing.T) {
	t.Parallel()
	l := lab.New(t)
	l.Host.Listen(t, 80)
	for _, to := range l.Server.Both() {
		s, err := l.Outsider.Dial(l.Stranger.Like(to), to, 80, lab.Patient)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		for range 3 {
			if err := s.Talk(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestUDP checks that an answer is distinguished from silence, also if the kernel tracks an
// exchange with that port.
func TestUDP(t *testing.T) {
	t.Parallel()
	lab.Need(t, "xtables-nft-multi")
	l := lab.New(t)
	l.Host.ListenUDP(t, 9000)
	reach := func(want bool) {
		t.Helper()
		wait := map[bool]time.Duration{true: lab.Patient, false: lab.Brief}[want]
		for _, to := range l.Server.Both() {
			if err := l.Outsider.ReachUDP(l.Stranger.Like(to), to, 9000, wait); (err == nil) != want {
				t.Errorf("want an answer %v, got %v", want, err)
			}
		}
	}
	reach(true)
	for _, tables := range []string{"iptables", "ip6tables"} {
		l.Host.MustRun(t, "xtables-nft-multi", tables, "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
		l.Host.MustRun(t, "xtables-nft-multi", tables, "-A", "INPUT", "-p", "udp", "--dport", "9000", "-j", "ACCEPT")
	}
	reach(true)
	for _, tables := range []string{"iptables", "ip6tables"} {
		l.Host.MustRun(t, "xtables-nft-multi", tables, "-R", "INPUT", "2", "-p", "udp", "--dport", "9000", "-j", "DROP")
	}
	reach(false)
}

// TestFull writes to a full file system, and to the directory under it.
func TestFull(t *testing.T) {
	t.Parallel()
	lab.Need(t)
	n := lab.NewNamespace(t)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/a", []byte("one\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	undo := n.Full(t, dir)
	if got := n.MustRun(t, "cat", dir+"/a"); got != "one\n" {
		t.Errorf("the file holds %q", got)
	}
	if r := n.Run(t, lab.Command{Args: []string{"sh", "-c", "echo two >" + dir + "/b"}}); r.Code == 0 {
		t.Error("there is space for another file")
	}
	undo()
	n.MustRun(t, "sh", "-c", "echo two >"+dir+"/b")
}

// TestNoIPv6 runs a program on a kernel that seems to support no IPv6 sockets.
func TestNoIPv6(t *testing.T) {
	t.Parallel()
	lab.Need(t, "xtables-legacy-multi")
	n := lab.NewNamespace(t)
	for _, none := range []bool{false, true} {
		r := n.Run(t, lab.Command{Args: []string{"xtables-legacy-multi", "ip6tables", "-S"}, NoIPv6: none})
		if refused := strings.Contains(r.Stderr, "Address family not supported"); refused != none {
			t.Errorf("without IPv6 %v: ip6tables printed %q, exit code %d", none, r.Stderr, r.Code)
		}
	}
}

func replace(s string, oldnew ...string) string { return strings.NewReplacer(oldnew...).Replace(s) }
