package settings

import (
	"fmt"
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
