package main

import (
	"fmt"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// bypassVerdict is how many ports are forwarded, each once whatever its
// families and addresses, and by whom if all are by one.
func bypassVerdict(list []firewall.Bypass) string {
	type port struct {
		proto  string
		number uint16
	}
	ports := map[port]bool{}
	texts := map[string]bool{}
	all, program := false, list[0].Program
	for _, b := range list {
		texts[portText(b)] = true
		all = all || b.Port == firewall.AnyPort
		if b.Program != program {
			program = ""
		}
		for n := int(b.Span().First); n <= int(b.Span().Last); n++ {
			ports[port{b.Proto, uint16(n)}] = true
		}
	}
	is, what := "is", portText(list[0])
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

// portText is "80/tcp", "8000-8010/udp", "every tcp port" or "every port".
func portText(b firewall.Bypass) string {
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

func bypassLines(list []firewall.Bypass) []string {
	var out []string
	for _, b := range list {
		line := b.Family + " " + portText(b)
		if b.On != "" {
			line += " on " + b.On
		}
		line += " to " + b.To
		if b.Program != "" {
			line += " by " + b.Program
		}
		out = append(out, fmt.Sprintf("%s (%s)", line, b.By))
	}
	return out
}
