package report

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
)

// TestForwarded checks that a port which is forwarded to a container is listed, and that a
// listener on it is reachable. A warning counts only those that bypass INPUT.
func TestForwarded(t *testing.T) {
	in := ordinary(t)
	beside(t, &in, "nat", "-A PREROUTING -j DOCKER\n-A PREROUTING -p tcp -m tcp --dport 8443 -j REDIRECT --to-ports 80\n"+
		"-A DOCKER -p tcp -m tcp --dport 5432 -j DNAT --to-destination 172.17.0.2:5432\n"+
		"-A DOCKER -p udp -m udp --dport 8000:8010 -j DNAT --to-destination 172.17.0.3:9000-9010")
	in.Facts.Listeners = []host.Listener{{Proto: "tcp", Port: 5432}, {Proto: "udp", Port: 5432}, {Proto: "udp", Port: 8005}, {Proto: "tcp", Port: 8443}, {Proto: "tcp", Port: 8010}}
	s := New(in)
	docker := []firewall.ForwardedPort{
		{Family: "ipv4", Proto: "tcp", Port: "5432", To: "172.17.0.2:5432", By: "nat DOCKER", Program: "Docker"},
		{Family: "ipv4", Proto: "udp", Port: "8000-8010", To: "172.17.0.3:9000-9010", By: "nat DOCKER", Program: "Docker"},
	}
	local := firewall.ForwardedPort{Family: "ipv4", Proto: "tcp", Port: "8443", To: "port 80", By: "nat PREROUTING", Local: true}
	if diff := cmp.Diff([]firewall.ForwardedPort{docker[0], local, docker[1]}, s.Forwarded); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(docker, s.Bypassing()); diff != "" {
		t.Errorf("bypassing (-want +got):\n%s", diff)
	}
	if want := "12 ports are published by Docker, bypassing this firewall"; !slices.ContainsFunc(s.Warnings, func(w Warning) bool { return w.Text == want }) {
		t.Errorf("no warning %q in %+v", want, s.Warnings)
	}
	var reachable []bool
	for _, l := range s.Listening {
		reachable = append(reachable, l.Reachable != nil && *l.Reachable)
	}
	if want := []bool{true, false, true, true, false}; !slices.Equal(reachable, want) {
		t.Errorf("reachable: %v, want %v, of %v", reachable, want, s.Listening)
	}
}
