package nftables

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Watch calls tell when something changes in the tables "filter" of IPv4 and
// IPv6, where iptables' nft variant keeps its own, until the context ends. Of the
// legacy variant's tables the kernel tells nothing. The error says that nothing
// will be told.
func Watch(ctx context.Context, tell func()) error {
	if err := system.Multicast(ctx, unix.NETLINK_NETFILTER, []int{unix.NFNLGRP_NFTABLES}, ofFilter, tell); err != nil {
		return fmt.Errorf("watching nf_tables: %w", err)
	}
	return nil
}

// ofFilter tells whether a message is about a table "filter", a chain or a rule
// in one: sets with thousands of addresses that come and go are others'. A
// message begins with the family (struct nfgenmsg), and the first attribute
// of these kinds is the table's name (linux/netfilter/nf_tables.h).
func ofFilter(m syscall.NetlinkMessage) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES {
		return false
	}
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE, unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
	default:
		return false
	}
	const nfgenmsg, attr = 4, 4
	if len(m.Data) < nfgenmsg+attr {
		return true
	}
	if family := m.Data[0]; family != unix.NFPROTO_IPV4 && family != unix.NFPROTO_IPV6 {
		return false
	}
	first := m.Data[nfgenmsg:]
	end := int(binary.NativeEndian.Uint16(first))
	if kind := binary.NativeEndian.Uint16(first[2:]); kind != unix.NFTA_TABLE_NAME || end < attr || end > len(first) {
		return true
	}
	return string(bytes.TrimRight(first[attr:end], "\x00")) == "filter"
}
