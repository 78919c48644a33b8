package firewall

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

const (
	serviceForm = "PORT[-PORT]/tcp|udp|sctp|PROTOCOL [on any|public|private|virtual|INTERFACE] [from CIDR[, CIDR...]|file:PATH] [limit RATE] [via ipsec]"
	zonesForm   = "any, public, private, virtual or an interface name"
)

// clauses are the words after the port of a service that begin a part of it, in order.
var clauses = []string{"on", "from", "limit", "via", "until"}

// ParseService parses a service in the syntax of settings and profiles:
//
//	PORT[-PORT]/tcp|udp|sctp|PROTOCOL [on any|public|private|virtual|INTERFACE]
//		[from CIDR[, CIDR...]|file:PATH] [limit RATE] [via ipsec] [until TIME]
//
// PROTOCOL is one of ProtocolNames, or proto and its number. RATE is in the format of
// ParseRate. TIME is in the format of ParseTime, and allowed in settings only. The error
// joins all errors (errors.Join).
func ParseService(name, value string) (Service, error) {
	var errs []error
	note := func(err error) { errs = append(errs, err) } // errors.Join drops nil
	s := Service{Name: name, On: string(AnyZone)}
	if len(name) > 20 {
		note(fmt.Errorf("service name %s: longer than 20 characters", Quote(name)))
	} else {
		note(CheckServiceName(name))
	}

	fields := strings.Fields(value)
	if len(fields) == 0 {
		note(fmt.Errorf("no port: want %s", serviceForm))
		return Service{}, errors.Join(errs...)
	}
	var err error
	if len(fields) > 1 && fields[0] == "proto" {
		fields = append([]string{"proto " + fields[1]}, fields[2:]...)
	}
	s.Ports, s.Proto, err = ParsePorts(fields[0])
	note(err)
	rest := strings.Fields(strings.ReplaceAll(strings.Join(fields[1:], " "), ",", " , "))
	for _, word := range clauses {
		if len(rest) == 0 || rest[0] != word {
			continue
		}
		end := 1
		for end < len(rest) && !slices.Contains(clauses, rest[end]) {
			end++
		}
		if word == "on" && end > 2 { // further words are out of place
			end = 2
		}
		errs = append(errs, s.parse(word, rest[1:end])...)
		rest = rest[end:]
	}
	if len(rest) > 0 {
		note(fmt.Errorf("%s is out of place: want %s", Quote(strings.Join(rest, " ")), serviceForm))
	}
	if err := errors.Join(errs...); err != nil {
		return Service{}, err
	}
	return s, nil
}

// parse parses the words of a clause.
func (s *Service) parse(clause string, words []string) (errs []error) {
	var err error
	value := strings.Join(words, " ")
	switch clause {
	case "on":
		if value == "" || value == "," {
			return []error{fmt.Errorf("\"on\" has no value: want %s", zonesForm)}
		}
		s.On, err = value, CheckOn(value)
	case "from":
		if len(words) == 1 {
			if s.File, err = ParseFile(value); s.File != "" || err != nil {
				break
			}
		}
		s.From, errs = parseFrom(words)
		return errs
	case "limit":
		if s.Limit, err = ParseRate(value); err != nil {
			err = fmt.Errorf("limit: %w", err)
		}
	case "via":
		if s.IPsec = value == "ipsec"; !s.IPsec {
			err = fmt.Errorf("via: %s: want ipsec", Quote(value))
		}
	case "until":
		if s.Until, err = ParseTime(value); err != nil {
			err = fmt.Errorf("until: %w", err)
		}
	}
	return []error{err}
}

// ParsePorts parses PORT[-PORT]/tcp|udp|sctp, or a protocol without ports. Its errors show
// the correct form, with the given numbers if possible.
func ParsePorts(text string) (PortRange, Proto, error) {
	if p, err := parseProtocol(text); p != "" || err != nil {
		return PortRange{}, p, err
	}
	ports, proto, hasProto := strings.Cut(text, "/")
	if lower := strings.ToLower(ports); Proto(lower).HasPorts() { // tcp/80
		ports, proto = proto, lower
		hasProto = false
	}
	first, last, isRange := strings.Cut(ports, "-")
	if !isRange {
		if f, l, found := strings.Cut(ports, ":"); found { // the syntax of iptables
			first, last, isRange = f, l, true
			hasProto = false
		}
	}
	if !isRange {
		last = first
	}
	if !isNumber(first) || !isNumber(last) {
		return PortRange{}, "", fmt.Errorf("%s: want a port or port range and a protocol, such as 8080/tcp or 40000-40100/udp; or a protocol such as vrrp", Quote(text))
	}
	if p, err := parseProtocol(proto); p != "" || err != nil { // 50/esp
		return PortRange{}, "", fmt.Errorf("%s: this protocol has no ports: write %s", Quote(text), cmp.Or(p.String(), "proto NUMBER"))
	}
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if errA != nil || errB != nil || a == 0 || b == 0 {
		return PortRange{}, "", fmt.Errorf("%s: ports are 1 to 65535, such as 8080/tcp or 40000-40100/udp", Quote(text))
	}
	r, p := PortRange{uint16(a), uint16(b)}, Proto(proto)
	if a > b {
		if !p.HasPorts() {
			p = TCP
		}
		return PortRange{}, "", fmt.Errorf("%s: the range is reversed: write %d-%d/%s", Quote(text), b, a, string(p))
	}
	if !hasProto || !p.HasPorts() {
		return PortRange{}, "", fmt.Errorf("%s: write %s/tcp or %s/udp", Quote(text), r, r)
	}
	return r, p, nil
}

// isNumber reports whether text is a plain decimal number, without a sign or a leading
// zero, which could mean octal.
func isNumber(text string) bool {
	return text != "" && strings.Trim(text, "0123456789") == "" && (text == "0" || text[0] != '0')
}

// CheckOn returns an error if the word after "on" is invalid. Almost every interface
// name contains a digit, and no zone does. Other words of letters only are therefore
// refused as misspelt zones: as interfaces they would never appear, and the service
// would silently stay closed.
func CheckOn(word string) error {
	switch Zone(word) {
	case AnyZone, PublicZone, PrivateZone, VirtualZone:
		return nil
	}
	if len(word) > 16 { // 15 characters and a "*"
		return fmt.Errorf("%s is neither a zone nor an interface name: want %s", Quote(word), zonesForm)
	}
	if IsZoneWord(word) {
		return fmt.Errorf("unknown zone %q: want %s", word, zonesForm)
	}
	if strings.Trim(strings.ToLower(word), "abcdefghijklmnopqrstuvwxyz") == "" {
		return fmt.Errorf("unknown zone %q: want %s (for an interface of this name: %s*)", word, zonesForm, word)
	}
	return CheckInterfaceName(word, true)
}

// IsZoneWord reports whether word is a zone of this program or of other firewalls,
// in any letter case, so that it is unlikely to be an interface name.
func IsZoneWord(word string) bool {
	switch strings.ToLower(word) {
	case "any", "loopback", "public", "private", "virtual", "trusted",
		"all", "dmz", "external", "internal", "internet", "lan", "wan", "world":
		return true
	}
	return false
}

// parseFrom parses networks separated by commas.
func parseFrom(words []string) ([]netip.Prefix, []error) {
	var (
		list []netip.Prefix
		errs []error
		seen = map[netip.Prefix]bool{}
	)
	wantNetwork := true
	for _, w := range words {
		if w == "," {
			if wantNetwork {
				errs = append(errs, errors.New("a network is missing before \",\": want from CIDR[, CIDR...]"))
			}
			wantNetwork = true
			continue
		}
		if !wantNetwork {
			errs = append(errs, fmt.Errorf("%s: want a \",\" between two networks, and nothing after the last: %s", Quote(w), serviceForm))
			break
		}
		wantNetwork = false
		p, err := ParseNetwork(w)
		switch {
		case err != nil:
			errs = append(errs, err)
		case !seen[p]:
			seen[p] = true
			list = append(list, p)
		}
	}
	if wantNetwork {
		errs = append(errs, errors.New("a network is missing at the end: want from CIDR[, CIDR...], such as from 10.0.0.0/8"))
	}
	return list, errs
}

// Canonical returns a rate as iptables-save prints it: 60/min becomes 1/sec. It
// returns false for a rate that iptables changes. It stores the time between two
// packets in units of 1/10000 s, and since hashlimit revision 2 of 1/1000000 s
// (XT_HASHLIMIT_SCALE). It prints the rate computed from that: 7000/sec becomes
// 7042/sec.
func (r Rate) Canonical() (Rate, bool) {
	if r.IsZero() {
		return Rate{}, true
	}
	old, recent := r.printed(10_000), r.printed(1_000_000)
	same := uint64(r.N)*seconds[old.Per] == uint64(old.N)*seconds[r.Per]
	return old, same && old == recent && !old.IsZero()
}

// printed returns the rate that iptables prints at a scale (print_rate of
// libxt_hashlimit.c).
func (r Rate) printed(scale uint64) Rate {
	if seconds[r.Per] == 0 || r.N == 0 {
		return Rate{}
	}
	period := scale * seconds[r.Per] / uint64(r.N)
	if period == 0 {
		return Rate{}
	}
	best := Day
	for _, unit := range []Unit{Hour, Minute, Second} {
		whole := scale * seconds[unit]
		if period > whole || whole/period < whole%period {
			break
		}
		best = unit
	}
	return Rate{uint32(scale * seconds[best] / period), best}
}

var seconds = map[Unit]uint64{Second: 1, Minute: 60, Hour: 60 * 60, Day: 24 * 60 * 60}

// Exists reports whether an interface matches the "on" of a service. For any it is
// always true.
func (d Desired) Exists(on string) bool {
	return slices.ContainsFunc(d.InterfacesOf(on), func(name string) bool {
		return name == "" || slices.ContainsFunc(d.Interfaces, func(i Interface) bool { return MatchInterface(name, i.Name) })
	})
}

// CheckProfileName returns an error if name is not a valid profile name, which is
// also the name of a file: NAME.ini.
func CheckProfileName(name string) error {
	const alphanumeric = "abcdefghijklmnopqrstuvwxyz0123456789"
	switch {
	case name == "" || len(name) > 40 || strings.Trim(name, alphanumeric+"+._-") != "" || !strings.ContainsRune(alphanumeric, rune(name[0])):
		return fmt.Errorf("profile name %s: want 1 to 40 of a-z, 0-9, \"+\", \".\", \"_\" and \"-\", a letter or digit first", Quote(name))
	case name == "auto":
		return fmt.Errorf("profile name %q: reserved for automatic selection", name)
	}
	return nil
}
