package rpm

import (
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/test/lab"
)

// TestEL6 tests the package for CentOS 6: what rpm 4.8 does not support, and the compiler.
// The real compiler would take a minute; make rpm-el6 runs it.
func TestEL6(t *testing.T) {
	lab.NeedTools(t, "rpm")
	dir := fakeGo(t)
	real, err := exec.LookPath("go")
	if err != nil {
		t.Fatal(err)
	}
	// The compiler is a fake, but nfpm is not.
	script := "#!/bin/sh\ncase $1 in\nbuild)\n\techo \"$GOTOOLCHAIN $GOARCH $CGO_ENABLED\" >>" + dir + "/builds\n\twhile [ \"$1\" != -o ]; do shift; done\n\tprintf '#!/bin/sh\\n' >\"$2\"; chmod 755 \"$2\";;\n*) exec " + real + " \"$@\";;\nesac\n"
	if err := os.WriteFile(filepath.Join(dir, "go"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	env := []string{"PATH=" + dir + ":" + os.Getenv("PATH"), "DIST=" + dir, "EL6=yes", cache(t)}
	file := strings.TrimSpace(must(t, "../..", env, "packaging/rpm/build", "1.2.3"))
	if got := filepath.Base(file); got != "basicfw-agent-1.2.3-1.el6.x86_64.rpm" {
		t.Fatalf("the build script printed %q", got)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "builds")); string(got) != "go1.23.12 amd64 0\n" {
		t.Errorf("compiled with %q, %v", got, err)
	}
	// gzip, and SHA-256 for the digests of files, which rpm 4.6 introduced.
	const format = "%{RELEASE}: [%{REQUIRES} ][%{RECOMMENDS} ]%{PAYLOADFORMAT} %{PAYLOADCOMPRESSOR} %{FILEDIGESTALGO}"
	if got, want := query(t, format, file), "1.el6: /bin/sh iptables iptables-ipv6 cpio gzip 8"; got != want {
		t.Errorf("the package is %q, want %q", got, want)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if bad := unreadable(data); len(bad) > 0 {
		t.Errorf("rpm 4.8 cannot read the tags %d", bad)
	}
	if _, err := command(t, "../..", env, "packaging/rpm/build", "1.2.3-rc.1"); err == nil {
		t.Error("a version with ~ was accepted")
	}
}

// unreadable returns the tags of a package's two headers whose type rpm 4.8 does not have
// (RPM_MAX_TYPE in its rpmtag.h). It ignores tags that it does not know.
func unreadable(data []byte) (tags []uint32) {
	const lead, maxType = 96, 9
	rest := data[lead:]
	for range 2 {
		if string(rest[:4]) != "\x8e\xad\xe8\x01" {
			return append(tags, 0)
		}
		n, size := int(binary.BigEndian.Uint32(rest[8:])), int(binary.BigEndian.Uint32(rest[12:]))
		for i := range n {
			entry := rest[16+16*i:]
			if binary.BigEndian.Uint32(entry[4:]) > maxType {
				tags = append(tags, binary.BigEndian.Uint32(entry))
			}
		}
		rest = rest[min(len(rest), 16+16*n+(size+7)/8*8):]
	}
	return slices.Compact(tags)
}
