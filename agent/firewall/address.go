package firewall

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Quote returns untrusted text for display: quoted, with non-printable
// characters escaped, and truncated if it is long.
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

// FormatPrefix returns a network in CIDR form, or a single address without its
// prefix length.
func FormatPrefix(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}

// FormatPrefixes formats each network with FormatPrefix. The result is never nil.
func FormatPrefixes(list []netip.Prefix) []string {
	words := make([]string, len(list))
	for i, p := range list {
		words[i] = FormatPrefix(p)
	}
	return words
}

// ParseSource reads an SSH source: an address, or a network in CIDR form.
// Surrounding white space is trimmed, since templates end in newlines. An
// IPv4-mapped IPv6 address becomes IPv4. An address that cannot be the source of
// a connection from outside is refused with the reason.
func ParseSource(text string) (netip.Prefix, error) {
	p, err := parsePrefix(text)
	if err != nil {
		return netip.Prefix{}, err
	}
	if why := sourceProblem(p.Masked()); why != "" {
		return netip.Prefix{}, fmt.Errorf("%s %s", Quote(strings.TrimSpace(text)), why)
	}
	return wholeNetwork(p)
}

// ParseNetwork reads a source of a service: an address, or a network in CIDR form,
// with the same spellings as ParseSource. Every network is accepted, including
// 0.0.0.0/0, which covers all of IPv4 and nothing of IPv6.
func ParseNetwork(text string) (netip.Prefix, error) {
	p, err := parsePrefix(text)
	if err != nil {
		return netip.Prefix{}, err
	}
	return wholeNetwork(p)
}

// ParseSources reads a list of sources, separated by commas, white space or
// both. Duplicates are removed. Each invalid source has its own error, and the
// valid ones are returned as well. Blank text is an empty list. Commas without
// an address are an error: a template without values must not block everyone.
func ParseSources(list string) ([]netip.Prefix, []error) {
	words := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || strings.ContainsRune(" \t\r\n", r) })
	if len(words) == 0 && strings.TrimSpace(list) != "" {
		return nil, []error{fmt.Errorf("%s contains no address", Quote(list))}
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
	// cloud-init replaces an unknown variable of a jinja template with this text.
	if _, name, found := strings.Cut(text, "CI_MISSING_JINJA_VAR/"); found {
		name, _, _ = strings.Cut(name, "/")
		return netip.Prefix{}, fmt.Errorf("%s: cloud-init could not fill in the template variable %s: write the address, or leave the value empty",
			Quote(text), Quote(name))
	}
	if strings.Contains(text, "%") {
		return netip.Prefix{}, fmt.Errorf("%s has a zone ID: want an address without one", Quote(text))
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
		return netip.Prefix{}, fmt.Errorf("%s: want a number from 0 to %d after the \"/\"", Quote(text), addr.BitLen())
	}
	if addr.Is4In6() {
		if p.Bits() < 96 {
			return netip.Prefix{}, fmt.Errorf("%s contains more than the IPv4-mapped addresses: write the IPv4 network, such as 198.51.100.0/24", Quote(text))
		}
		p = netip.PrefixFrom(addr.Unmap(), p.Bits()-96)
	}
	return p, nil
}

// wholeNetwork refuses a network in which host bits are set: it is unclear
// whether the network or the single address is meant.
func wholeNetwork(p netip.Prefix) (netip.Prefix, error) {
	if p == p.Masked() {
		return p, nil
	}
	return netip.Prefix{}, fmt.Errorf("%q has host bits set: the network is %s, the address is %s", p, p.Masked(), p.Addr())
}

// sourceProblem returns why p cannot or should not be a source, or "" if it can.
// A network that only overlaps such a range is accepted.
func sourceProblem(p netip.Prefix) string {
	if p.Bits() == 0 {
		return "contains every address: to allow any, set allow = any in [ssh]"
	}
	if p.Addr().IsUnspecified() {
		return "is the unspecified address, which is never a source"
	}
	for _, r := range []struct{ network, why string }{
		{"0.0.0.0/8", "is in the unspecified network 0.0.0.0/8, which is never a source"}, // RFC 6890
		{"127.0.0.0/8", "is a loopback address: it is this machine itself"},
		{"::1/128", "is the loopback address: it is this machine itself"},
		{"169.254.0.0/16", "is a link-local address, valid on one link only"}, // RFC 3927
		{"fe80::/10", "is a link-local address, valid on one link only"},      // RFC 4291
		{"224.0.0.0/4", "is a multicast address, which is never a source"},    // RFC 5771
		{"ff00::/8", "is a multicast address, which is never a source"},
		{"255.255.255.255/32", "is the broadcast address, which is never a source"},
	} {
		n := netip.MustParsePrefix(r.network)
		if n.Bits() <= p.Bits() && n.Contains(p.Addr()) {
			return r.why
		}
	}
	return ""
}

// TemporaryHint returns a warning if a client's address looks like a temporary one of IPv6
// (RFC 8981), and "" otherwise. Its host part is random: no group of it is small, and it is
// not made from a MAC address (ff:fe in the middle).
func TemporaryHint(p netip.Prefix) string {
	b := p.Addr().As16()
	if !p.Addr().Is6() || !p.IsSingleIP() || b[11] == 0xff && b[12] == 0xfe || b[8] == 0 || b[10] == 0 || b[12] == 0 || b[14] == 0 {
		return ""
	}
	return fmt.Sprintf("client %s: may be a temporary address, which changes within days; if so, allow its network: %s",
		FormatPrefix(p), netip.PrefixFrom(p.Addr(), 64).Masked())
}
