package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// States of a machine, as status says them.
const (
	Protected       = "protected"
	Drifted         = "drifted"          // not as decided, and not wide open
	Unprotected     = "unprotected"      // something is open that should not be
	FailsafeState   = "failsafe"         // closed, but not by what was decided
	PendingState    = "pending"          // new rules stand, and go unless they are confirmed
	Unlocked        = "unlocked"         // somebody is let in for a while, as unlock has it
	NotBootstrapped = "not-bootstrapped" // nothing was decided yet
)

// Probation is the mode of SSH while it is pinned to a client that was detected
// and is not confirmed. The others are firewall's, and Unlocked.
const Probation = "probation"

// StatusSchema is the version of Status as JSON. Keys are added under the same
// number; one that goes or changes its meaning takes the next.
const StatusSchema = 1

// Status is how the machine stands, and why.
type Status struct {
	Schema       int                  `json:"schema"`
	Version      string               `json:"version"`
	State        string               `json:"state"`
	Profile      store.Choice         `json:"profile"`
	Backend      BackendStatus        `json:"backend"`
	SSH          SSHStatus            `json:"ssh"`
	Interfaces   []firewall.Interface `json:"interfaces"`
	Open         []OpenStatus         `json:"open"`
	Listening    []ListeningStatus    `json:"listening"`
	Bypass       []firewall.Bypass    `json:"bypass"`
	Families     FamiliesStatus       `json:"families"`
	Drift        []firewall.Drift     `json:"drift"`
	Foreign      []firewall.Foreign   `json:"foreign"`
	Persisted    []PersistedFile      `json:"persisted"`
	Service      ServiceStatus        `json:"service"`
	LastVerified *time.Time           `json:"last_verified"`
	Conntrack    ConntrackUse         `json:"conntrack"`
	Pending      *PendingStatus       `json:"pending"` // what waits for a confirmation
	Unlock       *UnlockStatus        `json:"unlock"`  // who is let in for a while
	Conflicts    []string             `json:"conflicts"`
	Warnings     []string             `json:"warnings"`
	Next         []string             `json:"next"` // commands to run, most useful first

	// TakenBack says which change was taken back, and why.
	TakenBack string `json:"taken_back,omitempty"`
	// Unrepaired says what the service does not repair for a while, because
	// others undo it.
	Unrepaired []string `json:"unrepaired,omitempty"`
	// Why says in a sentence what follows from the state, where it is not
	// protected.
	Why string `json:"why,omitempty"`

	found string // as Report has it
}

// BackendStatus is what loads the rules.
type BackendStatus struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

// SSHStatus is who may log in.
type SSHStatus struct {
	Ports     []uint16   `json:"ports"`
	Mode      string     `json:"mode"`
	Allow     []string   `json:"allow"`
	Source    string     `json:"source"`
	Reason    string     `json:"reason"`
	ConfirmBy *time.Time `json:"confirm_by"`
	// Limit is for each source where the mode is limited: "30/min", or "" for
	// none.
	Limit string   `json:"limit,omitempty"`
	Seen  []string `json:"seen,omitempty"`
	// Timed are those of Allow that end, each with when.
	Timed []TimedSource `json:"timed,omitempty"`
	// You is the address that asks, where it asks over SSH; YouMay whether it
	// could log in again, and YouWhy why.
	You    string `json:"you,omitempty"`
	YouMay bool   `json:"you_may,omitempty"`
	YouWhy string `json:"you_why,omitempty"`
}

// TimedSource is a network that may log in for a while.
type TimedSource struct {
	From  string    `json:"from"`
	Until time.Time `json:"until"`
}

// OpenStatus is a service that may be reached.
type OpenStatus struct {
	Name   string   `json:"name"`
	Proto  string   `json:"proto"`
	Ports  string   `json:"ports"`
	Zone   string   `json:"zone"`
	From   []string `json:"from"`
	Source string   `json:"source"`
	// Until is when it ends, if it does.
	Until *time.Time `json:"until,omitempty"`
}

// ListeningStatus is a listening socket, and whether peers can reach it.
type ListeningStatus struct {
	Proto     string `json:"proto"`
	Port      uint16 `json:"port"`
	Process   string `json:"process"`
	Reachable bool   `json:"reachable"`
	// OpenWith is the command that opens it, where it is not reachable.
	OpenWith string `json:"open_with"`
}

// PendingStatus is a change that waits for a confirmation.
type PendingStatus struct {
	Until time.Time `json:"until"`
}

// UnlockStatus is who is let in for a while, besides what was decided.
type UnlockStatus struct {
	From  []string  `json:"from"` // empty is anywhere
	Until time.Time `json:"until"`
	All   bool      `json:"all"` // to everything, not only over SSH
}

// FamiliesStatus is how each family stands: protected, drifted, unprotected,
// or disabled where the kernel has none.
type FamiliesStatus struct {
	IPv4 string `json:"ipv4"`
	IPv6 string `json:"ipv6"`
}

// Status tells how the machine stands.
func (a *Agent) Status(ctx context.Context, facts Facts) (Status, error) {
	s := Status{Schema: StatusSchema, Version: a.Version}
	report, err := a.Verify(ctx, facts.Ports)
	switch {
	case errors.Is(err, store.ErrNone):
		err = a.notBootstrapped(ctx, &s, &report)
	case err != nil:
		if _, e := a.Store.Load(); e != nil {
			s.State = Drifted
			s.Why = "what was decided cannot be read: " + e.Error()
			s.Drift = append(s.Drift, firewall.Drift{Chain: store.Dir + "/state.json", Kind: firewall.Altered, Want: "the state", Got: e.Error()})
			s.Next = append(s.Next, "basicfw-agent bootstrap")
			report.Persisted, report.Service, err = nil, ServiceStatus{}, nil
		}
	}
	if err != nil {
		return s, err
	}
	s.found = report.found(facts.Interfaces)
	st := report.State
	if p := report.Pending; p != nil { // it is what the kernel has
		s.Pending = &PendingStatus{Until: p.Window.Until}
		st = p.State
		st.LastVerified = report.State.LastVerified
	}
	st = st.At(a.Moment()) // the kernel has ended the rest
	s.Profile, s.Persisted, s.Service = st.Profile, report.Persisted, report.Service
	s.Drift = append(s.Drift, report.Drift...)
	s.Foreign = report.Inspection.Foreign
	s.Bypass = bypasses(facts.Interfaces, report.Inspection.Bypass, facts.Forwarded)
	others, err := a.Managers.Find(report.Inspection.Managers)
	if err != nil {
		s.Warnings = append(s.Warnings, fmt.Sprintf("other firewalls may be here: %v", err))
	}
	for _, m := range others {
		if m.Active {
			s.Conflicts = append(s.Conflicts, m.Name)
		}
	}
	s.Backend = BackendStatus{Name: st.Backend.Name, Reason: st.Backend.Reason}
	s.Backend.Reason = strings.Trim(report.Inspection.Backend+"; "+st.Backend.Reason, "; ")
	s.Conntrack = facts.Conntrack
	s.TakenBack = st.TakenBack
	note := a.loadNote()
	if note.Verified.After(st.LastVerified) && s.State != NotBootstrapped {
		st.LastVerified = note.Verified
	}
	if len(report.Drift) > 0 {
		s.fights(note)
	}
	if !st.LastVerified.IsZero() {
		s.LastVerified = &st.LastVerified
	}
	s.Interfaces = facts.Interfaces
	s.ssh(st, facts)
	s.unlock(st)
	s.Open = OpenOf(st.Desired)
	s.listening(st, facts, a.reach(st, report.Inspection))
	a.judge(&s, report)
	s.beside(others, facts)
	s.warn(st, facts, report)
	s.fill()
	return s, nil
}

func (a *Agent) notBootstrapped(ctx context.Context, s *Status, r *Report) error {
	s.State = NotBootstrapped
	s.Why = "this machine was not closed by basicfw-agent yet"
	s.Families = FamiliesStatus{Unprotected, Unprotected}
	s.Next = append(s.Next, "basicfw-agent bootstrap")
	_, in, err := a.find(ctx)
	if err != nil {
		s.Warnings = append(s.Warnings, err.Error())
		return nil
	}
	in.Drift = nil
	r.Inspection = in
	if in.Present {
		s.Why = "rules of basicfw-agent stand, but what was decided is lost"
		s.Warnings = append(s.Warnings, "rules of basicfw-agent are loaded, but "+store.Dir+"/state.json is not there")
	}
	return nil
}

// judge finds the state of a machine that was bootstrapped.
func (a *Agent) judge(s *Status, r Report) {
	if s.State == NotBootstrapped {
		return
	}
	for _, f := range firewall.Families {
		state := Protected
		for _, d := range r.Drift {
			if d.Family == f.String() {
				state = Drifted
			}
		}
		for _, o := range r.Inspection.Open {
			if o.Family == f {
				state = Unprotected
			}
		}
		if !slices.Contains(a.Families, f) {
			state = "disabled"
		}
		if f == firewall.IPv4 {
			s.Families.IPv4 = state
		} else {
			s.Families.IPv6 = state
		}
	}
	for _, o := range slices.Concat(r.Inspection.Open, r.Inspection.Shut) {
		if o.Next != "" {
			s.Next = append(s.Next, o.Next)
		}
	}
	for _, o := range r.Inspection.Shut {
		if o.Next != "" { // no repair ends it
			s.Warnings = append(s.Warnings, o.Family.String()+": "+o.Why)
		}
	}
	open, shut := sentence(r.Inspection.Open), sentence(r.Inspection.Shut)
	switch {
	case s.State != "": // the state cannot be read
	case open != "":
		s.State, s.Why = Unprotected, open
	case len(r.Drift) > 0:
		s.State, s.Why = Drifted, shut
		if shut == "" {
			s.Why = fmt.Sprintf("%d differences from what was decided, the first: %v", len(r.Drift), r.Drift[0])
			if len(r.Drift) == 1 {
				s.Why = r.Drift[0].String()
			}
		}
	case s.Pending != nil:
		s.State = PendingState
	case s.Unlock != nil:
		s.State = Unlocked
	case r.State.Failsafe != "":
		s.State = FailsafeState
		s.Why = failsafeWhy(r.State)
		s.Next = append(s.Next, "basicfw-agent bootstrap")
	default:
		s.State = Protected
	}
	if len(r.Drift) > 0 {
		s.Next = append([]string{"basicfw-agent verify --repair"}, s.Next...)
	}
}

func failsafeWhy(st store.State) string { return "closed, but not by your settings: " + st.Failsafe }

// sentence is the first finding as one, or "".
func sentence(findings []firewall.Finding) string {
	if len(findings) == 0 {
		return ""
	}
	return findings[0].Family.String() + ": " + findings[0].Why
}

// SSHOf says who may log in by what was decided.
func SSHOf(st store.State) SSHStatus {
	ssh := st.Desired.SSH
	s := SSHStatus{Ports: ssh.Ports, Mode: string(ssh.Mode), Source: st.Client.Source, Reason: st.Client.Why()}
	if ssh.Mode == firewall.SSHPinned && st.Client.Source == "none" { // so it was not the client
		s.Source, s.Reason = "settings", st.WhyAllowed(first(ssh.Allow), time.Time{})
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
		s.Timed = append(s.Timed, TimedSource{firewall.FormatPrefix(t.From), t.Until})
	}
	return s
}

func (s *Status) ssh(st store.State, facts Facts) {
	ssh := st.Desired.SSH
	s.SSH = SSHOf(st)
	s.SSH.Seen = firewall.FormatPrefixes(facts.Seen)
	if facts.Session == nil || ssh.Mode == "" {
		return
	}
	s.SSH.You = facts.Session.From.String()
	by, may := ssh.AllowedBy(facts.Session.From)
	s.SSH.YouMay = may || ssh.Mode == firewall.SSHLimited
	switch {
	case may:
		s.SSH.YouWhy = st.WhyAllowed(by.From, by.Until)
		if !by.From.IsSingleIP() {
			s.SSH.YouWhy = "as a part of " + by.From.String() + ", " + s.SSH.YouWhy
		}
		if !by.Until.IsZero() {
			s.SSH.YouWhy = "until " + firewall.FormatTime(by.Until) + ", " + s.SSH.YouWhy
		}
	case s.SSH.YouMay:
		s.SSH.YouWhy = "as any address may"
	case len(s.SSH.Allow) == 0:
		s.SSH.YouWhy = "nobody may"
	default:
		s.SSH.YouWhy = "only " + strings.Join(s.SSH.Allow, ", ") + " may"
	}
	if u := st.Desired.Unlock; u != nil && !s.SSH.YouMay {
		s.SSH.YouWhy += "; unlocked until " + firewall.FormatTime(u.Until)
	}
}

// opens gives the command that opens what a listener waits for: where another
// profile has all that this one has, and this too, the least of those.
func opens(l Listener, now firewall.Profile, others []firewall.Profile) string {
	var best *firewall.Profile
	for i, p := range others {
		has := func(s firewall.Service) bool {
			return slices.ContainsFunc(p.Services, func(o firewall.Service) bool { return o.String() == s.String() })
		}
		wants := func(s firewall.Service) bool { return s.Proto == l.Proto && s.Ports == firewall.Port(l.Port) }
		lacks := func(s firewall.Service) bool { return !has(s) }
		if slices.ContainsFunc(p.Services, wants) && !slices.ContainsFunc(now.Services, lacks) && (best == nil || len(p.Services) < len(best.Services)) {
			best = &others[i]
		}
	}
	if best != nil && best.Name != now.Name {
		return "basicfw-agent bootstrap --profile " + best.Name
	}
	return fmt.Sprintf("basicfw-agent open %d/%s", l.Port, l.Proto)
}

func (s *Status) fights(n watchNote) {
	for _, p := range n.Pauses {
		s.Unrepaired = append(s.Unrepaired, p.String())
	}
}

func (s *Status) unlock(st store.State) {
	u := st.Desired.Unlock
	if u == nil {
		return
	}
	s.Unlock = &UnlockStatus{From: firewall.FormatPrefixes(u.From), Until: u.Until, All: u.All}
	s.SSH.Mode = "unlocked"
}

func first(list []netip.Prefix) netip.Prefix {
	if len(list) == 0 {
		return netip.Prefix{}
	}
	return list[0]
}

// OpenOf gives what is open by what was decided: what the owner opened first,
// then the profile's.
func OpenOf(d firewall.Desired) []OpenStatus {
	services := d.Services()
	own := len(services) - len(d.Open)
	var list []OpenStatus
	for _, o := range append(services[own:], services[:own]...) {
		open := OpenStatus{Name: o.Name, Proto: string(o.Proto), Ports: o.Ports.String(), Zone: o.On,
			From: firewall.FormatPrefixes(o.From), Source: o.Source}
		if !o.Until.IsZero() {
			open.Until = &o.Until
		}
		list = append(list, open)
	}
	return list
}

// reach gives what tells whether somebody outside may reach a port, over any
// family: by what is in the kernel where that is known to differ from what was
// decided in this, else by what was decided.
func (a *Agent) reach(st store.State, in firewall.Inspection) func(firewall.Proto, uint16) bool {
	return func(proto firewall.Proto, port uint16) bool {
		of := func(list []firewall.Finding, f firewall.Family) bool {
			return slices.ContainsFunc(list, func(o firewall.Finding) bool { return o.Family == f })
		}
		for _, f := range a.Families {
			switch {
			case of(in.Open, f):
				return true
			case of(in.Shut, f):
			case st.Desired.Reachable(proto, port), st.Desired.Unlock != nil && st.Desired.Unlock.All:
				return true
			}
		}
		return slices.ContainsFunc(in.Foreign, func(f firewall.Foreign) bool { return f.Reaches(proto, port) })
	}
}

func (s *Status) listening(st store.State, facts Facts, reach func(firewall.Proto, uint16) bool) {
	// What is forwarded is reached whatever INPUT says, though a proxy may
	// listen on the port here, such as Docker's.
	forwarded := func(l Listener) bool {
		return slices.ContainsFunc(s.Bypass, func(b firewall.Bypass) bool { return b.Covers(l.Proto, l.Port) })
	}
	for _, l := range facts.Listeners {
		ls := ListeningStatus{Proto: string(l.Proto), Port: l.Port, Process: l.Process,
			Reachable: s.State == NotBootstrapped || reach(l.Proto, l.Port) || forwarded(l)}
		if !ls.Reachable {
			ls.OpenWith = opens(l, st.Desired.Profile, facts.Profiles)
		}
		s.Listening = append(s.Listening, ls)
	}
}

// beside says what follows from other managers.
func (s *Status) beside(others []firewall.Manager, facts Facts) {
	for _, m := range others {
		text := m.Name + " is active too: its rules decide, and it may flush ours"
		if !m.Active {
			text = m.Name + " is not active, but starts at the next boot"
		}
		next := "basicfw-agent apply"
		if s.State == NotBootstrapped {
			next = "basicfw-agent bootstrap"
		}
		if !facts.TakeOver {
			next = "systemctl disable --now " + m.Name
		}
		s.Warnings = append(s.Warnings, text+": "+next)
		if !slices.Contains(s.Next, next) { // first: what else is done may be undone
			s.Next = append([]string{next}, s.Next...)
		}
	}
}

func (s *Status) warn(st store.State, facts Facts, r Report) {
	warn := func(format string, args ...any) { s.Warnings = append(s.Warnings, fmt.Sprintf(format, args...)) }
	s.Warnings = append(append(s.Warnings, r.Warnings...), r.Inspection.Warnings...)
	if len(s.Bypass) > 0 {
		warn("%s", whereToClose(s.Bypass))
	}
	for _, c := range facts.Closing {
		warn("chain %s of nftables closes ports too: a port has to be open there as well", c)
	}
	if s.State == NotBootstrapped {
		return
	}
	for _, u := range s.Unrepaired {
		warn("%s", u)
	}
	ssh := st.Desired.SSH
	who := "YOUR-ADDRESS"
	if s.SSH.You != "" {
		who = "me"
	}
	if s.openToAnyone() {
		warn("SSH is open to any address: %s", st.Client.Why())
		s.Next = append(s.Next, "basicfw-agent ssh allow "+who)
	}
	if p := ssh.Probation; p != nil {
		warn("SSH opens to any address at %s, unless somebody logs in anew from %s", firewall.FormatTime(p.Until), strings.Join(firewall.FormatPrefixes(st.Client.Allow), " or "))
		if s.SSH.You == "" || s.SSH.YouMay {
			s.Next = append(s.Next, "basicfw-agent confirm")
		}
	}
	switch {
	case ssh.Mode == firewall.SSHPinned && len(s.SSH.Allow) == 0:
		warn("SSH is for nobody: only the console is a way in")
		s.Next = append(s.Next, "basicfw-agent ssh allow "+who)
	case ssh.Mode == firewall.SSHPinned:
		for _, f := range ssh.Nobodys() {
			warn("SSH over %v is for nobody: no address of that family is known", f)
		}
		if s.SSH.You != "" && !s.SSH.YouMay {
			warn("you come from %s, which may not log in again", s.SSH.You)
			s.Next = append(s.Next, "basicfw-agent ssh allow "+who)
		}
	}
	if s.Pending != nil {
		s.Next = append([]string{"basicfw-agent confirm"}, s.Next...)
	}
	if st.TakenBack != "" {
		warn("%s", st.TakenBack)
		s.Next = append(s.Next, "basicfw-agent plan")
	}
	if s.Unlock != nil { // behind "ssh allow", for who is in by this alone
		s.Next = append(s.Next, "basicfw-agent lock")
	}
	for _, o := range st.Desired.Services() {
		if len(st.Desired.InterfacesOf(o.On)) == 0 {
			warn("%s is open on %s interfaces, and there is none", o.Name, o.On)
		}
	}
	if c := facts.Conntrack; c.Max > 0 && c.Count > c.Max*8/10 {
		warn("the kernel's table of connections is nearly full: %d of %d", c.Count, c.Max)
	}
	if st.Version != "" && st.Version != s.Version {
		warn("the rules are those that version %s made; \"basicfw-agent plan\" shows what this one would change", st.Version)
	}
	s.Warnings = append(s.Warnings, facts.Surprises...)
}

// addresses finds what may be an address in a text.
var addresses = regexp.MustCompile(`[0-9A-Fa-f]*[.:][0-9A-Fa-f.:]+`)

// withoutAddresses is a text in which nobody's address can be read.
func withoutAddresses(text string) string {
	return addresses.ReplaceAllStringFunc(text, func(word string) string {
		if _, err := netip.ParseAddr(strings.TrimRight(word, ".:")); err != nil {
			return word
		}
		return "ADDRESS"
	})
}

// redact takes out the addresses of clients, wherever a sentence or a rule may
// have them. The host's own stay.
func (s *Status) redact() {
	hide := func(texts ...*string) {
		for _, t := range texts {
			*t = withoutAddresses(*t)
		}
	}
	if s.Unlock != nil {
		s.Unlock.From = []string{}
	}
	s.SSH.Allow, s.SSH.Timed, s.SSH.Seen, s.SSH.You, s.SSH.YouWhy = []string{}, nil, nil, "", ""
	for i := range s.Open {
		s.Open[i].From = []string{}
	}
	hide(&s.Why, &s.SSH.Reason, &s.Profile.Reason)
	for i := range s.Drift {
		hide(&s.Drift[i].Want, &s.Drift[i].Got)
	}
	for i := range s.Foreign {
		hide(&s.Foreign[i].Rule)
	}
	for _, list := range [][]string{s.Warnings, s.Next} {
		for i := range list {
			hide(&list[i])
		}
	}
}

// fill makes empty lists of absent ones, so that JSON has no null for them.
func (s *Status) fill() {
	empty(&s.Interfaces)
	empty(&s.Open)
	empty(&s.Listening)
	empty(&s.Bypass)
	empty(&s.Drift)
	empty(&s.Foreign)
	empty(&s.Persisted)
	empty(&s.Conflicts)
	empty(&s.Warnings)
	empty(&s.Next)
	empty(&s.SSH.Ports)
	empty(&s.SSH.Allow)
	for i := range s.Interfaces {
		empty(&s.Interfaces[i].Addresses)
	}
	if s.SSH.Mode == "" && s.State == NotBootstrapped {
		s.SSH.Mode = "unlocked"
	}
}

func empty[T any](list *[]T) {
	if *list == nil {
		*list = []T{}
	}
}

// ExitCode is what status exits with: 0 protected, 4 not bootstrapped, else 3.
func (s Status) ExitCode() int {
	switch s.State {
	case Protected:
		return 0
	case NotBootstrapped:
		return 4
	}
	return 3
}
