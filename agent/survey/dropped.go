package survey

import (
	"context"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/nftables"
)

// Dropped returns a function that reads the counters of our rules that drop, in
// nftables or in iptables.
func Dropped(kernel *iptables.Backend) func(ctx context.Context, inNftables bool) ([]firewall.Dropped, error) {
	return func(ctx context.Context, inNftables bool) ([]firewall.Dropped, error) {
		if inNftables {
			return nftables.Dropped()
		}
		return kernel.Dropped(ctx)
	}
}
