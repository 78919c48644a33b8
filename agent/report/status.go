package report

import (
	"time"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/service"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/verify"
)

// Conditions of a machine. Several may hold at the same time.
const (
	NotBootstrapped = "not-bootstrapped" // there is no desired state yet
	Unprotected     = "unprotected"      // ports are open that should be closed
	Failsafe        = "failsafe"         // the failsafe rules are loaded instead of the configured ones
	Unlocked        = "unlocked"         // more is open until a time
	Drifted         = "drifted"          // something differs from the desired state
	Exposed         = "exposed"          // other rules open a port that the settings do not
	Blocked         = "blocked"          // other rules drop all packets of a service that the settings open
	Pending         = "pending"          // a change rolls back unless it is confirmed
	Protected       = "protected"        // none of the others applies
)

// Conditions lists all conditions. The first that holds is the state.
var Conditions = []string{NotBootstrapped, Unprotected, Failsafe, Unlocked, Drifted, Exposed, Blocked, Pending, Protected}

const (
	// Probation is the mode of SSH while it is restricted to a detected client that is
	// not confirmed. The other modes are Unlocked and those of package firewall.
	Probation = "probation"
	// Disabled is the status of a family that the kernel does not support. Otherwise it
	// is Protected, Drifted or Unprotected.
	Disabled = "disabled"
	// Schema is the version of Status as JSON. It is incremented if a key is removed or
	// changes its meaning, not if one is added.
	Schema = 2
)

// Status is the status of the machine.
type Status struct {
	Schema  int    `json:"schema"`
	Version string `json:"version"`
	// State is the first of Conditions, which lists all that hold.
	State        string                   `json:"state"`
	Conditions   []string                 `json:"conditions"`
	Profile      store.Choice             `json:"profile"`
	Backend      BackendStatus            `json:"backend"`
	SSH          SSHStatus                `json:"ssh"`
	Interfaces   []firewall.Interface     `json:"interfaces"`
	Open         []OpenStatus             `json:"open"`
	Listening    []ListeningStatus        `json:"listening"`
	Forwarded    []firewall.ForwardedPort `json:"forwarded"`
	Exposure     []exposure.Entry         `json:"exposure"` // who reaches which ports, over the rules of all programs
	Families     FamiliesStatus           `json:"families"`
	Drift        []firewall.Drift         `json:"drift"`
	Foreign      []firewall.Foreign       `json:"foreign"`
	Persisted    []verify.PersistedFile   `json:"persisted"`
	Service      service.Status           `json:"service"`
	LastVerified *time.Time               `json:"last_verified"`
	Conntrack    host.Conntrack           `json:"conntrack"`
	Pending      *PendingStatus           `json:"pending"` // the pending change
	Unlock       *UnlockStatus            `json:"unlock"`  // the unlock in effect
	Conflicts    []string                 `json:"conflicts"`
	Warnings     []Warning                `json:"warnings"`
	Next         []string                 `json:"next"` // commands to run, most useful first

	RolledBack   string        `json:"rolled_back,omitempty"`   // which change was rolled back, and why
	RepairPaused []string      `json:"repair_paused,omitempty"` // parts whose repairs fail or do not last
	Block        []BlockStatus `json:"block,omitempty"`         // the lists of blocked networks
	Why          string        `json:"why,omitempty"`           // an explanation of State, if it needs one

	publicNext       []string // Next as all users may read it
	exposed, blocked int      // how many ports other programs' rules open or block
}

// BackendStatus is the backend that loads the rules.
type BackendStatus struct {
	Name   string `json:"name"`
	Reason string `json:"reason"`
}

// SSHStatus is who may log in over SSH.
type SSHStatus struct {
	Ports     []uint16   `json:"ports"`
	Mode      string     `json:"mode"`
	Allow     []string   `json:"allow"`
	Source    string     `json:"source"`
	Reason    string     `json:"reason"`
	ConfirmBy *time.Time `json:"confirm_by"`
	// Limit is the rate limit per source: "30/min", or "" for none or if mode is pinned.
	Limit string `json:"limit,omitempty"`
	// ActiveSessions are the client addresses of users who may become root.
	ActiveSessions []string          `json:"active_sessions,omitempty"`
	Temporary      []TemporarySource `json:"temporary,omitempty"` // the entries of Allow that expire; they are its last
	Caller         *CallerStatus     `json:"caller,omitempty"`    // if the command runs in an SSH session
}

// TemporarySource is a network that may log in until a time.
type TemporarySource struct {
	From  string    `json:"from"`
	Until time.Time `json:"until"`
}

// CallerStatus is the SSH client of the caller, and whether it could log in again.
type CallerStatus struct {
	Address string `json:"address"`
	Allowed bool   `json:"allowed"`
	Reason  string `json:"reason"`
}

// OpenStatus is a service that is open.
type OpenStatus struct {
	Name   string     `json:"name"`
	Proto  string     `json:"proto"`
	Ports  string     `json:"ports"` // "" if the protocol has none
	Zone   string     `json:"zone"`
	From   []string   `json:"from"`
	Limit  string     `json:"limit,omitempty"` // of new connections per source, if there is one
	Source string     `json:"source"`
	Via    string     `json:"via,omitempty"`   // "ipsec" if only connections by IPsec are accepted
	Until  *time.Time `json:"until,omitempty"` // when it expires, if it does
}

// BlockStatus is a list of blocked networks.
type BlockStatus struct {
	Name     string     `json:"name"`
	Networks int        `json:"networks"`
	Source   string     `json:"source"`
	Until    *time.Time `json:"until,omitempty"` // when it expires, if it does
}

// blockStatus returns the lists, without the networks.
func blockStatus(blocks []firewall.Block) (out []BlockStatus) {
	for _, b := range blocks {
		s := BlockStatus{Name: b.Name, Networks: len(b.Networks), Source: b.Source}
		if !b.Until.IsZero() {
			s.Until = &b.Until
		}
		out = append(out, s)
	}
	return out
}

// ListeningStatus is a listening socket.
type ListeningStatus struct {
	Proto   string `json:"proto"`
	Port    uint16 `json:"port"`
	Process string `json:"process"`
	// Reachable is whether peers can reach it; nil if that is unknown, because the
	// desired state cannot be read.
	Reachable *bool `json:"reachable"`
	// OpenCommand opens it if it is not reachable. It is empty if the settings already
	// open it and something else blocks it.
	OpenCommand string `json:"open_command"`
}

// PendingStatus is a change that must be confirmed.
type PendingStatus struct {
	Until time.Time `json:"until"`
}

// UnlockStatus is what an unlock opens.
type UnlockStatus struct {
	From  []string  `json:"from"` // empty is any address
	Until time.Time `json:"until"`
	All   bool      `json:"all"` // to every port, not only over SSH
}

// FamiliesStatus is the status of each family.
type FamiliesStatus struct {
	IPv4 string `json:"ipv4"`
	IPv6 string `json:"ipv6"`
}

// fill replaces nil lists with empty ones, so that JSON has no null for them.
func (s *Status) fill() {
	empty(&s.Interfaces)
	empty(&s.Open)
	empty(&s.Listening)
	empty(&s.Forwarded)
	empty(&s.Exposure)
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
}

func empty[T any](list *[]T) {
	if *list == nil {
		*list = []T{}
	}
}

// ExitCode returns the exit code of the command status: 0 if protected, 4 if not
// bootstrapped, otherwise 3.
func (s Status) ExitCode() int {
	switch s.State {
	case Protected:
		return 0
	case NotBootstrapped:
		return 4
	}
	return 3
}

// Redacted returns s as all users may read it: states, numbers, times, and names that this
// program or the administrator chose. What may contain a client's address is omitted:
// sources, and all text that comes from elsewhere, such as rules, reasons, errors, and the
// names of processes and of other programs' chains. The host's own addresses remain.
func (s Status) Redacted() Status {
	out := Status{
		Schema: s.Schema, Version: s.Version, State: s.State, Conditions: s.Conditions,
		Profile:  store.Choice{Name: s.Profile.Name},
		Backend:  BackendStatus{Name: s.Backend.Name},
		SSH:      SSHStatus{Ports: s.SSH.Ports, Mode: s.SSH.Mode, Source: s.SSH.Source, ConfirmBy: s.SSH.ConfirmBy, Limit: s.SSH.Limit},
		Families: s.Families, Persisted: s.Persisted, Service: s.Service, LastVerified: s.LastVerified,
		Conntrack: s.Conntrack, Pending: s.Pending, Conflicts: s.Conflicts, Next: s.publicNext, RolledBack: s.RolledBack,
	}
	for _, b := range s.Block {
		b.Source = ""
		out.Block = append(out.Block, b)
	}
	for _, i := range s.Interfaces {
		i.Reason = ""
		out.Interfaces = append(out.Interfaces, i)
	}
	for _, o := range s.Open {
		out.Open = append(out.Open, OpenStatus{Name: o.Name, Proto: o.Proto, Ports: o.Ports, Zone: o.Zone, From: []string{}, Limit: o.Limit, Via: o.Via, Until: o.Until})
	}
	for _, l := range s.Listening {
		l.Process = ""
		out.Listening = append(out.Listening, l)
	}
	for _, f := range s.Forwarded {
		out.Forwarded = append(out.Forwarded, firewall.ForwardedPort{Family: f.Family, Proto: f.Proto, Port: f.Port, Program: f.Program, Local: f.Local, Held: f.Held, Closed: f.Closed})
	}
	for _, d := range s.Drift {
		out.Drift = append(out.Drift, firewall.Drift{Family: d.Family, Kind: d.Kind})
	}
	for _, f := range s.Foreign {
		out.Foreign = append(out.Foreign, firewall.Foreign{Family: f.Family, Chain: f.Chain, Effect: f.Effect})
	}
	if u := s.Unlock; u != nil {
		out.Unlock = &UnlockStatus{From: []string{}, Until: u.Until, All: u.All}
	}
	for _, w := range s.Warnings {
		out.Warnings = append(out.Warnings, w.public())
	}
	out.fill()
	return out
}
