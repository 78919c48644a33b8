// Package house holds the walls between the packages: who may import what.
package house

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/basicfw/basicfw-agent/"

// owners says which one package may import a library, or run programs.
var owners = map[string][]string{
	"gopkg.in/ini.v1":                         {"agent/settings"},
	"github.com/kardianos/service":            {"agent/service"},
	"github.com/vishvananda/netlink":          {"agent/hostnet"},
	"github.com/google/nftables":              {"agent/nftables"},
	"github.com/coreos/go-systemd/v22/daemon": {"cmd/basicfw-agent"},
	"github.com/spf13/cobra":                  {"cmd/basicfw-agent"},
	"os/exec":                                 {"agent/system"},
	"github.com/sirupsen/logrus":              {"agent", "cmd/basicfw-agent"},
}

// below says what of ours a package may import; one that is not here may
// import anything of ours.
var below = map[string][]string{
	"agent/firewall": {},
	"agent/system":   {},
	"agent/hostnet":  {"agent/firewall", "agent/system"},
	"agent/twin":     {"agent/firewall", "agent/hostnet", "agent/system"},
	"agent/selftest": {"agent/firewall", "agent/system", "agent/twin"},
	"agent/session":  {"agent/firewall", "agent/system"},
	"agent/iptables": {"agent/firewall", "agent/system"},
	"agent/nftables": {"agent/firewall", "agent/system"},
	"agent/store":    {"agent/firewall", "agent/system"},
	"agent/settings": {"agent/firewall", "agent/system"},
	"agent/service":  {"agent/system"},
	"agent/managers": {"agent/firewall", "agent/system"},
	"profiles":       {"agent/firewall", "agent/settings", "agent/system"},
	"agent":          {"agent/firewall", "agent/store", "agent/system"},
	"bootstrap":      {"agent", "agent/firewall", "agent/settings", "agent/store", "agent/system", "profiles"},
}

func TestWalls(t *testing.T) {
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...").Output()
	if err != nil {
		t.Fatal(err)
	}
	dec := json.NewDecoder(strings.NewReader(string(out)))
	seen := 0
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
		for _, imp := range p.Imports {
			ours, isOurs := strings.CutPrefix(imp, module)
			if allowed, ok := below[name]; ok && isOurs && !slices.Contains(allowed, ours) {
				t.Errorf("%s imports %s", name, ours)
			}
			if who, ok := owners[imp]; ok && !slices.Contains(who, name) {
				t.Errorf("%s imports %s, which is for %s", name, imp, strings.Join(who, ", "))
			}
			if name == "agent/firewall" && strings.Contains(imp, ".") {
				t.Errorf("%s imports %s: it is pure, and of the standard library alone", name, imp)
			}
		}
	}
	if seen < len(below) {
		t.Errorf("only %d packages were looked at: %s", seen, filepath.Base(module))
	}
}
