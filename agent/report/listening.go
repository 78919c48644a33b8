package report

import (
	"fmt"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// OpenOf returns the services that a desired state opens: first the administrator's,
// then the profile's.
func OpenOf(d firewall.Desired) []OpenStatus {
	services := d.Services()
	own := len(services) - len(d.Open)
	var list []OpenStatus
	for _, o := range append(services[own:], services[:own]...) {
		open := OpenStatus{Name: o.Name, Proto: o.Proto.String(), Zone: o.On, From: firewall.FormatPrefixes(o.From), Source: o.Source}
		if o.Proto.HasPorts() {
			open.Ports = o.Ports.String()
		}
		if !o.Limit.IsZero() {
			open.Limit = o.Limit.String()
		}
		if o.IPsec {
			open.Via = "ipsec"
		}
		if !o.Until.IsZero() {
			open.Until = &o.Until
		}
		list = append(list, open)
	}
	return list
}

// listening returns the listeners, and whether each is reachable.
func (in Input) listening(st store.State, s Status) (list []ListeningStatus) {
	reachable, command := in.reachable(s.Exposure), in.openCommands(st, s.client())
	for _, l := range in.Facts.Listeners {
		s := ListeningStatus{Proto: string(l.Proto), Port: l.Port, Process: l.Process}
		if in.LiveErr == nil || len(in.Live.Tables) > 0 {
			yes := reachable[listener{l.Proto, l.Port}]
			if s.Reachable = &yes; !yes && in.Err == nil {
				s.OpenCommand = command(l)
			}
		}
		list = append(list, s)
	}
	return list
}

// listener is a port on which a process listens.
type listener struct {
	proto firewall.Proto
	port  uint16
}

// reachable returns the ports that are open, or perhaps are, on an interface other than
// loopback and trusted ones.
func (in Input) reachable(list []exposure.Entry) map[listener]bool {
	trusted := map[string]bool{}
	all := true // interfaces are trusted
	for _, i := range in.Facts.Interfaces {
		trusted[i.Name] = i.Zone == firewall.TrustedZone
		all = all && (trusted[i.Name] || i.Zone == firewall.LoopbackZone)
	}
	out := map[listener]bool{}
	for _, e := range list {
		if e.Verdict != exposure.Closed && (len(e.On) == 0 && !all || slices.ContainsFunc(e.On, func(on string) bool { return !trusted[on] })) {
			out[listener{e.Proto, e.Port}] = true
		}
	}
	return out
}

// openCommands returns a function that returns the command to open an unreachable
// listener. The command selects the smallest profile that opens the listener and
// everything that the present profile opens. If there is none, it opens the port.
func (in Input) openCommands(st store.State, client string) func(host.Listener) string {
	now := st.Desired.Profile
	profiles := slices.Clone(in.Facts.Profiles)
	slices.SortStableFunc(profiles, func(a, b firewall.Profile) int { return len(a.Services) - len(b.Services) })
	best := map[listener]string{}
	for _, p := range profiles {
		has := map[string]bool{}
		for _, s := range p.Services {
			has[s.String()] = true
		}
		if slices.ContainsFunc(now.Services, func(s firewall.Service) bool { return !has[s.String()] }) {
			continue
		}
		for _, s := range p.Services {
			if at := (listener{s.Proto, s.Ports.First}); s.Ports == firewall.Port(s.Ports.First) && best[at] == "" {
				best[at] = p.Name
			}
		}
	}
	configured := ports{}
	for _, s := range st.Desired.Services() {
		configured.add(string(s.Proto), s.Ports)
	}
	return func(l host.Listener) string {
		profile := best[listener{l.Proto, l.Port}]
		switch {
		case l.Proto == firewall.TCP && slices.Contains(st.Desired.SSH.Ports, l.Port):
			return "basicfw-agent ssh allow " + client
		case configured.contains(l.Proto, l.Port):
			return ""
		case profile != "" && profile != now.Name:
			return "basicfw-agent bootstrap --profile " + profile
		}
		return fmt.Sprintf("basicfw-agent open %d/%s", l.Port, l.Proto)
	}
}

// ports is a bit set of ports, by protocol; "" and firewall.AnyPort are any.
type ports map[string]*[1 << 10]uint64

func (p ports) add(proto string, r firewall.PortRange) {
	if p[proto] == nil {
		p[proto] = new([1 << 10]uint64)
	}
	for n := int(r.First); n <= int(r.Last); n++ {
		p[proto][n/64] |= 1 << (n % 64)
	}
}

func (p ports) contains(proto firewall.Proto, port uint16) bool {
	for _, of := range []string{string(proto), "", firewall.AnyPort} {
		if p[of] != nil && p[of][port/64]>>(port%64)&1 == 1 {
			return true
		}
	}
	return false
}
