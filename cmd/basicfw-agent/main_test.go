//go:build linux

package main

import (
	"os"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"basicfw-agent": func() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr, faults())) },
	})
}

// TestScript runs the real main() on typed command lines. Tests that load rules are in
// test/kernel.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			for _, dir := range []string{"root/etc/basicfw/profiles.d", "root/var", "root/run", "root/usr"} {
				if err := os.MkdirAll(e.WorkDir+"/"+dir, 0o755); err != nil {
					return err
				}
			}
			return nil
		},
		Condition: func(cond string) (bool, error) { return cond == "root" && os.Geteuid() == 0, nil },
	})
}
