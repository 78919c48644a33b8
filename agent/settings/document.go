// Package settings reads and edits the administrator's settings, a strict INI. All
// errors are reported at once, each with file, line, key and the correct form.
package settings

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"gopkg.in/ini.v1"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

const (
	MaxSize    = 1 << 20 // bytes of a file
	maxEntries = 4096    // sections and keys of a file: ini.v1 compares each key with all others
	maxName    = 64      // characters of a section's or a key's name
	bom        = "\ufeff"
)

// Document is a file's sections in order. A repeated section continues the first one.
type Document struct {
	File     string
	Sections []Section
}

// Section is a section's keys in order.
type Section struct {
	Name string
	Line int
	Keys []Key
}

// Key is a key with its value, which is printable and has no surrounding white space.
type Key struct {
	Name, Value string
	Line        int
}

// Section returns the section with that name, or nil.
func (d *Document) Section(name string) *Section {
	if i := slices.IndexFunc(d.Sections, func(s Section) bool { return s.Name == name }); i >= 0 {
		return &d.Sections[i]
	}
	return nil
}

// Read reads and parses a file, which must exist.
func Read(sys *system.System, file string) (*Document, Errors) {
	data, err := sys.ReadLimited(file, MaxSize)
	if err == nil {
		return Parse(file, data)
	}
	doc := &Document{File: file}
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return doc, Errors{{File: file, Msg: "cannot be read: " + pathErr.Err.Error()}}
	}
	return doc, Errors{tooLarge(file)}
}

func tooLarge(file string) Problem {
	return Problem{File: file, Line: 1, Msg: fmt.Sprintf("file is larger than %d bytes", MaxSize)}
}

// Parse reads a strict INI: sections in brackets, key = value, and comments. Comments begin
// with ";" or "#" at the start of a line or after white space. There is no continuation,
// expansion or quoting. The text is UTF-8, possibly with a byte order mark and CR LF. The
// document contains every valid line, so that its values are checked as well.
func Parse(file string, data []byte) (*Document, Errors) {
	doc := &Document{File: file}
	if len(data) > MaxSize {
		return doc, Errors{tooLarge(file)}
	}
	s := scanner{doc: doc, keys: map[string]int{}}
	for i, line := range strings.Split(strings.TrimPrefix(string(data), bom), "\n") {
		if !s.line(i+1, strings.TrimSuffix(line, "\r")) {
			break
		}
	}
	s.load()
	return doc, s.errs
}

// scanner checks the lines and records their numbers. ini.v1 has no line numbers. It
// accepts, cuts or joins invalid text: "[a]junk", "80#443", a trailing backslash, a
// duplicate key. So it reads only the valid lines, without comments.
type scanner struct {
	doc     *Document
	errs    Errors
	clean   strings.Builder // the text for ini.v1
	place   place
	current int            // index of the current section
	keys    map[string]int // line of each section.key
	entries int
}

type place int

const (
	beforeSections place = iota
	inSection
	inBrokenSection // its header is invalid, so its keys cannot be checked
)

func (s *scanner) problem(line int, key, format string, args ...any) {
	s.errs = append(s.errs, Problem{File: s.doc.File, Line: line, Key: key, Msg: fmt.Sprintf(format, args...)})
}

// line scans one line and reports whether to continue.
func (s *scanner) line(n int, line string) bool {
	if !utf8.ValidString(line) {
		s.problem(n, "", "not UTF-8: settings are plain text")
		return true
	}
	if i := strings.IndexFunc(line, func(r rune) bool { return unicode.IsControl(r) && r != '\t' }); i >= 0 {
		r, _ := utf8.DecodeRuneInString(line[i:])
		s.problem(n, "", "control character (%U): settings are plain text", r)
		return true
	}
	text, _ := splitComment(line)
	text = strings.Trim(text, " \t")
	if text == "" {
		return true
	}
	if s.entries++; s.entries > maxEntries {
		s.problem(n, "", "more than %d settings", maxEntries)
		return false
	}
	if text[0] == '[' {
		s.header(n, text)
	} else {
		s.keyValue(n, text)
	}
	return true
}

// splitComment splits a line before its comment and the white space in front of it.
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
	case rest != "":
		s.problem(n, "", "%s: only white space and a comment may follow the \"]\"", firewall.Quote(text))
	case !isName(name):
		s.problem(n, "", "%s: want a section name of letters, digits, \"_\", \"-\" and \".\"", firewall.Quote(text))
	default:
		s.place = inSection
		fmt.Fprintln(&s.clean, text)
		s.current = slices.IndexFunc(s.doc.Sections, func(o Section) bool { return o.Name == name })
		if s.current < 0 {
			s.current = len(s.doc.Sections)
			s.doc.Sections = append(s.doc.Sections, Section{Name: name, Line: n})
		}
	}
}

func (s *scanner) keyValue(n int, text string) {
	text = strings.ReplaceAll(text, "\t", " ")
	name, value, found := strings.Cut(text, "=")
	name, value = strings.TrimRight(name, " "), strings.TrimLeft(value, " ")
	switch {
	case !found:
		s.problem(n, "", "%s: want KEY = VALUE, [SECTION], or a comment after \";\"", firewall.Quote(text))
		return
	case !isName(name):
		s.problem(n, "", "%s: want a name of letters, digits, \"_\", \"-\" and \".\" before the \"=\"", firewall.Quote(text))
		return
	case s.place == beforeSections:
		s.problem(n, name, "key before the first [SECTION]")
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
		s.problem(n, key, "duplicate key, first set in line %d", first)
		return
	case hidden >= 0:
		r, _ := utf8.DecodeRuneInString(value[hidden:])
		s.problem(n, key, "%s contains an invisible character (%U)", firewall.Quote(value), r)
	case strings.HasPrefix(value, "`") || strings.HasPrefix(value, `"""`): // ini.v1's quotes for several lines
		s.problem(n, key, "%s: values are not quoted", firewall.Quote(value))
	default:
		section.Keys = append(section.Keys, Key{Name: name, Line: n})
		fmt.Fprintln(&s.clean, text)
	}
	s.keys[section.Name+"\x00"+name] = n
}

// isName reports whether text can name a section or a key. ini.v1 replaces a key
// called "-" with a number.
func isName(text string) bool {
	return text != "" && len(text) <= maxName && text[0] != '-' &&
		strings.Trim(text, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.") == ""
}

// load fills in the values as ini.v1 reads them.
func (s *scanner) load() {
	f, err := ini.LoadSources(ini.LoadOptions{
		IgnoreInlineComment:     true, // already removed, and "80#443" is a bad value, not 80
		IgnoreContinuation:      true,
		PreserveSurroundedQuote: true,
		KeyValueDelimiters:      "=",
		ChildSectionDelimiter:   "\x00", // [a.b] inherits nothing from [a]
	}, []byte(s.clean.String()))
	if err != nil {
		s.problem(1, "", "cannot be read: %v", err)
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

// Problem is one thing that is wrong with the settings.
type Problem struct {
	File string // or another source of the setting: "--client-ip"
	Line int    // from 1; 0 is no particular line
	Key  string // section.key if the problem is a value: "ssh.client_ip"
	Msg  string // what is wrong, and the correct form
}

// String returns "file:line: key: msg" or "--flag: msg" on one line.
func (p Problem) String() string {
	source := p.File
	if p.Line > 0 {
		source += fmt.Sprintf(":%d", p.Line)
	}
	return system.Printable(Label(source, p.Key) + ": " + p.Msg)
}

// Label returns the prefix of a message about a setting: its source and key, or
// only the flag, which already names the setting.
func Label(source, key string) string {
	if key == "" || strings.HasPrefix(source, "--") {
		return source
	}
	return source + ": " + key
}

// Errors is all problems of the settings, in the order of files and lines.
// As an error it is never empty; errors.As finds it.
type Errors []Problem

// maxShown limits the errors that are printed: a file that is not a settings file has
// one on every line.
const maxShown = 100

// Error returns the problems, one per line.
func (e Errors) Error() string {
	var lines []string
	for _, p := range e[:min(len(e), maxShown)] {
		lines = append(lines, p.String())
	}
	if more := len(e) - len(lines); more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(lines, "\n")
}

// Err returns e as an error, or nil if there is no problem.
func (e Errors) Err() error {
	if len(e) == 0 {
		return nil
	}
	return e
}

// OnlyClient reports whether only the named client was refused, so that all other
// settings can be used.
func (e Errors) OnlyClient() bool {
	return len(e) > 0 && !slices.ContainsFunc(e, func(p Problem) bool { return p.Key != "ssh.client_ip" })
}

// Add adds a problem for err, or for each error that errors.Join has joined in it.
// A nil err adds nothing.
func (e *Errors) Add(file string, line int, key string, err error) {
	if err == nil {
		return
	}
	all := []error{err}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		all = joined.Unwrap()
	}
	for _, err := range all {
		*e = append(*e, Problem{File: file, Line: line, Key: key, Msg: err.Error()})
	}
}

// Sort sorts the problems of each file by line. The order of the files is unchanged.
func (e Errors) Sort() {
	order := map[string]int{}
	for _, p := range e {
		if _, seen := order[p.File]; !seen {
			order[p.File] = len(order)
		}
	}
	slices.SortStableFunc(e, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(order[a.File], order[b.File]), cmp.Compare(a.Line, b.Line))
	})
}
