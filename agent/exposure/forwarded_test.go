package exposure

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// read returns the tables of a text of iptables-save without the lines that declare chains.
func read(t *testing.T, family, table, rules string) []Table {
	t.Helper()
	text, declared := "*"+table+"\n", map[string]bool{}
	for _, l := range strings.Split(rules, "\n") {
		if c := strings.Fields(l)[1]; !declared[c] {
			declared[c] = true
			text += ":" + c + " - [0:0]\n"
		}
	}
	tables, _, err := ReadSave("iptables", family, []byte(text+rules+"\nCOMMIT\n"))
	if err != nil {
		t.Fatal(err)
	}
	return tables
}

// earlier orders forwarded ports in some way.
func earlier(a, b firewall.ForwardedPort) bool { return fmt.Sprint(a) < fmt.Sprint(b) }

// TestForwarded checks which ports are listed as forwarded, for rules of other programs as
// iptables-save printed them on real machines.
func TestForwarded(t *testing.T) {
	published := func(port string) firewall.ForwardedPort {
		return firewall.ForwardedPort{Family: "ipv4", Proto: "tcp", Port: port, To: "172.17.0.2", By: "nat PREROUTING"}
	}
	const forwards = "-A PREROUTING -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2\n-A PREROUTING -p tcp -m tcp --dport 81 -j DNAT --to-destination 172.17.0.2"
	for _, tt := range []struct {
		name, nat, family string
		want              []firewall.ForwardedPort
		filter            string // "" accepts all
	}{
		{"Docker", `-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 5432 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER -d 192.0.2.1/32 ! -i docker0 -p udp -m udp --dport 8000 -j DNAT --to-destination 172.17.0.2:9000
-A DOCKER -d 127.0.0.1/32 ! -i docker0 -p tcp -m tcp --dport 6379 -j DNAT --to-destination 172.17.0.2:6379
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 5432 -j DNAT --to-destination 172.17.0.2:5432`, "ip", []firewall.ForwardedPort{
			{Family: "ipv4", Proto: "tcp", Port: "5432", To: "172.17.0.2:5432", By: "nat DOCKER", Program: "Docker"},
			{Family: "ipv4", Proto: "udp", Port: "8000", On: "192.0.2.1", To: "172.17.0.2:9000", By: "nat DOCKER", Program: "Docker"},
		}, ""},
		{"Docker's IPv6", `-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d ::1/128 -m addrtype --dst-type LOCAL -j DOCKER
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 5432 -j DNAT --to-destination [fd00:d0c::242:ac11:2]:5432`, "ip6", []firewall.ForwardedPort{
			{Family: "ipv6", Proto: "tcp", Port: "5432", To: "[fd00:d0c::242:ac11:2]:5432", By: "nat DOCKER", Program: "Docker"},
		}, ""},
		{"netavark", `-A PREROUTING -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j NETAVARK-HOSTPORT-DNAT
-A POSTROUTING -j NETAVARK-HOSTPORT-MASQ
-A POSTROUTING -s 10.89.0.0/24 -j NETAVARK-6C02BEA31AC99
-A NETAVARK-6C02BEA31AC99 -d 10.89.0.0/24 -j ACCEPT
-A NETAVARK-6C02BEA31AC99 ! -d 224.0.0.0/4 -j MASQUERADE
-A NETAVARK-DN-6C02BEA31AC99 -s 10.89.0.0/24 -p tcp -m tcp --dport 5432 -j NETAVARK-HOSTPORT-SETMARK
-A NETAVARK-DN-6C02BEA31AC99 -s 127.0.0.1/32 -p tcp -m tcp --dport 5432 -j NETAVARK-HOSTPORT-SETMARK
-A NETAVARK-DN-6C02BEA31AC99 -p tcp -m tcp --dport 5432 -j DNAT --to-destination 10.89.0.2:5432
-A NETAVARK-DN-6C02BEA31AC99 -d 192.0.2.1/32 -p udp -m udp --dport 8000:8002 -j DNAT --to-destination 10.89.0.2:9000-9002/8000
-A NETAVARK-DN-6C02BEA31AC99 -d 127.0.0.1/32 -p tcp -m tcp --dport 6379 -j DNAT --to-destination 10.89.0.2:6379
-A NETAVARK-HOSTPORT-DNAT -p tcp -m tcp --dport 5432 -m comment --comment "dnat name: six id: 5133 --dport 1" -j NETAVARK-DN-6C02BEA31AC99
-A NETAVARK-HOSTPORT-DNAT -p udp -m udp --dport 8000:8002 -m comment --comment "dnat name: six id: 5133" -j NETAVARK-DN-6C02BEA31AC99
-A NETAVARK-HOSTPORT-DNAT -p tcp -m tcp --dport 6379 -m comment --comment "dnat name: six id: 5133" -j NETAVARK-DN-6C02BEA31AC99
-A NETAVARK-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000`, "ip", []firewall.ForwardedPort{
			{Family: "ipv4", Proto: "tcp", Port: "5432", To: "10.89.0.2:5432", By: "nat NETAVARK-DN-6C02BEA31AC99", Program: "podman"},
			{Family: "ipv4", Proto: "udp", Port: "8000-8002", On: "192.0.2.1", To: "10.89.0.2:9000-9002", By: "nat NETAVARK-DN-6C02BEA31AC99", Program: "podman"},
		}, ""},
		{"CNI", `-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A CNI-DN-0d9e -s 10.88.0.0/16 -p tcp -m tcp --dport 80 -j CNI-HOSTPORT-SETMARK
-A CNI-DN-0d9e -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.88.0.2:8080
-A CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"podman\" id: \"5133\"" -m multiport --dports 80,443 -j CNI-DN-0d9e
-A CNI-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000`, "ip", []firewall.ForwardedPort{
			{Family: "ipv4", Proto: "tcp", Port: "80", To: "10.88.0.2:8080", By: "nat CNI-DN-0d9e", Program: "CNI"},
		}, ""},
		// The address of a cluster's service is not one of this host.
		{"kube-proxy", `-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-SERVICES -d 10.96.0.9/32 -p tcp -m comment --comment "default/web cluster IP" -m tcp --dport 80 -j KUBE-SVC-WEB
-A KUBE-SERVICES -m comment --comment "nodeports" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
-A KUBE-NODEPORTS -p tcp -m comment --comment "default/web" -m tcp --dport 30080 -j KUBE-EXT-WEB
-A KUBE-EXT-WEB -m comment --comment "pod traffic" -m addrtype --src-type LOCAL -j KUBE-SVC-NONE
-A KUBE-EXT-WEB -j KUBE-SVC-WEB
-A KUBE-SVC-NONE -j KUBE-SEP-B
-A KUBE-SVC-WEB -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-A
-A KUBE-SEP-A -s 10.244.0.5/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.244.0.5:8080
-A KUBE-SEP-B -p tcp -m tcp -j DNAT --to-destination 10.244.0.6:8080`, "ip", []firewall.ForwardedPort{
			{Family: "ipv4", Proto: "tcp", Port: "30080", To: "10.244.0.5:8080", By: "nat KUBE-SEP-A", Program: "kube-proxy"},
		}, ""},
		{"LXD", `-A PREROUTING -d 192.0.2.1/32 -p tcp -m tcp --dport 80 -m comment --comment "generated for LXD container c1 (web)" -j DNAT --to-destination 10.1.1.2:80`,
			"ip", []firewall.ForwardedPort{{Family: "ipv4", Proto: "tcp", Port: "80", On: "192.0.2.1", To: "10.1.1.2:80", By: "nat PREROUTING", Program: "LXD"}}, ""},
		// 25/tcp is forwarded on the private interface.
		{"by hand", `-A PREROUTING -i eth0 -p 6 -m tcp --dport 8000:8010 -j DNAT --to-destination 10.0.0.2
-A PREROUTING -p udp -m multiport --dports 53,5000:5010 -j DNAT --to-destination 10.0.0.3 --random
-A PREROUTING -p tcp -m tcp --dport 8000:8010 -j DNAT --to-destination 10.0.0.2
-A PREROUTING -d 198.51.100.0/24 -j NETMAP --to 10.0.0.0/24
-A PREROUTING ! -d 192.0.2.1/32 -p tcp -m tcp --dport 25 -g MAIL
-A MAIL -j DNAT --to-destination 10.0.0.4:2525`, "ip", []firewall.ForwardedPort{
			{Family: "ipv4", Proto: "tcp", Port: "25", To: "10.0.0.4:2525", By: "nat MAIL"},
			{Family: "ipv4", Proto: "tcp", Port: "8000-8010", To: "10.0.0.2", By: "nat PREROUTING"},
			{Family: "ipv4", Proto: "udp", Port: "53", To: "10.0.0.3", By: "nat PREROUTING"},
			{Family: "ipv4", Proto: "udp", Port: "5000-5010", To: "10.0.0.3", By: "nat PREROUTING"},
		}, ""},
		{"all of a network", `-A PREROUTING -d 192.0.2.0/24 -j NETMAP --to 10.0.1.0/24`, "ip",
			[]firewall.ForwardedPort{{Family: "ipv4", Proto: "any", Port: "any", On: "192.0.2.0/24", To: "10.0.1.0/24", By: "nat PREROUTING"}}, ""},
		{"not from outside", `-A PREROUTING -i lo -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2
-A PREROUTING -i docker0 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2
-A PREROUTING -d 127.0.0.0/8 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2
-A PREROUTING -d 198.51.100.0/24 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2
-A PREROUTING -s 127.0.0.1/32 -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2
-A PREROUTING -m addrtype --src-type LOCAL -j DNAT --to-destination 10.0.0.2
-A PREROUTING -p icmp -j DNAT --to-destination 10.0.0.2
-A PREROUTING -p tcp -m tcp --dport 81 -j A
-A A -p tcp -m tcp --dport 82 -j DNAT --to-destination 10.0.0.2
-A A -p udp -m udp --dport 81 -j DNAT --to-destination 10.0.0.2
-A A -p tcp -j NOWHERE
-A NOWHERE -j RETURN
-A INPUT -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2
-A OUTPUT -j MINE
-A MINE -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2
-A NOBODYS -p tcp -m tcp --dport 80 -j DNAT --to-destination 10.0.0.2`, "ip", nil, ""},
		{"the lowest and the highest port", `-A PREROUTING -p tcp -m tcp --dport 0:99 -j DNAT --to-destination 172.17.0.2
-A PREROUTING -p tcp -m tcp --dport 60000:65535 -j DNAT --to-destination 172.17.0.2`, "ip", []firewall.ForwardedPort{published("1-99"), published("60000-65535")}, ""},
		{"a range of a jump", `-A PREROUTING -p tcp -m tcp --dport 8000:8010 -j WEB
-A PREROUTING -p tcp -m tcp --dport 9000:9010 -j MORE
-A WEB -p tcp -j DNAT --to-destination 172.17.0.2
-A MORE -p tcp -m multiport --dports 9000,9010 -j DNAT --to-destination 172.17.0.2`, "ip", []firewall.ForwardedPort{
			{Family: "ipv4", Proto: "tcp", Port: "8000-8010", To: "172.17.0.2", By: "nat WEB"},
			{Family: "ipv4", Proto: "tcp", Port: "9000", To: "172.17.0.2", By: "nat MORE"},
			{Family: "ipv4", Proto: "tcp", Port: "9010", To: "172.17.0.2", By: "nat MORE"},
		}, ""},
		{"a range that other rules divide", `-A PREROUTING -p tcp -m tcp --dport 8000:8010 -j DNAT --to-destination 172.17.0.2`, "ip",
			[]firewall.ForwardedPort{published("8000-8010")}, "-A INPUT -p tcp -m tcp --dport 8005 -j ACCEPT"},
		{"two protocols", `-A PREROUTING -p tcp -m tcp --dport 53 -j DNAT --to-destination 172.17.0.2
-A PREROUTING -p udp -m udp --dport 53 -j DNAT --to-destination 172.17.0.2`, "ip", []firewall.ForwardedPort{
			published("53"), {Family: "ipv4", Proto: "udp", Port: "53", To: "172.17.0.2", By: "nat PREROUTING"},
		}, ""},
		{"every port of a protocol", `-A PREROUTING -p udp -j DNAT --to-destination 172.17.0.2`, "ip",
			[]firewall.ForwardedPort{{Family: "ipv4", Proto: "udp", Port: "any", To: "172.17.0.2", By: "nat PREROUTING"}}, ""},
		{"to this host", `-A PREROUTING -p tcp -m tcp --dport 80 -j REDIRECT --to-ports 8080
-A PREROUTING -p tcp -m tcp --dport 83 -j DNAT --to-destination 192.0.2.1:8080
-A PREROUTING -p tcp -m tcp --dport 84 -j REDIRECT --to-ports 8081
-A PREROUTING -p tcp -m tcp --dport 85 -j REDIRECT
-A PREROUTING -p tcp -m tcp --dport 86 -j REDIRECT --to-ports 8080-8090`, "ip", []firewall.ForwardedPort{
			{Family: "ipv4", Proto: "tcp", Port: "80", To: "port 8080", By: "nat PREROUTING", Local: true},
			{Family: "ipv4", Proto: "tcp", Port: "83", To: "192.0.2.1:8080", By: "nat PREROUTING", Local: true},
			{Family: "ipv4", Proto: "tcp", Port: "85", To: "this host", By: "nat PREROUTING", Local: true},
			{Family: "ipv4", Proto: "tcp", Port: "86", To: "this host", By: "nat PREROUTING", Local: true},
		}, "-A INPUT -p tcp -m tcp --dport 8081 -j DROP"},
		{"to another host for some sources, which FORWARD drops", `-A PREROUTING -s 203.0.113.0/24 -p tcp -m tcp --dport 80 -j DNAT --to-destination 172.17.0.2`, "ip", nil, "-A FORWARD -j DROP"},
		{"FORWARD accepts one", forwards, "ip", []firewall.ForwardedPort{published("80")},
			"-A FORWARD -o docker0 -j DOCKER\n-A FORWARD -j DROP\n-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT"},
		{"FORWARD accepts one perhaps", forwards, "ip", []firewall.ForwardedPort{published("80")},
			"-A FORWARD -p tcp -m tcp --dport 80 -m u32 --u32 0x0 -j ACCEPT\n-A FORWARD -j DROP"},
		{"FORWARD accepts a private interface", forwards, "ip", []firewall.ForwardedPort{published("80"), published("81")},
			"-A FORWARD -i eth1 -j ACCEPT\n-A FORWARD -j DROP"},
		{"FORWARD accepts a virtual interface", forwards, "ip", nil, "-A FORWARD -i docker0 -j ACCEPT\n-A FORWARD -j DROP"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := machine(slices.Concat(read(t, tt.family, "nat", tt.nat), read(t, tt.family, "filter", cmp.Or(tt.filter, "-A FORWARD -j ACCEPT")))...)
			if diff := gocmp.Diff(tt.want, s.Forwarded(s.Report()), cmpopts.SortSlices(earlier)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
