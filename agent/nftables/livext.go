package nftables

import (
	"encoding/binary"
	"net"
	"net/netip"

	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/exposure"
)

// iptables-save does not print a table with rules that iptables does not know.
// Therefore the most common extensions of iptables are decoded here too.

// The bits of states in the match conntrack (linux/netfilter/xt_conntrack.h), and of types
// in addrtype (xt_addrtype.h).
var (
	extensionStates = []named{{1, "INVALID"}, {2, "ESTABLISHED"}, {4, "RELATED"}, {8, "NEW"}, {128, "DNAT"}, {256, "UNTRACKED"}}
	extensionTypes  = []named{{2, "UNICAST"}, {4, "LOCAL"}, {8, "BROADCAST"}, {32, "MULTICAST"}}
)

func namesOf(list []named, bits uint32) (out []string) {
	for _, n := range list {
		if n.value&bits != 0 {
			out = append(out, n.name)
		}
	}
	return out
}

// extension returns the matches of an extension of iptables. The result is unknown if
// it has options that are not modelled.
func (t *translator) extension(w *way, a attributes) []exposure.Match {
	name, info := text(a[unix.NFTA_MATCH_NAME]), a[unix.NFTA_MATCH_INFO]
	unknown := []exposure.Match{{Field: exposure.Unknown, Text: "xt " + name}}
	switch name {
	case "multiport":
		return multiport(info, unknown)
	case "mark":
		if len(info) < 9 {
			return unknown
		}
		mark := binary.NativeEndian.Uint32(info)
		return []exposure.Match{{Field: exposure.Mark, Mask: binary.NativeEndian.Uint32(info[4:]), Numbers: []exposure.Span{{First: mark, Last: mark}}, Not: info[8] != 0}}
	case "limit", "hashlimit", "recent", "connlimit", "quota", "statistic", "time":
		return []exposure.Match{{Field: exposure.Sometimes, Text: "xt " + name}}
	}
	decoded, err := xt.Unmarshal(name, xt.TableFamily(w.family), uint32(number(a[unix.NFTA_MATCH_REV])), info)
	if err != nil {
		return unknown
	}
	span := func(field exposure.Field, ports [2]uint16, not bool) exposure.Match {
		return exposure.Match{Field: field, Numbers: []exposure.Span{{First: uint32(ports[0]), Last: uint32(ports[1])}}, Not: not}
	}
	every := [2]uint16{0, 65535}
	var out []exposure.Match
	ports := func(source, destination [2]uint16, inverted uint8) {
		if source != every {
			out = append(out, span(exposure.SourcePort, source, inverted&1 != 0))
		}
		if destination != every {
			out = append(out, span(exposure.DestinationPort, destination, inverted&2 != 0))
		}
	}
	switch x := decoded.(type) {
	case *xt.ConntrackMtinfo3:
		if xt.ConntrackFlags(x.MatchFlags)&^xt.ConntrackStateAlias == xt.ConntrackState {
			return []exposure.Match{{Field: exposure.State, Names: namesOf(extensionStates, uint32(x.StateMask)), Not: x.InvertFlags&uint16(xt.ConntrackState) != 0}}
		}
	case *xt.AddrTypeV1:
		const invertDestination = 2
		if x.Source == 0 && x.Flags&^invertDestination == 0 {
			return []exposure.Match{{Field: exposure.DestinationType, Names: namesOf(extensionTypes, uint32(x.Dest)), Not: x.Flags != 0}}
		}
	case *xt.Tcp:
		if x.Option == 0 {
			ports(x.SrcPorts, x.DstPorts, uint8(x.InvFlags))
			if x.FlagsMask != 0 {
				n := uint32(x.FlagsCmp)
				out = append(out, exposure.Match{Field: exposure.TCPFlags, Mask: uint32(x.FlagsMask), Numbers: []exposure.Span{{First: n, Last: n}}, Not: x.InvFlags&xt.TcpInvFlags != 0})
			}
			return out
		}
	case *xt.Udp:
		ports(x.SrcPorts, x.DstPorts, uint8(x.InvFlags))
		return out
	}
	return unknown
}

// multiport decodes struct xt_multiport_v1 (linux/netfilter/xt_multiport.h).
func multiport(info []byte, unknown []exposure.Match) []exposure.Match {
	const most, size = 15, 48
	if len(info) < size || info[1] > most || info[0] > 1 {
		return unknown
	}
	m := exposure.Match{Field: exposure.SourcePort, Not: info[size-1] != 0}
	if info[0] == 1 {
		m.Field = exposure.DestinationPort
	}
	port := func(i int) uint32 { return uint32(binary.NativeEndian.Uint16(info[2+2*i:])) }
	for i := 0; i < int(info[1]); i++ {
		s := exposure.Span{First: port(i), Last: port(i)}
		if ranged := info[2+2*most+i] != 0; ranged && i+1 < most {
			i++
			s.Last = port(i)
		}
		m.Numbers = append(m.Numbers, s)
	}
	return []exposure.Match{m}
}

// target translates a target of iptables, which ends the rule.
func (t *translator) target(w *way, a attributes) {
	name, info := text(a[unix.NFTA_TARGET_NAME]), a[unix.NFTA_TARGET_INFO]
	w.say("xt " + name)
	r := exposure.Rule{Verdict: exposure.Undecided}
	switch name {
	case "REJECT", "TARPIT":
		r.Verdict = exposure.Drop
	case "LOG", "NFLOG", "AUDIT", "TRACE", "TCPMSS", "TCPOPTSTRIP", "CHECKSUM", "CLASSIFY", "CONNSECMARK", "SECMARK", "DSCP", "TOS", "TTL", "HL", "TEE", "SET", "LED", "RATEEST", "HMARK":
		r.Verdict = exposure.Next
	case "CONNMARK":
		r.Verdict = exposure.Next
		const mode, restore = 12, 2 // XT_CONNMARK_RESTORE (linux/netfilter/xt_connmark.h)
		if len(info) > mode && info[mode] == restore {
			w.marks, w.changed = true, true
		}
	case "MASQUERADE", "SNAT":
		r.Verdict = exposure.Accept
	case "NOTRACK", "CT":
		r.Verdict = exposure.Next
		const without = 1 // XT_CT_NOTRACK
		w.untracked = name == "NOTRACK" || len(info) >= 2 && binary.NativeEndian.Uint16(info)&without != 0
		w.changed = true
	case "MARK":
		r.Verdict = exposure.Next
		if len(info) >= 8 {
			w.mark, w.changed = &exposure.MarkChange{Value: binary.NativeEndian.Uint32(info), Mask: binary.NativeEndian.Uint32(info[4:])}, true
		}
	case "DNAT", "REDIRECT":
		r.Verdict = exposure.Accept
		r.Translate = extensionTarget(xt.Unmarshal(name, xt.TableFamily(w.family), uint32(number(a[unix.NFTA_TARGET_REV])), info))
		if name == "REDIRECT" {
			r.Translate.To = netip.Addr{}
		}
	}
	t.end(*w, r)
}

func extensionTarget(info xt.InfoAny, err error) *exposure.Translation {
	to := func(min, max net.IP, first, last uint16) *exposure.Translation {
		a, _ := netip.AddrFromSlice(min)
		return &exposure.Translation{To: a.Unmap(), Port: first, Known: first == last && min.Equal(max)}
	}
	switch x := info.(type) {
	case *xt.NatRange2:
		return to(x.MinIP, x.MaxIP, x.MinPort, x.MaxPort)
	case *xt.NatRange:
		return to(x.MinIP, x.MaxIP, x.MinPort, x.MaxPort)
	case *xt.NatIPv4MultiRangeCompat:
		if len(*x) == 1 {
			return to((*x)[0].MinIP, (*x)[0].MaxIP, (*x)[0].MinPort, (*x)[0].MaxPort)
		}
	}
	return &exposure.Translation{}
}
