package report

import (
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// WayIn is the console's hint for a locked-out administrator.
const WayIn = "Locked out? Log in here and run: basicfw-agent unlock"

// Issue returns the text that a console shows before a login: the allowed SSH sources and
// what to do if locked out. It is "" if SSH is open to any address.
func (s Status) Issue() string {
	if s.SSH.Mode != string(firewall.SSHPinned) && s.SSH.Mode != Probation {
		return ""
	}
	who := "blocked for every address"
	if len(s.SSH.Allow) > 0 {
		who = "allowed only from " + strings.Join(s.SSH.Allow, ", ")
	}
	return fmt.Sprintf("basicfw: SSH is %s. %s\n\n", who, WayIn)
}

// Message returns the login message, a line for each thing that needs attention; "" if
// nothing does. All users can read it, so it contains no client address.
func (s Status) Message() string {
	var lines []string
	differs := false
	for _, c := range s.Conditions {
		run := map[string]string{Unprotected: "status", Failsafe: "bootstrap", Unlocked: "lock", Drifted: "status", Exposed: "status", Blocked: "status", Pending: "confirm"}[c]
		if run == "" || differs && c == Drifted {
			continue // already covered by a previous line
		}
		differs = differs || c == Unprotected || c == Failsafe
		lines = append(lines, s.Sentence(c)+". Run: basicfw-agent "+run)
	}
	for _, w := range s.Warnings {
		if text := w.message(); text != "" {
			lines = append(lines, text)
		}
	}
	var b strings.Builder
	for _, l := range lines {
		fmt.Fprintf(&b, "basicfw: %s\n", system.Printable(l))
	}
	return b.String()
}

// Sentence returns the meaning of a condition and when it ends. It contains no address.
func (s Status) Sentence(condition string) string {
	switch condition {
	case Unprotected:
		return "unprotected: ports are open that should be closed"
	case Failsafe:
		return "failsafe: SSH is open to any address, limited; your settings are not loaded"
	case Unlocked:
		return "unlocked: more is open until " + firewall.FormatTime(s.Unlock.Until)
	case Drifted:
		if s.Profile.Name == "" {
			return "drifted: the desired state cannot be read"
		}
		return "drifted: the rules differ from the configuration"
	case Exposed:
		return "exposed: other rules open ports that your settings do not"
	case Blocked:
		return "blocked: other rules drop what your settings allow"
	case Pending:
		return "pending: new rules roll back at " + firewall.FormatTime(s.Pending.Until) + " unless confirmed"
	case NotBootstrapped:
		if slices.ContainsFunc(s.Warnings, func(w Warning) bool { return w.Code == "state-missing" }) {
			return "not bootstrapped: rules are loaded, but the desired state is not saved"
		}
		return "not bootstrapped: basicfw-agent does not filter this machine"
	}
	return "protected: profile " + s.Profile.Name
}
