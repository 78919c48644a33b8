// Package report computes the status of a machine, as text and as JSON, and the login
// message. It is pure: it uses no files, programs or clock.
package report

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/verify"
)

// Input is everything that a status is computed from.
type Input struct {
	Version  string            // of this program
	Families []firewall.Family // supported by the kernel
	Now      firewall.Moment
	Facts    host.Facts
	// Err is why there is no State: store.ErrNone before bootstrap, else the error of
	// reading it.
	Err error
	// Report is the comparison with the desired state. If there is no State, its
	// Inspection holds only findings that do not depend on it.
	verify.Report
	InspectionErr error               // why there is no Inspection, if there is no State either
	Conflicts     []firewall.Conflict // other programs that manage the firewall
	ConflictsErr  error               // why Conflicts is incomplete
	BackupLost    bool                // the backup from before bootstrap is lost
	SettingsErr   error               // why the present settings are invalid
	Live          exposure.Ruleset    // the rules of all programs
	LiveErr       error               // why Live is incomplete; then exposure is unknown
	Alone         exposure.Ruleset    // the rules of the desired state alone
	Verified      time.Time           // when the service last found no drift
	RepairPaused  []string            // one sentence per part whose repair is backing off
}

// state returns the state unless it is missing or unreadable.
func (in Input) state(st store.State) *store.State {
	if in.Err != nil {
		return nil
	}
	return &st
}

// missing reports whether there is no state. The machine is then not bootstrapped.
func (in Input) missing() bool { return errors.Is(in.Err, store.ErrNone) }

// New returns the status computed from in.
func New(in Input) Status {
	st := in.Report.Wanted().At(in.Now)
	situation := Situation(in.Facts, in.Families, in.Live, in.state(st))
	s := Status{
		Schema: Schema, Version: in.Version,
		Profile:    st.Profile,
		Backend:    BackendStatus{st.Backend.Name, strings.Trim(in.Inspection.Backend+", "+st.Backend.Reason, ", ")},
		SSH:        SSHOf(st),
		Interfaces: in.Facts.Interfaces,
		Open:       OpenOf(st.Desired),
		Block:      blockStatus(st.Desired.Blocks),
		Families:   in.families(),
		Drift:      slices.Clone(in.Drift), Foreign: in.Inspection.Foreign,
		Persisted: in.Persisted, Service: in.Service,
		LastVerified: in.verified(),
		Conntrack:    in.Facts.Conntrack,
		RolledBack:   st.RolledBack,
	}
	s.SSH.ActiveSessions = firewall.FormatPrefixes(in.Facts.Seen)
	if in.Facts.Session != nil && st.Desired.SSH.Mode != "" {
		s.SSH.Caller = callerOf(in.Facts.Session.Addr, st, s.SSH.Allow)
	}
	if p := in.Pending; p != nil {
		s.Pending = &PendingStatus{p.Window.Until}
	}
	if u := st.Desired.Unlock; u != nil {
		s.Unlock, s.SSH.Mode = &UnlockStatus{firewall.FormatPrefixes(u.From), u.Until, u.All}, Unlocked
	}
	if in.missing() {
		s.SSH.Mode = Unlocked
	}
	if len(in.Drift) > 0 {
		s.RepairPaused = in.RepairPaused
	}
	for _, m := range in.Conflicts {
		if m.Active {
			s.Conflicts = append(s.Conflicts, m.Name)
		}
	}
	var differs exposure.Difference
	if in.LiveErr == nil || len(in.Live.Tables) > 0 {
		exposed := situation.Report()
		s.Exposure, s.Forwarded = exposed.Exposure, situation.Forwarded(exposed)
		if in.Err == nil {
			differs = situation.Compare(in.Alone, Requirements(st.Desired))
		}
	}
	s.exposed, s.blocked = countPorts(lasting(differs.Exposed)), countPorts(differs.Blocked)
	s.Listening = in.listening(st, s)
	s.Conditions, s.Why = in.conditions(st, differs)
	s.State = s.Conditions[0]
	w := in.warnings(st, s, differs)
	in.warnHazards(&w, situation, s)
	s.Warnings, s.Next, s.publicNext = w.sorted()
	s.fill()
	return s
}

// verified returns when a verification last found no drift; nil is never.
func (in Input) verified() *time.Time {
	t := in.State.LastVerified
	if in.Verified.After(t) && !in.missing() {
		t = in.Verified
	}
	if t.IsZero() {
		return nil
	}
	return &t
}

func (in Input) families() FamiliesStatus {
	of := func(f firewall.Family) string {
		switch {
		case in.missing():
			return Unprotected
		case !slices.Contains(in.Families, f):
			return Disabled
		case finding(in.Inspection.Exposed, f):
			return Unprotected
		case in.Err != nil, slices.ContainsFunc(in.Drift, func(d firewall.Drift) bool { return d.Family == f.String() }):
			return Drifted
		}
		return Protected
	}
	return FamiliesStatus{IPv4: of(firewall.IPv4), IPv6: of(firewall.IPv6)}
}

// finding reports whether a list has a finding about a family.
func finding(list []backend.Finding, f firewall.Family) bool {
	return slices.ContainsFunc(list, func(o backend.Finding) bool { return o.Family == f })
}

// conditions returns the conditions that hold, in the order of Conditions, and an
// explanation of the first that has one.
func (in Input) conditions(st store.State, differs exposure.Difference) (hold []string, why string) {
	for _, c := range Conditions {
		if explained, holds := in.condition(c, st, differs); holds || c == Protected && hold == nil {
			hold = append(hold, c)
			if why == "" {
				why = explained
			}
		}
	}
	return hold, why
}

func (in Input) condition(name string, st store.State, differs exposure.Difference) (why string, holds bool) {
	open, shut := in.Inspection.Exposed, in.Inspection.LockedOut
	switch {
	case in.missing():
		why = "no desired state exists on this machine"
		if in.Inspection.Present {
			why = "rules of basicfw-agent are loaded, but the desired state is lost or could not be saved"
		}
		return why, name == NotBootstrapped
	case name == Unprotected && len(open) > 0:
		return open[0].Family.String() + ": " + open[0].Why, true
	case name == Failsafe && st.Failsafe != "":
		return "your settings could not be loaded: " + st.Failsafe, true
	case name == Drifted && in.Err != nil:
		return in.Err.Error(), true
	case name == Drifted && len(in.Drift) > 0 && len(shut) > 0:
		return shut[0].Family.String() + ": " + shut[0].Why, true
	case name == Drifted && len(in.Drift) == 1:
		return in.Drift[0].String(), true
	case name == Drifted && len(in.Drift) > 1:
		return fmt.Sprintf("%d differences from the desired state, the first: %v", len(in.Drift), in.Drift[0]), true
	case name == Exposed || name == Blocked:
		list := map[string][]exposure.Entry{Exposed: lasting(differs.Exposed), Blocked: differs.Blocked}[name]
		if len(list) == 0 {
			return "", false
		}
		return Findings(list)[0], true
	}
	return "", name == Unlocked && st.Desired.Unlock != nil || name == Pending && in.Pending != nil
}

// warnings returns the rows of the table that apply.
func (in Input) warnings(st store.State, s Status, differs exposure.Difference) (w warnings) {
	in.warnState(&w, s)
	in.warnExposure(&w, s, differs)
	in.warnConflicts(&w)
	if !in.missing() {
		in.warnSSH(&w, st, s)
		in.warnRules(&w, st, s)
	}
	if list := s.Bypassing(); len(list) > 0 {
		w.addFix("ports-forwarded", howToClose(list), ForwardedVerdict(list))
	}
	for _, text := range in.Warnings {
		w.add("verify", text)
	}
	for _, text := range in.Inspection.Warnings {
		w.add("backend", text)
	}
	for _, text := range in.Facts.KeptLists {
		w.add("list-kept", text)
	}
	if in.BackupLost {
		w.add("backup-lost")
	}
	if in.SettingsErr != nil {
		// It may already be reported as the cause of the failsafe rules.
		if text, _, _ := strings.Cut(in.SettingsErr.Error(), "\n"); !strings.Contains(st.Failsafe, text) {
			w.add("settings-invalid", text)
		}
	}
	return w
}

// warnState adds the rows of the conditions.
func (in Input) warnState(w *warnings, s Status) {
	for _, c := range s.Conditions {
		switch {
		case c == Drifted && errors.Is(in.Err, store.ErrLost):
			w.add("state-lost")
		case c == Drifted && in.Err != nil:
			w.addFix(NotBootstrapped, bootstrapCommand) // no repair is possible
		case c == Unprotected:
			for _, o := range in.Inspection.Exposed {
				w.addFix(Unprotected, o.Next)
			}
		case c == Failsafe:
			w.addFix(c, in.State.Retry)
		case c != Protected && c != Exposed && c != Blocked:
			w.add(c)
		}
	}
	if in.missing() && in.Inspection.Present {
		w.add("state-missing", store.StateFile)
	}
	if in.InspectionErr != nil {
		w.add("inspection-failed", in.InspectionErr)
	}
}

// warnConflicts adds the rows about other programs that manage the firewall.
func (in Input) warnConflicts(w *warnings) {
	if in.ConflictsErr != nil {
		w.add("conflicts-unknown", in.ConflictsErr)
	}
	for _, m := range in.Conflicts {
		code, fix := "conflict-at-boot", "basicfw-agent apply"
		if m.Active {
			code = "conflict-active"
		}
		switch {
		case !in.Facts.TakeOver:
			fix = "systemctl disable --now " + m.Name
		case in.Err != nil:
			fix = bootstrapCommand
		}
		w.addFix(code, fix, m.Name)
	}
}

// warnSSH adds the rows about who may log in.
func (in Input) warnSSH(w *warnings, st store.State, s Status) {
	ssh, allow := st.Desired.SSH, "basicfw-agent ssh allow "+s.client()
	barred := s.SSH.Caller != nil && !s.SSH.Caller.Allowed
	// Not if the settings open SSH to any address, nor with the failsafe rules: the
	// command to run is then bootstrap, which restricts SSH.
	if s.SSH.Mode == string(firewall.SSHLimited) && s.SSH.Source != "any" && st.Failsafe == "" {
		w.addFix("ssh-open", allow, st.Client.Why())
	}
	if p := ssh.Probation; p != nil {
		fix := confirmCommand
		if barred {
			fix = allow
		}
		w.addFix("ssh-probation", fix, firewall.FormatTime(p.Until))
	}
	switch {
	case ssh.Mode == firewall.SSHPinned && len(s.SSH.Allow) == 0:
		w.addFix("ssh-closed", allow)
	case ssh.Mode == firewall.SSHPinned:
		for _, f := range ssh.BlockedFamilies() {
			fix := ""
			if st.Desired.SSHNeedsIPv4() {
				fix = firewall.SSHOverIPv4
			}
			w.addFix("ssh-family-closed", fix, map[firewall.Family]string{firewall.IPv4: "IPv4", firewall.IPv6: "IPv6"}[f])
		}
		if barred {
			w.addFix("ssh-caller-not-allowed", allow, s.SSH.Caller.Address)
		}
	}
}

// warnRules adds the rows about the rules.
func (in Input) warnRules(w *warnings, st store.State, s Status) {
	for _, o := range in.Inspection.LockedOut {
		if o.Next != "" { // a repair does not help
			w.addFix("input-closed", o.Next, o.Family, o.Why)
		}
	}
	for _, text := range s.RepairPaused {
		w.add("repair-paused", text)
	}
	if st.RolledBack != "" {
		w.add("rolled-back", st.RolledBack)
	}
	if st.Desired.Published == "" && in.Err == nil {
		w.add("ports-left")
	}
	for _, o := range st.Desired.SSHOverlaps() {
		w.addFix("sshd-port", o.Fix(), o.Loss())
	}
	for _, o := range st.Desired.Services() {
		if len(st.Desired.InterfacesOf(o.On)) == 0 {
			w.add("no-interface", firewall.FormatPorts(o.Ports, o.Proto), o.On)
		}
	}
	if st.Named != nil {
		for _, name := range st.Named.Absent(in.Facts.Interfaces) {
			w.add("interface-absent", name)
		}
	}
	for _, i := range st.Desired.Interfaces {
		on := func(o firewall.Service) bool { return o.On == i.Name }
		if i.Master != "" && (slices.Contains(st.Desired.Trusted, i.Name) || slices.ContainsFunc(st.Desired.Services(), on)) {
			w.add("interface-member", i.Name, i.Master)
		}
		if err := firewall.CheckInterfaceName(i.Name, false); err != nil {
			w.add("host", fmt.Sprintf("no rule names this interface: %v", err))
		}
	}
	if c := in.Facts.Conntrack; c.Max > 0 && c.Count > c.Max*8/10 {
		w.add("conntrack-nearly-full", c.Count, c.Max)
	}
	if st.Version != "" && st.Version != in.Version {
		w.add("other-version", st.Version)
	}
	for _, text := range in.Facts.LoginWarnings {
		w.add("host", text)
	}
}
