package sshd

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

// socketUnits returns the names that distributions use for sshd's socket unit.
func socketUnits() []string { return []string{"ssh.socket", "sshd.socket"} }

// serviceUnits returns the names that distributions use for sshd's service.
func serviceUnits() []string { return []string{"ssh.service", "sshd.service"} }

// unitPath returns systemd's unit directories. The first that contains a unit has
// priority (systemd.unit(5)). Ubuntu's generator converts the ports in sshd_config to
// drop-ins of ssh.socket.
func unitPath(sys *system.System) []string {
	dirs := []string{
		"/etc/systemd/system.control", "/run/systemd/system.control", "/run/systemd/transient", "/run/systemd/generator.early",
		"/etc/systemd/system", "/run/systemd/system", "/run/systemd/generator",
		"/usr/local/lib/systemd/system", "/usr/lib/systemd/system",
	}
	if sys.Root == "" {
		// The same as /usr/lib except on old Debian.
		dirs = append(dirs, "/lib/systemd/system")
	}
	return append(dirs, "/run/systemd/generator.late")
}

// assignment is a value in a file, and its place there.
type assignment struct{ value, at string }

// readSocketUnit returns the ports of a socket unit's ListenStream= that are not on
// loopback. The error reports unreadable files.
func readSocketUnit(sys *system.System, name string) (ports []configPort, err error) {
	values, err := readUnit(sys, name, "[Socket]", "ListenStream")
	return listenPorts(values), err
}

func listenPorts(values []assignment) (ports []configPort) {
	for _, v := range values {
		port, err := strconv.ParseUint(v.value, 10, 16)
		if a, addrErr := netip.ParseAddrPort(v.value); addrErr == nil && !a.Addr().Unmap().IsLoopback() {
			port, err = uint64(a.Port()), nil
		}
		if err == nil && port != 0 {
			ports = append(ports, configPort{uint16(port), v.at})
		}
	}
	return ports
}

// readUnit returns the values of a key in a section of a unit and its drop-ins. A masked
// or missing unit has none.
func readUnit(sys *system.System, name, section, key string) (values []assignment, err error) {
	dirs := unitPath(sys)
	first := slices.IndexFunc(dirs, func(dir string) bool { return sys.Exists(path.Join(dir, name)) })
	if first < 0 {
		return nil, nil
	}
	files := []string{path.Join(dirs[first], name)}
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
			values = parseUnit(file, string(data), section, key, values)
		} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errNotRegular) {
			errs = append(errs, err)
		}
	}
	return values, errors.Join(errs...)
}

// parseUnit adds the values in a unit file or drop-in. An empty assignment removes all
// previous ones (systemd.socket(5), systemd.service(5)).
func parseUnit(file, text, section, key string, values []assignment) []assignment {
	current, whole := "", ""
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
			current = line
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok || current != section || strings.TrimSpace(name) != key {
			continue
		}
		if value = strings.TrimSpace(value); value == "" {
			values = nil
			continue
		}
		values = append(values, assignment{value, place(file, n)})
	}
	return values
}

// isEnabled reports whether another unit wants or requires this one at boot.
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
