package nftables

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Render gives the ruleset of some families as a file that nft -f loads, and as
// "nft list table inet basicfw" prints it from version 1.0 on; but the times at
// which a rule begins or ends, which nft prints by the clock on the wall, are in
// seconds since 1970.
func Render(r firewall.Ruleset, families []firewall.Family) string {
	return write(r, families).render()
}

func (c compiled) render() string {
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", c.name)
	blocks := 0
	begin := func(kind, name string) {
		if blocks++; blocks > 1 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "\t%s %s {\n", kind, name)
	}
	for _, s := range c.sets {
		if s.isAnonymous() {
			continue
		}
		begin("set", s.name)
		kind, perLine := "ipv4_addr", 2
		if s.keyLen == 16 {
			kind, perLine = "ipv6_addr", 1
		}
		fmt.Fprintf(&b, "\t\ttype %s\n", kind)
		if s.isDynamic() {
			fmt.Fprintf(&b, "\t\tsize %d\n\t\tflags dynamic,timeout\n\t\ttimeout %s\n", s.size, span(time.Duration(s.timeout)*time.Millisecond))
		} else {
			var lines []string
			for some := range slices.Chunk(s.lines(), perLine) {
				lines = append(lines, strings.Join(some, ", "))
			}
			fmt.Fprintf(&b, "\t\tflags interval\n\t\telements = { %s }\n", strings.Join(lines, ",\n\t\t\t     "))
		}
		b.WriteString("\t}\n")
	}
	for _, ch := range c.chains {
		begin("chain", ch.name)
		if ch.hook != nil {
			b.WriteString("\t\ttype filter hook input priority filter; policy drop;\n")
		}
		for i, r := range c.rules {
			if r.chain == ch.name {
				fmt.Fprintf(&b, "\t\t%s\n", strings.Replace(" "+c.texts[i], " counter ", " counter packets 0 bytes 0 ", 1)[1:])
			}
		}
		b.WriteString("\t}\n")
	}
	b.WriteString("}\n")
	return b.String()
}

// span is a time as nft writes it: "1h", "1m30s".
func span(d time.Duration) string {
	var b strings.Builder
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if n := d / u.unit; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, u.name)
			d -= n * u.unit
		}
	}
	return b.String()
}
