package hostnet

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
)

func TestReadConntrack(t *testing.T) {
	ns := newNamespace(t)
	ns.must(t, func() error {
		// Nothing is written here: this namespace may not.
		before, err := GrowConntrack(context.Background(), &system.System{})
		if before.Max <= 0 || before.Buckets <= 0 || before.Count != 0 {
			t.Errorf("read %+v", before)
		}
		if before.Max >= MinConntrack && before.Buckets >= MinConntrack && err != nil {
			t.Errorf("nothing to change, and yet: %v", err)
		}
		return nil
	})
}

// A namespace that is not the first may not change the size, and says so.
func TestSizeInANamespaceIsRefused(t *testing.T) {
	ns := newNamespace(t)
	ns.must(t, func() error {
		before, err := ReadConntrack()
		if err != nil {
			return err
		}
		want := before
		want.Max++
		err = SetConntrack(&system.System{}, want)
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
		t.Errorf("got %v, want that it does not exist", err)
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
	sys.Step = system.Before(func(op, name string) error { wrote = append(wrote, filepath.Base(name)); return nil })
	for _, tt := range []struct {
		want  Conntrack
		wrote string
	}{
		{Conntrack{Max: 4096, Buckets: 4096}, ""},
		{Conntrack{Max: 65536, Buckets: 4096}, "max"},
		{Conntrack{Max: 65536, Buckets: 65536}, "hashsize"}, // max is 65536 by now
	} {
		wrote = nil
		if err := f.set(sys, tt.want); err != nil || strings.Join(wrote, " ") != tt.wrote {
			t.Errorf("%+v wrote %q, want %q, %v", tt.want, wrote, tt.wrote, err)
		}
	}
	write(f.count, "many\n")
	if _, err := f.read(); err == nil {
		t.Error("\"many\" was taken for a number")
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
