// Package files writes and restores whole files: the part of a change that is not
// in the kernel.
package files

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// MaxRules is the maximum size of a rules file that is read, in bytes.
const MaxRules = 64 << 20

// Change is the desired content of a file.
type Change struct {
	Path   string
	Data   []byte
	Mode   fs.FileMode
	Remove bool // the file must not exist
}

// Optional returns a list of *c, or nil if c is nil.
func Optional(c *Change) []Change {
	if c == nil {
		return nil
	}
	return []Change{*c}
}

// Same reports whether the file already has the content, mode and owner that c sets.
func (c Change) Same(sys *system.System) (bool, error) {
	fi, err := sys.Lstat(c.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return c.Remove, nil
	}
	if err != nil || c.Remove {
		return false, err
	}
	if system.CheckOwner(fi) != nil || fi.Mode().Perm() != c.Mode || fi.Size() != int64(len(c.Data)) {
		return false, nil
	}
	data, err := sys.ReadLimited(c.Path, fi.Size())
	return bytes.Equal(data, c.Data), err
}

// Apply writes or removes the file, and creates its directory if necessary.
func (c Change) Apply(sys *system.System) error {
	if c.Remove {
		return sys.Remove(c.Path)
	}
	if dir := filepath.Dir(c.Path); !sys.Exists(dir) {
		if err := sys.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return sys.WriteFile(c.Path, c.Data, c.Mode)
}

// File is the earlier state of a file. Data is its content, so that one write makes a
// complete backup; for a symbolic link, Data is the content of its target.
type File struct {
	Path    string      `json:"path"`
	Existed bool        `json:"existed"`
	Mode    fs.FileMode `json:"mode,omitempty"`
	Data    []byte      `json:"data,omitempty"`
	Link    string      `json:"link,omitempty"` // the target of a symbolic link
}

// Snapshot returns the current state of a file.
func Snapshot(sys *system.System, path string) (File, error) {
	file := File{Path: path}
	fi, err := sys.Lstat(path)
	if err == nil {
		file.Existed, file.Mode = true, fi.Mode().Perm()
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	case err != nil:
	case fi.Mode()&fs.ModeSymlink != 0:
		if file.Link, err = sys.Readlink(path); err != nil {
			return file, err
		}
		if file.Data, err = sys.ReadLimited(path, MaxRules); errors.Is(err, fs.ErrNotExist) {
			err = nil // its target does not exist
		}
	case fi.Mode().IsRegular():
		file.Data, err = sys.ReadLimited(path, MaxRules)
	default:
		err = hint.Wrap(fmt.Errorf("not a regular file (%v)", fi.Mode()), "move it away and run the command again")
	}
	return file, err
}

// Restore restores the file to its earlier state.
func (f File) Restore(sys *system.System) error {
	switch {
	case !f.Existed:
		return sys.Remove(f.Path)
	case f.Link != "":
		return sys.Symlink(f.Link, f.Path)
	}
	// What was not changed needs no write, which a read-only file system would refuse.
	c := Change{Path: f.Path, Data: f.Data, Mode: f.Mode}
	if same, err := c.Same(sys); err == nil && same {
		return nil
	}
	return c.Apply(sys)
}
