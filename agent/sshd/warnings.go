package sshd

import (
	"os"
	"path"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/system"
)

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
