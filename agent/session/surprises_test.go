package session

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestSurprises(t *testing.T) {
	const (
		passwd   = "root:x:0:0:root:/root:/bin/bash\n"
		console  = "DigitalOcean's web console comes in over SSH: where SSH is pinned to one address it most likely stops; the recovery console is not affected"
		locked   = "root cannot log in at the console (its password is locked): set that right, or it is no way in when SSH fails"
		empty    = "root cannot log in at the console (it has no password): set that right, or it is no way in when SSH fails"
		noShell  = "root cannot log in at the console (its shell is /sbin/nologin): set that right, or it is no way in when SSH fails"
		noShadow = "root cannot log in at the console (it has no entry in /etc/shadow): set that right, or it is no way in when SSH fails"
	)
	for _, tt := range []struct {
		name, vendor, passwd, shadow string
		want                         []string
	}{
		{"all is well", "QEMU", passwd, "root:$6$x$y:20000:0:99999:7:::\n", nil},
		{"locked", "QEMU", passwd, "bin:*:1::::::\nroot:!$6$x$y:20000:0:99999:7:::\n", []string{locked}},
		{"locked for ever", "QEMU", passwd, "root:*:20000:0:99999:7:::\n", []string{locked}},
		{"locked, as EL does", "QEMU", passwd, "root:!!:20000:0:99999:7:::\n", []string{locked}},
		{"empty", "QEMU", passwd, "root::20000:0:99999:7:::\n", []string{empty}},
		{"no shell", "QEMU", "root:x:0:0:root:/root:/sbin/nologin\n", "root:$6$x$y:20000:0:99999:7:::\n", []string{noShell}},
		{"not there", "QEMU", passwd, "rooty:$6$x$y:20000\n", []string{noShadow}},
		{"shadow cannot be read", "QEMU", passwd, "", nil},
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
			if got := surprises(tree(t, files), vendor); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
