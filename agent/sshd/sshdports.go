package sshd

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/system"
)

const sshdConfigFile = "/etc/ssh/sshd_config"

// SSHDPorts returns the sorted ports on which sshd listens or will listen, except on
// loopback, and the reasons for each:
//
//   - sshd's main process listens on it;
//   - sshd's socket unit contains it, and PID 1 listens on it or the unit is
//     enabled;
//   - sshd_config or the command line in sshd's unit contains it;
//   - the caller's SSH session came in by it, whatever serves it: dropbear, sshd -i. caller
//     may be nil.
//
// There is at least one. live is set if sshd or PID 1 listens; otherwise, as early in
// a boot, only the configuration is known. The error reports unreadable files; the
// ports are then those in the others.
func (p *Processes) SSHDPorts(sys *system.System, listening []system.Socket, caller *host.Session) (ports []uint16, why []string, live bool, err error) {
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

	r, file := &configReader{sys: sys}, mainConfig(sys)
	missing := !sys.Exists(file)
	if !missing {
		r.include(file, 0)
	}
	r.readCommandLines()
	if !missing || len(r.config.ports) > 0 {
		for _, c := range r.config.listening(file) {
			add(c.port, c.why)
		}
	}
	if caller != nil && len(reasons[caller.Local.Port()]) == 0 {
		add(caller.Local.Port(), host.SessionPort)
	}
	if len(reasons) == 0 {
		reason := host.NoSSHD
		if !missing {
			reason = "sshd's default; " + file + " allows loopback only"
		}
		add(sshdDefaultPort, reason)
	}
	for _, port := range slices.Sorted(maps.Keys(reasons)) {
		ports = append(ports, port)
		why = append(why, strings.Join(reasons[port], ", "))
	}
	return ports, why, live, errors.Join(append(r.errs, unitErr)...)
}

// addSocketUnits adds the ports in the socket units for sshd. live is set if PID 1 listens
// on one.
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
