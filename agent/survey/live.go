package survey

import (
	"context"
	"errors"

	"github.com/basicfw/basicfw-agent/agent/exposure"
	"github.com/basicfw/basicfw-agent/agent/iptables"
	"github.com/basicfw/basicfw-agent/agent/nftables"
)

type bans struct{}

// WithBans returns a context with which Live also reads our own rules for blocked sources,
// which are not needed to know what is open.
func WithBans(ctx context.Context) context.Context { return context.WithValue(ctx, bans{}, true) }

// Live returns a function that reads the rules of all programs in the kernel. If
// there is an error, it still returns those that could be read.
func Live(kernel *iptables.Backend) func(context.Context) (exposure.Ruleset, error) {
	return func(ctx context.Context) (exposure.Ruleset, error) {
		legacy := kernel.LegacyInUse()
		var saved []exposure.Table
		var unread error
		if legacy || nftables.Xtables() && kernel.There() {
			var err error
			// Without the programs, nf_tables still has the rules of the nft variant.
			if saved, err = kernel.Live(ctx); err != nil && legacy {
				unread = err
			}
		}
		tables, err := nftables.Live(saved, ctx.Value(bans{}) != nil)
		return exposure.Ruleset{Tables: tables}, errors.Join(err, unread)
	}
}
