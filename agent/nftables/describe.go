package nftables

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// describe returns a rule as text, similar to nft's. Do not compare it: different rules
// may have the same text.
func (r rule) describe() string {
	d := description{}
	for _, e := range r.exprs {
		d.expression(e)
	}
	// Omit protocols that another match implies.
	words := slices.DeleteFunc(d.words, func(w string) bool {
		network, isNetwork := strings.CutPrefix(w, "meta nfproto ")
		transport, isTransport := strings.CutPrefix(w, "meta l4proto ")
		return slices.ContainsFunc(d.words, func(o string) bool {
			first, _, _ := strings.Cut(o, " ")
			return isTransport && first == transport || isNetwork && first == map[string]string{"ipv4": "ip", "ipv6": "ip6"}[network]
		})
	})
	if comment, ok := userdata.GetString(r.userdata, userdata.TypeComment); ok {
		words = append(words, fmt.Sprintf("comment %q", comment))
	}
	return strings.Join(words, " ")
}

// description is the text of a rule so far, and the content of the register that is
// compared next.
type description struct {
	words []string
	load  string // the field in the register: "ip saddr", "tcp dport"
	proto string // the matched transport protocol, such as "tcp"
	ip    string // the matched network protocol: "ip" or "ip6"
	mask  []byte
}

func (d *description) say(format string, args ...any) {
	d.words = append(d.words, fmt.Sprintf(format, args...))
}

// known returns an empty expression by name, for those that can be described.
var known = map[string]func() expr.Any{
	"meta":    func() expr.Any { return &expr.Meta{} },
	"cmp":     func() expr.Any { return &expr.Cmp{} },
	"payload": func() expr.Any { return &expr.Payload{} },
	"bitwise": func() expr.Any { return &expr.Bitwise{} },
	"ct":      func() expr.Any { return &expr.Ct{} },
	"lookup":  func() expr.Any { return &expr.Lookup{} },
	"limit":   func() expr.Any { return &expr.Limit{} },
	"log":     func() expr.Any { return &expr.Log{} },
	"fib":     func() expr.Any { return &expr.Fib{} },
	"dynset":  func() expr.Any { return &expr.Dynset{} },
	"reject":  func() expr.Any { return &expr.Reject{} },
}

func (d *description) expression(e expression) {
	switch e.name {
	case "counter":
		d.say("counter")
		return
	case "byteorder":
		return
	case "immediate":
		d.say("%s", verdictName(e))
		return
	}
	var x expr.Any
	if empty := known[e.name]; empty != nil {
		x = empty()
	}
	if x == nil || expr.Unmarshal(unix.NFPROTO_INET, e.data, x) != nil {
		d.say("[%s]", e.name)
		return
	}
	switch x := x.(type) {
	case *expr.Meta:
		d.mask = nil
		names := map[expr.MetaKey]string{expr.MetaKeyIIFNAME: "iifname", expr.MetaKeyOIFNAME: "oifname", expr.MetaKeyNFPROTO: "meta nfproto",
			expr.MetaKeyL4PROTO: "meta l4proto", metaTime: "meta time", metaSecpath: "meta ipsec"}
		d.load = cmp.Or(names[x.Key], fmt.Sprintf("meta key %d", x.Key))
	case *expr.Payload:
		d.mask, d.load = nil, d.field(x)
	case *expr.Ct:
		d.mask, d.load = nil, "ct"
		if name := map[expr.CtKey]string{expr.CtKeySTATE: "ct state", expr.CtKeySTATUS: "ct status", expr.CtKeyPROTODST: "ct original proto-dst",
			expr.CtKeyDIRECTION: "ct direction"}[x.Key]; name != "" {
			d.load = name
		}
	case *expr.Fib:
		d.mask, d.load = nil, "fib"
		if x.FlagDADDR && x.ResultADDRTYPE {
			d.load = "fib daddr type"
		}
	case *expr.Bitwise:
		d.mask = x.Mask
	case *expr.Cmp:
		d.compare(x)
	case *expr.Lookup:
		not := ""
		if x.IsDestRegSet {
			not = "vmap "
		} else if x.Invert {
			not = "!= "
		}
		d.say("%s %s@%s", d.load, not, x.SetName)
	case *expr.Limit:
		d.say("%s", limitWords(x))
	case *expr.Log:
		d.say("log prefix %q", strings.TrimRight(string(x.Data), "\x00"))
	case *expr.Reject:
		d.say("reject")
	case *expr.Dynset:
		inner := "..."
		if len(x.Exprs) == 1 {
			if l, ok := x.Exprs[0].(*expr.Limit); ok {
				inner = limitWords(l)
			}
		}
		d.say("update @%s { %s %s }", x.SetName, d.load, inner)
	}
}

func limitWords(l *expr.Limit) string {
	over := ""
	if l.Over {
		over = "over "
	}
	for _, u := range units {
		if u.unit == l.Unit {
			return fmt.Sprintf("limit rate %s%d/%s burst %d packets", over, l.Rate, u.name, l.Burst)
		}
	}
	return fmt.Sprintf("limit rate %s%d", over, l.Rate)
}

func verdictName(e expression) string {
	v := &expr.Verdict{}
	if err := expr.Unmarshal(unix.NFPROTO_INET, e.data, v); err != nil {
		return "[immediate]"
	}
	names := map[expr.VerdictKind]string{expr.VerdictAccept: "accept", expr.VerdictDrop: "drop", expr.VerdictReturn: "return",
		expr.VerdictJump: "jump " + v.Chain, expr.VerdictGoto: "goto " + v.Chain}
	return cmp.Or(names[v.Kind], "[immediate]")
}

// field returns the name of a header field.
func (d *description) field(p *expr.Payload) string {
	type place struct {
		ip     string
		offset uint32
	}
	addresses := map[place]string{{"ip", 12}: "saddr", {"ip", 16}: "daddr", {"ip6", 8}: "saddr", {"ip6", 24}: "daddr"}
	switch name := addresses[place{d.ip, p.Offset}]; {
	case p.Base == expr.PayloadBaseNetworkHeader && name != "":
		return d.ip + " " + name
	case p.Base == expr.PayloadBaseNetworkHeader && d.ip == "ip6" && p.Offset == 7 && p.Len == 1:
		return "ip6 hoplimit"
	case p.Base != expr.PayloadBaseTransportHeader || d.proto == "":
	case strings.HasPrefix(d.proto, "icmp"):
		if p.Offset == 0 && p.Len == 1 {
			return d.proto + " type"
		}
	case p.Offset == 0 && p.Len == 2:
		return d.proto + " sport"
	case p.Offset == 2 && p.Len == 2:
		return d.proto + " dport"
	case p.Offset == 0 && p.Len == 4:
		return d.proto + " sport . dport"
	case p.Offset == 13 && p.Len == 1 && d.proto == "tcp":
		return "tcp flags"
	}
	return fmt.Sprintf("@%d,%d,%d", p.Base, 8*p.Offset, 8*p.Len)
}

func (d *description) compare(c *expr.Cmp) {
	op := map[expr.CmpOp]string{expr.CmpOpNeq: "!= ", expr.CmpOpLt: "< ", expr.CmpOpLte: "<= ", expr.CmpOpGt: "> ", expr.CmpOpGte: ">= "}[c.Op]
	switch {
	case d.load == "meta nfproto" && len(c.Data) == 1 && c.Op == expr.CmpOpEq:
		ip := map[byte]string{unix.NFPROTO_IPV4: "ipv4", unix.NFPROTO_IPV6: "ipv6"}[c.Data[0]]
		d.ip = map[string]string{"ipv4": "ip", "ipv6": "ip6"}[ip]
		d.say("meta nfproto %s", ip)
	case d.load == "meta l4proto" && len(c.Data) == 1 && c.Op == expr.CmpOpEq:
		if d.proto = firewall.ProtoName(c.Data[0]); d.proto == string(firewall.ICMPv6) {
			d.proto = "icmpv6"
		}
		d.say("meta l4proto %s", d.proto)
	case d.load == "meta ipsec" && len(c.Data) == 1 && c.Data[0] == 1 && c.Op == expr.CmpOpEq:
		d.say("meta ipsec exists")
	case d.load == "ct state" && d.mask != nil:
		var names []string
		for bit, name := range map[uint32]string{expr.CtStateBitINVALID: "invalid", expr.CtStateBitESTABLISHED: "established", expr.CtStateBitRELATED: "related", expr.CtStateBitNEW: "new", expr.CtStateBitUNTRACKED: "untracked"} {
			if len(d.mask) == 4 && binaryutil.NativeEndian.Uint32(d.mask)&bit != 0 {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		d.say("ct state %s", strings.Join(names, ","))
	case d.load == "ct status" && len(d.mask) == 4 && binaryutil.NativeEndian.Uint32(d.mask) == statusDNAT && op == "":
		d.say("ct status ! dnat")
	case d.load == "ct direction" && len(c.Data) == 1:
		d.say("ct direction %s%s", op, map[byte]string{0: "original", 1: "reply"}[c.Data[0]])
	case d.load == "tcp flags" && len(d.mask) == 1 && len(c.Data) == 1:
		d.say("tcp flags %s%s / %s", op, flagNames(firewall.TCPFlags(c.Data[0])), flagNames(firewall.TCPFlags(d.mask[0])))
	case strings.HasSuffix(d.load, "addr") && len(c.Data) <= 16:
		length := 8 * len(c.Data)
		if d.mask != nil {
			length = 0
			for _, b := range d.mask {
				length += bits.OnesCount8(b)
			}
		}
		d.say("%s %s%s", d.load, op, formatNetwork(d.ip, c.Data, length))
	case strings.HasSuffix(d.load, "port") && len(c.Data) == 2:
		d.say("%s %s%d", d.load, op, binary.BigEndian.Uint16(c.Data))
	case d.load == "iifname":
		name := strings.TrimRight(string(c.Data), "\x00")
		if len(c.Data) < unix.IFNAMSIZ {
			name += "*"
		}
		d.say("iifname %s%q", op, name)
	case d.load == "meta time" && len(c.Data) == 8:
		d.say("meta time %s%s", op, firewall.FormatTime(time.Unix(0, int64(binary.BigEndian.Uint64(c.Data)))))
	case (strings.HasSuffix(d.load, "type") || d.load == "ip6 hoplimit") && len(c.Data) == 1:
		d.say("%s %s%d", d.load, op, c.Data[0])
	default:
		d.say("%s %s0x%x", d.load, op, c.Data)
	}
}

func formatNetwork(ip string, data []byte, bits int) string {
	size := 4
	if ip == "ip6" {
		size = 16
	}
	full := make([]byte, max(size, len(data)))
	copy(full, data)
	a, ok := netip.AddrFromSlice(full[:size])
	if !ok || bits > 8*size {
		return fmt.Sprintf("0x%x", data)
	}
	return firewall.FormatPrefix(netip.PrefixFrom(a, bits))
}
