package survey

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// What is no readable file of addresses is an error of one line, soon.
func TestReadListRefuses(t *testing.T) {
	root := t.TempDir()
	v := Surveyor{System: &system.System{Root: root}}
	dir := filepath.Join(root, "etc")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		make func(path string) error
		want string
	}{
		"missing":   {func(string) error { return nil }, "/etc/missing: no such file or directory"},
		"directory": {func(p string) error { return os.Mkdir(p, 0o755) }, "not a regular file"},
		"fifo":      {func(p string) error { return unix.Mkfifo(p, 0o644) }, "not a regular file"},
		"loop":      {func(p string) error { return os.Symlink(p, p) }, "too many levels of symbolic links"},
		"empty":     {func(p string) error { return os.WriteFile(p, nil, 0o644) }, "/etc/empty contains no address"},
		"writable": {func(p string) error {
			if err := os.WriteFile(p, []byte("192.0.2.1\n"), 0o644); err != nil {
				return err
			}
			return os.Chmod(p, 0o666)
		}, "writable by users other than root"},
		"huge": {func(p string) error {
			if err := os.WriteFile(p, nil, 0o644); err != nil {
				return err
			}
			return os.Truncate(p, 1<<30)
		}, "larger than 1048576 bytes"},
		"invalid": {func(p string) error { return os.WriteFile(p, []byte("192.0.2.1\n\xff\n"), 0o644) }, "/etc/invalid:2: the text is not UTF-8"},
	} {
		if err := tt.make(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
		if list, err := v.ReadList("/etc/"+name, true); err == nil || list != nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), root) {
			t.Errorf("%s: %v, %v, want %q", name, list, err, tt.want)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "list"), []byte("192.0.2.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("list", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if list, err := v.ReadList("/etc/link", true); err != nil || len(list) != 1 || firewall.FormatPrefix(list[0]) != "192.0.2.1" {
		t.Errorf("a link: %v, %v", list, err)
	}
}
