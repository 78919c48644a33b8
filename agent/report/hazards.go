package report

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
)

// warnHazards adds the rows about what the kernel and other programs do that a stateful
// firewall does not expect.
func (in Input) warnHazards(w *warnings, situation exposure.Situation, s Status) {
	h := in.Facts.Hazards
	if h.IPVS {
		w.add("ipvs-untracked")
	}
	for _, a := range h.Asymmetric {
		w.addFix("reply-route", fmt.Sprintf("sysctl -w net.ipv4.conf.%s.rp_filter=2", strings.ReplaceAll(a.Name, ".", "/")), a.Name, a.Via)
	}
	if len(h.Helpers) > 0 {
		w.addFix("conntrack-helper", "sysctl -w net.netfilter.nf_conntrack_helper=0, and open the ports if they are needed", "the kernel assigns "+enumerate(h.Helpers, 10))
	}
	by := in.Live.Helpers()
	for _, name := range slices.Sorted(maps.Keys(by)) {
		w.add("conntrack-helper", fmt.Sprintf("%s, by %s", name, ruleText(by[name])))
	}
	for _, e := range situation.Untracked() {
		w.add("port-untracked", portOf(e), ruleOf(e))
	}
	said := map[string]bool{} // both families may have the same rule
	for _, ref := range in.Live.Proxies() {
		if text := ruleText(ref); !said[text] {
			said[text] = true
			w.add("transparent-proxy", text)
		}
	}
	for _, f := range s.Forwarded {
		to, ok := unanswered(f, in.Facts.Listeners)
		if text := PortText(f) + " " + to; ok && !said[text] {
			said[text] = true
			w.addFix("redirect-unanswered", "start the server, or remove the rule in "+f.By, PortText(f), to)
		}
	}
	if bridge := s.podsWithoutAPI(in.Facts.Listeners); bridge != "" {
		w.addFix("cluster-api", fmt.Sprintf("basicfw-agent open %d/tcp --on %s", apiPort, bridge), bridge)
	}
}

// ruleText returns a rule with its table.
func ruleText(r exposure.Reference) string { return ruleOf(exposure.Entry{Via: r}) }

// unanswered returns the port of this host to which a port is forwarded, if nothing
// listens there. It ignores ranges of ports, ports of any protocol, and those on loopback.
func unanswered(f firewall.ForwardedPort, listeners []host.Listener) (to string, ok bool) {
	text, isPort := strings.CutPrefix(f.To, "port ")
	if to, err := netip.ParseAddrPort(f.To); err == nil && !to.Addr().IsLoopback() {
		text, isPort = strconv.Itoa(int(to.Port())), true
	}
	port, err := strconv.ParseUint(text, 10, 16)
	if !f.Local || !isPort || err != nil || f.Proto == firewall.AnyPort {
		return "", false
	}
	return f.To, !slices.ContainsFunc(listeners, func(l host.Listener) bool { return string(l.Proto) == f.Proto && l.Port == uint16(port) })
}

// apiPort is the port of the Kubernetes API server on a node.
const apiPort = 6443

// podsWithoutAPI returns the bridge of pods if they cannot reach the API server of this host.
func (s Status) podsWithoutAPI(listeners []host.Listener) string {
	const bridge = "cni0"
	if !slices.ContainsFunc(s.Interfaces, func(i firewall.Interface) bool { return i.Name == bridge && i.Zone != firewall.TrustedZone }) ||
		!slices.ContainsFunc(listeners, func(l host.Listener) bool { return l.Proto == firewall.TCP && l.Port == apiPort }) {
		return ""
	}
	for _, e := range s.Exposure {
		if e.Proto == firewall.TCP && e.Port == apiPort && e.Verdict != exposure.Closed && (len(e.On) == 0 || slices.Contains(e.On, bridge)) {
			return ""
		}
	}
	return bridge
}
