//go:build linux

// Package bootstrap computes the desired state of a machine, at its first boot
// and when its settings change. It depends on the settings, the session that
// runs the command, and the instance. It also generates the user-data.
package bootstrap

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/backend"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/store"
	"github.com/basicfw/basicfw-agent/profiles"
)

// Input is everything that the desired state depends on.
type Input struct {
	Settings settings.Settings // with the flags applied
	Local    string            // the file that keeps the flags
	Profiles *profiles.Set
	Facts    host.Facts // its interfaces as detected
	// CheckClient checks a named client against this host's networks.
	CheckClient func(netip.Prefix) (warning string, err error)
	Blocker     Blocker
	// ReadList reads a file of addresses: SSH sources, or those of services.
	ReadList func(path string, ssh bool) ([]netip.Prefix, error)
	Direct   []firewall.ContainerPort
	Previous *store.State    // the state on disk, or nil
	Redetect bool            // repeat earlier detection
	Now      firewall.Moment // entries that have expired by then are left out
}

// OnlyClient reports whether only the named client was refused.
func OnlyClient(err error) bool {
	var problems settings.Errors
	var invalid *InvalidError
	return errors.As(err, &problems) && problems.OnlyClient() || errors.As(err, &invalid) && invalid.OnlyClient
}

// Decide returns the desired state with its compiled rules. What was detected at
// bootstrap is kept, unless Redetect is set. The warnings are for the user.
func Decide(in Input) (st store.State, warnings []string, err error) {
	s := in.Settings
	var unlock *firewall.Unlock // stays in effect
	if p := in.Previous; p != nil {
		if unlock = p.Desired.Unlock; IsClone(p.InstanceID, in.Facts.Instance) {
			// Another machine, and maybe another administrator.
			warnings = append(warnings, fmt.Sprintf("the instance-id changed from %q to %q: detecting again", p.InstanceID, in.Facts.Instance))
			in.Previous, unlock = nil, nil
		} else if p.Failsafe != "" { // it has no desired state
			in.Previous = nil
		}
	}
	lists := newLists(in)
	st = store.State{Schema: store.Schema, InstanceID: in.Facts.Instance}
	if in.Previous != nil {
		p := in.Previous.At(in.Now)
		if in.Redetect {
			p.Profile, p.Backend, p.Client, p.Desired.SSH.Probation = store.Choice{}, store.Choice{}, store.Client{}, nil
		}
		in.Previous = &p
		st.Bootstrapped, st.Service, st.RescueArgument = p.Bootstrapped, p.Service, p.RescueArgument
		st.InstanceID = cmp.Or(st.InstanceID, p.InstanceID)
	}
	st.Backend = chooseBackend(in)

	d := &st.Desired
	d.Open, d.Closed, d.Trusted, d.LogDrops, d.SSH.Limit = s.Open, s.Closed, s.Trusted, s.LogDrops, s.Limit
	if d.Published = published(in); d.Published == firewall.PublishedProfile {
		d.Direct = in.Direct
	}
	st.Named = &host.Naming{Public: s.Public, Private: s.Private, Trusted: s.Trusted}
	if p := in.Previous; p != nil && !in.Redetect {
		if st.Zones = p.Zones; p.Named == nil {
			st.Zones = host.Remember(p.Desired.Interfaces)
		}
	}
	st = st.Zoned(in.Facts.Interfaces, host.Naming{})
	for _, name := range st.Named.Absent(d.Interfaces) {
		warnings = append(warnings, name+" in [interfaces]: no such interface exists")
	}
	st.Profile = chooseProfile(in)
	d.Profile, _, err = in.Profiles.Get(st.Profile.Name)
	if err != nil {
		if st.Profile.Source != "detected" {
			err = fmt.Errorf("%s: %w", settings.Label(s.Sources["agent.profile"], "agent.profile"), err)
		}
		return st, warnings, &InvalidError{err: err}
	}
	st.Profile.Name = d.Profile.Name

	d.SSH.Ports, st.SSHPorts = in.sshPorts()
	st.SSHFixed = s.SSHPorts != nil
	client, more, err := chooseClient(in)
	if err != nil {
		return st, warnings, &InvalidError{err: err, OnlyClient: true}
	}
	st.Client, warnings = client, append(warnings, more...)
	allow(&st, in, lists)
	lists.fill(d)
	if warnings = append(warnings, lists.warnings...); len(lists.errs) > 0 {
		return st, warnings, &InvalidError{err: errors.Join(lists.errs...)}
	}
	warnings = append(warnings, closesNothing(s, d.Profile)...)
	more, errs := overlaps(*d)
	warnings = append(warnings, more...)
	d.Unlock = unlock
	var previous *firewall.Desired
	if in.Previous != nil {
		previous = &in.Previous.Desired
	}
	more, err = in.Blocker.set(d, s.Blocks, previous)
	warnings, errs = append(warnings, more...), append(errs, err)
	*d = d.Start(previous, in.Now)
	st = st.At(in.Now)
	if st.Ruleset, err = firewall.Compile(*d); errors.Join(append(errs, err)...) != nil {
		return st, warnings, &InvalidError{err: errors.Join(append(errs, err)...)}
	}
	return st, warnings, nil
}

// closesNothing returns a warning for each service that is closed but opened nowhere.
func closesNothing(s settings.Settings, profile firewall.Profile) (warnings []string) {
	for _, name := range s.Closed {
		is := func(o firewall.Service) bool { return o.Name == name }
		if !slices.ContainsFunc(profile.Services, is) && !slices.ContainsFunc(s.Replaced, is) {
			warnings = append(warnings, fmt.Sprintf("%s: open.%s = closed has no effect: no profile or other setting opens this service", s.Sources["open."+name], name))
		}
	}
	return warnings
}

// published returns what happens to ports that containers publish. After an upgrade
// from a version that did not affect them, they are left alone until the settings
// have the key.
func published(in Input) string {
	p := in.Previous
	if _, set := in.Settings.Sources["containers.published"]; p != nil && p.Desired.Published == "" && !set {
		return ""
	}
	return in.Settings.Published
}

// overlaps returns warnings about the profile's services that contain sshd's ports, and
// errors about those of [open].
func overlaps(d firewall.Desired) (warnings []string, errs []error) {
	for _, o := range d.SSHOverlaps() {
		if o.Open {
			errs = append(errs, o)
		} else {
			warnings = append(warnings, o.Loss()+": "+o.Fix())
		}
	}
	return warnings, errs
}

// sshPorts returns sshd's ports and the source of each. A port by which an SSH
// session came in is kept, unless the administrator has opened it as a service.
func (in Input) sshPorts() (ports []uint16, why []string) {
	if in.Settings.SSHPorts != nil {
		return in.Settings.SSHPorts, []string{"set by " + in.origin("ssh.ports")}
	}
	all, reasons := in.Facts.SSHPorts, in.Facts.SSHWhy
	if in.Previous != nil && !in.Redetect {
		all, reasons = in.Previous.KeepPorts(all, reasons, false)
	}
	for i, p := range all {
		reason := ""
		if i < len(reasons) {
			reason = reasons[i]
		}
		opened := func(s firewall.Service) bool { return s.Proto == firewall.TCP && s.Ports.Contains(p) }
		if reason != host.SessionPort || !slices.ContainsFunc(in.Settings.Open, opened) {
			ports, why = append(ports, p), append(why, reason)
		}
	}
	if len(ports) == 0 {
		return []uint16{22}, []string{host.NoSSHD}
	}
	return ports, why
}

// LoginWarnings returns warnings about logins that may surprise the administrator after a
// bootstrap.
func LoginWarnings(st store.State, f host.Facts) []string {
	served := slices.ContainsFunc(f.Listeners, func(l host.Listener) bool { return l.Proto == firewall.TCP && l.Port == 22 })
	if slices.Equal(st.SSHPorts, []string{host.NoSSHD}) && !served {
		return append(f.LoginWarnings, "no SSH server was found, so port 22 is opened for SSH; if one serves another port, set \"ports\" in [ssh]")
	}
	return f.LoginWarnings
}

// allow sets the sources that may log in: the client and those in the settings.
// Temporary sources alone do not pin SSH: no source would be left after them.
func allow(st *store.State, in Input, lists *addressLists) {
	s, ssh := in.Settings, &st.Desired.SSH
	named := store.Allowed{Reason: st.Client.Reason}
	if len(s.ClientIP) > 0 {
		named.Reason, named.Source = "client_ip in "+in.origin("ssh.client_ip"), in.line("ssh.client_ip")
	}
	for _, p := range st.Client.Allow {
		ssh.Allow = append(ssh.Allow, p)
		named.From = p
		st.Allowed = append(st.Allowed, named)
	}
	listed := store.Allowed{Reason: "allow in " + in.origin("ssh.allow"), Source: in.line("ssh.allow")}
	for _, p := range s.Allow.List {
		if !slices.Contains(ssh.Allow, p) {
			ssh.Allow = append(ssh.Allow, p)
			listed.From = p
			st.Allowed = append(st.Allowed, listed)
		}
	}
	if s.Allow.File != "" {
		ssh.File = &firewall.ListFile{Path: s.Allow.File, Others: ssh.Allow}
		f := firewall.ListFile{Path: s.Allow.File, SSH: true}
		f.From = lists.list(settings.Label(s.Sources["ssh.allow"], "ssh.allow"), f.Path, true)
		*st = st.WithList(f)
		ssh = &st.Desired.SSH
	}
	ssh.Timed = s.Allow.Timed // including expired ones, until the end of Decide
	for _, t := range ssh.Timed {
		listed.From, listed.Until = t.From, t.Until
		st.Allowed = append(st.Allowed, listed)
	}
	ssh.Nobody = s.Allow.Mode == settings.AllowNone
	ssh.Mode = firewall.SSHPinned
	known := len(s.Allow.List) > 0 || s.Allow.File != "" // listed in addition to the client
	if s.Allow.Mode == settings.AllowAny || len(ssh.Allow) == 0 && !ssh.Nobody || st.Client.Source == store.Unconfirmed && !known {
		ssh.Mode = firewall.SSHLimited
	}
	if st.Client.Source == "session" && !known {
		ssh.Probation = probation(in)
	}
}

// probation returns the time within which a detected client must be confirmed,
// or nil if it has been, or need not be. It restarts only if its length changes.
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

// origin returns the source of a setting, without the line number, which can
// change while the setting stays. For a flag it is local.ini, which keeps flags.
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

// line returns the file and line of a setting, or "" if it is a flag.
func (in Input) line(key string) string {
	if source := in.Settings.Sources[key]; !strings.HasPrefix(source, "--") {
		return source
	}
	return ""
}

// set returns the choice made by a setting.
func (in Input) set(key, name string) store.Choice {
	at := in.origin(key)
	return store.Choice{Name: name, Source: at, Reason: "set by " + at}
}

// chooseBackend returns the backend in the settings, otherwise the one detected
// earlier. The first choice is iptables, until it turns out not to work.
func chooseBackend(in Input) store.Choice {
	if name := in.Settings.Backend; name != settings.Auto {
		return in.set("agent.backend", name)
	}
	if p := in.Previous; p != nil && p.Backend.Source == "detected" {
		return p.Backend
	}
	return store.Choice{Name: backend.Iptables, Source: "detected", Reason: "detected"}
}

// mailPorts are the ports of a mail server.
var mailPorts = []uint16{25, 465, 110, 995, 143, 993}

// chooseProfile returns the profile in the settings, otherwise the one detected
// earlier: a mail server that is briefly down must not close its ports. The first
// choice is web+mail if a process listens on a mail port, otherwise web-only.
func chooseProfile(in Input) store.Choice {
	if name := in.Settings.Profile; name != settings.Auto {
		return in.set("agent.profile", name)
	}
	if p := in.Previous; p != nil && p.Profile.Source == "detected" {
		return p.Profile
	}
	for _, l := range in.Facts.Listeners {
		if l.Proto == firewall.TCP && slices.Contains(mailPorts, l.Port) {
			return store.Choice{Name: "web+mail", Source: "detected",
				Reason: fmt.Sprintf("%s listened on the mail port %d at bootstrap", cmp.Or(l.Process, "a process"), l.Port)}
		}
	}
	return store.Choice{Name: "web-only", Source: "detected", Reason: "no process listened on a mail port at bootstrap"}
}

// chooseClient returns the client that may log in. If a named client is refused,
// none is detected instead: that could pin SSH to a stranger.
func chooseClient(in Input) (c store.Client, warnings []string, err error) {
	s, p := in.Settings, in.Previous
	switch {
	case s.Allow.Mode == settings.AllowList, s.Allow.Mode == settings.AllowNone:
		c.Source = "settings"
		if len(s.ClientIP) > 0 {
			warnings = append(warnings, fmt.Sprintf("client_ip (%s) has no effect: allow (%s) replaces it; to add an address: basicfw-agent ssh allow ADDRESS", s.Sources["ssh.client_ip"], s.Sources["ssh.allow"]))
		}
		c.Reason = "allow in " + in.origin("ssh.allow")
	case len(s.ClientIP) > 0:
		var errs []error
		for _, client := range s.ClientIP {
			warning, err := in.CheckClient(client)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", settings.Label(s.Sources["ssh.client_ip"], "ssh.client_ip"), err))
			} else if warning != "" {
				warnings = append(warnings, warning)
			}
		}
		if len(errs) > 0 {
			return c, nil, errors.Join(errs...)
		}
		c.Allow, c.Source, c.Reason = s.ClientIP, "named", "client_ip in "+in.origin("ssh.client_ip")
	case s.Allow.Mode == settings.AllowAny:
	case p != nil && slices.Contains([]string{"session", "none", store.Unconfirmed}, p.Client.Source):
		c = p.Client
	case in.Facts.Session != nil:
		c.Allow, c.Source, c.Reason = []netip.Prefix{in.Facts.Session.Prefix}, "session", in.Facts.Session.Reason
	case len(in.Facts.Seen) > 0:
		c.Allow, c.Source, c.Reason = in.Facts.Seen, "session", "a user who may become root was logged in from there"
		if len(in.Facts.Seen) > 1 {
			c.Reason = fmt.Sprintf("users who may become root were logged in from these %d addresses", len(in.Facts.Seen))
		}
	default:
		c.Source, c.Reason = "none", "no client was named, and no user who may become root was logged in over SSH"
	}
	if s.Allow.Mode == settings.AllowAny {
		c.Source, c.Reason = "any", "allow = any in "+in.origin("ssh.allow")
	}
	return c, warnings, nil
}
