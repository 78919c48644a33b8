package report

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/store"
)

func TestFindings(t *testing.T) {
	by := exposure.Decision{Program: "iptables", Family: "ip", Table: "filter", Chain: "OTHER", Rule: "-j ACCEPT"}
	entry := func(port uint16, change func(*exposure.Entry)) exposure.Entry {
		e := exposure.Entry{Proto: firewall.TCP, Port: port, Family: "ipv4", Verdict: exposure.Open, On: []string{"eth0"}, By: by}
		if change != nil {
			change(&e)
		}
		return e
	}
	v6 := func(e *exposure.Entry) { e.Family, e.By.Family = "ipv6", "ip6" }
	var many []exposure.Entry
	for port := range uint16(9) {
		many = append(many, entry(80+port, nil))
	}
	for _, tt := range []struct {
		name string
		list []exposure.Entry
		want []string
	}{
		{"nothing", nil, nil},
		{"two ports of both families", []exposure.Entry{entry(22, nil), entry(8080, nil), entry(22, v6), entry(8080, v6)},
			[]string{"22/tcp and 8080/tcp are open to any address on eth0: iptables filter OTHER -j ACCEPT"}},
		{"one family", []exposure.Entry{entry(22, v6)}, []string{"22/tcp is open to any address on eth0 over IPv6: iptables filter OTHER -j ACCEPT"}},
		{"many ports", many, []string{"80/tcp, 81/tcp, 82/tcp, 83/tcp, 84/tcp, 85/tcp and 3 more are open to any address on eth0 over IPv4: iptables filter OTHER -j ACCEPT"}},
		{"different rules, sources, interfaces and verdicts", []exposure.Entry{
			entry(1, nil),
			entry(2, func(e *exposure.Entry) { e.By.Rule = "-p tcp -j ACCEPT" }),
			entry(3, func(e *exposure.Entry) {
				e.From = exposure.Of(netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.9/32"))
			}),
			entry(4, func(e *exposure.Entry) { e.On = []string{"eth0", "eth1"} }),
			entry(5, func(e *exposure.Entry) { e.Verdict = exposure.Perhaps }),
			entry(6, func(e *exposure.Entry) { e.Verdict = exposure.Closed }),
		}, []string{
			"1/tcp is open to any address on eth0 over IPv4: iptables filter OTHER -j ACCEPT",
			"2/tcp is open to any address on eth0 over IPv4: iptables filter OTHER -p tcp -j ACCEPT",
			"3/tcp is open to 10.0.0.0/8 and 192.0.2.9 on eth0 over IPv4: iptables filter OTHER -j ACCEPT",
			"4/tcp is open to any address on eth0, eth1 over IPv4: iptables filter OTHER -j ACCEPT",
			"5/tcp is perhaps open to any address on eth0 over IPv4: iptables filter OTHER -j ACCEPT",
			"6/tcp is blocked for any address on eth0 over IPv4: iptables filter OTHER -j ACCEPT",
		}},
		{"a process, and all other ports", []exposure.Entry{entry(80, func(e *exposure.Entry) { e.Process = "nginx" }), entry(0, nil)},
			[]string{"80/tcp (nginx) and every other tcp port are open to any address on eth0 over IPv4: iptables filter OTHER -j ACCEPT"}},
		{"a table of nftables", []exposure.Entry{entry(80, func(e *exposure.Entry) {
			e.By = exposure.Decision{Program: "nft", Family: "inet", Table: "t", Chain: "in", Rule: "tcp dport 80 drop"}
		})}, []string{"80/tcp is open to any address on eth0 over IPv4: nft inet t in tcp dport 80 drop"}},
		{"a translation", []exposure.Entry{entry(9999, func(e *exposure.Entry) {
			e.Via = exposure.Reference{Program: "iptables", Family: "ip", Table: "nat", Chain: "PREROUTING", Text: "-p tcp -m tcp --dport 9999 -j REDIRECT --to-ports 443"}
		})}, []string{"9999/tcp is open to any address on eth0 over IPv4: iptables nat PREROUTING -p tcp -m tcp --dport 9999 -j REDIRECT --to-ports 443"}},
		{"the settings", []exposure.Entry{entry(80, func(e *exposure.Entry) { e.By.Source = "/etc/basicfw/local.ini:3" })},
			[]string{"80/tcp is open to any address on eth0 over IPv4: /etc/basicfw/local.ini:3"}},
	} {
		if diff := cmp.Diff(tt.want, Findings(tt.list)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestRequirements(t *testing.T) {
	net := netip.MustParsePrefix
	d := firewall.Desired{
		Published: firewall.PublishedProfile,
		Profile:   firewall.Profile{Services: []firewall.Service{{Name: "http", Proto: firewall.TCP, Ports: firewall.Port(80)}}},
		Open:      []firewall.Service{{Name: "calls", Proto: firewall.UDP, Ports: firewall.PortRange{First: 1, Last: 9}, From: []netip.Prefix{net("10.0.0.0/8"), net("192.0.2.9/32")}}},
		SSH:       firewall.SSH{Ports: []uint16{22, 2222}, Mode: firewall.SSHPinned, Allow: []netip.Prefix{net("203.0.113.9/32"), net("2001:db8::/32")}},
	}
	text := func(d firewall.Desired) (out []string) {
		for _, q := range Requirements(d) {
			line := fmt.Sprintf("%s %s/%s", q.Name, q.Ports, q.Proto)
			for _, from := range q.From {
				if from == nil {
					line += " any"
				} else {
					line += fmt.Sprint(" ", firewall.FormatPrefixes(from.Networks()))
				}
			}
			out = append(out, line)
		}
		return out
	}
	pinned := []string{"http 80/tcp any any", "calls 1-9/udp [10.0.0.0/8 192.0.2.9] []",
		"ssh 22/tcp [203.0.113.9] []", "ssh 22/tcp [] [2001:db8::/32]", "ssh 2222/tcp [203.0.113.9] []", "ssh 2222/tcp [] [2001:db8::/32]"}
	if diff := cmp.Diff(pinned, text(d)); diff != "" {
		t.Errorf("pinned (-want +got):\n%s", diff)
	}
	d.SSH.Mode, d.SSH.Allow = firewall.SSHLimited, d.SSH.Allow[:1]
	limited := []string{pinned[0], pinned[1], pinned[2], "ssh 22/tcp any any", pinned[4], "ssh 2222/tcp any any"}
	if diff := cmp.Diff(limited, text(d)); diff != "" {
		t.Errorf("limited (-want +got):\n%s", diff)
	}
}

// TestSituation checks which ports are examined, with and without a desired state.
func TestSituation(t *testing.T) {
	in := ordinary(t)
	in.Facts.SSHPorts = []uint16{2222}
	in.Facts.Listeners = []host.Listener{{Proto: firewall.UDP, Port: 68, Process: "dhclient"}}
	ports := func(st *store.State) (out []string) {
		for _, p := range Situation(in.Facts, in.Families, in.Live, st).Ports {
			out = append(out, fmt.Sprintf("%d/%s %s", p.Number, p.Proto, p.Process))
		}
		return out
	}
	if diff := cmp.Diff([]string{"68/udp dhclient", "2222/tcp "}, ports(nil)); diff != "" {
		t.Errorf("without a desired state (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"68/udp dhclient", "2222/tcp ", "80/tcp ", "80/tcp ", "22/tcp "}, ports(&in.State)); diff != "" {
		t.Errorf("with one (-want +got):\n%s", diff)
	}
	if Situation(in.Facts, in.Families, in.Live, nil).Origin != nil || Situation(in.Facts, in.Families, in.Live, &in.State).Origin == nil {
		t.Error("the sources of rules do not depend on a desired state")
	}
}

// TestExposureWarnings checks the warnings about what other programs' rules open and drop,
// and which finding explains the state.
func TestExposureWarnings(t *testing.T) {
	in := ordinary(t)
	in.State.Desired.SSH.Allow = in.State.Desired.SSH.Allow[:1]
	beside(t, &in, "filter", "-A INPUT -p tcp -m multiport --dports 22,8080 -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 8081 -m limit --limit 3/min -j ACCEPT")
	beside(t, &in, "raw", "-A PREROUTING -p tcp -m tcp --dport 80 -j DROP")
	s := New(in)
	want := []Warning{
		{Exposed, Critical, "22/tcp and 8080/tcp are open to any address on eth0 over IPv4: iptables filter INPUT -p tcp -m multiport --dports 22,8080 -j ACCEPT", "remove this rule, or open the port in the settings"},
		{Blocked, Critical, "80/tcp is blocked for any address on eth0 over IPv4: iptables raw PREROUTING -p tcp -m tcp --dport 80 -j DROP", "remove this rule, or close the port in the settings"},
		{"ssh-family-closed", Info, "SSH over IPv6 is blocked: no IPv6 address is allowed", firewall.SSHOverIPv4},
		{"open-sometimes", Warn, "8081/tcp is perhaps open to any address on eth0 over IPv4: iptables filter INPUT -p tcp -m tcp --dport 8081 -m limit --limit 3/min -j ACCEPT, within a limit of rate or time", ""},
	}
	if diff := cmp.Diff(want, s.Warnings); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if s.State != Exposed || s.Why != want[0].Text || len(s.Next) > 0 {
		t.Errorf("state %s because %s, next %q", s.State, s.Why, s.Next)
	}
}
