package exposure

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// machine is a host with a public, a private and a virtual interface.
func machine(tables ...Table) Situation {
	net := netip.MustParsePrefix
	return Situation{Rules: Ruleset{tables}, Interfaces: []firewall.Interface{
		{Name: "lo", Zone: firewall.LoopbackZone, Addresses: []netip.Prefix{net("127.0.0.1/8"), net("::1/128")}},
		{Name: "eth0", Zone: firewall.PublicZone, DefaultRoute: true, Addresses: []netip.Prefix{net("192.0.2.1/24"), net("2001:db8::1/64"), net("fe80::1/64")}},
		{Name: "eth1", Zone: firewall.PrivateZone, Addresses: []netip.Prefix{net("10.0.0.1/8")}},
		{Name: "docker0", Zone: firewall.VirtualZone, Addresses: []netip.Prefix{net("172.17.0.1/16"), net("fe80::2/64")}},
		{Name: "veth1", Zone: firewall.VirtualZone, Addresses: []netip.Prefix{net("fe80::3/64")}},
	}}
}

func input(drop bool, rules ...Rule) Table {
	return Table{Program: "iptables", Family: "ip", Name: "filter", Chains: []Chain{{Name: "INPUT", Hook: Input, Drop: drop, Rules: rules}}}
}

// line returns an entry as text.
func line(e Entry) string {
	from := firewall.FormatPrefixes(e.From.Networks())
	if len(e.Except) > 0 {
		from = append([]string{"not"}, firewall.FormatPrefixes(e.Except.Networks())...)
	}
	return strings.TrimSpace(fmt.Sprintf("%s %s %v %v %s%s by %s: %s %s %v", e.Family, e.Verdict, from, e.On, e.Process, e.Container, e.By.Chain, e.By.Rule, e.By.Source, e.Why))
}

func TestReport(t *testing.T) {
	limit := Match{Field: Sometimes, Text: "-m limit"}
	on := func(name string) Match { return Match{Field: Interface, Names: []string{name}} }
	redirect := Table{Family: "ip", Chains: []Chain{{Hook: Prerouting, NAT: true, Priority: -100, Rules: []Rule{{Matches: []Match{isTCP, port(80)}, Translate: &Translation{Port: 8080, Known: true}}}}}}
	publish := Table{Family: "ip", Chains: []Chain{{Hook: Prerouting, NAT: true, Priority: -100, Rules: []Rule{{Matches: []Match{isTCP, port(80)}, Translate: &Translation{To: netip.MustParseAddr("172.17.0.2"), Port: 5000, Known: true}}}}}}
	const v6 = "ipv6 open [] [] httpd by : no rule  []"
	for _, tt := range []struct {
		name   string
		tables []Table
		want   []string
	}{
		{"no rules", nil, []string{"ipv4 open [] [] httpd by : no rule  []", v6}},
		{"a policy", []Table{input(true)}, []string{"ipv4 closed [] [] httpd by INPUT: policy DROP  []", v6}},
		{"an open policy", []Table{input(false, rule(Drop, isTCP, port(81)))}, []string{"ipv4 open [] [] httpd by INPUT: policy ACCEPT  []", v6}},
		{"some sources", []Table{input(true, rule(Accept, isTCP, port(80), source("10.0.0.0/8", "192.168.0.0/17")))},
			[]string{"ipv4 open [10.0.0.0/8 192.168.0.0/17] [] httpd by INPUT: 1  []", v6}},
		{"one interface", []Table{input(true, rule(Accept, isTCP, port(80), on("eth1")))},
			[]string{"ipv4 closed [] [eth0 docker0] httpd by INPUT: policy DROP  []", "ipv4 open [] [eth1] httpd by INPUT: 1  []", v6}},
		{"a limit", []Table{input(true, rule(Accept, source("10.0.0.0/8")), rule(Accept, limit))},
			[]string{"ipv4 open [10.0.0.0/8] [] httpd by INPUT: 1  []", "ipv4 perhaps [not 10.0.0.0/8] [] httpd by INPUT: 1  [-m limit]", v6}},
		{"an unknown drop before an accept", []Table{input(true, Rule{Verdict: Drop, Matches: []Match{unknown}, Text: "drop"}, rule(Accept))},
			[]string{"ipv4 perhaps [] [] httpd by INPUT: drop  [-m u32]", v6}},
		{"a redirect", []Table{redirect, input(true, rule(Accept, isTCP, port(8080)))}, []string{"ipv4 open [] [] proxy by INPUT: 1  []", v6}},
		{"a published port", []Table{publish, input(true)}, []string{"ipv4 open [] [] 172.17.0.2:5000 by : no rule  []", v6}},
	} {
		s := machine(tt.tables...)
		s.Add(firewall.TCP, "httpd", 80)
		s.Add(firewall.TCP, "", 80, 443)
		s.Add(firewall.TCP, "proxy", 8080)
		var got []string
		for _, e := range s.Report().Exposure {
			if e.Port == 80 && e.Proto == firewall.TCP {
				got = append(got, line(e))
			}
		}
		slices.Sort(got)
		if slices.Sort(tt.want); !slices.Equal(got, tt.want) {
			t.Errorf("%s:\n%s\nwant\n%s", tt.name, strings.Join(got, "\n"), strings.Join(tt.want, "\n"))
		}
	}
}

// TestReportLists checks the ports that are reported, and which of our rules have a source.
func TestReportLists(t *testing.T) {
	many := input(true)
	for n := range uint32(maxNamed + 50) {
		many.Chains[0].Rules = append(many.Chains[0].Rules, rule(Accept, isTCP, port(1000+n)))
	}
	s := machine(many)
	s.Add(firewall.TCP, "", 22)
	r := s.Report()
	if r.Omitted != 50 || len(r.Interfaces) != 3 {
		t.Errorf("%d ports omitted, interfaces %v", r.Omitted, r.Interfaces)
	}
	if n := len(r.Exposure); n != 2*(1+maxNamed+2) || r.Exposure[0].Port != 22 || r.Exposure[n-1].Port != 0 || !r.Exposure[2].Named {
		t.Errorf("%d entries, %+v", n, r.Exposure)
	}
	span := Match{Field: DestinationPort, Numbers: []Span{{40000, 40100}}}
	s = machine(input(true, rule(Accept, isTCP, span), rule(Drop, isTCP, port(5)), rule(Accept, isTCP, Match{Field: DestinationPort, Not: true, Numbers: []Span{{7, 7}}}, unknown)))
	var ports []string
	for _, e := range s.Report().Exposure {
		if e.Family == "ipv4" {
			ports = append(ports, fmt.Sprintf("%d/%s %s", e.Port, e.Proto, e.Verdict))
		}
	}
	if want := []string{"40000/tcp open", "40100/tcp open", "0/tcp perhaps", "0/udp closed"}; !slices.Equal(ports, want) {
		t.Errorf("ports %q, want %q", ports, want)
	}
	own := rule(Accept, isTCP, port(80))
	own.Text = `-A BASICFW-INPUT -p tcp --dport 80 -m comment --comment basicfw-http -j ACCEPT`
	s = machine(Table{Family: "ip", Name: "filter", Chains: []Chain{{Name: "INPUT", Hook: Input, Drop: true, Rules: []Rule{to(Jump, "BASICFW-INPUT")}}, {Name: "BASICFW-INPUT", Rules: []Rule{own}}}})
	s.On, s.From = "eth0", netip.MustParseAddr("203.0.113.9")
	s.Origin = func(name string, _ netip.Addr) string { return map[string]string{"http": "local.ini:3"}[name] }
	var got []string
	for _, e := range s.Report().Exposure {
		got = append(got, fmt.Sprintf("%d %s", e.Port, line(e)))
	}
	if want := []string{"80 ipv4 open [203.0.113.9] [eth0]  by BASICFW-INPUT: -p tcp --dport 80 -m comment --comment basicfw-http -j ACCEPT local.ini:3 []",
		"0 ipv4 closed [203.0.113.9] [eth0]  by INPUT: policy DROP built in []", "0 ipv4 closed [203.0.113.9] [eth0]  by INPUT: policy DROP built in []"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestExplain(t *testing.T) {
	state := func(names ...string) Match { return Match{Field: State, Names: names} }
	redirect := Table{Family: "ip", Name: "nat", Chains: []Chain{{Name: "PREROUTING", Hook: Prerouting, NAT: true, Priority: -100,
		Rules: []Rule{{Matches: []Match{isTCP, port(80)}, Translate: &Translation{Port: 8080, Known: true}}}}}}
	s := machine(redirect, input(true, rule(Accept, state("RELATED", "ESTABLISHED")), rule(Drop, state("INVALID")), to(Jump, "X", isTCP, port(8080)), rule(Accept, isTCP, port(81), unknown)))
	s.Rules.Tables[1].Chains = append(s.Rules.Tables[1].Chains, Chain{Name: "X", Rules: []Rule{rule(Return, source("203.0.113.9/32")), rule(Accept)}})
	for _, tt := range []struct {
		from, state, verdict, steps string
		port                        uint16
	}{
		{"198.51.100.1", "NEW", Delivered, "redirect to port 8080, jump to X, accept", 80},
		{"203.0.113.9", "NEW", Dropped, "redirect to port 8080, jump to X, return, drop", 80},
		{"203.0.113.9", "ESTABLISHED", Delivered, "redirect to port 8080, accept", 80},
		{"203.0.113.9", "INVALID", Dropped, "accept, drop", 22},
		{"203.0.113.9", "UNTRACKED", Dropped, "drop", 22},
		{"10.1.2.3", "NEW", Perhaps, "accept, perhaps accept, perhaps drop", 81},
		{"2001:db8:9::1", "NEW", Delivered, "", 80},
	} {
		p, err := s.Complete(Probe{From: netip.MustParseAddr(tt.from), Proto: firewall.TCP, Port: tt.port, State: tt.state})
		if err != nil {
			t.Fatal(err)
		}
		e := s.Explain(p)
		var steps []string
		for _, st := range e.Steps {
			steps = append(steps, st.Effect)
		}
		if got := strings.Join(steps, ", "); e.Verdict != tt.verdict || got != tt.steps {
			t.Errorf("%s %s %d: %s: %s; want %s: %s", tt.from, tt.state, tt.port, e.Verdict, got, tt.verdict, tt.steps)
		}
	}
}

func TestComplete(t *testing.T) {
	s := machine()
	for _, tt := range []struct{ from, on, to, want string }{
		{"203.0.113.9", "", "", "eth0 192.0.2.1"},
		{"10.1.2.3", "", "", "eth1 10.0.0.1"},
		{"172.17.0.9", "", "", "docker0 172.17.0.1"},
		{"10.1.2.3", "eth0", "", "eth0 192.0.2.1"},
		{"10.1.2.3", "", "172.17.0.2", "eth1 172.17.0.2"},
		{"192.0.2.1", "", "10.0.0.1", "lo 10.0.0.1"},
		{"2001:db8:9::1", "", "", "eth0 2001:db8::1"},
		{"fe80::9", "", "", "eth0 2001:db8::1"},
		{"203.0.113.9", "nowhere", "", `--on: no interface "nowhere": want one of lo, eth0, eth1, docker0, veth1`},
		{"2001:db8::9", "eth1", "", "eth1 has no ipv6 address: specify --to-addr"},
		{"203.0.113.9", "", "2001:db8::1", "203.0.113.9 and 2001:db8::1 are of different families"},
	} {
		p := Probe{From: netip.MustParseAddr(tt.from), On: tt.on}
		if tt.to != "" {
			p.To = netip.MustParseAddr(tt.to)
		}
		p, err := s.Complete(p)
		got := p.On + " " + p.To.String()
		if err != nil {
			got = err.Error()
		}
		if got != tt.want {
			t.Errorf("%+v: %s", tt, got)
		}
	}
}

func TestNetworks(t *testing.T) {
	for _, want := range [][]string{nil, {"0.0.0.0/0"}, {"::/0"}, {"10.0.0.0/8", "192.0.2.1/32"}, {"10.0.0.1/32", "10.0.0.2/31", "10.0.0.4/32"}, {"255.255.255.254/31"}, {"2001:db8::/32", "ff00::/8"}} {
		s := from(want...)
		var got []string
		size := 0.0
		for _, n := range s.Networks() {
			got = append(got, n.String())
			size += Of(n).size()
		}
		if !slices.Equal(got, want) || s.size() != size {
			t.Errorf("%q is %q, %v and %v addresses", want, got, s.size(), size)
		}
		text, err := s.MarshalJSON()
		if err != nil || strings.Count(string(text), `"`) != 2*len(want) {
			t.Errorf("%s, %v", text, err)
		}
	}
}
