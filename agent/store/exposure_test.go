package store_test

import (
	"net/netip"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

func TestOrigin(t *testing.T) {
	net := netip.MustParsePrefix("203.0.113.0/24")
	st := store.State{Client: store.Client{Reason: "the session"}, Allowed: []store.Allowed{{From: net, Reason: "allow in local.ini", Source: "local.ini:5"}},
		Desired: firewall.Desired{Open: []firewall.Service{{Name: "http", Source: "local.ini:3"}}, SSH: firewall.SSH{Allow: []netip.Prefix{net}}}}
	for _, tt := range []struct{ name, from, want string }{
		{"http", "192.0.2.1", "local.ini:3"}, {"ssh", "203.0.113.9", "local.ini:5"}, {"ssh", "192.0.2.1", ""},
		{"ssh-limit", "192.0.2.1", "the session"}, {"loopback", "192.0.2.1", ""},
	} {
		if got := st.Origin(tt.name, netip.MustParseAddr(tt.from)); got != tt.want {
			t.Errorf("%s from %s: %q, want %q", tt.name, tt.from, got, tt.want)
		}
	}
}
