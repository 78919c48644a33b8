// Package settings reads what the owner wants: a strict INI, and the settings
// that it holds. Whatever is wrong is reported at once, each with file, line,
// key and what would be right.
package settings

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"unicode"
	"unicode/utf8"

	"gopkg.in/ini.v1"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

const (
	// MaxSize is how many bytes a file may have.
	MaxSize = 1 << 20
	// maxEntries is how many sections and keys a file may have: ini.v1 looks
	// for each key among all the others.
	maxEntries = 4096
	// maxName is how long a section's or a key's name may be.
	maxName = 64
	bom     = "\ufeff"
)

// Document is a file's sections in their order. A section that comes again
// goes on where it was.
type Document struct {
	File     string
	Sections []Section
}

// Section is a section's keys in their order.
type Section struct {
	Name string
	Line int
	Keys []Key
}

// Key is a key with its value, which is printable and has no white space
// around it.
type Key struct {
	Name, Value string
	Line        int
}

// Section gives the section of that name, or nil.
func (d *Document) Section(name string) *Section {
	for i := range d.Sections {
		if d.Sections[i].Name == name {
			return &d.Sections[i]
		}
	}
	return nil
}

// Read reads and parses a file, which must be there.
func Read(sys *system.System, file string) (*Document, Errors) {
	data, err := sys.ReadLimited(file, MaxSize)
	if err == nil {
		return Parse(file, data)
	}
	doc := &Document{File: file}
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return doc, Errors{{File: file, Msg: "reading it: " + pathErr.Err.Error()}}
	}
	return doc, Errors{tooLarge(file)}
}

func tooLarge(file string) Problem {
	return Problem{File: file, Line: 1, Msg: fmt.Sprintf("the file is larger than %d bytes: no settings are", MaxSize)}
}

// Parse reads a strict INI: sections in brackets, key = value, comments from a
// ";" or "#" at the start of a line or behind white space, and nothing else:
// no continuation, no expansion, no quoting. It is UTF-8; a byte order mark
// and line ends of CR LF are fine. The document holds every line that was
// right, so that its values can be judged together with the rest.
func Parse(file string, data []byte) (*Document, Errors) {
	doc := &Document{File: file}
	if len(data) > MaxSize {
		return doc, Errors{tooLarge(file)}
	}
	s := scanner{doc: doc, sections: map[string]int{}, keys: map[string]int{}}
	for i, line := range strings.Split(strings.TrimPrefix(string(data), bom), "\n") {
		if !s.line(i+1, strings.TrimSuffix(line, "\r")) {
			break
		}
	}
	s.load()
	return doc, s.errs
}

// scanner holds the lines to the strict form and knows their numbers. ini.v1
// does neither: it has no line numbers, and lets pass, cuts or joins what is to
// be refused ("[a]junk", "80#443", a trailing backslash, a key that comes
// twice). So it gets to read what has passed here, without the comments.
type scanner struct {
	doc      *Document
	errs     Errors
	clean    strings.Builder // what ini.v1 gets to read
	place    place
	current  int            // the section that we are in
	sections map[string]int // index of each
	keys     map[string]int // line of each section.key
	entries  int
}

type place int

const (
	beforeSections place = iota
	inSection
	inBrokenSection // its header was wrong: nobody can judge its keys
)

func (s *scanner) problem(line int, key, format string, args ...any) {
	s.errs = append(s.errs, Problem{File: s.doc.File, Line: line, Key: key, Msg: fmt.Sprintf(format, args...)})
}

// line takes one line, and tells whether to go on.
func (s *scanner) line(n int, line string) bool {
	if !utf8.ValidString(line) {
		s.problem(n, "", "this is not UTF-8: settings are plain text")
		return true
	}
	if i := strings.IndexFunc(line, func(r rune) bool { return unicode.IsControl(r) && r != '\t' }); i >= 0 {
		r, _ := utf8.DecodeRuneInString(line[i:])
		s.problem(n, "", "there is a control character (%U): settings are plain text", r)
		return true
	}
	text, _ := splitComment(line)
	text = strings.Trim(text, " \t")
	if text == "" {
		return true
	}
	if s.entries++; s.entries > maxEntries {
		s.problem(n, "", "more than %d settings: no file needs as many", maxEntries)
		return false
	}
	if text[0] == '[' {
		s.header(n, text)
	} else {
		s.keyValue(n, text)
	}
	return true
}

// splitComment divides a line in front of its comment and the white space
// before that.
func splitComment(line string) (text, comment string) {
	for i := range len(line) {
		if (line[i] == ';' || line[i] == '#') && (i == 0 || line[i-1] == ' ' || line[i-1] == '\t') {
			text = strings.TrimRight(line[:i], " \t")
			return text, line[len(text):]
		}
	}
	return line, ""
}

func (s *scanner) header(n int, text string) {
	s.place = inBrokenSection
	name, rest, closed := strings.Cut(text[1:], "]")
	switch {
	case !closed:
		s.problem(n, "", "%s: a section is written [NAME]", firewall.Quote(text))
		return
	case rest != "":
		s.problem(n, "", "%s: behind the \"]\" may be a comment, with white space before it, and nothing else", firewall.Quote(text))
		return
	case !isName(name):
		s.problem(n, "", "%s: want a section's name of letters, digits, \"_\", \"-\" and \".\"", firewall.Quote(text))
		return
	}
	s.place = inSection
	fmt.Fprintln(&s.clean, text)
	if i, again := s.sections[name]; again {
		s.current = i
		return
	}
	s.current = len(s.doc.Sections)
	s.sections[name] = s.current
	s.doc.Sections = append(s.doc.Sections, Section{Name: name, Line: n})
}

func (s *scanner) keyValue(n int, text string) {
	text = strings.ReplaceAll(text, "\t", " ")
	name, value, found := strings.Cut(text, "=")
	name, value = strings.TrimRight(name, " "), strings.TrimLeft(value, " ")
	switch {
	case !found:
		s.problem(n, "", "%s: want KEY = VALUE, [SECTION], or a comment behind a \";\"", firewall.Quote(text))
		return
	case !isName(name):
		s.problem(n, "", "%s: want a name of letters, digits, \"_\", \"-\" and \".\" before the \"=\"", firewall.Quote(text))
		return
	case s.place == beforeSections:
		s.problem(n, name, "it stands before any [SECTION]")
		return
	case s.place == inBrokenSection:
		return
	}
	section := &s.doc.Sections[s.current]
	key := section.Name + "." + name
	first, again := s.keys[section.Name+"\x00"+name]
	hidden := strings.IndexFunc(value, func(r rune) bool { return !unicode.IsPrint(r) })
	switch {
	case again:
		s.problem(n, key, "it is given twice, in line %d too: want it once", first)
		return
	case hidden >= 0:
		r, _ := utf8.DecodeRuneInString(value[hidden:])
		s.problem(n, key, "%s holds a character that does not show (%U)", firewall.Quote(value), r)
	case strings.HasPrefix(value, "`") || strings.HasPrefix(value, `"""`): // how ini.v1 quotes several lines
		s.problem(n, key, "%s: a value has no quotes around it", firewall.Quote(value))
	default:
		section.Keys = append(section.Keys, Key{Name: name, Line: n})
		fmt.Fprintln(&s.clean, text)
	}
	s.keys[section.Name+"\x00"+name] = n
}

// isName tells whether text can name a section or a key. ini.v1 takes a key
// called "-" for one that it is to number.
func isName(text string) bool {
	return text != "" && len(text) <= maxName && text[0] != '-' &&
		strings.Trim(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.") == ""
}

// load has ini.v1 read what is left, and takes the values from it.
func (s *scanner) load() {
	f, err := ini.LoadSources(ini.LoadOptions{
		IgnoreInlineComment:     true, // they are gone, and "80#443" is a bad value, not 80
		IgnoreContinuation:      true,
		PreserveSurroundedQuote: true,
		KeyValueDelimiters:      "=",
		ChildSectionDelimiter:   "\x00", // [a.b] inherits nothing from [a]
	}, []byte(s.clean.String()))
	if err != nil {
		s.problem(1, "", "reading it: %v", err)
		s.doc.Sections = nil
		return
	}
	for _, section := range s.doc.Sections {
		for i := range section.Keys {
			k := &section.Keys[i]
			k.Value = f.Section(section.Name).Key(k.Name).Value()
		}
	}
}
