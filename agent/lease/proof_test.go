package lease

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// TestProofIsANewSessionFromTheClient checks that a session proves the client if it comes from its
// address and began after the rules were loaded.
func TestProofIsANewSessionFromTheClient(t *testing.T) {
	reboot := now
	reboot.Boot, reboot.Uptime = "c", 10*time.Hour
	for _, tt := range []struct {
		name    string
		session *host.Session
		at      firewall.Moment
		by      string // "" is refused
		wrong   string
	}{
		{"the console", nil, now, "console", ""},
		{"a new session", from("203.0.113.9", 30*time.Second), now, "session from there", ""},
		{"one as old as the rules", from("203.0.113.9", time.Minute), now, "", "older than the rules"},
		{"an old session", from("203.0.113.9", 2*time.Minute), now, "", "older than the rules"},
		{"an unknown age", from("203.0.113.9", 0), now, "", "older than the rules"},
		{"from elsewhere", from("198.51.100.7", 30*time.Second), now, "", "your address 198.51.100.7 is not the detected client, 203.0.113.9"},
		{"after a reboot", from("203.0.113.9", 2*time.Minute), reboot, "session from there", ""},
	} {
		by, err := ProveClient(tt.session, leased(t, none, running, none).State, tt.at, false)
		if (err == nil) != (tt.by != "") || !strings.Contains(by, tt.by) || err != nil && !strings.Contains(err.Error(), tt.wrong) {
			t.Errorf("%s: %q, %v", tt.name, by, err)
		}
	}
}

// TestForceNeedsNoProof checks that force confirms everything that is pending.
func TestForceNeedsNoProof(t *testing.T) {
	old := from("203.0.113.9", 2*time.Minute)
	if by, err := ProveClient(old, leased(t, none, running, none).State, now, true); err != nil || by != "confirm --force" {
		t.Errorf("a client: %q, %v", by, err)
	}
	if _, err := ProveClient(old, leased(t, none, none, none).State, now, true); !errors.Is(err, ErrNothingPending) {
		t.Errorf("no client to confirm: %v", err)
	}
	if err := Prove(old, store.Pending{State: state(t, "198.51.100.7/32"), Window: window(running, pendingLength)}, true); err != nil {
		t.Errorf("a change: %v", err)
	}
}

// TestProofOfAChangeIsANewSessionThatMayLogIn checks that a session proves a change if it began after
// the change and could log in by its rules.
func TestProofOfAChangeIsANewSessionThatMayLogIn(t *testing.T) {
	limited := state(t, "192.0.2.1/32")
	limited.Desired.SSH.Mode = firewall.SSHLimited
	for _, tt := range []struct {
		name    string
		session *host.Session
		next    store.State
		wrong   string // "" is proved
	}{
		{"the console", nil, state(t, "198.51.100.7/32"), ""},
		{"new and allowed", from("198.51.100.7", 30*time.Second), state(t, "198.51.100.7/32"), ""},
		{"old and allowed", from("198.51.100.7", 2*time.Minute), state(t, "198.51.100.7/32"), "older than the change"},
		{"new and refused", from("198.51.100.8", 30*time.Second), state(t, "198.51.100.7/32"), "could not log in by the new rules"},
		{"any address is allowed", from("198.51.100.8", 30*time.Second), limited, ""},
	} {
		err := Prove(tt.session, store.Pending{State: tt.next, Window: window(running, pendingLength)}, false)
		if (err == nil) != (tt.wrong == "") || err != nil && !strings.Contains(err.Error(), tt.wrong) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestLockoutIsOfASessionThatCouldNotReturn(t *testing.T) {
	limited := state(t, "192.0.2.1/32")
	limited.Desired.SSH.Mode = firewall.SSHLimited
	timed := state(t, "192.0.2.1/32")
	timed.Desired.SSH.Timed = []firewall.TimedSource{{From: limited.Client.Allow[0], Until: now.Time.Add(time.Hour)}}
	for _, tt := range []struct {
		name    string
		session *host.Session
		st      store.State
		locked  bool
	}{
		{"the console", nil, state(t, "192.0.2.1/32"), false},
		{"allowed", from("192.0.2.1", time.Hour), state(t, "192.0.2.1/32"), false},
		{"not allowed", from("192.0.2.2", time.Hour), state(t, "192.0.2.1/32"), true},
		{"any address is allowed", from("192.0.2.2", time.Hour), limited, false},
		{"allowed for a time", from("192.0.2.1", time.Hour), timed, false},
	} {
		if got := Lockout(tt.session, tt.st); (got != nil) != tt.locked || got != nil && got.From != tt.session.Addr {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

// TestRefuse checks which lockouts refuse a change.
func TestRefuse(t *testing.T) {
	st := state(t, "203.0.113.9/32")
	via := func(local string, tunnel ...host.Listener) *host.Session {
		s := from("203.0.113.9", 0)
		s.Local = netip.MustParseAddrPort(local)
		if len(tunnel) > 0 {
			s.Tunnel = &host.Tunnel{Interface: "wg0", Ports: tunnel}
		}
		return s
	}
	open := st
	open.Desired.Open = []firewall.Service{{Name: "x", Proto: firewall.TCP, Ports: firewall.Port(2222)}, {Name: "vpn", Proto: firewall.UDP, Ports: firewall.Port(51820)}}
	wireguard, stranger := host.Listener{Proto: firewall.UDP, Port: 51820}, from("198.51.100.7", 0)
	for _, tt := range []struct {
		name      string
		session   *host.Session
		next      store.State
		previous  *store.State
		mustClose bool
		err, hint string // "" is not refused
	}{
		{"the console", nil, st, &st, false, "", ""},
		{"an allowed session", via("192.0.2.1:22"), st, &st, false, "", ""},
		{"an address, at the first bootstrap", stranger, st, nil, false, "", ""},
		{"an address", stranger, st, &st, true, "198.51.100.7 could not log in again; nothing was changed", "ssh allow me"},
		{"a port", via("192.0.2.1:2222"), st, nil, true, "port 2222", `add 2222 to "ports" in [ssh]`},
		{"a port that a service opens", via("192.0.2.1:2222"), open, &st, false, "", ""},
		{"a tunnel, at the first bootstrap", via("10.0.0.1:22", wireguard), st, nil, false, "wg0, whose port 51820/udp would be closed", "vpn = 51820/udp"},
		{"a tunnel, and the machine must be closed", via("10.0.0.1:22", wireguard), st, nil, true, "", ""},
		{"a tunnel", via("10.0.0.1:22", wireguard), st, &open, false, "51820/udp would be closed", "basicfw-agent open 51820/udp"},
		{"a tunnel that is closed already", via("10.0.0.1:22", wireguard), st, &st, false, "", ""},
		{"a tunnel with an open port", via("10.0.0.1:22", wireguard), open, &open, false, "", ""},
		{"a tunnel with another open port", via("10.0.0.1:22", host.Listener{Proto: firewall.TCP, Port: 1194}, wireguard), open, &open, false, "", ""},
	} {
		err := Refuse(tt.session, tt.next, tt.previous, tt.mustClose)
		if (err == nil) != (tt.err == "") || err != nil && (!strings.Contains(err.Error(), tt.err) || !strings.Contains(hint.Of(err), tt.hint)) {
			t.Errorf("%s: %v, hint %q", tt.name, err, hint.Of(err))
		}
	}
}
