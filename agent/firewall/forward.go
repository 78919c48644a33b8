package firewall

import "net/netip"

// Values of Desired.Published.
const (
	PublishedProfile = "profile" // only those that the profile or [open] opens are reachable
	PublishedLeave   = "leave"   // left to the program that publishes them
)

// ContainerPort is a port of a container, reached through an interface of this host such as
// a bridge.
type ContainerPort struct {
	Out   string    `json:"out"`
	Proto Proto     `json:"proto"`
	Ports PortRange `json:"ports"`
}

// forward returns the chains for forwarded packets. On public interfaces, a port that DNAT
// publishes is reachable only if the settings open the port that clients connect to, and
// never by blocked sources. Packets that no DNAT redirected are not affected, except those to
// the containers' own ports. Nothing is accepted here: that is left to other programs' rules.
func (c *compiler) forward() []Chain {
	block, held := c.drops(), c.d.Published == PublishedProfile
	if !held && len(block) == 0 {
		return nil
	}
	forward := Chain{Name: ForwardChain, Forward: true}
	if u := c.d.Unlock; u != nil && u.All {
		forward.Rules = append(forward.Rules, Rule{Until: u.Until, Comment: unlockComment, Target: Return})
	}
	chains := []Chain{{}}
	if len(block) > 0 { // ahead of established connections
		for _, name := range c.d.outside() {
			forward.Rules = append(forward.Rules, Rule{In: name, Comment: blockComment, Target: ForwardBlockChain})
		}
		block = append(notDNAT(Rule{Comment: "basicfw-routed", Target: Return}), block...)
		chains = append(chains, Chain{Name: ForwardBlockChain, Rules: block, Forward: true})
	}
	if held {
		forward.Rules = append(forward.Rules, Rule{State: StateEstablished, Comment: "basicfw-established", Target: Return})
		for _, name := range c.d.outside() {
			forward.Rules = append(forward.Rules, Rule{In: name, Comment: "basicfw-forward", Target: PublishedChain})
		}
		chains = append(chains, Chain{Name: PublishedChain, Rules: c.publishedPorts(), Forward: true})
	}
	chains[0] = forward
	return chains
}

// notDNAT returns a rule for packets that no DNAT redirected. In nftables, packets without a
// connection do not match StateNotDNAT.
func notDNAT(r Rule) (rules []Rule) {
	for _, r.State = range []State{StateNone, StateNotDNAT} {
		rules = append(rules, r)
	}
	return rules
}

// publishedPorts returns the rules for packets from public interfaces.
func (c *compiler) publishedPorts() (rules []Rule) {
	for _, p := range c.d.Direct {
		if CheckInterfaceName(p.Out, false) == nil {
			rules = append(rules, notDNAT(Rule{Out: p.Out, Proto: p.Proto, DstPort: p.Ports, Comment: "basicfw-direct", Target: Drop})...)
		}
	}
	rules = append(rules, notDNAT(Rule{Comment: "basicfw-routed", Target: Return})...)
	rules = append(rules, Rule{Proto: icmpOf(c.family), Comment: "basicfw-icmp", Target: Return})
	for _, s := range c.d.Services() {
		rules = append(rules, c.published(s)...)
	}
	if c.d.LogDrops {
		rules = append(rules, logRule("basicfw-log"))
	}
	return append(rules, Rule{Comment: "basicfw-published", Target: Drop})
}

// outside returns the public interfaces, or one "" for all if no interface is known.
func (d Desired) outside() []string {
	if len(d.Interfaces) == 0 {
		return []string{""}
	}
	return d.InterfacesOf(string(PublicZone))
}

// published returns the rules that let a service's clients reach it if a container
// publishes it. They are in one chain: nftables makes a set of the sources.
func (c *compiler) published(s Service) (rules []Rule) {
	sources := c.own(s.From)
	switch {
	case len(s.From) > 0 && len(sources) == 0:
		return nil // no source of this family is allowed
	case len(s.From) == 0:
		sources = []netip.Prefix{{}} // any
	}
	in := s.On
	switch Zone(s.On) {
	case PrivateZone, VirtualZone:
		return nil // the chain is for public interfaces
	case AnyZone, PublicZone:
		in = ""
	}
	for _, p := range sources {
		r := Rule{In: in, Proto: s.Proto, DstPort: s.Ports, Dialled: s.Proto.HasPorts(), IPsec: s.IPsec, Limit: c.limit(s), Until: s.Until, Comment: "basicfw-" + s.Name, Target: Return}
		if p.IsValid() {
			r.Src = source(p)
		}
		rules = append(rules, r)
	}
	return rules
}
