// Package bootstrap decides what becomes of a machine at its first boot, and
// again when its settings change: from what user-data and the settings say,
// the session that runs the command, and the instance itself. It also writes
// the user-data that begins it all.
package bootstrap

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/profiles"
)

// Input is all that a decision follows from.
type Input struct {
	Settings settings.Settings // the flags are in it
	Local    string            // the file where flags are kept
	Profiles *profiles.Set
	Facts    agent.Facts
	// CheckClient judges a named client by this host's networks.
	CheckClient func(netip.Prefix) (warning string, err error)
	// Previous is what was decided on this instance before, or nil.
	Previous *store.State
	// Redetect decides anew what was detected before.
	Redetect bool
	// Now is when this is decided: what has ended by then is left out.
	Now firewall.Moment
	// Unlock is what an unlocking lets in meanwhile. Decisions do not end it.
	Unlock *firewall.Unlock
}

// InvalidError says that what the user asked for cannot be done as it stands:
// the settings have to change first.
type InvalidError struct {
	err error
	// OnlyClient is set where nothing but the named client was refused.
	OnlyClient bool
}

func (e *InvalidError) Error() string { return e.err.Error() }
func (e *InvalidError) Unwrap() error { return e.err }

// Decide decides everything, and compiles it. What was detected at bootstrap
// stays as it was decided then, unless Redetect asks for more. The warnings are
// for the user.
func Decide(in Input) (st store.State, warnings []string, err error) {
	s := in.Settings
	if in.Redetect {
		in.Previous = withoutDetections(in.Previous)
	}
	if in.Previous != nil {
		now := in.Previous.At(in.Now)
		in.Previous = &now
	}
	st = store.State{Schema: store.Schema, InstanceID: in.Facts.Instance}
	if in.Previous != nil {
		st.Bootstrapped, st.Service = in.Previous.Bootstrapped, in.Previous.Service
		st.RescueArgument = in.Previous.RescueArgument
		if st.InstanceID == "" {
			st.InstanceID = in.Previous.InstanceID
		}
	}
	st.Backend = chooseBackend(in)

	d := &st.Desired
	d.Open, d.Closed = s.Open, s.Closed
	d.Interfaces, d.Trusted, d.LogDrops = in.Facts.Interfaces, s.Trusted, s.LogDrops
	st.Profile = chooseProfile(in)
	d.Profile, _, err = in.Profiles.Get(st.Profile.Name)
	if err != nil {
		at := ""
		if st.Profile.Source != "detected" {
			at = s.Sources["agent.profile"] + ": agent.profile: "
		}
		return st, nil, &InvalidError{err: fmt.Errorf("%s%w", at, err)}
	}
	st.Profile.Name = d.Profile.Name

	d.SSH.Limit = s.Limit
	d.SSH.Ports, st.SSHPorts = in.Facts.SSHPorts, in.Facts.SSHWhy
	if s.SSHPorts != nil {
		d.SSH.Ports, st.SSHFixed = s.SSHPorts, true
		st.SSHPorts = []string{"set by " + in.origin("ssh.ports")}
	}
	if st.Client, warnings, err = chooseClient(in); err != nil {
		return st, nil, &InvalidError{err: err, OnlyClient: true}
	}
	allow(&st, in)
	for _, name := range s.Closed {
		is := func(o firewall.Service) bool { return o.Name == name }
		if !slices.ContainsFunc(d.Profile.Services, is) && !slices.ContainsFunc(s.Replaced, is) {
			warnings = append(warnings, fmt.Sprintf("%s: open.%s = closed has no effect: nothing else opens a service of that name", s.Sources["open."+name], name))
		}
	}
	d.Unlock = in.Unlock
	*d = d.At(in.Now)
	if st.Ruleset, err = firewall.Compile(*d); err != nil {
		return st, nil, &InvalidError{err: err}
	}
	return st, warnings, nil
}

// allow puts together who may log in: the client and those that the settings
// list. What has an end pins nothing by itself: nobody would be left after it.
func allow(st *store.State, in Input) {
	s, ssh := in.Settings, &st.Desired.SSH
	named := st.Client.Reason
	if st.Client.Source == "any" {
		named = "named by " + in.origin("ssh.client_ip")
	}
	for _, p := range st.Client.Allow {
		ssh.Allow = append(ssh.Allow, p)
		st.Allowed = append(st.Allowed, store.Allowed{From: p, Reason: named})
	}
	why := "allowed by " + in.origin("ssh.allow")
	for _, p := range s.Allow.List {
		if !slices.Contains(ssh.Allow, p) {
			ssh.Allow = append(ssh.Allow, p)
			st.Allowed = append(st.Allowed, store.Allowed{From: p, Reason: why})
		}
	}
	ssh.Timed = firewall.SSH{Timed: s.Allow.Timed}.At(in.Now.Time).Timed
	for _, t := range ssh.Timed {
		st.Allowed = append(st.Allowed, store.Allowed{From: t.From, Until: t.Until, Reason: why})
	}
	ssh.Nobody = s.Allow.Mode == settings.AllowNone
	ssh.Mode = firewall.SSHPinned
	known := len(s.Allow.List) > 0 // by name, beside the client
	if s.Allow.Mode == settings.AllowAny || len(ssh.Allow) == 0 && !ssh.Nobody || st.Client.Source == store.Unconfirmed && !known {
		ssh.Mode = firewall.SSHLimited
	}
	if st.Client.Source == "session" && !known {
		ssh.Probation = probation(in)
	}
}

// probation is the time in which a detected client has to show that it is the
// owner's; nil where it has, or need not. It begins again only where it is to be
// another length.
func probation(in Input) *firewall.Probation {
	length := in.Settings.ConfirmWithin.Truncate(time.Second)
	if length == 0 {
		return nil
	}
	if before := in.Previous; before != nil && before.Client.Source == "session" {
		p := before.Desired.SSH.Probation
		if p == nil || p.Until.Sub(p.Since) == length {
			return p
		}
	}
	w := firewall.NewWindow(in.Now, length)
	return &firewall.Probation{Window: w, NoRule: firewall.CheckTime(w.Until) != nil}
}

// origin is where a setting came from, without the line: that may change while
// the setting stays. A flag is kept in local.ini, and is from there later.
func (in Input) origin(key string) string {
	source := in.Settings.Sources[key]
	if strings.HasPrefix(source, "--") {
		return in.Local
	}
	file, line, ok := strings.Cut(source, ":")
	if ok && strings.Trim(line, "0123456789") == "" {
		return file
	}
	return source
}

// withoutDetections is a former state that was decided by nothing detected.
func withoutDetections(p *store.State) *store.State {
	if p == nil {
		return nil
	}
	q := *p
	q.Profile, q.Backend, q.Client, q.Desired.SSH.Probation = store.Choice{}, store.Choice{}, store.Client{}, nil
	return &q
}

// chooseBackend gives the backend that the settings name. Else it is what was found
// to work once; and at first iptables, until that is seen not to work.
func chooseBackend(in Input) store.Choice {
	if name := in.Settings.Backend; name != settings.Auto {
		at := in.origin("agent.backend")
		return store.Choice{Name: name, Source: at, Reason: "set by " + at}
	}
	if p := in.Previous; p != nil && p.Backend.Source == "detected" {
		return p.Backend
	}
	return store.Choice{Name: agent.Iptables, Source: "detected", Reason: "it takes these rules on this machine"}
}

// mailPorts are where a mail server listens.
var mailPorts = []uint16{25, 465, 110, 995, 143, 993}

// chooseProfile gives the profile that the settings name. Else it is what was
// found once, so that a mail server that is down for a moment closes nothing:
// web+mail where something listens for mail, the lesser web-only otherwise.
func chooseProfile(in Input) store.Choice {
	if name := in.Settings.Profile; name != settings.Auto {
		at := in.origin("agent.profile")
		return store.Choice{Name: name, Source: at, Reason: "set by " + at}
	}
	if p := in.Previous; p != nil && p.Profile.Source == "detected" {
		return p.Profile
	}
	for _, l := range in.Facts.Listeners {
		if l.Proto == firewall.TCP && slices.Contains(mailPorts, l.Port) {
			who := "something"
			if l.Process != "" {
				who = l.Process
			}
			return store.Choice{Name: "web+mail", Source: "detected", Reason: fmt.Sprintf("%s listened on the mail port %d at bootstrap", who, l.Port)}
		}
	}
	return store.Choice{Name: "web-only", Source: "detected", Reason: "nothing listened on a mail port at bootstrap"}
}

// chooseClient finds who may log in. A named client that is refused never
// falls through to detection: that could pin somebody else.
func chooseClient(in Input) (c store.Client, warnings []string, err error) {
	s, p := in.Settings, in.Previous
	switch {
	case s.Allow.Mode == settings.AllowList, s.Allow.Mode == settings.AllowNone:
		c.Source = "settings"
		if len(s.ClientIP) > 0 {
			warnings = append(warnings, fmt.Sprintf("client_ip (%s) has no effect: %s says with \"allow\" who may log in; to add somebody: basicfw-agent ssh allow ADDRESS", s.Sources["ssh.client_ip"], s.Sources["ssh.allow"]))
		}
		c.Reason = "allowed by " + in.origin("ssh.allow")
	case len(s.ClientIP) > 0:
		var errs []error
		at := in.origin("ssh.client_ip")
		for _, client := range s.ClientIP {
			warning, err := in.CheckClient(client)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: ssh.client_ip: %w", s.Sources["ssh.client_ip"], err))
			} else if warning != "" {
				warnings = append(warnings, warning)
			}
		}
		if len(errs) > 0 {
			return c, nil, errors.Join(errs...)
		}
		c.Allow, c.Source, c.Reason = s.ClientIP, "named", "named by "+at
	case s.Allow.Mode == settings.AllowAny:
	case p != nil && slices.Contains([]string{"session", "none", store.Unconfirmed}, p.Client.Source):
		c = p.Client
	case in.Facts.Session != nil:
		c.Allow, c.Source, c.Reason = []netip.Prefix{in.Facts.Session.Client}, "session", in.Facts.Session.Reason
	case len(in.Facts.Seen) > 0:
		c.Allow, c.Source, c.Reason = in.Facts.Seen, "session", "somebody who may become root was logged in from there"
		if len(in.Facts.Seen) > 1 {
			c.Reason = fmt.Sprintf("people who may become root were logged in from these %d", len(in.Facts.Seen))
		}
	default:
		c.Source, c.Reason = "none", "no client was named, and nobody who may become root was logged in over SSH"
	}
	if s.Allow.Mode == settings.AllowAny {
		c.Source, c.Reason = "any", "opened to any address by "+in.origin("ssh.allow")
	}
	return c, warnings, nil
}
