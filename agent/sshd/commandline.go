package sshd

import (
	"errors"
	"io/fs"
	"path"
	"slices"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// environmentFiles set sshd's options in variables called OPTIONS (Red Hat) or SSHD_OPTS
// (Debian, SUSE).
var environmentFiles = []string{"/etc/sysconfig/sshd", "/etc/sysconfig/ssh", "/etc/default/ssh", "/etc/default/sshd"}

// readCommandLines reads the options that the service's unit will start sshd with. If
// they include ports, sshd ignores those in its configuration. However, a unit may
// not use the file of options, so the ports of both count.
func (r *configReader) readCommandLines() {
	for _, file := range environmentFiles {
		data, err := readRegular(r.sys, file, maxConfigSize)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.errs = append(r.errs, err)
		}
		for n, line := range strings.Split(string(data), "\n") {
			name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
			if name = strings.TrimPrefix(name, "export "); name == "OPTIONS" || name == "SSHD_OPTS" {
				words, _ := splitArgs(value) // first the shell's quotes, then sshd's arguments
				r.commandLine(strings.Join(words, " "), place(file, n))
			}
		}
	}
	for _, unit := range serviceUnits() {
		lines, err := readUnit(r.sys, unit, "[Service]", "ExecStart")
		r.errs = append(r.errs, err)
		for _, line := range lines {
			r.commandLine(line.value, line.at)
		}
	}
}

// commandLine adds the settings in sshd's options, parsed as in getopt(3) and sshd(8).
func (r *configReader) commandLine(text, at string) {
	args, _ := splitArgs(text)
	for len(args) > 0 {
		var arg string
		arg, args = args[0], args[1:]
		i := strings.IndexAny(arg, "CEbcfghkopu") // the options with a value
		if len(arg) < 2 || arg[0] != '-' || i < 0 {
			continue
		}
		value := arg[i+1:]
		if value == "" && len(args) > 0 {
			value, args = args[0], args[1:]
		}
		keyword, rest := "port", value
		switch arg[i] {
		case 'f':
			if value != sshdConfigFile && value != "" {
				r.include(value, 0)
			}
			continue
		case 'o':
			keyword, rest = cutKeyword(value)
		case 'p':
		default:
			continue
		}
		if words, ok := splitArgs(rest); ok && len(words) > 0 {
			r.set(strings.ToLower(keyword), words[0], at)
		}
	}
}

// mainConfig returns sshd's configuration file. Distributions with their own files in
// /usr, such as SUSE's, have a file of the administrator in /etc only if it replaces them.
func mainConfig(sys *system.System) string {
	if usr := "/usr" + sshdConfigFile; !sys.Exists(sshdConfigFile) && sys.Exists(usr) {
		return usr
	}
	return sshdConfigFile
}

// ConfigPaths returns the files and directories in which a change may move sshd to another port.
func ConfigPaths(sys *system.System) []string {
	r := &configReader{sys: sys}
	r.include(mainConfig(sys), 0)
	r.readCommandLines()
	list := append(slices.Clone(environmentFiles), "/etc/ssh", "/usr"+sshdConfigFile, "/etc/systemd/system/sockets.target.wants")
	for _, unit := range append(socketUnits(), serviceUnits()...) {
		for _, dir := range []string{"/etc/systemd/system", "/run/systemd/system", "/run/systemd/generator"} {
			list = append(list, path.Join(dir, unit+".d"))
		}
	}
	return append(list, r.paths...)
}
