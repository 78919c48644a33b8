package agent

import (
	"fmt"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// MessageFile is shown at every login (pam_motd(8)). It is there only while
// something needs the owner.
const MessageFile = "/etc/motd.d/basicfw"

// Announce brings the login message up to date after a change that succeeded.
func (a *Agent) Announce(st store.State, facts Facts, in firewall.Inspection) error {
	s := Status{State: Protected, Bypass: in.Bypass}
	if st.Failsafe != "" {
		s.State, s.Why = FailsafeState, failsafeWhy(st)
	}
	s.ssh(st, facts)
	return a.announce(s)
}

func (a *Agent) announce(s Status) error {
	text := s.message()
	if text == "" {
		return a.System.Remove(MessageFile)
	}
	c := Change{Path: MessageFile, Data: []byte(text), Mode: 0o644}
	if same, err := a.same(c); same || err != nil {
		return err
	}
	return a.put(c)
}

// message is what needs the owner, a line each; "" is nothing.
func (s Status) message() string {
	var b strings.Builder
	say := func(format string, args ...any) {
		fmt.Fprintf(&b, "basicfw: %s\n", system.Printable(fmt.Sprintf(format, args...)))
	}
	switch s.State {
	case Drifted, Unprotected, FailsafeState:
		next := "status"
		if s.State == FailsafeState {
			next = "bootstrap"
		}
		say("this machine is not as it was decided: %s. Run: basicfw-agent %s", s.Why, next)
	case NotBootstrapped:
		return ""
	}
	switch {
	case s.openToAnyone():
		say("SSH is open to any address, because nobody is known. Pin it to yours: basicfw-agent ssh allow me")
	case s.SSH.Mode == string(firewall.SSHPinned) && len(s.SSH.Allow) == 0:
		say("SSH is for nobody. Let yourself in again: basicfw-agent ssh allow ADDRESS")
	}
	for _, port := range s.bypassed() {
		say("%s past this firewall. See: basicfw-agent status", port)
	}
	return b.String()
}

// openToAnyone tells whether SSH is open to any address without the owner
// having said so.
func (s Status) openToAnyone() bool {
	return s.SSH.Mode == string(firewall.SSHLimited) && s.SSH.Source != "any"
}

// bypassed names the ports that are forwarded past INPUT, each once.
func (s Status) bypassed() []string {
	var out []string
	for _, b := range s.Bypass {
		line := fmt.Sprintf("%s/%s is forwarded", b.Port, b.Proto)
		if len(out) == 0 || out[len(out)-1] != line {
			out = append(out, line)
		}
	}
	return out
}
