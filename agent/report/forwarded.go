package report

import (
	"cmp"
	"fmt"
	"math/bits"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Bypassing returns the forwarded ports that bypass the settings.
func (s Status) Bypassing() []firewall.ForwardedPort {
	return slices.DeleteFunc(slices.Clone(s.Forwarded), func(b firewall.ForwardedPort) bool { return b.Local || b.Held })
}

// ClosedPorts returns a sentence about each published port that the settings close, with the
// command that opens it. Each port has one sentence, regardless of its families and addresses.
func ClosedPorts(list []firewall.ForwardedPort) (out []string) {
	for _, b := range list {
		by := cmp.Or(b.Program, "another program")
		if b.Container != "" {
			by += " (" + b.Container + ")"
		}
		text := fmt.Sprintf("%s published by %s: closed", PortText(b), by)
		if b.Port != firewall.AnyPort && b.Proto != firewall.AnyPort {
			text += "; open it: basicfw-agent open " + PortText(b)
		}
		if b.Closed && !slices.Contains(out, text) {
			out = append(out, text)
		}
	}
	return out
}

// howToClose returns what the administrator can do to close forwarded ports.
func howToClose(list []firewall.ForwardedPort) string {
	by := func(program string) bool {
		return slices.ContainsFunc(list, func(b firewall.ForwardedPort) bool { return b.Program == program })
	}
	switch {
	case by("Docker"):
		return "publish it on 127.0.0.1, or add rules to the chain DOCKER-USER"
	case by("podman"):
		return "publish it on 127.0.0.1"
	}
	return "remove the forwarding rule in the program that added it"
}

// ForwardedVerdict returns how many ports are forwarded, and by which program if it
// is the same for all: "5432/tcp is published by Docker". A port counts once,
// regardless of its families and addresses.
func ForwardedVerdict(list []firewall.ForwardedPort) string {
	ports := ports{}
	texts := map[string]bool{}
	all, program := false, list[0].Program
	for _, b := range list {
		texts[PortText(b)] = true
		all = all || b.Port == firewall.AnyPort
		if b.Program != program {
			program = ""
		}
		ports.add(b.Proto, b.Span())
	}
	n := 0
	for _, of := range ports {
		for _, word := range of {
			n += bits.OnesCount64(word)
		}
	}
	is, what := "is", PortText(list[0])
	switch {
	case len(texts) > 1 && all:
		is, what = "are", "ports"
	case len(texts) > 1:
		is, what = "are", fmt.Sprintf("%d ports", n)
	case n > 1 && !all:
		is = "are"
	}
	how := "forwarded"
	if program != "" {
		how = "published by " + program
	}
	return fmt.Sprintf("%s %s %s", what, is, how)
}

// PortText returns "80/tcp", "8000-8010/udp", "every tcp port" or "every port".
func PortText(b firewall.ForwardedPort) string {
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
