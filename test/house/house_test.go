// Package house checks the structure of the program: which package may import which, what
// bypasses the file seam, and how large functions, types and packages are.
package house

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/basicfw/basicfw-agent/"

// owners lists the packages that may import a library, or run programs.
var owners = map[string][]string{
	"gopkg.in/ini.v1":                         {"agent/settings"},
	"github.com/kardianos/service":            {"agent/service"},
	"github.com/vishvananda/netlink":          {"agent/host"},
	"github.com/google/nftables":              {"agent/nftables"},
	"github.com/coreos/go-systemd/v22/daemon": {"cmd/basicfw-agent"},
	"github.com/spf13/cobra":                  {"cmd/basicfw-agent"},
	"os/exec":                                 {"agent/system"},
	"github.com/sirupsen/logrus":              {"agent", "agent/apply", "agent/proof", "agent/survey", "cmd/basicfw-agent"},
}

// below lists which of our packages each package may import. A package that does not exist
// yet is not checked, so that its place is known before it is written.
var below = map[string][]string{
	"agent/firewall": {},
	"agent/system":   {},
	"agent/lists":    {"agent/firewall", "agent/system"},
	"agent/hint":     {}, // may be imported by all except agent/firewall
	"agent/host":     {"agent/firewall", "agent/system"},
	"agent/files":    {"agent/system"},
	"agent/motd":     {"agent/files", "agent/system"},
	"agent/backend":  {"agent/exposure", "agent/firewall", "agent/system"},
	"agent/service":  {"agent/system"},
	"agent/exposure": {"agent/firewall"},
	"agent/iptables": {"agent/backend", "agent/exposure", "agent/firewall", "agent/system"},
	"agent/nftables": {"agent/backend", "agent/exposure", "agent/firewall", "agent/system"},
	"agent/settings": {"agent/firewall", "agent/system"},
	"agent/conflict": {"agent/firewall", "agent/system"},
	"agent/netsim":   {"agent/firewall", "agent/host", "agent/system"},
	"agent/selftest": {"agent/firewall", "agent/netsim", "agent/system"},
	"agent/sshd":     {"agent/firewall", "agent/host", "agent/system"},
	"profiles":       {"agent/firewall", "agent/settings", "agent/system"},
	"agent/store":    {"agent/backend", "agent/files", "agent/firewall", "agent/host", "agent/system"},
	"agent/lease":    {"agent/firewall", "agent/host", "agent/store"},
	"agent/survey": {"agent/exposure", "agent/firewall", "agent/host", "agent/iptables", "agent/lists", "agent/nftables", "agent/settings", "agent/sshd", "agent/store", "agent/system",
		"profiles"},
	"agent/trial": {"agent/backend", "agent/firewall", "agent/iptables", "agent/netsim", "agent/selftest", "agent/store", "agent/system"},
	"bootstrap":   {"agent/backend", "agent/files", "agent/firewall", "agent/host", "agent/lists", "agent/settings", "agent/store", "agent/system", "profiles"},
	"agent/apply": {"agent/backend", "agent/exposure", "agent/files", "agent/firewall", "agent/host", "agent/lease", "agent/motd", "agent/service", "agent/store",
		"agent/system"},
	"agent/verify": {"agent/apply", "agent/backend", "agent/files", "agent/firewall", "agent/service", "agent/store", "agent/system"},
	"agent/report": {"agent/backend", "agent/exposure", "agent/firewall", "agent/host", "agent/service", "agent/store", "agent/system", "agent/verify"},
	"agent/proof":  {"agent/exposure", "agent/firewall", "agent/host", "agent/iptables", "agent/report", "agent/settings", "agent/store"},
	"agent/daemon": {"agent/apply", "agent/backend", "agent/files", "agent/firewall", "agent/host", "agent/lease", "agent/motd", "agent/report",
		"agent/store", "agent/system", "agent/verify"},
	"agent": {"agent/apply", "agent/backend", "agent/conflict", "agent/daemon", "agent/exposure", "agent/files", "agent/firewall", "agent/host",
		"agent/iptables", "agent/lease", "agent/motd", "agent/nftables", "agent/proof", "agent/report", "agent/service", "agent/selftest", "agent/settings",
		"agent/store", "agent/survey", "agent/system", "agent/netsim", "agent/trial", "agent/verify", "bootstrap", "profiles"},
	"cmd/basicfw-agent": {"agent", "agent/apply", "agent/backend", "agent/exposure", "agent/firewall", "agent/host", "agent/lease",
		"agent/lists", "agent/report", "agent/selftest", "agent/service", "agent/settings", "agent/store", "agent/system", "agent/trial", "agent/verify",
		"bootstrap", "profiles"},
}

// upward lists the imports that still violate below.
var upward = map[string]int{}

func TestWalls(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	seen, imports := 0, map[string]int{}
	for dec.More() {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		name := strings.TrimPrefix(p.ImportPath, module)
		if strings.HasPrefix(name, "test/") || strings.HasPrefix(name, "packaging/") {
			continue
		}
		seen++
		allowed, ok := below[name]
		if !ok && name != "docs" {
			t.Errorf("%s has no place in the table", name)
		}
		for _, imp := range p.Imports {
			ours, isOurs := strings.CutPrefix(imp, module)
			if isOurs && !slices.Contains(allowed, ours) && (ours != "agent/hint" || name == "agent/firewall") {
				imports[name+" imports "+ours] = 1
			}
			if who, ok := owners[imp]; ok && !slices.Contains(who, name) {
				t.Errorf("%s imports %s, which only %s may", name, imp, strings.Join(who, ", "))
			}
			if name == "agent/firewall" && strings.Contains(imp, ".") {
				t.Errorf("%s imports %s: only the standard library is allowed there", name, imp)
			}
		}
	}
	ratchet(t, 0, imports, upward)
	if seen < 17 {
		t.Errorf("only %d packages were checked", seen)
	}
}
