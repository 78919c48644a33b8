package main

import (
	"fmt"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// showPlan prints what would change: lines that would go with "-", lines that
// would come with "+".
func (a *app) showPlan(st store.State, previous *store.State, out agent.Outcome, r convergeRequest) error {
	if !out.Changed {
		fmt.Fprintf(a.stdout, "nothing would change: profile %s\n", st.Profile.Name)
		return nil
	}
	fmt.Fprintf(a.stdout, "profile %s (%s)\nssh %s\n", st.Profile.Name, st.Profile.Reason, sshSentence(st))
	for _, m := range out.Others {
		fmt.Fprintf(a.stdout, "would stop and disable %s\n", m.Name)
	}
	where := ""
	heading := func(family, chain string) {
		if at := family + " " + chain; at != where {
			fmt.Fprintln(a.stdout, at)
			where = at
		}
	}
	for _, d := range out.Inspection.Drift {
		heading(d.Family, d.Chain)
		if d.Kind != firewall.Missing {
			fmt.Fprintf(a.stdout, "- %s\n", d.Got)
		}
		if d.Kind != firewall.Extra {
			fmt.Fprintf(a.stdout, "+ %s\n", d.Want)
		}
	}
	if r.clear && previous == nil {
		for _, f := range out.Inspection.Foreign {
			heading(f.Family, f.Chain)
			fmt.Fprintf(a.stdout, "- %s\n", f.Rule)
		}
	}
	for _, f := range out.Files {
		fmt.Fprintf(a.stdout, "would write %s\n", f)
	}
	for _, f := range out.Gone {
		fmt.Fprintf(a.stdout, "would remove %s\n", f)
	}
	if out.Registered {
		fmt.Fprintln(a.stdout, "would register the service")
	}
	if r.exitCodeDrift {
		return &silentError{exitDrift}
	}
	return nil
}
