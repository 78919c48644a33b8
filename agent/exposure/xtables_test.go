package exposure

import (
	"bytes"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/test/lab"
)

var xhost = Host{Type: func(a netip.Addr) string {
	if a == netip.MustParseAddr("192.0.2.1") || a == netip.MustParseAddr("2001:db8::1") {
		return "LOCAL"
	}
	return "UNICAST"
}}

func readTables(t testing.TB, family, text string) []Table {
	t.Helper()
	tables, incompatible, err := ReadSave("iptables", family, []byte(text))
	if err != nil || len(incompatible) > 0 {
		t.Fatalf("%s\n%v, incompatible %q", text, err, incompatible)
	}
	return tables
}

// answer returns the sources from which a packet surely and perhaps arrives.
func answer(tables []Table, p Packet) string {
	all := All(p.Dst)
	sure, perhaps := Ruleset{tables}.Trace(p, all, xhost, false).Open()
	word := func(s Sources) string {
		switch {
		case slices.Equal(s, all):
			return "all"
		case len(s) == 0:
			return "none"
		}
		return text(s)
	}
	switch {
	case len(perhaps) == 0:
		return word(sure)
	case len(sure) == 0:
		return "perhaps " + word(perhaps)
	}
	return word(sure) + ", perhaps " + word(perhaps)
}

// packet returns a packet: "80", "udp 53", "icmp 8", "eth1 80", "to 172.17.0.2 80" or "mark 1 80".
func packet(description string) Packet {
	p := tcp(0)
	words := strings.Fields(description)
	for i := 0; i < len(words); i++ {
		number := func(w string) (n uint16) {
			fmt.Sscan(w, &n)
			return n
		}
		switch w := words[i]; w {
		case "v6":
			p.Family, p.Dst = firewall.IPv6, netip.MustParseAddr("2001:db8::1")
		case "udp":
			p.Proto, p.TCPFlags = 17, 0
		case "icmp", "icmp6", "proto":
			i++
			p.Proto, p.ICMPType, p.TCPFlags = map[string]uint8{"icmp": 1, "icmp6": 58}[w], number(words[i])*256, 0
			if w == "proto" {
				p.Proto, p.ICMPType = uint8(number(words[i])), 0
			}
		case "flags":
			i++
			p.TCPFlags = uint8(number(words[i]))
		case "mark":
			i++
			p.Mark = uint32(number(words[i]))
		case "untracked":
			p.Untracked = true
		case "eth1", "lo", "wg0":
			p.In = w
		case "to":
			i++
			p.Dst, p.DstType = netip.MustParseAddr(words[i]), "UNICAST"
			if p.Dst.IsMulticast() {
				p.DstType = "MULTICAST"
			}
		case "broadcast":
			p.Dst, p.DstType = netip.MustParseAddr("192.0.2.255"), "BROADCAST"
		default:
			p.DstPort = number(w)
		}
	}
	return p
}

const (
	ten    = "10.0.0.0-10.255.255.255"
	notTen = "0.0.0.0-9.255.255.255 11.0.0.0-255.255.255.255"
)

// matchTests lists matches, a packet, and the sources from which it is accepted.
var matchTests = []struct{ matches, packet, want string }{
	{"", "80", "all"},
	{"-p tcp --dport 80", "80", "all"},
	{"-p tcp --dport 80", "81", "none"},
	{"-p tcp --dport 80", "udp 80", "none"},
	{"-p 6 -m tcp --destination-port=80", "80", "all"},
	{"-ptcp --dport http", "80", "all"},
	{"--protocol TCP --dport 0x50", "80", "all"},
	{"! -p tcp", "80", "none"},
	{"! -p tcp", "udp 80", "all"},
	{"-p all", "udp 80", "all"},
	{"-p gre", "proto 47", "all"},
	{"-p tcp ! --dport 80", "80", "none"},
	{"-p tcp ! --dport 80", "81", "all"},
	{"-p tcp --dport ! 80", "81", "all"},
	{"-p tcp --dport 80:90", "85", "all"},
	{"-p tcp --dport 80:90", "91", "none"},
	{"-p tcp --dport :90", "1", "all"},
	{"-p tcp --dport 1024:", "1023", "none"},
	{"-p tcp --dport 1024:", "65535", "all"},
	{"-p tcp --sport 1024:", "80", "perhaps all"},
	{"-p tcp --sport 0:65535", "80", "all"},
	{"-s 10.0.0.0/8", "80", ten},
	{"-s 10.0.0.0/255.0.0.0", "80", ten},
	{"! -s 10.0.0.0/8", "80", notTen},
	{"-s ! 10.0.0.0/8", "80", notTen},
	{"-s 0/0", "80", "all"},
	{"! -s 0.0.0.0/0", "80", "none"},
	{"-s 10.0.0.0/255.0.255.0", "80", "perhaps all"},
	{"-s example.com", "80", "perhaps all"},
	{"-s 10.0.0.0/9,10.128.0.0/9", "80", ten},
	{"-d 192.0.2.0/24", "80", "all"},
	{"! -d 192.0.2.1", "80", "none"},
	{"--source 10.0.0.0/8 --dst 192.0.2.1/32", "80", ten},
	{"-i eth0", "80", "all"},
	{"-i eth+", "80", "all"},
	{"-i wg+", "80", "none"},
	{"! -i eth0", "80", "none"},
	{"! -i lo", "80", "all"},
	{"-o eth0", "80", "none"},
	{"! -o eth0", "80", "all"},
	{"-f", "80", "none"},
	{"! -f", "80", "all"},
	{"-p tcp --syn", "80", "all"},
	{"-p tcp ! --syn", "80", "none"},
	{"-p tcp --tcp-flags FIN,SYN,RST,ACK SYN", "flags 3 80", "none"},
	{"-p tcp --tcp-flags ALL NONE", "flags 0 80", "all"},
	{"-p tcp ! --tcp-flags SYN,ACK SYN", "80", "none"},
	{"-p tcp --tcp-option 5", "80", "perhaps all"},
	{"-p tcp -m multiport --dports 22,80:90", "85", "all"},
	{"-p tcp -m multiport --dports 22,80:90", "23", "none"},
	{"-p tcp -m multiport ! --dports 22,80:90", "85", "none"},
	{"-p tcp -m multiport --ports 80", "80", "all"},
	{"-p tcp -m multiport --ports 80", "81", "perhaps all"},
	{"-p tcp -m multiport --sports 80", "81", "perhaps all"},
	{"-m conntrack --ctstate NEW", "80", "all"},
	{"-m conntrack --ctstate RELATED,ESTABLISHED", "80", "none"},
	{"-m conntrack ! --ctstate NEW", "80", "none"},
	{"-m conntrack --ctstate INVALID,UNTRACKED", "untracked 80", "all"},
	{"-m conntrack --ctstate DNAT", "80", "none"},
	{"-m conntrack --ctproto 6", "80", "all"},
	{"-m conntrack --ctproto 6", "untracked 80", "none"},
	{"-m conntrack ! --ctproto 17", "untracked 80", "none"},
	{"-m conntrack --ctstate NEW,UNTRACKED --ctproto 17", "80", "none"},
	{"-m conntrack --ctstate NEW,UNTRACKED --ctproto 17", "untracked 80", "all"},
	{"-m conntrack --ctstate NEW --ctorigsrc 10.0.0.0/8", "80", ten},
	{"-m conntrack --ctorigdst 192.0.2.1 --ctorigdstport 80", "80", "all"},
	{"-m conntrack --ctorigdst 192.0.2.1 --ctorigdstport 80", "81", "none"},
	{"-m conntrack ! --ctorigdst 192.0.2.1", "80", "none"},
	{"-m conntrack --ctdir ORIGINAL", "80", "all"},
	{"-m conntrack --ctdir REPLY", "80", "none"},
	{"-m conntrack --ctstatus ASSURED", "80", "none"},
	{"-m conntrack --ctexpire 10", "80", "perhaps all"},
	{"-m state --state NEW", "80", "all"},
	{"-m state --state ESTABLISHED", "80", "none"},
	{"-m state ! --state INVALID", "80", "all"},
	{"-p icmp --icmp-type echo-request", "icmp 8", "all"},
	{"-p icmp -m icmp --icmp-type 8/0", "icmp 8", "all"},
	{"-p icmp -m icmp --icmp-type 8/1", "icmp 8", "none"},
	{"-p icmp -m icmp ! --icmp-type 8", "icmp 8", "none"},
	{"-p icmp -m icmp --icmp-type any", "icmp 13", "all"},
	{"-p icmp", "80", "none"},
	{"-m addrtype --dst-type LOCAL", "80", "all"},
	{"-m addrtype ! --dst-type LOCAL", "80", "none"},
	{"-m addrtype --dst-type MULTICAST,BROADCAST", "broadcast udp 80", "all"},
	{"-m addrtype --src-type LOCAL", "80", "none"},
	{"-m addrtype --src-type MULTICAST", "80", "224.0.0.0-239.255.255.255"},
	{"-m addrtype --dst-type LOCAL --limit-iface-in", "80", "perhaps all"},
	{"-m iprange --src-range 10.0.0.0-10.255.255.255", "80", ten},
	{"-m iprange ! --src-range 10.0.0.0-10.255.255.255", "80", notTen},
	{"-m iprange --dst-range 192.0.2.2-192.0.2.9", "80", "none"},
	{"-m mark --mark 0x1/0xff", "mark 257 80", "all"},
	{"-m mark ! --mark 0x1", "80", "all"},
	{"-m connmark --mark 0x1", "80", "perhaps all"},
	{"-m pkttype --pkt-type unicast", "80", "all"},
	{"-m pkttype --pkt-type multicast", "80", "none"},
	{"-m pkttype ! --pkt-type broadcast", "80", "all"},
	{"-m set --match-set good src", "80", "perhaps all"},
	{"-m set ! --match-set good src -s 10.0.0.0/8", "80", "perhaps " + ten},
	{"-m limit --limit 5/min -p tcp --dport 81", "80", "none"},
	{"-m hashlimit --hashlimit-upto 5/min --hashlimit-burst 5 --hashlimit-mode srcip --hashlimit-name x -m tcp -p tcp --dport 80", "80", "perhaps all"},
	{"-m recent --update --seconds 60 --hitcount 4 --name SSH --mask 255.255.255.255 --rsource", "80", "perhaps all"},
	{"-m recent --set --name SSH --mask 255.255.255.255 --rsource", "80", "all"},
	{"-m recent --name SSH --set -s 10.0.0.0/8", "80", ten},
	{"-m u32 --u32 6&0xFF=1", "80", "perhaps all"},
	{"-m u32 ! --u32 6&0xFF=1", "80", "perhaps all"},
	{`-m string --string "-j DROP" --algo bm`, "80", "perhaps all"},
	{`-m comment --comment "-j DROP \"quoted\" it\'s \\ ü" -p tcp`, "80", "all"},
	{"-m comment --comment \"two\nlines\n-A INPUT -j DROP\" -s 10.0.0.0/8", "80", ten},
	{"-m comment --comment x --made-up 1", "80", "perhaps all"},
	{"--made-up", "80", "perhaps all"},
	{"-c 5 7 -p tcp", "80", "all"},
}

// TestReadSave traces packets through INPUT with one rule "-j ACCEPT" and policy DROP.
func TestReadSave(t *testing.T) {
	for _, tt := range matchTests {
		for _, line := range []string{"-A INPUT " + tt.matches + " -j ACCEPT", "[5:7] -A INPUT -j ACCEPT " + tt.matches, "-I INPUT 1 " + tt.matches + " -jACCEPT"} {
			tables := readTables(t, "ip", "*filter\n:INPUT DROP [0:0]\n"+line+"\nCOMMIT\n")
			if got := answer(tables, packet(tt.packet)); got != tt.want {
				t.Errorf("%s: %s from %s, want %s", line, tt.packet, got, tt.want)
			}
		}
	}
}

// TestReadSaveTables traces packets through whole files.
func TestReadSaveTables(t *testing.T) {
	const half = "0.0.0.0-127.255.255.255"
	const closed = "*filter\n:INPUT DROP\n:FORWARD DROP\n"
	for _, tt := range []struct{ file, packet, want string }{
		{"", "80", "all"},
		{"*filter\n-P INPUT DROP\nCOMMIT", "80", "none"},
		{"*filter\r\n:INPUT DROP [0:0]\r\n-A INPUT -p tcp --dport 80 -j ACCEPT\r\nCOMMIT\r\n", "80", "all"},
		{"*filter\n-A INPUT -p tcp --dport 80 -j DROP\nCOMMIT", "80", "none"},
		{"*filter\n-A INPUT -j DROP\n-I INPUT -s 0.0.0.0/1 -j ACCEPT\nCOMMIT", "80", half},
		{"*filter\n-A INPUT -p udp\n-A INPUT -j DROP\n-I INPUT 2 -s 0.0.0.0/1 -j ACCEPT\nCOMMIT", "80", half},
		{"*filter\n-A INPUT -j DROP\n-F INPUT\nCOMMIT", "80", "all"},
		{"*filter\n-N X\n-A INPUT -j X\n-A X -s 0.0.0.0/1 -j RETURN\n-A X -j REJECT --reject-with tcp-reset\nCOMMIT", "80", half},
		{closed + "-N X\n-A INPUT -g X\n-A INPUT -j ACCEPT\n-A X -s 0.0.0.0/1 -j ACCEPT\nCOMMIT", "80", half},
		{"*filter\n-A INPUT -j LOG --log-prefix \"-j DROP\"\n-A INPUT -j NFQUEUE --queue-num 1\nCOMMIT", "80", "perhaps all"},
		{"*filter\n-A INPUT -j LOG --log-prefix \"-j DROP\" --log-level 7\n-A INPUT -j TARPIT\nCOMMIT", "80", "none"},
		{"*filter\n-A INPUT -j MYSTERY --now\nCOMMIT", "80", "perhaps all"},
		{"*filter\n-A INPUT -j ACCEPT --now\n-A INPUT -j DROP\nCOMMIT", "80", "perhaps all"},
		{"*raw\n-A PREROUTING -p tcp -m conntrack --ctstate INVALID -j DROP\nCOMMIT", "80", "none"},
		{"*raw\n-A PREROUTING -p tcp -m conntrack --ctstate NEW -j DROP\nCOMMIT", "80", "all"},
		{"*raw\n-A PREROUTING -p tcp -m conntrack --ctproto 6 -j DROP\nCOMMIT", "80", "all"},
		{"*raw\n-A PREROUTING -p tcp -j CT --notrack\nCOMMIT\n" + closed + "-A INPUT -m state --state UNTRACKED -j ACCEPT\nCOMMIT", "80", "all"},
		{"*raw\n-A PREROUTING -p tcp -j CT --helper ftp\nCOMMIT\n" + closed + "-A INPUT -m state --state NEW -j ACCEPT\nCOMMIT", "80", "all"},
		{"*raw\n-A PREROUTING -j NOTRACK\nCOMMIT\n" + closed + "-A INPUT -m state --state NEW -j ACCEPT\nCOMMIT", "80", "none"},
		{"*mangle\n-A PREROUTING -s 0.0.0.0/1 -j MARK --set-xmark 0x10/0xf0\nCOMMIT\n" + closed + "-A INPUT -m mark --mark 0x11/0xff -j ACCEPT\nCOMMIT", "mark 1 80", half},
		{"*mangle\n-A PREROUTING -j MARK --or-mark 2\n-A PREROUTING -j MARK --and-mark 0xfe\nCOMMIT\n" + closed + "-A INPUT -m mark --mark 2 -j ACCEPT\nCOMMIT", "mark 257 80", "all"},
		{"*mangle\n-A PREROUTING -j MARK --set-mark 1\n-A PREROUTING -j CONNMARK --restore-mark\nCOMMIT\n" + closed + "-A INPUT -m mark --mark 1 -j ACCEPT\nCOMMIT", "80", "perhaps all"},
		{"*mangle\n-A PREROUTING -j MARK --set-mark 1\n-A PREROUTING -j CONNMARK --save-mark\nCOMMIT\n" + closed + "-A INPUT -m mark --mark 1 -j ACCEPT\nCOMMIT", "80", "all"},
		{"*mangle\n-A INPUT -j DROP\nCOMMIT", "80", "none"},
		{"*security\n-A INPUT -j DROP\nCOMMIT", "80", "none"},
		{"*nat\n-A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080\nCOMMIT\n" + closed + "-A INPUT -p tcp --dport 8080 -j ACCEPT\nCOMMIT", "80", "all"},
		{"*nat\n-A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080\nCOMMIT\n" + closed + "-A INPUT -m conntrack --ctstate DNAT --ctorigdstport 80 -j ACCEPT\nCOMMIT", "80", "all"},
		{"*nat\n-A PREROUTING -p tcp --dport 80 -j DNAT --to-destination 172.17.0.2:8080\nCOMMIT\n" + closed + "-A FORWARD -d 172.17.0.2/32 -p tcp --dport 8080 -j ACCEPT\nCOMMIT", "80", "all"},
		{"*nat\n-A PREROUTING -p tcp --dport 80 -j DNAT --to-destination :8080\nCOMMIT\n" + closed + "-A INPUT -p tcp --dport 8080 -j ACCEPT\nCOMMIT", "80", "all"},
		{closed + "-A FORWARD -o docker0 -j ACCEPT\nCOMMIT", "to 172.17.0.2 80", "perhaps all"},
		{closed + "-A FORWARD ! -o docker0 -j ACCEPT\nCOMMIT", "to 172.17.0.2 80", "perhaps all"},
		{closed + "-N X\n-A FORWARD -j X\n-A X -o docker0 -j ACCEPT\nCOMMIT", "to 172.17.0.2 80", "perhaps all"},
		{closed + "-N X\n-A INPUT -j X\n-A X -o docker0 -j ACCEPT\nCOMMIT", "80", "none"},
		{"*filter\n-A OUTPUT -j DROP\n-A INPUT -j OUTPUT\nCOMMIT", "80", "perhaps all"},
		{"*filter\n-A INPUT -4 -j DROP\nCOMMIT", "80", "none"},
		{"*filter\n-A INPUT -6 -j DROP\nCOMMIT", "80", "all"},
	} {
		if got := answer(readTables(t, "ip", tt.file), packet(tt.packet)); got != tt.want {
			t.Errorf("%s\n%s from %s, want %s", tt.file, tt.packet, got, tt.want)
		}
	}
	const v6 = "*filter\n:INPUT DROP\n-A INPUT -s 2001:db8::/ffff:ffff:: -p ipv6-icmp -m icmp6 --icmpv6-type echo-request -j ACCEPT\n" +
		"-A INPUT -p tcp --dport 80 -j ACCEPT\nCOMMIT\n*nat\n-A PREROUTING -p tcp --dport 443 -j DNAT --to-destination [2001:db8::1]:80\nCOMMIT"
	for description, want := range map[string]string{"v6 80": "all", "v6 443": "all", "v6 22": "none",
		"v6 icmp6 128": "2001:db8::-2001:db8:ffff:ffff:ffff:ffff:ffff:ffff", "80": "all"} {
		if got := answer(readTables(t, "ip6", v6), packet(description)); got != want {
			t.Errorf("%s: from %s, want %s", description, got, want)
		}
	}
}

func TestReadSaveTexts(t *testing.T) {
	tables := readTables(t, "ip", "*filter\n[1:2] -A INPUT  -s 10.0.0.1/32 -m comment --comment \"a\nb\" -j DROP \n-I INPUT 2 -m limit --limit 5/min --limit-burst 7 -j ACCEPT\nCOMMIT")
	rules := tables[0].Chains[0].Rules
	if want := "-s 10.0.0.1/32 -m comment --comment \"a\nb\" -j DROP"; rules[0].Text != want {
		t.Errorf("the text is %q, want %q", rules[0].Text, want)
	}
	if want := "-m limit --limit 5/min --limit-burst 7"; rules[1].Matches[0].Text != want || rules[1].Text != want+" -j ACCEPT" {
		t.Errorf("the text is %q, and of the match %q", rules[1].Text, rules[1].Matches[0].Text)
	}
	_, incompatible, err := ReadSave("iptables", "ip", []byte("# Table `filter' is incompatible, use 'nft' tool.\n*nat\nCOMMIT\n"+
		"# Table `nat' contains incompatible base-chains, use 'nft' tool to list them.\n"))
	if err != nil || !slices.Equal(incompatible, []string{"filter", "nat"}) {
		t.Errorf("incompatible are %q, %v; want filter and nat", incompatible, err)
	}
	for _, bad := range []string{"-A INPUT -j DROP", "*filter\n-A INPUT -j DROP", "*filter\n*nat\nCOMMIT", "*filter\n:INPUT\nCOMMIT", "*filter\nhello\nCOMMIT",
		"*filter\n-A\nCOMMIT", "*filter\n-A INPUT --comment \"x\nCOMMIT\n", "COMMIT", "*filter\n-I INPUT 3 -j DROP\nCOMMIT", "*filter\n-D INPUT 1\nCOMMIT"} {
		if tables, _, err := ReadSave("iptables", "ip", []byte(bad)); err == nil {
			t.Errorf("%q: no error, but %v", bad, tables)
		}
	}
}

// TestReadSaveTime reads 10,000 rules.
func TestReadSaveTime(t *testing.T) {
	var b strings.Builder
	b.WriteString("*filter\n:INPUT DROP [0:0]\n")
	for i := range 10000 {
		fmt.Fprintf(&b, "-A INPUT -s 10.%d.%d.0/24 -i eth0 -p tcp -m tcp --dport %d -m conntrack --ctstate NEW -m comment --comment \"rule %d\" -j ACCEPT\n", i/256, i%256, i+1, i)
	}
	b.WriteString("COMMIT\n")
	best := time.Hour
	for range 5 {
		start := time.Now()
		readTables(t, "ip", b.String())
		best = min(best, time.Since(start))
	}
	t.Logf("10,000 rules: %v", best)
	if best > 500*time.Millisecond { // 50 ms on an idle machine
		t.Errorf("10,000 rules took %v", best)
	}
}

// TestReadSaveKernel sends the packets of matchTests from 10.0.0.2, and compares which
// rules count them with the answer.
func TestReadSaveKernel(t *testing.T) {
	lab.Need(t, "unshare", "ip", "python3", "iptables-nft-restore")
	rules := []string{} // that the program accepts
	for i, tt := range matchTests {
		rules = append(rules, fmt.Sprintf(":T%d -\n-A INPUT -j T%d\n-A T%d %s", i, i, i, tt.matches))
	}
	for {
		cmd := exec.Command("unshare", "-mn", "iptables-nft-restore")
		cmd.Stdin = strings.NewReader("*filter\n" + strings.Join(rules, "\n") + "\nCOMMIT\n")
		out, err := cmd.CombinedOutput()
		if err == nil {
			break
		}
		m := regexp.MustCompile(`line:? (\d+)`).FindSubmatch(out)
		if m == nil {
			t.Fatalf("%v: %s", err, out)
		}
		bad, _ := strconv.Atoi(string(m[1]))
		bad-- // the first is the table's
		i := 0
		for ; i < len(rules)-1 && bad > strings.Count(rules[i], "\n")+1; i++ {
			bad -= strings.Count(rules[i], "\n") + 1
		}
		rules = slices.Delete(rules, i, i+1)
	}
	file := filepath.Join(t.TempDir(), "rules")
	if err := os.WriteFile(file, []byte("*filter\n"+strings.Join(rules, "\n")+"\nCOMMIT\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	const script = `mount -t tmpfs x /run; mkdir /run/netns; ip netns add c
ip link add eth0 type veth peer name c0 netns c
ip addr add 192.0.2.1/24 dev eth0; ip link set eth0 up; ip link set lo up; ip route add 10.0.0.0/8 dev eth0
ip netns exec c sh -c 'ip addr add 10.0.0.2/8 dev c0; ip link set c0 up; ip route add 192.0.2.0/24 dev c0'
iptables-nft-restore <"$0"
for p in $1; do
	ip netns exec c python3 -c '
import socket, sys
kind, port = sys.argv[1].split(":")
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM)
s.settimeout(2)
try:
	s.connect(("192.0.2.1", int(port)))
	s.send(b"x")
except ConnectionRefusedError: pass
' $p
	echo "== $p"
	iptables-nft-save -c -t filter
	iptables-nft -Z
done`
	names := map[string]string{"80": "tcp:80", "81": "tcp:81", "85": "tcp:85", "91": "tcp:91", "23": "tcp:23", "1": "tcp:1", "1023": "tcp:1023",
		"65535": "tcp:65535", "udp 80": "udp:80"}
	packets := []string{}
	for _, n := range names {
		packets = append(packets, n)
	}
	out, err := exec.Command("unshare", "-mn", "sh", "-ec", script, file, strings.Join(packets, " ")).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	client, judged := netip.MustParseAddr("10.0.0.2"), map[bool]int{}
	for _, part := range strings.Split(string(out), "== ")[1:] {
		for i, tt := range matchTests {
			at := strings.Index(part, fmt.Sprintf("] -A T%d ", i))
			if !strings.HasPrefix(part, names[tt.packet]+"\n") || at < 0 {
				continue
			}
			tables := readTables(t, "ip", "*filter\n:INPUT DROP\n-A INPUT "+tt.matches+" -j ACCEPT\nCOMMIT")
			sure, perhaps := Ruleset{tables}.Trace(packet(tt.packet), All(client), xhost, false).Open()
			line := part[strings.LastIndex(part[:at], "\n")+1:]
			matched := !strings.HasPrefix(line, "[0:0]")
			judged[matched]++
			if !perhaps.Contains(client) && matched != sure.Contains(client) {
				t.Errorf("%s: the kernel matches %s: %v; the model says %v", tt.matches, tt.packet, matched, !matched)
			}
		}
	}
	t.Logf("of %d rules, %d match and %d do not", len(matchTests), judged[true], judged[false])
	if judged[true] < 20 || judged[false] < 20 {
		t.Errorf("the kernel judged only %v rules", judged)
	}
}

// real lists rules that the programs print in their own way. Those after "?" are not
// modelled.
const real = `
filter INPUT -s 10.0.0.0/8 -j ACCEPT
filter INPUT ! -s 10.0.0.0/8 -j ACCEPT
filter INPUT -d 192.0.2.1 -j ACCEPT
filter INPUT ! -d 192.0.2.0/24 -j DROP
filter INPUT -i lo -j ACCEPT
filter INPUT ! -i eth+ -j ACCEPT
filter INPUT -p tcp -j ACCEPT
filter INPUT ! -p udp -j ACCEPT
filter INPUT -p 47 -j ACCEPT
filter INPUT -p 4 -j ACCEPT
filter INPUT -p 132 -j ACCEPT
filter INPUT -p esp -j ACCEPT
filter INPUT -p ah -j ACCEPT
filter INPUT -p 2 -j ACCEPT
filter INPUT -p 89 -j ACCEPT
filter INPUT -p 103 -j ACCEPT
filter INPUT -p 112 -j ACCEPT
filter INPUT -p 200 -j ACCEPT
4 filter INPUT -f -j DROP
filter INPUT -p tcp --dport 22 -j ACCEPT
filter INPUT -p tcp ! --dport 22 -j DROP
filter INPUT -p tcp --dport 1000:2000 -j ACCEPT
filter INPUT -p tcp --dport :1023 -j ACCEPT
filter INPUT -p tcp --dport 1024: -j ACCEPT
filter INPUT -p tcp --sport 53 -j ACCEPT
filter INPUT -p udp --sport 67 --dport 68 -j ACCEPT
filter INPUT -p sctp --dport 9 -j ACCEPT
filter INPUT -p dccp --dport 9 -j ACCEPT
filter INPUT -p tcp --syn -j ACCEPT
filter INPUT -p tcp ! --syn -j DROP
filter INPUT -p tcp --tcp-flags ALL NONE -j DROP
filter INPUT -p tcp --tcp-flags ALL ALL -j DROP
filter INPUT -p tcp --tcp-flags SYN,FIN SYN,FIN -j DROP
filter INPUT -p tcp -m multiport --dports 22,80,1000:2000 -j ACCEPT
filter INPUT -p tcp -m multiport ! --dports 22,80 -j DROP
filter INPUT -p udp -m multiport --sports 53,123 -j ACCEPT
filter INPUT -p tcp -m multiport --ports 22 -j ACCEPT
filter INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
filter INPUT -m conntrack --ctstate NEW,UNTRACKED -p tcp --dport 22 -j ACCEPT
filter INPUT -m conntrack ! --ctstate INVALID -j ACCEPT
filter INPUT -m conntrack --ctstate DNAT,SNAT -j ACCEPT
filter INPUT -m conntrack --ctproto tcp -j ACCEPT
filter INPUT -m conntrack --ctdir ORIGINAL -j ACCEPT
filter INPUT -m conntrack --ctdir REPLY -j ACCEPT
filter INPUT -m conntrack --ctorigdstport 80 --ctproto tcp -j ACCEPT
filter INPUT -m conntrack --ctorigdstport 80:90 --ctproto tcp -j ACCEPT
4 filter INPUT -m conntrack --ctorigdst 192.0.2.1 --ctorigsrc 10.0.0.0/8 -j ACCEPT
4 filter INPUT -m conntrack --ctreplsrc 192.0.2.1 ! --ctrepldst 10.0.0.1 -j ACCEPT
filter INPUT -m conntrack --ctstatus ASSURED,SEEN_REPLY -j ACCEPT
filter INPUT -m state --state NEW -j ACCEPT
4 filter INPUT -p icmp -j ACCEPT
4 filter INPUT -p icmp --icmp-type echo-request -j ACCEPT
4 filter INPUT -p icmp --icmp-type 3/4 -j ACCEPT
4 filter INPUT -p icmp ! --icmp-type any -j ACCEPT
4 filter INPUT -p icmp --icmp-type any -j ACCEPT
6 filter INPUT -p icmpv6 -j ACCEPT
6 filter INPUT -p icmpv6 --icmpv6-type neighbour-solicitation -j ACCEPT
6 filter INPUT -p icmpv6 --icmpv6-type 4/1 -j ACCEPT
6 filter INPUT -s fe80::/10 -p udp --dport 546 -j ACCEPT
filter INPUT -m addrtype --dst-type LOCAL -j ACCEPT
filter INPUT -m addrtype ! --dst-type LOCAL,MULTICAST -j ACCEPT
filter INPUT -m addrtype --src-type LOCAL -j DROP
4 filter INPUT -m iprange --src-range 10.0.0.1-10.0.0.9 -j ACCEPT
4 filter INPUT -m iprange ! --dst-range 10.0.0.1-10.0.0.9 -j DROP
6 filter INPUT -m iprange --src-range 2001:db8::1-2001:db8::9 -j ACCEPT
filter INPUT -m mark --mark 1 -j ACCEPT
filter INPUT -m mark ! --mark 0x10/0xf0 -j ACCEPT
filter INPUT -m pkttype --pkt-type unicast -j ACCEPT
filter INPUT -m pkttype ! --pkt-type multicast -j ACCEPT
filter INPUT -m comment --comment "it's \"quoted\" \\ ü -j DROP" -j ACCEPT
filter INPUT -m recent --set --name ssh
filter INPUT -j LOG --log-prefix "a b: " --log-level 7 --log-uid
filter INPUT -j NFLOG --nflog-prefix "-j DROP" --nflog-group 3
filter INPUT -j AUDIT --type accept
filter INPUT -j RETURN
filter INPUT -j REJECT
filter INPUT -p tcp -j REJECT --reject-with tcp-reset
filter INPUT -j USER
filter INPUT -g USER
filter FORWARD -i eth0 -j DROP
mangle PREROUTING -j MARK --set-mark 1
mangle PREROUTING -j MARK --set-xmark 0x1/0xff
mangle PREROUTING -j MARK --or-mark 4
mangle PREROUTING -j MARK --and-mark 4
mangle PREROUTING -j MARK --xor-mark 4
mangle PREROUTING -j CONNMARK --save-mark
mangle PREROUTING -j CONNMARK --restore-mark --nfmask 0xf --ctmask 0xf
mangle PREROUTING -j CONNMARK --set-mark 1
mangle FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
mangle PREROUTING -j DSCP --set-dscp 10
mangle PREROUTING -j TOS --set-tos 0x10
4 mangle PREROUTING -j TTL --ttl-set 64
6 mangle PREROUTING -j HL --hl-set 64
mangle PREROUTING -p tcp -j TPROXY --on-port 3129 --tproxy-mark 0x1/0x1
raw PREROUTING -p udp --dport 53 -j NOTRACK
raw PREROUTING -p udp --dport 53 -j CT --notrack
raw PREROUTING -j TRACE
nat PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080
nat PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080-8090 --random
nat PREROUTING -p tcp -j REDIRECT
4 nat PREROUTING -p tcp --dport 80 -j DNAT --to-destination 10.0.0.1:8080
4 nat PREROUTING -p tcp --dport 80 -j DNAT --to-destination 10.0.0.1-10.0.0.9:80-90 --persistent
4 nat PREROUTING -j DNAT --to-destination 10.0.0.1
4 nat PREROUTING -p tcp -j DNAT --to-destination :8080
6 nat PREROUTING -p tcp -j DNAT --to-destination [2001:db8::9]:8080
6 nat PREROUTING -p tcp -j DNAT --to-destination [2001:db8::9-2001:db8::11]:80
6 nat PREROUTING -j DNAT --to-destination 2001:db8::9
4 nat PREROUTING -d 192.0.2.0/24 -j NETMAP --to 10.0.0.0/24
6 nat PREROUTING -d 2001:db8::/64 -j NETMAP --to 2001:db8:1::/64
filter FORWARD -o eth0 -j ACCEPT
? filter INPUT -m limit --limit 5/min -j ACCEPT
? filter INPUT -m hashlimit --hashlimit-upto 5/min --hashlimit-mode srcip --hashlimit-name x -j ACCEPT
? filter INPUT -m recent --update --seconds 60 --hitcount 4 --name ssh -j DROP
? filter INPUT -m time --timestart 08:00 --timestop 18:00 -j ACCEPT
? filter INPUT -m statistic --mode random --probability 0.5 -j ACCEPT
? filter INPUT -p tcp -m connlimit --connlimit-above 3 -j REJECT
? filter INPUT -m quota --quota 1000 -j ACCEPT
? filter INPUT -m mac --mac-source 00:11:22:33:44:55 -j ACCEPT
? filter INPUT -m length --length 0:100 -j ACCEPT
? filter INPUT -m string --string "-j DROP" --algo bm -j ACCEPT
? filter INPUT -m u32 --u32 "6&0xFF=1" -j ACCEPT
? filter INPUT -m connmark --mark 1 -j ACCEPT
? filter INPUT -p tcp --tcp-option 5 -j ACCEPT
? filter INPUT -m addrtype --dst-type LOCAL --limit-iface-in -j ACCEPT
? filter INPUT -m conntrack --ctexpire 1:10 -j ACCEPT
? filter INPUT -m dscp --dscp 10 -j ACCEPT
? filter INPUT -m policy --dir in --pol ipsec -j ACCEPT
? raw PREROUTING -m rpfilter --invert -j DROP
? filter INPUT -j NFQUEUE --queue-num 1
4 ? filter INPUT -s 10.0.0.0/255.0.255.0 -j ACCEPT
4 ? filter INPUT -m ttl --ttl-lt 5 -j ACCEPT
6 ? filter INPUT -m hl --hl-eq 255 -j ACCEPT
`

// TestReadSaveReal reads what the programs print for rules that the kernel has accepted.
func TestReadSaveReal(t *testing.T) {
	lab.Need(t, "unshare", "iptables-nft-save")
	for _, variant := range []string{"nft", "legacy"} {
		for _, family := range []string{"4", "6"} {
			program := map[string]string{"4": "iptables", "6": "ip6tables"}[family] + "-" + variant
			if _, err := exec.LookPath(program); err != nil {
				continue
			}
			readReal(t, program, family)
		}
	}
}

func readReal(t *testing.T, program, family string) {
	accepted, refused := 0, []string{}
	for _, line := range strings.Split(strings.TrimSpace(real), "\n") {
		if strings.HasPrefix(line, "4 ") || strings.HasPrefix(line, "6 ") {
			if line[:1] != family {
				continue
			}
			line = line[2:]
		}
		line, unknown := strings.CutPrefix(line, "? ")
		if family == "6" {
			line = strings.NewReplacer("10.0.0.0/8", "2001:db8::/32", "192.0.2.0/24", "2001:db8::/64", "192.0.2.1", "2001:db8::1").Replace(line)
		}
		table, rule, _ := strings.Cut(line, " ")
		input := fmt.Sprintf("*%s\n:USER - [0:0]\n-A %s\nCOMMIT\n", table, rule)
		cmd := exec.Command("unshare", "-mn", "sh", "-c", program+"-restore && "+program+"-save -t "+table)
		cmd.Stdin = strings.NewReader(input)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil || !bytes.Contains(out, []byte("\n-A ")) {
			refused = append(refused, fmt.Sprintf("%s: %s", line, strings.TrimSpace(stderr.String())))
			continue
		}
		accepted++
		name, _, _ := strings.Cut(rule, " ")
		fam := map[string]string{"4": "ip", "6": "ip6"}[family]
		c := readTables(t, fam, string(out))[0].Chains
		i := slices.IndexFunc(c, func(c Chain) bool { return c.Name == name })
		if i < 0 || len(c[i].Rules) != 1 {
			t.Errorf("%s: no rule in %v from\n%s", line, c, out)
			continue
		}
		r := c[i].Rules[0]
		if !bytes.Contains(out, []byte("\n-A "+name+" "+r.Text+"\n")) {
			t.Errorf("%s: the text is %q, of\n%s", line, r.Text, out)
		}
		if got := unmodelled(r); got != unknown {
			t.Errorf("%s: unknown %v, want %v: %+v", r.Text, got, unknown, r)
		}
		if translates := strings.Contains(line, "REDIRECT") || strings.Contains(line, "DNAT --") || strings.Contains(line, "NETMAP") || strings.Contains(line, "TPROXY"); translates != (r.Translate != nil) {
			t.Errorf("%s: the translation is %v", r.Text, r.Translate)
		}
	}
	t.Logf("%s: %d rules read, %d refused: %s", program, accepted, len(refused), strings.Join(refused, "; "))
	if accepted < 80 && os.Getenv("CI") != "" {
		t.Errorf("%s accepted only %d rules", program, accepted)
	}
}

func unmodelled(r Rule) bool {
	return r.Verdict == Undecided || slices.ContainsFunc(r.Matches, func(m Match) bool { return m.Field == Unknown || m.Field == Sometimes })
}

// FuzzReadSave reads any text twice, traces packets through it, and checks that all rules
// were read.
func FuzzReadSave(f *testing.F) {
	for _, line := range strings.Split(strings.TrimSpace(real), "\n") {
		table, rule, _ := strings.Cut(strings.TrimLeft(line, "46? "), " ")
		f.Add([]byte("*"+table+"\n:INPUT DROP [0:0]\n:USER -\n[0:0] -A "+rule+"\n-I "+rule+"\nCOMMIT\n"), true)
	}
	f.Add([]byte("# Table `filter' is incompatible, use 'nft' tool.\n*filter\n-N X\n-P INPUT DROP\n-A X -g X\n-F\nCOMMIT\n"), false)
	f.Fuzz(func(t *testing.T, data []byte, v4 bool) {
		family := map[bool]string{true: "ip", false: "ip6"}[v4]
		tables, incompatible, err := ReadSave("iptables", family, data)
		if err != nil {
			if len(tables)+len(incompatible) > 0 {
				t.Fatalf("tables with an error: %v", err)
			}
			return
		}
		if len(data) > 2000 {
			return
		}
		for _, table := range tables {
			for _, c := range table.Chains {
				for _, r := range c.Rules {
					if !bytes.Contains(data, []byte(r.Text)) {
						t.Errorf("the text %q is not in %q", r.Text, data)
					}
				}
			}
		}
		for _, p := range []string{"80", "v6 80", "udp 53", "icmp 8", "untracked 22", "to 10.0.0.1 80"} {
			Ruleset{tables}.Trace(packet(p), All(packet(p).Dst), xhost, false)
		}
	})
}
