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
)

// Edit is what a command does to local.ini. Without Changes nothing is to be
// done, and Said says why.
type Edit struct {
	Changes []Change
	Said    []string // sentences for people
}

func (e *Edit) change(section, key, value string) {
	e.Changes = append(e.Changes, Change{section, key, value})
}

func (e *Edit) say(format string, args ...any) { e.Said = append(e.Said, fmt.Sprintf(format, args...)) }

// Editor makes what people ask for into changes of local.ini. It decides from
// values alone and changes nothing itself.
type Editor struct {
	Settings Settings
	Local    string // local.ini's path
	// Profile is the one in effect, before anything of it is closed.
	Profile firewall.Profile
	// Clients may log in over SSH without being listed in the settings: those
	// that were named or detected.
	Clients []netip.Prefix
	// Unsure is set where they were detected, and may be somebody else.
	Unsure   bool
	SSHPorts []uint16
	Now      time.Time
}

// services are what may be reached now.
func (e Editor) services() []firewall.Service {
	d := firewall.Desired{Profile: e.Profile, Open: e.Settings.Open, Closed: e.Settings.Closed}
	return d.At(firewall.Moment{Time: e.Now}).Services()
}

// local tells whether a setting is from local.ini.
func (e Editor) local(key string) bool {
	return strings.HasPrefix(e.Settings.Sources[key], e.Local+":")
}

// beneath gives the service that a name has without local.ini.
func (e Editor) beneath(name string) (firewall.Service, bool) {
	for _, list := range [][]firewall.Service{e.Settings.Replaced, e.Settings.Open, e.Profile.Services} {
		for _, s := range list {
			if s.Name == name && !strings.HasPrefix(s.Source, e.Local+":") {
				return s, true
			}
		}
	}
	return firewall.Service{}, false
}

// title is a service for a sentence: "http = 80/tcp of profile web-only".
func title(s firewall.Service) string {
	where := ""
	if s.Source != "" {
		where = " of " + s.Source
	}
	return fmt.Sprintf("%s = %s%s", s.Name, s, where)
}

func port(s firewall.Service) string { return fmt.Sprintf("%s/%s", s.Ports, s.Proto) }

// Open opens a service, whose name may be empty.
func (e Editor) Open(want firewall.Service) (Edit, error) {
	var out Edit
	services := e.services()
	name, what := want.Name, port(want)
	for _, p := range e.SSHPorts {
		if want.Proto == firewall.TCP && want.Ports.Contains(p) {
			return out, fmt.Errorf("%s: sshd listens on port %d: \"basicfw-agent ssh allow ADDRESS\" says who may log in", what, p)
		}
	}
	for _, s := range services {
		if !sameReach(s, want) {
			continue
		}
		switch {
		case s.Until.IsZero() && want.Until.IsZero():
			out.say("nothing changed: %s is open already (%s)", what, title(s))
		case s.Until.IsZero():
			out.say("nothing changed: %s is open already, and without an end (%s)", what, title(s))
		default:
			want.Name = s.Name
			out.change("open", s.Name, want.String())
			out.say("%s stays open: %s", what, title(want))
		}
		return out, nil
	}
	for _, s := range services {
		if covers(s, want) {
			out.say("nothing changed: %s is open already, also to others (%s); to narrow that, close it first", what, title(s))
			return out, nil
		}
	}
	// What "close" wrote over a service is taken back, where nothing less and
	// nothing more was asked for.
	for _, closed := range e.Settings.Closed {
		s, known := e.beneath(closed)
		if known && sameReach(s, want) && want.Until.IsZero() && e.local("open."+closed) && (name == "" || name == closed) {
			out.change("open", closed, "")
			out.say("%s is open again: %s", what, title(s))
			return out, nil
		}
	}
	if name != "" {
		if s, there := e.known(name); there {
			return out, fmt.Errorf("--name %s: that is another service, %s: choose another name, or close that first", firewall.Quote(name), title(s))
		}
	} else {
		base := fmt.Sprintf("%s-%s", want.Proto, want.Ports)
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

// known gives what a name stands for, be it open or closed.
func (e Editor) known(name string) (firewall.Service, bool) {
	d := firewall.Desired{Open: e.Settings.Open}
	for _, s := range d.At(firewall.Moment{Time: e.Now}).Open {
		if s.Name == name {
			return s, true
		}
	}
	return e.beneath(name)
}

func (e Editor) isKnown(name string) bool {
	_, known := e.known(name)
	return known || slices.Contains(e.Settings.Closed, name)
}

// sameReach tells whether two services are the same ports for the same peers.
func sameReach(a, b firewall.Service) bool {
	return a.Proto == b.Proto && a.Ports == b.Ports && zone(a) == zone(b) && sameSet(a.From, b.From)
}

func zone(s firewall.Service) string { return cmp.Or(s.On, string(firewall.AnyZone)) }

func sameSet(a, b []netip.Prefix) bool {
	return len(a) == len(b) && !slices.ContainsFunc(a, func(p netip.Prefix) bool { return !slices.Contains(b, p) })
}

// covers tells whether s opens all that want asks for, and for as long.
func covers(s, want firewall.Service) bool {
	if s.Proto != want.Proto || s.Ports.First > want.Ports.First || s.Ports.Last < want.Ports.Last {
		return false
	}
	if zone(s) != string(firewall.AnyZone) && zone(s) != zone(want) {
		return false
	}
	if !s.Until.IsZero() && (want.Until.IsZero() || s.Until.Before(want.Until)) {
		return false
	}
	return len(s.From) == 0 || len(want.From) > 0 && !slices.ContainsFunc(want.From, func(p netip.Prefix) bool { return !within(p, s.From) })
}

// within tells whether a network is a part of one in a list.
func within(p netip.Prefix, list []netip.Prefix) bool {
	_, ok := container(p, list)
	return ok
}

// container gives the network of a list that p is a part of.
func container(p netip.Prefix, list []netip.Prefix) (netip.Prefix, bool) {
	for _, o := range list {
		if o.Bits() <= p.Bits() && o.Contains(p.Addr()) {
			return o, true
		}
	}
	return netip.Prefix{}, false
}

// CloseRequest says what to close: a port, or a name, and of what that gives
// only what the rest says, where it says anything.
type CloseRequest struct {
	Ports firewall.PortRange
	Proto firewall.Proto
	Name  string
	On    string
	From  []netip.Prefix
}

func (r CloseRequest) String() string {
	if r.Ports.IsZero() {
		return r.Name
	}
	return fmt.Sprintf("%s/%s", r.Ports, r.Proto)
}

func (r CloseRequest) matches(s firewall.Service) bool {
	return (r.Ports.IsZero() || s.Ports == r.Ports && s.Proto == r.Proto) && (r.Name == "" || s.Name == r.Name) &&
		(r.On == "" || zone(s) == r.On) && !slices.ContainsFunc(r.From, func(p netip.Prefix) bool { return !slices.Contains(s.From, p) })
}

// Close closes what is open: it takes back what Open gave, and writes over what
// the profile or the owner's own file opens.
func (e Editor) Close(r CloseRequest) (Edit, error) {
	var out Edit
	var rest []firewall.Service
	for _, p := range e.SSHPorts {
		if r.Proto == firewall.TCP && r.Ports.Contains(p) {
			return out, fmt.Errorf("%s: sshd listens on port %d: \"basicfw-agent ssh remove ADDRESS\" takes away who may log in", r, p)
		}
	}
	for _, s := range e.services() {
		if !r.matches(s) {
			rest = append(rest, s)
			continue
		}
		e.close(&out, s, r.From)
	}
	for _, s := range rest {
		if r.Ports.IsZero() || s.Proto != r.Proto || !s.Ports.Overlaps(r.Ports) {
			continue
		}
		switch {
		case len(out.Changes) > 0:
			out.say("note: %s is still open by %s", r, title(s))
		case s.Ports != r.Ports:
			return out, fmt.Errorf("%s: only a part, or more, of what is open: %s: close %s", r, title(s), port(s))
		default:
			out.say("nothing changed: %s is open, but not in that way: %s", r, title(s))
		}
	}
	if len(out.Changes)+len(out.Said) == 0 {
		out.say("nothing changed: %s is not open", r)
	}
	return out, nil
}

// close closes one service, for some sources only if there are any.
func (e Editor) close(out *Edit, s firewall.Service, from []netip.Prefix) {
	left := s
	left.From = nil
	if len(from) > 0 {
		for _, p := range s.From {
			if !slices.Contains(from, p) {
				left.From = append(left.From, p)
			}
		}
	}
	over, overrides := e.beneath(s.Name)
	mine := e.local("open." + s.Name)
	switch {
	case len(left.From) > 0:
		out.change("open", s.Name, left.String())
		out.say("%s is closed for %s: %s = %s is left", port(s), join(from), s.Name, left)
	case mine && !overrides:
		out.change("open", s.Name, "")
		out.say("%s is closed: %s is gone from %s", port(s), s.Name, e.Local)
	default:
		out.change("open", s.Name, Closed)
		out.say("%s is closed: %s = closed in %s overrides %s", port(s), s.Name, e.Local, title(over))
		out.say("  to open it again: basicfw-agent open %s", port(s))
	}
}

func join(list []netip.Prefix) string {
	return strings.Join(firewall.FormatPrefixes(list), ", ")
}

// Allow lets networks log in over SSH, until a time if there is one.
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
		same := func(t firewall.TimedSource) bool { return t.From == p }
		if by, ok := container(p, slices.Concat(sure, a.List)); ok {
			limit := ""
			if !end.IsZero() {
				limit = ", and for good: to limit that, remove it first"
			}
			out.say("nothing changed: %s may log in already%s%s", name, through(p, by), limit)
			continue
		}
		a.Timed = slices.DeleteFunc(a.Timed, same)
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

// through names the network that lets p in, if that is not p itself.
func through(p, by netip.Prefix) string {
	if p == by {
		return ""
	}
	return ", as a part of " + by.String()
}

// current is who the settings allow, as a copy and without what has ended.
func (e Editor) current() Allow {
	a := e.Settings.Allow
	a.List = slices.Clone(a.List)
	a.Timed = firewall.SSH{Timed: a.Timed}.At(e.Now).Timed
	return a
}

// ErrLast says that nobody would be left who may log in.
var ErrLast = errors.New("nobody else may log in for good: allow somebody first, or use --force: SSH is then for nobody, and the console is the only way in")

// Remove takes away who may log in. Where nobody would be left it is ErrLast,
// unless it is forced: then SSH is for nobody.
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
				return out, fmt.Errorf("%s may log in as a part of %s: remove that", name, by)
			}
			for _, o := range all {
				if p.Bits() < o.Bits() && p.Contains(o.Addr()) {
					return out, fmt.Errorf("%s is not allowed as a whole, only %s in it: remove that", name, firewall.FormatPrefix(o))
				}
			}
			out.say("nothing changed: %s may not log in anyway", name)
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
		out.say("%s may not log in any more; sessions that are open stay open", name)
	}
	if a.Mode == AllowAny && dropClients && len(clients) == 0 && !e.local("ssh.client_ip") {
		return out, fmt.Errorf("%s names the last of them, and %s opens SSH to any address: change it there", e.Settings.Sources["ssh.client_ip"], e.Settings.Sources["ssh.allow"])
	}
	if a.Mode == AllowList || a.Mode == AllowClient {
		had := len(e.Clients)+len(e.Settings.Allow.List) > 0
		if had && len(clients)+len(a.List) == 0 {
			if !force {
				return out, ErrLast
			}
			a.Mode = AllowNone
		}
	}
	if dropClients {
		e.dropClients(&out, &a, clients)
	}
	if a.String() != old {
		out.change("ssh", "allow", a.String())
	}
	return out, nil
}

// dropClients keeps only some of the clients. Named ones are in the settings.
// Others were detected, and are listed instead from now on.
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

// Prune takes out of local.ini what has ended.
func (e Editor) Prune() []Change {
	var out Edit
	for _, s := range e.Settings.Open {
		if e.local("open."+s.Name) && len(firewall.Desired{Open: []firewall.Service{s}}.At(firewall.Moment{Time: e.Now}).Open) == 0 {
			out.change("open", s.Name, "")
		}
	}
	if now := e.current(); e.local("ssh.allow") && len(now.Timed) < len(e.Settings.Allow.Timed) {
		out.change("ssh", "allow", now.String())
	}
	return out.Changes
}
