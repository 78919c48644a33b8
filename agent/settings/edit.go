package settings

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/hint"
)

// Edit is a command's changes to local.ini. If Changes is empty, Said gives the reason.
type Edit struct {
	Changes []Change
	Said    []string           // lines for the command's output
	Lists   map[string]NewList // files to write or remove, by their path
}

func (e *Edit) change(section, key, value string) {
	e.Changes = append(e.Changes, Change{section, key, value})
}

func (e *Edit) say(format string, args ...any) { e.Said = append(e.Said, fmt.Sprintf(format, args...)) }

// Editor turns requests into changes of local.ini. It works on values and writes nothing.
type Editor struct {
	Settings Settings
	Local    string // path of local.ini
	// Profile is the one in effect, before any of its services is closed.
	Profile firewall.Profile
	// Clients are the named or detected provisioning clients, which may log in over
	// SSH without being listed in ssh.allow.
	Clients  []netip.Prefix
	Unsure   bool               // they were detected and may not be the administrator's
	Listed   *firewall.ListFile // the file of ssh.allow, or nil
	SSHPorts []uint16
	SSHOpen  bool // to any address
	Now      firewall.Moment
	Timers   []firewall.Timer
	Blocked  []firewall.Block // in effect
	SSH      firewall.SSH
}

// left returns d without what has certainly expired.
func (e Editor) left(d firewall.Desired) firewall.Desired {
	d.Timers = e.Timers
	return d.Settled(e.Now)
}

// services returns the services that are open now.
func (e Editor) services() []firewall.Service {
	d := firewall.Desired{Profile: e.Profile, Open: e.Settings.Open, Closed: e.Settings.Closed}
	return e.left(d).Services()
}

// WithPruned returns the requested changes and those that only clean up.
func (e Editor) WithPruned(asked []Change) []Change {
	for _, p := range e.Prune() {
		if !slices.ContainsFunc(asked, func(c Change) bool { return c.Section == p.Section && c.Key == p.Key }) {
			asked = append(asked, p)
		}
	}
	return asked
}

// local reports whether a setting is from local.ini.
func (e Editor) local(key string) bool {
	return strings.HasPrefix(e.Settings.Sources[key], e.Local+":")
}

// beneath returns the service that has this name if local.ini is ignored.
func (e Editor) beneath(name string) (firewall.Service, bool) {
	for _, s := range slices.Concat(e.Settings.Replaced, e.Settings.Open, e.Profile.Services) {
		if s.Name == name && !strings.HasPrefix(s.Source, e.Local+":") {
			return s, true
		}
	}
	return firewall.Service{}, false
}

// title returns a service with its source: "http = 80/tcp in profile web-only".
func title(s firewall.Service) string {
	where := ""
	if s.Source != "" {
		where = " in " + s.Source
	}
	return fmt.Sprintf("%s = %s%s", s.Name, s, where)
}

func port(s firewall.Service) string { return firewall.FormatPorts(s.Ports, s.Proto) }

// Open opens a service, whose name may be empty.
func (e Editor) Open(want firewall.Service) (Edit, error) {
	var out Edit
	services := e.services()
	name, what := want.Name, port(want)
	for _, p := range e.SSHPorts {
		if want.Proto == firewall.TCP && want.Ports.Contains(p) {
			return out, hint.Wrap(fmt.Errorf("%s: sshd listens on port %d", what, p), "basicfw-agent ssh allow ADDRESS")
		}
	}
	for _, s := range services {
		if !sameReach(s, want) {
			continue
		}
		switch {
		case s.Limit != want.Limit:
			want.Name = s.Name
			out.change("open", s.Name, want.String())
			out.say("%s is open: %s = %s, in place of %s", what, want.Name, want, title(s))
		case s.Until.IsZero() && want.Until.IsZero():
			out.say("nothing changed: %s is already open (%s)", what, title(s))
		case s.Until.IsZero():
			out.say("nothing changed: %s is already open, without a time limit (%s)", what, title(s))
		default:
			want.Name = s.Name
			out.change("open", s.Name, want.String())
			out.say("%s stays open: %s", what, title(want))
		}
		return out, nil
	}
	for _, s := range services {
		if covers(s, want) {
			out.say("nothing changed: %s is already open, also to more clients (%s); to narrow it, close it first", what, title(s))
			return out, nil
		}
	}
	// If the request is exactly a service that "close" overrode, drop the override.
	for _, closed := range e.Settings.Closed {
		s, known := e.beneath(closed)
		if known && sameReach(s, want) && s.Limit == want.Limit && want.Until.IsZero() && e.local("open."+closed) && (name == "" || name == closed) {
			out.change("open", closed, "")
			out.say("%s is open again: %s", what, title(s))
			return out, nil
		}
	}
	if name != "" {
		if s, there := e.known(name); there {
			return out, hint.Wrap(fmt.Errorf("--name %s: already used by %s", firewall.Quote(name), title(s)), "choose another name, or close that service first")
		}
	} else {
		base := fmt.Sprintf("%s-%s", string(want.Proto), want.Ports)
		if !want.Proto.HasPorts() {
			base = strings.ReplaceAll(want.Proto.String(), " ", "-")
		}
		want.Name = base
		for n := 2; e.isKnown(want.Name); n++ {
			want.Name = fmt.Sprintf("%s-%d", base, n)
		}
	}
	if err := firewall.CheckServiceName(want.Name); err != nil {
		return out, fmt.Errorf("--name: %w", err)
	}
	out.change("open", want.Name, want.String())
	out.say("%s is open: %s = %s", what, want.Name, want)
	return out, nil
}

// known returns the service with this name, open or closed.
func (e Editor) known(name string) (firewall.Service, bool) {
	open := e.left(firewall.Desired{Open: e.Settings.Open}).Open
	if i := slices.IndexFunc(open, func(s firewall.Service) bool { return s.Name == name }); i >= 0 {
		return open[i], true
	}
	return e.beneath(name)
}

func (e Editor) isKnown(name string) bool {
	_, known := e.known(name)
	return known || slices.Contains(e.Settings.Closed, name)
}

// sameReach reports whether two services open the same ports to the same sources. It
// ignores their limits.
func sameReach(a, b firewall.Service) bool {
	return a.Proto == b.Proto && a.Ports == b.Ports && zone(a) == zone(b) && a.File == b.File && a.IPsec == b.IPsec && sameSet(a.From, b.From)
}

func zone(s firewall.Service) string { return cmp.Or(s.On, string(firewall.AnyZone)) }

func sameSet(a, b []netip.Prefix) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(p netip.Prefix) bool { return !slices.Contains(b, p) })
}

// covers reports whether s opens everything that want does, for at least as long.
func covers(s, want firewall.Service) bool {
	if s.Proto != want.Proto || s.Ports.First > want.Ports.First || s.Ports.Last < want.Ports.Last || s.File != "" || s.IPsec && !want.IPsec || !s.Limit.IsZero() && s.Limit != want.Limit {
		return false
	}
	if zone(s) != string(firewall.AnyZone) && zone(s) != zone(want) {
		return false
	}
	if !s.Until.IsZero() && (want.Until.IsZero() || s.Until.Before(want.Until)) {
		return false
	}
	return len(s.From) == 0 || len(want.From) > 0 && !slices.ContainsFunc(want.From, func(p netip.Prefix) bool {
		_, within := container(p, s.From)
		return !within
	})
}

// container returns the network of a list that contains p.
func container(p netip.Prefix, list []netip.Prefix) (netip.Prefix, bool) {
	for _, o := range list {
		if o.Bits() <= p.Bits() && o.Contains(p.Addr()) {
			return o, true
		}
	}
	return netip.Prefix{}, false
}

// CloseRequest selects what to close: a port, a protocol or a name, optionally limited to
// an interface or zone (On) and to sources (From).
type CloseRequest struct {
	Ports firewall.PortRange
	Proto firewall.Proto // "" if only a name is given
	Name  string
	Or    []Port // the ports with the name, if no open service has it
	On    string
	From  []netip.Prefix
}

// meant returns the requests that r means, given the open services.
func (r CloseRequest) meant(open []firewall.Service) (list []CloseRequest) {
	if r.Proto != "" || slices.ContainsFunc(open, func(s firewall.Service) bool { return s.Name == r.Name }) {
		return []CloseRequest{r}
	}
	for _, p := range r.Or {
		if slices.ContainsFunc(open, func(s firewall.Service) bool { return s.Ports == p.Ports && s.Proto == p.Proto }) {
			list = append(list, CloseRequest{Ports: p.Ports, Proto: p.Proto, On: r.On, From: r.From})
		}
	}
	if list == nil {
		return []CloseRequest{r}
	}
	return list
}

func (r CloseRequest) String() string {
	if r.Proto == "" {
		return r.Name
	}
	return firewall.FormatPorts(r.Ports, r.Proto)
}

func (r CloseRequest) matches(s firewall.Service) bool {
	return (r.Proto == "" || s.Ports == r.Ports && s.Proto == r.Proto) && (r.Name == "" || s.Name == r.Name) &&
		(r.On == "" || zone(s) == r.On) && !slices.ContainsFunc(r.From, func(p netip.Prefix) bool { return !slices.Contains(s.From, p) })
}

// Close closes open services. It removes those in local.ini and overrides those in
// the profile or in agent.ini.
func (e Editor) Close(r CloseRequest) (Edit, error) {
	var out Edit
	for _, r := range r.meant(e.services()) {
		one, err := e.closeOne(r)
		if err != nil {
			return one, err
		}
		out.Changes, out.Said = append(out.Changes, one.Changes...), append(out.Said, one.Said...)
	}
	return out, nil
}

func (e Editor) closeOne(r CloseRequest) (Edit, error) {
	var out Edit
	var rest []firewall.Service
	for _, p := range e.SSHPorts {
		if r.Proto == firewall.TCP && r.Ports.Contains(p) {
			return out, hint.Wrap(fmt.Errorf("%s: sshd listens on port %d", r, p), "basicfw-agent ssh remove ADDRESS")
		}
	}
	for _, s := range e.services() {
		if r.matches(s) {
			e.close(&out, s, r.From)
		} else {
			rest = append(rest, s)
		}
	}
	for _, s := range rest {
		if r.Proto == "" || s.Proto != r.Proto || s.Ports != r.Ports && !s.Ports.Overlaps(r.Ports) {
			continue
		}
		switch {
		case len(out.Changes) > 0:
			out.say("note: %s is still open: %s", r, title(s))
		case s.Ports != r.Ports:
			return out, hint.Wrap(fmt.Errorf("%s: no such port or range is open, only %s", r, title(s)), "basicfw-agent close %s", port(s))
		default:
			out.say("nothing changed: %s is open, but differently: %s", r, title(s))
		}
	}
	if len(out.Changes)+len(out.Said) == 0 {
		out.say("nothing changed: %s is not open", r)
	}
	return out, nil
}

// close closes one service, or only some of its sources if from is not empty.
func (e Editor) close(out *Edit, s firewall.Service, from []netip.Prefix) {
	left := s
	left.From = slices.DeleteFunc(slices.Clone(s.From), func(p netip.Prefix) bool { return len(from) == 0 || slices.Contains(from, p) })
	over, overrides := e.beneath(s.Name)
	mine := e.local("open." + s.Name)
	switch {
	case len(left.From) > 0:
		out.change("open", s.Name, left.String())
		out.say("%s is closed for %s: %s = %s remains", port(s), join(from), s.Name, left)
	case mine && !overrides:
		out.change("open", s.Name, "")
		out.say("%s is closed: %s removed from %s", port(s), s.Name, e.Local)
	default:
		out.change("open", s.Name, Closed)
		out.say("%s is closed: %s = closed in %s overrides %s", port(s), s.Name, e.Local, title(over))
		out.say("  to open it again: basicfw-agent open %s", port(s))
	}
}

func join(list []netip.Prefix) string {
	return strings.Join(firewall.FormatPrefixes(list), ", ")
}

// Allow lets networks log in over SSH until end, or permanently if end is zero.
func (e Editor) Allow(who []netip.Prefix, end time.Time) Edit {
	var out Edit
	a := e.current()
	old := a.String()
	sure := e.Clients
	if e.Unsure {
		sure = nil
	}
	for _, p := range who {
		name := firewall.FormatPrefix(p)
		if by, ok := container(p, slices.Concat(sure, a.List)); ok {
			how := ""
			if p != by {
				how = ", as part of " + by.String()
			}
			if !end.IsZero() {
				how += ", without a time limit: to limit it, remove it first"
			}
			out.say("nothing changed: %s may already log in%s", name, how)
			continue
		}
		a.Timed = slices.DeleteFunc(a.Timed, func(t firewall.TimedSource) bool { return t.From == p })
		if !end.IsZero() {
			a.Timed = append(a.Timed, firewall.TimedSource{From: p, Until: end})
			out.say("%s may log in until %s", name, firewall.FormatTime(end))
			continue
		}
		a.List = append(a.List, p)
		if a.Mode == AllowNone {
			a.Mode = AllowList
		}
		out.say("%s may log in", name)
	}
	if a.String() != old {
		out.change("ssh", "allow", a.String())
	}
	return out
}

// current returns a copy of the settings' Allow without expired entries.
func (e Editor) current() Allow {
	a := e.Settings.Allow
	a.List = slices.Clone(a.List)
	a.Timed = e.left(firewall.Desired{SSH: firewall.SSH{Timed: a.Timed}}).SSH.Timed
	return a
}

// ErrLast reports that no address would remain that may log in permanently.
var ErrLast = errors.New("no other address may log in permanently")

// Remove removes networks that may log in. If none would remain, the error is ErrLast,
// with a hint. With force there is no such error, and SSH is blocked for all.
func (e Editor) Remove(who []netip.Prefix, force bool) (Edit, error) {
	var out Edit
	a, clients := e.current(), slices.Clone(e.Clients)
	old := a.String()
	dropClients := false
	for _, p := range who {
		name := firewall.FormatPrefix(p)
		timed := slices.IndexFunc(a.Timed, func(t firewall.TimedSource) bool { return t.From == p })
		listed, client := slices.Index(a.List, p), slices.Index(clients, p)
		if timed < 0 && listed < 0 && client < 0 {
			all := slices.Concat(clients, a.List)
			for _, t := range a.Timed {
				all = append(all, t.From)
			}
			if by, ok := container(p, all); ok {
				return out, hint.Wrap(fmt.Errorf("%s may log in as part of %s", name, by), "basicfw-agent ssh remove %s", by)
			}
			for _, o := range all {
				if p.Bits() < o.Bits() && p.Contains(o.Addr()) {
					return out, hint.Wrap(fmt.Errorf("only a part of %s is allowed", name), "basicfw-agent ssh remove %s", firewall.FormatPrefix(o))
				}
			}
			if l := e.Listed; l != nil {
				if by, ok := container(p, l.From); ok {
					return out, hint.Wrap(fmt.Errorf("%s may log in by %s in %s", name, firewall.FormatPrefix(by), l.Path), "remove the line from that file")
				}
			}
			why := "was not allowed to log in"
			if e.SSHOpen {
				why = "is not listed, but SSH is open to any address"
			}
			out.say("nothing changed: %s %s", name, why)
			continue
		}
		if timed >= 0 {
			a.Timed = slices.Delete(a.Timed, timed, timed+1)
		}
		if listed >= 0 {
			a.List = slices.Delete(a.List, listed, listed+1)
		}
		if client >= 0 {
			clients = slices.Delete(clients, client, client+1)
			dropClients = true
		}
		if a.Mode == AllowAny || e.SSHOpen && client < 0 {
			out.say("%s is no longer listed, but SSH is open to any address", name)
			continue
		}
		out.say("%s may no longer log in; open sessions stay open", name)
	}
	if a.Mode == AllowAny && dropClients && len(clients) == 0 && !e.local("ssh.client_ip") {
		return out, hint.Wrap(fmt.Errorf("%s names the last client, and %s opens SSH to any address", e.Settings.Sources["ssh.client_ip"], e.Settings.Sources["ssh.allow"]), "edit these lines, then run: basicfw-agent apply")
	}
	had := len(e.Clients)+len(e.Settings.Allow.List) > 0
	if (a.Mode == AllowList && a.File == "" || a.Mode == AllowClient) && had && len(clients)+len(a.List) == 0 {
		if !force {
			return out, hint.Wrap(ErrLast, "allow another address first; or use --force, which blocks SSH for all and leaves only the console")
		}
		a.Mode = AllowNone
	}
	if dropClients {
		e.dropClients(&out, &a, clients)
	}
	switch {
	case a.Mode == AllowAny:
		out.say("hint: to restrict SSH, list addresses in \"allow\" (%s) instead of any, and run: basicfw-agent apply", e.Settings.Sources["ssh.allow"])
	case a.Mode == AllowClient && e.SSHOpen:
		out.say("hint: to restrict SSH to addresses of your choice, run: basicfw-agent ssh allow ADDRESS")
	}
	if a.String() != old {
		out.change("ssh", "allow", a.String())
	}
	return out, nil
}

// dropClients keeps only some of the clients. Named clients stay in ssh.client_ip;
// detected ones are moved to ssh.allow.
func (e Editor) dropClients(out *Edit, a *Allow, left []netip.Prefix) {
	named := len(e.Settings.ClientIP) > 0
	switch {
	case named && len(left) > 0:
		out.change("ssh", "client_ip", join(left))
		return
	case named && e.local("ssh.client_ip"):
		out.change("ssh", "client_ip", "")
	}
	if a.Mode == AllowClient {
		a.Mode = AllowList
		a.List = append(left, a.List...)
	}
}

// Prune returns the changes that remove expired entries from local.ini.
func (e Editor) Prune() []Change {
	var out Edit
	for _, s := range e.Settings.Open {
		if e.local("open."+s.Name) && len(e.left(firewall.Desired{Open: []firewall.Service{s}}).Open) == 0 {
			out.change("open", s.Name, "")
		}
	}
	if now := e.current(); e.local("ssh.allow") && len(now.Timed) < len(e.Settings.Allow.Timed) {
		out.change("ssh", "allow", now.String())
	}
	e.pruneBlocks(&out)
	return out.Changes
}
