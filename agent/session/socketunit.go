package session

import (
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// socketUnits are what distributions call the unit that listens for sshd.
func socketUnits() []string { return []string{"ssh.socket", "sshd.socket"} }

// unitPath is where systemd looks for units, the first of a name wins
// (systemd.unit(5)). Ubuntu's generator turns sshd_config's ports into drop-ins
// of ssh.socket.
func unitPath(sys *system.System) []string {
	dirs := []string{
		"/etc/systemd/system.control", "/run/systemd/system.control", "/run/systemd/transient", "/run/systemd/generator.early",
		"/etc/systemd/system", "/run/systemd/system", "/run/systemd/generator",
		"/usr/local/lib/systemd/system", "/usr/lib/systemd/system",
	}
	if sys.Root == "" {
		// The same as /usr/lib, but on old Debian.
		dirs = append(dirs, "/lib/systemd/system")
	}
	return append(dirs, "/run/systemd/generator.late")
}

// readSocketUnit gives the ports that a socket unit's ListenStream= names, not
// on loopback. A unit that is masked or not there has none.
// The error is what could not be read.
func readSocketUnit(sys *system.System, name string) (ports []configPort, err error) {
	dirs := unitPath(sys)
	var files []string
	for _, dir := range dirs {
		if file := path.Join(dir, name); sys.Exists(file) {
			files = append(files, file)
			break
		}
	}
	if len(files) == 0 {
		return nil, nil
	}
	var errs []error
	dropIns := map[string]string{}
	for _, dir := range slices.Backward(dirs) {
		found, err := glob(sys, path.Join(dir, name+".d", "*.conf"))
		errs = append(errs, err)
		for _, file := range found {
			dropIns[path.Base(file)] = file
		}
	}
	for _, base := range slices.Sorted(maps.Keys(dropIns)) {
		files = append(files, dropIns[base])
	}
	for i, file := range files {
		data, err := readRegular(sys, file, maxConfigSize)
		if i == 0 && (errors.Is(err, errNotRegular) || err == nil && len(data) == 0) {
			return nil, nil // masked: a link to /dev/null, or empty
		}
		if err == nil {
			ports = parseListenStream(file, string(data), ports)
		} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errNotRegular) {
			errs = append(errs, err)
		}
	}
	return ports, errors.Join(errs...)
}

// parseListenStream adds the ports of a unit file, or one of its drop-ins, to
// those before it. An empty assignment forgets these (systemd.socket(5)).
func parseListenStream(file, text string, ports []configPort) []configPort {
	section, whole := "", ""
	for n, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		whole += line
		if rest, ok := strings.CutSuffix(whole, `\`); ok {
			whole = rest + " "
			continue
		}
		line, whole = whole, ""
		if line[0] == '[' {
			section = line
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if !ok || section != "[Socket]" || strings.TrimSpace(key) != "ListenStream" {
			continue
		}
		value = strings.TrimSpace(value)
		if value == "" {
			ports = nil
			continue
		}
		if port, err := strconv.ParseUint(value, 10, 16); err == nil && port != 0 {
			ports = append(ports, configPort{uint16(port), source{file, n + 1}.String()})
			continue
		}
		if a, err := netip.ParseAddrPort(value); err == nil && a.Port() != 0 && !a.Addr().Unmap().IsLoopback() {
			ports = append(ports, configPort{a.Port(), source{file, n + 1}.String()})
		}
	}
	return ports
}

// isEnabled tells whether some unit wants or requires this one at boot.
func isEnabled(sys *system.System, name string) (enabled bool, err error) {
	var errs []error
	for _, dir := range unitPath(sys) {
		for _, kind := range []string{"*.wants", "*.requires"} {
			found, err := glob(sys, path.Join(dir, kind, name))
			errs = append(errs, err)
			enabled = enabled || len(found) > 0
		}
	}
	return enabled, errors.Join(errs...)
}
