package host

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

func TestReadConntrack(t *testing.T) {
	ns := newNamespace(t)
	ns.must(t, func() error {
		// Nothing is written: this namespace may not.
		before, err := ConntrackTable{&system.System{}}.Grow(context.Background())
		if before.Max <= 0 || before.Buckets <= 0 || before.Count != 0 {
			t.Errorf("read %+v", before)
		}
		if before.Max >= MinConntrack && before.Buckets >= MinConntrack && err != nil {
			t.Errorf("error with nothing to change: %v", err)
		}
		return nil
	})
}

// Only the initial namespace may change the size.
func TestSizeInNamespaceIsRefused(t *testing.T) {
	ns := newNamespace(t)
	ns.must(t, func() error {
		before, err := ReadConntrack()
		if err != nil {
			return err
		}
		want := before
		want.Max++
		err = ConntrackTable{&system.System{}}.Set(want)
		if !errors.Is(err, fs.ErrPermission) {
			t.Errorf("got %v, want permission denied", err)
		}
		after, err := ReadConntrack()
		if after != before {
			t.Errorf("%+v became %+v", before, after)
		}
		return err
	})
}

func TestConntrackFiles(t *testing.T) {
	dir := t.TempDir()
	f := conntrackFiles{
		max: filepath.Join(dir, "max"), buckets: filepath.Join(dir, "buckets"),
		count: filepath.Join(dir, "count"), hashsize: filepath.Join(dir, "hashsize"),
	}
	if _, err := f.read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want not exist", err)
	}
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(f.max, "4096\n")
	write(f.buckets, "4096\n")
	write(f.count, "17\n")
	if c, err := f.read(); err != nil || c != (Conntrack{Max: 4096, Buckets: 4096, Count: 17}) {
		t.Errorf("got %+v, %v", c, err)
	}
	sys := &system.System{}
	var wrote []string
	sys.Step = lab.Before(func(op, name string) error { wrote = append(wrote, filepath.Base(name)); return nil })
	for _, tt := range []struct {
		want  Conntrack
		wrote string
	}{
		{Conntrack{Max: 4096, Buckets: 4096}, ""},
		{Conntrack{Max: 65536, Buckets: 4096}, "max"},
		{Conntrack{Max: 65536, Buckets: 65536}, "hashsize"}, // max is already 65536
	} {
		wrote = nil
		if err := f.set(sys, tt.want); err != nil || strings.Join(wrote, " ") != tt.wrote {
			t.Errorf("%+v wrote %q, want %q, %v", tt.want, wrote, tt.wrote, err)
		}
	}
	write(f.count, "many\n")
	if _, err := f.read(); err == nil {
		t.Error("\"many\" was accepted as a number")
	}
}

func TestPerFamily(t *testing.T) {
	for release, want := range map[string]bool{
		"2.6.32-754.el6.x86_64": true, "3.10.0-1160.el7.x86_64": true, "4.18.0-553.el8.x86_64": true,
		"4.19.0": false, "5.14.0-427.el9.x86_64": false, "6.18.44-fc": false, "": false, "x": false,
	} {
		if got := perFamily(release); got != want {
			t.Errorf("perFamily(%q) = %t, want %t", release, got, want)
		}
	}
}
