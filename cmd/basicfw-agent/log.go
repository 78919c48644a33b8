package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/sirupsen/logrus"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// printable is a writer of text for people: what comes from files, processes or
// the network tells a terminal nothing. A character has to come in one piece.
type printable struct{ w io.Writer }

func (p printable) Write(text []byte) (int, error) {
	lines := strings.Split(string(text), "\n")
	for i, line := range lines {
		cells := strings.Split(line, "\t")
		for j, cell := range cells {
			cells[j] = system.Printable(cell)
		}
		lines[i] = strings.Join(cells, "\t")
	}
	if _, err := io.WriteString(p.w, strings.Join(lines, "\n")); err != nil {
		return 0, err
	}
	return len(text), nil
}

// plainFormatter writes logs for people, one line each: "warning: what: why".
// The service writes them for the journal instead, with their fields by name.
type plainFormatter struct{}

func (plainFormatter) Format(e *logrus.Entry) ([]byte, error) {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s: %s", e.Level, e.Message)
	if err, ok := e.Data[logrus.ErrorKey]; ok {
		fmt.Fprintf(&b, ": %v", err)
	}
	var names []string
	for name := range e.Data {
		if name != logrus.ErrorKey {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		fmt.Fprintf(&b, " %s=%v", name, e.Data[name])
	}
	return []byte(system.Printable(b.String()) + "\n"), nil
}
