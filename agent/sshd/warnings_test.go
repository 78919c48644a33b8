package sshd

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestLoginWarnings(t *testing.T) {
	const (
		passwd   = "root:x:0:0:root:/root:/bin/bash\n"
		console  = "DigitalOcean's web console uses SSH: it probably fails if SSH is limited to one address; the recovery console is not affected"
		locked   = "root cannot log in at the console (its password is locked): it is no fallback when SSH fails"
		empty    = "root cannot log in at the console (it has no password): it is no fallback when SSH fails"
		noShell  = "root cannot log in at the console (its shell is /sbin/nologin): it is no fallback when SSH fails"
		noShadow = "root cannot log in at the console (it has no entry in /etc/shadow): it is no fallback when SSH fails"
	)
	for _, tt := range []struct {
		name, vendor, passwd, shadow string
		want                         []string
	}{
		{"no warning", "QEMU", passwd, "root:$6$x$y:20000:0:99999:7:::\n", nil},
		{"locked", "QEMU", passwd, "bin:*:1::::::\nroot:!$6$x$y:20000:0:99999:7:::\n", []string{locked}},
		{"locked without a hash", "QEMU", passwd, "root:*:20000:0:99999:7:::\n", []string{locked}},
		{"locked on EL", "QEMU", passwd, "root:!!:20000:0:99999:7:::\n", []string{locked}},
		{"empty", "QEMU", passwd, "root::20000:0:99999:7:::\n", []string{empty}},
		{"no shell", "QEMU", "root:x:0:0:root:/root:/sbin/nologin\n", "root:$6$x$y:20000:0:99999:7:::\n", []string{noShell}},
		{"no entry", "QEMU", passwd, "rooty:$6$x$y:20000\n", []string{noShadow}},
		{"shadow is unreadable", "QEMU", passwd, "", nil},
		{"a droplet", "DigitalOcean", passwd, "root:$6$x$y:20000:0:99999:7:::\n", []string{console}},
		{"a droplet, locked", "DigitalOcean\n", passwd, "root:!:20000:0:99999:7:::\n", []string{console, locked}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := map[string]string{"/etc/passwd": tt.passwd}
			if tt.shadow != "" {
				files["/etc/shadow"] = tt.shadow
			}
			vendor := filepath.Join(t.TempDir(), "sys_vendor")
			if err := os.WriteFile(vendor, []byte(tt.vendor), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := loginWarnings(tree(t, files), vendor); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
