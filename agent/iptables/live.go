package iptables

import (
	"context"
	"errors"
	"fmt"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Live returns the rules of all tables of iptables. The program of a table is "iptables"
// if it belongs to the nft variant, otherwise "iptables-legacy", regardless of the name
// of the program in use. Legacy tables are included even if the nft variant is in use.
//
// Tables that the nft variant cannot print are omitted: read them over netlink. If
// there is an error, the tables that could be read are still returned. The error is a
// *MissingError if iptables is not installed.
func (b *Backend) Live(ctx context.Context) ([]exposure.Table, error) {
	snap, err := b.current(ctx)
	var incompatible *IncompatibleError
	if err != nil && !errors.As(err, &incompatible) {
		return nil, err
	}
	t, err := b.tools(ctx, snap)
	if err != nil {
		return nil, err
	}
	var out []exposure.Table
	var errs []error
	add := func(f firewall.Family, program string, text []byte) {
		tables, _, err := exposure.ReadSave(program, firewall.ByFamily(f, "ip", "ip6"), text)
		if err != nil {
			errs = append(errs, fmt.Errorf("reading the %v rules of %s: %w", f, program, err))
		}
		out = append(out, tables...)
	}
	const legacy = "iptables-legacy"
	for _, f := range b.families {
		if !t.nft {
			add(f, legacy, snap[f].text)
			continue
		}
		add(f, "iptables", snap[f].text)
		if len(b.legacyTables(f)) == 0 {
			continue
		}
		res, err := b.run(ctx, system.Command{Name: program(f, "-legacy-save")})
		if err != nil {
			errs = append(errs, fmt.Errorf("reading the %v rules of %s: %w", f, legacy, err))
			continue
		}
		add(f, legacy, res.Stdout)
	}
	return out, inOneLine(errs)
}

// Model returns the live rules of a machine on which a ruleset is the only one.
func Model(r firewall.Ruleset) (out exposure.Ruleset) {
	for _, f := range firewall.Families {
		// It is our own text: every rule of it can be read.
		tables, _, _ := exposure.ReadSave("iptables", firewall.ByFamily(f, "ip", "ip6"), []byte(Render(r, f)))
		out.Tables = append(out.Tables, tables...)
	}
	return out
}
