package system

import (
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// FreeMemory returns unused memory to the kernel, and unmaps the program's code. Code that runs
// next is mapped again from the page cache, usually without I/O (madvise(2), MADV_DONTNEED).
func FreeMemory() {
	debug.FreeOSMemory()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return // it stays mapped
	}
	for _, line := range strings.Split(string(maps), "\n") {
		fields := strings.Fields(line)
		// Never a writable mapping: its changes would be lost.
		if len(fields) < 6 || !strings.HasPrefix(fields[1], "r-x") || !strings.HasPrefix(fields[5], "/") {
			continue
		}
		var start, end uintptr
		if _, err := fmt.Sscanf(fields[0], "%x-%x", &start, &end); err == nil && start < end {
			_, _, _ = unix.Syscall(unix.SYS_MADVISE, start, end-start, unix.MADV_DONTNEED) // on failure, the code stays mapped
		}
	}
}
