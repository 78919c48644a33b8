package report

import (
	"net/netip"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// SSHOf returns who may log in according to a state.
func SSHOf(st store.State) SSHStatus {
	ssh := st.Desired.SSH
	s := SSHStatus{Ports: ssh.Ports, Mode: string(ssh.Mode), Source: st.Client.Source, Reason: st.Client.Why()}
	if ssh.Mode == firewall.SSHPinned && st.Client.Source == "none" { // SSH is restricted by the settings, not to a client
		var first netip.Prefix
		if len(ssh.Allow) > 0 {
			first = ssh.Allow[0]
		}
		s.Source, s.Reason = "settings", st.WhyAllowed(first, time.Time{})
	}
	if p := ssh.Probation; p != nil {
		s.Mode, s.ConfirmBy = Probation, &p.Until
	}
	if l := ssh.Limit; s.Mode != string(firewall.SSHPinned) && !l.IsZero() {
		s.Limit = l.String()
	}
	s.Allow = firewall.FormatPrefixes(ssh.Allow)
	for _, t := range ssh.Timed {
		s.Allow = append(s.Allow, firewall.FormatPrefix(t.From))
		s.Temporary = append(s.Temporary, TemporarySource{firewall.FormatPrefix(t.From), t.Until})
	}
	return s
}

// callerOf returns whether the caller could log in again, and why.
func callerOf(addr netip.Addr, st store.State, allow []string) *CallerStatus {
	ssh := st.Desired.SSH
	by, named := ssh.AllowedBy(addr)
	c := CallerStatus{Address: addr.String(), Allowed: named || ssh.Mode == firewall.SSHLimited}
	switch {
	case named:
		c.Reason = st.WhyAllowed(by.From, by.Until)
		if !by.From.IsSingleIP() {
			c.Reason = "part of " + by.From.String() + ", " + c.Reason
		}
		if !by.Until.IsZero() {
			c.Reason = "until " + firewall.FormatTime(by.Until) + ", " + c.Reason
		}
	case c.Allowed:
		c.Reason = "any address is allowed"
	case len(allow) == 0:
		c.Reason = "no address is allowed"
	default:
		c.Reason = "only " + strings.Join(allow, ", ")
	}
	if u := st.Desired.Unlock; u != nil && !c.Allowed {
		c.Reason += "; unlocked until " + firewall.FormatTime(u.Until)
	}
	return &c
}

// client returns the argument of "ssh allow" for the reader of the status.
func (s Status) client() string {
	if s.SSH.Caller != nil {
		return "me"
	}
	return "YOUR-ADDRESS"
}
