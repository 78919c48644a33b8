//go:build linux

package bootstrap

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
)

// addressLists reads the files of addresses that the settings name. For a file that
// cannot be used, it keeps the list of the previous state and adds a warning. If
// there is no such list, that is an error.
type addressLists struct {
	read     func(path string, ssh bool) ([]netip.Prefix, error)
	last     []firewall.ListFile
	warnings []string
	errs     []error
}

// newLists returns the lists of the state on disk.
func newLists(in Input) *addressLists {
	l := &addressLists{read: in.ReadList}
	if in.Previous != nil {
		l.last = in.Previous.Desired.ListFiles()
	}
	return l
}

// list returns the addresses in a file. label is where the settings name it.
func (l *addressLists) list(label, path string, ssh bool) []netip.Prefix {
	list, err := l.read(path, ssh)
	if err == nil {
		return list
	}
	err = fmt.Errorf("%s: %w", label, err)
	if i := slices.IndexFunc(l.last, func(f firewall.ListFile) bool { return f.Path == path && f.SSH == ssh }); i >= 0 {
		l.warnings = append(l.warnings, l.last[i].Keeping(err))
		return l.last[i].From
	}
	l.errs = append(l.errs, err)
	return nil
}

// fill reads the lists of services that are neither closed nor replaced.
func (l *addressLists) fill(d *firewall.Desired) {
	files := d.ListFiles()
	for _, list := range []*[]firewall.Service{&d.Open, &d.Profile.Services} {
		*list = slices.Clone(*list)
		for i, s := range *list {
			if slices.ContainsFunc(files, func(f firewall.ListFile) bool { return !f.SSH && f.Path == s.File }) {
				(*list)[i].From = l.list(settings.Label(s.Source, "open."+s.Name), s.File, false)
			}
		}
	}
}
