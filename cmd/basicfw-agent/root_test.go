//go:build linux

package main

import (
	"io"
	"slices"
	"testing"

	"github.com/spf13/cobra"
)

// A named command is found, and is the only one that is built.
func TestCommands(t *testing.T) {
	for _, c := range commands {
		if got := c.build(&app{}).Name(); got != c.name {
			t.Errorf("command %s is called %s", c.name, got)
		}
		root := newRoot([]string{"--root", "/", c.name}, io.Discard, io.Discard, nil)
		if called, _, err := root.Find([]string{"--root", "/", c.name}); err != nil || called.Name() != c.name || len(root.Commands()) != 1 {
			t.Errorf("%s: found %s among %d commands, %v", c.name, called.Name(), len(root.Commands()), err)
		}
	}
	for _, args := range [][]string{nil, {"--help"}, {"help", "status"}, {"__complete", "status", "--"}, {"completion", "bash"}, {"statsu", "open"}, {"--root", "status", "help"}} {
		root := newRoot(args, io.Discard, io.Discard, nil)
		for _, c := range commands {
			if !slices.ContainsFunc(root.Commands(), func(there *cobra.Command) bool { return there.Name() == c.name }) {
				t.Errorf("%q: command %s is missing", args, c.name)
			}
		}
	}
}
