package exposure

import (
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// withoutBans returns r without our own rules for blocked sources. A ban closes no port:
// it restricts who reaches any of them.
func (r Ruleset) withoutBans() Ruleset {
	r.Tables = slices.Clone(r.Tables)
	for i, t := range r.Tables {
		for j, c := range t.Chains {
			// In nftables, both families are in one table.
			if c.Name == firewall.BlockChain || t.Name == "basicfw" && c.Hook == "" && strings.HasSuffix(c.Name, "-block") {
				r.Tables[i].Chains = slices.Clone(r.Tables[i].Chains)
				r.Tables[i].Chains[j].Rules = nil
			}
		}
	}
	return r
}
