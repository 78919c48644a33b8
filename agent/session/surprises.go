package session

import (
	"os"
	"path"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Surprises are sentences about what the owner may count on when SSH fails,
// and should not.
func Surprises(sys *system.System) []string { return surprises(sys, "/sys/class/dmi/id/sys_vendor") }

func surprises(sys *system.System, vendorFile string) []string {
	var list []string
	if vendor, err := os.ReadFile(vendorFile); err == nil && strings.TrimSpace(string(vendor)) == "DigitalOcean" {
		list = append(list, "DigitalOcean's web console comes in over SSH: where SSH is pinned to one address it most likely stops; the recovery console is not affected")
	}
	if why := rootLocked(sys); why != "" {
		list = append(list, "root cannot log in at the console ("+why+"): set that right, or it is no way in when SSH fails")
	}
	return list
}

// rootLocked says why root cannot log in at a console, or "". Where the files
// cannot be read, nothing is known.
func rootLocked(sys *system.System) string {
	const max = 4 << 20
	shadow, err := readRegular(sys, "/etc/shadow", max)
	if err != nil {
		return ""
	}
	passwd, _ := readRegular(sys, "/etc/passwd", max)
	for _, f := range records(passwd, 7) {
		if shell := path.Base(f[6]); f[0] == "root" && (shell == "nologin" || shell == "false") {
			return "its shell is " + system.Printable(f[6])
		}
	}
	for _, f := range records(shadow, 2) {
		if f[0] != "root" {
			continue
		}
		switch {
		case f[1] == "":
			return "it has no password"
		case strings.HasPrefix(f[1], "!"), strings.HasPrefix(f[1], "*"):
			return "its password is locked"
		}
		return ""
	}
	return "it has no entry in /etc/shadow"
}
