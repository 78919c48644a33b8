package exposure

import (
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Bans reports whether a chain of a table contains our own rules for blocked sources. In
// nftables, both families are in one table.
func Bans(table, chain string) bool {
	return chain == firewall.BlockChain || table == "basicfw" && strings.HasSuffix(chain, "-block") && strings.HasPrefix(chain, "ipv")
}

// withoutBans returns r without our own rules for blocked sources. A ban closes no port:
// it restricts who reaches any of them.
func (r Ruleset) withoutBans() Ruleset {
	r.Tables = slices.Clone(r.Tables)
	for i, t := range r.Tables {
		for j, c := range t.Chains {
			if Bans(t.Name, c.Name) {
				r.Tables[i].Chains = slices.Clone(r.Tables[i].Chains)
				r.Tables[i].Chains[j].Rules = nil
			}
		}
	}
	return r
}
