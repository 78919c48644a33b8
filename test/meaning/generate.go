// Package meaning checks that a firewall has one meaning: in the settings, in the rules
// compiled from them, and in every kernel that they are loaded into.
package meaning

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

type generator struct {
	*rand.Rand
	now time.Time
	has map[string]bool // the Settings that occur
}

// Settings lists everything that a generated firewall can have: each occurs among some
// dozens of firewalls.
var Settings = []string{
	"ping = yes", "ping = no", "drops = yes", "drops = no", "published = yes", "published = no",
	"permanent address", "closed", "trusted", "trusted glob", "guests", "no address",
	"tcp", "udp", "sctp", "protocol", "range", "limit", "via ipsec", "from one", "from several", "from IPv4 only", "from IPv6 only", "from any address of a family",
	"on any", "on public", "on private", "on virtual", "on a name", "on a glob", "until", "until, expired",
	"pinned", "pinned to one family", "limited", "no limit", "SSH blocked", "timed", "timed, expired", "two ports",
	"probation", "probation, expired", "probation without a rule",
	"unlock", "unlock from sources", "unlock --all", "unlock, expired",
}

// Generate returns the firewall of a number, and which of Settings it has. The same number
// gives the same firewall, but for its times, which are hours before or after now.
func Generate(number uint64, now time.Time) (firewall.Desired, []string) {
	g := &generator{rand.New(rand.NewPCG(8, number)), now.UTC().Truncate(time.Second), map[string]bool{}}
	d := g.desired()
	var list []string
	for _, s := range Settings {
		if g.has[s] {
			list = append(list, s)
		}
	}
	return d, list
}

// one returns true once in n times.
func (g *generator) one(n int) bool { return g.IntN(n) == 0 }

// note records that a setting occurs.
func (g *generator) note(setting string) {
	if !slices.Contains(Settings, setting) {
		panic("not one of the settings: " + setting)
	}
	g.has[setting] = true
}

func (g *generator) yes(setting string) bool {
	yes := g.one(2)
	g.note(setting + map[bool]string{true: " = yes", false: " = no"}[yes])
	return yes
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func (g *generator) pick(list ...string) string { return list[g.IntN(len(list))] }

func (g *generator) desired() firewall.Desired {
	d := firewall.Desired{Interfaces: g.interfaces(), LogDrops: g.yes("drops")}
	d.Profile = firewall.Profile{Name: "generated", Ping: g.yes("ping")}
	d.SSH = g.ssh()
	for i := range g.IntN(5) {
		if s := g.service(fmt.Sprintf("p%d", i), d.SSH.Ports); s != nil {
			d.Profile.Services = append(d.Profile.Services, *s)
			if g.one(4) {
				g.note("closed")
				d.Closed = append(d.Closed, s.Name)
			}
		}
	}
	for i := range g.IntN(6) {
		name := fmt.Sprintf("o%d", i)
		if g.one(6) {
			name = "p0" // in place of the profile's
		}
		if slices.ContainsFunc(d.Open, func(s firewall.Service) bool { return s.Name == name }) {
			continue
		}
		if s := g.service(name, d.SSH.Ports); s != nil {
			s.Until = g.until("until")
			d.Open = append(d.Open, *s)
		}
	}
	if g.one(3) {
		if g.one(2) {
			g.note("trusted")
			d.Trusted = []string{"wg0"}
		} else {
			g.note("trusted glob")
			d.Trusted = []string{"wg*", "eth7"}
		}
		for i := range d.Interfaces {
			if d.Interfaces[i].Name == "wg0" {
				d.Interfaces[i].Zone = firewall.TrustedZone
			}
		}
	}
	if g.one(3) {
		u := &firewall.Unlock{Window: firewall.Window{Since: g.now.Add(-5 * time.Hour), Until: g.now.Add(time.Hour)}}
		switch g.IntN(3) {
		case 0:
			u.From = g.sources()
			g.note("unlock from sources")
		case 1:
			u.All = true
			g.note("unlock --all")
		default:
			g.note("unlock")
		}
		if g.one(3) {
			u.Until = g.now.Add(-time.Hour)
			g.note("unlock, expired")
		}
		d.Unlock = u
	}
	d.Interfaces[1].IPv4 = g.pick("", firewall.Leased, firewall.Permanent)
	if g.yes("published") {
		d.Published, d.Direct = firewall.PublishedProfile, []firewall.ContainerPort{{Out: "br9", Proto: firewall.TCP, Ports: firewall.Port(80)}}
	}
	return d
}

// until returns an end time, or none.
func (g *generator) until(setting string) time.Time {
	switch g.IntN(5) {
	case 0:
		g.note(setting)
		return g.now.Add(time.Duration(1+g.IntN(100)) * time.Hour)
	case 1:
		g.note(setting + ", expired")
		return g.now.Add(-time.Duration(1+g.IntN(100)) * time.Hour)
	}
	return time.Time{}
}

func (g *generator) interfaces() []firewall.Interface {
	list := []firewall.Interface{
		{Name: "lo", Zone: firewall.LoopbackZone, Addresses: []netip.Prefix{prefix("127.0.0.1/8"), prefix("::1/128")}},
		{Name: "eth0", Zone: firewall.PublicZone, Addresses: []netip.Prefix{prefix("203.0.113.5/24"), prefix("2001:db8:5::5/64")}, DefaultRoute: true},
	}
	for _, i := range []firewall.Interface{
		{Name: "eth1", Zone: firewall.PrivateZone, Addresses: []netip.Prefix{prefix("10.1.0.5/16")}},
		{Name: "eth2", Zone: firewall.PublicZone},
		{Name: "wg0", Zone: firewall.VirtualZone, Addresses: []netip.Prefix{prefix("10.9.0.1/32"), prefix("fd00:9::1/64")}},
		{Name: "docker0", Zone: firewall.VirtualZone, Addresses: []netip.Prefix{prefix("172.17.0.1/16")}, ServesGuests: true},
	} {
		if g.one(2) {
			if i.ServesGuests {
				g.note("guests")
			}
			if i.Addresses == nil {
				g.note("no address")
			} else if i.IPv4 = g.pick("", firewall.NoIPv4, firewall.Leased, firewall.Permanent); i.IPv4 == firewall.Permanent {
				g.note("permanent address")
			}
			list = append(list, i)
		}
	}
	return list
}

// sources returns one to three networks in random order.
func (g *generator) sources() []netip.Prefix {
	ipv4 := []string{"198.51.100.7/32", "198.51.100.0/24", "198.51.100.128/25", "198.51.101.0/24", "10.0.0.0/8", "100.64.0.0/10", "192.0.2.77/32"}
	ipv6 := []string{"2001:db8:7::7/128", "2001:db8:7::/64", "2001:db8:7:1::/64", "2001:db8::/32", "fd00::/8", "fe80::/10"}
	pool := [][]string{ipv4, ipv6, append(ipv4, ipv6...)}[g.IntN(3)]
	var list []netip.Prefix
	for range 1 + g.IntN(3) {
		p := prefix(g.pick(pool...))
		if !slices.Contains(list, p) {
			list = append(list, p)
		}
	}
	return list
}

// service returns a service as written in settings; nil if sshd uses one of its ports.
func (g *generator) service(name string, sshPorts []uint16) *firewall.Service {
	ports := g.pick("80", "443", "25", "53", "68", "546", "5353", "137", "8080-8090", "40000-40100", "1-21", "60000-65535")
	proto := g.pick("tcp", "tcp", "udp")
	text := ports + "/" + proto
	switch g.IntN(8) {
	case 0:
		text = ports + "/sctp"
	case 1:
		text = g.pick("vrrp", "esp", "gre", "ospf", "proto 99")
	}
	if where := g.pick("", "any", "public", "private", "virtual", "eth1", "eth*", "br9", "tun0"); where != "" {
		text += " on " + where
	}
	var from []netip.Prefix
	switch g.IntN(5) {
	case 0:
		from = g.sources()
	case 1:
		from = []netip.Prefix{prefix(g.pick("0.0.0.0/0", "::/0"))}
	}
	for i, p := range from {
		text += map[bool]string{true: " from ", false: ", "}[i == 0] + firewall.FormatPrefix(p)
	}
	if g.one(4) {
		text += " limit " + g.pick("6/second", "20/minute", "100/hour")
	}
	if g.one(8) {
		text += " via ipsec"
		g.note("via ipsec")
	}
	s, err := firewall.ParseService(name, text)
	if err != nil {
		panic(err)
	}
	if s.Proto == firewall.TCP && slices.ContainsFunc(sshPorts, s.Ports.Contains) {
		return nil
	}
	g.noteService(s)
	return &s
}

func (g *generator) noteService(s firewall.Service) {
	if s.Proto.HasPorts() {
		g.note(string(s.Proto))
	} else {
		g.note("protocol")
	}
	if !s.Limit.IsZero() {
		g.note("limit")
	}
	if s.Ports.First != s.Ports.Last {
		g.note("range")
	}
	switch on := s.On; on {
	case "any", "public", "private", "virtual":
		g.note("on " + on)
	case "eth*":
		g.note("on a glob")
	default:
		g.note("on a name")
	}
	families := map[firewall.Family]int{}
	for _, p := range s.From {
		families[firewall.FamilyOf(p)]++
		if p.Bits() == 0 {
			g.note("from any address of a family")
		}
	}
	switch n4, n6 := families[firewall.IPv4], families[firewall.IPv6]; {
	case n4+n6 == 0:
	case n4+n6 == 1:
		g.note("from one")
	case n6 == 0:
		g.note("from IPv4 only")
	case n4 == 0:
		g.note("from IPv6 only")
	default:
		g.note("from several")
	}
}

func (g *generator) ssh() firewall.SSH {
	s := firewall.SSH{Ports: []uint16{22}, Mode: firewall.SSHPinned, Limit: firewall.Rate{N: 30, Per: firewall.Minute}}
	if g.one(3) {
		g.note("two ports")
		s.Ports = []uint16{2222, 22}
	}
	if g.one(3) {
		s.Timed = []firewall.TimedSource{{From: g.sources()[0], Until: g.now.Add(3 * time.Hour)}}
		g.note("timed")
		if g.one(2) {
			s.Timed = append(s.Timed, firewall.TimedSource{From: prefix("45.0.0.0/8"), Until: g.now.Add(-3 * time.Hour)})
			g.note("timed, expired")
		}
	}
	switch g.IntN(4) {
	case 0:
		g.note("limited")
		s.Mode = firewall.SSHLimited
		if g.one(2) {
			s.Allow = g.sources()
		}
		switch g.IntN(3) {
		case 0:
			g.note("no limit")
			s.Limit = firewall.Rate{}
		case 1:
			s.Limit = firewall.Rate{N: 6, Per: firewall.Second}
		}
		return s
	case 1:
		g.note("SSH blocked")
		s.Nobody = true
		return s
	}
	g.note("pinned")
	s.Allow = g.sources()
	if len(s.BlockedFamilies()) > 0 {
		g.note("pinned to one family")
	}
	if g.one(2) {
		s.Probation = &firewall.Probation{Window: firewall.Window{Since: g.now.Add(-5 * time.Hour), Until: g.now.Add(time.Hour)}}
		g.note("probation")
		switch g.IntN(3) {
		case 0:
			s.Probation.Until = g.now.Add(-time.Hour)
			g.note("probation, expired")
		case 1:
			s.Probation.NoRule = true
			g.note("probation without a rule")
		}
	}
	return s
}
