package settings

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Assertion is an entry of [test]: packets from a source that must reach ports, or must not.
type Assertion struct {
	Allow bool
	From  netip.Prefix // invalid is any source
	Proto firewall.Proto
	Ports firewall.PortRange
}

// String returns the assertion as in the settings, with its key.
func (a Assertion) String() string {
	from := "any"
	if a.From.IsValid() {
		from = firewall.FormatPrefix(a.From)
	}
	return fmt.Sprintf("%s = %s -> %s", map[bool]string{true: "allow", false: "deny"}[a.Allow], from, firewall.FormatPorts(a.Ports, a.Proto))
}

// setTests replaces the assertions of a key.
func (s *Settings) setTests(allow bool, value string) error {
	var list []Assertion
	for _, text := range strings.Split(value, ",") {
		a, err := parseAssertion(text)
		if err != nil {
			return err
		}
		a.Allow = allow
		list = append(list, a)
	}
	others := slices.DeleteFunc(slices.Clone(s.Tests), func(a Assertion) bool { return a.Allow == allow })
	s.Tests = append(others, list...)
	return nil
}

func parseAssertion(text string) (a Assertion, err error) {
	from, to, ok := strings.Cut(text, "->")
	if from = strings.TrimSpace(from); !ok || from == "" {
		return a, fmt.Errorf("%s: want SOURCE -> PORT/PROTO, such as 203.0.113.9 -> 22/tcp or any -> 5432/tcp", firewall.Quote(strings.TrimSpace(text)))
	}
	if from != "any" {
		if a.From, err = firewall.ParseSource(from); err != nil {
			return a, err
		}
	}
	a.Ports, a.Proto, err = firewall.ParsePorts(strings.TrimSpace(to))
	return a, err
}
