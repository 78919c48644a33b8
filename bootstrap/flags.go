//go:build linux

package bootstrap

import (
	"errors"
	"io/fs"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/files"
	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/profiles"
)

// Flags are the settings on bootstrap's command line. They override the settings
// files and are kept in local.ini.
type Flags struct {
	Profile, ClientIP, Backend string
	// ForgetClient drops the client that a flag named on another instance.
	ForgetClient bool
}

// LoadSettings returns the settings from the file config ("" is the default file) with
// the flags applied, and the new local.ini that keeps the flags, or nil if it does not
// change. If settings are invalid, the error is settings.Errors, and the valid ones
// are returned, with the local.ini of all flags.
func LoadSettings(sys *system.System, config string, f Flags) (settings.Settings, *files.Change, error) {
	s, err := settings.Load(sys, config)
	var changes []settings.Change
	var problems settings.Errors
	if err != nil && !errors.As(err, &problems) {
		return s, nil, err
	}
	for _, flag := range []struct{ name, section, key, value string }{
		{"--profile", "agent", "profile", f.Profile},
		{"--backend", "agent", "backend", f.Backend},
		{"--client-ip", "ssh", "client_ip", f.ClientIP},
	} {
		if flag.value == "" {
			continue
		}
		problems = append(problems, s.Set(flag.section, flag.key, flag.value, flag.name)...)
		changes = append(changes, settings.Change{Section: flag.section, Key: flag.key, Value: flag.value})
	}
	local := settings.LocalFile(config)
	// A client named by a flag may log in even if commands have written a list of
	// sources without it.
	if m := s.Allow.Mode; f.ClientIP != "" && (m == settings.AllowList || m == settings.AllowNone) && strings.HasPrefix(s.Sources["ssh.allow"], local+":") {
		s.Allow.Mode = settings.AllowClient
		changes = append(changes, settings.Change{Section: "ssh", Key: "allow", Value: s.Allow.String()})
	}
	if f.ForgetClient && strings.HasPrefix(s.Sources["ssh.client_ip"], local+":") {
		s.ClientIP = nil
		changes = append(changes, settings.Change{Section: "ssh", Key: "client_ip"})
	}
	change, err := ChangeLocal(sys, config, changes)
	if len(problems) > 0 {
		return s, change, problems
	}
	return s, change, err
}

// Keepable returns the flags that can be kept after bootstrap has failed with cause,
// and the command with the other flags, which does what was requested.
func Keepable(sys *system.System, f Flags, cause error) (kept Flags, retry string) {
	kept, retry = f, "basicfw-agent bootstrap"
	set, unread := profiles.Load(sys)
	for _, flag := range []struct {
		name, section, key string
		value              *string
		refused            func() bool
	}{
		{"--profile NAME", "agent", "profile", &kept.Profile, func() bool {
			if unread != nil || f.Profile == settings.Auto {
				return false
			}
			_, _, err := set.Get(f.Profile)
			return err != nil
		}},
		{"--backend NAME", "agent", "backend", &kept.Backend, func() bool { return false }},
		{"--client-ip YOUR-ADDRESS", "ssh", "client_ip", &kept.ClientIP, func() bool { return OnlyClient(cause) }},
	} {
		s := settings.Defaults()
		if v := *flag.value; v != "" && (len(s.Set(flag.section, flag.key, v, flag.name)) > 0 || flag.refused()) {
			*flag.value, retry = "", retry+" "+flag.name
		}
	}
	return kept, retry
}

// ChangeLocal returns local.ini with the changes applied, or nil if there are none.
func ChangeLocal(sys *system.System, config string, changes []settings.Change) (*files.Change, error) {
	if len(changes) == 0 {
		return nil, nil
	}
	path := settings.LocalFile(config)
	data, err := sys.ReadLimited(path, settings.MaxSize)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if data, err = settings.SetLocal(path, data, changes); err != nil {
		return nil, err
	}
	return &files.Change{Path: path, Data: data, Mode: 0o600}, nil
}

// Prune returns local.ini without the entries that have expired, or nil if none has.
func Prune(sys *system.System, config string, timers []firewall.Timer, now firewall.Moment) (*files.Change, error) {
	s, err := settings.Load(sys, config)
	if err != nil {
		return nil, err
	}
	e := settings.Editor{Settings: s, Local: settings.LocalFile(config), Now: now, Timers: timers}
	return ChangeLocal(sys, config, e.Prune())
}

// IsClone reports whether the instance-id has changed. An empty instance-id is unknown
// and does not count as a change.
func IsClone(before, now string) bool { return before != "" && now != "" && before != now }
