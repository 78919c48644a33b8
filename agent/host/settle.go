package host

import (
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Naming is the interfaces that the settings name. A final "*" matches any suffix.
type Naming struct {
	Public  []string `json:"public,omitempty"`
	Private []string `json:"private,omitempty"`
	Trusted []string `json:"trusted,omitempty"`
}

// Kept is the zone that a link has had since it was first seen. A link that is trusted by
// its name is also kept, so that no link of another kind takes its place.
type Kept struct {
	Name string        `json:"name"`
	MAC  string        `json:"mac,omitempty"`
	Kind string        `json:"kind,omitempty"`
	Zone firewall.Zone `json:"zone"`
}

// maxAbsent is the maximum number of kept links that do not exist now.
const maxAbsent = 256

// Settle returns interfaces, as [Detect] returns them, with the zones in effect, and
// the links to keep for the next call:
//
//   - The settings decide for the interfaces that they name.
//   - Any other link that carries addresses keeps the zone in which it was first seen,
//     also under a new name. It may only become public: that is narrower. What the network
//     sends (a route, a lease, a router advertisement) must not open anything.
//   - A link with another MAC address or of another kind is new, but not wider than a
//     link of that name was.
//   - The port of a bridge or bond counts as that, unless its own addresses say more.
func Settle(detected []firewall.Interface, n Naming, kept []Kept) ([]firewall.Interface, []Kept) {
	out, next := slices.Clone(detected), slices.Clone(kept)
	for i := range out {
		l := &out[i]
		if l.Zone == firewall.LoopbackZone {
			continue
		}
		if !isPort(*l, detected) {
			next = settle(l, detected, kept, next)
		}
		next = n.apply(l, kept, next)
		l.ServesGuests = l.ServesGuests && l.Zone == firewall.VirtualZone
	}
	for i := range out {
		m := slices.IndexFunc(out, func(m firewall.Interface) bool { return m.Name == out[i].Master })
		switch {
		case m < 0 || out[i].Master == "":
		case out[i].Reason == noAddress:
			out[i].Zone, out[i].Reason = out[m].Zone, "is a port of "+out[m].Name
		case out[i].Reason == inVRF(out[m].Name): // the settings may name the VRF
			out[i].Zone = out[m].Zone
		}
	}
	return out, n.prune(next, out)
}

// KeepIPv4 sets IPv4 of interfaces to what was recorded, unless that is NoIPv4. What an
// earlier version recorded stays empty. Only a newly computed desired state changes it.
func KeepIPv4(recorded, now []firewall.Interface) {
	was := map[string]string{}
	for _, i := range recorded {
		was[i.Name] = i.IPv4
	}
	for n, i := range now {
		if ipv4, ok := was[i.Name]; ok && ipv4 != firewall.NoIPv4 {
			now[n].IPv4 = ipv4
		}
	}
}

// isPort reports whether a link is the port of a bridge or bond. Members of a VRF are not ports.
func isPort(l firewall.Interface, links []firewall.Interface) bool {
	return l.Master != "" && slices.ContainsFunc(links, func(m firewall.Interface) bool { return m.Name == l.Master && m.Kind != "vrf" })
}

// settle sets the zone of a link, and returns next with the link added.
func settle(l *firewall.Interface, detected []firewall.Interface, kept, next []Kept) []Kept {
	_, addressed := global(l.Addresses)
	same, wide := find(*l, detected, kept)
	zone := l.Zone
	switch {
	case wide == "":
	case !same && (wide == firewall.PublicZone || addressed && wide != zone):
		zone = firewall.PublicZone
	case same && (wide == firewall.PublicZone || !addressed || zone != firewall.PublicZone):
		zone = wide
	}
	if zone != l.Zone {
		was := "was " + string(wide)
		if !same {
			was = "replaces a link that " + was
		}
		l.Zone, l.Reason = zone, fmt.Sprintf("%s, and now %s; apply --redetect decides again", was, l.Reason)
	}
	if !addressed || zone == firewall.VirtualZone {
		return next
	}
	me := Kept{l.Name, l.MAC, l.Kind, zone}
	i := slices.IndexFunc(next, func(k Kept) bool {
		return k.Zone != firewall.TrustedZone && k.Kind == l.Kind && k.MAC == l.MAC && (k.Name == l.Name || l.MAC != "" && !exists(detected, k))
	})
	if i < 0 {
		return append(next, me)
	}
	next[i] = me
	return next
}

// find returns the kept zone of a link, which may have a new name. Otherwise, it returns
// the zone of links with the same name: the narrowest one, or "" if there is none.
func find(l firewall.Interface, detected []firewall.Interface, kept []Kept) (same bool, zone firewall.Zone) {
	for _, is := range []func(Kept) bool{
		func(k Kept) bool { return k.Name == l.Name && k.MAC == l.MAC && k.Kind == l.Kind },
		func(k Kept) bool { return l.MAC != "" && k.MAC == l.MAC && k.Kind == l.Kind && !exists(detected, k) },
	} {
		for _, k := range kept {
			if k.Zone != firewall.TrustedZone && is(k) && zone != firewall.PublicZone {
				zone = k.Zone
			}
		}
		if zone != "" {
			return true, zone
		}
	}
	for _, k := range kept {
		if k.Zone != firewall.TrustedZone && k.Name == l.Name && zone != firewall.PublicZone {
			zone = k.Zone
		}
	}
	return false, zone
}

// exists reports whether a kept link still has its name.
func exists(detected []firewall.Interface, k Kept) bool {
	return slices.ContainsFunc(detected, func(i firewall.Interface) bool { return i.Name == k.Name && i.MAC == k.MAC && i.Kind == k.Kind })
}

// apply sets the zone of an interface that the settings name. An exact name has
// priority over one with a "*", and then public, where less is open, over private.
// Trusted has priority over both.
func (n Naming) apply(l *firewall.Interface, kept, next []Kept) []Kept {
	for _, exact := range []bool{false, true} {
		for _, z := range []struct {
			zone     firewall.Zone
			patterns []string
		}{{firewall.PrivateZone, n.Private}, {firewall.PublicZone, n.Public}} {
			for _, p := range z.patterns {
				if firewall.MatchInterface(p, l.Name) && (p == l.Name) == exact {
					l.Zone, l.Reason = z.zone, fmt.Sprintf("set by %s = %s", z.zone, p)
				}
			}
		}
	}
	for _, p := range n.Trusted {
		switch {
		case !firewall.MatchInterface(p, l.Name):
		case !trusts(p, *l, kept):
			l.Reason += fmt.Sprintf("; trusted = %s does not include this %s", p, l.Kind)
		default:
			l.Zone, l.Reason = firewall.TrustedZone, "set by trusted = "+p
			if p == l.Name && !slices.ContainsFunc(kept, func(k Kept) bool { return k.Zone == l.Zone && k.Name == p }) {
				next = append(next, Kept{l.Name, "", l.Kind, l.Zone})
			}
			return next
		}
	}
	return next
}

// trusts reports whether a pattern of trusted interfaces includes a link that it matches.
// A veth leads into a container, which may have chosen the name: it is trusted only if
// the pattern says so, or if its whole name was given and meant no other kind before.
func trusts(pattern string, l firewall.Interface, kept []Kept) bool {
	if l.Kind != "veth" || strings.HasPrefix(pattern, "veth") {
		return true
	}
	other := func(k Kept) bool { return k.Zone == firewall.TrustedZone && k.Name == l.Name && k.Kind != l.Kind }
	return pattern == l.Name && !slices.ContainsFunc(kept, other)
}

// prune removes what need not be kept: links that no longer exist and cannot have been
// an uplink, names that are no longer trusted, and the oldest links over the limit.
func (n Naming) prune(kept []Kept, now []firewall.Interface) (out []Kept) {
	absent := 0
	for _, k := range slices.Backward(kept) {
		switch {
		case k.Zone == firewall.TrustedZone:
			if !slices.Contains(n.Trusted, k.Name) {
				continue
			}
		case exists(now, k):
		case !leadsOutside(k.Kind) || absent == maxAbsent:
			continue
		default:
			absent++
		}
		out = append(out, k)
	}
	slices.Reverse(out)
	return out
}

// Remember returns the links to keep from interfaces that a version without [Kept] recorded.
func Remember(recorded []firewall.Interface) (kept []Kept) {
	for _, i := range recorded {
		_, addressed := global(i.Addresses)
		if addressed && (i.Zone == firewall.PublicZone || i.Zone == firewall.PrivateZone) && !strings.HasPrefix(i.Reason, "set by ") {
			kept = append(kept, Kept{i.Name, i.MAC, i.Kind, i.Zone})
		}
	}
	return kept
}

// Absent returns the settings that name an interface which does not exist: "trusted =
// wg0". Patterns are omitted: they may match nothing.
func (n Naming) Absent(now []firewall.Interface) (list []string) {
	for _, named := range []struct {
		key   string
		names []string
	}{{"public", n.Public}, {"private", n.Private}, {"trusted", n.Trusted}} {
		for _, name := range named.names {
			if !strings.HasSuffix(name, "*") && !slices.ContainsFunc(now, func(i firewall.Interface) bool { return i.Name == name }) {
				list = append(list, named.key+" = "+name)
			}
		}
	}
	return list
}
