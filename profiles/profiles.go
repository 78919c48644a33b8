// Package profiles knows what kinds of servers there are: those that are built
// in, and those of the owner's files.
package profiles

import (
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

// Dir is where the owner's profiles lie, each in NAME.ini.
const Dir = "/etc/basicfw/profiles.d"

// The names of what is built in.
const (
	WebOnly = "web-only"
	WebMail = "web+mail"

	// BuiltIn is the source of a profile that no file defines.
	BuiltIn = "built in"
)

// alias is for those to whom "+" is hard to type, or means a blank: in URLs.
const (
	alias   = "web-mail"
	aliasOf = WebMail
)

//go:embed web-only.ini web+mail.ini
var builtIn embed.FS

// Set is the profiles that there are.
type Set struct {
	profiles map[string]firewall.Profile
	sources  map[string]string
}

// Entry is a profile in a list.
type Entry struct {
	Name, Title string
	Source      string // BuiltIn, or the file
}

// Load reads the owner's profiles and puts them together with those that are
// built in, and with what they extend. A file replaces the built-in profile of
// its name, also for those that extend that. Whatever is wrong in any file is
// an error, whether its profile is used or not: the error is settings.Errors.
func Load(sys *system.System) (*Set, error) {
	files, errs := readAll(sys)
	set, problems := resolve(files)
	errs = append(errs, problems...)
	sortByFile(errs)
	if err := errs.Err(); err != nil {
		return nil, err
	}
	return set, nil
}

// Check tells what is wrong with a profile's file as if it lay in Dir, where
// it would replace one of its name. The error is settings.Errors.
func Check(sys *system.System, path string) error {
	f, errs := read(sys, path)
	files, _ := readAll(sys) // what is wrong with others is not this one's
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

// Get gives a profile, and where it is from: BuiltIn, or its file.
func (s *Set) Get(name string) (p firewall.Profile, source string, err error) {
	if name == alias {
		name = aliasOf
	}
	p, found := s.profiles[name]
	if !found {
		return firewall.Profile{}, "", noProfile(name, slices.Sorted(maps.Keys(s.profiles)))
	}
	p.Services = slices.Clone(p.Services)
	return p, s.sources[name], nil
}

// List gives all profiles, in the order of their names.
func (s *Set) List() []Entry {
	var list []Entry
	for _, name := range slices.Sorted(maps.Keys(s.profiles)) {
		list = append(list, Entry{Name: name, Title: s.profiles[name].Title, Source: s.sources[name]})
	}
	return list
}

// All gives what all profiles open, in the order of their names.
func (s *Set) All() []firewall.Profile {
	var list []firewall.Profile
	for _, name := range slices.Sorted(maps.Keys(s.profiles)) {
		list = append(list, s.profiles[name])
	}
	return list
}

func noProfile(name string, known []string) error {
	return fmt.Errorf("no profile %s: there are %s", firewall.Quote(name), strings.Join(known, ", "))
}

// readAll reads what is built in and what lies in Dir, by name.
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
			f.Services[i].Source = "profile " + name // its file is in the program
		}
		files[name] = f
	}
	entries, err := sys.ReadDir(Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, settings.Problem{File: Dir, Msg: "reading it: " + err.Error()})
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") || !strings.HasSuffix(e.Name(), ".ini") {
			continue // an editor's, or what rpm left: *.ini.rpmnew
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
	if len(errs) == 0 || len(doc.Sections) > 0 { // else its keys are not what is missing
		errs = append(errs, problems...)
	}
	errs.Sort()
	return f, errs
}

// resolve puts each profile together with the one that it extends.
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
		set.profiles[name] = combine(files, f)
		set.sources[name] = BuiltIn
		if f.Path != "" {
			set.sources[name] = f.Path
		}
	}
	return set, nil
}

// parent gives what f extends, if there is such a profile.
func parent(files map[string]File, f File) (File, bool) {
	name := f.Extends
	if name == alias {
		name = aliasOf
	}
	p, found := files[name]
	return p, found && name != ""
}

// checkExtends says what is wrong with what f itself extends. What is wrong
// further up is its parents' to answer for.
func checkExtends(files map[string]File, f File) error {
	if f.Extends == "" {
		return nil
	}
	chain := []string{f.Name}
	p, found := parent(files, f)
	if !found {
		return noProfile(f.Extends, slices.Sorted(maps.Keys(files)))
	}
	for found {
		again := slices.Contains(chain, p.Name)
		chain = append(chain, p.Name)
		if p.Name == f.Name {
			return fmt.Errorf("it goes in a circle: %s", strings.Join(chain, " -> "))
		}
		if again {
			return nil
		}
		p, found = parent(files, p)
	}
	return nil
}

// combine puts f over what it extends: a service of the same name takes the
// parent's place.
func combine(files map[string]File, f File) firewall.Profile {
	profile := firewall.Profile{Ping: true}
	if p, found := parent(files, f); found {
		profile = combine(files, p)
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

func sortByFile(errs settings.Errors) {
	slices.SortStableFunc(errs, func(a, b settings.Problem) int { return strings.Compare(a.File, b.File) })
	errs.Sort()
}
