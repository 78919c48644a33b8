// Package lists reads lists of networks from files: one address or CIDR a line.
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

// Entry is a network, and the line on which it stands.
type Entry struct {
	netip.Prefix
	Line int
}

// Problem is a line that is no entry.
type Problem struct {
	Line int
	Err  error
}

// Read reads a list. A file that is no list at all is an error: a directory, a FIFO, one
// that is too large or not text.
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

// Parse parses the text of a list: an address or CIDR on each line, and comments that begin
// with "#" or ";", also after an entry. Broken lines are returned as problems. Text that is
// not UTF-8 is an error.
func Parse(data []byte) (entries []Entry, problems []Problem, err error) {
	if !utf8.Valid(data) || bytes.IndexByte(data, 0) >= 0 {
		return nil, nil, errors.New("not UTF-8 text: want one address or CIDR per line")
	}
	for n, line := range strings.Split(strings.TrimPrefix(string(data), "\ufeff"), "\n") {
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		p, err := firewall.ParseNetwork(line)
		if err != nil {
			problems = append(problems, Problem{n + 1, err})
			continue
		}
		entries = append(entries, Entry{p, n + 1})
	}
	return entries, problems, nil
}
