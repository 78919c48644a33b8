package hostnet

import (
	"context"
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Watch calls tell when an interface, an address or a default route changes in
// this network namespace, until the context ends. The error says that nothing
// will be told.
func Watch(ctx context.Context, tell func()) error {
	groups := []int{unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_IFADDR, unix.RTNLGRP_IPV6_ROUTE}
	if err := system.Multicast(ctx, unix.NETLINK_ROUTE, groups, ofZones, tell); err != nil {
		return fmt.Errorf("watching network interfaces: %w", err)
	}
	return nil
}

// ofZones leaves out routes that are not default ones: on some machines
// thousands of them come and go. The length of the destination is the second
// byte (struct rtmsg).
func ofZones(m syscall.NetlinkMessage) bool {
	switch m.Header.Type {
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		return len(m.Data) < 2 || m.Data[1] == 0
	}
	return true
}
