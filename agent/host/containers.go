package host

import (
	"encoding/json"
	"path/filepath"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// dockerDir is the directory where Docker keeps a directory for each container (moby:
// container/container.go, ToDisk).
const dockerDir = "/var/lib/docker/containers"

// maxContainers limits how many of these directories are read.
const maxContainers = 500

// Containers returns the names of running Docker containers by the ports that they
// publish, such as "8080/tcp". The names are only displayed, and affect no decision.
// What cannot be read is omitted.
func Containers(sys *system.System) map[string]string {
	entries, _ := sys.ReadDir(dockerDir)
	out := map[string]string{}
	for _, e := range entries[:min(len(entries), maxContainers)] {
		var c struct {
			Name            string
			State           struct{ Running bool }
			NetworkSettings struct {
				Ports map[string][]struct{ HostPort string }
			}
		}
		data, err := sys.ReadLimited(filepath.Join(dockerDir, e.Name(), "config.v2.json"), 1<<20)
		if err != nil || json.Unmarshal(data, &c) != nil || !c.State.Running {
			continue
		}
		for port, bindings := range c.NetworkSettings.Ports {
			_, proto, _ := strings.Cut(port, "/")
			for _, b := range bindings {
				out[b.HostPort+"/"+proto] = strings.TrimPrefix(c.Name, "/")
			}
		}
	}
	return out
}
