package firewall

import "slices"

// Conflict is another firewall manager on this machine.
type Conflict struct {
	Name    string
	Active  bool // its rules are in force
	Enabled bool // it starts at boot
}

// ConflictBackup is the state of a conflict before it was stopped.
type ConflictBackup struct {
	Name  string       `json:"name"`
	Units []UnitBackup `json:"units"`
}

// Active reports whether any of its units was active.
func (m ConflictBackup) Active() bool {
	return slices.ContainsFunc(m.Units, func(u UnitBackup) bool { return u.Active })
}

// UnitBackup is the former state of a systemd unit.
type UnitBackup struct {
	Name    string `json:"name"`
	Enabled bool   `json:"enabled"` // starts at boot
	Active  bool   `json:"active"`
	Masked  bool   `json:"masked"`
	// Queued is set if it was about to be started.
	Queued bool `json:"queued,omitempty"`
	// Links are the links that enabled it, if systemd was not running.
	Links []Link `json:"links,omitempty"`
}

// Link is a symbolic link.
type Link struct {
	Path   string `json:"path"`
	Target string `json:"target"`
}
