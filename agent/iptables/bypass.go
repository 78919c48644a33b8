package iptables

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// bypass lists the ports that the nat table forwards past INPUT: what a packet
// from outside has to be like to reach a rule of DNAT, from PREROUTING on, by
// all that it has to match on its way there. Rules that OUTPUT alone leads to
// are for this host's own packets, and a chain that nothing leads to does
// nothing.
func bypass(f firewall.Family, nat table) []firewall.Bypass {
	w := walk{family: f, chains: map[string][]string{}, seen: map[string]bool{}}
	for _, c := range nat.Chains {
		w.chains[c.Name] = c.Rules
	}
	w.follow("PREROUTING", firewall.Passage{}, nil)
	return w.found
}

type walk struct {
	family firewall.Family
	chains map[string][]string
	seen   map[string]bool // a chain and the passage to it, followed already
	found  []firewall.Bypass
}

func (w *walk) follow(chain string, to firewall.Passage, way []string) {
	key := fmt.Sprint(chain, to)
	if w.seen[key] {
		return
	}
	w.seen[key] = true
	way = append(slices.Clone(way), chain)
	for _, r := range w.chains[chain] {
		words, err := split(r)
		if err != nil {
			continue
		}
		m, ok := matches(words)
		if !ok {
			continue
		}
		through, ok := to.Narrow(m.Passage)
		if !ok {
			continue
		}
		switch m.target {
		case "DNAT", "NETMAP":
			for _, b := range through.Bypasses(w.family, m.to, "nat "+chain, append(way, m.comment)...) {
				if !slices.Contains(w.found, b) {
					w.found = append(w.found, b)
				}
			}
		default: // REDIRECT comes back to INPUT, under its new port
			if _, ok := w.chains[m.target]; ok {
				w.follow(m.target, through, way)
			}
		}
	}
}

// match is what a rule of the nat table matches, and what it does then.
type match struct {
	firewall.Passage
	target, to, comment string
}

// matches reads a rule, and gives false for one that no packet from outside
// matches. What is negated, or not known here, counts as no limit: rather a
// port too many than one that nobody hears of.
func matches(words []string) (m match, ok bool) {
	for i := 0; i+1 < len(words); i++ {
		option, value := words[i], words[i+1]
		if i > 0 && words[i-1] == "!" {
			continue
		}
		switch option {
		case "-p":
			if n, err := strconv.ParseUint(value, 10, 8); err == nil && n > 0 { // without /etc/protocols
				value = firewall.ProtoName(uint8(n))
			}
			if value != "all" && value != "0" {
				m.Proto = value
			}
		case "--dport", "--dports", "--ports":
			m.Ports = portRanges(value)
		case "-d":
			m.On = prefix(value)
		case "-s":
			if prefix(value).Addr().IsLoopback() {
				return m, false
			}
		case "-i":
			if value == "lo" {
				return m, false
			}
		case "--src-type":
			if value == "LOCAL" {
				return m, false
			}
		case "-j", "-g":
			m.target = value
		case "--to-destination", "--to":
			m.to = value
			// Behind a range of ports may be the one that its first stands for.
			if i := strings.LastIndexByte(value, '/'); i > 0 && option == "--to-destination" {
				m.to = value[:i]
			}
		case "--comment":
			m.comment = value
		default:
			continue
		}
		i++
	}
	return m, true
}

// portRanges reads "80", "8000:8010" and "80,443,8000:8010"; nil is any.
func portRanges(text string) []firewall.PortRange {
	var out []firewall.PortRange
	for _, part := range strings.Split(text, ",") {
		first, last, isRange := strings.Cut(part, ":")
		if !isRange {
			last = first
		}
		f, errF := strconv.ParseUint(first, 10, 16)
		l, errL := strconv.ParseUint(last, 10, 16)
		if errF != nil || errL != nil {
			return nil
		}
		out = append(out, firewall.PortRange{First: uint16(f), Last: uint16(l)})
	}
	return out
}

// prefix reads an address or a network; what is neither is any.
func prefix(text string) netip.Prefix {
	if p, err := netip.ParsePrefix(text); err == nil {
		return p.Masked()
	}
	if a, err := netip.ParseAddr(text); err == nil {
		return netip.PrefixFrom(a, a.BitLen())
	}
	return netip.Prefix{}
}
