package selftest

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

const (
	// alike limits the tested interfaces that the rules treat the same, and
	// mostInterfaces all of them.
	alike, mostInterfaces = 4, 24
	// addressesEach limits an interface's addresses of each family in the copy.
	addressesEach = 2
	// unknownName is an interface without settings or rules.
	unknownName = "bfwother0"
)

// interfaces returns the interfaces to test: this host's, one for each missing interface
// that rules name, and one that no rule names.
func interfaces(d firewall.Desired, r firewall.Ruleset) []firewall.Interface {
	var all []firewall.Interface
	for _, i := range d.Interfaces {
		if i.Zone != firewall.LoopbackZone && firewall.CheckInterfaceName(i.Name, false) == nil {
			all = append(all, i)
		}
	}
	has := func(pattern string) bool {
		return slices.ContainsFunc(all, func(i firewall.Interface) bool { return firewall.MatchInterface(pattern, i.Name) })
	}
	for _, pattern := range named(d, r) {
		if !has(pattern) {
			name, anyRest := strings.CutSuffix(pattern, "*")
			if anyRest && len(name) < 15 {
				name += "0"
			}
			all = append(all, firewall.Interface{Name: name})
		}
	}
	if !has(unknownName) {
		all = append(all, firewall.Interface{Name: unknownName})
	}
	var chosen []firewall.Interface
	count := map[string]int{}
	for _, i := range all {
		kind := treatment(i, r)
		if count[kind]++; count[kind] > alike || len(chosen) == mostInterfaces {
			continue
		}
		chosen = append(chosen, withAddresses(i, len(chosen)))
	}
	return chosen
}

// named returns the names and patterns of interfaces in the settings and rules.
func named(d firewall.Desired, r firewall.Ruleset) []string {
	list := d.TrustedNames()
	for _, s := range d.Services() {
		if !slices.Contains([]firewall.Zone{"", firewall.AnyZone, firewall.PublicZone, firewall.PrivateZone, firewall.VirtualZone}, firewall.Zone(s.On)) {
			list = append(list, s.On)
		}
	}
	for _, c := range slices.Concat(r.IPv4, r.IPv6) {
		for _, rule := range c.Rules {
			if rule.In != "" && rule.In != "lo" {
				list = append(list, rule.In)
			}
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// treatment returns the rules for an interface without its name, as text. It is equal
// for interfaces that the rules treat the same.
func treatment(i firewall.Interface, r firewall.Ruleset) string {
	list := []string{string(i.Zone)}
	for _, f := range firewall.Families {
		for _, c := range r.Chains(f) {
			for _, rule := range c.Rules {
				if rule.In != "" && firewall.MatchInterface(rule.In, i.Name) {
					rule.In = ""
					text, err := json.Marshal(rule)
					if err != nil { // impossible for a rule
						text = fmt.Append(nil, rule)
					}
					list = append(list, fmt.Sprintf("%v %s %s", f, c.Name, text))
				}
			}
		}
	}
	return strings.Join(list, "\n")
}

// withAddresses limits an interface's addresses. If it has no IPv4 address, it gets
// one of RFC 2544. netsim adds an IPv6 address to every interface.
func withAddresses(i firewall.Interface, n int) firewall.Interface {
	count := map[firewall.Family]int{}
	var list []netip.Prefix
	for _, p := range i.Addresses {
		f := firewall.FamilyOf(p)
		if !usable(p.Addr()) || p.Addr().Is6() && p.Addr().IsLinkLocalUnicast() || count[f] == addressesEach {
			continue
		}
		count[f]++
		list = append(list, p)
	}
	if count[firewall.IPv4] == 0 {
		list = append(list, netip.PrefixFrom(netip.AddrFrom4([4]byte{198, 19, 255, byte(n + 1)}), 32))
	}
	i.Addresses = list
	return i
}
