package nftables

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Leftover is what remains of our rules in the tables filter and mangle of iptables'
// nft variant: chains, and rules that jump to them. iptables cannot remove them from
// a table with rules that it cannot print.
type Leftover struct{ System do }

// do runs a step of a change; see [system.System.Do].
type do interface {
	Do(op, name string, do func() error) error
}

// Exists reports whether anything remains.
func (l Leftover) Exists() (bool, error) {
	_, n, err := leftover(unix.NFPROTO_IPV4)
	if err == nil && n == 0 {
		_, n, err = leftover(unix.NFPROTO_IPV6)
	}
	return n > 0, err
}

// Remove removes the leftover in one transaction per family, and sets the policy of an
// INPUT that jumped to our chains to ACCEPT. Rules of other programs are not touched.
func (l Leftover) Remove() error {
	for _, family := range []byte{unix.NFPROTO_IPV4, unix.NFPROTO_IPV6} {
		requests, n, err := leftover(family)
		if err == nil && n > 0 {
			err = l.System.Do("netlink", "remove chains of iptables", func() error { return commitTo(family, requests) })
		}
		if err != nil {
			return fmt.Errorf("removing our chains from the tables of iptables: %w", err)
		}
	}
	return nil
}

// leftover returns the requests that remove our chains and the jumps to them from a
// family's tables filter and mangle, and the number of these jumps.
func leftover(family byte) (requests []request, n int, err error) {
	s, err := dial()
	if absent(err) {
		return nil, 0, nil
	}
	if err != nil {
		return nil, 0, err
	}
	defer s.close()
	s.family = family
	all, err := liveTables(s)
	if absent(err) || errors.Is(err, unix.ENOENT) {
		return nil, 0, nil
	}
	var last []request
	for _, t := range all {
		if t.name != "filter" && t.name != "mangle" {
			continue
		}
		in := func(kind uint16, chainKind uint16, chain string) []byte {
			return putString(putString(nil, kind, t.name), chainKind, chain)
		}
		for _, c := range t.chains {
			if strings.HasPrefix(c.Name, firewall.ChainPrefix) {
				requests = append(requests, request{unix.NFT_MSG_DELRULE, 0, in(unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, c.Name), "rules of chain " + c.Name})
				last = append(last, request{unix.NFT_MSG_DELCHAIN, 0, in(unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, c.Name), "removal of chain " + c.Name})
				continue
			}
			for _, r := range c.rules {
				if !r.jumpsToUs() {
					continue
				}
				requests = append(requests, request{unix.NFT_MSG_DELRULE, 0,
					put64(in(unix.NFTA_RULE_TABLE, unix.NFTA_RULE_CHAIN, c.Name), unix.NFTA_RULE_HANDLE, r.handle), "removal of a jump in " + c.Name})
				if t.name == "filter" && c.Name == "INPUT" && c.Drop {
					last = append(last, request{unix.NFT_MSG_NEWCHAIN, 0, put32(in(unix.NFTA_CHAIN_TABLE, unix.NFTA_CHAIN_NAME, c.Name), unix.NFTA_CHAIN_POLICY, nfAccept), "policy of INPUT"})
				}
			}
		}
	}
	requests = append(requests, last...)
	return requests, len(requests), err
}

// jumpsToUs reports whether a rule jumps to one of our chains.
func (r rule) jumpsToUs() bool {
	for _, e := range r.exprs {
		if e.name == "immediate" && bytes.Contains(e.data, []byte(firewall.ChainPrefix)) {
			return true
		}
	}
	return false
}
