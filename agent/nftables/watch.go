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

// Watch calls tell when something changes in our table, or in the tables "filter"
// of IPv4 and IPv6, where iptables' nft variant keeps its own, until the context
// ends. Of the legacy variant's tables the kernel tells nothing. The error says that nothing
// will be told.
func Watch(ctx context.Context, tell func()) error {
	if err := system.Multicast(ctx, unix.NETLINK_NETFILTER, []int{unix.NFNLGRP_NFTABLES}, counts, tell); err != nil {
		return fmt.Errorf("watching nf_tables: %w", err)
	}
	return nil
}

// counts tells whether a message is about our table and what is in it, or about a
// table "filter", a chain or a rule in one: sets with thousands of addresses that
// come and go are others'. What packets put into a set of ours is not told. A
// message begins with the family (struct nfgenmsg), and the first attribute
// of these kinds is the table's name (linux/netfilter/nf_tables.h).
func counts(m syscall.NetlinkMessage) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES {
		return false
	}
	sets := false
	switch m.Header.Type & 0xff {
	case unix.NFT_MSG_NEWSET, unix.NFT_MSG_DELSET, unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM:
		sets = true
	case unix.NFT_MSG_NEWTABLE, unix.NFT_MSG_DELTABLE, unix.NFT_MSG_NEWCHAIN, unix.NFT_MSG_DELCHAIN, unix.NFT_MSG_NEWRULE, unix.NFT_MSG_DELRULE:
	default:
		return false
	}
	const nfgenmsg, attr = 4, 4
	if len(m.Data) < nfgenmsg+attr {
		return true
	}
	name := "filter"
	switch m.Data[0] {
	case unix.NFPROTO_INET:
		name = TableName
	case unix.NFPROTO_IPV4, unix.NFPROTO_IPV6:
		if sets {
			return false
		}
	default:
		return false
	}
	first := m.Data[nfgenmsg:]
	end := int(binary.NativeEndian.Uint16(first))
	if kind := binary.NativeEndian.Uint16(first[2:]); kind != unix.NFTA_TABLE_NAME || end < attr || end > len(first) {
		return true
	}
	return string(bytes.TrimRight(first[attr:end], "\x00")) == name
}
