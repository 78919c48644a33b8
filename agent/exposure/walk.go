package exposure

import (
	"cmp"
	"net/netip"
	"slices"
)

// Host is what routing needs to know.
type Host struct {
	// Type returns the type of a destination, as in DestinationType.
	Type func(netip.Addr) string
	// Redirect returns the address of an interface to which REDIRECT sends packets for
	// another one of this host. A nil Redirect keeps the destination.
	Redirect func(in string, dst netip.Addr) netip.Addr
	// Route returns the interface to a destination of another host, or "" if it is not
	// known. A nil Route knows none.
	Route func(netip.Addr) string
}

// conntrack is the priority of the hook that assigns packets to connections.
const conntrack = -200

// Result is what happens to a packet from a set of sources.
type Result struct {
	Ends     []End
	Accepted []Piece // by the rules that decided last
	Dropped  []Piece
	Steps    []Step // if they were asked for
}

// End is where packets arrive: at this host or, if Forwarded, behind it.
type End struct {
	Packet    Packet // as translated
	Forwarded bool
	Sure      Sources // that surely arrive
	Perhaps   Sources
}

// Piece is a decision about some sources. If Perhaps is set, it depends on Why.
type Piece struct {
	Hook    Hook
	By      Reference
	Sources Sources
	Perhaps bool
	Why     []string
}

// Step is a rule that matches, or perhaps does.
type Step struct {
	Hook    Hook
	By      Reference
	Verdict Verdict
	Perhaps bool
	Why     []string
}

// Open returns the sources that surely arrive, and those that perhaps do.
func (r Result) Open() (sure, perhaps Sources) {
	for _, e := range r.Ends {
		sure, perhaps = Union(sure, e.Sure), Union(perhaps, e.Perhaps)
	}
	return sure, perhaps.Without(sure)
}

// class is a kind of packet on its way through the rules. Such packets surely reach
// the present rule from some sources, and perhaps from others.
type class struct {
	Packet
	sure, maybe Sources
	why         []string
}

func (c class) empty() bool { return len(c.sure)+len(c.maybe) == 0 }

// maxDepth is the depth of jumps that the kernel allows (linux/netfilter/nf_tables.h,
// NFT_JUMP_STACK_SIZE).
const maxDepth = 16

// Trace returns what happens to the first packet of a connection, from each of the sources.
func (r Ruleset) Trace(p Packet, from Sources, h Host, steps bool) Result {
	w := walker{rules: r, host: h, record: steps}
	classes := []class{{Packet: p, sure: from}}
	classes = w.hook(Ingress, classes)
	classes = w.hook(Prerouting, classes)
	var here, through []class
	for _, c := range classes {
		if c.DstType == "LOCAL" || c.DstType == "BROADCAST" || c.DstType == "MULTICAST" {
			here = append(here, c)
		} else {
			c.Out = "?"
			if h.Route != nil {
				c.Out = cmp.Or(h.Route(c.Dst), "?")
			}
			through = append(through, c)
		}
	}
	w.end(w.hook(Input, here), false)
	w.end(w.hook(Forward, through), true)
	return w.out
}

type walker struct {
	rules  Ruleset
	host   Host
	record bool
	out    Result
	// The place of the walk.
	at    Hook
	table *Table
	depth int
}

func (w *walker) end(classes []class, forwarded bool) {
	for _, c := range classes {
		w.out.Ends = append(w.out.Ends, End{c.Packet, forwarded, c.sure, c.maybe})
	}
}

// hook passes packets through the base chains of a hook, in order. They continue only
// if each chain accepts them.
func (w *walker) hook(h Hook, classes []class) []class {
	type base struct {
		table *Table
		chain *Chain
	}
	var bases []base
	for i := range w.rules.Tables {
		t := &w.rules.Tables[i]
		for j := range t.Chains {
			if t.Chains[j].Hook == h {
				bases = append(bases, base{t, &t.Chains[j]})
			}
		}
	}
	slices.Reverse(bases) // of equal priorities the last comes first (nf_hook_entries_grow)
	slices.SortStableFunc(bases, func(a, b base) int { return cmp.Compare(a.chain.Priority, b.chain.Priority) })
	for _, b := range bases {
		var in, past []class
		for _, c := range classes {
			if w.applies(b.table, b.chain, c.Packet) {
				c.early = h == Ingress || h == Prerouting && b.chain.Priority < conntrack
				in = append(in, c)
			} else {
				past = append(past, c)
			}
		}
		if len(in) == 0 {
			continue
		}
		w.at, w.table, w.depth = h, b.table, 0
		before := len(w.out.Dropped)
		accepted, rest := w.chain(b.chain, in)
		for _, c := range rest {
			by := w.reference(b.chain, -1)
			if b.chain.Drop {
				w.decide(&w.out.Dropped, c, by)
			} else {
				accepted = append(accepted, c)
			}
			w.step(c, by, map[bool]Verdict{true: Drop, false: Accept}[b.chain.Drop])
		}
		for _, c := range resolved(in, merged(accepted), w.out.Dropped[before:]) {
			c.early = false
			past = append(past, c)
		}
		classes = past
	}
	return classes
}

// resolved returns the accepted classes. Sources become sure if they surely reached
// the base chain, and it accepts them by one rule or another and drops none of them.
func resolved(in, accepted []class, dropped []Piece) []class {
	for i := range accepted {
		k := &accepted[i]
		if len(k.maybe) == 0 {
			continue
		}
		var sure, others Sources
		for _, c := range in {
			sure = Union(sure, c.sure)
		}
		for _, d := range dropped {
			others = Union(others, d.Sources)
		}
		for j, c := range accepted {
			if j != i {
				others = Union(others, c.sure, c.maybe)
			}
		}
		now := k.maybe.Both(sure).Without(others)
		k.sure, k.maybe = Union(k.sure, now), k.maybe.Without(now)
	}
	return accepted
}

// applies reports whether a base chain sees a packet.
func (w *walker) applies(t *Table, c *Chain, p Packet) bool {
	switch {
	case c.Hook == Ingress:
		return slices.Contains(c.Devices, p.In)
	case t.Family == "ip" && !p.Dst.Is4(), t.Family == "ip6" && p.Dst.Is4():
		return false
	}
	return !c.NAT || !p.Translated && !p.Untracked
}

// merged joins classes of equal packets.
func merged(classes []class) []class {
	var out []class
	at := map[Packet]int{}
	for _, c := range classes {
		if c.empty() {
			continue
		}
		i, ok := at[c.Packet]
		if !ok {
			at[c.Packet] = len(out)
			out = append(out, c)
			continue
		}
		out[i].sure = Union(out[i].sure, c.sure)
		out[i].maybe = Union(out[i].maybe, c.maybe)
		out[i].why = slices.Concat(out[i].why, c.why)
	}
	for i := range out {
		out[i].why = slices.Compact(slices.Sorted(slices.Values(out[i].why))) // other classes have the same list
	}
	return out
}

// chain passes classes through the rules of a chain. It returns those that were accepted,
// and those that reach its end or return.
func (w *walker) chain(c *Chain, classes []class) (accepted, passed []class) {
	for i := 0; i < len(c.Rules) && len(classes) > 0; i++ {
		r, next := w.folded(c, i)
		var rest []class // of classes, once the rule matches one
		taken := false
		for j := range classes {
			take, other := r.split(&classes[j])
			if take.empty() {
				if taken {
					rest = append(rest, classes[j])
				}
				continue
			}
			by := w.reference(c, i)
			w.step(take, by, r.Verdict)
			if r.neutral() {
				if taken {
					rest = append(rest, classes[j])
				}
				continue
			}
			if !taken {
				taken, rest = true, slices.Clone(classes[:j])
			}
			if !other.empty() {
				rest = append(rest, other)
			}
			take.Packet = w.changed(r, take.Packet)
			if r.Translate != nil && w.at == Prerouting {
				take.via = &c.Rules[i]
			}
			if take.vague {
				take.sure, take.maybe = nil, Union(take.sure, take.maybe)
			}
			switch r.Verdict {
			case Next:
				if r.Translate == nil {
					rest = append(rest, take)
					continue
				}
				fallthrough
			case Accept:
				w.decide(&w.out.Accepted, take, by)
				accepted = append(accepted, take)
			case Drop:
				w.decide(&w.out.Dropped, take, by)
			case Undecided:
				take.sure, take.maybe = nil, Union(take.sure, take.maybe)
				take.why = append(slices.Clone(take.why), r.Text)
				w.decide(&w.out.Dropped, take, by)
				accepted = append(accepted, take)
			case Return:
				passed = append(passed, take)
			case Jump, Goto:
				a, p := w.call(r.To, take)
				accepted = append(accepted, a...)
				if r.Verdict == Goto {
					passed = append(passed, p...)
				} else {
					rest = append(rest, p...)
				}
			}
		}
		if taken {
			classes = merged(rest)
		}
		i = next - 1
	}
	return accepted, append(passed, classes...)
}

func (w *walker) call(name string, c class) (accepted, passed []class) {
	i := slices.IndexFunc(w.table.Chains, func(c Chain) bool { return c.Name == name })
	if i < 0 || w.depth == maxDepth {
		return nil, []class{c}
	}
	w.depth++
	defer func() { w.depth-- }()
	return w.chain(&w.table.Chains[i], []class{c})
}

// folded returns the rule at i and the index of the next one. Consecutive rules that
// differ only in one source, such as bans, count as one rule unless steps are recorded.
func (w *walker) folded(c *Chain, i int) (*Rule, int) {
	r, next := &c.Rules[i], i+1
	if !w.record && r.bySource() {
		sets := []Sources{r.Matches[0].Addrs}
		for ; next < len(c.Rules) && c.Rules[next].bySource() && c.Rules[next].Verdict == r.Verdict; next++ {
			sets = append(sets, c.Rules[next].Matches[0].Addrs)
		}
		if len(sets) > 1 {
			all := *r
			all.Matches = []Match{{Field: Source, Addrs: Union(sets...)}}
			r = &all
		}
	}
	return r, next
}

func (r *Rule) bySource() bool {
	return len(r.Matches) == 1 && r.Matches[0].Field == Source && !r.Matches[0].Not && !r.changes() &&
		(r.Verdict == Accept || r.Verdict == Drop || r.Verdict == Return)
}

func (r *Rule) changes() bool {
	return r.Mark != nil || r.Marks || r.Untracked || r.Translate != nil
}

// neutral reports whether a rule has no effect on packets, such as one that logs.
func (r *Rule) neutral() bool { return r.Verdict == Next && !r.changes() }

func (w *walker) reference(c *Chain, rule int) Reference {
	ref := Reference{Program: w.table.Program, Family: w.table.Family, Table: w.table.Name, Chain: c.Name, Rule: rule}
	switch {
	case rule >= 0:
		ref.Text = c.Rules[rule].Text
	case c.Drop:
		ref.Text = "policy DROP"
	default:
		ref.Text = "policy ACCEPT"
	}
	return ref
}

func (w *walker) decide(list *[]Piece, c class, by Reference) {
	if len(c.sure) > 0 {
		*list = append(*list, Piece{Hook: w.at, By: by, Sources: c.sure})
	}
	if len(c.maybe) > 0 {
		*list = append(*list, Piece{Hook: w.at, By: by, Sources: c.maybe, Perhaps: true, Why: c.why})
	}
}

func (w *walker) step(c class, by Reference, v Verdict) {
	if w.record {
		w.out.Steps = append(w.out.Steps, Step{w.at, by, v, len(c.sure) == 0, c.why})
	}
}

// changed returns a packet after the changes of a rule.
func (w *walker) changed(r *Rule, p Packet) Packet {
	if r.Mark != nil {
		p.Mark = p.Mark&^r.Mark.Mask ^ r.Mark.Value
		p.marked = p.marked && r.Mark.Mask != ^uint32(0)
	}
	p.marked = p.marked || r.Marks
	p.Untracked = p.Untracked || r.Untracked
	if t := r.Translate; t != nil {
		p.Translated, p.OrigDst, p.OrigPort = true, p.Dst, p.DstPort
		if t.Port != 0 {
			p.DstPort = t.Port
		}
		switch {
		case t.To.IsValid():
			p.Dst, p.DstType = t.To, w.host.Type(t.To)
		case w.host.Redirect != nil:
			p.Dst, p.DstType = w.host.Redirect(p.In, p.Dst), "LOCAL"
		}
		p.vague = !t.Known
	}
	return p
}

// split divides a class into the packets that a rule matches, surely or perhaps, and those
// that go on to the next rule.
func (r *Rule) split(c *class) (take, rest class) {
	yes, possible, why := conjunction(r.Matches, &c.Packet)
	if possible.none() {
		return class{}, class{}
	}
	take, rest = *c, *c
	unsure := possible.of(yes.not(c.sure))
	take.sure, rest.sure = yes.of(c.sure), possible.not(c.sure)
	again := possible.of(c.maybe)
	take.maybe, rest.maybe = Union(unsure, again), Union(unsure, yes.not(c.maybe))
	if len(why) > 0 && len(take.maybe) > 0 {
		take.why = slices.Compact(slices.Sorted(slices.Values(slices.Concat(c.why, why))))
		rest.why = take.why
	}
	return take, rest
}
