package report

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// Situation returns what the exposure of a machine depends on: the live rules of all
// programs, and where packets arrive. st is nil if there is no desired state.
func Situation(f host.Facts, families []firewall.Family, rules exposure.Ruleset, st *store.State) exposure.Situation {
	out := exposure.Situation{Rules: rules, Families: families, Interfaces: f.Interfaces, Containers: f.Containers}
	for _, l := range f.Listeners {
		out.Add(l.Proto, l.Process, l.Port)
	}
	out.Add(firewall.TCP, "", f.SSHPorts...)
	if st == nil {
		return out
	}
	out.Origin, out.Held = st.Origin, st.Desired.Published == firewall.PublishedProfile
	for _, s := range st.Desired.Services() {
		out.Add(s.Proto, "", s.Ports.First, s.Ports.Last)
	}
	out.Add(firewall.TCP, "", st.Desired.SSH.Ports...)
	return out
}

// Requirements returns what must be reachable if a desired state is in effect: each
// service, and SSH from each source that may log in.
func Requirements(d firewall.Desired) (out []exposure.Requirement) {
	add := func(name string, proto firewall.Proto, ports firewall.PortRange, from ...netip.Prefix) {
		q := exposure.Requirement{Name: name, Proto: proto, Ports: ports}
		for i, f := range firewall.Families {
			of := slices.DeleteFunc(slices.Clone(from), func(p netip.Prefix) bool { return firewall.FamilyOf(p) != f })
			if len(from) > 0 {
				q.From[i] = exposure.Of(of...)
			}
			if len(from) > 0 && len(of) == 0 {
				q.From[i] = exposure.Sources{}
			}
		}
		out = append(out, q)
	}
	for _, s := range d.Services() {
		add(s.Name, s.Proto, s.Ports, s.From...)
	}
	allowed := slices.Clone(d.SSH.Allow)
	any := d.SSH.Mode != firewall.SSHPinned
	if u := d.Unlock; u != nil {
		allowed = append(allowed, u.From...)
		any = any || len(u.From) == 0
	}
	for _, port := range d.SSH.Ports {
		for _, from := range allowed {
			add("ssh", firewall.TCP, firewall.Port(port), from)
		}
		if any {
			add("ssh", firewall.TCP, firewall.Port(port))
		}
	}
	return out
}

// Findings returns entries as sentences, one for all ports and families that a rule decides
// in the same way: "22/tcp and 8080/tcp are open to any address on eth0: iptables filter
// OTHER -j ACCEPT".
func Findings(list []exposure.Entry) (out []string) {
	type group struct{ verdict, from, on, rule string }
	var groups []group
	ports, families := map[group][]string{}, map[group][]string{}
	for _, e := range list {
		g := group{e.Verdict, sourcesOf(e), strings.Join(e.On, ", "), ruleOf(e)}
		if ports[g] == nil {
			groups = append(groups, g)
		}
		if port := portOf(e); !slices.Contains(ports[g], port) {
			ports[g] = append(ports[g], port)
		}
		if !slices.Contains(families[g], e.Family) {
			families[g] = append(families[g], e.Family)
		}
	}
	for _, g := range groups {
		is := "is"
		if len(ports[g]) > 1 {
			is = "are"
		}
		how := map[string]string{exposure.Open: "open to", exposure.Perhaps: "perhaps open to", exposure.Closed: "blocked for"}[g.verdict]
		family := ""
		if len(families[g]) == 1 {
			family = " over " + map[string]string{"ipv4": "IPv4", "ipv6": "IPv6"}[families[g][0]]
		}
		out = append(out, fmt.Sprintf("%s %s %s %s on %s%s: %s", enumerate(ports[g], 6), is, how, g.from, g.on, family, g.rule))
	}
	return out
}

// enumerate returns a list as "a, b and c", with at most a number of items.
func enumerate(items []string, most int) string {
	last := len(items) - 1
	switch {
	case last < 1:
		return strings.Join(items, "")
	case last >= most:
		return fmt.Sprintf("%s and %d more", strings.Join(items[:most], ", "), last+1-most)
	}
	return strings.Join(items[:last], ", ") + " and " + items[last]
}

func portOf(e exposure.Entry) string {
	what := firewall.FormatPorts(firewall.Port(e.Port), e.Proto)
	if e.Port == 0 && e.Proto.HasPorts() {
		what = "every other " + string(e.Proto) + " port"
	}
	if e.Process != "" {
		what += " (" + e.Process + ")"
	}
	return what
}

func sourcesOf(e exposure.Entry) string {
	if len(e.From) == 0 {
		return "any address"
	}
	return enumerate(firewall.FormatPrefixes(e.From.Networks()), 3)
}

// ruleOf returns the rule that is responsible for an entry: the one that translates
// the destination, otherwise the deciding one.
func ruleOf(e exposure.Entry) string {
	by := e.By
	if via := e.Via; via.Text != "" {
		by = exposure.Decision{Program: via.Program, Family: via.Family, Table: via.Table, Chain: via.Chain, Rule: strings.TrimPrefix(via.Text, "-A "+via.Chain+" ")}
	}
	if by.Source != "" && by.Source != exposure.BuiltIn {
		return by.Source
	}
	family := by.Family
	if by.Program != "nft" { // both families have tables of the same name
		family = ""
	}
	return strings.Join(strings.Fields(strings.Join([]string{by.Program, family, by.Table, by.Chain, by.Rule}, " ")), " ")
}

// lasting returns the entries that do not depend on a rate or on time alone.
func lasting(list []exposure.Entry) []exposure.Entry {
	return slices.DeleteFunc(slices.Clone(list), func(e exposure.Entry) bool { return e.Limited })
}

// warnExposure adds the rows about what other programs' rules open and drop.
func (in Input) warnExposure(w *warnings, s Status, differs exposure.Difference) {
	if in.LiveErr != nil {
		w.add("exposure-unknown", in.LiveErr)
	}
	sometimes := slices.DeleteFunc(slices.Clone(differs.Exposed), func(e exposure.Entry) bool { return !e.Limited })
	for _, of := range []struct {
		code string
		list []exposure.Entry
	}{{Exposed, lasting(differs.Exposed)}, {"open-sometimes", sometimes}, {Blocked, differs.Blocked}} {
		for _, text := range Findings(of.list) {
			w.add(of.code, text)
		}
	}
}
