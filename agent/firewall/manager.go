package firewall

import "slices"

// Manager is another program that manages the firewall of this machine.
type Manager struct {
	Name    string
	Active  bool // its rules decide now
	Enabled bool // it is started at boot
}

// ManagerBefore is how such a program was before it was stopped.
type ManagerBefore struct {
	Name  string       `json:"name"`
	Units []UnitBefore `json:"units"`
}

// Active tells whether any of its units was up.
func (m ManagerBefore) Active() bool {
	return slices.ContainsFunc(m.Units, func(u UnitBefore) bool { return u.Active })
}

// UnitBefore is a unit of systemd as it was.
type UnitBefore struct {
	Name    string `json:"name"`
	Enabled bool   `json:"enabled"` // started at boot
	Active  bool   `json:"active"`
	Masked  bool   `json:"masked"`
	// Queued is set where it was about to be started.
	Queued bool `json:"queued,omitempty"`
	// Links are what enabled it, where no systemd ran that could be asked.
	Links []Link `json:"links,omitempty"`
}

// Link is a symbolic link.
type Link struct {
	Path   string `json:"path"`
	Target string `json:"target"`
}
