package firewall

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"unicode/utf8"
)

// MaxListSize is the maximum number of bytes in a file of addresses, and maxListed that of
// addresses: in iptables, each is a rule.
const (
	MaxListSize = 1 << 20
	maxListed   = 10_000
)

// filePrefix is before the path of a list in the settings.
const filePrefix = "file:"

// ListFile is a file of addresses, and the list that was read from it last.
type ListFile struct {
	Path string         `json:"path"`
	SSH  bool           `json:"-"` // of SSH sources, not of services
	From []netip.Prefix `json:"from"`
	// Others are SSH sources that are allowed apart from the file.
	Others []netip.Prefix `json:"others,omitempty"`
}

// ParseFile parses the word file:PATH. It returns "" for another word.
func ParseFile(word string) (name string, err error) {
	name, is := strings.CutPrefix(word, filePrefix)
	switch {
	case !is:
		return "", nil
	case !path.IsAbs(name) || path.Clean(name) != name || name == "/" || len(name) > 1000 || strings.ContainsAny(name, " ,;#\"'\\"):
		return "", fmt.Errorf("%s: want file: and an absolute path, such as file:/etc/basicfw/admins", Quote(word))
	}
	return name, nil
}

// ParseList parses a file of addresses and networks, one a line. Comments begin with "#" or
// ";". With ssh, they are SSH sources, else those of services. The error is about the first
// invalid line. A list without an address is an error.
func ParseList(name string, data []byte, ssh bool) (list []netip.Prefix, err error) {
	parse := ParseNetwork
	if ssh {
		parse = ParseSource
	}
	wrong := 0
	seen := map[netip.Prefix]bool{}
	for i, line := range bytes.Split(bytes.TrimPrefix(data, []byte("\ufeff")), []byte("\n")) {
		if n := bytes.IndexAny(line, "#;"); n >= 0 && utf8.Valid(line[:n]) {
			line = line[:n]
		}
		text := strings.TrimSpace(string(line))
		if text == "" {
			continue
		}
		var bad error
		p, bad := parse(text)
		if !utf8.Valid(line) {
			bad = errors.New("the text is not UTF-8")
		}
		switch {
		case bad != nil:
			if wrong++; wrong == 1 {
				err = fmt.Errorf("%s:%d: %w", name, i+1, bad)
			}
		case !seen[p]:
			seen[p] = true
			list = append(list, p)
		}
	}
	switch {
	case wrong > 1:
		err = fmt.Errorf("%w (and %d more invalid lines)", err, wrong-1)
	case wrong == 1:
	case len(list) == 0:
		err = fmt.Errorf("%s contains no address", name)
	case len(list) > maxListed:
		err = fmt.Errorf("%s contains %d addresses: want at most %d", name, len(list), maxListed)
	}
	if err != nil {
		return nil, err
	}
	return list, nil
}

// ListFiles returns the files that d follows, with the lists in effect. A file that SSH and
// services have is listed for each.
func (d Desired) ListFiles() (files []ListFile) {
	if f := d.SSH.File; f != nil {
		files = append(files, ListFile{Path: f.Path, SSH: true, From: f.From})
	}
	for _, s := range d.configured() {
		if s.File != "" && !slices.ContainsFunc(files, func(f ListFile) bool { return !f.SSH && f.Path == s.File }) {
			files = append(files, ListFile{Path: s.File, From: s.From})
		}
	}
	return files
}

// WithList returns d with the list of a file, wherever it is used.
func (d Desired) WithList(f ListFile) Desired {
	if own := d.SSH.File; f.SSH && own != nil && own.Path == f.Path {
		d.SSH.File = &ListFile{Path: f.Path, From: f.From, Others: own.Others}
		d.SSH.Allow = slices.Clone(own.Others)
		had := map[netip.Prefix]bool{}
		for _, p := range own.Others {
			had[p] = true
		}
		d.SSH.Allow = append(d.SSH.Allow, without(f.From, func(p netip.Prefix) bool { return had[p] })...)
	}
	update := func(list []Service) []Service {
		list = slices.Clone(list)
		for i := range list {
			if !f.SSH && list[i].File == f.Path {
				list[i].From = f.From
			}
		}
		return list
	}
	d.Open, d.Profile.Services = update(d.Open), update(d.Profile.Services)
	return d
}

// Keeping returns the sentence about a file that cannot be used, so that the last list stays
// in effect.
func (f ListFile) Keeping(err error) string {
	what := "services"
	if f.SSH {
		what = "SSH"
	}
	return fmt.Sprintf("%v; the list that was read last stays in effect for %s (entries: %d)", err, what, len(f.From))
}
