package agent

import (
	"context"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Status lists a port that is forwarded once, whoever found it, leaves out what
// comes to INPUT after all or is none of this host's, and takes a listener
// behind one for reachable.
func TestStatusBypass(t *testing.T) {
	b := newBench(t)
	if _, err := b.agent.Converge(context.Background(), decided(t, "203.0.113.9/32"), options()); err != nil {
		t.Fatal(err)
	}
	db := firewall.Bypass{Family: "ipv4", Proto: "tcp", Port: "5432", To: "172.17.0.2:5432", By: "nat DOCKER", Program: "Docker"}
	like := func(change func(*firewall.Bypass)) firewall.Bypass {
		o := db
		change(&o)
		return o
	}
	b.kernel.bypass = []firewall.Bypass{db,
		like(func(o *firewall.Bypass) { o.On, o.To = "10.96.0.1", "10.244.0.5:443" }),
		like(func(o *firewall.Bypass) { o.On = "192.0.2.1" }),
		like(func(o *firewall.Bypass) { o.On = "10.0.0.0/8" }),
	}
	facts := Facts{
		Interfaces: []firewall.Interface{{Name: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}},
			{Name: "podman0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.88.0.1/16"), netip.MustParsePrefix("fd00::1/64")}}},
		Forwarded: []firewall.Bypass{
			like(func(o *firewall.Bypass) { o.By, o.Program = "t pre", "" }),
			like(func(o *firewall.Bypass) { o.Port, o.Proto, o.To = "8000-8010", "udp", "10.88.0.2:9000-9010" }),
			like(func(o *firewall.Bypass) { o.Port, o.To = "53", "10.88.0.1:1153" }),
			like(func(o *firewall.Bypass) { o.Family, o.Port, o.To = "ipv6", "53", "[fd00::1]:1153" }),
			like(func(o *firewall.Bypass) { o.To = "127.0.0.1:80" }),
		},
		Listeners: []Listener{{Proto: "tcp", Port: 5432}, {Proto: "udp", Port: 5432}, {Proto: "udp", Port: 8010}, {Proto: "tcp", Port: 8010}, {Proto: "tcp", Port: 80}},
	}
	st, err := b.agent.Status(context.Background(), facts)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]firewall.Bypass{db,
		like(func(o *firewall.Bypass) { o.On = "192.0.2.1" }),
		like(func(o *firewall.Bypass) { o.On = "10.0.0.0/8" }),
		like(func(o *firewall.Bypass) { o.Port, o.Proto, o.To = "8000-8010", "udp", "10.88.0.2:9000-9010" }),
	}, st.Bypass); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	var reachable []bool
	for _, l := range st.Listening {
		reachable = append(reachable, l.Reachable)
	}
	if want := []bool{true, false, true, false, true}; !slices.Equal(reachable, want) {
		t.Errorf("reachable are %v, want %v of %v", reachable, want, st.Listening)
	}
}
