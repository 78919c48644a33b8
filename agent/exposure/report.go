package exposure

import (
	"cmp"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Schema is the version of the JSON that this program writes.
const Schema = 1

// The verdicts about a port.
const (
	Open    = "open"
	Closed  = "closed"
	Perhaps = "perhaps"
)

// maxNamed limits the ports that are reported only because rules name them.
const maxNamed = 200

// Situation is everything about a machine that a report depends on.
type Situation struct {
	Rules      Ruleset
	Families   []firewall.Family // that the kernel supports
	Interfaces []firewall.Interface
	Ports      []Port            // listeners, services and sshd's ports
	Containers map[string]string // names of containers, by the ports that they publish: "80/tcp"
	// Origin returns what in the settings one of our own rules implements, by the name
	// in its comment ("http", "ssh") and a source that it matches. It is nil if no
	// desired state exists.
	Origin func(name string, from netip.Addr) string
	Held   bool       // published ports are held to the settings
	From   netip.Addr // the only source, if valid
	On     string     // the only interface, if not empty
}

// Port is a port of this host. Process is the listener's name, if known.
type Port struct {
	Proto   firewall.Proto
	Number  uint16
	Process string
}

// Add adds ports.
func (s *Situation) Add(proto firewall.Proto, process string, ports ...uint16) {
	for _, n := range ports {
		s.Ports = append(s.Ports, Port{proto, n, process})
	}
}

// Report is who reaches which ports, in the order of the ports.
type Report struct {
	Schema   int     `json:"schema"`
	Exposure []Entry `json:"exposure"`
	// Omitted is the number of ports that rules name and that were not examined.
	Omitted    int                  `json:"-"`
	Interfaces []firewall.Interface `json:"-"` // the examined ones
}

// Entry is what happens to new connections to a port, from some sources, on some
// interfaces. Port 0 is all ports that have no entry of their own.
type Entry struct {
	Proto   firewall.Proto `json:"proto"`
	Port    uint16         `json:"port"` // as clients dial it
	Family  string         `json:"family"`
	Verdict string         `json:"verdict"`
	From    Sources        `json:"from"` // empty: any source except Except
	Except  Sources        `json:"except"`
	On      []string       `json:"on"` // empty: any interface
	Service string         `json:"-"`  // the requirement that is not met
	// Process listens on the port, or Container is the address to which it is forwarded.
	Process   string    `json:"process,omitempty"`
	Container string    `json:"container,omitempty"`
	Via       Reference `json:"-"` // the rule that translates the destination
	By        Decision  `json:"by"`
	Why       []string  `json:"why,omitempty"` // what Perhaps depends on

	Most    bool `json:"-"` // these sources are more than half of the internet
	Limited bool `json:"-"` // perhaps depends only on rate or time
	Named   bool `json:"-"` // only rules name the port
}

// Decision names a rule. Source is what in the settings one of our own rules implements.
type Decision struct {
	Program string `json:"program"`
	Family  string `json:"family"`
	Table   string `json:"table"`
	Chain   string `json:"chain"`
	Rule    string `json:"rule"`
	Source  string `json:"source"`
}

// Report returns who reaches which ports.
func (s Situation) Report() Report {
	r := s.reporter()
	out := Report{Schema: Schema, Exposure: []Entry{}, Omitted: r.omitted}
	for _, i := range s.Interfaces {
		if slices.ContainsFunc(slices.Concat(r.views[firewall.IPv4], r.views[firewall.IPv6]), func(v view) bool { return v.on == i.Name }) {
			out.Interfaces = append(out.Interfaces, i)
		}
	}
	rest := map[firewall.Proto][]Entry{}
	for _, x := range r.examined {
		list := r.port(x)
		if x.Number == 0 {
			rest[x.Proto] = list
		}
		if !x.quiet || slices.ContainsFunc(list, func(e Entry) bool { return e.Verdict != Closed && !e.isIn(rest[x.Proto]) }) {
			out.Exposure = append(out.Exposure, list...)
		}
	}
	slices.SortStableFunc(out.Exposure, func(a, b Entry) int {
		// Port 0 comes last.
		return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Port-1, b.Port-1))
	})
	return out
}

// reporter returns the reporter of a situation, which knows what to examine.
func (s Situation) reporter() *reporter {
	if !s.From.IsValid() {
		s.Rules = s.Rules.withoutBans()
	}
	r := &reporter{Situation: s, sometimes: map[string]bool{}, views: map[firewall.Family][]view{},
		traced: map[question]Result{}, answers: map[question]finding{}}
	var named []Port
	s.Rules.each(func(rule Rule, m Match) {
		switch m.Field {
		case Sometimes:
			r.sometimes[m.Text] = true
		case DestinationPort, OriginalPort:
			for _, n := range m.Numbers {
				r.edges = append(r.edges, n.First, n.Last+1)
			}
			named = append(named, rule.ports(m)...)
		}
	})
	slices.Sort(r.edges)
	r.edges = slices.Compact(r.edges)
	for _, f := range firewall.Families {
		r.views[f] = s.viewsOf(f)
	}
	known := map[Port]bool{}
	r.Ports = slices.Clone(r.Ports)
	slices.SortFunc(r.Ports, func(a, b Port) int { return -compare(a, b) }) // those with a process first
	for _, p := range r.Ports {
		if is := (Port{p.Proto, p.Number, ""}); !known[is] {
			known[is] = true
			r.examined = append(r.examined, examined{Port: p, number: p.Number})
		}
	}
	slices.SortFunc(named, compare)
	named = slices.DeleteFunc(slices.Compact(named), func(p Port) bool { return known[p] })
	r.omitted = max(0, len(named)-maxNamed)
	for i, p := range named {
		if known[p] = true; i >= len(named)-r.omitted {
			continue
		}
		r.examined = append(r.examined, examined{Port: p, number: p.Number, named: true})
	}
	others := 0
	for _, proto := range []firewall.Proto{firewall.TCP, firewall.UDP} {
		r.examined = append(r.examined, examined{Port: Port{Proto: proto}, number: r.unnamed(proto, known)})
		for _, n := range r.edges {
			p := Port{Proto: proto, Number: uint16(n)}
			if 0 < n && n < 1<<16-1 && !known[p] && others < maxNamed {
				r.examined = append(r.examined, examined{Port: p, number: p.Number, named: true, quiet: true})
				others++
			}
		}
	}
	return r
}

// examined is a port to report; number represents it in traces.
type examined struct {
	Port
	number uint16
	named  bool // only rules name it
	quiet  bool // a rule begins or ceases to match here: reported only if open
}

func compare(a, b Port) int {
	return cmp.Or(cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.Number, b.Number), cmp.Compare(a.Process, b.Process))
}

// each calls do with every match of every rule, including matches nested in others.
func (r Ruleset) each(do func(Rule, Match)) {
	var visit func(Rule, []Match)
	visit = func(rule Rule, list []Match) {
		for _, m := range list {
			do(rule, m)
			for _, of := range m.Of {
				visit(rule, of)
			}
		}
	}
	for _, t := range r.Tables {
		for _, c := range t.Chains {
			for _, rule := range c.Rules {
				visit(rule, rule.Matches)
			}
		}
	}
}

// ports returns the ports that a match of the rule names and that may be open because of
// the rule: the first and the last one of each range.
func (r Rule) ports(m Match) (out []Port) {
	if m.Not || r.Translate == nil && r.Verdict != Accept && r.Verdict != Jump && r.Verdict != Goto {
		return nil
	}
	p := Packet{Proto: 6}
	for proto, name := range map[uint8]firewall.Proto{6: firewall.TCP, 17: firewall.UDP} {
		p.Proto = proto
		if slices.ContainsFunc(r.Matches, func(m Match) bool { return m.Field == Protocol && m.matches(&p) == m.Not }) {
			continue
		}
		for _, n := range m.Numbers {
			for _, number := range []uint32{n.First, n.Last} {
				if 0 < number && number < 1<<16-1 {
					out = append(out, Port{Proto: name, Number: uint16(number)})
				}
			}
		}
	}
	return out
}

// unnamed returns a port that represents all ports that are neither known nor named.
func (r *reporter) unnamed(proto firewall.Proto, known map[Port]bool) uint16 {
	named := Match{Field: DestinationPort}
	r.Rules.each(func(_ Rule, m Match) {
		if m.Field == DestinationPort || m.Field == OriginalPort {
			named.Numbers = append(named.Numbers, m.Numbers...)
		}
	})
	for n := uint16(1); n < 1<<16-1; n++ {
		if !known[Port{proto, n, ""}] && !named.matches(&Packet{Proto: 6, DstPort: n}) {
			return n
		}
	}
	return 1
}

// view is how packets of an interface may look: two interfaces or addresses that no rule
// distinguishes have the same key.
type view struct {
	on   string
	zone firewall.Zone
	dst  netip.Addr
	key  string
}

// viewsOf returns the ways in which packets of a family arrive.
func (s Situation) viewsOf(f firewall.Family) []view {
	var out []view
	if len(s.Families) > 0 && !slices.Contains(s.Families, f) {
		return nil
	}
	for _, i := range s.Interfaces {
		if i.Zone == firewall.LoopbackZone || s.On != "" && s.On != i.Name || s.From.IsValid() && s.From.Is4() != (f == firewall.IPv4) {
			continue
		}
		for _, a := range Addresses(i, f) {
			out = append(out, view{i.Name, i.Zone, a, s.Rules.signature(Packet{In: i.Name, Dst: a})})
		}
	}
	return out
}

// Addresses returns the addresses of a family at which an interface is reached.
// Link-local ones count only on an interface that leads outside and has no others:
// bridge ports have them too, but no packet arrives there.
func Addresses(i firewall.Interface, f firewall.Family) []netip.Addr {
	var global, local []netip.Addr
	for _, p := range i.Addresses {
		switch {
		case firewall.FamilyOf(p) != f:
		case p.Addr().IsLinkLocalUnicast():
			local = append(local, p.Addr())
		default:
			global = append(global, p.Addr())
		}
	}
	if len(global) == 0 && i.Zone != firewall.VirtualZone {
		return local
	}
	return global
}

func (r Ruleset) signature(p Packet) string {
	var b strings.Builder
	r.each(func(_ Rule, m Match) {
		switch m.Field {
		case Interface, Destination, OriginalDestination:
			b.WriteByte(map[bool]byte{true: '1', false: '0'}[m.matches(&p)])
		}
	})
	for _, t := range r.Tables {
		for _, c := range t.Chains {
			if slices.Contains(c.Devices, p.In) {
				fmt.Fprintf(&b, " %s %s", t.Name, c.Name)
			}
		}
	}
	return b.String()
}

type reporter struct {
	Situation
	examined  []examined
	omitted   int // ports that rules name and that are not examined
	views     map[firewall.Family][]view
	edges     []uint32 // ports between two of these are treated alike
	sometimes map[string]bool
	traced    map[question]Result
	answers   map[question]finding
}

// finding is a result, and its entries without ports and interfaces.
type finding struct {
	result  Result
	entries []Entry
}

// question is all that a result depends on.
type question struct {
	family firewall.Family
	proto  firewall.Proto
	key    string
	edge   int
}

// port returns the entries of a port.
func (r *reporter) port(p examined) []Entry {
	var out []Entry
	for _, f := range firewall.Families {
		first, interfaces := len(out), 0
		for views := r.views[f]; len(views) > 0; interfaces++ {
			n := 1
			for n < len(views) && views[n].on == views[0].on {
				n++
			}
			res, entries := r.answer(f, p.Proto, p.number, views[:n])
			for _, e := range entries {
				e.Proto, e.Port, e.Family, e.Named = p.Proto, p.Number, f.String(), p.named
				if e.Container == "" {
					e.Process = r.process(p.Port, res)
				}
				i := slices.IndexFunc(out[first:], e.same)
				if i < 0 {
					i = len(out) - first
					out = append(out, e)
				}
				out[first+i].On = append(out[first+i].On, views[0].on)
			}
			views = views[n:]
		}
		for i := first; i < len(out); i++ {
			if r.On == "" && len(out[i].On) == interfaces {
				out[i].On = []string{}
			}
		}
	}
	return out
}

// answer returns the result for the packets of an interface, and its entries.
func (r *reporter) answer(f firewall.Family, proto firewall.Proto, number uint16, views []view) (Result, []Entry) {
	edge, _ := slices.BinarySearch(r.edges, uint32(number)+1)
	q := question{family: f, proto: proto, edge: edge}
	for _, v := range views {
		q.key += v.key + "\n"
	}
	a, ok := r.answers[q]
	if !ok {
		for _, v := range views {
			res, _ := r.trace(f, proto, number, v)
			a.result = a.result.and(res)
		}
		a.entries = r.entries(a.result, f)
		r.answers[q] = a
	}
	return a.result, a.entries
}

// and returns a result for packets to either of two addresses.
func (r Result) and(o Result) Result {
	return Result{Ends: append(slices.Clip(r.Ends), o.Ends...), Accepted: append(slices.Clip(r.Accepted), o.Accepted...),
		Dropped: append(slices.Clip(r.Dropped), o.Dropped...)}
}

// isIn reports whether a list has an entry that differs at most in the port.
func (e Entry) isIn(list []Entry) bool {
	return slices.ContainsFunc(list, func(o Entry) bool { return o.Family == e.Family && o.same(e) && slices.Equal(o.On, e.On) })
}

// same reports whether two entries differ at most in their interfaces.
func (e Entry) same(o Entry) bool {
	return e.Verdict == o.Verdict && e.By == o.By && e.Process == o.Process && e.Container == o.Container && e.Via == o.Via &&
		slices.Equal(e.From, o.From) && slices.Equal(e.Except, o.Except) && slices.Equal(e.Why, o.Why)
}

// trace returns the result for the packets to one address, and what it depends on.
func (r *reporter) trace(f firewall.Family, proto firewall.Proto, number uint16, v view) (Result, question) {
	edge, _ := slices.BinarySearch(r.edges, uint32(number)+1)
	q := question{f, proto, v.key, edge}
	res, ok := r.traced[q]
	if !ok {
		from := sources(f)
		if r.From.IsValid() {
			from = Of(netip.PrefixFrom(r.From, r.From.BitLen()))
		}
		res = r.Rules.Trace(first(v.on, v.dst, proto, number), from, r.host(), false)
		for i, e := range res.Ends {
			if !e.Packet.Translated || e.Packet.DstPort == number {
				res.Ends[i].Packet.DstPort = 0 // that which the client connected to
			}
		}
		r.traced[q] = res
	}
	return res, q
}

// first returns the first packet of a connection to this host.
func first(on string, dst netip.Addr, proto firewall.Proto, port uint16) Packet {
	p := Packet{Family: firewall.FamilyOf(netip.PrefixFrom(dst, dst.BitLen())), In: on, Dst: dst, DstType: "LOCAL", Proto: proto.Number(), DstPort: port}
	if proto == firewall.TCP {
		p.TCPFlags = 2
	}
	return p
}

// host returns what routing needs to know.
func (s Situation) host() Host {
	return Host{Type: func(a netip.Addr) string {
		switch {
		case a.IsMulticast():
			return "MULTICAST"
		case a.IsLoopback() || slices.ContainsFunc(s.Interfaces, func(i firewall.Interface) bool {
			return slices.ContainsFunc(i.Addresses, func(p netip.Prefix) bool { return p.Addr() == a })
		}):
			return "LOCAL"
		case a == netip.AddrFrom4([4]byte{255, 255, 255, 255}), slices.ContainsFunc(s.Interfaces, func(i firewall.Interface) bool {
			return slices.ContainsFunc(i.Addresses, func(p netip.Prefix) bool { return p.Addr().Is4() && p.Bits() < 31 && last(p.Masked()) == a })
		}):
			return "BROADCAST"
		}
		return "UNICAST"
	}, Redirect: func(in string, dst netip.Addr) netip.Addr {
		for _, i := range s.Interfaces {
			if i.Name == in {
				for _, a := range Addresses(i, firewall.FamilyOf(netip.PrefixFrom(dst, dst.BitLen()))) {
					return a
				}
			}
		}
		return dst
	}, Route: func(a netip.Addr) string {
		name, bits := "", -1
		for _, i := range s.Interfaces {
			for _, p := range i.Addresses {
				if p.Contains(a) && p.Bits() > bits {
					name, bits = i.Name, p.Bits()
				}
			}
		}
		return name // "": through a gateway
	}}
}

// sources returns the addresses from which packets arrive. The kernel drops those from
// loopback, multicast and unspecified addresses (net/ipv4/route.c, ip_route_input_slow;
// net/ipv6/ip6_input.c, ip6_rcv_core).
func sources(f firewall.Family) Sources {
	var never []netip.Prefix
	for _, n := range firewall.ByFamily(f, []string{"0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32"}, []string{"::/127", "ff00::/8"}) {
		never = append(never, netip.MustParsePrefix(n))
	}
	return All(never[0].Addr()).Without(Of(never...))
}

// process returns the name of the process that listens where packets to a port arrive.
func (r *reporter) process(p Port, res Result) string {
	for _, e := range res.Ends {
		if to := e.Packet.DstPort; to != 0 && !e.Forwarded && len(e.Sure)+len(e.Perhaps) > 0 {
			if i := slices.IndexFunc(r.Ports, func(q Port) bool { return q.Proto == p.Proto && q.Number == to && q.Process != "" }); i >= 0 {
				return r.Ports[i].Process
			}
		}
	}
	return p.Process
}

// entries returns the entries of a result: open, perhaps or both, otherwise closed.
func (r *reporter) entries(res Result, f firewall.Family) []Entry {
	sure, perhaps := res.Open()
	out := r.entriesOf(res, f, sure, perhaps)
	all := r.all(f)
	if len(out) == 0 {
		piece, _ := largest(res.Dropped, all)
		out = []Entry{{Verdict: Closed, By: r.decision(piece.By, all)}}
		if out[0].held() {
			out[0].Via = r.translating(res)
		}
	}
	if r.From.IsValid() {
		for i := range out {
			out[i].From = all
		}
	}
	return out
}

// all returns the sources to report about.
func (r *reporter) all(f firewall.Family) Sources {
	if r.From.IsValid() {
		return Of(netip.PrefixFrom(r.From, r.From.BitLen()))
	}
	return sources(f)
}

// entriesOf returns the entries of a result for sources that surely or perhaps arrive.
func (r *reporter) entriesOf(res Result, f firewall.Family, sure, perhaps Sources) []Entry {
	all := r.all(f)
	var out []Entry
	if len(sure) > 0 {
		e := Entry{Verdict: Open}
		e.By = r.decision(r.accepting(res, sure, f), sure)
		out = append(out, e.of(sure, all))
	}
	if len(perhaps) > 0 {
		e := Entry{Verdict: Perhaps}
		piece := r.doubtful(res, perhaps)
		e.By, e.Why = r.decision(piece.By, perhaps), piece.Why
		e.Limited = len(e.Why) > 0 && !slices.ContainsFunc(e.Why, func(why string) bool { return !r.sometimes[why] })
		out = append(out, e.of(perhaps, all))
	}
	for i := range out {
		out[i].Via = r.translating(res)
		for _, e := range res.Ends {
			if e.Forwarded && len(e.Sure)+len(e.Perhaps) > 0 && out[i].Container == "" {
				switch to := e.Packet; {
				case to.vague:
					out[i].Container = "another host"
				case to.DstPort != 0:
					out[i].Container = netip.AddrPortFrom(to.Dst, to.DstPort).String()
				default:
					out[i].Container = to.Dst.String()
				}
			}
		}
	}
	return out
}

// translating returns the rule that translated the destination of the packets that
// arrive. If none arrives, it returns the last rule that translated one.
func (r *reporter) translating(res Result) (by Reference) {
	arrive := false
	for _, e := range res.Ends {
		if len(e.Sure)+len(e.Perhaps) > 0 {
			if arrive = true; e.Packet.via != nil {
				return r.Rules.reference(e.Packet.via)
			}
		}
	}
	if arrive {
		return by
	}
	for _, p := range res.Accepted {
		if rule, _ := r.Rules.rule(p.By); p.Hook == Prerouting && rule.Translate != nil {
			by = p.By
		}
	}
	return by
}

// of returns the entry for some of all sources.
func (e Entry) of(some, all Sources) Entry {
	others := all.Without(some)
	// Few of the possible IPv6 addresses are in use (RFC 4291, 2.4).
	internet := all
	if all[0].First.Is6() {
		internet = Of(netip.MustParsePrefix("2000::/3"))
	}
	if e.Most = 2*some.Both(internet).size() > internet.size() || len(others) == 0; e.Most {
		e.Except = others
	} else {
		e.From = some
	}
	return e
}

// accepting returns the last rule that accepts most of the sources, or the policy.
func (r *reporter) accepting(res Result, of Sources, f firewall.Family) Reference {
	hook := Input
	for _, e := range res.Ends {
		if e.Forwarded && len(e.Sure) > 0 {
			hook = Forward
		}
	}
	var list []Piece
	others := of
	for _, p := range slices.Backward(res.Accepted) {
		if p.Hook == hook {
			list = append(list, p)
			others = others.Without(p.Sources)
		}
	}
	piece, n := largest(list, of)
	if n > 0 && n >= others.size() {
		return piece.By
	}
	by := Reference{Rule: -1, Text: "no rule"}
	priority := 0
	for _, t := range r.Rules.Tables {
		for _, c := range t.Chains {
			if c.Hook == hook && !c.NAT && (t.Family == "inet" || t.Family == firewall.ByFamily(f, "ip", "ip6")) && (by.Chain == "" || c.Priority >= priority) {
				by, priority = Reference{t.Program, t.Family, t.Name, c.Name, -1, "policy ACCEPT"}, c.Priority
			}
		}
	}
	return by
}

// doubtful returns the piece that makes it uncertain whether most of the sources
// arrive: preferably one whose rule is itself uncertain.
func (r *reporter) doubtful(res Result, of Sources) Piece {
	var first, second []Piece
	for i, p := range slices.Concat(res.Accepted, res.Dropped) {
		if i < len(res.Accepted) && p.Hook != Input && p.Hook != Forward || !p.Perhaps {
			continue
		}
		if rule, _ := r.Rules.rule(p.By); rule.Verdict == Undecided || uncertain(rule.Matches) {
			first = append(first, p)
		} else {
			second = append(second, p)
		}
	}
	if p, n := largest(first, of); n > 0 {
		return p
	}
	p, _ := largest(second, of)
	return p
}

func uncertain(list []Match) bool {
	return slices.ContainsFunc(list, func(m Match) bool {
		return m.Field == Unknown || m.Field == Sometimes || m.Field == SourcePort || slices.ContainsFunc(m.Of, uncertain)
	})
}

// largest returns the first of the pieces that cover most of the sources, and how many.
func largest(list []Piece, of Sources) (piece Piece, most float64) {
	for _, p := range list {
		if n := p.Sources.Both(of).size(); n > most {
			piece, most = p, n
		}
	}
	return piece, most
}

// reference returns the reference to a rule of the ruleset.
func (r Ruleset) reference(to *Rule) Reference {
	for i := range r.Tables {
		w := walker{table: &r.Tables[i]}
		for j := range w.table.Chains {
			c := &w.table.Chains[j]
			for k := range c.Rules {
				if &c.Rules[k] == to {
					return w.reference(c, k)
				}
			}
		}
	}
	return Reference{}
}

// rule returns the rule that a reference names.
func (r Ruleset) rule(ref Reference) (Rule, bool) {
	for _, t := range r.Tables {
		if t.Program != ref.Program || t.Family != ref.Family || t.Name != ref.Table {
			continue
		}
		for _, c := range t.Chains {
			if c.Name == ref.Chain && 0 <= ref.Rule && ref.Rule < len(c.Rules) {
				return c.Rules[ref.Rule], true
			}
		}
	}
	return Rule{}, false
}

// ourComment is compiled on first use: most commands do not need it.
var ourComment = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`comment "?basicfw-([a-z0-9-]+)`) })

// held reports whether the rule that closes published ports decides about an entry.
func (e Entry) held() bool {
	comment := ourComment().FindStringSubmatch(e.By.Rule)
	return e.Verdict == Closed && comment != nil && comment[1] == "published"
}

// BuiltIn is the source of a rule of the baseline.
const BuiltIn = "built in"

// decision returns the Decision of a rule. For one of our own rules, it includes what
// in the settings the rule implements for the first of the sources.
func (s Situation) decision(by Reference, of Sources) Decision {
	d := Decision{Program: by.Program, Family: by.Family, Table: by.Table, Chain: by.Chain, Rule: strings.TrimPrefix(by.Text, "-A "+by.Chain+" ")}
	comment := ourComment().FindStringSubmatch(by.Text)
	ours := strings.HasPrefix(by.Chain, firewall.ChainPrefix) || by.Table == "basicfw" || comment != nil ||
		by.Rule < 0 && by.Table == "filter" && by.Chain == "INPUT" && by.Text == "policy DROP"
	if s.Origin == nil || !ours {
		return d
	}
	if comment != nil && len(of) > 0 {
		d.Source = s.Origin(comment[1], of[0].First)
	}
	d.Source = cmp.Or(d.Source, BuiltIn)
	return d
}
