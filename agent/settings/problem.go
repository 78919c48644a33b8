package settings

import (
	"fmt"
	"sort"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Problem is one thing that is wrong with the settings.
type Problem struct {
	// File is the file, or what else the setting came from: "--client-ip".
	File string
	// Line counts from 1; 0 is no line in particular.
	Line int
	// Key is section.key where the problem is with a value: "ssh.client_ip".
	Key string
	// Msg says what is wrong, and what would be right.
	Msg string
}

// String gives "file:line: key: msg", in one line.
func (p Problem) String() string {
	var b strings.Builder
	b.WriteString(system.Printable(p.File))
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	b.WriteString(": ")
	if p.Key != "" {
		b.WriteString(system.Printable(p.Key) + ": ")
	}
	b.WriteString(system.Printable(p.Msg))
	return b.String()
}

// Errors is everything that is wrong with the settings, in the order of files
// and lines. A function that gives it back as an error gives nil where it is
// empty; errors.As finds it.
type Errors []Problem

// maxShown bounds what is printed of the errors: a file that is no settings
// file at all has one in every line.
const maxShown = 100

// Error gives one problem a line.
func (e Errors) Error() string {
	var b strings.Builder
	for i, p := range e {
		if i == maxShown {
			fmt.Fprintf(&b, "\nand %d more", len(e)-i)
			break
		}
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(p.String())
	}
	return b.String()
}

// Err gives e as an error, which is nil where there is no problem.
func (e Errors) Err() error {
	if len(e) == 0 {
		return nil
	}
	return e
}

// OnlyClient tells whether the named client is all that was refused, so that
// everything else can still be used.
func (e Errors) OnlyClient() bool {
	for _, p := range e {
		if p.Key != "ssh.client_ip" {
			return false
		}
	}
	return len(e) > 0
}

// Add adds what err says: a problem for each error that errors.Join has put
// together, and none for nil.
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

// Sort puts the problems of each file in the order of its lines; the files
// stay in the order in which they come.
func (e Errors) Sort() {
	order := map[string]int{}
	for _, p := range e {
		if _, seen := order[p.File]; !seen {
			order[p.File] = len(order)
		}
	}
	sort.SliceStable(e, func(i, j int) bool {
		if a, b := order[e[i].File], order[e[j].File]; a != b {
			return a < b
		}
		return e[i].Line < e[j].Line
	})
}
