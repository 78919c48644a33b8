// Package lists reads lists of networks from files: one address or CIDR per line.
package lists

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"unicode/utf8"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// MaxSize is the maximum size of a list in bytes.
const MaxSize = 32 << 20

// Entry is a network and its line number.
type Entry struct {
	netip.Prefix
	Line int
}

// Problem is an invalid line.
type Problem struct {
	Line int
	Err  error
}

// Read reads a list. A file that cannot be a list is an error: a directory, a FIFO,
// or a file that is too large or not text.
func Read(sys *system.System, path string) ([]Entry, []Problem, error) {
	fi, err := sys.Stat(path)
	if err != nil {
		return nil, nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, nil, fmt.Errorf("%s: not a regular file (%v)", path, fi.Mode())
	}
	data, err := sys.ReadLimited(path, MaxSize)
	if err != nil {
		return nil, nil, err
	}
	entries, problems, err := Parse(data)
	if err != nil {
		err = fmt.Errorf("%s: %w", path, err)
	}
	return entries, problems, err
}

// Parse parses the text of a list: an address or CIDR on each line, and comments that
// begin with "#" or ";", also after an entry. Invalid lines are returned as problems.
// Text that is not UTF-8 is an error.
func Parse(data []byte) (entries []Entry, problems []Problem, err error) {
	if !utf8.Valid(data) || bytes.IndexByte(data, 0) >= 0 {
		return nil, nil, errors.New("not UTF-8 text: want one address or CIDR per line")
	}
	entries, problems = parse(data, firewall.ParseNetwork)
	return entries, problems, nil
}

// parse is Parse with a function for each entry. A comment may be in any encoding.
func parse(data []byte, entry func(string) (netip.Prefix, error)) (entries []Entry, problems []Problem) {
	for n, line := range strings.Split(strings.TrimPrefix(string(data), "\ufeff"), "\n") {
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		p, err := entry(line)
		if !utf8.ValidString(line) {
			err = errors.New("the text is not UTF-8")
		}
		if err != nil {
			problems = append(problems, Problem{n + 1, err})
		} else {
			entries = append(entries, Entry{p, n + 1})
		}
	}
	return entries, problems
}

// MaxSources is the maximum size of a list of sources in bytes. maxSources is its
// maximum number of entries: in iptables, each becomes a rule.
const (
	MaxSources = 1 << 20
	maxSources = 10_000
)

// ParseSources parses a list of SSH sources or, if ssh is unset, of sources of
// services. Such a list is used as a whole or not at all: the first invalid line is
// an error. A list without an entry is also an error.
func ParseSources(name string, data []byte, ssh bool) (list []netip.Prefix, err error) {
	entry := firewall.ParseNetwork
	if ssh {
		entry = firewall.ParseSource
	}
	entries, problems := parse(data, entry)
	seen := map[netip.Prefix]bool{}
	for _, e := range entries {
		if !seen[e.Prefix] {
			seen[e.Prefix] = true
			list = append(list, e.Prefix)
		}
	}
	switch {
	case len(problems) > 0:
		err = fmt.Errorf("%s:%d: %w", name, problems[0].Line, problems[0].Err)
		if more := len(problems) - 1; more > 0 {
			err = fmt.Errorf("%w (and %d more invalid lines)", err, more)
		}
	case len(list) == 0:
		err = fmt.Errorf("%s contains no address", name)
	case len(list) > maxSources:
		err = fmt.Errorf("%s contains %d addresses: want at most %d", name, len(list), maxSources)
	}
	if err != nil {
		return nil, err
	}
	return list, nil
}
