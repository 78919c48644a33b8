// Package exposure computes what the live rules of all programs do to packets from
// outside: from which sources a port is reached, and which rule decides. It is pure.
//
// A match that is not modelled may match or not. So there are three answers: yes, no
// and perhaps. A packet that perhaps matches a rule both gets the rule's verdict and
// continues with the next rule.
package exposure

import (
	"net/netip"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Ruleset is the tables of all programs, without dormant tables.
type Ruleset struct{ Tables []Table }

// Table is a table of iptables or nftables.
type Table struct {
	Program string // "iptables", "iptables-legacy" or "nft"
	Family  string // "ip", "ip6", "inet" or "netdev"
	Name    string
	Chains  []Chain
}

// Hook is where the kernel calls a base chain.
type Hook string

// The hooks that a packet to this host, or through it, passes.
const (
	Ingress    Hook = "ingress"
	Prerouting Hook = "prerouting"
	Input      Hook = "input"
	Forward    Hook = "forward"
)

// Chain is a chain. A base chain has a hook.
type Chain struct {
	Name     string
	Hook     Hook     // "" if only rules lead to it
	Priority int      // lower ones come first
	NAT      bool     // of type nat: only the first packet of a connection passes
	Drop     bool     // the policy is DROP, otherwise ACCEPT
	Devices  []string // of an ingress chain
	Rules    []Rule
}

// Verdict is what a rule decides about the packets that it matches.
type Verdict int

// The verdicts. Undecided, such as that of NFQUEUE, ends the hook with an unknown result.
const (
	Next Verdict = iota // continue with the next rule
	Accept
	Drop // also REJECT
	Return
	Jump
	Goto
	Undecided
)

// Rule is a rule. The changes take effect before the verdict.
type Rule struct {
	Text      string // as its program prints it
	Matches   []Match
	Mark      *MarkChange
	Marks     bool // sets a mark that is not modelled
	Untracked bool // NOTRACK
	Translate *Translation
	Verdict   Verdict
	To        string // the chain of Jump and Goto
}

// MarkChange sets a packet's mark to (mark &^ Mask) ^ Value.
type MarkChange struct{ Mask, Value uint32 }

// Translation is a new destination of a connection.
type Translation struct {
	To    netip.Addr // invalid for an address of this host
	Port  uint16     // 0 keeps the port
	Known bool       // otherwise To and Port are one possibility of several
}

// Field is the property of a packet that a match examines.
type Field int

// The fields, and which members of Match each uses.
const (
	Unknown             Field = iota // not modelled: Text
	Sometimes                        // depends on rate or time: Text
	Any                              // one of several conjunctions: Of
	Interface                        // where the packet arrived: Names; a trailing "*" matches any suffix
	OutInterface                     // where a forwarded packet leaves, as Interface; others have none
	Source                           // Addrs
	Destination                      // Addrs
	Protocol                         // Numbers
	SourcePort                       // Numbers
	DestinationPort                  // Numbers
	ICMPType                         // Numbers: 256 * type + code
	TCPFlags                         // Numbers under Mask
	State                            // of conntrack: Names NEW, ESTABLISHED, RELATED, INVALID, UNTRACKED, DNAT
	Mark                             // Numbers under Mask
	DestinationType                  // Names LOCAL, BROADCAST, MULTICAST, UNICAST
	OriginalDestination              // before DNAT: Addrs
	OriginalPort                     // before DNAT: Numbers
)

// Match is a condition on a packet.
type Match struct {
	Field   Field
	Not     bool
	Names   []string
	Addrs   Sources
	Numbers []Span
	Mask    uint32
	Of      [][]Match
	Text    string
}

// Span is a range of numbers, with both ends.
type Span struct{ First, Last uint32 }

// Packet is the first packet of a connection, as a hook sees it. It has no source:
// all sources are traced at once.
type Packet struct {
	Family           firewall.Family
	In, Out          string // Out is set if the packet is forwarded; "?" is not known
	Dst              netip.Addr
	DstType          string // as in DestinationType; LOCAL is delivered
	Proto            uint8
	SrcPort, DstPort uint16 // SrcPort 0 is any
	ICMPType         uint16 // 256 * type + code
	TCPFlags         uint8
	Untracked        bool
	Mark             uint32
	Translated       bool       // by DNAT
	OrigDst          netip.Addr // before that
	OrigPort         uint16
	via              *Rule // that translated it
	early            bool  // conntrack has not seen it yet
	vague            bool  // Dst and DstPort are one of several possible ones
	marked           bool  // with an unknown mark instead of Mark
}

// Reference names a rule, or with Rule -1 the policy of its chain.
type Reference struct {
	Program, Family, Table, Chain string
	Rule                          int // from 0
	Text                          string
}
