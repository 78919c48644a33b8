package iptables

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// oldOptions lists the matches and targets of iptables and ip6tables 1.4.7 that the rules
// use, with their options (iptables(8) and ip6tables(8) of that version). "" are the
// options of every rule, and those of a protocol need no match.
var oldOptions = map[string][]string{
	"":          {"-s", "-d", "-i", "-o", "-p", "-m", "-j", "!"},
	"tcp":       {"--sport", "--dport", "--tcp-flags"},
	"udp":       {"--sport", "--dport"},
	"sctp":      {"--sport", "--dport"},
	"icmp":      {"--icmp-type"},
	"icmp6":     {"--icmpv6-type"},
	"ah":        {"--ahspi"},
	"addrtype":  {"--src-type", "--dst-type"},
	"comment":   {"--comment"},
	"conntrack": {"--ctstate", "--ctorigdstport", "--ctdir"},
	"hashlimit": {"--hashlimit-upto", "--hashlimit-burst", "--hashlimit-mode", "--hashlimit-name", "--hashlimit-srcmask"},
	"hl":        {"--hl-eq"},
	"limit":     {"--limit", "--limit-burst"},
	"policy":    {"--dir", "--pol"},
	"set":       {"--match-set"},
	"time":      {"--datestart", "--datestop"},
	"LOG":       {"--log-prefix", "--log-level"},
	"ACCEPT":    {},
	"DROP":      {},
	"RETURN":    {},
}

// onlyIn lists the matches that one family lacks.
var onlyIn = map[string]firewall.Family{"icmp": firewall.IPv4, "addrtype": firewall.IPv4, "icmp6": firewall.IPv6, "hl": firewall.IPv6}

// notOld returns what iptables 1.4.7 does not support in a rule, or "".
func notOld(f firewall.Family, words []string) string {
	used, after := []string{""}, ""
	for i, word := range words {
		next := ""
		if i+1 < len(words) {
			next = words[i+1]
		}
		name := ""
		switch word {
		case "-m", "-j":
			name = next
		case "--comment":
			if len(next) > 255 {
				return "a long comment"
			}
		case "--hashlimit-name":
			if len(next) > 15 {
				return "a long name"
			}
		case "--log-prefix":
			if len(next) > 29 {
				return "a long prefix"
			}
		case "--ctorigdstport":
			if strings.Contains(next, ":") {
				return "a range of dialled ports" // Load refuses it
			}
		}
		if name != "" && !isOurs(name) {
			family, one := onlyIn[name]
			if _, ok := oldOptions[name]; !ok || one && family != f {
				return "no " + name
			}
			used = append(used, name)
		}
		if after == "hl" && strings.HasPrefix(word, "-") && word != "-j" && word != "--hl-eq" {
			return "an option after hl"
		}
		if name != "" {
			after = name
		}
		if word != "!" && !strings.HasPrefix(word, "-") {
			continue
		}
		if _, err := strconv.Atoi(word); err == nil {
			continue
		}
		if !slices.ContainsFunc(used, func(u string) bool { return slices.Contains(oldOptions[u], word) }) {
			return "the option " + word
		}
	}
	return ""
}

// TestOldOptions: the rules use nothing that iptables 1.4.7 of CentOS 6 does not have.
func TestOldOptions(t *testing.T) {
	n, refused := 0, map[string]int{}
	for _, f := range firewall.Families {
		files, err := filepath.Glob("testdata/*." + f.String())
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			d, err := parse(data)
			if err != nil {
				t.Fatal(err)
			}
			for _, table := range d.tables {
				for _, c := range table.Chains {
					for _, rule := range c.Rules {
						words, err := split(rule)
						if err != nil {
							t.Fatal(err)
						}
						n++
						if what := notOld(f, words); what == "a range of dialled ports" {
							refused[what]++
						} else if what != "" {
							t.Errorf("%s: %s: %s", file, what, rule)
						}
					}
				}
			}
		}
	}
	if n < 200 || refused["a range of dialled ports"] != 2 {
		t.Errorf("%d rules, %v", n, refused)
	}
	for rule, want := range map[string]string{
		"-m addrtype --dst-type MULTICAST -j DROP":                              "no addrtype",
		"-m hl --hl-eq 255 -m comment --comment x -j ACCEPT":                    "an option after hl",
		"-p tcp -m tcp --dport 80 -j NFLOG":                                     "no NFLOG",
		"-m conntrack --ctproto 6 -j DROP":                                      "the option --ctproto",
		"-m hashlimit --hashlimit-upto 1/sec --hashlimit-name 0123456789abcdef": "a long name",
		"-m cgroup --path x -j ACCEPT":                                          "no cgroup",
	} {
		if got := notOld(firewall.IPv6, strings.Fields(rule)); got != want {
			t.Errorf("%s: %q, want %q", rule, got, want)
		}
	}
}

func TestInUTC(t *testing.T) {
	const our, theirs = "-A BASICFW-SSH -m time --datestop 2026-01-02T03:04:05", "-A INPUT -m time --datestop 2026-01-02T03:04:05 -j ACCEPT"
	got := inUTC([]string{our + " -j ACCEPT", our + " --kerneltz -j ACCEPT", theirs})
	if want := []string{our + " --utc -j ACCEPT", our + " -j ACCEPT", theirs}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}
