// Package firewall is the meaning of the firewall: what is wanted, the rules
// that follow from it, and how two sets of rules differ. It is pure: values in,
// values out, no files, no programs, no clock.
package firewall

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Family is an IP version. Its value is the version's number.
type Family uint8

// The two families. Every ruleset has both.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families lists both families in the order in which they are loaded.
var Families = [2]Family{IPv4, IPv6}

// String gives "ipv4" or "ipv6", the words of the command line and of JSON.
func (f Family) String() string { return "ipv" + strconv.Itoa(int(f)) }

// FamilyOf tells the family of a prefix. An IPv4-mapped IPv6 address counts as
// IPv6 here; whoever reads addresses unmaps them first.
func FamilyOf(p netip.Prefix) Family {
	if p.Addr().Is4() {
		return IPv4
	}
	return IPv6
}

// Proto is a transport protocol, or "" for any.
type Proto string

// The protocols that rules know, in the words of iptables-save.
const (
	TCP    Proto = "tcp"
	UDP    Proto = "udp"
	ICMP   Proto = "icmp"
	ICMPv6 Proto = "ipv6-icmp"
)

// Zone says what kind of network an interface leads to.
type Zone string

// The zones. AnyZone is only a service's wish, never an interface's zone.
const (
	AnyZone      Zone = "any"
	LoopbackZone Zone = "loopback"
	PublicZone   Zone = "public"
	PrivateZone  Zone = "private"
	VirtualZone  Zone = "virtual"
	TrustedZone  Zone = "trusted"
)

// PortRange is an inclusive range of ports. The zero value is no port at all;
// First == Last is a single port.
type PortRange struct {
	First uint16 `json:"first"`
	Last  uint16 `json:"last"`
}

// Port is the range of one port.
func Port(p uint16) PortRange { return PortRange{p, p} }

// IsZero tells whether r is no port at all.
func (r PortRange) IsZero() bool { return r == PortRange{} }

// Contains tells whether p is in r.
func (r PortRange) Contains(p uint16) bool { return r.First <= p && p <= r.Last && !r.IsZero() }

// Overlaps tells whether r and o have a port in common.
func (r PortRange) Overlaps(o PortRange) bool {
	return !r.IsZero() && !o.IsZero() && r.First <= o.Last && o.First <= r.Last
}

// String gives "80" or "40000-40100", the words of the settings.
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d-%d", r.First, r.Last)
}

// Service is something that may be reached: a named port or range of ports,
// on some interfaces, from some sources.
type Service struct {
	// Name is what the service's rules, counters and comments are called:
	// [a-z0-9-]{1,20} and none of ReservedNames.
	Name  string    `json:"name"`
	Proto Proto     `json:"proto"` // TCP or UDP
	Ports PortRange `json:"ports"`
	// On is AnyZone, PublicZone, PrivateZone, VirtualZone, or the name of an
	// interface, where a last "*" stands for any rest of the name.
	On string `json:"on"`
	// From are the networks that may reach it; empty means anywhere. Their
	// host bits are zero.
	From []netip.Prefix `json:"from,omitempty"`
	// Until is when it ends, in whole seconds of UTC; zero is never.
	Until time.Time `json:"until,omitzero"`
	// Source says where the service was asked for: "profile web-only" for one
	// that is built in, "/etc/basicfw/local.ini:12". It decides nothing.
	Source string `json:"source,omitempty"`
}

// String gives the service's value as the settings write it:
// "5432/tcp on private from 10.0.0.0/8".
func (s Service) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s/%s", s.Ports, s.Proto)
	if s.On != "" && s.On != string(AnyZone) {
		fmt.Fprintf(&b, " on %s", s.On)
	}
	for i, p := range s.From {
		if i == 0 {
			b.WriteString(" from ")
		} else {
			b.WriteString(", ")
		}
		b.WriteString(FormatPrefix(p))
	}
	if !s.Until.IsZero() {
		b.WriteString(" until " + FormatTime(s.Until))
	}
	return b.String()
}

// Profile is what a kind of server offers.
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
	Kind         string         `json:"kind,omitempty"` // "device", "veth", "bridge", ...
	DefaultRoute bool           `json:"default_route"`
	// ServesGuests is set on a bridge of this host's own behind which
	// containers or virtual machines ask this host for DNS and DHCP.
	ServesGuests bool `json:"serves_guests,omitempty"`
}

// Unit is the time that a Rate counts in.
type Unit string

// The units, in the words of iptables-save.
const (
	Second Unit = "sec"
	Minute Unit = "min"
	Hour   Unit = "hour"
	Day    Unit = "day"
)

// Rate is a number of packets, or of new connections, in a unit of time. The
// zero value is no limit.
type Rate struct {
	N   uint32 `json:"n"`
	Per Unit   `json:"per"`
}

// IsZero tells whether r is no limit.
func (r Rate) IsZero() bool { return r.N == 0 }

// String gives "30/min".
func (r Rate) String() string { return fmt.Sprintf("%d/%s", r.N, r.Per) }

// SSHMode says who may open an SSH session.
type SSHMode string

const (
	// SSHPinned lets in the Allow list and nobody else.
	SSHPinned SSHMode = "pinned"
	// SSHLimited lets in the Allow list without a limit and everybody else
	// within Limit per source.
	SSHLimited SSHMode = "limited"
)

// SSH says where sshd listens and who may reach it.
type SSH struct {
	Ports []uint16       `json:"ports"`
	Mode  SSHMode        `json:"mode"`
	Allow []netip.Prefix `json:"allow,omitempty"`
	// Timed are let in like Allow, each until its time. They alone pin nothing:
	// when the last one's time is over, nobody would be left.
	Timed []TimedSource `json:"timed,omitempty"`
	// Nobody is set where an empty Allow is meant: SSH is pinned to nobody.
	Nobody bool `json:"nobody,omitempty"`
	// Probation is set where SSH is pinned to a client that may be the wrong one.
	Probation *Probation `json:"probation,omitempty"`
	// Limit is for each source, an IPv4 address or an IPv6 /64, where Mode is
	// SSHLimited. Zero is none.
	Limit Rate `json:"limit"`
}

// Probation is the time in which a client that was detected, not named, has to
// show that it is the owner's. When it is over, SSH is for everybody, within
// the limit: the rules say so from the beginning, so that nothing has to run.
type Probation struct {
	Window
	// NoRule is set where the kernel cannot begin a rule at a time. Then only
	// the agent ends it.
	NoRule bool `json:"no_rule,omitempty"`
}

// TimedSource is a network that is let in until a time.
type TimedSource struct {
	From  netip.Prefix `json:"from"`
	Until time.Time    `json:"until"`
}

// Nobodys gives the families over which nobody may log in though somebody may
// over the other.
func (s SSH) Nobodys() []Family {
	if s.Mode != SSHPinned || len(s.Allow)+len(s.Timed) == 0 {
		return nil
	}
	somebody := map[Family]bool{}
	for _, p := range s.Allow {
		somebody[FamilyOf(p)] = true
	}
	for _, t := range s.Timed {
		somebody[FamilyOf(t.From)] = true
	}
	var out []Family
	for _, f := range Families {
		if !somebody[f] {
			out = append(out, f)
		}
	}
	return out
}

// AllowedBy gives the network of the Allow list that an address is in; where
// there is none, the one of Timed that lets it in the longest, and until when.
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

// Desired is everything that the ruleset follows from.
type Desired struct {
	Profile Profile   `json:"profile"`
	Open    []Service `json:"open,omitempty"` // besides the profile's
	// Closed are names of services that stay closed, whatever the profile says.
	Closed     []string    `json:"closed,omitempty"`
	Interfaces []Interface `json:"interfaces,omitempty"`
	// Trusted are names of interfaces where everything is accepted; a last
	// "*" stands for any rest of the name.
	Trusted  []string `json:"trusted,omitempty"`
	SSH      SSH      `json:"ssh"`
	LogDrops bool     `json:"log_drops"`
	// Unlock lets somebody in for a while, besides all that.
	Unlock *Unlock `json:"unlock,omitempty"`
}

// Unlock lets in over SSH, or with All to everything, until a time.
type Unlock struct {
	From []netip.Prefix `json:"from,omitempty"` // empty is anywhere, limited as SSH is
	All  bool           `json:"all,omitempty"`
	Window
}

// Services are the profile's services, less those that are closed, and those
// opened besides. A name that both have is the latter's.
func (d Desired) Services() []Service {
	var all []Service
	for _, s := range d.Profile.Services {
		if !hasService(d.Open, s.Name) && !slices.Contains(d.Closed, s.Name) {
			all = append(all, s)
		}
	}
	return append(all, d.Open...)
}

// Reachable tells whether anybody outside may reach a port, be it from some
// networks or on some interfaces only.
func (d Desired) Reachable(proto Proto, port uint16) bool {
	if proto == TCP {
		for _, p := range d.SSH.Ports {
			if p == port {
				return true
			}
		}
	}
	for _, s := range d.Services() {
		if s.Proto == proto && s.Ports.Contains(port) {
			return true
		}
	}
	return false
}

func hasService(list []Service, name string) bool {
	for _, s := range list {
		if s.Name == name {
			return true
		}
	}
	return false
}

// ReservedNames are the words that comments of the baseline's own rules use
// behind "basicfw-". No service may be called one of them.
var ReservedNames = []string{
	"broadcast", "dhcp", "established", "guest-dhcp", "guest-dns", "icmp-error",
	"input", "invalid", "log", "loopback", "mld", "multicast", "nd",
	"new-not-syn", "null", "ping", "spoofed-loopback", "ssh", "ssh-drop",
	"ssh-limit", "ssh-log", "trusted", "unlock", "xmas",
}

// CheckServiceName says what is wrong with a service's name, or nil.
func CheckServiceName(name string) error {
	if name == "" || len(name) > 20 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		return fmt.Errorf("service name %q: want 1 to 20 of a-z, 0-9 and \"-\"", name)
	}
	for _, r := range ReservedNames {
		if r == name {
			return fmt.Errorf("service name %q is a word of the baseline's own rules: choose another", name)
		}
	}
	return nil
}

// CheckInterfaceName says what is wrong with an interface's name, or nil. A
// last "*" is allowed where pattern is set. Names follow the kernel's
// dev_valid_name (15 bytes, no "/", no ":" and no white space), and further
// leave out what a shell, an INI file or iptables would take for something
// else.
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
	}
	for _, c := range []byte(base) {
		ok := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("._-@", c) >= 0
		if !ok {
			return fmt.Errorf("interface name %q: want letters, digits, \".\", \"_\", \"-\" and \"@\"%s", name,
				map[bool]string{true: ", and a \"*\" only at the end"}[pattern])
		}
	}
	return nil
}

// MatchInterface tells whether name is pattern, or begins with what stands
// before pattern's last "*".
func MatchInterface(pattern, name string) bool {
	if base, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(name, base)
	}
	return pattern == name
}
