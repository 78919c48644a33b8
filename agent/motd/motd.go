// Package motd shows messages for the administrator: at every login, and on the
// consoles before it.
package motd

import (
	"errors"
	"io/fs"
	"path/filepath"

	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/system"
)

const (
	// MessageFile is shown at every login (pam_motd(8)). It exists only while
	// something needs the administrator's attention.
	MessageFile = "/etc/motd.d/basicfw"
	// IssueFile is shown on the consoles, before the login (agetty(8)).
	IssueFile = "/run/issue.d/basicfw.issue"
	// IssueLink is a symbolic link to IssueFile. If /etc/issue exists, agetty reads
	// /etc/issue.d instead of /run; it shows a name in both once (agetty(8)). /etc is
	// read-only for the service, so the link stays while the file comes and goes.
	IssueLink = "/etc/issue.d/basicfw.issue"
	// reloadFile is created and watched by each agetty that waits for a login name.
	// When it is touched, agetty shows its texts again ("agetty --reload").
	reloadFile = "/run/agetty.reload"
)

// Link creates IssueLink if it does not exist.
func Link(sys *system.System) error {
	if sys.Exists(IssueLink) {
		return nil
	}
	if dir := filepath.Dir(IssueLink); !sys.Exists(dir) {
		if err := sys.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return sys.Symlink(IssueFile, IssueLink)
}

// Show writes the two texts; an empty one removes its file. Every user can read the
// message. Only root can read the issue: agetty runs as root.
func Show(sys *system.System, message, issue string) error {
	_, err := show(sys, MessageFile, message, 0o644)
	changed, e := show(sys, IssueFile, issue, 0o600)
	if changed && e == nil {
		e = Reload(sys)
	}
	return errors.Join(err, e)
}

// Reload makes the consoles show the current texts.
func Reload(sys *system.System) error { return sys.Touch(reloadFile) }

func show(sys *system.System, path, text string, mode fs.FileMode) (changed bool, err error) {
	if text == "" {
		return sys.Exists(path), sys.Remove(path)
	}
	c := files.Change{Path: path, Data: []byte(text), Mode: mode}
	if same, err := c.Same(sys); same || err != nil {
		return false, err
	}
	return true, c.Apply(sys)
}
