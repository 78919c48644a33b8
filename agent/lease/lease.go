// Package lease is the state machine of everything that waits or expires: the pending
// change, the probation of a detected client, an unlock and the rescue. It is pure: it uses
// no files and no clock. Temporary settings expire by their rules; lease only computes when.
package lease

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// ErrNothingPending reports that there is nothing to confirm.
var ErrNothingPending = errors.New("no change is pending")

// Lease is the desired state and the pending change that will replace it.
type Lease struct {
	State   store.State
	Pending *store.Pending // nil if there is none
}

// Event is an event that changes a lease: one of the types below.
type Event interface{ event() }

type (
	// Tick reports that time has passed.
	Tick struct{}
	// Try loads State as a pending change, which expires unless [Keep] follows.
	Try struct {
		State  store.State
		Length time.Duration
	}
	// Keep confirms the pending change.
	Keep struct{}
	// Rollback discards the pending change.
	Rollback struct{ Why string }
	// ConfirmClient restricts SSH permanently to the detected client.
	ConfirmClient struct{ By string }
	// Unlock opens SSH for a time; without From, to any address.
	Unlock struct {
		From   []netip.Prefix
		All    bool
		Length time.Duration
	}
	// Lock ends an unlock.
	Lock struct{}
	// Rescue is an unlock at boot, by the kernel parameter Parameter. If Length is zero, it
	// only records Parameter and unlocks nothing.
	Rescue struct {
		Parameter string
		Length    time.Duration
	}
)

func (Tick) event()          {}
func (Try) event()           {}
func (Keep) event()          {}
func (Rollback) event()      {}
func (ConfirmClient) event() {}
func (Unlock) event()        {}
func (Lock) event()          {}
func (Rescue) event()        {}

// Next returns the lease after an event:
//
//	event          pending               probation          unlock
//	Tick           expired: rolled back  expired: SSH open  expired: ends
//	Try            the new change        -                  -
//	Keep           becomes the state, with its own probation and unlock
//	Rollback       rolled back           -                  -
//	ConfirmClient  -                     ends, pinned       -
//	Unlock, Lock   rolled back           -                  begins, ends
//	Rescue         -                     -                  begins
//
// The error is [ErrNothingPending] if there is nothing to confirm.
func (l Lease) Next(e Event, m firewall.Moment) (Lease, error) {
	switch e := e.(type) {
	case Tick:
		if why, over := l.expired(m); over {
			l = l.rolledBack(why)
		}
		l.State = l.State.At(m)
		return l, nil
	case Try:
		l.Pending = &store.Pending{State: e.State, Window: firewall.NewWindow(m, e.Length)}
		return l, firewall.CheckTime(l.Pending.Window.Until)
	case Keep:
		if !l.Waiting(m) {
			return l, ErrNothingPending
		}
		return Lease{State: l.Pending.State}, nil
	case Rollback:
		return l.rolledBack(e.Why), nil
	case ConfirmClient:
		if l.State = l.State.At(m); !Detected(l.State) {
			return l, ErrNothingPending
		}
		st := &l.State
		st.Client.Source = "session"
		st.Client.Reason += "; confirmed by " + e.By
		st.Desired.SSH.Mode, st.Desired.SSH.Probation = firewall.SSHPinned, nil
	case Unlock:
		// The pending change may be what locks the administrator out.
		l = l.rolledBack("the machine was unlocked")
		l.State = l.State.At(m)
		l.State.Desired.Unlock = &firewall.Unlock{From: e.From, All: e.All, Window: firewall.NewWindow(m, e.Length)}
	case Lock:
		l = l.rolledBack("the machine was locked")
		l.State = l.State.At(m)
		l.State.Desired.Unlock = nil
	case Rescue:
		l.State.RescueArgument = e.Parameter
		if e.Length == 0 {
			return l, nil
		}
		l.State.Desired.Unlock = &firewall.Unlock{Window: firewall.NewWindow(m, e.Length)}
	}
	var err error
	l.State.Ruleset, err = firewall.Compile(l.State.Desired)
	return l, err
}

// rolledBack returns l without its pending change and with the reason in its state.
func (l Lease) rolledBack(why string) Lease {
	if l.Pending != nil {
		l.State.RolledBack = fmt.Sprintf("the change of %s was rolled back: %s", l.Pending.Window.Since.Format("2006-01-02 15:04:05 MST"), why)
	}
	l.Pending = nil
	return l
}

// Waiting reports whether a change is pending. A change from another boot is not
// pending: the present boot has loaded the previous state.
func (l Lease) Waiting(m firewall.Moment) bool {
	_, over := l.expired(m)
	return l.Pending != nil && !over
}

// expired reports whether the pending change has expired, and why.
func (l Lease) expired(m firewall.Moment) (why string, over bool) {
	switch p := l.Pending; {
	case p == nil:
		return "", false
	case p.Window.Boot != m.Boot:
		return "the machine was rebooted before it was confirmed", true
	case p.Window.Over(m):
		return "not confirmed within " + firewall.FormatDuration(p.Window.Ends-p.Window.Began), true
	}
	return "", false
}

// Due returns when the next part of a lease expires, by the clock of m; zero is never. While
// a change is pending, nothing else expires.
func (l Lease) Due(m firewall.Moment) time.Time {
	end := l.State.Desired.Ends(m)
	if l.Waiting(m) {
		end = l.Pending.Window.End(m)
	}
	if !end.IsZero() {
		end = end.Add(time.Second) // the last second is included
	}
	return end
}

// Detected reports whether the client was detected and is not yet confirmed.
func Detected(st store.State) bool {
	return st.Desired.SSH.Probation != nil || st.Client.Source == store.Unconfirmed
}

// Proves reports whether an SSH session proves that the detected client is the
// administrator's. It must come from that client and have begun after the rules were loaded.
func Proves(s host.Session, st store.State, m firewall.Moment) bool {
	p := st.Desired.SSH.Probation
	return FromClient(s, st) && (p == nil || p.Boot != m.Boot || s.Began > p.Began)
}

// FromClient reports whether a session comes from the detected client's address.
func FromClient(s host.Session, st store.State) bool {
	return slices.ContainsFunc(st.Client.Allow, func(c netip.Prefix) bool { return c.Contains(s.Addr) })
}

// BeginProbation sets the beginning of a new probation to m, when the rules are loaded: an
// earlier login proves nothing.
func BeginProbation(next store.State, previous *store.State, m firewall.Moment) store.State {
	p := next.Desired.SSH.Probation
	if p == nil || previous != nil && reflect.DeepEqual(previous.Desired.SSH.Probation, p) || m.Boot != p.Boot {
		return next
	}
	later := *p
	later.Began = m.Uptime
	next.Desired.SSH.Probation = &later
	return next
}

// WithoutRule returns st with a probation that the service ends, and true, if st has a
// probation that a rule ends.
func WithoutRule(st store.State) (store.State, bool) {
	p := st.Desired.SSH.Probation
	if p == nil || p.NoRule {
		return st, false
	}
	silent := *p
	silent.NoRule = true
	st.Desired.SSH.Probation = &silent
	var err error
	st.Ruleset, err = firewall.Compile(st.Desired)
	return st, err == nil
}

// ProveClient returns how the caller's session proves that the detected client is the
// administrator's. The error is ErrNothingPending if no client needs confirmation.
func ProveClient(session *host.Session, st store.State, m firewall.Moment, force bool) (by string, err error) {
	switch {
	case !Detected(st) && st.RolledBack != "":
		return "", fmt.Errorf("%w: %s", ErrNothingPending, st.RolledBack)
	case !Detected(st):
		return "", hint.Wrap(ErrNothingPending, "basicfw-agent apply --confirm 5m")
	case force:
		return "confirm --force", nil
	case session == nil:
		return "confirm at the console", nil
	case Proves(*session, st, m):
		return "confirm in a session from there", nil
	case FromClient(*session, st):
		return "", hint.Wrap(errors.New("this session is older than the rules and proves nothing"), newSession)
	}
	return "", hint.Wrap(fmt.Errorf("your address %s is not the detected client, %s", session.Addr, strings.Join(firewall.FormatPrefixes(st.Client.Allow), ", ")),
		"basicfw-agent ssh allow me, or use --force to keep the detected client")
}

// newSession is the hint for a session that proves nothing.
const newSession = "log in with a new session and run basicfw-agent confirm there, or use --force"

// Prove returns an error if the caller's session does not prove that the administrator can
// log in by the new rules. It accepts the console, and any session with force.
func Prove(session *host.Session, p store.Pending, force bool) error {
	if session == nil || force {
		return nil
	}
	if session.Began < p.Window.Began {
		return hint.Wrap(errors.New("this session is older than the change and proves nothing"), newSession)
	}
	ssh := p.State.Desired.SSH
	if _, may := ssh.AllowedBy(session.Addr); !may && ssh.Mode == firewall.SSHPinned {
		return hint.Wrap(fmt.Errorf("your address %s could not log in by the new rules", session.Addr), "let the change roll back, or use --force")
	}
	return nil
}

// LockoutError reports that the caller could not log in again.
type LockoutError struct {
	From netip.Addr // the caller's address
	Port uint16     // the closed port that the session came in by; zero if another cause
	// Tunnel is set if the session came through it, and its ports are closed.
	Tunnel *host.Tunnel
}

func (e *LockoutError) Error() string {
	would := strings.NewReplacer("is not allowed to", "could not", "is closed", "would be closed")
	return would.Replace(e.What()) + "; nothing was changed"
}

// What returns the cause of the lockout.
func (e *LockoutError) What() string {
	if e.Tunnel != nil {
		return fmt.Sprintf("your SSH session came through %s, whose port %s is closed", e.Tunnel.Interface, e.tunnelPort())
	}
	if e.Port != 0 {
		return fmt.Sprintf("your SSH session came in by port %d, which the settings close", e.Port)
	}
	return fmt.Sprintf("your address %s is not allowed to log in again", e.From)
}

// Fix returns what to do so that the caller can log in.
func (e *LockoutError) Fix() string {
	if e.Tunnel != nil {
		return "basicfw-agent open " + e.tunnelPort()
	}
	if e.Port != 0 {
		return fmt.Sprintf("add %d to \"ports\" in [ssh]", e.Port)
	}
	return "basicfw-agent ssh allow me"
}

// tunnelPort returns the tunnel's port, such as "51820/udp".
func (e *LockoutError) tunnelPort() string {
	last := e.Tunnel.Ports[len(e.Tunnel.Ports)-1] // UDP comes after TCP
	return fmt.Sprintf("%d/%s", last.Port, last.Proto)
}

// Lockout returns an error if a state would lock out the caller. session may be nil.
func Lockout(session *host.Session, st store.State) *LockoutError {
	if session == nil {
		return nil
	}
	if _, may := st.Desired.SSH.AllowedBy(session.Addr); !may && st.Desired.SSH.Mode == firewall.SSHPinned {
		return &LockoutError{From: session.Addr}
	}
	if port := session.Local.Port(); port != 0 && !opens(st.Desired, firewall.TCP, port) {
		return &LockoutError{From: session.Addr, Port: port}
	}
	if t := session.Tunnel; t != nil && !slices.ContainsFunc(t.Ports, func(l host.Listener) bool { return opens(st.Desired, l.Proto, l.Port) }) {
		return &LockoutError{From: session.Addr, Tunnel: t}
	}
	return nil
}

// opens reports whether a desired state opens a port to at least some sources.
func opens(d firewall.Desired, proto firewall.Proto, port uint16) bool {
	return proto == firewall.TCP && slices.Contains(d.SSH.Ports, port) ||
		slices.ContainsFunc(d.Services(), func(s firewall.Service) bool { return s.Proto == proto && s.Ports.Contains(port) })
}

// Refuse returns an error, with a hint, if a change must not be made because it would lock
// out the caller. Without a previous state, the client is named, and the caller may be a
// provisioning system: its address does not count. Neither does a tunnel whose port was
// closed before. If the machine must be closed in any case, a tunnel does not count.
func Refuse(session *host.Session, next store.State, previous *store.State, mustClose bool) error {
	e := Lockout(session, next)
	switch {
	case e == nil, e.Tunnel != nil && mustClose, e.Tunnel == nil && e.Port == 0 && previous == nil:
		return nil
	case e.Tunnel != nil && previous == nil:
		return hint.Wrap(e, "add vpn = %s to [open] in /etc/basicfw/agent.ini (once bootstrapped: %s), or use --force", e.tunnelPort(), e.Fix())
	case e.Tunnel != nil:
		if before := Lockout(session, *previous); before != nil && before.Tunnel != nil {
			return nil
		}
	}
	return hint.Wrap(e, "%s, or use --force", e.Fix())
}

// The two ways to unlock a machine without logging in: a kernel parameter, entered at
// the boot loader's prompt, and a file, created from a rescue system. Each may
// contain a duration and works only once.
const (
	RescueFile      = "/etc/basicfw/unlock"
	rescueParameter = "basicfw.unlock"
	rescueLength    = 15 * time.Minute
)

// RescueParameter returns our parameter from the kernel command line, or "".
func RescueParameter(commandLine string) string {
	for _, word := range strings.Fields(commandLine) {
		if name, _, _ := strings.Cut(word, "="); name == rescueParameter {
			return word
		}
	}
	return ""
}

// RescueLength returns the duration of an unlock from the text of the file or the
// kernel parameter. The default is 15 minutes. It is also returned with an error,
// because a typing mistake must not keep the administrator locked out.
func RescueLength(text string) (time.Duration, error) {
	text = strings.TrimSpace(strings.TrimPrefix(strings.TrimPrefix(text, rescueParameter), "="))
	if text == "" {
		return rescueLength, nil
	}
	length, err := firewall.ParseDuration(text)
	if err != nil {
		return rescueLength, err
	}
	return length, nil
}
