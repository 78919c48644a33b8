package host

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// TestContainers reads what Docker wrote. Stopped containers and broken files have no ports.
func TestContainers(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"a": `{"Name":"/web-db-1","State":{"Running":true},"NetworkSettings":{"Ports":{"5432/tcp":[{"HostIp":"0.0.0.0","HostPort":"15432"},{"HostIp":"::","HostPort":"15432"}],"53/udp":null}}}`,
		"b": `{"Name":"/old","State":{"Running":false},"NetworkSettings":{"Ports":{"80/tcp":[{"HostPort":"80"}]}}}`,
		"c": `{"Name":`,
	} {
		file := filepath.Join(root, dockerDir, name, "config.v2.json")
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(map[string]string{"15432/tcp": "web-db-1"}, Containers(&system.System{Root: root})); diff != "" {
		t.Error(diff)
	}
	if got := Containers(&system.System{Root: t.TempDir()}); len(got) > 0 {
		t.Errorf("without Docker: %v", got)
	}
}
