package sshd

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/basicfw/basicfw-agent/agent/host"
	"github.com/basicfw/basicfw-agent/agent/system"
)

// login is an authenticated SSH session in the records of systemd-logind or utmp.
type login struct {
	uid    uint32
	user   string // in utmp instead of uid
	addr   netip.Addr
	source string
}

// Logins returns the SSH sessions of root and of users who may become root, one per
// address. They come from systemd-logind and utmp. A session counts only if a
// root-owned sshd process has an established, authenticated connection from there.
func (p *Processes) Logins(sys *system.System, established []system.Socket) []host.Session {
	alive := map[netip.Addr]bool{}
	for _, s := range established {
		if p.authenticated(s) {
			alive[s.Remote.Addr()] = true
		}
	}
	admins := readAdmins(sys)
	var clients []host.Session
	for _, l := range append(readSessions(sys), readUtmp(sys)...) {
		name, may := admins.find(l)
		if !may || !alive[l.addr] {
			continue
		}
		reason := fmt.Sprintf("%s is logged in (%s)", name, l.source)
		if c, ok := newClient(l.addr, reason); ok {
			clients = append(clients, c)
		}
	}
	slices.SortStableFunc(clients, func(a, b host.Session) int { return a.Addr.Compare(b.Addr) })
	return slices.CompactFunc(clients, func(a, b host.Session) bool { return a.Addr == b.Addr })
}

const sessionsDir = "/run/systemd/sessions"

// readSessions returns systemd-logind's sessions from its root-owned files. The
// directory also contains FIFOs.
func readSessions(sys *system.System) []login {
	entries, err := sys.ReadDir(sessionsDir)
	if err != nil {
		return nil
	}
	var list []login
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		data, err := sys.ReadLimited(sessionsDir+"/"+e.Name(), 16<<10)
		if err != nil {
			continue
		}
		if l, err := parseSession(string(data)); err == nil {
			l.source = "session " + system.Printable(e.Name())
			list = append(list, l)
		}
	}
	return list
}

// parseSession parses such a file: KEY=VALUE lines with shell quoting if necessary,
// which addresses never need. A REMOTE_HOST that is a name is an error.
func parseSession(text string) (login, error) {
	values := map[string]string{}
	for _, line := range strings.Split(text, "\n") {
		if line == "" || line[0] == '#' {
			continue
		}
		key, value, ok := strings.Cut(line, "=")
		if _, twice := values[key]; !ok || twice {
			return login{}, fmt.Errorf("invalid line %q", line)
		}
		values[key] = value
	}
	// The class is user or, for example for root, user-early.
	class, _, _ := strings.Cut(values["CLASS"], "-")
	switch {
	case values["REMOTE"] != "1", values["SERVICE"] != "sshd", class != "user":
		return login{}, errors.New("not an SSH session of a user")
	case values["STATE"] != "active" && values["STATE"] != "online":
		return login{}, errors.New("session is ending")
	}
	uid, err := strconv.ParseUint(values["UID"], 10, 32)
	if err != nil {
		return login{}, err
	}
	addr, err := netip.ParseAddr(values["REMOTE_HOST"])
	if err != nil {
		return login{}, err
	}
	return login{uid: uint32(uid), addr: addr.WithZone("").Unmap()}, nil
}

// readUtmp returns the logins in /run/utmp, which systemd may be built without.
func readUtmp(sys *system.System) []login {
	data, err := readRegular(sys, "/run/utmp", 4<<20)
	if err != nil {
		return nil
	}
	return parseUtmp(data, utmpLayoutOf(runtime.GOARCH))
}

// utmpLayout is the size of glibc's struct utmp and the offset of ut_addr_v6. On
// x86_64 the session and the time have 32 bits as on i386.
type utmpLayout struct{ size, addr int }

func utmpLayoutOf(arch string) utmpLayout {
	if arch == "amd64" || arch == "386" {
		return utmpLayout{size: 384, addr: 348}
	}
	return utmpLayout{size: 400, addr: 360} // aarch64
}

// parseUtmp returns the logins with an address. It ignores ut_host: with libutempter
// any user can write that, but not ut_addr_v6.
func parseUtmp(data []byte, layout utmpLayout) []login {
	const userProcess = 7
	var list []login
	for record := range slices.Chunk(data, layout.size) {
		if len(record) < layout.size || int16(binary.NativeEndian.Uint16(record)) != userProcess {
			continue
		}
		line, user, raw := cString(record[8:40]), cString(record[44:76]), record[layout.addr:layout.addr+16]
		addr := netip.AddrFrom16([16]byte(raw)).Unmap()
		if bytes.Equal(raw[4:], make([]byte, 12)) {
			addr = netip.AddrFrom4([4]byte(raw[:4]))
		}
		if user == "" || addr.IsUnspecified() {
			continue
		}
		list = append(list, login{user: user, addr: addr, source: "utmp, " + system.Printable(line)})
	}
	return list
}

func cString(b []byte) string {
	b, _, _ = bytes.Cut(b, []byte{0})
	return string(b)
}

// admins are the accounts that are root or may become it.
type admins struct {
	names map[string]bool
	uids  map[uint32]string
}

func (a admins) find(l login) (name string, ok bool) {
	if l.user != "" {
		return system.Printable(l.user), a.names[l.user]
	}
	name, ok = a.uids[l.uid]
	return system.Printable(name), ok
}

// readAdmins returns root and the members of the groups that sudo trusts by default:
// wheel, sudo and admin.
func readAdmins(sys *system.System) admins {
	a := admins{names: map[string]bool{"root": true}, uids: map[uint32]string{0: "root"}}
	groups := map[string]bool{} // by GID
	group, _ := records(sys, "/etc/group", 4)
	for _, f := range group { // name, password, number, members
		if f[0] != "wheel" && f[0] != "sudo" && f[0] != "admin" {
			continue
		}
		groups[f[2]] = true
		for _, member := range strings.Split(f[3], ",") {
			a.names[member] = member != ""
		}
	}
	passwd, _ := records(sys, "/etc/passwd", 7)
	for _, f := range passwd { // name, password, uid, gid, ...
		uid, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			continue
		}
		if uid == 0 || groups[f[3]] || a.names[f[0]] {
			a.names[f[0]] = true
			a.uids[uint32(uid)] = cmp.Or(a.uids[uint32(uid)], f[0])
		}
	}
	return a
}

// records returns the lines with at least n fields of a file such as /etc/passwd.
func records(sys *system.System, file string, n int) ([][]string, error) {
	data, err := readRegular(sys, file, 4<<20)
	var list [][]string
	for _, line := range strings.Split(string(data), "\n") {
		if f := strings.Split(line, ":"); len(f) >= n {
			list = append(list, f)
		}
	}
	return list, err
}
