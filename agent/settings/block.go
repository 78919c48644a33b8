package settings

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// filePrefix begins a value of [block] that is the path of a list.
const filePrefix = "file:"

// None is the value of a list that blocks nothing. It overrides the value in another file.
const None = "none"

// Block is a list of [block]: networks, or a file that contains them.
type Block struct {
	Name    string
	Entries []firewall.TimedSource
	File    string    // an absolute path; then there are no Entries
	Until   time.Time // when the file expires; zero is never
	Source  string    // the file and line of the setting
}

// String returns the value as written in the settings.
func (b Block) String() string {
	end := func(text string, t time.Time) string {
		if t.IsZero() {
			return text
		}
		return text + " " + until + " " + firewall.FormatTime(t)
	}
	if b.File != "" {
		return end(filePrefix+b.File, b.Until)
	}
	var words []string
	for _, e := range b.Entries {
		words = append(words, end(firewall.FormatPrefix(e.From), e.Until))
	}
	return strings.Join(words, ", ")
}

// setBlock adds a list, or replaces the one with the same name.
func (s *Settings) setBlock(name, value, source string) error {
	b, err := parseBlock(name, value)
	if err != nil || value == "" {
		return err
	}
	b.Source = source
	s.setSource("block", name, source)
	if slices.ContainsFunc(s.Blocks, func(o Block) bool { return o.Name == name }) {
		s.BlocksBeneath = append(slices.Clone(s.BlocksBeneath), name)
	}
	s.Blocks = slices.DeleteFunc(slices.Clone(s.Blocks), func(o Block) bool { return o.Name == name })
	if value != None {
		s.Blocks = append(s.Blocks, b)
	}
	return nil
}

func parseBlock(name, value string) (b Block, err error) {
	b.Name = name
	if err := firewall.CheckBlockName(name); err != nil || value == "" || value == None {
		return b, err
	}
	if file, ok := strings.CutPrefix(value, filePrefix); ok {
		file, end, timed := strings.Cut(file, " "+until+" ")
		if b.File = strings.TrimSpace(file); !path.IsAbs(b.File) || strings.ContainsAny(b.File, " ,") {
			return b, fmt.Errorf("%s: want the absolute path of a list, such as file:/etc/basicfw/blocked", firewall.Quote(value))
		}
		if timed {
			b.Until, err = firewall.ParseTime(strings.TrimSpace(end))
		}
		return b, err
	}
	var errs []error
	words := strings.Fields(strings.ReplaceAll(value, ",", " "))
	for i := 0; i < len(words); i++ {
		p, err := firewall.ParseNetwork(words[i])
		if err != nil {
			errs = append(errs, err)
		}
		e := firewall.TimedSource{From: p}
		if i+1 < len(words) && words[i+1] == until {
			end := ""
			if i += 2; i < len(words) {
				end = words[i]
			}
			if e.Until, err = firewall.ParseTime(end); err != nil {
				errs = append(errs, fmt.Errorf("until: %w", err))
			}
		}
		b.Entries = append(b.Entries, e)
	}
	if len(words) == 0 {
		errs = append(errs, fmt.Errorf("%s contains no address: want CIDR[, CIDR...], each with \"until TIME\" if temporary, file:/PATH, or none", firewall.Quote(value)))
	}
	return b, errors.Join(errs...)
}

// Lists returns the files that contain networks, according to the valid settings.
func Lists(sys *system.System, config string) (paths []string) {
	s, _ := Load(sys, config)
	for _, b := range s.Blocks {
		if b.File != "" {
			paths = append(paths, b.File)
		}
	}
	return paths
}
