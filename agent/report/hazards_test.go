package report

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
)

// hazard is a machine, and the warning of it.
type hazard struct {
	make      func(*Input)
	code      string // "" if none of the codes is expected
	text, fix string
	next      bool // the fix is a command
}

func hazards(t *testing.T) map[string]hazard {
	listen := func(in *Input, ports ...uint16) {
		for _, p := range ports {
			in.Facts.Listeners = append(in.Facts.Listeners, host.Listener{Proto: firewall.TCP, Port: p})
		}
	}
	pods := func(in *Input) {
		in.Facts.Interfaces = append(in.Facts.Interfaces, firewall.Interface{Name: "cni0", Zone: firewall.VirtualZone, Addresses: []netip.Prefix{netip.MustParsePrefix("10.42.0.1/24")}})
		in.State.Desired.Interfaces = in.Facts.Interfaces
		listen(in, 22, 6443)
	}
	return map[string]hazard{
		"nothing": {make: func(*Input) {}},
		"IPVS":    {func(in *Input) { in.Facts.Hazards.IPVS = true }, "ipvs-untracked", "IPVS", "sysctl -w net.ipv4.vs.conntrack=1", true},
		"asymmetric": {func(in *Input) { in.Facts.Hazards.Asymmetric = []host.Asymmetric{{Name: "eth1.5", Via: "eth0"}} }, "reply-route",
			"outside on eth1.5: replies would leave by eth0", "sysctl -w net.ipv4.conf.eth1/5.rp_filter=2", true},
		"the kernel's helpers": {func(in *Input) { in.Facts.Hazards.Helpers = []string{"ftp", "sip"} }, "conntrack-helper", "the kernel assigns ftp and sip",
			"sysctl -w net.netfilter.nf_conntrack_helper=0, and open the ports if they are needed", false},
		"a rule's helper": {func(in *Input) { beside(t, in, "raw", "-A PREROUTING -p tcp -m tcp --dport 21 -j CT --helper ftp") }, "conntrack-helper",
			"ftp, by iptables raw PREROUTING -p tcp -m tcp --dport 21 -j CT --helper ftp", "open their ports, such as: basicfw-agent open 50000-50100/tcp", false},
		"an exemption": {func(in *Input) { beside(t, in, "raw", "-A PREROUTING -p tcp -m tcp --dport 80 -j CT --notrack") }, "port-untracked",
			"80/tcp is exempt from conntrack, so its open connections end when it is closed: iptables raw PREROUTING -p tcp -m tcp --dport 80", "remove this rule unless the server is busy", false},
		"an exemption of a closed port": {make: func(in *Input) { beside(t, in, "raw", "-A PREROUTING -p tcp -m tcp --dport 81 -j CT --notrack") }},
		"a transparent proxy": {func(in *Input) {
			beside(t, in, "mangle", "-A PREROUTING -p tcp -m tcp --dport 80 -j TPROXY --on-port 3129 --on-ip 0.0.0.0 --tproxy-mark 0x1/0x1")
		}, "transparent-proxy", "iptables mangle PREROUTING", "open that port, such as: basicfw-agent open 80/tcp", false},
		"a redirect": {func(in *Input) {
			beside(t, in, "nat", "-A PREROUTING -p tcp -m tcp --dport 8080 -j REDIRECT --to-ports 80")
			listen(in, 22)
		}, "redirect-unanswered", "8080/tcp is redirected to port 80, where nothing listens", "start the server, or remove the rule in nat PREROUTING", false},
		"DNAT to this host": {func(in *Input) {
			beside(t, in, "nat", "-A PREROUTING -p tcp -m tcp --dport 8080 -j DNAT --to-destination 192.0.2.1:80")
			listen(in, 22)
		}, "redirect-unanswered", "8080/tcp is redirected to 192.0.2.1:80", "start the server, or remove the rule in nat PREROUTING", false},
		"an answered redirect": {make: func(in *Input) {
			beside(t, in, "nat", "-A PREROUTING -p tcp -m tcp --dport 8080 -j REDIRECT --to-ports 80")
			listen(in, 80)
		}},
		"pods": {func(in *Input) { pods(in); compile(t, in) }, "cluster-api", "pods on cni0 do not reach the API server (6443/tcp)", "basicfw-agent open 6443/tcp --on cni0", true},
		"pods that are let in": {make: func(in *Input) {
			pods(in)
			in.State.Desired.Open = []firewall.Service{{Name: "api", Proto: firewall.TCP, Ports: firewall.Port(6443), On: "cni0"}}
			compile(t, in)
		}},
		"a trusted bridge": {make: func(in *Input) {
			pods(in)
			in.Facts.Interfaces[len(in.Facts.Interfaces)-1].Zone = firewall.TrustedZone
			in.State.Desired.Trusted = []string{"cni0"}
			compile(t, in)
		}},
	}
}

func TestHazards(t *testing.T) {
	for name, tt := range hazards(t) {
		t.Run(name, func(t *testing.T) {
			in := ordinary(t)
			tt.make(&in)
			s := New(in)
			found := 0
			for _, w := range s.Warnings {
				switch w.Code {
				case "ipvs-untracked", "reply-route", "conntrack-helper", "port-untracked", "transparent-proxy", "redirect-unanswered", "cluster-api":
				default:
					continue
				}
				found++
				if w.Code != tt.code || !strings.Contains(w.Text, tt.text) || w.Fix != tt.fix {
					t.Errorf("%+v, want %+v", w, tt)
				}
			}
			if want := tt.code != ""; found > 1 || (found == 1) != want {
				t.Errorf("%d warnings, want one: %v: %+v", found, want, s.Warnings)
			}
			if next := strings.Contains(strings.Join(s.Next, "\n"), tt.fix); tt.code != "" && next != tt.next {
				t.Errorf("next %q", s.Next)
			}
		})
	}
}
