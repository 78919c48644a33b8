package daemon

import (
	"slices"

	"github.com/basicfw/basicfw-agent/agent/store"
)

// followLists returns st with the present lists of the files that it follows. If a
// file cannot be used, its last list is kept, which is logged once.
func (d *Daemon) followLists(st store.State) (next store.State, changed bool) {
	if d.ReadList == nil {
		return st, false
	}
	unread := map[string]bool{}
	for _, f := range st.Desired.ListFiles() {
		list, err := d.ReadList(f.Path, f.SSH)
		switch {
		case err != nil:
			text := f.Keeping(err)
			if unread[text] = true; !d.unread[text] {
				d.Log.Warn(text)
				d.urgent = true
			}
		case !slices.Equal(list, f.From):
			d.Log.Infof("%s has changed; entries: %d", f.Path, len(list))
			f.From = list
			st, changed = st.WithList(f), true
		}
	}
	d.urgent = d.urgent || len(unread) != len(d.unread)
	d.unread = unread
	return st, changed
}
