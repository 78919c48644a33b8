package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// MessageFile is shown at every login (pam_motd(8)). It is there only while
// something needs the owner.
const MessageFile = "/etc/motd.d/basicfw"

// IssueFile is shown at the consoles, before the login (agetty(8)).
const IssueFile = "/run/issue.d/basicfw.issue"

// issueLink leads to it: where there is an /etc/issue, agetty looks beside that, and
// not in /run (agetty(8)). Where it looks in both, one name counts once. To the
// service /etc is read-only, so it stays while the file comes and goes.
const issueLink = "/etc/issue.d/basicfw.issue"

// reloadFile is watched by each agetty that waits for a name, and made by it: once
// touched, it shows anew what is said before the login ("agetty --reload").
const reloadFile = "/run/agetty.reload"

// Announce brings the login message up to date after a change that succeeded.
func (a *Agent) Announce(st store.State, facts Facts, in firewall.Inspection) error {
	s := Status{State: Protected, Bypass: bypasses(facts.Interfaces, in.Bypass, facts.Forwarded)}
	if st.Failsafe != "" {
		s.State, s.Why = FailsafeState, failsafeWhy(st)
	}
	s.ssh(st, facts)
	if p, err := a.Pending(); err == nil && p != nil {
		s.State, s.Pending = PendingState, &PendingStatus{Until: p.Window.Until}
	}
	s.TakenBack = st.TakenBack
	if s.unlock(st); s.Pending == nil && s.Unlock != nil {
		s.State = Unlocked
	}
	return errors.Join(a.linkIssue(), a.announce(s))
}

func (a *Agent) linkIssue() error {
	if a.System.Exists(issueLink) {
		return nil
	}
	if dir := filepath.Dir(issueLink); !a.System.Exists(dir) {
		if err := a.System.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return a.System.Symlink(IssueFile, issueLink)
}

func (a *Agent) announce(s Status) error {
	// Every user of the machine can read the one, and only who stands at a
	// console the other: agetty is root.
	_, err := a.show(MessageFile, withoutAddresses(s.message()), 0o644)
	changed, e := a.show(IssueFile, s.issue(), 0o600)
	if changed && e == nil {
		e = a.System.Touch(reloadFile)
	}
	return errors.Join(err, e)
}

// show has a file say a text; with none it is not there.
func (a *Agent) show(path, text string, mode fs.FileMode) (changed bool, err error) {
	if text == "" {
		return a.System.Exists(path), a.System.Remove(path)
	}
	c := Change{Path: path, Data: []byte(text), Mode: mode}
	if same, err := a.same(c); same || err != nil {
		return false, err
	}
	return true, a.put(c)
}

// wayIn is what to type at a console.
const wayIn = "Shut out? Log in here and type: basicfw-agent unlock"

// issue is what a console says before anybody has logged in: who may come in
// over SSH, where that is not everybody, and what to type here when shut out.
func (s Status) issue() string {
	if s.SSH.Mode != string(firewall.SSHPinned) && s.SSH.Mode != Probation {
		return ""
	}
	who := "nobody"
	if len(s.SSH.Allow) > 0 {
		who = strings.Join(s.SSH.Allow, ", ") + " only"
	}
	return fmt.Sprintf("basicfw: SSH is for %s. %s\n\n", who, wayIn)
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
	case PendingState:
		say("new rules go at %s unless they are confirmed. Keep them: basicfw-agent confirm", firewall.FormatTime(s.Pending.Until))
	case Unlocked:
		say("this machine is unlocked until %s. Close it again: basicfw-agent lock", firewall.FormatTime(s.Unlock.Until))
	case NotBootstrapped:
		return ""
	}
	for _, u := range s.Unrepaired {
		say("drift that could not be repaired: %s. See: journalctl -u basicfw-agent", u)
	}
	switch {
	case s.State == FailsafeState: // what pins it cannot be used
	case s.SSH.Mode == Probation:
		say("SSH is for the client that was detected, and opens to any address at %s unless somebody logs in anew from there. Keep it so: basicfw-agent confirm. Or say who: basicfw-agent ssh allow ADDRESS", firewall.FormatTime(*s.SSH.ConfirmBy))
	case s.openToAnyone() && s.SSH.Source == store.Unconfirmed:
		say("SSH is open to any address, because nobody logged in anew from the one that was detected. Pin it to yours: basicfw-agent ssh allow me")
	case s.openToAnyone():
		say("SSH is open to any address, because nobody is known. Pin it to yours: basicfw-agent ssh allow me")
	case s.SSH.Mode == string(firewall.SSHPinned) && len(s.SSH.Allow) == 0:
		say("SSH is for nobody. Let yourself in again: basicfw-agent ssh allow ADDRESS")
	}
	if s.TakenBack != "" {
		say("%s. See: basicfw-agent plan", s.TakenBack)
	}
	if len(s.Bypass) > 0 {
		say("%s past this firewall. See: basicfw-agent status", BypassVerdict(s.Bypass))
	}
	return b.String()
}

// openToAnyone tells whether SSH is open to any address without the owner
// having said so.
func (s Status) openToAnyone() bool {
	return s.SSH.Mode == string(firewall.SSHLimited) && s.SSH.Source != "any"
}
