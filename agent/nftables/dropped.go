package nftables

import (
	"strings"

	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Dropped returns the counters of the rules in our table that drop.
func Dropped() (out []firewall.Dropped, err error) {
	t, _, err := read()
	if err != nil {
		return nil, err
	}
	for _, r := range t.rules {
		n, drops, err := r.dropped()
		if err != nil {
			return nil, err
		}
		comment, ok := userdata.GetString(r.userdata, userdata.TypeComment)
		if !drops || !ok {
			continue
		}
		d := firewall.Dropped{Family: "inet", Rule: strings.TrimPrefix(comment, "basicfw-"), Packets: n}
		for _, f := range firewall.Families {
			if strings.HasPrefix(r.chain, chainName(f, "")) {
				d.Family = f.String()
			}
		}
		if comment == dropComment {
			d.Rule = firewall.Policy
		}
		out = append(out, d)
	}
	return out, nil
}

// dropped returns the counter of a rule and whether the rule drops.
func (r rule) dropped() (packets uint64, drops bool, err error) {
	for _, e := range r.exprs {
		switch e.name {
		case "counter":
			err = each(e.data, func(a attribute) {
				if a.kind == unix.NFTA_COUNTER_PACKETS {
					packets = number(a.data)
				}
			})
		case "immediate":
			drops = verdictName(e) == "drop"
		}
		if err != nil {
			return 0, false, err
		}
	}
	return packets, drops, nil
}
