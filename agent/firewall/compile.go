package firewall

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// LogPrefix begins the kernel's line about a packet that is about to be
// dropped.
const LogPrefix = "basicfw drop: "

// Limits of the baseline. They bound what an attacker can make the host say
// or write, and are far above what a person does.
var (
	pingRate = Rate{10, Second} // echo requests, each source
	logRate  = Rate{5, Second}  // lines in the kernel's log, all sources
	// New SSH connections of each source, where the owner has said nothing.
	defaultSSHLimit = Rate{30, Minute}

	pingBurst = uint32(20)
	logBurst  = uint32(10)
)

// Compile turns what is wanted into the rules for it, in both families. It is
// an error for a service to have a reserved or a double name, or to contain a
// port of sshd's: that would open SSH past the rows that guard it.
func Compile(d Desired) (Ruleset, error) {
	if err := check(d); err != nil {
		return Ruleset{}, err
	}
	var r Ruleset
	for _, f := range Families {
		c := compiler{family: f, d: d}
		chains := c.chains()
		if f == IPv4 {
			r.IPv4 = chains
		} else {
			r.IPv6 = chains
		}
	}
	return r, r.Check()
}

// Failsafe is wanted where nothing better is known: the baseline, SSH limited
// from anywhere, and no other port.
func Failsafe(sshPorts []uint16) Desired {
	return Desired{
		Profile:  Profile{Name: "failsafe", Title: "Failsafe", Ping: true},
		SSH:      SSH{Ports: sshPorts, Mode: SSHLimited, Limit: defaultSSHLimit},
		LogDrops: true,
	}
}

func check(d Desired) error {
	var errs []error
	if len(d.SSH.Ports) == 0 {
		errs = append(errs, errors.New("no port for SSH"))
	}
	if d.SSH.Mode != SSHPinned && d.SSH.Mode != SSHLimited {
		errs = append(errs, fmt.Errorf("unknown SSH mode %q", d.SSH.Mode))
	}
	if d.SSH.Mode == SSHPinned && len(d.SSH.Allow) == 0 && !d.SSH.Nobody {
		errs = append(errs, errors.New("SSH is pinned to nobody"))
	}
	if l := d.SSH.Limit; !l.IsZero() {
		if err := l.check(); err != nil {
			errs = append(errs, fmt.Errorf("the limit of SSH: %w", err))
		}
	}
	if d.SSH.Probation != nil && d.SSH.Mode != SSHPinned {
		errs = append(errs, fmt.Errorf("probation where SSH is %s", d.SSH.Mode))
	}
	names := map[string]bool{}
	for _, s := range d.Services() {
		at := ""
		if s.Source != "" {
			at = s.Source + ": "
		}
		if err := CheckServiceName(s.Name); err != nil {
			errs = append(errs, fmt.Errorf("%s%w", at, err))
		}
		if names[s.Name] {
			errs = append(errs, fmt.Errorf("%s%s is there twice", at, s.Name))
		}
		names[s.Name] = true
		for _, p := range d.SSH.Ports {
			if s.Proto == TCP && s.Ports.Contains(p) {
				errs = append(errs, &SSHPortError{Service: s, Port: p})
			}
		}
	}
	return errors.Join(errs...)
}

// SSHPortError says that a service contains a port where sshd listens. Who may
// log in is decided by the SSH settings alone.
type SSHPortError struct {
	Service Service
	Port    uint16
}

func (e *SSHPortError) Error() string {
	at := ""
	if e.Service.Source != "" {
		at = e.Service.Source + ": "
	}
	return fmt.Sprintf("%s%s = %s contains port %d, where sshd listens: leave it out; \"allow\" in [ssh] says who may log in",
		at, e.Service.Name, e.Service, e.Port)
}

// compiler makes one family's chains.
type compiler struct {
	family Family
	d      Desired
	extra  []Chain // besides InputChain, in order of their first jump
}

func (c *compiler) chains() []Chain {
	in := Chain{Name: InputChain}
	add := func(rules ...Rule) { in.Rules = append(in.Rules, rules...) }
	add(c.unlockAll()...)
	add(c.trust()...)
	add(c.probes()...)
	add(c.icmp()...)
	add(c.leases()...)
	add(c.ssh()...)
	for _, s := range c.d.Services() {
		add(c.service(s)...)
	}
	add(c.rest()...)
	return append([]Chain{in}, c.extra...)
}

// unlockComment is on the rules that let somebody in for a while.
const unlockComment = "basicfw-unlock"

// unlockAll is no filtering at all, for a while. What else there is goes on to
// have the kernel track connections, so that they live on afterwards.
func (c *compiler) unlockAll() []Rule {
	if u := c.d.Unlock; u != nil && u.All {
		return []Rule{{Until: u.Until, Comment: unlockComment, Target: Accept}}
	}
	return nil
}

// unlockSSH lets in over SSH, for a while.
func (c *compiler) unlockSSH() []Rule {
	u := c.d.Unlock
	if u == nil || u.All {
		return nil
	}
	rule := Rule{State: StateNew, Until: u.Until, Comment: unlockComment, Target: Accept}
	if len(u.From) == 0 {
		limit := c.d.SSH.Limit
		if limit.IsZero() {
			limit = defaultSSHLimit
		}
		rule.Limit = c.perSource("u", limit, limit.N)
		return []Rule{rule}
	}
	var rules []Rule
	for _, p := range u.From {
		if FamilyOf(p) == c.family {
			rule.Src = source(p)
			rules = append(rules, rule)
		}
	}
	return rules
}

// trust is rows 1 to 3: what needs no look at the packet.
func (c *compiler) trust() []Rule {
	rules := []Rule{
		{In: "lo", Comment: "basicfw-loopback", Target: Accept},
		{State: StateEstablished, Comment: "basicfw-established", Target: Accept},
	}
	for _, name := range c.d.Trusted {
		rules = append(rules, Rule{In: name, Comment: "basicfw-trusted", Target: Accept})
	}
	return rules
}

// probes is rows 4 to 7: packets that no honest peer sends.
func (c *compiler) probes() []Rule {
	loopback := netip.MustParsePrefix("127.0.0.0/8")
	if c.family == IPv6 {
		loopback = netip.MustParsePrefix("::1/128")
	}
	return []Rule{
		{Src: loopback, Comment: "basicfw-spoofed-loopback", Target: Drop},
		{Proto: TCP, Flags: &FlagMatch{Mask: AllFlags}, Comment: "basicfw-null", Target: Drop},
		{Proto: TCP, Flags: &FlagMatch{Mask: FIN | SYN | RST | ACK, Set: SYN, Invert: true}, State: StateNew, Comment: "basicfw-new-not-syn", Target: Drop},
		{Proto: TCP, Flags: &FlagMatch{Mask: AllFlags, Set: AllFlags}, Comment: "basicfw-xmas", Target: Drop},
	}
}

// icmp is rows 8 to 11. What IPv6 needs is from RFC 4890, 4.4.
func (c *compiler) icmp() []Rule {
	var rules []Rule
	linkLocal := netip.MustParsePrefix("fe80::/10")
	errorTypes, echo := []uint8{3, 11, 12}, uint8(8)
	if c.family == IPv6 {
		errorTypes, echo = []uint8{1, 2, 3, 4}, 128
		for _, t := range []uint8{133, 134, 135, 136} {
			rules = append(rules, Rule{Proto: ICMPv6, ICMPType: &t, HopLimit: 255, Comment: "basicfw-nd", Target: Accept})
		}
		for _, t := range []uint8{130, 131, 132, 143} {
			rules = append(rules, Rule{Src: linkLocal, Proto: ICMPv6, ICMPType: &t, Comment: "basicfw-mld", Target: Accept})
		}
	}
	for _, t := range errorTypes {
		rules = append(rules, Rule{Proto: icmpOf(c.family), ICMPType: &t, Comment: "basicfw-icmp-error", Target: Accept})
	}
	rules = append(rules, Rule{State: StateInvalid, Comment: "basicfw-invalid", Target: Drop})
	if c.d.Profile.Ping {
		rules = append(rules, Rule{Proto: icmpOf(c.family), ICMPType: &echo,
			Limit: c.perSource("p", pingRate, pingBurst), Comment: "basicfw-ping", Target: Accept})
	}
	return rules
}

// leases is row 12: this host as a DHCP client, and as the server of the
// guests on its own bridges.
func (c *compiler) leases() []Rule {
	var rules []Rule
	if c.family == IPv4 {
		rules = append(rules, Rule{Proto: UDP, SrcPort: Port(67), DstPort: Port(68), Comment: "basicfw-dhcp", Target: Accept})
	} else {
		rules = append(rules, Rule{Src: netip.MustParsePrefix("fe80::/10"), Proto: UDP, DstPort: Port(546), Comment: "basicfw-dhcp", Target: Accept})
	}
	server := Port(67)
	if c.family == IPv6 {
		server = Port(547)
	}
	for _, i := range c.d.Interfaces {
		if i.ServesGuests {
			rules = append(rules,
				Rule{In: i.Name, Proto: UDP, DstPort: Port(53), Comment: "basicfw-guest-dns", Target: Accept},
				Rule{In: i.Name, Proto: TCP, DstPort: Port(53), Comment: "basicfw-guest-dns", Target: Accept},
				Rule{In: i.Name, Proto: UDP, DstPort: server, Comment: "basicfw-guest-dhcp", Target: Accept})
		}
	}
	return rules
}

// ssh is row 13. It ends in a drop, so that no later row can open the ports.
func (c *compiler) ssh() []Rule {
	chain := Chain{Name: SSHChain}
	for _, p := range c.d.SSH.Allow {
		if FamilyOf(p) == c.family {
			chain.Rules = append(chain.Rules, Rule{Src: source(p), State: StateNew, Comment: "basicfw-ssh", Target: Accept})
		}
	}
	for _, t := range c.d.SSH.Timed {
		if FamilyOf(t.From) == c.family {
			chain.Rules = append(chain.Rules, Rule{Src: source(t.From), State: StateNew, Until: t.Until, Comment: "basicfw-ssh", Target: Accept})
		}
	}
	chain.Rules = append(chain.Rules, c.unlockSSH()...)
	if p := c.d.SSH.Probation; c.d.SSH.Mode == SSHLimited || p != nil && !p.NoRule {
		rule := Rule{State: StateNew, Comment: "basicfw-ssh-limit", Target: Accept}
		if c.d.SSH.Mode != SSHLimited {
			rule.Since = p.Until
		}
		if !c.d.SSH.Limit.IsZero() {
			// A burst as large as the rate lets a person's tools open several
			// sessions at once, within the minute's sum.
			rule.Limit = c.perSource("s", c.d.SSH.Limit, c.d.SSH.Limit.N)
		}
		chain.Rules = append(chain.Rules, rule)
	}
	if c.d.LogDrops {
		chain.Rules = append(chain.Rules, logRule("basicfw-ssh-log"))
	}
	chain.Rules = append(chain.Rules, Rule{Comment: "basicfw-ssh-drop", Target: Drop})
	c.extra = append(c.extra, chain)

	var rules []Rule
	ports := slices.Clone(c.d.SSH.Ports)
	slices.Sort(ports)
	for _, p := range slices.Compact(ports) {
		rules = append(rules, Rule{Proto: TCP, DstPort: Port(p), Comment: "basicfw-ssh", Target: SSHChain})
	}
	return rules
}

// service is a part of row 14: one rule for each interface that the service is
// on, with the sources in a chain of their own where there are several.
func (c *compiler) service(s Service) []Rule {
	var sources []netip.Prefix
	for _, p := range s.From {
		if FamilyOf(p) == c.family {
			sources = append(sources, p)
		}
	}
	if len(s.From) > 0 && len(sources) == 0 {
		return nil // nobody of this family may reach it
	}
	comment := "basicfw-" + s.Name
	rule := Rule{Proto: s.Proto, DstPort: s.Ports, State: StateNew, Until: s.Until, Comment: comment, Target: Accept}
	switch {
	case len(sources) == 1:
		rule.Src = source(sources[0])
	case len(sources) > 1:
		chain := Chain{Name: ChainPrefix + s.Name}
		for _, p := range sources {
			chain.Rules = append(chain.Rules, Rule{Src: source(p), Comment: comment, Target: Accept})
		}
		c.extra = append(c.extra, chain)
		rule.Target = chain.Name
	}
	var rules []Rule
	for _, name := range c.d.InterfacesOf(s.On) {
		r := rule
		r.In = name
		rules = append(rules, r)
	}
	return rules
}

// InterfacesOf gives the interfaces that "on WHERE" means: those of the zone,
// or the name itself, which may belong to an interface that comes later. For
// any it is one "", which is no match at all.
func (d Desired) InterfacesOf(where string) []string {
	switch Zone(where) {
	case AnyZone, "":
		return []string{""}
	case PublicZone, PrivateZone, VirtualZone:
		var names []string
		for _, i := range d.Interfaces {
			if string(i.Zone) == where {
				names = append(names, i.Name)
			}
		}
		slices.Sort(names)
		return names
	}
	return []string{where}
}

// rest is rows 15 and 16: what falls to the policy, said or unsaid.
func (c *compiler) rest() []Rule {
	var rules []Rule
	if c.family == IPv4 { // IPv6 has no broadcast
		rules = append(rules, Rule{DstType: "BROADCAST", Comment: "basicfw-broadcast", Target: Drop})
	}
	rules = append(rules, Rule{DstType: "MULTICAST", Comment: "basicfw-multicast", Target: Drop})
	if c.d.LogDrops {
		rules = append(rules, logRule("basicfw-log"))
	}
	return rules
}

func logRule(comment string) Rule {
	return Rule{Limit: &Limit{Rate: logRate, Burst: logBurst}, Comment: comment, Target: Log, LogPrefix: LogPrefix}
}

// perSource is a limit for each IPv4 address or IPv6 /64. Its name says what
// it is for and all its parameters; nothing else may have the same name.
func (c *compiler) perSource(what string, r Rate, burst uint32) *Limit {
	rate, _ := r.Canonical() // as iptables-save prints it
	l := &Limit{Rate: rate, Burst: burst, SourceBits: 32}
	if c.family == IPv6 {
		l.SourceBits = 64
	}
	// The burst follows from the rate for both uses, so the rate is enough.
	l.Name = fmt.Sprintf("bfw%d%s%d%s", c.family, what, r.N, strings.ToLower(string(r.Per[:1])))
	return l
}

// source leaves out the network that every address is in: iptables-save does.
func source(p netip.Prefix) netip.Prefix {
	if p.Bits() == 0 {
		return netip.Prefix{}
	}
	return p
}
