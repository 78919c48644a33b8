package nftables

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Render returns the ruleset of some families as a file for nft -f, in the format that
// "nft list table inet basicfw" prints from version 1.0 on. However, the times at which
// a rule begins or expires, which nft prints in local time, are in seconds since 1970.
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
			fmt.Fprintf(&b, "\t\tsize %d\n\t\tflags dynamic,timeout\n\t\ttimeout %s\n", s.size, firewall.FormatDuration(time.Duration(s.timeout)*time.Millisecond))
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
		switch {
		case ch.name == forwardChain:
			b.WriteString("\t\t" + forwardHook + "\n")
		case ch.hook != nil:
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

// Files writes the file with the persisted rules.
type Files struct{}

const fileHeader = `# The firewall of this machine, written by basicfw-agent, which puts back what is
# changed here: "basicfw-agent open", "ssh allow" and /etc/basicfw/agent.ini change
# it. The agent loads it by itself; "nft -f" loads this file without the agent.
table inet ` + TableName + `
delete table inet ` + TableName + `
`

// Persisted returns the file of a ruleset, with which nft -f replaces the table.
func (Files) Persisted(r firewall.Ruleset, families []firewall.Family) []byte {
	return []byte(fileHeader + Render(r, families))
}
