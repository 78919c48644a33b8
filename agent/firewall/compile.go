package firewall

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
)

// LogPrefix is the prefix of the kernel's log line for a dropped packet.
const LogPrefix = "basicfw drop: "

// Limits of the baseline. They bound the replies and log lines that an attacker
// can cause, and are far above normal use.
var (
	pingRate = Rate{10, Second} // echo requests per source
	logRate  = Rate{1, Second}  // lines in the kernel log of each rule, all sources together
	// New SSH connections per source, unless configured otherwise.
	defaultSSHLimit = Rate{30, Minute}

	pingBurst = uint32(20)
	logBurst  = uint32(10)
)

// Compile returns the rules for the desired state, in both families. A service with a
// reserved or duplicate name is an error. A service that contains sshd's port opens
// only its other ports: see [Desired.SSHOverlaps].
func Compile(d Desired) (Ruleset, error) {
	if err := check(d); err != nil {
		return Ruleset{}, err
	}
	v4, v6 := compiler{family: IPv4, d: d}, compiler{family: IPv6, d: d}
	moved := map[time.Time]time.Time{}
	for _, t := range d.Timers {
		moved[t.For.UTC()] = t.Until
	}
	r := Ruleset{IPv4: v4.chains(), IPv6: v6.chains()}.Retimed(moved)
	return r, r.Check()
}

// Failsafe returns the desired state if no other is known: the baseline, SSH
// from any address with a rate limit, and no other port.
func Failsafe(sshPorts []uint16) Desired {
	return Desired{
		Profile:  Profile{Name: "failsafe", Title: "Failsafe", Ping: true},
		SSH:      SSH{Ports: sshPorts, Mode: SSHLimited, Limit: defaultSSHLimit},
		LogDrops: true, Published: PublishedProfile,
	}
}

func check(d Desired) error {
	var errs []error
	if len(d.SSH.Ports) == 0 {
		errs = append(errs, errors.New("no SSH port"))
	}
	if d.SSH.Mode != SSHPinned && d.SSH.Mode != SSHLimited {
		errs = append(errs, fmt.Errorf("unknown SSH mode %q", d.SSH.Mode))
	}
	if d.SSH.Mode == SSHPinned && len(d.SSH.Allow) == 0 && !d.SSH.Nobody {
		errs = append(errs, errors.New("SSH is pinned, but no source is allowed"))
	}
	if l := d.SSH.Limit; !l.IsZero() {
		if err := l.check(); err != nil {
			errs = append(errs, fmt.Errorf("SSH rate limit: %w", err))
		}
	}
	if d.SSH.Probation != nil && d.SSH.Mode != SSHPinned {
		errs = append(errs, fmt.Errorf("probation requires SSH mode %s, got %s", SSHPinned, d.SSH.Mode))
	}
	names := map[string]bool{}
	for _, s := range d.configured() {
		if err := CheckServiceName(s.Name); err != nil && !slices.Contains(reservedLater, s.Name) {
			errs = append(errs, fmt.Errorf("%s%w", at(s), err))
		}
		if s.File != "" && len(s.From) == 0 {
			errs = append(errs, fmt.Errorf("%s%s: %s contains no address", at(s), s.Name, s.File)) // not any address
		}
		if !s.Limit.IsZero() && s.Limit.check() != nil {
			errs = append(errs, fmt.Errorf("%s%s: %w", at(s), s.Name, s.Limit.check()))
		}
		if names[s.Name] {
			errs = append(errs, fmt.Errorf("%s%s is defined twice", at(s), s.Name))
		}
		names[s.Name] = true
	}
	blocked := 0
	for _, b := range d.Blocks {
		if err := CheckBlockName(b.Name); err != nil {
			errs = append(errs, err)
		}
		blocked += len(b.Networks)
	}
	if blocked > MaxBlocked {
		errs = append(errs, fmt.Errorf("[block] has %d networks: want at most %d", blocked, MaxBlocked))
	}
	return errors.Join(errs...)
}

// at returns the prefix of an error about a service: where it was configured.
func at(s Service) string {
	if s.Source == "" {
		return ""
	}
	return s.Source + ": "
}

// SSHPortError is the error for a service that contains sshd's port. Only the SSH settings open
// that port. For a profile's service it is not an error, but the service does not open the port.
type SSHPortError struct {
	Service Service
	Port    uint16
	Open    bool // it is one of [Desired.Open], not the profile's
}

// Loss returns what the service does not open.
func (e *SSHPortError) Loss() string {
	return fmt.Sprintf("%s%s = %s does not open port %d, where sshd listens", at(e.Service), e.Service.Name, e.Service, e.Port)
}

// Fix returns what to do about it.
func (e *SSHPortError) Fix() string {
	return "move sshd to another port, or run: basicfw-agent close " + e.Service.Name
}

func (e *SSHPortError) Error() string {
	return fmt.Sprintf("%s%s = %s contains port %d, where sshd listens: leave it out; \"allow\" in [ssh] sets the allowed sources",
		at(e.Service), e.Service.Name, e.Service, e.Port)
}

// compiler builds the chains of one family.
type compiler struct {
	family Family
	d      Desired
	extra  []Chain // chains other than InputChain, in order of their first jump
}

func (c *compiler) chains() []Chain {
	rules := slices.Concat(c.unlockAll(), c.trust(), c.probes(), c.icmp(), c.leases(), c.ssh())
	for _, s := range c.d.Services() {
		rules = append(rules, c.service(s)...)
	}
	in := Chain{Name: InputChain, Rules: append(rules, c.rest()...)}
	return slices.Concat([]Chain{in}, c.extra, c.forward())
}

// own returns the networks of the compiler's family.
func (c *compiler) own(list []netip.Prefix) []netip.Prefix {
	return without(list, func(p netip.Prefix) bool { return FamilyOf(p) != c.family })
}

// unlockComment marks the temporary rules of an unlock.
const unlockComment = "basicfw-unlock"

// unlockAll returns a temporary rule that accepts everything. The other rules keep
// connection tracking active, so that connections survive the end of the unlock.
func (c *compiler) unlockAll() []Rule {
	if u := c.d.Unlock; u != nil && u.All {
		return []Rule{{Until: u.Until, Comment: unlockComment, Target: Accept}}
	}
	return nil
}

// unlockSSH returns the temporary rules that accept SSH.
func (c *compiler) unlockSSH() []Rule {
	u := c.d.Unlock
	if u == nil || u.All {
		return nil
	}
	rule := Rule{State: StateOpen, Until: u.Until, Comment: unlockComment, Target: Accept}
	if len(u.From) == 0 {
		limit := c.d.SSH.Limit
		if limit.IsZero() {
			limit = defaultSSHLimit
		}
		rule.Limit = c.perSource("u", limit, limit.N)
		return []Rule{untracked(rule), rule}
	}
	var rules []Rule
	for _, p := range c.own(u.From) {
		rule.Src = source(p)
		rules = append(rules, rule)
	}
	return rules
}

// trust returns rows 1 to 3, which do not inspect packet headers.
func (c *compiler) trust() []Rule {
	rules := append([]Rule{{In: "lo", Comment: "basicfw-loopback", Target: Accept}}, c.block()...)
	rules = append(rules, Rule{State: StateEstablished, Comment: "basicfw-established", Target: Accept})
	for _, name := range c.d.TrustedNames() {
		rules = append(rules, Rule{In: name, Comment: "basicfw-trusted", Target: Accept})
	}
	return rules
}

// probes returns rows 4 to 7, for packets that no legitimate peer sends.
func (c *compiler) probes() []Rule {
	loopback := netip.MustParsePrefix(ByFamily(c.family, "127.0.0.0/8", "::1/128"))
	return []Rule{
		{Src: loopback, Comment: "basicfw-spoofed-loopback", Target: Drop},
		// With route_localnet=1, such a packet reaches what listens on loopback. Some cloud
		// providers translate the address of their metadata service to it. In nftables,
		// packets without a connection do not match StateNotDNAT.
		{Dst: loopback, State: StateNone, Comment: "basicfw-spoofed-loopback", Target: Drop},
		{Dst: loopback, State: StateNotDNAT, Comment: "basicfw-spoofed-loopback", Target: Drop},
		{Proto: TCP, Flags: &FlagMatch{Mask: AllFlags}, Comment: "basicfw-null", Target: Drop},
		{Proto: TCP, Flags: &FlagMatch{Mask: FIN | SYN | RST | ACK, Set: SYN, Invert: true}, State: StateNew, Comment: "basicfw-new-not-syn", Target: Drop},
		{Proto: TCP, Flags: &FlagMatch{Mask: AllFlags, Set: AllFlags}, Comment: "basicfw-xmas", Target: Drop},
	}
}

var linkLocal = netip.MustParsePrefix("fe80::/10")

// icmp returns rows 8 to 11. The IPv6 types are from RFC 4890, section 4.4.
func (c *compiler) icmp() []Rule {
	var rules []Rule
	accept := func(like Rule, types ...uint8) {
		for _, t := range types {
			like.Proto, like.ICMPType, like.Target = icmpOf(c.family), &t, Accept
			rules = append(rules, like)
		}
	}
	if c.family == IPv4 {
		rules = append(rules, Rule{Dst: netip.MustParsePrefix("224.0.0.0/4"), Proto: IGMP, Comment: "basicfw-igmp", Target: Accept})
	} else {
		accept(Rule{HopLimit: 255, Comment: "basicfw-nd"}, 133, 134, 135, 136)
		accept(Rule{Src: linkLocal, Comment: "basicfw-mld"}, 130, 131, 132, 143)
	}
	accept(Rule{Comment: "basicfw-icmp-error"}, ByFamily(c.family, []uint8{3, 11, 12}, []uint8{1, 2, 3, 4})...)
	rules = append(rules, Rule{State: StateInvalid, Comment: "basicfw-invalid", Target: Drop})
	if c.d.Profile.Ping {
		accept(Rule{Limit: c.perSource("p", pingRate, pingBurst), Comment: "basicfw-ping"}, ByFamily[uint8](c.family, 8, 128))
	}
	return rules
}

// leases returns row 12: this host as a DHCP client, and as a DNS and DHCP server
// for guests on its own bridges.
func (c *compiler) leases() []Rule {
	rules := c.answers()
	if c.family == IPv6 {
		// A server or relay may answer from a global address (RFC 8415, section 18.3.10).
		rules = []Rule{{Dst: linkLocal, Proto: UDP, DstPort: Port(546), Comment: "basicfw-dhcp", Target: Accept}}
	}
	server := ByFamily(c.family, Port(67), Port(547))
	for _, i := range c.d.Interfaces {
		if i.ServesGuests && CheckInterfaceName(i.Name, false) == nil {
			rules = append(rules,
				Rule{In: i.Name, Proto: UDP, DstPort: Port(53), Comment: "basicfw-guest-dns", Target: Accept},
				Rule{In: i.Name, Proto: TCP, DstPort: Port(53), Comment: "basicfw-guest-dns", Target: Accept},
				Rule{In: i.Name, Proto: UDP, DstPort: server, Comment: "basicfw-guest-dhcp", Target: Accept})
		}
	}
	return rules
}

// answers returns the rules for answers to a DHCP client over IPv4. An interface that has
// only permanent addresses has no lease to renew: it accepts broadcasts only, for a client
// that begins there, unless the settings open the client's port.
func (c *compiler) answers() []Rule {
	answer := Rule{Proto: UDP, SrcPort: Port(67), DstPort: Port(68), Comment: "basicfw-dhcp", Target: Accept}
	rules := []Rule{answer}
	rules[0].Dst = netip.MustParsePrefix("255.255.255.255/32")
	for _, i := range c.d.Interfaces {
		if i.IPv4 == Permanent && i.Zone != LoopbackZone && CheckInterfaceName(i.Name, false) == nil {
			drop := answer
			drop.In, drop.Target = i.Name, Drop
			rules = append(rules, drop)
		}
	}
	opens := func(s Service) bool { return s.Proto == UDP && s.Ports.Contains(68) }
	if len(rules) == 1 || slices.ContainsFunc(c.d.Services(), opens) {
		return []Rule{answer}
	}
	return append(rules, answer)
}

// ssh returns row 13. Its chain ends in a drop, so that no later row opens sshd's ports.
func (c *compiler) ssh() []Rule {
	chain := Chain{Name: SSHChain}
	for _, t := range c.d.SSH.Sources() {
		if FamilyOf(t.From) == c.family {
			chain.Rules = append(chain.Rules, Rule{Src: source(t.From), State: StateOpen, Until: t.Until, Comment: "basicfw-ssh", Target: Accept})
		}
	}
	chain.Rules = append(chain.Rules, c.unlockSSH()...)
	if p := c.d.SSH.Probation; c.d.SSH.Mode == SSHLimited || p != nil && !p.NoRule {
		rule := Rule{State: StateOpen, Comment: "basicfw-ssh-limit", Target: Accept}
		if c.d.SSH.Mode != SSHLimited {
			rule.Since = p.Until
		}
		if !c.d.SSH.Limit.IsZero() {
			// With a burst as large as the rate, a client can open several
			// sessions at once within the limit.
			rule.Limit = c.perSource("s", c.d.SSH.Limit, c.d.SSH.Limit.N)
			chain.Rules = append(chain.Rules, untracked(rule))
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

// untracked returns the rule for connections that limited accepts and that are exempt from
// conntrack. It accepts the packets after the first one: the limit counts only first packets.
func untracked(limited Rule) Rule {
	limited.Proto, limited.Flags = TCP, &FlagMatch{Mask: FIN | SYN | RST | ACK, Set: SYN, Invert: true}
	limited.State, limited.Limit = StateUntracked, nil
	return limited
}

// service returns the rules of one service (row 14), for each interface. Several sources
// are in a separate chain. A limit counts per service.
func (c *compiler) service(s Service) []Rule {
	sources := c.own(s.From)
	if len(s.From) > 0 && len(sources) == 0 {
		return nil // no source of this family is allowed
	}
	comment := "basicfw-" + s.Name
	rule := Rule{Proto: s.Proto, DstPort: s.Ports, State: StateOpen, IPsec: s.IPsec, Until: s.Until, Comment: comment, Target: Accept}
	switch {
	case len(sources) > 1:
		chain := Chain{Name: ChainPrefix + s.Name}
		if s.Proto == TCP && !s.Limit.IsZero() {
			for _, p := range sources {
				chain.Rules = append(chain.Rules, untracked(Rule{Src: source(p), Comment: comment, Target: Accept}))
			}
		}
		for _, p := range sources {
			chain.Rules = append(chain.Rules, Rule{Src: source(p), Limit: c.limit(s), Comment: comment, Target: Accept})
		}
		if !slices.ContainsFunc(c.extra, func(o Chain) bool { return o.Name == chain.Name }) { // the other part has added it
			c.extra = append(c.extra, chain)
		}
		rule.Target = chain.Name
	case len(sources) == 1:
		rule.Src = source(sources[0])
		fallthrough
	default:
		rule.Limit = c.limit(s)
	}
	var rules []Rule
	for _, name := range c.d.InterfacesOf(s.On) {
		rule.In = name
		if rule.Limit != nil && s.Proto == TCP {
			rules = append(rules, untracked(rule))
		}
		rules = append(rules, rule)
	}
	return rules
}

// limit returns the rate limit of a service, or nil.
func (c *compiler) limit(s Service) *Limit {
	if s.Limit.IsZero() {
		return nil
	}
	// The name of the kernel's table has no room for the service's name.
	h := fnv.New32a()
	h.Write([]byte(s.Name))
	const digits = 36 * 36 * 36 * 36 * 36
	id := strconv.FormatUint(uint64(h.Sum32())%digits+digits, 36) // six digits, the first is 1
	return c.perSource(id[1:], s.Limit, s.Limit.N)
}

// InterfacesOf returns the interfaces for "on WHERE": those of the zone, without
// names that rules cannot have, or the name itself, whose interface may appear later.
// For any, it returns a single "", which adds no interface match.
func (d Desired) InterfacesOf(where string) []string {
	switch Zone(where) {
	case AnyZone, "":
		return []string{""}
	case PublicZone, PrivateZone, VirtualZone:
		var names []string
		for _, i := range d.Interfaces {
			if string(i.Zone) == where && CheckInterfaceName(i.Name, false) == nil {
				names = append(names, i.Name)
			}
		}
		slices.Sort(names)
		return names
	}
	return []string{where}
}

// TrustedNames returns the interfaces on which everything is accepted: those that match
// Trusted and are in TrustedZone, and names whose interface may appear later.
func (d Desired) TrustedNames() (names []string) {
	for _, pattern := range d.Trusted {
		if !strings.HasSuffix(pattern, "*") && !slices.ContainsFunc(d.Interfaces, func(i Interface) bool { return i.Name == pattern }) {
			names = append(names, pattern)
		}
		for _, i := range d.Interfaces {
			if i.Zone == TrustedZone && MatchInterface(pattern, i.Name) && CheckInterfaceName(i.Name, false) == nil && !slices.Contains(names, i.Name) {
				names = append(names, i.Name)
			}
		}
	}
	return names
}

// rest returns rows 15 and 16, for packets that the policy drops, logged or not.
func (c *compiler) rest() []Rule {
	multicast := Rule{DstType: "MULTICAST", Comment: "basicfw-multicast", Target: Drop}
	rules := []Rule{{DstType: "BROADCAST", Comment: "basicfw-broadcast", Target: Drop}, multicast}
	if c.family == IPv6 { // it has no broadcast, and ip6tables 1.4.7 no address types
		multicast.DstType, multicast.Dst = "", netip.MustParsePrefix("ff00::/8")
		rules = []Rule{multicast}
	}
	if c.d.LogDrops {
		rules = append(rules, logRule("basicfw-log"))
	}
	return rules
}

func logRule(comment string) Rule {
	return Rule{Limit: &Limit{Rate: logRate, Burst: logBurst}, Comment: comment, Target: Log, LogPrefix: LogPrefix}
}

// perSource returns a rate limit per IPv4 address or IPv6 /64. Its unique name
// encodes its purpose and all its parameters.
func (c *compiler) perSource(what string, r Rate, burst uint32) *Limit {
	rate, _ := r.Canonical() // as iptables-save prints it
	// The burst follows from the rate for each purpose, so the rate is enough.
	name := fmt.Sprintf("bfw%d%s%d%s", c.family, what, r.N, strings.ToLower(string(r.Per[:1])))
	return &Limit{Rate: rate, Burst: burst, Name: name, SourceBits: ByFamily(c.family, 32, 64)}
}

// source returns p, or no match for the network of all addresses, as iptables-save does.
func source(p netip.Prefix) netip.Prefix {
	if p.Bits() == 0 {
		return netip.Prefix{}
	}
	return p
}
