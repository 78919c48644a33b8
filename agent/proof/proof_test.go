package proof

import (
	"context"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// TestGuard checks that the guard, which a change removes, does not count.
func TestGuard(t *testing.T) {
	p := Proof{Families: firewall.Families[:], Live: func(context.Context) (exposure.Ruleset, error) {
		return exposure.Ruleset{Tables: []exposure.Table{{Family: "inet", Name: firewall.GuardTable}, {Family: "inet", Name: "other"}}}, nil
	}}
	s, err := p.situation(context.Background())
	if err != nil || len(s.Rules.Tables) != 1 || s.Rules.Tables[0].Name != "other" {
		t.Errorf("tables %+v, %v", s.Rules.Tables, err)
	}
}
