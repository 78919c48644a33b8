// Package store keeps what the agent has decided and what was there before it:
// state.json, the backup, and the lock that lets one change be made at a time.
package store

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Where things are.
const (
	Dir       = "/var/lib/basicfw"
	StateFile = Dir + "/state.json"
	backupDir = Dir + "/backup"
	original  = backupDir + "/original.json"
	// PendingFile is the change that waits for a confirmation.
	PendingFile = Dir + "/pending.json"
	RunDir      = "/run/basicfw-agent"
	lockFile    = RunDir + "/lock"
)

// Schema is the version of state.json that this program writes. A file of a
// later one is not read: it may mean what this program does not know. Schema 1
// knew no rule that ends.
const Schema = 2

// State is everything that was decided, and why.
type State struct {
	Schema     int    `json:"schema"`
	Version    string `json:"version"` // of the program that wrote it
	InstanceID string `json:"instance_id,omitempty"`

	Profile Choice `json:"profile"`
	Backend Choice `json:"backend"`
	Client  Client `json:"client"`
	// Allowed says of each network of Desired.SSH where it comes from. A state of
	// version 0.1 has none: all were the client's.
	Allowed []Allowed `json:"allowed,omitempty"`
	// SSHFixed is set where the settings name sshd's ports.
	SSHFixed bool `json:"ssh_fixed,omitempty"`
	// SSHPorts says where each port of Desired.SSH.Ports comes from.
	SSHPorts []string `json:"ssh_ports,omitempty"`

	Desired firewall.Desired `json:"desired"`
	Ruleset firewall.Ruleset `json:"ruleset"` // Desired, compiled, as it was loaded

	// Failsafe says why the failsafe ruleset stands in place of what the
	// settings say; empty where it does not.
	Failsafe string `json:"failsafe,omitempty"`
	// TakenBack says which change was taken back, and why, since this was decided.
	TakenBack string `json:"taken_back,omitempty"`
	// RescueArgument is the kernel's argument that has unlocked the machine, so
	// that it does so once, until a boot without it.
	RescueArgument string `json:"rescue_argument,omitempty"`
	// Service is set where the service was registered.
	Service bool `json:"service"`

	Bootstrapped time.Time `json:"bootstrapped"`
	LastVerified time.Time `json:"last_verified"`
}

// Pending is a change whose rules are loaded, and which is not decided yet: the
// state is what comes back when nobody confirms it in time.
type Pending struct {
	Schema int             `json:"schema"`
	State  State           `json:"state"`
	Window firewall.Window `json:"window"`
}

// Choice is something that was chosen among several, and why.
type Choice struct {
	Name   string `json:"name"`
	Source string `json:"source"` // "flag", "/etc/basicfw/agent.ini:3", "detected"
	Reason string `json:"reason"`
}

// Client is who may log in over SSH, and how that is known.
type Client struct {
	Allow  []netip.Prefix `json:"allow,omitempty"`
	Source string         `json:"source"` // "named", "session", Unconfirmed, "none", "any", "settings", "clone"
	Reason string         `json:"reason"`
}

// Why says how it is known who may log in, and what became of that.
func (c Client) Why() string {
	if c.Source == Unconfirmed {
		return c.Reason + ", but no new login from there came in time"
	}
	return c.Reason
}

// Unconfirmed is the source of a client that was detected and has not shown in
// time that it is the owner's.
const Unconfirmed = "unconfirmed"

// Allowed is a network that may log in over SSH.
type Allowed struct {
	From   netip.Prefix `json:"from"`
	Until  time.Time    `json:"until,omitzero"` // zero is always
	Reason string       `json:"reason"`
}

// At gives the state without what has ended by a moment.
func (st State) At(m firewall.Moment) State {
	unlocked, probation := st.Desired.Unlock != nil, st.Desired.SSH.Probation
	st.Desired, st.Ruleset = st.Desired.At(m), st.Ruleset.At(m.Time)
	if unlocked && st.Desired.Unlock == nil { // maybe not by the clock
		st.Ruleset = st.Ruleset.Locked()
	}
	if probation != nil && st.Desired.SSH.Probation == nil {
		st.Ruleset = st.Ruleset.Begun()
		st.Client.Source = Unconfirmed
	}
	var left []Allowed
	for _, a := range st.Allowed {
		if a.Until.IsZero() || slices.Contains(st.Desired.SSH.Timed, firewall.TimedSource{From: a.From, Until: a.Until}) {
			left = append(left, a)
		}
	}
	st.Allowed = left
	return st
}

// WhyAllowed says why a network may log in until a time.
func (st State) WhyAllowed(from netip.Prefix, until time.Time) string {
	for _, a := range st.Allowed {
		if a.From == from && a.Until.Equal(until) {
			return a.Reason
		}
	}
	return st.Client.Why()
}

// Original is what bootstrap changed, as it was.
type Original struct {
	Rules firewall.Before `json:"rules"`
	Files []File          `json:"files"`
	// Dirs are directories that were not there.
	Dirs []string `json:"dirs,omitempty"`
	// Conntrack is the size of the kernel's table of connections.
	Conntrack Conntrack `json:"conntrack"`
	// Managers are other programs that managed the firewall, and were stopped.
	Managers []firewall.ManagerBefore `json:"managers,omitempty"`
}

// Conntrack is a size of the kernel's table of connections. Zero is unknown.
type Conntrack struct {
	Max     int `json:"max"`     // connections
	Buckets int `json:"buckets"` // hash buckets
}

// File is a file as it was. Data is its contents, so that the record is whole
// in one write; for a symbolic link those of what it led to.
type File struct {
	Path    string      `json:"path"`
	Existed bool        `json:"existed"`
	Mode    fs.FileMode `json:"mode,omitempty"`
	Data    []byte      `json:"data,omitempty"`
	Link    string      `json:"link,omitempty"` // where a symbolic link led to
}

// File gives what is recorded of a path, or nil.
func (o Original) File(path string) *File {
	for i := range o.Files {
		if o.Files[i].Path == path {
			return &o.Files[i]
		}
	}
	return nil
}

// Store keeps State and Original below /var/lib/basicfw.
type Store struct{ sys *system.System }

// New gives the store of a machine.
func New(sys *system.System) *Store { return &Store{sys} }

// ErrNone says that there is no state: the machine was not bootstrapped.
var ErrNone = errors.New("not bootstrapped")

// maxState bounds what is read. A state with five hundred sources is 200 KB.
const maxState = 16 << 20

// Load reads the state. The error is ErrNone where there is none; any other
// means that there is one and it cannot be used.
func (s *Store) Load() (State, error) {
	var st State
	if err := s.read(StateFile, &st); err != nil {
		return State{}, err
	}
	switch {
	case st.Schema > Schema:
		return State{}, fmt.Errorf("%s is of a newer version of basicfw-agent, %s, which can read it", StateFile, system.Printable(st.Version))
	case st.Schema < 1:
		return State{}, fmt.Errorf("%s has no schema that is known: %d", StateFile, st.Schema)
	}
	if err := st.Ruleset.Check(); err != nil {
		return State{}, fmt.Errorf("%s: %w", StateFile, err)
	}
	return st, nil
}

// Save writes the state.
func (s *Store) Save(st State) error {
	st.Schema = Schema
	return s.write(StateFile, st)
}

// LoadOriginal reads what was there before bootstrap; ErrNone where nothing is
// recorded.
func (s *Store) LoadOriginal() (Original, error) {
	var o Original
	err := s.read(original, &o)
	if err == nil && len(o.Files) == 0 {
		err = fmt.Errorf("%s is no record: it names no file", original)
	}
	if err != nil && !errors.Is(err, ErrNone) {
		err = fmt.Errorf("%w: move it away to go on without it", err)
	}
	return o, err
}

// SaveOriginal records what was there before bootstrap.
func (s *Store) SaveOriginal(o Original) error {
	if err := s.sys.MkdirAll(backupDir, 0o700); err != nil {
		return err
	}
	return s.write(original, o)
}

// LoadPending reads the change that waits for a confirmation; ErrNone where
// none does.
func (s *Store) LoadPending() (Pending, error) {
	var p Pending
	if err := s.read(PendingFile, &p); err != nil {
		return Pending{}, err
	}
	if p.Schema != Schema {
		return Pending{}, fmt.Errorf("%s has a schema that is not known here: %d", PendingFile, p.Schema)
	}
	if err := p.State.Ruleset.Check(); err != nil {
		return Pending{}, fmt.Errorf("%s: %w", PendingFile, err)
	}
	return p, nil
}

// SavePending notes a change that waits.
func (s *Store) SavePending(p Pending) error {
	p.Schema = Schema
	return s.write(PendingFile, p)
}

// RemovePending takes the note away.
func (s *Store) RemovePending() error { return s.sys.Remove(PendingFile) }

// Forget removes the state; with everything, also the record of what was there
// before.
func (s *Store) Forget(everything bool) error {
	if everything {
		return s.sys.RemoveAll(Dir)
	}
	return s.sys.Remove(StateFile)
}

// SetAside keeps a state that cannot be read beside the one that replaces it.
func (s *Store) SetAside() error {
	data, err := s.sys.ReadLimited(StateFile, maxState)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return s.sys.WriteFile(StateFile+".broken", data, 0o600)
}

// read reads a file that only root may have written.
func (s *Store) read(path string, into any) error {
	fi, err := s.sys.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return ErrNone
	}
	if err != nil {
		return err
	}
	if err := system.CheckOwner(fi); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	data, err := s.sys.ReadLimited(path, maxState)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	return nil
}

func (s *Store) write(path string, v any) error {
	if err := s.sys.MkdirAll(Dir, 0o700); err != nil {
		return err
	}
	data, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		return err
	}
	return s.sys.WriteFile(path, append(data, '\n'), 0o600)
}
