package iptables

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Dropped returns the counters of our rules that drop, and of the policy of INPUT.
func (b *Backend) Dropped(ctx context.Context) (out []firewall.Dropped, err error) {
	for _, f := range b.families {
		name := program(f, "-save")
		res, err := b.run(ctx, system.Command{Name: name, Args: []string{"-c"}})
		if err != nil {
			return nil, fmt.Errorf("reading the counters with %s: %w", name, err)
		}
		out = append(out, dropped(f, string(res.Stdout))...)
	}
	return out, nil
}

// dropped returns the counters in the output of iptables-save -c.
func dropped(f firewall.Family, text string) (out []firewall.Dropped) {
	var (
		// Some versions print a quoted comment, or a space at the end.
		rules  = regexp.MustCompile(`^\[(\d+):\d+\] -A ` + firewall.ChainPrefix + `.* --comment "?basicfw-([a-z0-9-]+)"? .*-j DROP ?$`)
		policy = regexp.MustCompile(`^:` + input + ` DROP \[(\d+):\d+\]$`)
		table  string
	)
	for _, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(line, "*") {
			table = line[1:]
		}
		rule := firewall.Policy
		m := rules.FindStringSubmatch(line)
		if m != nil {
			rule = m[2]
		} else if m = policy.FindStringSubmatch(line); m == nil || table != filter {
			continue
		}
		n, err := strconv.ParseUint(m[1], 10, 64)
		if err == nil {
			out = append(out, firewall.Dropped{Family: f.String(), Rule: rule, Packets: n})
		}
	}
	return out
}
