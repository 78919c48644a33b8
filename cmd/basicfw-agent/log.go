package main

import (
	"bytes"
	"fmt"
	"slices"

	"github.com/sirupsen/logrus"

	"github.com/basicfw/basicfw-agent/agent/system"
)

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
