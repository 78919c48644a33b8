package firewall

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"
)

// named lists the protocols without ports that have a name in the settings.
var named = []struct {
	name  string
	proto Proto
}{{"ah", "51"}, {"esp", "50"}, {"gre", "47"}, {"ipip", "4"}, {"ipv6", "41"}, {"ospf", "89"}, {"vrrp", "112"}}

// ProtocolNames returns the names of protocols that a service can have instead of ports.
func ProtocolNames() (names []string) {
	for _, n := range named {
		names = append(names, n.name)
	}
	return names
}

// HasPorts reports whether services of a protocol have ports.
func (p Proto) HasPorts() bool { return p == TCP || p == UDP || p == SCTP }

// Number returns the number of a protocol, or 0 if it has none.
func (p Proto) Number() uint8 {
	n, err := strconv.ParseUint(string(p), 10, 8)
	if err == nil {
		return uint8(n)
	}
	return map[Proto]uint8{ICMP: 1, TCP: 6, UDP: 17, ICMPv6: 58, SCTP: 132}[p]
}

// String returns a protocol as in the settings: "tcp", "vrrp", "proto 99".
func (p Proto) String() string {
	for _, n := range named {
		if n.proto == p {
			return n.name
		}
	}
	if isNumber(string(p)) {
		return "proto " + string(p)
	}
	return string(p)
}

// FormatPorts returns what a service opens, as in the settings: "443/tcp", "vrrp".
func FormatPorts(r PortRange, p Proto) string {
	if p != "" && !p.HasPorts() {
		return p.String()
	}
	return fmt.Sprintf("%s/%s", r, p)
}

// parseProtocol parses a protocol without ports: its name, or proto with its number.
// It returns "" if text is not a protocol.
func parseProtocol(text string) (Proto, error) {
	word := strings.ToLower(strings.TrimSpace(text))
	for _, n := range named {
		if n.name == word {
			return n.proto, nil
		}
	}
	if word != "proto" && !strings.HasPrefix(word, "proto ") {
		return "", nil
	}
	number := strings.TrimSpace(word[len("proto"):])
	n, err := strconv.ParseUint(number, 10, 8)
	if !isNumber(number) || err != nil {
		return "", fmt.Errorf("%s: want proto and a number from 1 to 254, such as proto 112", Quote(text))
	}
	p := Proto(number)
	if with := map[Proto]string{"6": "PORT/tcp", "17": "PORT/udp", "132": "PORT/sctp"}[p]; with != "" {
		return "", fmt.Errorf("%s: this protocol has ports: write %s", Quote(text), with)
	}
	return p, checkNumber(uint8(n))
}

// checkNumber returns an error for a protocol that a service cannot have.
func checkNumber(n uint8) error {
	switch n {
	case 0, 43, 44, 60, 135, 139, 140: // linux/net/ipv6/exthdrs_core.c; in iptables, 0 is any
		return fmt.Errorf("proto %d is an extension header of IPv6: want the protocol after it", n)
	case 1, 2, 58:
		return fmt.Errorf("proto %d is %s, which the built-in rules treat", n, map[uint8]string{1: "ICMP", 2: "IGMP", 58: "ICMPv6"}[n])
	case 255:
		return fmt.Errorf("proto %d is reserved: want a number from 1 to 254", n)
	}
	return nil
}

// validIn reports whether rules of a family can have the protocol.
func (p Proto) validIn(f Family) bool {
	switch p {
	case TCP, UDP, SCTP, icmpOf(f):
		return true
	case IGMP:
		return f == IPv4
	}
	n := p.Number()
	return isNumber(string(p)) && n != 0 && checkNumber(n) == nil && n != 6 && n != 17 && n != 132
}

// ParseRate parses N/second, N/minute, N/hour or N/day. It refuses numbers over
// 10000: the maximum of iptables is 10000 per second (XT_HASHLIMIT_SCALE). It also
// refuses rates that iptables rounds, because they could never be verified.
func ParseRate(value string) (Rate, error) {
	number, unit, _ := strings.Cut(value, "/")
	per := map[string]Unit{"second": Second, "sec": Second, "minute": Minute, "min": Minute, "hour": Hour, "day": Day}[unit]
	n, err := strconv.ParseUint(number, 10, 32)
	if err != nil || per == "" || n < 1 || n > 10000 {
		return Rate{}, fmt.Errorf("%s: want 1 to 10000 per second, minute, hour or day, such as 30/minute", Quote(value))
	}
	rate := Rate{N: uint32(n), Per: per}
	if _, exact := rate.Canonical(); !exact {
		return Rate{}, fmt.Errorf("%s: iptables would round this rate: want a round number, such as 100/second or 600/minute", Quote(value))
	}
	return rate, nil
}

// format returns a rate as in the settings: "50/second".
func (r Rate) format() string {
	per := map[Unit]string{Second: "second", Minute: "minute"}[r.Per]
	return fmt.Sprintf("%d/%s", r.N, cmp.Or(per, string(r.Per)))
}
