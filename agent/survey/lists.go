package survey

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/lists"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// ReadList reads a file of addresses: SSH sources, or those of services. It is an
// error if users other than root can change it.
func (v Surveyor) ReadList(path string, ssh bool) ([]netip.Prefix, error) {
	fi, err := v.System.Stat(path)
	if err == nil {
		if err = system.CheckOwner(fi); err == nil && fi.Size() > lists.MaxSources {
			err = fmt.Errorf("larger than %d bytes", lists.MaxSources)
		}
	}
	if err == nil {
		var data []byte
		if data, err = v.System.ReadLimited(path, lists.MaxSources); err == nil {
			return lists.ParseSources(path, data, ssh)
		}
	}
	var failed *fs.PathError // its path may be below the root
	if errors.As(err, &failed) {
		err = failed.Err
	}
	return nil, fmt.Errorf("%s: %w", path, err)
}

// listFiles returns the files that the desired state follows, with the lists in effect.
func (v Surveyor) listFiles() []firewall.ListFile {
	st, err := v.Store.Load()
	if err != nil {
		return nil
	}
	return st.Desired.ListFiles()
}

// keptLists returns a sentence for each file that the desired state follows and that cannot
// be used.
func (v Surveyor) keptLists() (out []string) {
	for _, f := range v.listFiles() {
		if _, err := v.ReadList(f.Path, f.SSH); err != nil {
			out = append(out, f.Keeping(err))
		}
	}
	return out
}
