package firewall

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

const (
	serviceForm = "PORT[-PORT]/tcp|udp [on any|public|private|virtual|INTERFACE] [from CIDR[, CIDR...]]"
	zonesForm   = "any, public, private, virtual or an interface's name"
)

// ParseService reads a service as settings and profiles write it:
//
//	PORT[-PORT]/tcp|udp [on any|public|private|virtual|INTERFACE] [from CIDR[, CIDR...]] [until TIME]
//
// with a TIME as ParseTime reads it, which only settings may have. The error joins everything that is wrong with it (errors.Join).
func ParseService(name, value string) (Service, error) {
	var errs []error
	note := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
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
	s.Ports, s.Proto, err = ParsePorts(fields[0])
	note(err)
	rest := strings.Fields(strings.ReplaceAll(strings.Join(fields[1:], " "), ",", " , "))
	if i := slices.Index(rest, "until"); i >= 0 {
		if s.Until, err = ParseTime(strings.Join(rest[i+1:], " ")); err != nil {
			note(fmt.Errorf("until: %w", err))
		}
		rest = rest[:i]
	}
	if len(rest) > 0 && rest[0] == "on" {
		if len(rest) < 2 || rest[1] == "," || rest[1] == "from" {
			note(fmt.Errorf("nothing stands behind \"on\": want %s", zonesForm))
			rest = rest[1:]
		} else {
			s.On = rest[1]
			note(CheckOn(s.On))
			rest = rest[2:]
		}
	}
	switch {
	case len(rest) > 0 && rest[0] == "from":
		var bad []error
		s.From, bad = parseFrom(rest[1:])
		errs = append(errs, bad...)
	case len(rest) > 0:
		note(fmt.Errorf("%s is out of place: want %s", Quote(strings.Join(rest, " ")), serviceForm))
	}
	if len(errs) > 0 {
		return Service{}, errors.Join(errs...)
	}
	return s, nil
}

// ParsePorts reads PORT[-PORT]/tcp|udp. Its errors show the right form with
// the user's own numbers where that can be.
func ParsePorts(text string) (PortRange, Proto, error) {
	ports, proto, hasProto := strings.Cut(text, "/")
	if lower := strings.ToLower(ports); lower == "tcp" || lower == "udp" { // tcp/80
		ports, proto = proto, lower
		hasProto = false
	}
	first, last, isRange := strings.Cut(ports, "-")
	if !isRange {
		if f, l, found := strings.Cut(ports, ":"); found { // iptables' own form
			first, last, isRange = f, l, true
			hasProto = false
		}
	}
	if !isRange {
		last = first
	}
	if !isNumber(first) || !isNumber(last) {
		return PortRange{}, "", fmt.Errorf("%s: want a port or a range of ports and a protocol, such as 8080/tcp or 40000-40100/udp", Quote(text))
	}
	a, errA := strconv.ParseUint(first, 10, 16)
	b, errB := strconv.ParseUint(last, 10, 16)
	if errA != nil || errB != nil || a == 0 || b == 0 {
		return PortRange{}, "", fmt.Errorf("%s: ports are 1 to 65535, such as 8080/tcp or 40000-40100/udp", Quote(text))
	}
	r := PortRange{uint16(a), uint16(b)}
	if a > b {
		return PortRange{}, "", fmt.Errorf("%s: the range is reversed: write %d-%d/%s", Quote(text), b, a, orTCP(proto))
	}
	p := Proto(proto)
	if !hasProto || p != TCP && p != UDP {
		return PortRange{}, "", fmt.Errorf("%s: write %s/tcp or %s/udp", Quote(text), r, r)
	}
	return r, p, nil
}

func orTCP(proto string) Proto {
	if Proto(proto) == UDP {
		return UDP
	}
	return TCP
}

// isNumber tells whether text is a decimal number as people write it: no sign,
// no leading zero that somebody might take for octal.
func isNumber(text string) bool {
	return text != "" && strings.Trim(text, "0123456789") == "" && (text == "0" || text[0] != '0')
}

// CheckOn says what is wrong with the word behind "on", or nil. Almost every
// interface's name has a digit in it, and no zone's has. So a word of letters
// alone that is no zone counts as a misspelt zone, which would otherwise be an
// interface that never comes, and a service that silently stays closed.
func CheckOn(word string) error {
	switch Zone(word) {
	case AnyZone, PublicZone, PrivateZone, VirtualZone:
		return nil
	}
	if len(word) > 16 { // 15 characters and a "*"
		return fmt.Errorf("%s is neither a zone nor an interface's name: want %s", Quote(word), zonesForm)
	}
	if IsZoneWord(word) {
		return fmt.Errorf("unknown zone %q: want %s", word, zonesForm)
	}
	if strings.Trim(strings.ToLower(word), "abcdefghijklmnopqrstuvwxyz") == "" {
		return fmt.Errorf("unknown zone %q: want %s (an interface that is really called so: %s*)", word, zonesForm, word)
	}
	return CheckInterfaceName(word, true)
}

// IsZoneWord tells whether word is the name of a zone here or in other
// firewalls, in any case, so that it is hardly meant as an interface's name.
func IsZoneWord(word string) bool {
	switch strings.ToLower(word) {
	case "any", "loopback", "public", "private", "virtual", "trusted",
		"all", "dmz", "external", "internal", "internet", "lan", "wan", "world":
		return true
	}
	return false
}

// parseFrom reads networks with a comma between each two.
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
			errs = append(errs, fmt.Errorf("%s: want a \",\" between two networks, and nothing behind the last: %s", Quote(w), serviceForm))
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

// Canonical gives a rate as iptables-save prints it: 60/min comes back as
// 1/sec. It is false for a rate that does not come back as the same: iptables
// keeps the time between two packets as a whole number of 1/10000 s, and since
// hashlimit's revision 2 of 1/1000000 s (XT_HASHLIMIT_SCALE), and prints what
// follows from that, so that 7000/sec becomes 7042/sec.
func (r Rate) Canonical() (Rate, bool) {
	if r.IsZero() {
		return Rate{}, true
	}
	old, recent := r.printed(10_000), r.printed(1_000_000)
	same := uint64(r.N)*seconds(old.Per) == uint64(old.N)*seconds(r.Per)
	return old, same && old == recent && !old.IsZero()
}

// printed is what iptables makes of a rate at a scale: print_rate of
// libxt_hashlimit.c.
func (r Rate) printed(scale uint64) Rate {
	if seconds(r.Per) == 0 || r.N == 0 {
		return Rate{}
	}
	period := scale * seconds(r.Per) / uint64(r.N)
	if period == 0 {
		return Rate{}
	}
	best := Day
	for _, unit := range []Unit{Hour, Minute, Second} {
		whole := scale * seconds(unit)
		if period > whole || whole/period < whole%period {
			break
		}
		best = unit
	}
	return Rate{uint32(scale * seconds(best) / period), best}
}

func seconds(u Unit) uint64 {
	switch u {
	case Second:
		return 1
	case Minute:
		return 60
	case Hour:
		return 60 * 60
	case Day:
		return 24 * 60 * 60
	}
	return 0
}
