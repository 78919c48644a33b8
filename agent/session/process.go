// Package session finds out who is logged in over SSH, and what sshd listens
// on. Most of what it reads could be written by some user of the machine: it
// takes nothing for true that is not borne out by the kernel or by files of
// root's.
package session

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/basicfw/basicfw-agent/agent/system"
)

// Processes are the machine's processes, as /proc shows them at one moment.
type Processes struct {
	proc string // "/proc"
	list []process
	// ssh says for each socket that processes of OpenSSH's server have open
	// what these are.
	ssh map[uint64]holders
}

// process is one that runs a program: kernel threads and zombies do not.
type process struct {
	pid int
	exe string // without the " (deleted)" that it has after an upgrade
}

// holders are what the processes of OpenSSH's server are that have a socket
// open.
type holders struct {
	listener int   // the main process, the one that listens, or 0
	pids     []int // all of them
	root     bool  // one belongs to root
	preauth  bool  // one has not yet seen a key or a password
	// began is when the first of root's began, since the machine did; zero is
	// not known.
	began time.Duration
}

// ReadProcesses looks at the processes there are. It opens the files of sshd's
// processes only: that takes 0.4 ms where there are a hundred.
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
		if isSSHD(proc.exe) && p.rootOwned(proc.pid) {
			p.addSSH(proc)
		}
	}
	return p, nil
}

// isSSHD tells whether a program is one of OpenSSH's server. Up to 9.7 all of
// it is sshd; then sshd-session serves a connection, and from 10.0 on
// sshd-auth authenticates it.
func isSSHD(exe string) bool {
	switch path.Base(exe) {
	case "sshd", "sshd-session", "sshd-auth":
		return true
	}
	return false
}

// addSSH notes the sockets of a process of OpenSSH's server.
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

// isMain tells whether a process is an sshd that waits for connections, and
// none that serves one: those listen too, for `ssh -R`, and outlive their
// parent when the service is restarted. A title that does not begin with
// "sshd: " is the command line, which sshd older than 8.2 leaves as it is.
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

// isPreauth tells whether a process of sshd's serves a connection whose peer
// has not authenticated: it runs sshd-auth, or has one of the titles that
// sshd.c, sshd-session.c and auth2.c give it until then. A user's name in a
// title can hold no bracket (useradd(8)), and of a user that does not exist
// it says "unknown".
func isPreauth(exe, title string) bool {
	if path.Base(exe) == "sshd-auth" {
		return true
	}
	for _, word := range []string{"[net]", "[accepted]", "[rexeced]", "[session-auth"} {
		if strings.Contains(title, word) {
			return true
		}
	}
	return false
}

// authenticated tells whether a connection's socket belongs to a process of
// root's sshd, and its peer has authenticated.
func (p *Processes) authenticated(s system.Socket) bool {
	h := p.ssh[s.Inode]
	return h.root && !h.preauth
}

// Names gives the names of the processes that have sockets open. Of several
// that share one, it is the oldest, but not PID 1 that has opened it for
// another. It reads what processes have open, until all are known: 2 ms where there
// are a hundred. Any user can give a process any name.
func (p *Processes) Names(sockets []system.Socket) map[uint64]string {
	want := map[uint64]bool{}
	for _, s := range sockets {
		want[s.Inode] = true
	}
	names := map[uint64]string{}
	byInit := map[uint64]bool{}
	sought := len(want) // for which nobody was found, or none but PID 1
	for _, proc := range p.list {
		if sought == 0 {
			break
		}
		for _, inode := range p.sockets(proc.pid) {
			if _, known := names[inode]; !want[inode] || known && !byInit[inode] {
				continue
			}
			comm, err := p.read(proc.pid, "comm", 64)
			if err != nil {
				continue
			}
			if proc.pid != 1 {
				sought--
			}
			names[inode] = system.Printable(strings.TrimSuffix(string(comm), "\n"))
			byInit[inode] = proc.pid == 1
		}
	}
	return names
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
	return io.ReadAll(io.LimitReader(f, max))
}

// rootOwned tells whether a process runs a program that is root's, and that
// nobody else can write. /proc/PID/exe leads to the very file, deleted or not.
func (p *Processes) rootOwned(pid int) bool {
	fi, err := os.Stat(p.path(pid, "exe"))
	if err != nil || !fi.Mode().IsRegular() || fi.Mode().Perm()&0o022 != 0 {
		return false
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	return ok && st.Uid == 0
}

// status is what /proc/PID/status says.
type status struct {
	ppid int
	uid  uint32 // the real, effective, saved and file system user
	same bool   // all four are
	root bool   // and root
}

func (p *Processes) status(pid int) (status, error) {
	data, err := p.read(pid, "status", 16<<10)
	if err != nil {
		return status{}, err
	}
	return parseStatus(data)
}

// parseStatus reads proc(5)'s status. A process may have any name, but the
// kernel escapes a newline in it.
func parseStatus(data []byte) (status, error) {
	var st status
	var hasPPid, hasUid bool
	for _, line := range strings.Split(string(data), "\n") {
		key, value, _ := strings.Cut(line, ":\t")
		switch key {
		case "PPid":
			var err error
			if st.ppid, err = strconv.Atoi(value); err != nil {
				return status{}, fmt.Errorf("PPid %q", value)
			}
			hasPPid = true
		case "Uid":
			ids := strings.Split(value, "\t")
			uid, err := strconv.ParseUint(ids[0], 10, 32)
			if err != nil || len(ids) != 4 {
				return status{}, fmt.Errorf("user %q", value)
			}
			hasUid = true
			st.uid, st.same = uint32(uid), len(slices.Compact(ids)) == 1
			st.root = st.same && uid == 0
		}
	}
	if !hasPPid || !hasUid {
		return status{}, errors.New("a status without PPid or Uid")
	}
	return st, nil
}

// began tells when a process began, since the machine did: field 22 of
// proc(5)'s stat, in hundredths of a second (USER_HZ is 100 on every
// architecture that we build for). Zero is not known.
func (p *Processes) began(pid int) time.Duration {
	return time.Duration(p.stat(pid, 22)) * 10 * time.Millisecond
}

// stat gives a numeric field of proc(5)'s stat, behind the name; 0 where it
// cannot be read.
func (p *Processes) stat(pid, field int) int64 {
	data, err := p.read(pid, "stat", 4096)
	if err != nil {
		return 0
	}
	// The name, in parentheses, may hold anything. The state, behind it, is
	// field 3.
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(fields) <= field-3 {
		return 0
	}
	n, err := strconv.ParseInt(fields[field-3], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// title is a process's command line, which sshd writes over.
func (p *Processes) title(pid int) string {
	data, err := p.read(pid, "cmdline", 4096)
	if err != nil {
		return ""
	}
	return string(bytes.ReplaceAll(bytes.TrimRight(data, "\x00"), []byte{0}, []byte{' '}))
}

// sockets gives the inodes of the sockets that a process has open.
func (p *Processes) sockets(pid int) []uint64 {
	dir := p.path(pid, "fd")
	names, err := readDirNames(dir)
	if err != nil {
		return nil
	}
	var list []uint64
	for _, name := range names {
		target, err := os.Readlink(dir + "/" + name)
		if err != nil {
			continue
		}
		if inode, ok := strings.CutPrefix(target, "socket:["); ok {
			if n, err := strconv.ParseUint(strings.TrimSuffix(inode, "]"), 10, 64); err == nil {
				list = append(list, n)
			}
		}
	}
	return list
}

// readDirNames is os.ReadDir without the sorting and the types.
func readDirNames(path string) ([]string, error) {
	d, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Readdirnames(-1)
}
