// Package store keeps the desired state and its copy, the pending change, the backup,
// and the lock that serializes changes.
package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// The files of the store.
const (
	Dir       = "/var/lib/basicfw"
	StateFile = Dir + "/state.json"
	// CopyFile is the copy of StateFile that survives a lost, late or wiped /var.
	// Only these two are ever loaded as a state.
	CopyFile    = "/etc/basicfw/state.json"
	backupDir   = Dir + "/backup"
	original    = backupDir + "/original.json"
	PendingFile = Dir + "/pending.json" // the pending change
	RunDir      = "/run/basicfw-agent"
	lockFile    = RunDir + "/lock"
	// HeldFile is a state that could not be saved. It is in memory and counts until the
	// next boot; see [Store.Hold].
	HeldFile = RunDir + "/state.json"
)

// Schema is the version of state.json that this program writes. Files of a later version
// are not read. Schema 1 had no temporary rules.
const Schema = 2

// State is the desired state, with the source of each decision.
type State struct {
	Schema     int    `json:"schema"`
	Version    string `json:"version"` // of the program that wrote it
	InstanceID string `json:"instance_id,omitempty"`

	Profile Choice `json:"profile"`
	Backend Choice `json:"backend"`
	Client  Client `json:"client"`
	// Allowed is the source of each network of Desired.SSH. A state of version 0.1 has
	// none: all networks were the client's.
	Allowed  []Allowed `json:"allowed,omitempty"`
	SSHFixed bool      `json:"ssh_fixed,omitempty"` // the settings name sshd's ports
	SSHPorts []string  `json:"ssh_ports,omitempty"` // the source of each port of Desired.SSH.Ports

	// Named is the interfaces that the applied settings name, and Zones are the zones that
	// links keep. A state of an earlier version has neither.
	Named *host.Naming `json:"named,omitempty"`
	Zones []host.Kept  `json:"zones,omitempty"`

	Desired firewall.Desired `json:"desired"`
	Ruleset firewall.Ruleset `json:"ruleset"` // the compiled Desired, as it was loaded

	Failsafe string `json:"failsafe,omitempty"` // why the failsafe rules are loaded; empty if they are not
	Retry    string `json:"retry,omitempty"`    // the command to run after Failsafe
	// RolledBack is which change was rolled back since the state was last applied, and why,
	// in words that all users may read.
	RolledBack string `json:"taken_back,omitempty"`
	// RescueArgument is the kernel parameter that has unlocked the machine. It does so
	// only once, until a boot without it.
	RescueArgument string `json:"rescue_argument,omitempty"`
	Service        bool   `json:"service"` // was registered
	Held           bool   `json:"-"`       // it is in HeldFile: the disk has another state or none

	Bootstrapped time.Time `json:"bootstrapped"`
	LastVerified time.Time `json:"last_verified"`
}

// Pending is a change whose rules are loaded but not confirmed. If it is not confirmed
// in time, the rules of the state are restored.
type Pending struct {
	Schema int             `json:"schema"`
	State  State           `json:"state"`
	Window firewall.Window `json:"window"`
}

// Choice is a selected value and the reason for it.
type Choice struct {
	Name   string `json:"name"`
	Source string `json:"source"` // "flag", "/etc/basicfw/agent.ini:3", "detected"
	Reason string `json:"reason"`
}

// Client is who may log in over SSH, and how that was determined.
type Client struct {
	Allow  []netip.Prefix `json:"allow,omitempty"`
	Source string         `json:"source"` // "named", "session", Unconfirmed, "none", "any", "settings", "clone"
	Reason string         `json:"reason"`
}

// Why returns how the client was determined, and whether it was not confirmed.
func (c Client) Why() string {
	if c.Source == Unconfirmed {
		return c.Reason + ", but no new login from there came in time"
	}
	return c.Reason
}

// Unconfirmed is the source of a detected client whose probation ended without a login
// from there.
const Unconfirmed = "unconfirmed"

// Allowed is a network from which SSH is allowed.
type Allowed struct {
	From   netip.Prefix `json:"from"`
	Until  time.Time    `json:"until,omitzero"` // zero: always
	Reason string       `json:"reason"`
	// Source is the file and line of the setting; empty if there is none.
	Source string `json:"source,omitempty"`
}

// BackendDetected reports whether the administrator did not choose the backend.
func (st State) BackendDetected() bool {
	return st.Backend.Source == "detected" || st.Backend.Source == "failsafe"
}

// At returns the state without what has expired at a moment, with the times of this boot by
// the clock as it shows then.
func (st State) At(m firewall.Moment) State {
	st = st.Retimed(m)
	return st.without(st.Desired.At(m))
}

// SameRules reports whether st has the same rules as o. It ignores rules about ports
// of containers, which change independently of the settings.
func (st State) SameRules(o State) bool {
	st.Desired.Direct = o.Desired.Direct
	rules, err := firewall.Compile(st.Desired)
	return err == nil && rules.Equal(o.Ruleset)
}

// Settled is At, but only removes what has certainly expired; see
// [firewall.Desired.Settled].
func (st State) Settled(m firewall.Moment) State {
	st = st.Retimed(m)
	return st.without(st.Desired.Settled(m))
}

// Retimed returns the state with the times of this boot by the clock as it shows at a moment.
// It returns st unchanged unless the clock was set, or the machine was rebooted after that.
func (st State) Retimed(m firewall.Moment) State {
	var moved map[time.Time]time.Time
	st.Desired, moved = st.Desired.Retimed(m)
	st.Ruleset = st.Ruleset.Retimed(moved)
	return st
}

// without returns the state with left, the part of its Desired that has not expired.
func (st State) without(left firewall.Desired) State {
	if st.Desired.SSH.Probation != nil && left.SSH.Probation == nil {
		st.Client.Source = Unconfirmed
	}
	st.Desired, st.Ruleset = left, st.Ruleset.Of(left)
	st.Allowed = slices.DeleteFunc(slices.Clone(st.Allowed), func(a Allowed) bool {
		return !a.Until.IsZero() && !slices.Contains(st.Desired.SSH.Timed, firewall.TimedSource{From: a.From, Until: a.Until})
	})
	return st
}

// Zoned returns the state with the interfaces that were detected, in the zones that the
// applied settings name and that are kept. A state of an earlier version adopts named,
// and the zones of its own interfaces.
func (st State) Zoned(detected []firewall.Interface, named host.Naming) State {
	if st.Named == nil {
		st.Named, st.Zones = &named, host.Remember(st.Desired.Interfaces)
	}
	recorded := st.Desired.Interfaces
	st.Desired.Interfaces, st.Zones = host.Settle(detected, *st.Named, st.Zones)
	host.KeepIPv4(recorded, st.Desired.Interfaces)
	return st
}

// KeepPorts returns sshd's ports and their sources, with those of the state added: all, or
// only those by which SSH sessions came in. The default port is not added to the latter.
func (st State) KeepPorts(now []uint16, why []string, all bool) ([]uint16, []string) {
	if now, why = slices.Clone(now), slices.Clone(why); slices.Equal(why, []string{host.NoSSHD}) && slices.Contains(st.SSHPorts, host.SessionPort) {
		now, why = nil, nil
	}
	for i, p := range st.Desired.SSH.Ports {
		reason := "detected earlier"
		if i < len(st.SSHPorts) {
			reason = st.SSHPorts[i]
		}
		if at, there := slices.BinarySearch(now, p); !there && (all || reason == host.SessionPort) {
			now = slices.Insert(now, at, p)
			why = slices.Insert(why, min(at, len(why)), reason)
		}
	}
	return now, why
}

// WithList returns the state with the list of a file that it follows.
func (st State) WithList(f firewall.ListFile) State {
	st.Desired = st.Desired.WithList(f)
	if f.SSH && st.Desired.SSH.File != nil && st.Desired.SSH.File.Path == f.Path {
		others := map[netip.Prefix]bool{}
		for _, p := range st.Desired.SSH.File.Others {
			others[p] = true
		}
		st.Allowed = slices.DeleteFunc(slices.Clone(st.Allowed), func(a Allowed) bool { return a.Until.IsZero() && !others[a.From] })
		for _, p := range f.From {
			if !others[p] {
				st.Allowed = append(st.Allowed, Allowed{From: p, Reason: "listed in " + f.Path})
			}
		}
	}
	return st
}

// WhyAllowed returns why SSH from a network is allowed until a time.
func (st State) WhyAllowed(from netip.Prefix, until time.Time) string {
	for _, a := range st.Allowed {
		if a.From == from && a.Until.Equal(until) {
			return a.Reason
		}
	}
	return st.Client.Why()
}

// Backup is the former state of what bootstrap changed.
type Backup struct {
	Rules     backend.Backup            `json:"rules"`
	Files     []files.File              `json:"files"`
	Dirs      []string                  `json:"dirs,omitempty"`     // that did not exist
	Conntrack host.Conntrack            `json:"conntrack"`          // the size of the conntrack table
	Conflicts []firewall.ConflictBackup `json:"managers,omitempty"` // that were stopped
}

// File returns the backup of a path, or nil.
func (o Backup) File(path string) *files.File {
	if i := slices.IndexFunc(o.Files, func(f files.File) bool { return f.Path == path }); i >= 0 {
		return &o.Files[i]
	}
	return nil
}

// Store reads and writes State, Pending and Backup below /var/lib/basicfw.
type Store struct {
	sys     *system.System
	useCopy bool
}

// New returns the store of a machine.
func New(sys *system.System) *Store { return &Store{sys: sys} }

// ErrNone reports that there is no state: the machine was not bootstrapped.
var ErrNone = errors.New("not bootstrapped")

// ErrLost reports that StateFile is lost or unreadable, but its copy is not. An
// interrupted uninstall never causes this: it removes the copy first.
var ErrLost = errors.New("its copy is " + CopyFile)

// maxState limits what is read, in bytes. A state with five hundred sources takes 200
// KB, and one with the maximum number of blocked networks 25 MB.
const maxState = 64 << 20

// UseCopy makes Load fall back to the copy. It is for the service, which must
// not leave the machine open, and for a rescue; other commands refuse a state that they
// cannot read.
func (s *Store) UseCopy() { s.useCopy = true }

// held is the content of HeldFile.
type held struct {
	Boot  string `json:"boot"`
	Base  *State `json:"base,omitempty"` // the state on the disk; nil if that was unreadable
	State State  `json:"state"`
}

// Hold makes Load return st until the next boot, or until the disk has another state: one
// that is saved later, or that becomes readable. The state on the disk is not changed.
func (s *Store) Hold(st State) error {
	boot, _, err := system.Boot()
	if err != nil {
		return err
	}
	h := held{Boot: boot, State: st}
	h.State.Schema = Schema
	if base, _, err := s.best(); err == nil {
		h.Base = &base
	}
	if err := s.sys.MkdirAll(RunDir, 0o755); err != nil {
		return err
	}
	data, err := encode(h)
	if err != nil {
		return err
	}
	return s.sys.WriteFile(HeldFile, data, 0o600)
}

// loadHeld returns the state of the last Hold, if that is still in effect.
func (s *Store) loadHeld() (st State, ok bool) {
	var h held
	if err := s.read(HeldFile, &h); err != nil || h.State.Ruleset.Check() != nil {
		return st, false
	}
	if boot, _, err := system.Boot(); err != nil || boot != h.Boot {
		return st, false
	}
	base, _, err := s.best()
	if (err == nil) != (h.Base != nil) || err == nil && !reflect.DeepEqual(base, *h.Base) {
		return st, false
	}
	h.State.Held = true
	return h.State, true
}

// Known reports whether there is a state to load, readable or not. If not, the machine was
// not bootstrapped, or was uninstalled.
func (s *Store) Known() bool {
	return s.sys.Exists(StateFile) || s.sys.Exists(CopyFile) || s.sys.Exists(HeldFile)
}

// Load reads the state. Any error except ErrNone means that it exists but cannot be
// used. After UseCopy, the copy replaces a state that is lost, unreadable or the
// failsafe one.
func (s *Store) Load() (State, error) {
	if st, ok := s.loadHeld(); ok {
		return st, nil
	}
	if s.useCopy {
		st, _, err := s.best()
		return st, err
	}
	st, err := s.load(StateFile)
	switch {
	case errors.Is(err, ErrNone) && s.sys.Exists(CopyFile):
		err = fmt.Errorf("%s is lost; %w", StateFile, ErrLost)
	case err != nil:
		if _, e := s.load(CopyFile); e == nil {
			err = fmt.Errorf("%w; %w", err, ErrLost)
		}
	}
	return st, err
}

// best returns the state, or its copy if that is better.
func (s *Store) best() (st State, fromCopy bool, err error) {
	st, err = s.load(StateFile)
	if err == nil && st.Failsafe == "" {
		return st, false, nil
	}
	second, e := s.load(CopyFile)
	switch {
	case e == nil && (err != nil || second.Failsafe == ""):
		return second, true, nil
	case errors.Is(err, ErrNone) && !errors.Is(e, ErrNone):
		err = fmt.Errorf("%s is lost, and its copy cannot be used: %w", StateFile, e)
	}
	return st, false, err
}

func (s *Store) load(path string) (State, error) {
	var st State
	err := s.read(path, &st)
	switch {
	case err != nil:
	case st.Schema > Schema:
		err = fmt.Errorf("%s is of a newer version of basicfw-agent, %s", path, system.Printable(st.Version))
	case st.Schema < 1:
		err = fmt.Errorf("%s has the unknown schema %d", path, st.Schema)
	default:
		if err = st.Ruleset.Check(); err == nil {
			return st, nil
		}
		err = fmt.Errorf("%s: %w", path, err)
	}
	return State{}, err
}

// Save writes the state and its copy, or neither. The rename of StateFile is the
// commit: as long as it is readable, nothing else is loaded. A kill before that
// leaves a newer copy, which the verification at the next boot overwrites. With the
// opposite order, a kill between the writes and a loss of /var would restore what was
// just removed, such as the source of an "ssh remove".
//
// A held state that cannot be saved is held again, and so is a failsafe state that is held:
// it must never replace a desired state, even an unreadable one.
func (s *Store) Save(st State) error {
	if st.Held && st.Failsafe != "" {
		return s.Hold(st)
	}
	err := s.save(st)
	switch {
	case err != nil && st.Held:
		return s.Hold(st)
	case err == nil && s.sys.Exists(HeldFile):
		return s.sys.Remove(HeldFile)
	}
	return err
}

func (s *Store) save(st State) error {
	st.Schema = Schema
	data, err := encode(st)
	if err != nil {
		return err
	}
	if s.keepsCopy(st) {
		return s.put(StateFile, data)
	}
	was, readErr := s.sys.ReadLimited(CopyFile, maxState)
	if err := s.put(CopyFile, data); err != nil {
		return err
	}
	if err = s.put(StateFile, data); err == nil {
		return nil
	}
	var undo error
	switch {
	case readErr == nil:
		undo = s.put(CopyFile, was)
	case errors.Is(readErr, fs.ErrNotExist):
		undo = s.sys.Remove(CopyFile)
	}
	if undo != nil {
		err = fmt.Errorf("%w; restoring %s: %w", err, CopyFile, undo)
	}
	return err
}

// keepsCopy reports whether saving st must not replace the copy: the failsafe rules must
// not destroy the desired state.
func (s *Store) keepsCopy(st State) bool {
	if st.Failsafe == "" {
		return false
	}
	second, err := s.load(CopyFile)
	return err == nil && second.Failsafe == ""
}

// SyncCopy writes the copy if it differs from the state: after a loss, or an upgrade
// from a version without a copy. Call it once the rules were found to be the state's.
func (s *Store) SyncCopy() error {
	data, err := s.sys.ReadLimited(StateFile, maxState)
	if err != nil {
		return err
	}
	if fi, err := s.sys.Lstat(CopyFile); err == nil && system.CheckOwner(fi) == nil && fi.Mode().Perm() == 0o600 {
		if second, err := s.sys.ReadLimited(CopyFile, maxState); err == nil && bytes.Equal(second, data) {
			return nil
		}
	}
	if st, err := s.load(StateFile); err != nil || s.keepsCopy(st) {
		return err
	}
	return s.put(CopyFile, data)
}

// Restore replaces a lost, unreadable or failsafe state with its copy, if that can be
// used. If possible, it sets an unreadable state aside. Call it with the lock held.
// Otherwise an uninstall could have removed one of the two at that moment.
func (s *Store) Restore() (restored bool, err error) {
	if _, fromCopy, err := s.best(); err != nil || !fromCopy {
		return false, nil
	}
	if err := s.replaceable(StateFile); err != nil {
		return false, err
	}
	data, err := s.sys.ReadLimited(CopyFile, maxState)
	if err != nil {
		return false, err
	}
	var aside error
	if _, err := s.load(StateFile); err != nil {
		aside = s.SetAside()
	}
	if err := s.put(StateFile, data); err != nil {
		return false, errors.Join(err, aside)
	}
	return true, aside
}

// MakeDirs creates the directories of the state and its copy, if either exists. It also
// corrects the owner and mode of Dir and RunDir, which the service's sandbox forbids.
func (s *Store) MakeDirs() error {
	var err error
	bootstrapped := s.sys.Exists(StateFile) || s.sys.Exists(CopyFile)
	if bootstrapped || s.sys.Exists(Dir) {
		err = s.sys.MkdirAll(Dir, 0o700)
	}
	if s.sys.Exists(RunDir) {
		err = errors.Join(err, s.sys.MkdirAll(RunDir, 0o755))
	}
	if dir := filepath.Dir(CopyFile); bootstrapped && !s.sys.Exists(dir) {
		err = errors.Join(err, s.sys.MkdirAll(dir, 0o755))
	}
	return err
}

// LoadBackup reads the backup from before bootstrap. The error is ErrNone if there is
// none.
func (s *Store) LoadBackup() (Backup, error) {
	var o Backup
	err := s.read(original, &o)
	if err == nil && len(o.Files) == 0 {
		err = fmt.Errorf("%s is not a backup: it names no file", original)
	}
	if err != nil && !errors.Is(err, ErrNone) {
		err = hint.Wrap(err, "move %s away to continue without it", original)
	}
	return o, err
}

// SaveBackup writes the backup from before bootstrap.
func (s *Store) SaveBackup(o Backup) error {
	if err := s.sys.MkdirAll(backupDir, 0o700); err != nil {
		return err
	}
	return s.write(original, o)
}

// RemoveBackup removes the backup from before bootstrap, and its directories if nothing
// else is in them.
func (s *Store) RemoveBackup() error {
	return errors.Join(s.sys.Remove(original), s.sys.RemoveDir(backupDir), s.sys.RemoveDir(Dir))
}

// Recorded reports whether there is a backup from before bootstrap.
func (s *Store) Recorded() bool { return s.sys.Exists(original) }

// LoadPending reads the pending change. The error is ErrNone if there is none.
func (s *Store) LoadPending() (Pending, error) {
	var p Pending
	if err := s.read(PendingFile, &p); err != nil {
		return Pending{}, err
	}
	if p.Schema != Schema {
		return Pending{}, fmt.Errorf("%s has the unknown schema %d", PendingFile, p.Schema)
	}
	if err := p.State.Ruleset.Check(); err != nil {
		return Pending{}, fmt.Errorf("%s: %w", PendingFile, err)
	}
	return p, nil
}

// SavePending writes the pending change.
func (s *Store) SavePending(p Pending) error {
	p.Schema = Schema
	return s.write(PendingFile, p)
}

// RemovePending removes the record of the pending change.
func (s *Store) RemovePending() error { return s.sys.Remove(PendingFile) }

// RemoveCopy removes the copy of the state. An uninstall begins with it, so that an
// interruption leaves nothing that would restore removed rules.
func (s *Store) RemoveCopy() error { return s.sys.Remove(CopyFile) }

// Forget removes the state and the backup.
func (s *Store) Forget() error {
	if err := s.sys.Remove(HeldFile); err != nil {
		return err
	}
	return s.sys.RemoveAll(Dir)
}

// SetAside keeps an unreadable state in a file next to the one that replaces it.
func (s *Store) SetAside() error {
	data, err := s.sys.ReadLimited(StateFile, maxState)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	return s.sys.WriteFile(StateFile+".broken", data, 0o600)
}

// read reads a file that only root can have written.
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
	if err = json.Unmarshal(data, into); err != nil {
		err = fmt.Errorf("reading %s: %w", path, err)
	}
	return err
}

func (s *Store) write(path string, v any) error {
	data, err := encode(v)
	if err != nil {
		return err
	}
	return s.put(path, data)
}

func encode(v any) ([]byte, error) {
	data, err := json.MarshalIndent(v, "", " ")
	return append(data, '\n'), err
}

// replaceable returns an error if path may belong to another program: a directory or a
// FIFO, for instance.
func (s *Store) replaceable(path string) error {
	if fi, err := s.sys.Lstat(path); err == nil && !fi.Mode().IsRegular() && fi.Mode()&fs.ModeSymlink == 0 {
		return hint.Wrap(fmt.Errorf("%s is not a regular file (%v)", path, fi.Mode()), "move it away")
	}
	return nil
}

// put replaces a file. Only root can read the file and Dir.
func (s *Store) put(path string, data []byte) error {
	if err := s.replaceable(path); err != nil {
		return err
	}
	if dir := filepath.Dir(path); dir != filepath.Dir(CopyFile) {
		if err := s.sys.MkdirAll(Dir, 0o700); err != nil {
			return err
		}
	} else if !s.sys.Exists(dir) {
		if err := s.sys.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return s.sys.WriteFile(path, data, 0o600)
}

// Lock ensures that only one run of this program makes a change at a time. It waits
// until the context ends; the error then names the holder.
func (s *Store) Lock(ctx context.Context, command string) (unlock func(), err error) {
	if err := s.sys.MkdirAll(RunDir, 0o755); err != nil {
		return nil, err
	}
	start := time.Now()
	unlock, err = s.sys.Lock(ctx, lockFile, fmt.Sprintf("%d %s\n", os.Getpid(), command))
	if err != nil && ctx.Err() != nil {
		err = fmt.Errorf("another change has been in progress for more than %s (%s)", firewall.FormatDuration(time.Since(start)), s.holder())
		return nil, hint.Wrap(err, "try again after it has ended")
	}
	return unlock, err
}

// holder returns the last process that wrote its name into the lock.
func (s *Store) holder() string {
	data, err := s.sys.ReadLimited(lockFile, 256)
	pid, command, ok := strings.Cut(strings.TrimSpace(string(data)), " ")
	if n, e := strconv.Atoi(pid); err != nil || !ok || e != nil || n <= 0 {
		return "unknown process"
	}
	return fmt.Sprintf("process %s: basicfw-agent %s", pid, system.Printable(command))
}
