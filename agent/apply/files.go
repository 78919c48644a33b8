package apply

import (
	"bytes"
	"errors"
	"io/fs"
	"slices"
	"strconv"
	"syscall"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// RulesText reads and writes text in the format of iptables-save.
type RulesText interface {
	// Persisted returns existing with our rules replaced by r.
	Persisted(existing []byte, r firewall.Ruleset, f firewall.Family) ([]byte, error)
	// Unpersisted returns current without our rules.
	Unpersisted(current, original []byte) ([]byte, error)
	// Aside returns existing without our rules and without those that drop packets
	// on their own; nil if nothing is left.
	Aside(existing []byte) ([]byte, error)
}

// TableText writes text in the format of nft -f.
type TableText interface {
	Persisted(r firewall.Ruleset, families []firewall.Family) []byte
}

// RulesFiles are the files of the persisted rules, for use without this program.
type RulesFiles struct {
	System   *system.System
	Iptables RulesText
	Nftables TableText
	Families []firewall.Family
}

// RulesFile is a file of persisted rules with its expected content.
type RulesFile struct {
	files.Change
	Family string // whose rules it holds, if only one family's
	Broken error  // why the existing content cannot be kept
}

// TableFile holds the persisted rules of the nftables backend, for people and nft -f.
const TableFile = "/etc/nftables/basicfw.nft"

// Path returns the file of a family's persisted rules: the one that iptables-services
// reads, or without /etc/sysconfig, the one that netfilter-persistent reads.
func (r RulesFiles) Path(f firewall.Family) string {
	// A directory that cannot be read counts as existing: no program would read rules
	// that are written elsewhere.
	if fi, err := r.System.Stat("/etc/sysconfig"); err == nil && fi.IsDir() || err != nil && r.System.Exists("/etc/sysconfig") {
		if f == firewall.IPv4 {
			return "/etc/sysconfig/iptables"
		}
		return "/etc/sysconfig/ip6tables"
	}
	return "/etc/iptables/rules.v" + strconv.Itoa(int(f))
}

// Wanted returns the files that hold a state's rules and those that must not hold
// any. A file without valid rules is replaced: the backup has it.
func (r RulesFiles) Wanted(st store.State) ([]RulesFile, error) {
	if st.Backend.Name == backend.Nftables {
		return r.wantedTable(st.Ruleset)
	}
	var out []RulesFile
	for _, f := range firewall.Families {
		path := r.Path(f)
		existing, err := r.System.ReadLimited(path, files.MaxRules)
		// A directory in its place is reported but not replaced: writing fails.
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.EISDIR) {
			return nil, err
		}
		data, err := r.Iptables.Persisted(existing, st.Ruleset, f)
		broken := err
		if broken != nil {
			if data, err = r.Iptables.Persisted(nil, st.Ruleset, f); err != nil {
				return nil, err
			}
		}
		out = append(out, RulesFile{files.Change{Path: path, Data: data, Mode: 0o600}, f.String(), broken})
	}
	return append(out, RulesFile{Change: files.Change{Path: TableFile, Remove: true}}), nil
}

// wantedTable is Wanted for the nftables backend. A file of iptables must hold none of
// our rules, and none that drop packets on their own.
func (r RulesFiles) wantedTable(rules firewall.Ruleset) ([]RulesFile, error) {
	out := []RulesFile{{Change: files.Change{Path: TableFile, Data: r.Nftables.Persisted(rules, r.Families), Mode: 0o600}}}
	for _, f := range firewall.Families {
		path := r.Path(f)
		existing, err := r.System.ReadLimited(path, files.MaxRules)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		data, err := r.Iptables.Aside(existing)
		if err != nil || bytes.Equal(data, existing) {
			continue // it holds none of our rules, or is not a file of iptables
		}
		out = append(out, RulesFile{Change: files.Change{Path: path, Data: data, Mode: 0o600, Remove: data == nil}, Family: f.String()})
	}
	return out, nil
}

// restored returns a file without our rules: as it was before bootstrap, with later
// changes by other programs. An interrupted uninstall may have restored it already.
// The error is the reason if its present content is lost.
func (r RulesFiles) restored(was, now files.File) (files.File, error) {
	i := slices.IndexFunc(firewall.Families[:], func(f firewall.Family) bool { return r.Path(f) == was.Path })
	if i < 0 || r.unchanged(firewall.Families[i], was, now.Data) {
		return was, nil
	}
	data, err := r.Iptables.Unpersisted(now.Data, was.Data)
	if err != nil {
		return was, err
	}
	was.Data, was.Link = data, ""
	if len(data) > 0 && !was.Existed {
		was.Existed, was.Mode = true, 0o600
	}
	return was, nil
}

// unchanged reports whether only our rules distinguish a file from the original, which
// can then be restored byte for byte.
func (r RulesFiles) unchanged(f firewall.Family, was files.File, now []byte) bool {
	if len(now) == 0 {
		return true
	}
	made, err := r.Iptables.Persisted(was.Data, firewall.Ruleset{}, f)
	if err != nil {
		return true
	}
	// Without our rules, whatever they were, both are the same.
	rest, err := r.Iptables.Unpersisted(made, was.Data)
	left, e := r.Iptables.Unpersisted(now, was.Data)
	return err == nil && e == nil && bytes.Equal(rest, left)
}
