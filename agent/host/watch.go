package host

import (
	"context"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Watch calls tell when an interface, an address or a default route changes in this
// network namespace, until the context ends. After an error, tell is never called.
func Watch(ctx context.Context, tell func()) error {
	groups := []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE}
	if err := system.Multicast(ctx, unix.NETLINK_ROUTE, groups, ofZones, tell); err != nil {
		return fmt.Errorf("watching network interfaces: %w", err)
	}
	return nil
}

// ofZones reports whether a message is about anything except a non-default route: some machines
// change thousands of those. The length of the destination is the second byte (struct rtmsg).
func ofZones(m syscall.NetlinkMessage) bool {
	route := m.Header.Type == unix.RTM_NEWROUTE || m.Header.Type == unix.RTM_DELROUTE
	return !route || len(m.Data) < 2 || m.Data[1] == 0
}
