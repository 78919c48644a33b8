package nftables

import (
	"testing"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/test/lab"
)

// nft loads the persisted file over any existing table.
func TestPersisted(t *testing.T) {
	for name, d := range desiredStates() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rules := compiledRules(t, d)
			file := Files{}.Persisted(rules, firewall.Families[:])
			k := newKernel(t)
			k.load(t, compiledRules(t, desiredStates()["quiet"]))
			for range 2 {
				if r := k.Run(t, lab.Command{Args: []string{"nft", "-f", "-"}, Stdin: string(file)}); r.Code != 0 {
					t.Fatalf("nft: %s", r.Stderr)
				}
			}
			if in := k.inspect(t, rules); len(in.Drift) > 0 {
				t.Errorf("%v", in.Drift)
			}
		})
	}
}
