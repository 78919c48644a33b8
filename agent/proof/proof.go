// Package proof checks what a change does to packets, over the rules of all programs.
package proof

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/sirupsen/logrus"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// Proof checks one change. It refuses a change that makes the exposure worse, or that
// fails a test in the settings.
type Proof struct {
	Live     func(context.Context) (exposure.Ruleset, error) // reads the rules of all programs
	Facts    host.Facts
	Families []firewall.Family // that the kernel supports
	Next     store.State       // after the change
	Now      firewall.Moment
	Tests    []settings.Assertion
	Force    bool // only warn
	Log      logrus.FieldLogger

	before exposure.Difference
	known  bool // before is known
}

// situation returns what the exposure depends on, with the next state and the live rules
// without the guard, which the change removes.
func (p *Proof) situation(ctx context.Context) (exposure.Situation, error) {
	rules, err := p.Live(ctx)
	rules.Tables = slices.DeleteFunc(rules.Tables, func(t exposure.Table) bool { return t.Name == firewall.GuardTable })
	st := p.Next.At(p.Now)
	return report.Situation(p.Facts, p.Families, rules, &st), err
}

// difference returns how the live rules differ in effect from those of the next state.
func (p *Proof) difference(s exposure.Situation) exposure.Difference {
	st := p.Next.At(p.Now)
	return s.Compare(iptables.Model(st.Ruleset), report.Requirements(st.Desired))
}

// Begin remembers what is open and closed before the change. If predict is set, it
// returns the live rules as the change would leave them, and Begin checks these. The
// error is the reason to refuse the change.
func (p *Proof) Begin(ctx context.Context, predict func(live, own exposure.Ruleset) exposure.Ruleset) error {
	s, err := p.situation(ctx)
	if err != nil {
		return p.untested(err)
	}
	p.before, p.known = p.difference(s), true
	if predict == nil {
		return nil
	}
	st := p.Next.At(p.Now)
	s.Rules = predict(s.Rules, iptables.Model(st.Ruleset))
	return p.check(s, p.difference(s))
}

// End checks the loaded rules as Begin checks the predicted ones. What other rules
// opened or closed before is only a warning.
func (p *Proof) End(ctx context.Context) error {
	s, err := p.situation(ctx)
	if err != nil {
		return p.untested(err)
	}
	after := p.difference(s)
	if err := p.check(s, after); err != nil {
		return err
	}
	for _, err := range failures(s, p.Tests) {
		p.Log.Warn(err)
	}
	p.warn(after)
	return nil
}

// check returns an error if the rules of all programs differ more from the configured
// rules than before the change, or if a test fails.
func (p *Proof) check(s exposure.Situation, now exposure.Difference) error {
	if p.Force {
		return nil
	}
	failed := failures(s, p.Tests)
	var worse []error
	if p.known {
		by := now.Worse(p.before)
		for _, text := range append(report.Findings(by.Exposed), report.Findings(by.Blocked)...) {
			worse = append(worse, errors.New("after this change, "+text))
		}
	}
	err := errors.Join(append(failed, worse...)...)
	if err == nil {
		return nil
	}
	remedy := "change [test], or the other settings"
	if len(failed) == 0 {
		remedy = "remove this rule, or change the settings"
	}
	return hint.Wrap(fmt.Errorf("refused: %w", err), "%s", remedy)
}

// Warn logs what other rules open or close after a change that was not refused.
func (p *Proof) Warn(ctx context.Context) {
	s, err := p.situation(ctx)
	if err != nil {
		p.Log.WithError(err).Warn("it is not known what other rules open or close")
		return
	}
	p.warn(p.difference(s))
}

func (p *Proof) warn(d exposure.Difference) {
	for _, text := range append(report.Findings(d.Blocked), report.Findings(d.Exposed)...) {
		p.Log.Warn(text)
	}
}

// Test runs the tests alone.
func (p *Proof) Test(ctx context.Context) error {
	if len(p.Tests) == 0 {
		return nil
	}
	s, err := p.situation(ctx)
	if err != nil {
		return p.untested(err)
	}
	return p.check(s, exposure.Difference{})
}

// untested logs why the effect of the rules is not known. It returns an error if the
// settings contain tests.
func (p *Proof) untested(err error) error {
	if len(p.Tests) > 0 && !p.Force {
		return fmt.Errorf("refused: [test] cannot be checked: %w", err)
	}
	p.Log.WithError(err).Warn("the effect of this change is not checked")
	return nil
}

// failures runs the tests of the settings, and returns an error for each that fails.
func failures(s exposure.Situation, tests []settings.Assertion) (errs []error) {
	for _, t := range tests {
		x := exposure.Expectation{Name: t.String(), Allow: t.Allow, From: t.From, Proto: t.Proto, Ports: t.Ports}
		for _, text := range report.Findings(s.Failures([]exposure.Expectation{x})) {
			errs = append(errs, fmt.Errorf("[test] %s fails: %s", t, text))
		}
	}
	return errs
}
