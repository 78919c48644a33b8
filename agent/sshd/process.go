// Package sshd detects who is logged in over SSH, and sshd's ports. Unprivileged users
// can forge most of its input, so it trusts only what the kernel or root-owned files
// confirm.
package sshd

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Processes is a snapshot of the machine's processes from /proc.
type Processes struct {
	proc string // "/proc"
	list []process
	// ssh maps the inodes of sockets to the OpenSSH server processes that have them open.
	ssh map[uint64]holders
}

// process is a process with a program: not a kernel thread or zombie.
type process struct {
	pid int
	exe string // without the suffix " (deleted)" after an upgrade
}

// holders describes the OpenSSH server processes that have a socket open.
type holders struct {
	listener int   // the listening main process, or 0
	pids     []int // all of them
	root     bool  // one belongs to root
	preauth  bool  // one serves a peer that has not authenticated
	// began is the uptime when the first root-owned one started; zero is unknown.
	began time.Duration
}

// ReadProcesses reads the list of processes, and only the open files of sshd
// processes. It takes 0.4 ms with a hundred processes.
func ReadProcesses() (*Processes, error) { return readProcesses("/proc") }

func readProcesses(proc string) (*Processes, error) {
	p := &Processes{proc: proc, ssh: map[uint64]holders{}}
	names, err := readDirNames(proc)
	if err != nil {
		return nil, fmt.Errorf("listing processes: %w", err)
	}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid <= 0 {
			continue
		}
		exe, err := os.Readlink(p.path(pid, "exe"))
		if err != nil {
			continue
		}
		p.list = append(p.list, process{pid, strings.TrimSuffix(exe, " (deleted)")})
	}
	slices.SortFunc(p.list, func(a, b process) int { return a.pid - b.pid })
	for _, proc := range p.list {
		if isSSHD(proc.exe) && p.rootOwned(proc.pid) && !p.contained(proc.pid) {
			p.addSSH(proc)
		}
	}
	return p, nil
}

// isSSHD reports whether a program belongs to OpenSSH's server. Up to 9.7 that is
// only sshd. Since then sshd-session serves a connection, and since 10.0 sshd-auth
// authenticates it.
func isSSHD(exe string) bool {
	return slices.Contains([]string{"sshd", "sshd-session", "sshd-auth"}, path.Base(exe))
}

// contained reports whether a process runs in a container, which may share the host's
// network: it is in another PID namespace, or in a cgroup that is neither PID 1's nor a unit
// of this machine. On a kernel without PID namespaces or cgroups, that evidence is ignored.
func (p *Processes) contained(pid int) bool {
	ours, _ := os.Readlink(p.proc + "/self/ns/pid")
	if ns, _ := os.Readlink(p.path(pid, "ns/pid")); ns != ours && ns != "" && ours != "" {
		return true
	}
	group := p.cgroup(pid)
	return group != "" && group != p.cgroup(1) && !isHostUnit(group)
}

// cgroup returns a process's cgroup in systemd's hierarchy (cgroups(7)), or "".
func (p *Processes) cgroup(pid int) string {
	data, _ := p.read(pid, "cgroup", 16<<10)
	group := ""
	for _, line := range strings.Split(string(data), "\n") {
		if path, ok := strings.CutPrefix(line, "0::"); ok && group == "" {
			group = path
		}
		if _, path, ok := strings.Cut(line, ":name=systemd:"); ok {
			group = path // on a machine with both hierarchies, systemd uses this one
		}
	}
	return group
}

// isHostUnit reports whether a cgroup is that of a service or a session of this machine.
// Container engines use scopes of their own (docker-ID.scope, libpod-ID.scope), cgroups
// below a unit or next to the slices, and machine.slice.
func isHostUnit(group string) bool {
	slice, unit := path.Split(strings.TrimPrefix(group, "/"))
	for _, s := range strings.Split(strings.TrimSuffix(slice, "/"), "/") {
		if slice != "" && !strings.HasSuffix(s, ".slice") || s == "machine.slice" {
			return false
		}
	}
	if strings.HasSuffix(unit, ".scope") {
		return strings.HasPrefix(unit, "session-") || strings.HasPrefix(unit, "run-") || unit == "init.scope"
	}
	return strings.HasSuffix(unit, ".service") && !strings.HasPrefix(unit, "systemd-nspawn@")
}

// addSSH records the sockets of an OpenSSH server process.
func (p *Processes) addSSH(proc process) {
	st, err := p.status(proc.pid)
	if err != nil {
		return
	}
	title := p.title(proc.pid)
	main := p.isMain(proc, st, title)
	began := p.began(proc.pid)
	for _, inode := range p.sockets(proc.pid) {
		h := p.ssh[inode]
		h.pids = append(h.pids, proc.pid)
		h.root = h.root || st.root
		h.preauth = h.preauth || isPreauth(proc.exe, title)
		if main {
			h.listener = proc.pid
		}
		if st.root && began > 0 && (h.began == 0 || began < h.began) {
			h.began = began
		}
		p.ssh[inode] = h
	}
}

// isMain reports whether a process is an sshd that waits for connections. Processes
// that serve one also listen, for `ssh -R`, and survive a restart of the service. A
// title without the prefix "sshd: " is the command line, unchanged by sshd before 8.2.
func (p *Processes) isMain(proc process, st status, title string) bool {
	if path.Base(proc.exe) != "sshd" || !st.root {
		return false
	}
	if strings.HasPrefix(title, "sshd: ") && !strings.Contains(title, " [listener] ") {
		return false
	}
	i, ok := slices.BinarySearchFunc(p.list, st.ppid, func(q process, pid int) int { return q.pid - pid })
	return !ok || !isSSHD(p.list[i].exe)
}

// isPreauth reports whether an sshd process serves a connection whose peer has not
// authenticated. It then runs sshd-auth, or has one of the titles set by sshd.c,
// sshd-session.c and auth2.c. The user's name in a title cannot contain a bracket
// (useradd(8)), and is "unknown" if the user does not exist.
func isPreauth(exe, title string) bool {
	words := []string{"[net]", "[accepted]", "[rexeced]", "[session-auth"}
	return path.Base(exe) == "sshd-auth" || slices.ContainsFunc(words, func(word string) bool { return strings.Contains(title, word) })
}

// authenticated reports whether a root-owned sshd process has a connection's socket
// open, and the peer has authenticated.
func (p *Processes) authenticated(s system.Socket) bool {
	h := p.ssh[s.Inode]
	return s.Proto == "tcp" && h.root && !h.preauth
}

// Names returns the names of the processes that have the sockets open, by inode. If
// several share a socket, it is the oldest one except PID 1, which opens sockets for
// services. It takes 2 ms with a hundred processes. Any user can give a process any name.
func (p *Processes) Names(sockets []system.Socket) map[uint64]string {
	sought := map[uint64]bool{} // true if no process except PID 1 was found yet
	for _, s := range sockets {
		sought[s.Inode] = true
	}
	names := map[uint64]string{}
	for _, proc := range p.list {
		if len(sought) == 0 {
			break
		}
		found := slices.DeleteFunc(p.sockets(proc.pid), func(inode uint64) bool { return !sought[inode] })
		if len(found) == 0 {
			continue
		}
		name, err := p.name(proc.pid)
		if err != nil {
			continue
		}
		for _, inode := range found {
			names[inode] = name
			if proc.pid != 1 {
				delete(sought, inode)
			}
		}
	}
	return names
}

// name returns a process's name, printable. /proc/PID/comm appeared in Linux 2.6.33;
// /proc/PID/stat has the same name in parentheses, and the name may contain parentheses.
func (p *Processes) name(pid int) (string, error) {
	comm, err := p.read(pid, "comm", 64)
	if errors.Is(err, fs.ErrNotExist) {
		comm, err = p.read(pid, "stat", 4096)
		_, comm, _ = bytes.Cut(comm, []byte("("))
		comm = comm[:max(0, bytes.LastIndexByte(comm, ')'))]
	}
	return system.Printable(strings.TrimSuffix(string(comm), "\n")), err
}

func (p *Processes) path(pid int, file string) string {
	return p.proc + "/" + strconv.Itoa(pid) + "/" + file
}

// read reads at most max bytes of a process's file.
func (p *Processes) read(pid int, file string, max int64) ([]byte, error) {
	f, err := os.Open(p.path(pid, file))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var data bytes.Buffer
	data.Grow(int(min(max, 2048))) // enough for most of these files
	_, err = data.ReadFrom(io.LimitReader(f, max))
	return data.Bytes(), err
}

// rootOwned reports whether a process runs a root-owned program that no other user can
// write to. The link /proc/PID/exe leads to the exact file, even if it was deleted.
func (p *Processes) rootOwned(pid int) bool {
	fi, err := os.Stat(p.path(pid, "exe"))
	if err != nil || !fi.Mode().IsRegular() || fi.Mode().Perm()&0o022 != 0 {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && st.Uid == 0
}

// status is parsed from /proc/PID/status.
type status struct {
	ppid int
	uid  uint32 // the real user
	same bool   // the effective, saved and file system users are the same
	root bool   // same, and root
}

func (p *Processes) status(pid int) (status, error) {
	data, err := p.read(pid, "status", 16<<10)
	if err != nil {
		return status{}, err
	}
	return parseStatus(data)
}

// parseStatus parses /proc/PID/status (proc(5)). A process can have any name, but the
// kernel escapes newlines in it.
func parseStatus(data []byte) (status, error) {
	var st status
	var hasPPid, hasUid bool
	for text := string(data); text != "" && !(hasPPid && hasUid); {
		var line string
		line, text, _ = strings.Cut(text, "\n")
		key, value, _ := strings.Cut(line, ":\t")
		switch key {
		case "PPid":
			var err error
			if st.ppid, err = strconv.Atoi(value); err != nil {
				return status{}, fmt.Errorf("invalid PPid %q", value)
			}
			hasPPid = true
		case "Uid":
			ids := strings.Split(value, "\t")
			uid, err := strconv.ParseUint(ids[0], 10, 32)
			if err != nil || len(ids) != 4 {
				return status{}, fmt.Errorf("invalid Uid %q", value)
			}
			hasUid = true
			st.uid, st.same = uint32(uid), len(slices.Compact(ids)) == 1
			st.root = st.same && uid == 0
		}
	}
	if !hasPPid || !hasUid {
		return status{}, errors.New("status without PPid or Uid")
	}
	return st, nil
}

// began returns the uptime when a process started, or zero if unknown. It is field 22
// of /proc/PID/stat (proc(5)), in hundredths of a second: USER_HZ is 100 on every
// architecture that we build for.
func (p *Processes) began(pid int) time.Duration {
	return time.Duration(p.stat(pid, 22)) * 10 * time.Millisecond
}

// stat returns a numeric field of /proc/PID/stat after the name, or 0 if it cannot be
// read.
func (p *Processes) stat(pid, field int) int64 {
	data, _ := p.read(pid, "stat", 4096)
	// The name, in parentheses, may contain anything. The state after it is field 3.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) <= field-3 {
		return 0
	}
	n, _ := strconv.ParseInt(fields[field-3], 10, 64)
	return n
}

// title returns a process's command line, which sshd overwrites.
func (p *Processes) title(pid int) string {
	data, _ := p.read(pid, "cmdline", 4096) // empty if the process has ended
	return string(bytes.ReplaceAll(bytes.TrimRight(data, "\x00"), []byte{0}, []byte{' '}))
}

// sockets returns the inodes of the sockets that a process has open.
func (p *Processes) sockets(pid int) []uint64 {
	dir := p.path(pid, "fd")
	names, _ := readDirNames(dir) // the process may have ended
	var list []uint64
	for _, name := range names {
		target, _ := os.Readlink(dir + "/" + name)
		if inode, ok := strings.CutPrefix(target, "socket:["); ok {
			if n, err := strconv.ParseUint(strings.TrimSuffix(inode, "]"), 10, 64); err == nil {
				list = append(list, n)
			}
		}
	}
	return list
}

// servesTun reports whether a process has a tun or tap interface open (tun_chr_show_fdinfo
// in the kernel's drivers/net/tun.c).
func (p *Processes) servesTun(pid int, name string) bool {
	names, _ := readDirNames(p.path(pid, "fd"))
	return slices.ContainsFunc(names, func(fd string) bool {
		if target, _ := os.Readlink(p.path(pid, "fd/"+fd)); path.Base(target) != "tun" {
			return false
		}
		info, _ := p.read(pid, "fdinfo/"+fd, 4096)
		return strings.Contains(string(info), "iff:\t"+name+"\n")
	})
}

// readDirNames is os.ReadDir without sorting and types.
func readDirNames(path string) ([]string, error) {
	d, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}
