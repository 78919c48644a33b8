package exposure

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// TestContainerPorts checks which ports of containers other programs' rules publish.
func TestContainerPorts(t *testing.T) {
	text := strings.Join([]string{"*nat", ":PREROUTING ACCEPT [0:0]", ":DOCKER - [0:0]", ":KUBE-SEP-A - [0:0]",
		"-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80",
		"-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8081 -j DNAT --to-destination 172.17.0.2:80",
		"-A DOCKER ! -i docker0 -p udp -m udp --dport 50:60 -j DNAT --to-destination 172.17.0.3",
		"-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 172.17.0.9:9000", // the other hosts of a cluster reach it
		"-A PREROUTING -p tcp -m tcp --dport 1 -j DNAT --to-destination 10.0.0.7:1",
		"-A PREROUTING -p tcp -m tcp --dport 2 -j REDIRECT --to-ports 80",
		"COMMIT", ""}, "\n")
	tables, _, err := ReadSave("iptables", "ip", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	s := Situation{Rules: Ruleset{tables}, Interfaces: []firewall.Interface{
		{Name: "eth0", Zone: firewall.PublicZone, Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}},
		{Name: "eth1", Zone: firewall.PrivateZone, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.1/24")}},
		{Name: "docker0", Zone: firewall.VirtualZone, Addresses: []netip.Prefix{netip.MustParsePrefix("172.17.0.1/16")}},
	}}
	var got []string
	for _, p := range s.ContainerPorts() {
		got = append(got, fmt.Sprintf("%s %s %v", p.Out, p.Proto, p.Ports))
	}
	if diff := cmp.Diff([]string{"docker0 tcp 80", "docker0 udp 50-60"}, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
