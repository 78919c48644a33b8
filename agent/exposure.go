package agent

import (
	"context"
	"errors"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/agent/survey"
)

// Situation returns what this machine's exposure depends on: the live rules of all
// programs, and where packets arrive. It needs no desired state.
func (a *Agent) Situation(ctx context.Context) (s exposure.Situation, err error) {
	given, _ := settings.Load(a.System, a.config) // invalid settings do not affect the live rules
	facts, err := a.facts(given, true)
	if err != nil {
		return s, err
	}
	rules, err := a.Live(survey.WithBans(ctx))
	if err != nil {
		return s, err
	}
	st, err := a.InEffect()
	if err == nil {
		return report.Situation(facts, a.Families, rules, &st), nil
	}
	if !errors.Is(err, store.ErrNone) {
		a.Log.WithError(err).Warn("cannot say which rules the settings require")
	}
	return report.Situation(facts, a.Families, rules, nil), nil
}
