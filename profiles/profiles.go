// Package profiles provides the built-in profiles and those in the administrator's
// files.
package profiles

import (
	"cmp"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Dir holds the administrator's profiles, each in NAME.ini.
const Dir = "/etc/basicfw/profiles.d"

// The built-in profiles.
const (
	WebOnly = "web-only"
	WebMail = "web+mail"

	// BuiltIn is the source of a profile that no file defines.
	BuiltIn = "built in"
)

// alias avoids the "+", which can be hard to type and means a space in URLs.
const (
	alias   = "web-mail"
	aliasOf = WebMail
)

//go:embed web-only.ini web+mail.ini
var builtIn embed.FS

// Set is a set of profiles.
type Set struct {
	profiles map[string]firewall.Profile
	sources  map[string]string
}

// Entry is a profile in a list.
type Entry struct {
	Name, Title string
	Source      string // BuiltIn, or the file
}

// Load returns the built-in profiles and the administrator's, each merged with the
// profile that it extends. A file replaces the built-in profile of the same name,
// also for profiles that extend it. An invalid file is an error even if its profile
// is not used: the error is settings.Errors.
func Load(sys *system.System) (*Set, error) {
	files, errs := readAll(sys)
	set, problems := resolve(files)
	errs = append(errs, problems...)
	slices.SortStableFunc(errs, func(a, b settings.Problem) int { return strings.Compare(a.File, b.File) })
	errs.Sort()
	if err := errs.Err(); err != nil {
		return nil, err
	}
	return set, nil
}

// Check checks a profile's file as if it were in Dir, where it would replace one of
// the same name. The error is settings.Errors.
func Check(sys *system.System, path string) error {
	f, errs := read(sys, path)
	files, _ := readAll(sys) // errors in other files do not matter here
	files[f.Name] = f
	_, problems := resolve(files)
	for _, p := range problems {
		if p.File == path {
			errs = append(errs, p)
		}
	}
	errs.Sort()
	return errs.Err()
}

// Get returns a profile and its source: BuiltIn, or its file.
func (s *Set) Get(name string) (p firewall.Profile, source string, err error) {
	if name == alias {
		name = aliasOf
	}
	p, found := s.profiles[name]
	if !found {
		return firewall.Profile{}, "", unknownProfile(name, slices.Sorted(maps.Keys(s.profiles)))
	}
	p.Services = slices.Clone(p.Services)
	return p, s.sources[name], nil
}

// List returns all profiles, sorted by name.
func (s *Set) List() []Entry {
	var list []Entry
	for _, p := range s.All() {
		list = append(list, Entry{Name: p.Name, Title: p.Title, Source: s.sources[p.Name]})
	}
	return list
}

// All returns all profiles with their services, sorted by name.
func (s *Set) All() []firewall.Profile {
	var list []firewall.Profile
	for _, name := range slices.Sorted(maps.Keys(s.profiles)) {
		list = append(list, s.profiles[name])
	}
	return list
}

func unknownProfile(name string, known []string) error {
	return fmt.Errorf("unknown profile %s: want one of %s", firewall.Quote(name), strings.Join(known, ", "))
}

// readAll returns the built-in files and those in Dir, by name.
func readAll(sys *system.System) (map[string]File, settings.Errors) {
	files := map[string]File{}
	var errs settings.Errors
	for _, name := range []string{WebOnly, WebMail} {
		data, err := builtIn.ReadFile(name + ".ini")
		errs.Add(name+".ini", 0, "", err)
		doc, problems := settings.Parse(name+".ini", data)
		f, more := Decode(doc)
		errs = append(append(errs, problems...), more...)
		f.Path = ""
		for i := range f.Services {
			f.Services[i].Source = "profile " + name // the file is built into the program
		}
		files[name] = f
	}
	entries, err := sys.ReadDir(Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, settings.Problem{File: Dir, Msg: "cannot be read: " + err.Error()})
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") || !strings.HasSuffix(e.Name(), ".ini") {
			continue // left by an editor or by rpm: *.ini.rpmnew
		}
		f, problems := read(sys, filepath.Join(Dir, e.Name()))
		errs = append(errs, problems...)
		files[f.Name] = f
	}
	return files, errs
}

func read(sys *system.System, path string) (File, settings.Errors) {
	doc, errs := settings.Read(sys, path)
	f, problems := Decode(doc)
	if len(errs) == 0 || len(doc.Sections) > 0 { // otherwise missing keys are not the problem
		errs = append(errs, problems...)
	}
	errs.Sort()
	return f, errs
}

// resolve merges each profile with the one that it extends.
func resolve(files map[string]File) (*Set, settings.Errors) {
	var errs settings.Errors
	for _, name := range slices.Sorted(maps.Keys(files)) {
		f := files[name]
		errs.Add(f.Path, f.extendsLine, "profile.extends", checkExtends(files, f))
	}
	if len(errs) > 0 {
		return nil, errs
	}
	set := &Set{profiles: map[string]firewall.Profile{}, sources: map[string]string{}}
	for name, f := range files {
		set.profiles[name] = merge(files, f)
		set.sources[name] = cmp.Or(f.Path, BuiltIn)
	}
	return set, nil
}

// parent returns the profile that f extends, if it exists.
func parent(files map[string]File, f File) (File, bool) {
	name := f.Extends
	if name == alias {
		name = aliasOf
	}
	p, found := files[name]
	return p, found && name != ""
}

// checkExtends checks the profile that f itself extends. Errors further up are
// reported for its parents.
func checkExtends(files map[string]File, f File) error {
	if f.Extends == "" {
		return nil
	}
	chain := []string{f.Name}
	p, found := parent(files, f)
	if !found {
		return unknownProfile(f.Extends, slices.Sorted(maps.Keys(files)))
	}
	for found {
		again := slices.Contains(chain, p.Name)
		chain = append(chain, p.Name)
		if p.Name == f.Name {
			return fmt.Errorf("circular reference: %s", strings.Join(chain, " -> "))
		}
		if again {
			return nil
		}
		p, found = parent(files, p)
	}
	return nil
}

// merge merges f into the profile that it extends: a service replaces the parent's
// service of the same name.
func merge(files map[string]File, f File) firewall.Profile {
	profile := firewall.Profile{Ping: true}
	if p, found := parent(files, f); found {
		profile = merge(files, p)
	}
	profile.Name, profile.Title = f.Name, f.Title
	if f.Ping != nil {
		profile.Ping = *f.Ping
	}
	for _, s := range f.Services {
		i := slices.IndexFunc(profile.Services, func(o firewall.Service) bool { return o.Name == s.Name })
		if i >= 0 {
			profile.Services[i] = s
		} else {
			profile.Services = append(profile.Services, s)
		}
	}
	return profile
}
