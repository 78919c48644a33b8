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

// File is a profile as its file says it, before it is put together with the
// one that it extends.
type File struct {
	Path     string // "" where it is built in
	Name     string // NAME of NAME.ini
	Title    string
	Extends  string
	Ping     *bool // nil is as the one that it extends, or yes
	Services []firewall.Service

	extendsLine int
}

// maxTitle is how many characters a title may have: it is shown in one line.
const maxTitle = 60

// Decode reads a profile from a document, whose file must be called NAME.ini.
// The errors are those of its values; the file beside them holds everything
// that was right.
func Decode(doc *settings.Document) (File, settings.Errors) {
	var errs settings.Errors
	name, isINI := strings.CutSuffix(filepath.Base(doc.File), ".ini")
	f := File{Path: doc.File, Name: name}
	err := settings.CheckProfileName(name)
	switch {
	case !isINI:
		err = fmt.Errorf("the file is called %s: want NAME.ini", firewall.Quote(name))
	case name == alias:
		err = fmt.Errorf("%s is another name of the built-in %s: to replace that, call the file %s.ini", alias, aliasOf, aliasOf)
	}
	errs.Add(doc.File, 1, "", err)

	if p := doc.Section("profile"); p == nil || !slices.ContainsFunc(p.Keys, func(k settings.Key) bool { return k.Name == "name" && k.Value != "" }) {
		line := 1
		if p != nil {
			line = p.Line
		}
		errs.Add(doc.File, line, "profile.name", fmt.Errorf("it is missing: want name = %s in the section [profile]", printableName(name)))
	}
	for _, section := range doc.Sections {
		switch section.Name {
		case "profile":
			for _, k := range section.Keys {
				errs.Add(doc.File, k.Line, "profile."+k.Name, f.set(k))
			}
		case "open":
			for _, k := range section.Keys {
				errs.Add(doc.File, k.Line, "open."+k.Name, f.open(k))
			}
		default:
			errs.Add(doc.File, section.Line, "", fmt.Errorf("unknown section [%s]: there are [profile] and [open]", section.Name))
		}
	}
	errs.Sort()
	return f, errs
}

// printableName is a name to show in an example.
func printableName(name string) string {
	if settings.CheckProfileName(name) != nil {
		return "NAME"
	}
	return name
}

// set takes one key of [profile]. An empty value is as good as none.
func (f *File) set(k settings.Key) error {
	switch k.Name {
	case "name":
		if k.Value != "" && k.Value != f.Name {
			return fmt.Errorf("%s in a file called %s: want the same name in both", firewall.Quote(k.Value), firewall.Quote(filepath.Base(f.Path)))
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

// open takes one service. An empty value is as good as none.
func (f *File) open(k settings.Key) error {
	if k.Value == "" {
		return firewall.CheckServiceName(k.Name)
	}
	s, err := firewall.ParseService(k.Name, k.Value)
	if err != nil {
		return err
	}
	if !s.Until.IsZero() {
		return fmt.Errorf("until: what a profile opens has no end: put it into [open] of the settings")
	}
	s.Source = fmt.Sprintf("%s:%d", f.Path, k.Line)
	f.Services = append(f.Services, s)
	return nil
}
