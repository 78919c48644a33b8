package firewall

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"time"
)

// InputChain is the chain that INPUT jumps to. The names of our chains begin with
// ChainPrefix; those of other programs do not.
const (
	ChainPrefix = "BASICFW-"
	InputChain  = ChainPrefix + "INPUT"
	SSHChain    = ChainPrefix + "SSH"
	// Packets to other hosts, such as containers, pass these.
	ForwardChain   = ChainPrefix + "FORWARD"
	PublishedChain = ChainPrefix + "PUBLISHED"
	// ForwardBlockChain is BlockChain for what is published.
	ForwardBlockChain = ChainPrefix + "FORWARD-BLOCK"
)

// Targets of rules. Any other target is the name of a chain of the ruleset.
const (
	Accept = "ACCEPT"
	Drop   = "DROP"
	Log    = "LOG"
	Return = "RETURN" // to the calling chain
)

// State is a list of conntrack states, as iptables-save prints it.
type State string

// The states that rules match.
const (
	StateNew         State = "NEW"
	StateOpen        State = "NEW,UNTRACKED" // for a service, which may be exempt from conntrack
	StateInvalid     State = "INVALID"
	StateEstablished State = "ESTABLISHED"
	StateUntracked   State = "UNTRACKED"
	StateNone        State = "INVALID,UNTRACKED" // of no connection
	StateNotDNAT     State = "!DNAT"             // with its original destination
	// StateReply is the direction of a packet: towards the host that opened the connection.
	StateReply State = "REPLY"
	// StateRelated is in the rules of older states.
	StateRelated State = "RELATED,ESTABLISHED"
)

var states = []State{StateNew, StateOpen, StateInvalid, StateEstablished, StateUntracked, StateNone, StateNotDNAT, StateReply, StateRelated}

// FlagMatch compares the TCP flags in Mask with Set.
type FlagMatch struct {
	Mask   TCPFlags `json:"mask"`
	Set    TCPFlags `json:"set"`
	Invert bool     `json:"invert,omitempty"` // match if they differ
}

// TCPFlags are the low six bits of a TCP header's flags (RFC 9293, 3.1).
type TCPFlags uint8

// The six flags.
const (
	FIN TCPFlags = 1 << iota
	SYN
	RST
	PSH
	ACK
	URG
)

// Names returns the names of the flags as iptables prints them, or "" if none is set.
func (f TCPFlags) Names() string {
	var names []string
	for i, name := range []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG"} {
		if f&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ",")
}

// AllFlags are the six that iptables calls ALL.
const AllFlags = FIN | SYN | RST | PSH | ACK | URG

// Limit matches packets up to a rate. It counts all packets together, or each source
// separately if Name is set.
type Limit struct {
	Rate  Rate   `json:"rate"`
	Burst uint32 `json:"burst"`
	// Name is the name of the kernel's table of sources: 15 characters at most.
	// The kernel keeps the parameters of an existing table, so the name encodes
	// them.
	Name string `json:"name,omitempty"`
	// SourceBits is the prefix length that identifies a source.
	SourceBits int `json:"source_bits,omitempty"`
}

// Rule is one rule. A field with the zero value does not restrict the match.
type Rule struct {
	Src      netip.Prefix `json:"src,omitzero"`
	Dst      netip.Prefix `json:"dst,omitzero"`
	Sources  *Networks    `json:"sources,omitempty"` // instead of Src
	In       string       `json:"in,omitempty"`      // interface; a trailing "*" matches any suffix
	Out      string       `json:"out,omitempty"`
	Proto    Proto        `json:"proto,omitempty"`
	SrcPort  PortRange    `json:"src_port,omitzero"`
	DstPort  PortRange    `json:"dst_port,omitzero"`
	Dialled  bool         `json:"dialled,omitempty"` // DstPort is the port before DNAT
	Flags    *FlagMatch   `json:"flags,omitempty"`
	ICMPType *uint8       `json:"icmp_type,omitempty"`
	State    State        `json:"state,omitempty"`
	IPsec    bool         `json:"ipsec,omitempty"`    // the packet came by IPsec
	DstType  string       `json:"dst_type,omitempty"` // "BROADCAST" or "MULTICAST"
	Limit    *Limit       `json:"limit,omitempty"`
	HopLimit uint8        `json:"hop_limit,omitempty"` // IPv6 only
	// Since is the first second (UTC) in which the rule matches, and Until the
	// last; zero is no restriction.
	Since   time.Time `json:"since,omitzero"`
	Until   time.Time `json:"until,omitzero"`
	Comment string    `json:"comment"`
	Target  string    `json:"target"`
	// LogPrefix is the prefix of each line that a Log target writes, at level
	// debug (7).
	LogPrefix string `json:"log_prefix,omitempty"`
}

// Chain is a named list of rules. A packet that no rule accepts or drops returns to
// the calling chain.
type Chain struct {
	Name  string `json:"name"`
	Rules []Rule `json:"rules"`
	// Forward is set on chains for forwarded packets, which only drop: ForwardChain, and
	// those that it jumps to. In iptables they are in the table mangle.
	Forward bool `json:"forward,omitempty"`
}

// Ruleset is the chains that are loaded for each family, InputChain first. The rest
// is always the same: INPUT ends in a jump to InputChain and its policy is DROP;
// OUTPUT's policy is ACCEPT. If there is a ForwardChain, all forwarded packets pass it
// before the rules of other programs.
type Ruleset struct {
	IPv4 []Chain `json:"ipv4"`
	IPv6 []Chain `json:"ipv6"`
}

// Chains returns the chains of a family.
func (r Ruleset) Chains(f Family) []Chain { return ByFamily(f, r.IPv4, r.IPv6) }

// Forwards reports whether r has rules for forwarded packets.
func (r Ruleset) Forwards() bool {
	return slices.ContainsFunc(slices.Concat(r.IPv4, r.IPv6), func(c Chain) bool { return c.Forward })
}

// IsZero reports whether r is the zero value.
func (r Ruleset) IsZero() bool { return r.IPv4 == nil && r.IPv6 == nil }

// Equal reports whether r and o have the same rules in the same order.
func (r Ruleset) Equal(o Ruleset) bool { return reflect.DeepEqual(r, o) }

const (
	maxChainName = 28 // XT_EXTENSION_MAXNAMELEN less the NUL (linux/netfilter/x_tables.h)
	maxHashName  = 15 // the maximum of iptables 1.4.7 and hashlimit revision 0
)

// Check returns an error if r cannot be loaded: every text must consist of allowed
// characters, every jump must have a chain, and every match must fit its family. The
// result of Compile passes; a ruleset that was read from a file may not.
func (r Ruleset) Check() error {
	var errs []error
	for _, f := range Families {
		chains := r.Chains(f)
		if len(chains) == 0 || chains[0].Name != InputChain {
			errs = append(errs, fmt.Errorf("%v: the first chain is not %s", f, InputChain))
			continue
		}
		names := map[string]bool{}
		targets := map[bool]map[string]bool{false: {}, true: {}}
		for _, c := range chains {
			if !isWord(c.Name, maxChainName) || !strings.HasPrefix(c.Name, ChainPrefix) || names[c.Name] || c.Forward && c.Name == InputChain {
				errs = append(errs, fmt.Errorf("%v: chain %q: invalid or duplicate name", f, c.Name))
			}
			names[c.Name], targets[c.Forward][c.Name] = true, true
		}
		if len(targets[true]) > 0 && !targets[true][ForwardChain] {
			errs = append(errs, fmt.Errorf("%v: no chain %s", f, ForwardChain))
		}
		for _, c := range chains {
			for i, rule := range c.Rules {
				if err := rule.check(f, targets[c.Forward]); err != nil {
					errs = append(errs, fmt.Errorf("%v: chain %q, rule %d: %w", f, c.Name, i+1, err))
				}
			}
		}
	}
	return errors.Join(errs...)
}

func (r Rule) check(f Family, chains map[string]bool) error {
	for _, p := range []netip.Prefix{r.Src, r.Dst} {
		if p.IsValid() && (FamilyOf(p) != f || p.Masked() != p || p.Addr().Zone() != "" || p.Addr().Is4In6()) {
			return fmt.Errorf("network %q is invalid in %v", p, f)
		}
	}
	if err := r.Sources.check(f); err != nil || r.Sources != nil && r.Src.IsValid() {
		return cmp.Or(err, errors.New("two matches of the source"))
	}
	for _, name := range []string{r.In, r.Out} {
		if err := CheckInterfaceName(name, true); name != "" && err != nil {
			return err
		}
	}
	ports := !r.SrcPort.IsZero() || !r.DstPort.IsZero()
	switch {
	case r.Proto != "" && !r.Proto.validIn(f):
		return fmt.Errorf("protocol %q is invalid in %v", r.Proto, f)
	case ports && !r.Proto.HasPorts():
		return fmt.Errorf("ports without TCP, UDP or SCTP")
	case r.Dialled && (r.DstPort.IsZero() || !r.SrcPort.IsZero()):
		return fmt.Errorf("the dialled port is needed, and no other")
	case r.SrcPort.First > r.SrcPort.Last || r.DstPort.First > r.DstPort.Last:
		return fmt.Errorf("reversed port range")
	case r.Flags != nil && (r.Proto != TCP || r.Flags.Mask == 0 || r.Flags.Mask&^AllFlags != 0 || r.Flags.Set&^r.Flags.Mask != 0):
		return fmt.Errorf("invalid match of TCP flags")
	case r.ICMPType != nil && r.Proto != icmpOf(f):
		return fmt.Errorf("ICMP type without ICMP")
	case r.HopLimit != 0 && f != IPv6:
		return fmt.Errorf("hop limit is invalid in %v", f)
	case r.State != "" && !slices.Contains(states, r.State):
		return fmt.Errorf("unknown state %q", r.State)
	case r.DstType != "" && r.DstType != "BROADCAST" && r.DstType != "MULTICAST":
		return fmt.Errorf("unknown destination type %q", r.DstType)
	case !isWord(r.Comment, 60):
		return fmt.Errorf("invalid comment %q", r.Comment)
	case !r.Since.IsZero() && CheckTime(r.Since) != nil:
		return CheckTime(r.Since)
	case !r.Until.IsZero() && CheckTime(r.Until) != nil:
		return CheckTime(r.Until)
	case r.Target == Log && (r.LogPrefix == "" || len(r.LogPrefix) > 29 || strings.Trim(r.LogPrefix, "abcdefghijklmnopqrstuvwxyz: ") != ""):
		return fmt.Errorf("invalid log prefix %q", r.LogPrefix)
	case r.Target != Log && r.LogPrefix != "":
		return fmt.Errorf("log prefix without target %s", Log)
	case r.Target != Accept && r.Target != Drop && r.Target != Log && r.Target != Return && !chains[r.Target]:
		return fmt.Errorf("jump to unknown chain %q", r.Target)
	}
	if l := r.Limit; l != nil {
		if err := l.Rate.check(); err != nil {
			return err
		}
		switch {
		case l.Burst == 0 || l.Burst > 10000:
			return fmt.Errorf("burst outside 1 to 10000")
		case l.Name != "" && !isWord(l.Name, maxHashName):
			return fmt.Errorf("invalid rate limit name %q", l.Name)
		case l.SourceBits < 0 || l.SourceBits > 128 || l.SourceBits > 32 && f == IPv4:
			return fmt.Errorf("invalid source prefix length %d", l.SourceBits)
		}
	}
	return nil
}

func (r Rate) check() error {
	switch {
	case r.N == 0 || r.N > 10000:
		return fmt.Errorf("rate limit outside 1 to 10000")
	case seconds[r.Per] == 0:
		return fmt.Errorf("unknown unit %q", r.Per)
	}
	return nil
}

func icmpOf(f Family) Proto { return ByFamily(f, ICMP, ICMPv6) }

const alphanumeric = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

// isWord reports whether s consists of characters that iptables-save never quotes.
func isWord(s string, max int) bool {
	return s != "" && len(s) <= max && strings.Trim(s, alphanumeric+"_-") == ""
}
