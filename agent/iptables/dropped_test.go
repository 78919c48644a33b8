package iptables

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

func TestDropped(t *testing.T) {
	got := dropped(firewall.IPv4, `*mangle
:INPUT DROP [99:5940]
[5:300] -A BASICFW-FORWARD -m comment --comment basicfw-published -j DROP
COMMIT
*filter
:INPUT DROP [7:420]
:BASICFW-INPUT - [0:0]
[9:540] -A INPUT -m comment --comment basicfw-other -j DROP
[0:0] -A BASICFW-INPUT -s 127.0.0.0/8 -m comment --comment basicfw-spoofed-loopback -j DROP
[18446744073709551615:60] -A BASICFW-INPUT -d 127.0.0.0/8 -m comment --comment "basicfw-spoofed-loopback" -j DROP `+`
[3:180] -A BASICFW-INPUT -m comment --comment basicfw-log -j LOG
[4:240] -A BASICFW-INPUT -p tcp -m comment --comment basicfw-ssh -j BASICFW-SSH
[2:120] -A BASICFW-SSH -p tcp -m state --state NEW -m comment --comment basicfw-ssh-drop -j DROP
COMMIT
`)
	want := []firewall.Dropped{{Family: "ipv4", Rule: "published", Packets: 5}, {Family: "ipv4", Rule: "policy", Packets: 7},
		{Family: "ipv4", Rule: "spoofed-loopback"}, {Family: "ipv4", Rule: "spoofed-loopback", Packets: 1<<64 - 1}, {Family: "ipv4", Rule: "ssh-drop", Packets: 2}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}
