package profiles

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/settings"
)

// File is the content of one profile's file, not yet merged with the profile that it
// extends.
type File struct {
	Path     string // "" if it is built in
	Name     string // NAME of NAME.ini
	Title    string
	Extends  string
	Ping     *bool // nil: as in the profile that it extends, or yes
	Services []firewall.Service

	extendsLine int
}

// maxTitle is the maximum length of a title in characters: it is shown in one line.
const maxTitle = 60

// Decode returns the profile in a document, whose file name must be NAME.ini.
// The errors are those of its values; the returned file holds the valid values.
func Decode(doc *settings.Document) (File, settings.Errors) {
	var errs settings.Errors
	name, isINI := strings.CutSuffix(filepath.Base(doc.File), ".ini")
	f := File{Path: doc.File, Name: name}
	err := firewall.CheckProfileName(name)
	switch {
	case !isINI:
		err = fmt.Errorf("file name %s: want NAME.ini", firewall.Quote(name))
	case name == alias:
		err = fmt.Errorf("%s is an alias of the built-in %s: to replace that, name the file %s.ini", alias, aliasOf, aliasOf)
	}
	errs.Add(doc.File, 1, "", err)

	if p := doc.Section("profile"); p == nil || !slices.ContainsFunc(p.Keys, func(k settings.Key) bool { return k.Name == "name" && k.Value != "" }) {
		line := 1
		if p != nil {
			line = p.Line
		}
		if firewall.CheckProfileName(name) != nil {
			name = "NAME"
		}
		errs.Add(doc.File, line, "profile.name", fmt.Errorf("missing: want name = %s in the section [profile]", name))
	}
	readers := map[string]func(settings.Key) error{"profile": f.set, "open": f.open}
	for _, section := range doc.Sections {
		read, known := readers[section.Name]
		if !known {
			errs.Add(doc.File, section.Line, "", fmt.Errorf("unknown section [%s]: want [profile] or [open]", section.Name))
			continue
		}
		for _, k := range section.Keys {
			errs.Add(doc.File, k.Line, section.Name+"."+k.Name, read(k))
		}
	}
	errs.Sort()
	return f, errs
}

// set sets one key of [profile]. An empty value counts as unset.
func (f *File) set(k settings.Key) error {
	switch k.Name {
	case "name":
		if k.Value != "" && k.Value != f.Name {
			return fmt.Errorf("%s does not match the file name %s", firewall.Quote(k.Value), firewall.Quote(filepath.Base(f.Path)))
		}
	case "title":
		if utf8.RuneCountInString(k.Value) > maxTitle {
			return fmt.Errorf("%s is longer than %d characters", firewall.Quote(k.Value), maxTitle)
		}
		f.Title = k.Value
	case "extends":
		f.Extends, f.extendsLine = k.Value, k.Line
	case "ping":
		if k.Value == "" {
			return nil
		}
		ping, err := settings.ParseYesNo(k.Value)
		if err != nil {
			return err
		}
		f.Ping = &ping
	default:
		return fmt.Errorf("unknown key: [profile] has name, title, extends, ping")
	}
	return nil
}

// open adds one service. An empty value counts as unset.
func (f *File) open(k settings.Key) error {
	if k.Value == "" {
		return firewall.CheckServiceName(k.Name)
	}
	s, err := firewall.ParseService(k.Name, k.Value)
	if err != nil {
		return err
	}
	if !s.Until.IsZero() {
		return fmt.Errorf("until is not allowed in a profile: put the service into [open] of the settings")
	}
	s.Source = fmt.Sprintf("%s:%d", f.Path, k.Line)
	f.Services = append(f.Services, s)
	return nil
}
