package sshd

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// sshdDefaultPort is sshd's port unless configured.
const sshdDefaultPort = 22

// Limits of the configuration. sshd itself allows 16 levels of Include
// (SERVCONF_MAX_DEPTH) and any number of files.
const (
	maxConfigSize  = 1 << 20
	maxConfigFiles = 512
	maxConfigDepth = 16
)

// place returns "file:line"; index counts from 0.
func place(file string, index int) string { return fmt.Sprintf("%s:%d", file, index+1) }

// configPort is a port and its source.
type configPort struct {
	port uint16
	why  string
}

// listenAddress is a ListenAddress; port is 0 if it names none.
type listenAddress struct {
	loopback bool
	port     uint16
	source   string
}

// sshdConfig is the relevant part of sshd_config(5). Invalid directives are left out:
// sshd does not start with them.
type sshdConfig struct {
	ports   []configPort
	listens []listenAddress
}

// listening returns the ports on which sshd listens, except on loopback. As in sshd,
// the order of Port and ListenAddress does not matter.
func (c sshdConfig) listening(file string) []configPort {
	ports := c.ports
	if len(ports) == 0 {
		ports = []configPort{{sshdDefaultPort, "sshd's default; " + file + " sets no port"}}
	}
	if len(c.listens) == 0 {
		return ports
	}
	var list []configPort
	for _, l := range c.listens {
		switch {
		case l.loopback:
		case l.port != 0:
			list = append(list, configPort{l.port, l.source})
		default:
			list = append(list, ports...)
		}
	}
	return list
}

// configReader reads an sshd_config and the files that it includes.
type configReader struct {
	sys    *system.System
	config sshdConfig
	files  int
	paths  []string // the files and directories that were read
	errs   []error  // files that could not be read
}

// readSSHDConfig reads sshd's configuration. It cannot use `sshd -T`, which needs host
// keys and fails on some Match lines. Early in a boot there are no keys. The error reports
// unreadable files; the result contains the rest.
func readSSHDConfig(sys *system.System, file string) (sshdConfig, error) {
	r := &configReader{sys: sys}
	r.include(file, 0)
	return r.config, errors.Join(r.errs...)
}

func (r *configReader) include(file string, depth int) {
	if r.files++; r.files > maxConfigFiles || depth > maxConfigDepth {
		// Reported once, as there may be very many.
		if len(r.errs) == 0 {
			r.errs = append(r.errs, fmt.Errorf("%s: sshd's configuration has too many or too deep includes", file))
		}
		return
	}
	r.paths = append(r.paths, file)
	data, err := readConfig(r.sys, file)
	if err != nil {
		r.errs = append(r.errs, fmt.Errorf("reading sshd's configuration: %w", err))
		return
	}
	r.parse(file, string(data), depth)
}

// readConfig reads a file, unless it is one of the kernel's: reading some of those
// blocks, such as /proc/kmsg.
func readConfig(sys *system.System, file string) ([]byte, error) {
	for _, dir := range []string{"/proc/", "/sys/", "/dev/"} {
		if strings.HasPrefix(path.Clean(file), dir) {
			return nil, fmt.Errorf("%s is not a configuration file", system.Printable(file))
		}
	}
	return readRegular(sys, file, maxConfigSize)
}

// parse follows process_server_config_line_depth in OpenSSH's servconf.c.
func (r *configReader) parse(file, text string, depth int) {
	active := true // outside of Match blocks, or in one that always applies
	for n, line := range strings.Split(text, "\n") {
		keyword, rest := cutKeyword(strings.TrimRight(strings.TrimLeft(line, " \t\r"), " \t\r\f"))
		if keyword == "" || keyword[0] == '#' || rest == "" {
			continue
		}
		args, ok := splitArgs(rest)
		if !ok || len(args) == 0 {
			continue
		}
		at := place(file, n)
		switch keyword = strings.ToLower(keyword); {
		case keyword == "match":
			// Other conditions depend on a connection. sshd allows none of the
			// directives below in such blocks, nor in files that they include.
			active = len(args) == 1 && strings.EqualFold(args[0], "all")
		case !active:
		case keyword == "include":
			for _, pattern := range args {
				if r.files > maxConfigFiles {
					break // already reported
				}
				if !strings.HasPrefix(pattern, "/") {
					pattern = "/etc/ssh/" + pattern
				}
				if i := strings.IndexAny(pattern, `*?[\`); i >= 0 {
					r.paths = append(r.paths, path.Dir(pattern[:i]+"x"))
				}
				files, err := glob(r.sys, pattern)
				if err != nil {
					r.errs = append(r.errs, fmt.Errorf("%s: %w", at, err))
				}
				if errors.Is(err, errTooMany) {
					r.files = maxConfigFiles + 1
				}
				for _, included := range files {
					r.include(included, depth+1)
				}
			}
		default:
			r.set(keyword, args[0], at)
		}
	}
}

// set sets a directive if it concerns ports.
func (r *configReader) set(keyword, value, at string) {
	switch keyword {
	case "port":
		if port := r.port(value); port != 0 {
			r.config.ports = append(r.config.ports, configPort{port, at})
		}
	case "listenaddress":
		if l, ok := r.listenAddress(value); ok {
			l.source = at
			r.config.listens = append(r.config.listens, l)
		}
	}
}

// cutKeyword splits a line like strdelim in OpenSSH's misc.c: a keyword ends at white
// space or at one "=", and may be quoted.
func cutKeyword(line string) (keyword, rest string) {
	const space = " \t\r\n"
	i := strings.IndexAny(line, space+"\"=")
	if i < 0 {
		return line, ""
	}
	keyword, rest = line[:i], strings.TrimLeft(line[i+1:], space)
	switch line[i] {
	case '"':
		quoted, after, ok := strings.Cut(line[i+1:], "\"")
		if !ok {
			return "", ""
		}
		return keyword + quoted, strings.TrimLeft(after, space)
	case '=':
		return keyword, rest
	}
	if after, ok := strings.CutPrefix(rest, "="); ok {
		rest = strings.TrimLeft(after, space)
	}
	return keyword, rest
}

// splitArgs splits a directive's arguments like argv_split in OpenSSH's misc.c: at
// blanks, with both kinds of quotes, until a word that begins with "#". An unclosed
// quote is an error.
func splitArgs(s string) (args []string, ok bool) {
	for i := 0; i < len(s); i++ {
		if s[i] == ' ' || s[i] == '\t' {
			continue
		}
		if s[i] == '#' {
			break
		}
		var word []byte
		quote := byte(0)
	scan:
		for ; i < len(s); i++ {
			c := s[i]
			switch {
			case c == '\\' && i+1 < len(s) && (strings.IndexByte(`'"\`, s[i+1]) >= 0 || quote == 0 && s[i+1] == ' '):
				i++
				word = append(word, s[i])
			case quote == 0 && (c == ' ' || c == '\t'):
				break scan
			case quote == 0 && (c == '"' || c == '\''):
				quote = c
			case quote != 0 && c == quote:
				quote = 0
			default:
				word = append(word, c)
			}
		}
		if quote != 0 {
			return nil, false
		}
		args = append(args, string(word))
	}
	return args, true
}

// port parses a port number or a name in /etc/services; it returns 0 for neither.
func (r *configReader) port(s string) uint16 {
	if n, err := strconv.ParseUint(strings.TrimPrefix(s, "+"), 10, 16); err == nil {
		return uint16(n)
	}
	data, err := readRegular(r.sys, "/etc/services", 4<<20)
	if err != nil {
		return 0
	}
	for _, line := range strings.Split(string(data), "\n") {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != s && !slices.Contains(f[2:], s) {
			continue
		}
		if number, ok := strings.CutSuffix(f[1], "/tcp"); ok {
			if n, err := strconv.ParseUint(number, 10, 16); err == nil {
				return uint16(n)
			}
		}
	}
	return 0
}

// listenAddress parses HOST, HOST:PORT, [IPV6]:PORT or a bare IPv6 address (hpdelim in
// OpenSSH's misc.c).
func (r *configReader) listenAddress(s string) (l listenAddress, ok bool) {
	host, port := s, ""
	if s == "" || strings.Contains(s, "/") {
		return l, false
	}
	if s[0] == '[' {
		end := strings.IndexByte(s, ']')
		if end < 0 || end+1 < len(s) && s[end+1] != ':' {
			return l, false
		}
		host, port = s[1:end], s[end+1:]
	} else if i := strings.IndexByte(s, ':'); i >= 0 && i == strings.LastIndexByte(s, ':') {
		host, port = s[:i], s[i:]
	}
	if port != "" {
		if l.port = r.port(port[1:]); l.port == 0 {
			return l, false
		}
	}
	l.loopback = strings.EqualFold(host, "localhost")
	if a, err := netip.ParseAddr(host); err == nil {
		l.loopback = a.Unmap().IsLoopback()
	}
	return l, true
}

// errTooMany reports that a pattern matches too many files.
var errTooMany = fmt.Errorf("more than %d matches", maxConfigFiles)

// glob returns the sorted matches of a pattern (glob(7)). A pattern without wildcards
// is the file itself, if it exists. The error reports unreadable directories, or is
// errTooMany: a pattern could match all files of the machine.
func glob(sys *system.System, pattern string) (found []string, err error) {
	var errs []error
	paths := []string{"/"}
	for _, element := range strings.Split(strings.Trim(pattern, "/"), "/") {
		var next []string
		for _, dir := range paths {
			if !strings.ContainsAny(element, `*?[\`) {
				next = append(next, path.Join(dir, element))
				continue
			}
			entries, err := sys.ReadDir(dir)
			if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTDIR) {
				errs = append(errs, err)
			}
			for _, e := range entries {
				hidden := e.Name()[0] == '.' && element[0] != '.'
				// Go uses "[^a]" instead of glob(7)'s "[!a]".
				ok, err := path.Match(strings.ReplaceAll(element, "[!", "[^"), e.Name())
				if ok && err == nil && !hidden {
					next = append(next, path.Join(dir, e.Name()))
				}
			}
			if len(next) > maxConfigFiles {
				return nil, fmt.Errorf("%s: %w", system.Printable(pattern), errTooMany)
			}
		}
		paths = next
	}
	slices.Sort(paths)
	return slices.DeleteFunc(paths, func(p string) bool { return !sys.Exists(p) }), errors.Join(errs...)
}

var errNotRegular = errors.New("is not a regular file")

// readRegular reads a regular file of at most max bytes, and never blocks on a FIFO.
func readRegular(sys *system.System, path string, max int64) ([]byte, error) {
	fi, err := sys.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s %w", path, errNotRegular)
	}
	return sys.ReadLimited(path, max)
}
