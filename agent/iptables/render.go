// Package iptables brings a ruleset into the kernel through iptables-restore
// and ip6tables-restore, reads it back through iptables-save and
// ip6tables-save, and keeps it in the files that iptables-services and
// netfilter-persistent load. It knows both variants, legacy and nft, from
// 1.4.7 on.
package iptables

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// spec is a rule behind "-A CHAIN ", in exactly the form in which iptables-save
// prints it: options in the kernel's order, networks with their bits, numbers
// for names. What 1.4.21 and later print is this to the letter; 1.4.7 adds
// quotes and blanks, which the parser takes away.
func spec(f firewall.Family, r firewall.Rule) string {
	var b strings.Builder
	arg := func(words ...string) {
		for _, w := range words {
			if b.Len() > 0 {
				b.WriteByte(' ')
			}
			b.WriteString(w)
		}
	}
	if r.Src.IsValid() {
		arg("-s", r.Src.String())
	}
	if r.Dst.IsValid() {
		arg("-d", r.Dst.String())
	}
	if r.In != "" {
		in := r.In
		if base, ok := strings.CutSuffix(in, "*"); ok {
			in = base + "+"
		}
		arg("-i", in)
	}
	if r.Proto != "" {
		arg("-p", string(r.Proto))
	}
	switch {
	case !r.SrcPort.IsZero() || !r.DstPort.IsZero():
		arg("-m", string(r.Proto))
		if !r.SrcPort.IsZero() {
			arg("--sport", ports(r.SrcPort))
		}
		if !r.DstPort.IsZero() {
			arg("--dport", ports(r.DstPort))
		}
	case r.Flags != nil:
		arg("-m", "tcp")
		if r.Flags.Invert {
			arg("!")
		}
		arg("--tcp-flags", flags(r.Flags.Mask), flags(r.Flags.Set))
	case r.ICMPType != nil && f == firewall.IPv4:
		arg("-m", "icmp", "--icmp-type", strconv.Itoa(int(*r.ICMPType)))
	case r.ICMPType != nil:
		arg("-m", "icmp6", "--icmpv6-type", strconv.Itoa(int(*r.ICMPType)))
	}
	if r.State != "" {
		arg("-m", "conntrack", "--ctstate", string(r.State))
	}
	if r.DstType != "" {
		arg("-m", "addrtype", "--dst-type", r.DstType)
	}
	if l := r.Limit; l != nil {
		burst := strconv.Itoa(int(l.Burst))
		if l.Name == "" {
			arg("-m", "limit", "--limit", l.Rate.String(), "--limit-burst", burst)
		} else {
			arg("-m", "hashlimit", "--hashlimit-upto", l.Rate.String(), "--hashlimit-burst", burst,
				"--hashlimit-mode", "srcip", "--hashlimit-name", l.Name)
			if f == firewall.IPv4 && l.SourceBits != 32 || f == firewall.IPv6 && l.SourceBits != 128 {
				arg("--hashlimit-srcmask", strconv.Itoa(l.SourceBits))
			}
		}
	}
	until := r.Until
	if !r.Since.IsZero() {
		arg("-m", "time", "--datestart", date(r.Since))
		if until.IsZero() { // else iptables thinks of an end, and may print it
			until = firewall.MaxTime
		}
		arg("--datestop", date(until))
	} else if !until.IsZero() {
		arg("-m", "time", "--datestop", date(until))
	}
	arg("-m", "comment", "--comment", r.Comment)
	if r.HopLimit != 0 { // last: ip6tables 1.4.7 refuses options behind it
		arg("-m", "hl", "--hl-eq", strconv.Itoa(int(r.HopLimit)))
	}
	arg("-j", r.Target)
	if r.Target == firewall.Log {
		arg("--log-prefix", `"`+r.LogPrefix+`"`, "--log-level", "7")
	}
	return b.String()
}

// date is a time as the match "time" prints it.
func date(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05") }

func ports(r firewall.PortRange) string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return fmt.Sprintf("%d:%d", r.First, r.Last)
}

func flags(f firewall.TCPFlags) string {
	if f == 0 {
		return "NONE"
	}
	var names []string
	for i, name := range []string{"FIN", "SYN", "RST", "PSH", "ACK", "URG"} {
		if f&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, ",")
}

// specs are the rules of a chain as iptables-save prints them.
func specs(f firewall.Family, c firewall.Chain) []string {
	out := make([]string, len(c.Rules))
	for i, r := range c.Rules {
		out[i] = spec(f, r)
	}
	return out
}

// jump is the last rule of INPUT.
const jump = "-j " + firewall.InputChain

// Render gives the ruleset of one family as a file that iptables-restore loads
// into an empty table: complete by itself, and what iptables-save prints of it
// but for its header and the counters.
func Render(r firewall.Ruleset, f firewall.Family) string {
	t := table{Name: filter, Chains: []chain{
		{Name: input, Policy: firewall.Drop, Rules: []string{jump}},
		{Name: forward, Policy: firewall.Accept},
		{Name: output, Policy: firewall.Accept},
	}}
	for _, c := range r.Chains(f) {
		t.Chains = append(t.Chains, chain{Name: c.Name, Policy: "-", Rules: specs(f, c)})
	}
	var b strings.Builder
	t.write(&b)
	return b.String()
}
