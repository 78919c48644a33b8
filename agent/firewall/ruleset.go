package firewall

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"strings"
	"time"
)

// InputChain is the chain that INPUT jumps to. Every chain of ours begins with
// ChainPrefix, and no other program's does.
const (
	ChainPrefix = "BASICFW-"
	InputChain  = ChainPrefix + "INPUT"
	SSHChain    = ChainPrefix + "SSH"
)

// Targets of rules; any other target is the name of one of the ruleset's own
// chains.
const (
	Accept = "ACCEPT"
	Drop   = "DROP"
	Log    = "LOG"
)

// State is what conntrack knows about a packet, as iptables-save writes it.
type State string

// The states that rules ask for.
const (
	StateNew         State = "NEW"
	StateInvalid     State = "INVALID"
	StateEstablished State = "RELATED,ESTABLISHED"
)

// FlagMatch compares the TCP flags in Mask with Set.
type FlagMatch struct {
	Mask   TCPFlags `json:"mask"`
	Set    TCPFlags `json:"set"`
	Invert bool     `json:"invert,omitempty"` // match where they differ
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

// AllFlags are the six that iptables calls ALL.
const AllFlags = FIN | SYN | RST | PSH | ACK | URG

// Limit lets a number of packets through and then no longer matches. It counts
// all packets together, or where Name is set, each source on its own.
type Limit struct {
	Rate  Rate   `json:"rate"`
	Burst uint32 `json:"burst"`
	// Name is the kernel's table of sources: 15 characters at most. The
	// kernel keeps the parameters of a table that exists under a name, so the
	// name encodes them.
	Name string `json:"name,omitempty"`
	// SourceBits is how much of an address counts as one source.
	SourceBits int `json:"source_bits,omitempty"`
}

// Rule is one rule. A zero field does not restrict the match.
type Rule struct {
	Src      netip.Prefix `json:"src,omitzero"`
	Dst      netip.Prefix `json:"dst,omitzero"`
	In       string       `json:"in,omitempty"` // interface; a last "*" stands for any rest
	Proto    Proto        `json:"proto,omitempty"`
	SrcPort  PortRange    `json:"src_port,omitzero"`
	DstPort  PortRange    `json:"dst_port,omitzero"`
	Flags    *FlagMatch   `json:"flags,omitempty"`
	ICMPType *uint8       `json:"icmp_type,omitempty"`
	State    State        `json:"state,omitempty"`
	DstType  string       `json:"dst_type,omitempty"` // "BROADCAST" or "MULTICAST"
	Limit    *Limit       `json:"limit,omitempty"`
	HopLimit uint8        `json:"hop_limit,omitempty"` // IPv6 only
	// Since is the first second, UTC, in which the rule matches, and Until the
	// last; zero is always.
	Since   time.Time `json:"since,omitzero"`
	Until   time.Time `json:"until,omitzero"`
	Comment string    `json:"comment"`
	Target  string    `json:"target"`
	// LogPrefix stands before each line that a Log target writes, at level
	// debug (7).
	LogPrefix string `json:"log_prefix,omitempty"`
}

// Chain is a list of rules with a name. A packet that no rule decides returns
// to the chain that it came from.
type Chain struct {
	Name  string `json:"name"`
	Rules []Rule `json:"rules"`
}

// Ruleset is what is loaded: for each family the chains, InputChain first. The
// rest of a ruleset is always the same: INPUT ends in a jump to InputChain and
// its policy is DROP, OUTPUT's policy is ACCEPT.
type Ruleset struct {
	IPv4 []Chain `json:"ipv4"`
	IPv6 []Chain `json:"ipv6"`
}

// Chains gives one family's chains.
func (r Ruleset) Chains(f Family) []Chain {
	if f == IPv4 {
		return r.IPv4
	}
	return r.IPv6
}

// IsZero tells whether r is no ruleset at all.
func (r Ruleset) IsZero() bool { return r.IPv4 == nil && r.IPv6 == nil }

// Equal tells whether r and o are the same rules in the same order.
func (r Ruleset) Equal(o Ruleset) bool { return reflect.DeepEqual(r, o) }

const (
	maxChainName = 28 // XT_EXTENSION_MAXNAMELEN less the NUL (linux/netfilter/x_tables.h)
	maxHashName  = 15 // what iptables 1.4.7 and hashlimit revision 0 take
)

// Check tells whether r can be handed to a kernel: every text in it is of the
// letters that it may have, every jump has its chain, every match fits its
// family. What comes from Compile passes; what was read from a file may not.
func (r Ruleset) Check() error {
	var errs []error
	for _, f := range Families {
		chains := r.Chains(f)
		if len(chains) == 0 || chains[0].Name != InputChain {
			errs = append(errs, fmt.Errorf("%v: the first chain is not %s", f, InputChain))
			continue
		}
		known := map[string]bool{}
		for _, c := range chains {
			if !isWord(c.Name, maxChainName) || !strings.HasPrefix(c.Name, ChainPrefix) || known[c.Name] {
				errs = append(errs, fmt.Errorf("%v: chain %q: bad or double name", f, c.Name))
			}
			known[c.Name] = true
		}
		for _, c := range chains {
			for i, rule := range c.Rules {
				if err := rule.check(f, known); err != nil {
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
			return fmt.Errorf("network %q is not one of %v", p, f)
		}
	}
	if r.In != "" {
		if err := CheckInterfaceName(r.In, true); err != nil {
			return err
		}
	}
	ports := !r.SrcPort.IsZero() || !r.DstPort.IsZero()
	switch {
	case r.Proto != "" && r.Proto != TCP && r.Proto != UDP && r.Proto != icmpOf(f):
		return fmt.Errorf("protocol %q is not one of %v", r.Proto, f)
	case ports && r.Proto != TCP && r.Proto != UDP:
		return fmt.Errorf("ports without TCP or UDP")
	case r.SrcPort.First > r.SrcPort.Last || r.DstPort.First > r.DstPort.Last:
		return fmt.Errorf("reversed range of ports")
	case r.Flags != nil && (r.Proto != TCP || r.Flags.Mask == 0 || r.Flags.Mask&^AllFlags != 0 || r.Flags.Set&^r.Flags.Mask != 0):
		return fmt.Errorf("bad match of TCP flags")
	case r.ICMPType != nil && r.Proto != icmpOf(f):
		return fmt.Errorf("ICMP type without ICMP")
	case r.HopLimit != 0 && f != IPv6:
		return fmt.Errorf("hop limit in %v", f)
	case r.State != "" && r.State != StateNew && r.State != StateInvalid && r.State != StateEstablished:
		return fmt.Errorf("unknown state %q", r.State)
	case r.DstType != "" && r.DstType != "BROADCAST" && r.DstType != "MULTICAST":
		return fmt.Errorf("unknown type of destination %q", r.DstType)
	case !isWord(r.Comment, 60):
		return fmt.Errorf("bad comment %q", r.Comment)
	case !r.Since.IsZero() && CheckTime(r.Since) != nil:
		return CheckTime(r.Since)
	case !r.Until.IsZero() && CheckTime(r.Until) != nil:
		return CheckTime(r.Until)
	case r.Target == Log && (r.LogPrefix == "" || len(r.LogPrefix) > 29 || strings.Trim(r.LogPrefix, "abcdefghijklmnopqrstuvwxyz: ") != ""):
		return fmt.Errorf("bad log prefix %q", r.LogPrefix)
	case r.Target != Log && r.LogPrefix != "":
		return fmt.Errorf("a log prefix without %s", Log)
	case r.Target != Accept && r.Target != Drop && r.Target != Log && !chains[r.Target]:
		return fmt.Errorf("no chain %q to jump to", r.Target)
	}
	if l := r.Limit; l != nil {
		if err := l.Rate.check(); err != nil {
			return err
		}
		switch {
		case l.Burst == 0 || l.Burst > 10000:
			return fmt.Errorf("a limit outside 1 to 10000")
		case l.Name != "" && !isWord(l.Name, maxHashName):
			return fmt.Errorf("bad name of a limit %q", l.Name)
		case l.SourceBits < 0 || l.SourceBits > 128 || l.SourceBits > 32 && f == IPv4:
			return fmt.Errorf("%d bits of a source", l.SourceBits)
		}
	}
	return nil
}

func (r Rate) check() error {
	switch {
	case r.N == 0 || r.N > 10000:
		return fmt.Errorf("a limit outside 1 to 10000")
	case r.Per != Second && r.Per != Minute && r.Per != Hour && r.Per != Day:
		return fmt.Errorf("unknown unit %q", r.Per)
	}
	return nil
}

func icmpOf(f Family) Proto {
	if f == IPv4 {
		return ICMP
	}
	return ICMPv6
}

// isWord tells whether s is of letters that iptables-save never quotes.
func isWord(s string, max int) bool {
	return s != "" && len(s) <= max &&
		strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-") == ""
}
