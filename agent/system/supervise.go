package system

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// supervised is set in the environment of a process that [Supervise] started.
	supervised = "BASICFW_SUPERVISED"
	// enoughTasks is more threads and processes than a command needs at once.
	enoughTasks = 48
	// outOfProcesses is the error in place of the runtime's stack trace.
	outOfProcesses = "this machine or container is out of processes"
)

// Supervise runs this program as a child process if the machine is almost out of
// processes, and returns its exit code. ended is false if it is not, or if this is that
// child: the caller then continues.
//
// Go's runtime ends a program with a stack trace and exit code 2 if it cannot create a
// thread, and nothing in that program can prevent it. The supervisor needs no more threads.
func Supervise(stderr io.Writer) (code int, ended bool) {
	if os.Getenv(supervised) != "" || slices.Contains(os.Args, "run") || spareTasks() >= enoughTasks {
		return 0, false
	}
	fd, err := unix.MemfdCreate("stderr", unix.MFD_CLOEXEC)
	if err != nil {
		return 0, false
	}
	runtime.LockOSThread() // for the signal, which the end of the thread would send
	pid, err := syscall.ForkExec(Self, os.Args, &syscall.ProcAttr{Env: append(os.Environ(), supervised+"=1"),
		Files: []uintptr{0, 1, uintptr(fd)}, Sys: &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}})
	var status syscall.WaitStatus
	for err == nil {
		if _, err = syscall.Wait4(pid, &status, 0, nil); err == nil {
			break
		} else if err == syscall.EINTR {
			err = nil
		}
	}
	if err != nil {
		fmt.Fprintf(stderr, "basicfw-agent: %s: %v\n", outOfProcesses, err)
		return 1, true
	}
	text := make([]byte, 1<<20)
	n, _ := unix.Pread(fd, text, 0)
	text = text[:max(n, 0)]
	if threadless(text) {
		fmt.Fprintf(stderr, "basicfw-agent: %s: cannot create a thread\n", outOfProcesses)
		return 1, true
	}
	stderr.Write(text)
	if status.Signaled() {
		return 128 + int(status.Signal()), true
	}
	return status.ExitStatus(), true
}

// threadless reports whether a program written in Go ended because it could not create a
// thread, from its standard error.
func threadless(stderr []byte) bool {
	return bytes.Contains(stderr, []byte("failed to create new OS thread")) || bytes.Contains(stderr, []byte("pthread_create failed"))
}

// spareTasks returns how many more threads and processes this process can create at
// least, as far as is known. A low limit per user counts as exhausted, because the
// number of the user's other processes is not known.
func spareTasks() int {
	number := func(path string) (n int, ok bool) {
		text, err := os.ReadFile(path)
		n, e := strconv.Atoi(string(bytes.TrimSpace(text)))
		return n, err == nil && e == nil
	}
	spare := enoughTasks
	if most, ok := number("/proc/sys/kernel/threads-max"); ok {
		load, _ := os.ReadFile("/proc/loadavg")
		if f := strings.Fields(string(load)); len(f) > 3 {
			_, total, _ := strings.Cut(f[3], "/")
			if n, err := strconv.Atoi(total); err == nil {
				spare = min(spare, most-n)
			}
		}
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &limit); err == nil && limit.Cur < 4*enoughTasks {
		spare = 0
	}
	groups, _ := os.ReadFile("/proc/self/cgroup")
	for _, line := range strings.Split(string(groups), "\n") {
		f := strings.SplitN(line, ":", 3)
		if len(f) < 3 || f[1] != "" && f[1] != "pids" {
			continue
		}
		top := filepath.Join("/sys/fs/cgroup", f[1])
		for dir := filepath.Join(top, f[2]); strings.HasPrefix(dir, top); dir = filepath.Dir(dir) {
			most, limited := number(dir + "/pids.max")
			if now, ok := number(dir + "/pids.current"); ok && limited {
				spare = min(spare, most-now)
			}
		}
	}
	return spare
}
