// Package firewall defines the desired state, compiles it to rules and compares
// rulesets. It is pure: it uses no files, programs or clock.
package firewall

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Family is an IP version. Its value is the version number.
type Family uint8

// The two families. Every ruleset has both.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families lists both families in the order in which they are loaded.
var Families = [2]Family{IPv4, IPv6}

// String returns "ipv4" or "ipv6", as in the command line and in JSON.
func (f Family) String() string { return "ipv" + strconv.Itoa(int(f)) }

// ByFamily returns the value for a family.
func ByFamily[T any](f Family, v4, v6 T) T {
	if f == IPv4 {
		return v4
	}
	return v6
}

// FamilyOf returns the family of a prefix. An IPv4-mapped IPv6 address counts as
// IPv6 here; the parsers unmap addresses first.
func FamilyOf(p netip.Prefix) Family {
	if p.Addr().Is4() {
		return IPv4
	}
	return IPv6
}

// Proto is a transport protocol, or "" for any.
type Proto string

// The protocols that rules use, named as in iptables-save. Others are numbers.
const (
	TCP    Proto = "tcp"
	UDP    Proto = "udp"
	SCTP   Proto = "sctp"
	ICMP   Proto = "icmp"
	ICMPv6 Proto = "ipv6-icmp"
	IGMP   Proto = "2" // whose name iptables takes from /etc/protocols, which may be missing
)

// Zone is the kind of network that an interface is connected to.
type Zone string

// The zones. AnyZone is valid for services only, never for an interface.
const (
	AnyZone      Zone = "any"
	LoopbackZone Zone = "loopback"
	PublicZone   Zone = "public"
	PrivateZone  Zone = "private"
	VirtualZone  Zone = "virtual"
	TrustedZone  Zone = "trusted"
)

// PortRange is an inclusive range of ports. The zero value is no port; First ==
// Last is a single port.
type PortRange struct {
	First uint16 `json:"first"`
	Last  uint16 `json:"last"`
}

// Port returns the range of a single port.
func Port(p uint16) PortRange { return PortRange{p, p} }

// IsZero reports whether r is no port.
func (r PortRange) IsZero() bool { return r == PortRange{} }

// Contains reports whether p is in r.
func (r PortRange) Contains(p uint16) bool { return r.First <= p && p <= r.Last && !r.IsZero() }

// Overlaps reports whether r and o have a port in common.
func (r PortRange) Overlaps(o PortRange) bool {
	return !r.IsZero() && !o.IsZero() && r.First <= o.Last && o.First <= r.Last
}

// String returns "80" or "40000-40100", as in the settings.
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Service is an open service: a named port or port range, on some interfaces, from
// some sources.
type Service struct {
	// Name is part of the names of the service's chains and comments:
	// [a-z0-9-]{1,20} and none of ReservedNames.
	Name  string    `json:"name"`
	Proto Proto     `json:"proto"` // TCP, UDP, SCTP, or the number of a protocol without ports
	Ports PortRange `json:"ports"` // zero if the protocol has no ports
	// On is AnyZone, PublicZone, PrivateZone, VirtualZone, or the name of an
	// interface, in which a trailing "*" matches any suffix.
	On string `json:"on"`
	// From lists the allowed source networks; empty means any. Their host bits
	// are zero.
	From []netip.Prefix `json:"from,omitempty"`
	// File is the file from which From was read; "" if the settings list it.
	File string `json:"file,omitempty"`
	// Limit applies to new connections per source, an IPv4 address or an IPv6 /64. Zero is
	// no limit.
	Limit Rate `json:"limit,omitzero"`
	// IPsec is set if only connections whose first packet came by IPsec are accepted.
	IPsec bool `json:"ipsec,omitempty"`
	// Until is when the service expires, in whole seconds of UTC; zero is never.
	Until time.Time `json:"until,omitzero"`
	// Source is where the service is configured: "profile web-only" for a
	// built-in profile, "/etc/basicfw/local.ini:12". It has no effect on rules.
	Source string `json:"source,omitempty"`
}

// String returns the service as in the settings: "5432/tcp on private from 10.0.0.0/8".
func (s Service) String() string {
	var b strings.Builder
	b.WriteString(FormatPorts(s.Ports, s.Proto))
	if s.On != "" && s.On != string(AnyZone) {
		fmt.Fprintf(&b, " on %s", s.On)
	}
	if s.File != "" {
		b.WriteString(" from " + filePrefix + s.File)
	} else if len(s.From) > 0 {
		b.WriteString(" from " + strings.Join(FormatPrefixes(s.From), ", "))
	}
	if !s.Limit.IsZero() {
		b.WriteString(" limit " + s.Limit.format())
	}
	if s.IPsec {
		b.WriteString(" via ipsec")
	}
	if !s.Until.IsZero() {
		b.WriteString(" until " + FormatTime(s.Until))
	}
	return b.String()
}

// Profile is the set of services of a kind of server.
type Profile struct {
	Name     string    `json:"name"`
	Title    string    `json:"title,omitempty"`
	Ping     bool      `json:"ping"` // answer echo requests
	Services []Service `json:"services,omitempty"`
}

// Interface is a network interface as the host has it.
type Interface struct {
	Name         string         `json:"name"`
	Zone         Zone           `json:"zone"`
	Reason       string         `json:"reason,omitempty"` // why this zone
	Addresses    []netip.Prefix `json:"addresses,omitempty"`
	MAC          string         `json:"mac,omitempty"`
	Kind         string         `json:"kind,omitempty"`   // "device", "veth", "bridge", ...
	Master       string         `json:"master,omitempty"` // the bridge, bond or VRF that it belongs to
	DefaultRoute bool           `json:"default_route"`
	// IPv4 is Permanent, Leased (at least one address has a limited lifetime) or NoIPv4;
	// link-local addresses do not count. Earlier versions left it empty.
	IPv4 string `json:"ipv4,omitempty"`
	// ServesGuests is set on a bridge of this host whose containers or virtual
	// machines use this host for DNS and DHCP.
	ServesGuests bool `json:"serves_guests,omitempty"`
}

// Values of Interface.IPv4.
const (
	Permanent = "permanent"
	Leased    = "leased"
	NoIPv4    = "none"
)

// Unit is the time unit of a Rate.
type Unit string

// The units, named as in iptables-save.
const (
	Second Unit = "sec"
	Minute Unit = "min"
	Hour   Unit = "hour"
	Day    Unit = "day"
)

// Rate is a number of packets or new connections per unit of time. The zero value
// is no limit.
type Rate struct {
	N   uint32 `json:"n"`
	Per Unit   `json:"per"`
}

// IsZero reports whether r is no limit.
func (r Rate) IsZero() bool { return r.N == 0 }

// String returns the rate, such as "30/min".
func (r Rate) String() string { return fmt.Sprintf("%d/%s", r.N, r.Per) }

// SSHMode determines which sources may open an SSH session.
type SSHMode string

const (
	// SSHPinned accepts only the Allow list.
	SSHPinned SSHMode = "pinned"
	// SSHLimited accepts the Allow list without a limit and every other source
	// within Limit.
	SSHLimited SSHMode = "limited"
)

// SSH is sshd's ports and the sources that may reach them.
type SSH struct {
	Ports []uint16       `json:"ports"`
	Mode  SSHMode        `json:"mode"`
	Allow []netip.Prefix `json:"allow,omitempty"`
	// File is the file from which some of Allow were read; nil if there is none.
	File *ListFile `json:"file,omitempty"`
	// Timed are temporary Allow entries. They alone do not pin SSH: no source
	// would be left after the last one expires.
	Timed []TimedSource `json:"timed,omitempty"`
	// Nobody is set if an empty Allow is intended: no source may use SSH.
	Nobody bool `json:"nobody,omitempty"`
	// Probation is set if SSH is pinned to a client that may be the wrong one.
	Probation *Probation `json:"probation,omitempty"`
	// Limit applies per source, an IPv4 address or an IPv6 /64, if Mode is
	// SSHLimited. Zero is no limit.
	Limit Rate `json:"limit"`
}

// Probation is the time in which a detected client must prove to be the
// administrator's. After it, SSH is open to any address, within the rate limit. The
// rules contain that change from the beginning, so that it needs no running program.
type Probation struct {
	Window
	// NoRule is set if the kernel cannot activate a rule at a given time. Then
	// only the agent ends the probation.
	NoRule bool `json:"no_rule,omitempty"`
}

// TimedSource is a network that is allowed until a time.
type TimedSource struct {
	From  netip.Prefix `json:"from"`
	Until time.Time    `json:"until"`
}

// Sources returns Allow, which never expires, followed by Timed.
func (s SSH) Sources() []TimedSource {
	var out []TimedSource
	for _, p := range s.Allow {
		out = append(out, TimedSource{From: p})
	}
	return append(out, s.Timed...)
}

// BlockedFamilies returns the families over which SSH is blocked although an address
// of the other family is allowed.
func (s SSH) BlockedFamilies() []Family {
	sources := s.Sources()
	if s.Mode != SSHPinned || len(sources) == 0 {
		return nil
	}
	return without(Families[:], func(f Family) bool {
		return slices.ContainsFunc(sources, func(t TimedSource) bool { return FamilyOf(t.From) == f })
	})
}

// SSHNeedsIPv4 reports whether SSH is blocked over IPv6 although this host has a global IPv6
// address. Clients prefer it to IPv4, and ssh then waits for it, usually for two minutes.
func (d Desired) SSHNeedsIPv4() bool {
	return slices.Contains(d.SSH.BlockedFamilies(), IPv6) && slices.ContainsFunc(d.Interfaces, func(i Interface) bool {
		return slices.ContainsFunc(i.Addresses, func(p netip.Prefix) bool {
			return p.Addr().Is6() && p.Addr().IsGlobalUnicast() && !p.Addr().IsPrivate()
		})
	})
}

// SSHOverIPv4 is the hint if [Desired.SSHNeedsIPv4] is true.
const SSHOverIPv4 = "if ssh to this host's name hangs, use ssh -4"

// AllowedBy returns the network of the Allow list that contains an address, otherwise
// the one of Timed that expires last.
func (s SSH) AllowedBy(a netip.Addr) (by TimedSource, ok bool) {
	for _, p := range s.Allow {
		if p.Contains(a.Unmap()) {
			return TimedSource{From: p}, true
		}
	}
	for _, t := range s.Timed {
		if t.From.Contains(a.Unmap()) && t.Until.After(by.Until) {
			by, ok = t, true
		}
	}
	return by, ok
}

// Desired is the desired state, from which the ruleset is compiled.
type Desired struct {
	Profile Profile   `json:"profile"`
	Open    []Service `json:"open,omitempty"` // in addition to the profile's
	// Closed lists services of the profile that stay closed.
	Closed     []string    `json:"closed,omitempty"`
	Interfaces []Interface `json:"interfaces,omitempty"`
	// Trusted lists interfaces on which everything is accepted. A trailing "*" matches
	// those of Interfaces that are in TrustedZone.
	Trusted  []string `json:"trusted,omitempty"`
	SSH      SSH      `json:"ssh"`
	LogDrops bool     `json:"log_drops"`
	// Published is what happens to ports that containers publish: PublishedProfile,
	// PublishedLeave, or "" in states of earlier versions, which left them alone.
	Published string `json:"published,omitempty"`
	// Direct lists the ports of containers that packets from public interfaces must not
	// reach without the published port. It has no effect unless Published is
	// PublishedProfile.
	Direct []ContainerPort `json:"direct,omitempty"`
	Blocks []Block         `json:"blocks,omitempty"`
	// Unlock is temporary access in addition to the above.
	Unlock *Unlock `json:"unlock,omitempty"`
	Timers []Timer `json:"timers,omitempty"`
}

// Unlock is temporary access to SSH, or with All to everything.
type Unlock struct {
	From []netip.Prefix `json:"from,omitempty"` // empty is any source, with the SSH rate limit
	All  bool           `json:"all,omitempty"`
	Window
}

// Services returns the services that are open: the configured ones without sshd's
// ports, which have rules of their own. A service with one of these in the middle of
// its range is split in two.
func (d Desired) Services() []Service {
	all := d.configured()
	for _, p := range d.SSH.Ports {
		for i := 0; i < len(all); i++ {
			s := all[i]
			if s.Proto != TCP || !s.Ports.Contains(p) {
				continue
			}
			var parts []Service
			for _, r := range []PortRange{{s.Ports.First, p - 1}, {p + 1, s.Ports.Last}} {
				if s.Ports = r; r.First <= r.Last && r.First > 0 && r.Last > 0 {
					parts = append(parts, s)
				}
			}
			all = slices.Replace(all, i, i+1, parts...)
			i += len(parts) - 1
		}
	}
	return all
}

// SSHOverlaps returns an error for each configured service that contains a port of sshd.
func (d Desired) SSHOverlaps() (list []*SSHPortError) {
	for _, s := range d.configured() {
		for _, p := range d.SSH.Ports {
			if s.Proto == TCP && s.Ports.Contains(p) {
				open := slices.ContainsFunc(d.Open, func(o Service) bool { return o.Name == s.Name })
				list = append(list, &SSHPortError{Service: s, Port: p, Open: open})
			}
		}
	}
	return list
}

// configured returns the profile's services except the closed ones, followed by Open.
// An entry of Open replaces the profile's service of the same name.
func (d Desired) configured() []Service {
	offered := without(d.Profile.Services, func(s Service) bool {
		return slices.Contains(d.Closed, s.Name) || slices.ContainsFunc(d.Open, func(o Service) bool { return o.Name == s.Name })
	})
	return append(offered, d.Open...)
}

// GuardTable is the table that closes the machine until a change or the user-data has
// succeeded.
const GuardTable = "basicfw-guard"

// ReservedNames are the words after "basicfw-" in the comments of the baseline
// rules. No service may have such a name.
var ReservedNames = []string{
	"block", "broadcast", "dhcp", "direct", "established", "forward", "guest-dhcp", "guest-dns", "icmp",
	"icmp-error", "igmp", "input", "invalid", "log", "loopback", "mld", "multicast", "nd",
	"new-not-syn", "null", "ping", "published", "routed", "spoofed-loopback", "ssh", "ssh-drop",
	"ssh-limit", "ssh-log", "trusted", "unlock", "xmas",
}

// reservedLater are the reserved names that version 0.1 allowed. A state of that version
// may have such a service, and stays valid; its settings do not.
var reservedLater = []string{"block", "direct", "forward", "icmp", "igmp", "published", "routed"}

// CheckServiceName returns an error if a service name is invalid.
func CheckServiceName(name string) error {
	if name == "" || len(name) > 20 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("service name %q: want 1 to 20 of a-z, 0-9 and \"-\"", name)
	}
	if slices.Contains(ReservedNames, name) {
		return fmt.Errorf("service name %q is reserved for the baseline rules: choose another", name)
	}
	return nil
}

// CheckInterfaceName returns an error if an interface name is invalid. A trailing
// "*" is allowed if pattern is set. Names follow the kernel's dev_valid_name (15
// bytes, no "/", no ":" and no white space). In addition, characters that are special
// to a shell, an INI file or iptables are refused.
func CheckInterfaceName(name string, pattern bool) error {
	base := name
	if pattern {
		base = strings.TrimSuffix(name, "*")
	}
	switch {
	case base == "" || base == "." || base == "..":
		return fmt.Errorf("interface name %q: want a name such as eth0", name)
	case base[0] == '-':
		return fmt.Errorf("interface name %q: want a name such as eth0, not an option", name)
	case len(base) > 15:
		return fmt.Errorf("interface name %q: longer than the kernel's 15 characters", name)
	case strings.Trim(base, alphanumeric+"._-@") != "":
		return fmt.Errorf("interface name %q: want letters, digits, \".\", \"_\", \"-\" and \"@\"%s", name,
			map[bool]string{true: ", and a \"*\" only at the end"}[pattern])
	}
	return nil
}

// MatchInterface reports whether name equals pattern, or has the prefix before its
// trailing "*".
func MatchInterface(pattern, name string) bool {
	if base, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(name, base)
	}
	return pattern == name
}
