package firewall

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
)

// filePrefix precedes the path of a list in the settings.
const filePrefix = "file:"

// ListFile is a file of addresses, and the list that was read from it last.
type ListFile struct {
	Path string         `json:"path"`
	SSH  bool           `json:"-"` // of SSH sources, not of services
	From []netip.Prefix `json:"from"`
	// Others are SSH sources that are allowed apart from the file.
	Others []netip.Prefix `json:"others,omitempty"`
}

// ParseFile parses the word file:PATH. It returns "" for another word.
func ParseFile(word string) (name string, err error) {
	name, is := strings.CutPrefix(word, filePrefix)
	switch {
	case !is:
		return "", nil
	case !path.IsAbs(name) || path.Clean(name) != name || name == "/" || len(name) > 1000 || strings.ContainsAny(name, " ,;#\"'\\"):
		return "", fmt.Errorf("%s: want file: and an absolute path, such as file:/etc/basicfw/admins", Quote(word))
	}
	return name, nil
}

// ListFiles returns the files that d follows, with the lists in effect. A file that
// is used for SSH and for services is listed for each.
func (d Desired) ListFiles() (files []ListFile) {
	if f := d.SSH.File; f != nil {
		files = append(files, ListFile{Path: f.Path, SSH: true, From: f.From})
	}
	for _, s := range d.configured() {
		if s.File != "" && !slices.ContainsFunc(files, func(f ListFile) bool { return !f.SSH && f.Path == s.File }) {
			files = append(files, ListFile{Path: s.File, From: s.From})
		}
	}
	return files
}

// WithList returns d with the list of a file, wherever it is used.
func (d Desired) WithList(f ListFile) Desired {
	if own := d.SSH.File; f.SSH && own != nil && own.Path == f.Path {
		d.SSH.File = &ListFile{Path: f.Path, From: f.From, Others: own.Others}
		d.SSH.Allow = slices.Clone(own.Others)
		had := map[netip.Prefix]bool{}
		for _, p := range own.Others {
			had[p] = true
		}
		d.SSH.Allow = append(d.SSH.Allow, without(f.From, func(p netip.Prefix) bool { return had[p] })...)
	}
	update := func(list []Service) []Service {
		list = slices.Clone(list)
		for i := range list {
			if !f.SSH && list[i].File == f.Path {
				list[i].From = f.From
			}
		}
		return list
	}
	d.Open, d.Profile.Services = update(d.Open), update(d.Profile.Services)
	return d
}

// Keeping returns the sentence about a file that cannot be used: its last list stays in effect.
func (f ListFile) Keeping(err error) string {
	what := "services"
	if f.SSH {
		what = "SSH"
	}
	return fmt.Sprintf("%v; the list that was read last stays in effect for %s (entries: %d)", err, what, len(f.From))
}
