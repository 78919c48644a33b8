package nftables

import (
	"encoding/binary"
	"fmt"
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

// describe is a rule for people, much as nft would print it. It is no ground for
// a decision: two rules may read the same and differ.
func (r rule) describe() string {
	d := description{}
	for _, e := range r.exprs {
		d.expression(e)
	}
	words := d.words
	// What follows from the next word goes unsaid.
	words = slices.DeleteFunc(words, func(w string) bool {
		of, number, ok := strings.Cut(w, " ")
		if !ok || of != "nfproto" && of != "l4proto" {
			return false
		}
		return slices.ContainsFunc(words, func(o string) bool {
			first, _, _ := strings.Cut(o, " ")
			return first == number || of == "nfproto" && first == map[string]string{"ipv4": "ip", "ipv6": "ip6"}[number]
		})
	})
	for i, w := range words {
		if strings.HasPrefix(w, "nfproto ") || strings.HasPrefix(w, "l4proto ") {
			words[i] = "meta " + w
		}
	}
	if comment, ok := userdata.GetString(r.userdata, userdata.TypeComment); ok {
		words = append(words, fmt.Sprintf("comment %q", comment))
	}
	return strings.Join(words, " ")
}

// description is what has been said of a rule, and what the register holds that
// is compared next.
type description struct {
	words []string
	load  string // of what it is: "ip saddr", "tcp dport"
	proto string // "tcp", where it was asked for
	ip    string // "ip" or "ip6", where it was asked for
	mask  []byte
}

func (d *description) say(format string, args ...any) {
	d.words = append(d.words, fmt.Sprintf(format, args...))
}

// known are the expressions that can be told.
var known = map[string]func() expr.Any{
	"meta": func() expr.Any { return &expr.Meta{} }, "cmp": func() expr.Any { return &expr.Cmp{} },
	"payload": func() expr.Any { return &expr.Payload{} }, "bitwise": func() expr.Any { return &expr.Bitwise{} },
	"ct": func() expr.Any { return &expr.Ct{} }, "lookup": func() expr.Any { return &expr.Lookup{} },
	"limit": func() expr.Any { return &expr.Limit{} }, "log": func() expr.Any { return &expr.Log{} },
	"fib": func() expr.Any { return &expr.Fib{} }, "dynset": func() expr.Any { return &expr.Dynset{} },
	"reject": func() expr.Any { return &expr.Reject{} },
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
	make, ok := known[e.name]
	if !ok {
		d.say("[%s]", e.name)
		return
	}
	x := make()
	if err := expr.Unmarshal(unix.NFPROTO_INET, e.data, x); err != nil {
		d.say("[%s]", e.name)
		return
	}
	switch x := x.(type) {
	case *expr.Meta:
		d.mask = nil
		d.load = map[expr.MetaKey]string{expr.MetaKeyIIFNAME: "iifname", expr.MetaKeyNFPROTO: "nfproto", expr.MetaKeyL4PROTO: "l4proto", metaTime: "meta time"}[x.Key]
		if d.load == "" {
			d.load = fmt.Sprintf("meta key %d", x.Key)
		}
	case *expr.Payload:
		d.mask, d.load = nil, d.field(x)
	case *expr.Ct:
		d.mask, d.load = nil, "ct"
		if x.Key == expr.CtKeySTATE {
			d.load = "ct state"
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
		if x.Invert {
			not = "!= "
		}
		if x.IsDestRegSet {
			not = "vmap "
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
	switch v.Kind {
	case expr.VerdictAccept:
		return "accept"
	case expr.VerdictDrop:
		return "drop"
	case expr.VerdictReturn:
		return "return"
	case expr.VerdictJump:
		return "jump " + v.Chain
	case expr.VerdictGoto:
		return "goto " + v.Chain
	}
	return "[immediate]"
}

// field names what is at a place of a header.
func (d *description) field(p *expr.Payload) string {
	switch {
	case p.Base == expr.PayloadBaseNetworkHeader && d.ip == "ip" && p.Offset == 12:
		return "ip saddr"
	case p.Base == expr.PayloadBaseNetworkHeader && d.ip == "ip" && p.Offset == 16:
		return "ip daddr"
	case p.Base == expr.PayloadBaseNetworkHeader && d.ip == "ip6" && p.Offset == 8:
		return "ip6 saddr"
	case p.Base == expr.PayloadBaseNetworkHeader && d.ip == "ip6" && p.Offset == 24:
		return "ip6 daddr"
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
	case d.load == "nfproto" && len(c.Data) == 1 && c.Op == expr.CmpOpEq:
		ip := map[byte]string{unix.NFPROTO_IPV4: "ipv4", unix.NFPROTO_IPV6: "ipv6"}[c.Data[0]]
		d.ip = map[string]string{"ipv4": "ip", "ipv6": "ip6"}[ip]
		d.say("nfproto %s", ip)
	case d.load == "l4proto" && len(c.Data) == 1 && c.Op == expr.CmpOpEq:
		if d.proto = firewall.ProtoName(c.Data[0]); d.proto == string(firewall.ICMPv6) {
			d.proto = "icmpv6"
		}
		d.say("l4proto %s", d.proto)
	case d.load == "ct state" && d.mask != nil:
		var names []string
		for bit, name := range map[uint32]string{expr.CtStateBitINVALID: "invalid", expr.CtStateBitESTABLISHED: "established", expr.CtStateBitRELATED: "related", expr.CtStateBitNEW: "new"} {
			if len(d.mask) == 4 && binaryutil.NativeEndian.Uint32(d.mask)&bit != 0 {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		d.say("ct state %s", strings.Join(names, ","))
	case d.load == "tcp flags" && len(d.mask) == 1 && len(c.Data) == 1:
		d.say("tcp flags %s%s / %s", op, flagNames(firewall.TCPFlags(c.Data[0])), flagNames(firewall.TCPFlags(d.mask[0])))
	case strings.HasSuffix(d.load, "addr") && len(c.Data) <= 16:
		bits := 8 * len(c.Data)
		if d.mask != nil {
			bits = maskBits(d.mask)
		}
		d.say("%s %s%s", d.load, op, formatNetwork(d.ip, c.Data, bits))
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
