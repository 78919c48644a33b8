package firewall

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Quote makes text of a user's, of a file or of the network fit to be shown:
// in quotes, with everything that does not print escaped, and cut if it is
// long.
func Quote(text string) string {
	const max = 60
	if len(text) <= max {
		return strconv.Quote(text)
	}
	cut := max
	for cut > 0 && !utf8.RuneStart(text[cut]) {
		cut--
	}
	return strconv.Quote(text[:cut]) + "..."
}

// FormatPrefix is a network as people write it: a single address without its
// bits.
func FormatPrefix(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// FormatPrefixes is FormatPrefix of each of a list, which is never nil.
func FormatPrefixes(list []netip.Prefix) []string {
	words := make([]string, len(list))
	for i, p := range list {
		words[i] = FormatPrefix(p)
	}
	return words
}

// ParseSource reads who may log in over SSH: an address, or a network in CIDR
// form. White space around it is trimmed, since templates end in newlines; an
// address becomes a network of one; IPv4-mapped IPv6 becomes IPv4. What cannot
// be the source of a connection from outside is refused with the reason.
func ParseSource(text string) (netip.Prefix, error) {
	p, err := parsePrefix(text)
	if err != nil {
		return netip.Prefix{}, err
	}
	if why := neverASource(p.Masked()); why != "" {
		return netip.Prefix{}, fmt.Errorf("%s %s", Quote(strings.TrimSpace(text)), why)
	}
	return wholeNetwork(p)
}

// ParseNetwork reads where a service may be reached from: an address, or a
// network in CIDR form, with the same spellings as ParseSource. Any network
// will do, 0.0.0.0/0 too: it is all of IPv4 and nothing of IPv6.
func ParseNetwork(text string) (netip.Prefix, error) {
	p, err := parsePrefix(text)
	if err != nil {
		return netip.Prefix{}, err
	}
	return wholeNetwork(p)
}

// ParseSources reads a list of what ParseSource reads, separated by commas,
// white space or both. One that comes twice is kept once. Each bad one has its
// own error; the good ones are given all the same. Blank text is an empty
// list, but commas without an address are an error: "nobody" must not come of
// a template that had nothing to fill in.
func ParseSources(list string) ([]netip.Prefix, []error) {
	words := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || strings.ContainsRune(" \t\r\n", r) })
	if len(words) == 0 && strings.TrimSpace(list) != "" {
		return nil, []error{fmt.Errorf("%s holds no address", Quote(list))}
	}
	var (
		sources []netip.Prefix
		errs    []error
		seen    = map[netip.Prefix]bool{}
	)
	for _, w := range words {
		p, err := ParseSource(w)
		switch {
		case err != nil:
			errs = append(errs, err)
		case !seen[p]:
			seen[p] = true
			sources = append(sources, p)
		}
	}
	return sources, errs
}

// parsePrefix reads an address or a CIDR, whose host bits may be set.
func parsePrefix(text string) (netip.Prefix, error) {
	text = strings.TrimSpace(text)
	// What cloud-init's handling of jinja templates puts in the place of a
	// variable that it does not know.
	if _, name, found := strings.Cut(text, "CI_MISSING_JINJA_VAR/"); found {
		name, _, _ = strings.Cut(name, "/")
		return netip.Prefix{}, fmt.Errorf("%s: cloud-init could not fill in the template variable %s: give the address itself, or leave it empty",
			Quote(text), Quote(name))
	}
	if strings.Contains(text, "%") {
		return netip.Prefix{}, fmt.Errorf("%s has a zone id: want an address that is the same on every link", Quote(text))
	}
	host, _, hasBits := strings.Cut(text, "/")
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s is not an address: want one such as 203.0.113.7, 198.51.100.0/24 or 2001:db8::/64 (names are not looked up)", Quote(text))
	}
	if !hasBits {
		addr = addr.Unmap()
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s: want a number from 0 to %d behind the \"/\"", Quote(text), addr.BitLen())
	}
	if addr.Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, fmt.Errorf("%s is more than the IPv4-mapped addresses: write the IPv4 network, such as 198.51.100.0/24", Quote(text))
		}
		p = netip.PrefixFrom(addr.Unmap(), p.Bits()-96)
	}
	return p, nil
}

// wholeNetwork refuses a network in which host bits are set: what was meant,
// the network or the one address, only the user knows.
func wholeNetwork(p netip.Prefix) (netip.Prefix, error) {
	if p == p.Masked() {
		return p, nil
	}
	return netip.Prefix{}, fmt.Errorf("%q has host bits set: the network is %s, the one address %s", p, p.Masked(), p.Addr())
}

// neverASource tells why no connection can come from p, or why p should not be
// said to be a source; "" is no objection. A network that only touches such a
// range is fine.
func neverASource(p netip.Prefix) string {
	if p.Bits() == 0 {
		return "is everybody: if that is meant, use allow = any in [ssh] of the settings"
	}
	if p.Addr().IsUnspecified() {
		return "is the unspecified address: nobody comes from there"
	}
	for _, r := range []struct{ network, why string }{
		{"0.0.0.0/8", "is of the unspecified network 0.0.0.0/8: nobody comes from there"}, // RFC 6890
		{"127.0.0.0/8", "is a loopback address: it is this machine itself"},
		{"::1/128", "is the loopback address: it is this machine itself"},
		{"169.254.0.0/16", "is a link-local address: it differs from link to link"}, // RFC 3927
		{"fe80::/10", "is a link-local address: it differs from link to link"},      // RFC 4291
		{"224.0.0.0/4", "is a multicast address: nobody comes from there"},          // RFC 5771
		{"ff00::/8", "is a multicast address: nobody comes from there"},
		{"255.255.255.255/32", "is the broadcast address: nobody comes from there"},
	} {
		n := netip.MustParsePrefix(r.network)
		if n.Bits() <= p.Bits() && n.Contains(p.Addr()) {
			return r.why
		}
	}
	return ""
}
