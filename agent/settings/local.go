package settings

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Change is a setting that a command writes. An empty value removes it from the file.
type Change struct {
	Section, Key, Value string
}

// localHeader is the first line of a file that commands write.
const localHeader = "; Written by basicfw-agent. Settings here override agent.ini.\n"

// SetLocal applies changes to the text of a settings file and keeps its comments and
// order. The text must be valid, and the result is. The error is Errors, about the
// old text or about a change. file is for messages.
func SetLocal(file string, data []byte, changes []Change) ([]byte, error) {
	doc, errs := Parse(file, data)
	settings := Defaults()
	errs = settings.decode(doc, errs)
	for _, c := range changes {
		errs.Add(file, 0, c.Section+"."+c.Key, settings.set(c.Section, c.Key, c.Value, file))
	}
	if err := errs.Err(); err != nil {
		return nil, err
	}

	text := string(data)
	if strings.TrimSpace(text) == "" {
		text = localHeader
	}
	// Removals come last, so that no section becomes empty in between.
	changes = slices.Clone(changes)
	slices.SortStableFunc(changes, func(a, b Change) int {
		return cmp.Compare(min(len(b.Value), 1), min(len(a.Value), 1))
	})
	for _, c := range changes {
		c.Value = strings.Join(strings.Fields(c.Value), " ") // templates end in newlines
		text = setLine(text, c)
		doc, errs := Parse(file, []byte(text))
		if len(errs) > 0 {
			return nil, errs
		}
		if got := doc.value(c.Section, c.Key); got != c.Value {
			return nil, Errors{{File: file, Key: c.Section + "." + c.Key,
				Msg: fmt.Sprintf("%s cannot be written to a settings file", firewall.Quote(c.Value))}}
		}
	}
	return []byte(text), nil
}

func (d *Document) value(section, key string) string {
	if s := d.Section(section); s != nil {
		if i := slices.IndexFunc(s.Keys, func(k Key) bool { return k.Name == key }); i >= 0 {
			return s.Keys[i].Value
		}
	}
	return ""
}

// dropHeader removes the header of a section whose last key was removed, with the
// blank line before it. A section with a comment, or a repeated one, keeps it.
func dropHeader(lines []string, header, key int) {
	end := key + 1
	for end < len(lines) && !strings.HasPrefix(strings.TrimLeft(lines[end], " \t"), "[") {
		end++
	}
	if _, comment := splitComment(strings.TrimRight(lines[header], "\r\n")); comment != "" {
		return
	}
	if strings.TrimSpace(strings.Join(lines[header+1:end], "")) != "" {
		return
	}
	lines[header] = ""
	if header > 0 && strings.TrimSpace(lines[header-1]) == "" {
		lines[header-1] = ""
	}
}

// setLine applies one change to a text that Parse accepts.
func setLine(text string, c Change) string {
	doc, _ := Parse("", []byte(text))
	eol := "\n"
	if strings.Contains(text, "\r\n") {
		eol = "\r\n"
	}
	lines := strings.SplitAfter(text, "\n")
	if last := len(lines) - 1; lines[last] == "" {
		lines = lines[:last]
	} else {
		lines[last] += eol
	}
	entry := fmt.Sprintf("%s = %s%s", c.Key, c.Value, eol)

	section := doc.Section(c.Section)
	if section == nil {
		if c.Value == "" {
			return text
		}
		return strings.Join(lines, "") + eol + "[" + c.Section + "]" + eol + entry
	}
	after := section.Line
	for _, k := range section.Keys {
		if k.Name != c.Key {
			after = max(after, k.Line)
			continue
		}
		i := k.Line - 1
		if c.Value == "" {
			lines[i] = ""
			if len(section.Keys) == 1 {
				dropHeader(lines, section.Line-1, i)
			}
		} else {
			_, comment := splitComment(strings.TrimRight(lines[i], "\r\n"))
			lines[i] = strings.TrimSuffix(entry, eol) + comment + eol
		}
		return strings.Join(lines, "")
	}
	if c.Value != "" {
		lines[after-1] += entry
	}
	return strings.Join(lines, "")
}
