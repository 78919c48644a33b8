package nftables

import (
	"fmt"
	"slices"

	nft "github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// Closing names the chains of nf_tables, as "inet filter input", that close what
// they do not name: at the hook of input, with the policy drop or a rule that
// turns everything away. A packet has to pass them besides ours. Those that turn
// some away, as bans do, are not among them, nor ours and firewalld's; nor those
// of iptables' nft variant, where there are programs of iptables, which tell more.
func Closing(iptables bool) ([]string, error) {
	conn, err := nft.New(nft.AsLasting())
	if err == nil {
		defer conn.CloseLasting()
		var chains []*nft.Chain
		if chains, err = conn.ListChains(); err == nil {
			return closing(conn, chains, iptables)
		}
	}
	if absent(err) {
		return nil, nil
	}
	return nil, fmt.Errorf("reading what nf_tables closes: %w", err)
}

func closing(conn *nft.Conn, chains []*nft.Chain, iptables bool) ([]string, error) {
	var out []string
	families := map[nft.TableFamily]string{nft.TableFamilyIPv4: "ip", nft.TableFamilyIPv6: "ip6", nft.TableFamilyINet: "inet"}
	var dormant []place
	for _, c := range chains {
		family, ok := families[c.Table.Family]
		if !ok || c.Type != nft.ChainTypeFilter || c.Hooknum == nil || *c.Hooknum != *nft.ChainHookInput ||
			c.Table.Name == GuardTable || c.Table.Name == TableName || c.Table.Name == "firewalld" || iptables && c.Name == "INPUT" && family != "inet" {
			continue
		}
		if dormant == nil {
			var err error
			if dormant, err = dormantTables(conn); err != nil {
				return nil, err
			}
		}
		if slices.Contains(dormant, place{family: c.Table.Family, name: c.Table.Name}) {
			continue
		}
		closes := c.Policy != nil && *c.Policy == nft.ChainPolicyDrop
		if !closes {
			rules, err := conn.GetRules(c.Table, c)
			if err != nil {
				return out, err
			}
			closes = slices.ContainsFunc(rules, turnsAllAway)
		}
		if closes {
			out = append(out, fmt.Sprintf("%s %s %s", family, c.Table.Name, c.Name))
		}
	}
	return out, nil
}

// turnsAllAway tells whether a rule drops or rejects whatever comes.
func turnsAllAway(r *nft.Rule) bool {
	for _, e := range r.Exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Reject:
			return true
		case *expr.Verdict:
			return e.Kind == expr.VerdictDrop
		default:
			return false
		}
	}
	return false
}
