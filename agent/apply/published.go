package apply

import (
	"context"
	"slices"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/store"
)

// ContainerPorts returns the ports of containers that other programs publish now. If
// the rules cannot be read, it returns those of the previous state, which may be nil.
func (a *Applier) ContainerPorts(ctx context.Context, interfaces []firewall.Interface, previous *store.State) []firewall.ContainerPort {
	if !slices.ContainsFunc(interfaces, func(i firewall.Interface) bool { return i.Zone == firewall.VirtualZone }) {
		return nil
	}
	rules, err := a.Live(ctx)
	if err != nil {
		a.Log.WithError(err).Warn("it is not known which ports containers publish; the rules about them stay as they are")
		if previous == nil {
			return nil
		}
		return previous.Desired.Direct
	}
	return exposure.Situation{Rules: rules, Interfaces: interfaces}.ContainerPorts()
}
