package session

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/system"
)

const sshdConfigFile = "/etc/ssh/sshd_config"

// SSHDPorts gives the ports that sshd listens on or will listen on, other than
// on loopback, in order, and for each why it is one:
//
//   - sshd's main process listens on it;
//   - sshd's socket unit names it, and PID 1 listens on it or the unit is
//     enabled;
//   - sshd_config names it.
//
// There is always one at least. It is live where the first or PID 1 was seen
// listening; where not, as in early boot, only what is configured is known. An error says what could not be read; the
// ports are those that follow from the rest.
func (p *Processes) SSHDPorts(sys *system.System, listening []system.Socket) (ports []uint16, why []string, live bool, err error) {
	reasons := map[uint16][]string{}
	add := func(port uint16, reason string) {
		if !slices.Contains(reasons[port], reason) {
			reasons[port] = append(reasons[port], reason)
		}
	}
	open := map[uint64]uint16{} // the ports of listening sockets
	for _, s := range listening {
		if s.Proto == "tcp" && !s.Local.Addr().IsLoopback() {
			open[s.Inode] = s.Local.Port()
		}
	}
	for _, inode := range slices.Sorted(maps.Keys(open)) {
		if h := p.ssh[inode]; h.listener != 0 {
			add(open[inode], fmt.Sprintf("sshd listens on it (process %d)", h.listener))
			live = true
		}
	}
	socket, unitErr := p.addSocketUnits(sys, open, add)
	live = socket || live

	config, err := readSSHDConfig(sys, sshdConfigFile)
	missing := errors.Is(err, fs.ErrNotExist) && !sys.Exists(sshdConfigFile)
	if missing {
		err = nil
	} else {
		for _, c := range config.listening(sshdConfigFile) {
			add(c.port, c.why)
		}
	}
	if len(reasons) == 0 {
		reason := "sshd's default, as there is no " + sshdConfigFile
		if !missing {
			reason = "sshd's default, as " + sshdConfigFile + " lets sshd listen on loopback only"
		}
		add(sshdDefaultPort, reason)
	}
	for _, port := range slices.Sorted(maps.Keys(reasons)) {
		ports = append(ports, port)
		why = append(why, strings.Join(reasons[port], ", "))
	}
	return ports, why, live, errors.Join(unitErr, err)
}

// addSocketUnits adds the ports of sshd's socket units. It is live where PID 1
// listens on one.
func (p *Processes) addSocketUnits(sys *system.System, open map[uint64]uint16, add func(uint16, string)) (live bool, err error) {
	var errs []error
	var init map[uint16]bool // the ports that PID 1 listens on
	for _, unit := range socketUnits() {
		ports, err := readSocketUnit(sys, unit)
		errs = append(errs, err)
		if len(ports) == 0 {
			continue
		}
		if init == nil {
			init = map[uint16]bool{}
			for _, inode := range p.sockets(1) {
				if port, ok := open[inode]; ok {
					init[port] = true
				}
			}
		}
		enabled, err := isEnabled(sys, unit)
		errs = append(errs, err)
		for _, c := range ports {
			switch {
			case init[c.port]:
				add(c.port, "systemd listens on it for "+unit)
				live = true
			case enabled:
				add(c.port, fmt.Sprintf("%s is enabled (%s)", unit, c.why))
			}
		}
	}
	return live, errors.Join(errs...)
}
