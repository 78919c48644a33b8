package agent

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Forwarded gives the ports that are forwarded past INPUT.
func (a *Agent) Forwarded(ctx context.Context, facts Facts) ([]firewall.Bypass, error) {
	_, in, err := a.find(ctx)
	return bypasses(facts.Interfaces, in.Bypass, facts.Forwarded), err
}

// whereToClose says how the owner can close what is forwarded.
func whereToClose(list []firewall.Bypass) string {
	for _, b := range list {
		if b.Program == "Docker" {
			return "what Docker publishes is not this firewall's to close: publish it on 127.0.0.1, or add rules to the chain DOCKER-USER"
		}
	}
	for _, b := range list {
		if b.Program == "podman" {
			return "what podman publishes is not this firewall's to close: publish it on 127.0.0.1"
		}
	}
	return "what is forwarded is not this firewall's to close: take the rule away where it was made"
}

// bypasses puts together what was found in several places, each once. What is
// forwarded to this host itself comes to INPUT after all (so netavark does with
// DNS), and a private address that is not this host's is no port of it (such as
// a cluster's of a service).
func bypasses(interfaces []firewall.Interface, lists ...[]firewall.Bypass) []firewall.Bypass {
	own := func(p netip.Prefix) bool {
		return slices.ContainsFunc(interfaces, func(i firewall.Interface) bool {
			return slices.ContainsFunc(i.Addresses, func(a netip.Prefix) bool { return p.Contains(a.Addr()) })
		})
	}
	var out []firewall.Bypass
	for _, b := range slices.Concat(lists...) {
		if to := b.Target(); to.IsLoopback() || to.IsValid() && own(netip.PrefixFrom(to, to.BitLen())) {
			continue
		}
		if on, ok := b.Destination(); ok && on.Addr().IsPrivate() && !own(on) {
			continue
		}
		same := func(o firewall.Bypass) bool {
			o.By, o.Program = b.By, b.Program
			return o == b
		}
		if !slices.ContainsFunc(out, same) {
			out = append(out, b)
		}
	}
	return out
}

// BypassVerdict says how many ports are forwarded, each once whatever its
// families and addresses, and by whom if all are by one: "5432/tcp is published
// by Docker".
func BypassVerdict(list []firewall.Bypass) string {
	type port struct {
		proto  string
		number uint16
	}
	ports := map[port]bool{}
	texts := map[string]bool{}
	all, program := false, list[0].Program
	for _, b := range list {
		texts[PortText(b)] = true
		all = all || b.Port == firewall.AnyPort
		if b.Program != program {
			program = ""
		}
		for n := int(b.Span().First); n <= int(b.Span().Last); n++ {
			ports[port{b.Proto, uint16(n)}] = true
		}
	}
	is, what := "is", PortText(list[0])
	switch {
	case len(texts) > 1 && all:
		is, what = "are", "ports"
	case len(texts) > 1:
		is, what = "are", fmt.Sprintf("%d ports", len(ports))
	case len(ports) > 1 && !all:
		is = "are"
	}
	how := "forwarded"
	if program != "" {
		how = "published by " + program
	}
	return fmt.Sprintf("%s %s %s", what, is, how)
}

// PortText is "80/tcp", "8000-8010/udp", "every tcp port" or "every port".
func PortText(b firewall.Bypass) string {
	switch {
	case b.Port != firewall.AnyPort && b.Proto == firewall.AnyPort:
		return "port " + b.Port
	case b.Port != firewall.AnyPort:
		return b.Port + "/" + b.Proto
	case b.Proto != firewall.AnyPort:
		return "every " + b.Proto + " port"
	}
	return "every port"
}
