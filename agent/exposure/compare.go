package exposure

import (
	"slices"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Requirement is a configured service: at least one of its sources must reach each of
// its ports wherever the configured rules open it.
type Requirement struct {
	Name  string
	Proto firewall.Proto
	Ports firewall.PortRange
	From  [2]Sources // IPv4 and IPv6; nil is any source of the family
}

// Difference is how the live rules differ in effect from the configured rules, on
// public interfaces.
type Difference struct {
	// Exposed are ports of this host that the live rules open, surely or perhaps, and
	// the settings do not, with the sources that are too many. Ports that are forwarded
	// to another host do not count.
	Exposed []Entry
	// Blocked are ports at which all sources of a requirement are surely dropped. Doubtful
	// are those which none of the sources surely reaches.
	Blocked, Doubtful []Entry
}

// Worse returns the part of a difference that is new: what is now surely open although the
// settings do not allow it, or surely blocked although they do, and was not so before.
func (d Difference) Worse(before Difference) (out Difference) {
	out.Exposed = missingIn(before.Exposed, d.Exposed, Open)
	out.Blocked = missingIn(slices.Concat(before.Blocked, before.Doubtful), d.Blocked, Closed)
	return out
}

// missingIn returns the entries of a list with a verdict. It keeps only the interfaces
// on which corresponding entries of before do not cover all of an entry's sources.
func missingIn(before, list []Entry, verdict string) (out []Entry) {
	for _, e := range list {
		e.On = slices.DeleteFunc(slices.Clone(e.On), func(on string) bool {
			rest := e.sources()
			for _, b := range before {
				if b.Proto == e.Proto && b.Port == e.Port && b.Family == e.Family && b.Service == e.Service && slices.Contains(b.On, on) {
					rest = rest.Without(b.sources())
				}
			}
			return len(rest) == 0
		})
		if len(e.On) > 0 && e.Verdict == verdict {
			out = append(out, e)
		}
	}
	return out
}

// sources returns the sources that an entry is about.
func (e Entry) sources() Sources {
	if len(e.From) > 0 {
		return e.From
	}
	f := firewall.IPv4
	if e.Family == firewall.IPv6.String() {
		f = firewall.IPv6
	}
	return sources(f).Without(e.Except)
}

// Compare returns how the live rules differ in effect from want, the configured rules.
func (s Situation) Compare(want Ruleset, required []Requirement) Difference {
	c := comparison{live: s.reporter(), extra: map[[2]question][]Entry{}}
	s.Rules = want
	c.want = s.reporter()
	var d Difference
	var exposed, blocked, doubtful merger
	for n, f := range firewall.Families {
		for i, v := range c.live.views[f] {
			if v.zone != firewall.PublicZone {
				continue
			}
			wanted := c.want.views[f][i] // the same place, as want distinguishes it
			rest := map[firewall.Proto][]Entry{}
			for _, x := range c.live.examined {
				list := c.exposed(f, x, v, wanted)
				if x.Number == 0 {
					rest[x.Proto] = list
				}
				for _, e := range list {
					if !x.quiet || !e.isIn(rest[x.Proto]) {
						exposed.add(&d.Exposed, e.at(x.Port, v.on))
					}
				}
			}
		}
		for _, q := range required {
			for i, v := range c.live.views[f] {
				first := i == 0 || c.live.views[f][i-1].on != v.on
				if !first || v.zone != firewall.PublicZone {
					continue
				}
				switch e := c.shut(f, q, q.From[n], v.on); e.Verdict {
				case Closed:
					blocked.add(&d.Blocked, e)
				case Perhaps:
					doubtful.add(&d.Doubtful, e)
				}
			}
		}
	}
	return d
}

// comparison compares two rulesets of one machine.
type comparison struct {
	live, want *reporter
	extra      map[[2]question][]Entry
}

// exposed returns the entries for sources that reach a port but should not.
func (c comparison) exposed(f firewall.Family, p examined, v, wanted view) []Entry {
	res, at := c.live.trace(f, p.Proto, p.number, v)
	allowed, of := c.want.trace(f, p.Proto, p.number, wanted)
	key := [2]question{at, of}
	out, ok := c.extra[key]
	if ok {
		return out
	}
	res.Ends = slices.DeleteFunc(slices.Clone(res.Ends), func(e End) bool { return e.Forwarded })
	sure, perhaps := res.Open()
	meant := allowed.possible()
	for _, e := range c.live.entriesOf(res, f, sure.Without(meant), perhaps.Without(meant)) {
		e.Family = f.String()
		e.Process = c.live.process(p.Port, res)
		out = append(out, e)
	}
	c.extra[key] = out
	return out
}

// maxEdges limits how many ports represent a range.
const maxEdges = 100

// within returns ports that represent all ports of a range.
func (r *reporter) within(ports firewall.PortRange) []uint16 {
	numbers := []uint16{ports.First}
	for _, n := range r.edges {
		if uint32(ports.First) < n && n <= uint32(ports.Last) && len(numbers) < maxEdges {
			numbers = append(numbers, uint16(n))
		}
	}
	return numbers
}

// shut returns an entry for a required port at which all sources of the requirement
// are dropped on an interface, whichever of the interface's addresses they connect
// to. It prefers a port where they are surely dropped to one where they perhaps are.
func (c comparison) shut(f firewall.Family, q Requirement, from Sources, on string) (found Entry) {
	for _, n := range c.live.within(q.Ports) {
		var live, want Result
		for i, v := range c.live.views[f] {
			if v.on == on {
				a, _ := c.live.trace(f, q.Proto, n, v)
				b, _ := c.want.trace(f, q.Proto, n, c.want.views[f][i])
				live, want = live.and(a), want.and(b)
			}
		}
		meant := want.possible()
		if from != nil {
			meant = meant.Both(from)
		}
		sure, perhaps := live.Open()
		if len(meant) == 0 || len(meant.Both(sure)) > 0 {
			continue
		}
		e := Entry{Verdict: Closed, Family: f.String(), Via: c.live.translating(live), By: c.live.decisionOfDrop(live, meant), Service: q.Name}
		if len(meant.Both(perhaps)) > 0 {
			e.Verdict = Perhaps
		}
		if e = e.of(meant, sources(f)).at(Port{Proto: q.Proto, Number: n}, on); found.Verdict == "" || e.Verdict == Closed {
			found = e
		}
		if e.Verdict == Closed {
			break
		}
	}
	return found
}

// decisionOfDrop returns the rule that drops most of some sources.
func (r *reporter) decisionOfDrop(res Result, of Sources) Decision {
	piece, _ := largest(res.Dropped, of)
	return r.decision(piece.By, of)
}

// possible returns the sources that surely or perhaps arrive.
func (r Result) possible() Sources {
	sure, perhaps := r.Open()
	return Union(sure, perhaps)
}

// at returns the entry for a port and an interface.
func (e Entry) at(p Port, on string) Entry {
	e.Proto, e.Port, e.Process, e.On = p.Proto, p.Number, p.Process, []string{on}
	return e
}

// merger finds entries of a list that are about the same port and family.
type merger map[mergeKey][]int

type mergeKey struct {
	Port
	family, service string
}

// add adds an entry to a list, or its interface to an otherwise identical entry.
func (m *merger) add(list *[]Entry, e Entry) {
	if *m == nil {
		*m = merger{}
	}
	key := mergeKey{Port{e.Proto, e.Port, ""}, e.Family, e.Service}
	for _, i := range (*m)[key] {
		if o := &(*list)[i]; o.same(e) {
			if !slices.Contains(o.On, e.On[0]) {
				o.On = append(slices.Clip(o.On), e.On[0])
			}
			return
		}
	}
	(*m)[key] = append((*m)[key], len(*list))
	*list = append(*list, e)
}
