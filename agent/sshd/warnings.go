package sshd

import (
	"fmt"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/firewall"
	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// Multiplexed returns a warning if the caller's SSH session came in through a program
// that listens for SSH and other protocols, such as sslh. The program has one end of
// the connection open. No rule for SSH applies to its ports.
func (p *Processes) Multiplexed(caller Caller, listening, established []system.Socket) []string {
	for _, value := range caller.connections {
		remote, local, err := parseSSHConnection(value)
		for _, s := range established {
			if err != nil || (s.Local != local || s.Remote != remote) && (s.Local != remote || s.Remote != local) {
				continue
			}
			names, ports := p.Names(append(slices.Clone(listening), s)), []string(nil)
			program := names[s.Inode]
			for _, l := range host.Listeners(listening, names) {
				if l.Proto == firewall.TCP && l.Process == program && program != "" && !isSSHD(program) {
					ports = append(ports, fmt.Sprintf("%d/tcp", l.Port))
				}
			}
			if len(ports) > 0 {
				return []string{fmt.Sprintf("your SSH session came in by %s, which listens on %s: every address that reaches it reaches SSH, whatever [ssh] allows", program, strings.Join(ports, ", "))}
			}
		}
	}
	return nil
}

// LoginWarnings returns warnings about other ways to log in that may not work when SSH
// fails.
func LoginWarnings(sys *system.System) []string {
	return loginWarnings(sys, "/sys/class/dmi/id/sys_vendor")
}

func loginWarnings(sys *system.System, vendorFile string) []string {
	var list []string
	if vendor, err := os.ReadFile(vendorFile); err == nil && strings.TrimSpace(string(vendor)) == "DigitalOcean" {
		list = append(list, "DigitalOcean's web console uses SSH: it probably fails if SSH is limited to one address; the recovery console is not affected")
	}
	if why := rootLocked(sys); why != "" {
		list = append(list, "root cannot log in at the console ("+why+"): it is no fallback when SSH fails")
	}
	return list
}

// rootLocked returns the reason why root cannot log in at a console, or "" if it can,
// or if the files cannot be read.
func rootLocked(sys *system.System) string {
	shadow, err := records(sys, "/etc/shadow", 2)
	if err != nil {
		return ""
	}
	passwd, _ := records(sys, "/etc/passwd", 7)
	for _, f := range passwd {
		if shell := path.Base(f[6]); f[0] == "root" && (shell == "nologin" || shell == "false") {
			return "its shell is " + system.Printable(f[6])
		}
	}
	root := slices.IndexFunc(shadow, func(f []string) bool { return f[0] == "root" })
	switch {
	case root < 0:
		return "it has no entry in /etc/shadow"
	case shadow[root][1] == "":
		return "it has no password"
	case strings.ContainsAny(shadow[root][1][:1], "!*"):
		return "its password is locked"
	}
	return ""
}
