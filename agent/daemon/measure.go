package daemon

import (
	"context"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/report"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// MetricsFile is for the textfile collector of node_exporter. It contains no client
// address.
const MetricsFile = store.RunDir + "/basicfw.prom"

// repairable are the parts in the counter of repairs.
var repairable = []string{"rules", "files", "service"}

// count counts a repair of a part.
func (d *Daemon) count(part string) {
	if d.repaired == nil {
		d.repaired = map[string]int{}
	}
	d.repaired[part]++
}

// measure writes the metrics: the published status, and numbers that change without it.
// Errors are only logged.
func (d *Daemon) measure(ctx context.Context) {
	if d.status.Schema == 0 {
		return // none could be computed yet
	}
	m := report.Metrics{Status: d.status, Conntrack: d.status.Conntrack, Verified: LoadNote(d.System, d.now()).Verified, Repairs: map[string]int{}}
	for _, part := range repairable {
		m.Repairs[part] = d.repaired[part]
	}
	if c, err := host.ReadConntrack(); err == nil {
		m.Conntrack = c
	}
	var err error
	if d.status.State != report.NotBootstrapped {
		if m.Dropped, err = d.Dropped(ctx, d.status.Backend.Name == backend.Nftables); err != nil {
			d.Log.WithError(err).Debug("the counters of the rules could not be read")
		}
	}
	if err := (files.Change{Path: MetricsFile, Data: m.Text(), Mode: 0o644}).Apply(d.System); err != nil && ctx.Err() == nil {
		d.Log.WithError(err).Warn("the metrics could not be written")
	}
}
