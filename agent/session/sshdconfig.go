package session

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

// sshdDefaultPort is what sshd listens on if nobody says anything else.
const sshdDefaultPort = 22

// Limits to what is read: sshd itself allows 16 levels of Include
// (SERVCONF_MAX_DEPTH), but any number of files.
const (
	maxConfigSize  = 1 << 20
	maxConfigFiles = 512
	maxConfigDepth = 16
)

// source is a place in a file.
type source struct {
	file string
	line int
}

func (s source) String() string { return fmt.Sprintf("%s:%d", s.file, s.line) }

// configPort is a port, and what it follows from.
type configPort struct {
	port uint16
	why  string
}

// listenAddress is a ListenAddress; port 0 is none of its own.
type listenAddress struct {
	loopback bool
	port     uint16
	source   source
}

// sshdConfig is what matters here of sshd_config(5). Directives that sshd would
// refuse are left out: it does not start with them.
type sshdConfig struct {
	ports   []configPort
	listens []listenAddress
}

// listening gives the ports that sshd listens on, not on loopback. Like sshd's,
// it does not depend on the order of Port and ListenAddress.
func (c sshdConfig) listening(file string) []configPort {
	ports := c.ports
	if len(ports) == 0 {
		ports = []configPort{{sshdDefaultPort, "sshd's default, as " + file + " names no port"}}
	}
	if len(c.listens) == 0 {
		return ports
	}
	var list []configPort
	for _, l := range c.listens {
		switch {
		case l.loopback:
		case l.port != 0:
			list = append(list, configPort{l.port, l.source.String()})
		default:
			list = append(list, ports...)
		}
	}
	return list
}

// configReader reads an sshd_config and what it includes.
type configReader struct {
	sys    *system.System
	config sshdConfig
	files  int
	errs   []error // files that should have been read and were not
}

// readSSHDConfig reads sshd's configuration by itself: `sshd -T` wants host
// keys, which an early boot has not, and fails at some Match lines. The error
// is of files that could not be read; the rest is there.
func readSSHDConfig(sys *system.System, file string) (sshdConfig, error) {
	r := &configReader{sys: sys}
	r.include(file, 0)
	return r.config, errors.Join(r.errs...)
}

func (r *configReader) include(file string, depth int) {
	if r.files++; r.files > maxConfigFiles || depth > maxConfigDepth {
		// Once is enough: there may be very many.
		if len(r.errs) == 0 {
			r.errs = append(r.errs, fmt.Errorf("%s: sshd's configuration includes too many files, or too deep", file))
		}
		return
	}
	data, err := readConfig(r.sys, file)
	if err != nil {
		r.errs = append(r.errs, fmt.Errorf("reading sshd's configuration: %w", err))
		return
	}
	r.parse(file, string(data), depth)
}

// readConfig reads a file, unless it is one of the kernel's: some of those wait
// until they have something to say, such as /proc/kmsg.
func readConfig(sys *system.System, file string) ([]byte, error) {
	for _, dir := range []string{"/proc/", "/sys/", "/dev/"} {
		if strings.HasPrefix(path.Clean(file), dir) {
			return nil, fmt.Errorf("%s is no file of anybody's", system.Printable(file))
		}
	}
	return readRegular(sys, file, maxConfigSize)
}

// parse follows process_server_config_line_depth in OpenSSH's servconf.c.
func (r *configReader) parse(file, text string, depth int) {
	active := true // not in a Match block, or in one that always applies
	for n, line := range strings.Split(text, "\n") {
		keyword, rest := cutKeyword(strings.TrimRight(strings.TrimLeft(line, " \t\r"), " \t\r\f"))
		if keyword == "" || keyword[0] == '#' || rest == "" {
			continue
		}
		args, ok := splitArgs(rest)
		if !ok || len(args) == 0 {
			continue
		}
		at := source{file, n + 1}
		switch keyword = strings.ToLower(keyword); {
		case keyword == "match":
			// Other conditions depend on a connection. sshd allows none of
			// the directives below in their blocks, nor in what these include.
			active = len(args) == 1 && strings.EqualFold(args[0], "all")
		case !active:
		case keyword == "include":
			for _, pattern := range args {
				if r.files > maxConfigFiles {
					break // which has been said
				}
				if !strings.HasPrefix(pattern, "/") {
					pattern = "/etc/ssh/" + pattern
				}
				files, err := glob(r.sys, pattern)
				if err != nil {
					r.errs = append(r.errs, fmt.Errorf("%v: %w", at, err))
				}
				if errors.Is(err, errTooMany) {
					r.files = maxConfigFiles + 1
				}
				for _, included := range files {
					r.include(included, depth+1)
				}
			}
		case keyword == "port":
			if port := r.port(args[0]); port != 0 {
				r.config.ports = append(r.config.ports, configPort{port, at.String()})
			}
		case keyword == "listenaddress":
			if l, ok := r.listenAddress(args[0]); ok {
				l.source = at
				r.config.listens = append(r.config.listens, l)
			}
		}
	}
}

// cutKeyword cuts a line as strdelim in OpenSSH's misc.c does: a keyword ends at
// white space or at one "=", and may be quoted.
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

// splitArgs splits a directive's arguments as argv_split in OpenSSH's misc.c
// does: at blanks, with quotes of both kinds, until a word that begins with
// "#". A quote that is not closed is an error.
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

// port reads a port's number, or its name in /etc/services; 0 is neither.
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

// listenAddress reads HOST, HOST:PORT, [IPV6]:PORT or a bare IPv6 address
// (hpdelim in OpenSSH's misc.c).
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

// errTooMany says that a pattern is of no use.
var errTooMany = fmt.Errorf("more than %d matches", maxConfigFiles)

// glob expands a pattern as glob(7) says, in order. A pattern without wildcards
// is itself, if there is such a file. The error is what could not be read, or
// errTooMany: such a pattern may go through all files there are.
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
				// Go says "[^a]" where glob(7) says "[!a]".
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

var errNotRegular = errors.New("is no regular file")

// readRegular reads a file of at most max bytes, and nothing that could keep
// the reader waiting, such as a FIFO.
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
