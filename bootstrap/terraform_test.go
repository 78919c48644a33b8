package bootstrap

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/basicfw/basicfw-agent/agent/system"
	"github.com/basicfw/basicfw-agent/test/lab"
)

const module = "../packaging/terraform"

// TestTemplate checks that the module's template is the printed user-data. If it is not,
// write it again: this test prints it.
func TestTemplate(t *testing.T) {
	got, err := os.ReadFile(module + "/user-data.tftpl")
	if err != nil {
		t.Fatal(err)
	}
	printed, err := UserData(UserDataOptions{RPMURL: testRPM, SHA256: testSum, ClientIP: "203.0.113.7"})
	if err != nil {
		t.Fatal(err)
	}
	want := strings.NewReplacer(testRPM, "${rpm}", testSum, "${sha256}", "--client-ip 203.0.113.7", "${flags}").Replace(string(printed))
	if string(got) != want {
		t.Errorf("user-data.tftpl is not\n%s", want)
	}
}

// TestModule runs the module's own tests, and checks that it is formatted.
func TestModule(t *testing.T) {
	lab.NeedTools(t, "terraform")
	dir := filepath.Join(t.TempDir(), "module")
	if err := os.CopyFS(dir, os.DirFS(module)); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"fmt", "-check", "-diff", "-recursive"}, {"init"}, {"validate"}, {"test"}} {
		res, err := (&system.System{}).Run(context.Background(), system.Command{Name: "terraform", Args: append([]string{"-chdir=" + dir}, args...)})
		if err != nil {
			t.Fatalf("%v\n%s%s", err, res.Stdout, res.Stderr)
		}
	}
}
