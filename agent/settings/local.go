package settings

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
)

// Change is a setting that a command writes. An empty value takes the setting
// out of the file.
type Change struct {
	Section, Key, Value string
}

// localHeader begins a file that commands write.
const localHeader = "; Written by basicfw-agent. What is set here wins over agent.ini.\n"

// SetLocal makes changes to the text of a settings file, whose name is for
// messages. Comments, order and everything else stay as they are; what is not
// there yet is added. The text must be right before and is right afterwards:
// the error is Errors, about the old text or about a change.
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
	// What is taken out goes last, so that no section is left empty in between.
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
				Msg: fmt.Sprintf("%s cannot stand in a settings file", firewall.Quote(c.Value))}}
		}
	}
	return []byte(text), nil
}

func (d *Document) value(section, key string) string {
	if s := d.Section(section); s != nil {
		for _, k := range s.Keys {
			if k.Name == key {
				return k.Value
			}
		}
	}
	return ""
}

// dropHeader takes out the header of a section whose last key was taken out,
// with the blank line before it, if nothing else is in the section: no comment,
// and no header that comes again.
func dropHeader(lines []string, header, key int) {
	blank := func(i int) bool { return strings.Trim(lines[i], " \t\r\n") == "" }
	end := key + 1
	for end < len(lines) && !strings.HasPrefix(strings.TrimLeft(lines[end], " \t"), "[") {
		end++
	}
	if _, comment := splitComment(strings.TrimRight(lines[header], "\r\n")); comment != "" {
		return
	}
	for i := header + 1; i < end; i++ {
		if !blank(i) {
			return
		}
	}
	lines[header] = ""
	if header > 0 && blank(header-1) {
		lines[header-1] = ""
	}
}

// setLine makes one change to a text that Parse has found right.
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
